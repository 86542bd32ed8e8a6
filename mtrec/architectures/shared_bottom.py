"""Shared-bottom: one perceptron for all tasks.

Letters in shapes: B rows on this rank, D shared width, H width of the last layer.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mtrec.architectures.experts import BatchedMLP, checked_names
from mtrec.kinds import Fraction, NonEmptyWidths


class SharedBottom(nn.Module):
    """One perceptron for all tasks (Caruana, "Multitask learning", 1997): every task gets the same tensor.

    Args:
        input_dim: D.
        tasks: their names.
        expert_layers: widths of the perceptron.
        dropout: share of the outputs of each layer that is dropped.
        layer_norm: normalise before each ReLU.

    >>> import torch
    >>> h = SharedBottom(8, ["click", "dwell"])(torch.ones(5, 8))
    >>> h["click"] is h["dwell"], tuple(h["click"].shape)
    (True, (5, 64))
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Sequence[str],
        *,
        expert_layers: NonEmptyWidths = (128, 64),
        dropout: Fraction = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = checked_names(tasks)
        self.output_dim = expert_layers[-1]
        self.bottom = BatchedMLP(1, input_dim, expert_layers, dropout, layer_norm)

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, H)}, the same tensor for all."""
        return dict.fromkeys(self.tasks, self.bottom(x_BD).squeeze(0))

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{}: there are none."""
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        """All, where there is more than one task."""
        return list(self.parameters()) if len(self.tasks) > 1 else []

    def flops_per_row(self) -> int:
        """Of the matrix products of forward."""
        return self.bottom.flops_per_row()
