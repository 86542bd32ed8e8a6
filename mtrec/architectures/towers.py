"""Towers: a perceptron for each task between the architecture and the head.

Letters in shapes: B rows on this rank, H width of the architecture's output, H' of the tower's.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtrec.architectures.experts import BatchedMLP, checked_names
from mtrec.kinds import Widths


class Towers(nn.Module):
    """A perceptron for each task on what the architecture gives it: {task: (B, H)} -> {task: (B, H')}.

    Towers of the same widths run as one. Each layer is followed by ReLU; the head's last linear map is not here.

    Args:
        tasks: their names.
        input_dim: H.
        layers: widths for all tasks, or {task: widths}; empty widths hand the tensor on as it is.
        dropout: share of the outputs of each layer that is dropped.
        layer_norm: normalise before each ReLU.

    `output_dims` is {task: H'}.

    Raises:
        ValueError: `layers` lacks a task or names another.

    >>> towers = Towers(["click", "dwell"], 8, {"click": (4,), "dwell": ()})
    >>> {task: tuple(h.shape) for task, h in towers({"click": torch.ones(5, 8), "dwell": torch.ones(5, 8)}).items()}
    {'click': (5, 4), 'dwell': (5, 8)}
    """

    def __init__(
        self,
        tasks: Sequence[str],
        input_dim: int,
        layers: Widths | Mapping[str, Widths],
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = checked_names(tasks)
        widths = layers if isinstance(layers, Mapping) else dict.fromkeys(tasks, layers)
        if set(widths) != set(tasks):
            raise ValueError(f"`towers` should have widths for the tasks {sorted(tasks)}. Found {sorted(widths)}.")
        self.output_dims = {task: widths[task][-1] if widths[task] else input_dim for task in tasks}
        by_widths: dict[tuple[int, ...], list[str]] = {}
        for task in tasks:
            by_widths.setdefault(tuple(widths[task]), []).append(task)
        self.groups = tuple(tuple(group) for group in by_widths.values())
        mlps = [BatchedMLP(len(group), input_dim, each, dropout, layer_norm) for each, group in by_widths.items()]
        self.mlps = nn.ModuleList(mlps)
        self._flops = sum(mlp.flops_per_row() for mlp in mlps)

    def forward(self, mixed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """{task: (B, H)} -> {task: (B, H')}, in the order of the tasks."""
        towers: dict[str, Tensor] = {}
        for group, mlp in zip(self.groups, self.mlps, strict=True):
            inputs = [mixed[task] for task in group]
            if not mlp.linears:
                outputs = inputs
            elif all(x is inputs[0] for x in inputs):  # one tensor for all tasks (shared bottom): no stack, no bmm
                outputs = list(mlp(inputs[0]).unbind(0))
            else:
                outputs = list(mlp(torch.stack(inputs)).unbind(0))
            towers |= zip(group, outputs, strict=True)
        return {task: towers[task] for task in self.tasks}

    def flops_per_row(self) -> int:
        """Of the matrix products of forward."""
        return self._flops
