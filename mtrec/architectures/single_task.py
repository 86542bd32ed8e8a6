"""Single-task: a perceptron for each task.

Letters in shapes: B rows on this rank, D shared width, H width of the last layer.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from mtrec.architectures.experts import BatchedMLP, checked_names
from mtrec.kinds import Fraction, NonEmptyWidths


class SingleTask(nn.Module):
    """A perceptron of its own for every task: no dense parameter above x_BD is shared (the tables below x_BD are).

    The baseline that shows what sharing brings. For models that share nothing at all, train one run a task.

    Args:
        input_dim: D.
        tasks: their names.
        expert_layers: widths of each task's perceptron.
        dropout: share of the outputs of each layer that is dropped.
        layer_norm: normalise before each ReLU.

    >>> import torch
    >>> model = SingleTask(8, ["click", "dwell"], expert_layers=(16, 4))
    >>> {task: tuple(h.shape) for task, h in model(torch.ones(5, 8)).items()}
    {'click': (5, 4), 'dwell': (5, 4)}
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
        self.experts = BatchedMLP(len(tasks), input_dim, expert_layers, dropout, layer_norm)

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, H)}."""
        return dict(zip(self.tasks, self.experts(x_BD).unbind(0), strict=True))

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{}: there are none."""
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        """[]: nothing is shared."""
        return []

    def flops_per_row(self) -> int:
        """Of the matrix products of forward."""
        return self.experts.flops_per_row()
