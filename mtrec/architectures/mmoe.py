"""MMoE: experts and a gate for each task.

Letters in shapes: B rows on this rank, D shared width, E experts, H expert width, K tasks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.architectures.experts import Abreast, BatchedMLP, Gates, checked_names, mix, together
from mtrec.dropout import without_dropout
from mtrec.kinds import Fraction, NonEmptyWidths, PositiveInt


class MMoE(nn.Module):
    """Mixture of experts with a gate for each task.

    Source: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts" (2018):
    f_k(x) = sum_e softmax(W_k x)_e expert_e(x). No deviation; dropout, gate dropout and layer norm are off by default.

    Args:
        input_dim: D.
        tasks: their names.
        num_experts: number of experts, E.
        expert_layers: widths of each expert, each layer followed by ReLU.
        dropout: share of the outputs of each expert layer that is dropped.
        gate_dropout: probability that an expert is left out of a row's mixture (see `Gates`).
        layer_norm: normalise before each ReLU.

    >>> model = MMoE(8, ["click", "dwell"], num_experts=3, expert_layers=(16, 4))
    >>> {task: tuple(h.shape) for task, h in model(torch.ones(5, 8)).items()}
    {'click': (5, 4), 'dwell': (5, 4)}
    >>> {gate: tuple(weights.shape) for gate, weights in model.gates(torch.ones(5, 8)).items()}
    {'click': (5, 3), 'dwell': (5, 3)}
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
        self.task_gates = Gates(len(tasks), input_dim, num_experts, gate_dropout)
        self._mix_flops = 2 * len(tasks) * num_experts * self.output_dim

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, H)}."""
        mixed_BKH = mix(*together(x_BD, self.task_gates, Abreast(self.experts, mixed=True)))
        return dict(zip(self.tasks, mixed_BKH.unbind(1), strict=True))

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, E)}, without gate dropout and without gradient."""
        with torch.no_grad(), without_dropout():
            return dict(zip(self.tasks, self.task_gates(x_BD).unbind(0), strict=True))

    def shared_parameters(self) -> list[nn.Parameter]:
        """The experts, where there is more than one task."""
        return list(self.experts.parameters()) if len(self.tasks) > 1 else []

    def flops_per_row(self) -> int:
        """Of the matrix products of forward."""
        return self.experts.flops_per_row() + self.task_gates.flops_per_row() + self._mix_flops
