"""PLE: levels of task experts and shared experts.

Letters in shapes: B rows on this rank, D shared width, E experts a gate sees, H expert width, K tasks, M experts of one
task, S shared experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.architectures.cgc import ExtractionLevel
from mtrec.architectures.experts import checked_names, packed
from mtrec.dropout import without_dropout
from mtrec.kinds import Fraction, NonEmptyWidths, PositiveInt


class PLE(nn.Module):
    """Progressive layered extraction: levels of task experts and shared experts, mixed by gates at each level.

    Source: Tang et al., "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
    Recommendations" (2020). At each level a task's gate mixes the task's own and the shared experts, the shared gate
    mixes all; task experts and task gates read the task's mixture of the level before, the shared ones the shared
    mixture, the first level x_BD. The last level has no shared gate. No deviation; the gates have no bias.

    Args:
        input_dim: D.
        tasks: their names.
        levels: number of levels; 1 is CGC.
        num_task_experts: experts of each task at each level.
        num_shared_experts: shared experts at each level.
        expert_layers: widths of each expert at each level, each layer followed by ReLU.
        dropout: share of the outputs of each expert layer that is dropped.
        gate_dropout: probability that an expert is left out of a row's mixture (see `Gates`).
        layer_norm: normalise before each ReLU.

    Raises:
        ValueError: a task is called "shared", which names the shared gate.

    >>> model = PLE(8, ["click", "dwell"], expert_layers=(16, 4))
    >>> {task: tuple(h.shape) for task, h in model(torch.ones(5, 8)).items()}
    {'click': (5, 4), 'dwell': (5, 4)}
    >>> {gate: tuple(weights.shape) for gate, weights in model.gates(torch.ones(5, 8)).items()}  # doctest: +ELLIPSIS
    {'level1/click': (5, 3), 'level1/dwell': (5, 3), 'level1/shared': (5, 4), 'level2/click': (5, 3), ...}
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Sequence[str],
        *,
        levels: PositiveInt = 2,
        num_task_experts: PositiveInt = 1,
        num_shared_experts: PositiveInt = 2,
        expert_layers: NonEmptyWidths = (128, 64),
        dropout: Fraction = 0.0,
        gate_dropout: Fraction = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = checked_names(tasks)
        if "shared" in tasks:
            raise ValueError("`tasks.shared` should have another name: 'shared' names the gate that no task owns.")
        self.output_dim = expert_layers[-1]
        stack = [
            ExtractionLevel(
                len(tasks),
                input_dim if level == 0 else self.output_dim,
                num_task_experts,
                num_shared_experts,
                expert_layers,
                dropout,
                gate_dropout,
                layer_norm,
                last=level == levels - 1,
            )
            for level in range(levels)
        ]
        self.levels = nn.ModuleList(stack)
        self._flops = sum(level.flops_per_row() for level in stack)

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, H)}."""
        x = x_BD
        for level in self.levels:
            x = level(packed(x))[0].transpose(0, 1)
        return dict(zip(self.tasks, x.unbind(0), strict=True))

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{"level1/click": (B, M + S), "level1/shared": (B, K M + S), ...}, without dropout and without gradient."""
        found: dict[str, Tensor] = {}
        x = x_BD
        with torch.no_grad(), without_dropout():
            for number, level in enumerate(self.levels, start=1):
                assert isinstance(level, ExtractionLevel)
                if number == len(self.levels):  # whose experts nothing asks for
                    gates_KBE, shared_1BE = *level.gates(packed(x)), None
                else:
                    mixed_BGH, gates_KBE, shared_1BE = level(packed(x))
                    x = mixed_BGH.transpose(0, 1)
                found |= {f"level{number}/{task}": gate for task, gate in zip(self.tasks, gates_KBE, strict=True)}
                if shared_1BE is not None:
                    found[f"level{number}/shared"] = shared_1BE.squeeze(0)
        return found

    def shared_parameters(self) -> list[nn.Parameter]:
        """Shared experts and shared gates; the task experts below the last level, which the shared gate hands on to all
        tasks; and the task gates two levels below it, which feed such experts."""
        if len(self.tasks) == 1:
            return []
        shared: list[nn.Parameter] = []
        for above, level in enumerate(reversed(self.levels)):
            assert isinstance(level, ExtractionLevel)
            shared += level.shared_experts.parameters()
            shared += level.shared_gate.parameters() if level.shared_gate is not None else []
            shared += level.task_experts.parameters() if above >= 1 else []
            shared += level.task_gates.parameters() if above >= 2 else []
        return shared

    def flops_per_row(self) -> int:
        """Of the matrix products of forward."""
        return self._flops
