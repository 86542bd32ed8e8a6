"""OMoE: experts and one gate for all tasks.

Letters in shapes: B rows on this rank, D shared width, E experts, H expert width, K tasks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.architectures.experts import Abreast, BatchedMLP, Gates, checked_names, mix, together
from mtrec.dropout import without_dropout
from mtrec.kinds import Fraction, NonEmptyWidths, PositiveInt


class OMoE(nn.Module):
    """Mixture of experts with one gate for all tasks, which all get the same mixture (OMoE in Ma et al., 2018).

    Args:
        input_dim: D.
        tasks: their names.
        num_experts: number of experts, E.
        expert_layers: widths of each expert, each layer followed by ReLU.
        dropout: share of the outputs of each expert layer that is dropped.
        gate_dropout: probability that an expert is left out of a row's mixture (see `Gates`).
        layer_norm: normalise before each ReLU.

    >>> model = OMoE(8, ["click", "dwell"], num_experts=3)
    >>> {gate: tuple(weights.shape) for gate, weights in model.gates(torch.ones(5, 8)).items()}
    {'shared': (5, 3)}
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Sequence[str],
        *,
        num_experts: PositiveInt = 4,
        expert_layers: NonEmptyWidths = (128, 64),
        dropout: Fraction = 0.0,
        gate_dropout: Fraction = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = checked_names(tasks)
        self.output_dim = expert_layers[-1]
        self.experts = BatchedMLP(num_experts, input_dim, expert_layers, dropout, layer_norm)
        self.gate = Gates(1, input_dim, num_experts, gate_dropout)
        self._mix_flops = 2 * num_experts * self.output_dim

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, H)}, the same tensor for all."""
        mixed_B1H = mix(*together(x_BD, self.gate, Abreast(self.experts, mixed=True)))
        return dict.fromkeys(self.tasks, mixed_B1H.squeeze(1))

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{"shared": (B, E)}, without gate dropout and without gradient."""
        with torch.no_grad(), without_dropout():
            return {"shared": self.gate(x_BD).squeeze(0)}

    def shared_parameters(self) -> list[nn.Parameter]:
        """All, where there is more than one task."""
        return list(self.parameters()) if len(self.tasks) > 1 else []

    def flops_per_row(self) -> int:
        """Of the matrix products of forward."""
        return self.experts.flops_per_row() + self.gate.flops_per_row() + self._mix_flops
