"""CGC: experts of each task and shared experts, and the level of it that PLE stacks.

Letters in shapes: B rows on this rank, D shared width, E experts a gate sees, H expert width, K tasks, M experts of one
task, S shared experts, G gates (those of the tasks, then the shared one).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.architectures.experts import BatchedMLP, Gates, checked_names, mix, together
from mtrec.dropout import without_dropout
from mtrec.kinds import Fraction, NonEmptyWidths, PositiveInt


class ExtractionLevel(nn.Module):
    """One level of PLE: experts of each task, shared experts, a gate for each task and, unless last, a shared gate.

    A task's gate sees that task's experts, then the shared ones (in this order in its weights) and reads the task's own
    input; the shared gate sees all tasks' experts, then the shared ones, and reads the shared input.

    >>> level = ExtractionLevel(2, 8, 1, 2, (4,), last=True)
    >>> tasks_BKH, shared_BH, _, _ = level(torch.ones(5, 8), torch.ones(5, 8))
    >>> tuple(tasks_BKH.shape), shared_BH
    ((5, 2, 4), None)
    """

    def __init__(
        self,
        num_tasks: int,
        input_dim: int,
        num_task_experts: int,
        num_shared_experts: int,
        expert_layers: Sequence[int],
        dropout: float = 0.0,
        gate_dropout: float = 0.0,
        layer_norm: bool = False,
        *,
        last: bool,
    ) -> None:
        super().__init__()
        own, shared, gated = num_tasks * num_task_experts, num_shared_experts, num_task_experts + num_shared_experts
        self.task_experts = BatchedMLP(own, input_dim, expert_layers, dropout, layer_norm)
        self.shared_experts = BatchedMLP(shared, input_dim, expert_layers, dropout, layer_norm)
        self.task_gates = Gates(num_tasks, input_dim, gated, gate_dropout)
        self.shared_gate = None if last else Gates(1, input_dim, own + shared, gate_dropout)
        self._split = (num_task_experts, num_shared_experts)
        self._mix_flops = 2 * (num_tasks + (not last)) * (own + shared) * expert_layers[-1]

    def forward(self, tasks_x: Tensor, shared_x: Tensor) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """(B, D) or (K, B, H) and (B, D or H) -> tasks (B, K, H), shared (B, H), and the weights of both gates.

        What is shared is None at the last level.
        """
        gates = [self.task_gates] if self.shared_gate is None else [self.task_gates, self.shared_gate]
        blocks: list[BatchedMLP | Gates] = [*gates, self.task_experts, self.shared_experts]
        if tasks_x is shared_x:  # the first level
            found = together(shared_x, *blocks)
        else:
            of_tasks = (self.task_gates, self.task_experts)
            found = [block(tasks_x if block in of_tasks else shared_x) for block in blocks]
        gates_KBE, *shared_gate, task_experts_EBH, shared_experts_EBH = found
        own_KBM, seen_KBS = gates_KBE.split(self._split, dim=2)
        # Each task's weights stand in the columns of its own experts and are zero elsewhere, so that all tasks are
        # mixed by one product that reads every expert once.
        own_KBE = torch.diag_embed(own_KBM.permute(1, 2, 0), dim1=0, dim2=2).flatten(2)
        gates_GBE = torch.cat([own_KBE, seen_KBS], dim=2)
        mixed_BGH = mix(torch.cat([gates_GBE, *shared_gate]), task_experts_EBH, shared_experts_EBH)
        if not shared_gate:
            return mixed_BGH, None, gates_KBE, None
        tasks_BKH, shared_B1H = mixed_BGH.split((gates_KBE.shape[0], 1), dim=1)
        return tasks_BKH, shared_B1H.squeeze(1), gates_KBE, shared_gate[0]

    def flops_per_row(self) -> int:
        """Of the matrix products of forward, the zeros in the mixture included."""
        parts = [self.task_experts, self.shared_experts, self.task_gates, self.shared_gate]
        return sum(part.flops_per_row() for part in parts if part is not None) + self._mix_flops


class CGC(nn.Module):
    """Customized gate control (Tang et al., 2020): experts of each task beside shared ones; PLE with one level.

    Args:
        input_dim: D.
        tasks: their names.
        num_task_experts: experts of each task.
        num_shared_experts: experts of all tasks.
        expert_layers: widths of each expert, each layer followed by ReLU.
        dropout: share of the outputs of each expert layer that is dropped.
        gate_dropout: probability that an expert is left out of a row's mixture (see `Gates`).
        layer_norm: normalise before each ReLU.

    >>> model = CGC(8, ["click", "dwell"], num_task_experts=2, num_shared_experts=1)
    >>> {gate: tuple(weights.shape) for gate, weights in model.gates(torch.ones(5, 8)).items()}
    {'click': (5, 3), 'dwell': (5, 3)}
    """

    def __init__(
        self,
        input_dim: int,
        tasks: Sequence[str],
        *,
        num_task_experts: PositiveInt = 1,
        num_shared_experts: PositiveInt = 2,
        expert_layers: NonEmptyWidths = (128, 64),
        dropout: Fraction = 0.0,
        gate_dropout: Fraction = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.tasks = checked_names(tasks)
        self.output_dim = expert_layers[-1]
        self.level = ExtractionLevel(
            len(tasks),
            input_dim,
            num_task_experts,
            num_shared_experts,
            expert_layers,
            dropout,
            gate_dropout,
            layer_norm,
            last=True,
        )

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, H)}."""
        return dict(zip(self.tasks, self.level(x_BD, x_BD)[0].unbind(1), strict=True))

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, M + S)}, the task's own experts first, without gate dropout and without gradient."""
        with torch.no_grad(), without_dropout():
            return dict(zip(self.tasks, self.level.task_gates(x_BD).unbind(0), strict=True))

    def shared_parameters(self) -> list[nn.Parameter]:
        """The shared experts, where there is more than one task."""
        return list(self.level.shared_experts.parameters()) if len(self.tasks) > 1 else []

    def flops_per_row(self) -> int:
        """Of the matrix products of forward."""
        return self.level.flops_per_row()
