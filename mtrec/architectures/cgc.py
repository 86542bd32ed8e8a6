"""CGC: experts of each task and shared experts, and the level of it that PLE stacks.

Letters in shapes: B rows on this rank, D shared width, E experts a gate sees, H expert width, K tasks, M experts of one
task, S shared experts, G gates (those of the tasks, then the shared one).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.architectures.experts import Abreast, BatchedMLP, Gates, checked_names, mix, together
from mtrec.architectures.fan_out import blocks_are_apart
from mtrec.dropout import without_dropout
from mtrec.kinds import Fraction, NonEmptyWidths, PositiveInt


class ExtractionLevel(nn.Module):
    """One level of PLE: experts of each task, shared experts, a gate for each task and, unless last, a shared gate.

    A task's gate sees that task's experts, then the shared ones (in this order in its weights) and reads the task's own
    input; the shared gate sees all tasks' experts, then the shared ones, and reads the shared input.

    >>> level = ExtractionLevel(2, 8, 1, 2, (4,), last=True)
    >>> mixed_BGH, gates_KBE, shared_gate = level(torch.ones(5, 8))
    >>> tuple(mixed_BGH.shape), tuple(gates_KBE.shape), shared_gate
    ((5, 2, 4), (2, 5, 3), None)
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, D), or (K + 1, B, H) of the level before -> mixtures (B, G, H), weights of the tasks' and of the shared gates.

        G is K + 1, and K at the last level, which has no shared gate (None) and so no shared mixture.
        """
        (gates_KBE, *shared_gate), experts = self._blocks(x)
        own_KBM, seen_KBS = gates_KBE.split(self._split, dim=2)
        # Each task's weights stand in the columns of its own experts and are zero elsewhere, so that all tasks are
        # mixed by one product that reads every expert once.
        own_KBE = torch.diag_embed(own_KBM.permute(1, 2, 0), dim1=0, dim2=2).flatten(2)
        gates_GBE = torch.cat([own_KBE, seen_KBS], dim=2)
        mixed_BGH = mix(torch.cat([gates_GBE, *shared_gate]), *experts)
        return mixed_BGH, gates_KBE, shared_gate[0] if shared_gate else None

    def gates(self, x: Tensor) -> list[Tensor]:
        """The weights of the tasks' gates and of the shared one, if any, as in `forward`; no expert runs."""
        inputs = (x, x) if x.dim() == 2 else (x[:-1], x[-1:])
        return [gate(of) for gate, of in zip(self._all_gates, inputs, strict=False)]

    @property
    def _all_gates(self) -> list[Gates]:
        return [self.task_gates] if self.shared_gate is None else [self.task_gates, self.shared_gate]

    def _blocks(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The weights of the gates, as `gates`; all experts, in one tensor where they run as one."""
        own, shared = self.task_experts, self.shared_experts
        first, as_many = x.dim() == 2, self._split[0] == self._split[1]  # maps of unlike inputs run as one in groups of one size
        as_one = (first or as_many) and not blocks_are_apart()
        experts = [Abreast(own, shared, mixed=True)] if as_one else [Abreast(own, mixed=True), Abreast(shared, mixed=True)]
        if first:
            gates = self._all_gates
            found = together(x, *gates, *experts)
            return found[: len(gates)], found[len(gates) :]
        inputs = (x,) if as_one else (x[:-1], x[-1:])
        return self.gates(x), [block(of) for block, of in zip(experts, inputs, strict=True)]

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
        return dict(zip(self.tasks, self.level(x_BD)[0].unbind(1), strict=True))

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
