"""Weights from how fast the losses fall: DWA and FAMO.  Legend: K tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.balancing.adam import Adam
from mtrec.balancing.named import per_task
from mtrec.kinds import NonNegativeFloat, PositiveFloat, PositiveInt

_SMALL = 1e-8  # as TorchJD and the authors of FAMO: keeps the logarithm of a loss of 0 finite


class DWA(nn.Module):
    """w = K softmax(r / temperature), r_k = mean loss of the last window / mean loss of the window before.

    Source: Dynamic Weight Average (Liu, Johns & Davison 2019). Deviations: a window is `window` steps instead of an
    epoch, since one epoch is the rule; a step without labels of a task does not count in its mean, and a window without
    any leaves its means as they were. Weights are 1 until two windows are complete.

    For losses whose means are not negative (that of ziln may be): a ratio of others says nothing.

    Options:
        temperature: of the softmax; the larger, the more equal the weights.
        window: steps of a window.

    >>> method = DWA(["click", "dwell"], window=1)
    >>> both = torch.tensor([True, True])
    >>> for step, losses in enumerate([[1.0, 1.0], [1.0, 0.5], [1.0, 0.5]]):
    ...     weights = method(torch.tensor(losses), None, step, both)
    >>> [round(w, 4) for w in weights.tolist()]  # dwell halved, click stood still
    [1.1244, 0.8756]
    """

    needs_gramian = False
    sum_K: Tensor
    count_K: Tensor
    means_2K: Tensor
    steps: Tensor

    def __init__(self, tasks: Sequence[str], *, temperature: PositiveFloat = 2.0, window: PositiveInt = 100) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.temperature = temperature
        self.window = window
        self.register_buffer("sum_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("count_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("means_2K", torch.zeros(2, len(tasks), dtype=torch.float64))  # before last, last; 0: none
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: softmax(r / temperature) over the active tasks times their number, 0 for the others; then takes in L.

        r_k = 1 until the task has two windows. Raises ValueError where the mean loss over a window is negative.
        """
        before_K, last_K = self.means_2K
        known_K = (before_K > 0.0) & (last_K > 0.0)
        # A rate of 1 (neither faster nor slower) stands in until a task has two windows.
        rate_K = torch.where(known_K, last_K / before_K.where(known_K, torch.ones_like(before_K)), 1.0)
        weights_K = _softmax(rate_K / self.temperature, active_K) * active_K.sum()
        self.sum_K += torch.where(active_K, losses_K.double(), 0.0)
        self.count_K += active_K
        self.steps += 1
        if int(self.steps) % self.window == 0:
            seen_K = self.count_K > 0
            mean_K = self.sum_K / self.count_K.clamp(min=1.0)
            for k in (mean_K < 0.0).nonzero().flatten().tolist():
                raise ValueError(
                    f"`tasks.{self.tasks[k]}` should have a loss of at least 0 with `balancing.kind: dwa`. "
                    f"Found a mean of {float(mean_K[k])} over the {self.window} steps up to step {step}."
                )
            self.means_2K.copy_(torch.where(seen_K, torch.stack([last_K, mean_K]), self.means_2K))
            self.sum_K.zero_()
            self.count_K.zero_()
        return weights_K


class FAMO(nn.Module):
    """w_k = c z_k / (L_k - b_k), z = softmax(xi), c so that the sum is 1: the gradient of c sum_k z_k log(L_k - b_k).

    xi descends, by Adam, along J_softmax(xi)^T delta, delta_k = log(L_k before a step) - log(L_k after it): a task
    whose loss falls fast loses weight. Source: Liu, Feng, Stone & Liu 2023, algorithm 2. Deviation: the authors
    evaluate the same batch again after the step; here "after" is the loss of the next batch that has labels of the
    task, so that no second forward pass is paid for (the noise between batches enters delta).

    Options:
        learning_rate, weight_decay: of Adam on xi.
        minimum: {task: b}, a lower bound of the loss; 0 where not named.

    Raises ValueError where a loss is below its minimum.

    >>> method = FAMO(["click", "dwell"])
    >>> [round(w, 6) for w in method(torch.tensor([0.5, 1.5]), None, 0, torch.tensor([True, True])).tolist()]
    [0.75, 0.25]
    """

    needs_gramian = False
    logit_K: Tensor
    previous_K: Tensor
    seen_K: Tensor
    minimum_K: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        learning_rate: PositiveFloat = 0.025,
        weight_decay: NonNegativeFloat = 1e-3,
        minimum: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.adam = Adam(len(tasks), learning_rate, weight_decay)
        self.register_buffer("logit_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("previous_K", torch.zeros(len(tasks), dtype=torch.float64))  # log of the loss last seen
        self.register_buffer("seen_K", torch.zeros(len(tasks), dtype=torch.bool))
        self.register_buffer("minimum_K", per_task(minimum, tasks, "minimum", 0.0), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64 with sum 1: moves xi by the falls since each task's last step, then c z_k / (L_k - b_k); 0 if inactive.

        Raises ValueError where the loss of an active task is below its minimum b.
        """
        above_K = losses_K.double() - self.minimum_K
        for k in (active_K & (above_K < 0.0)).nonzero().flatten().tolist():
            raise ValueError(
                f"`balancing.minimum.{self.tasks[k]}` should be at most the loss of the task. "
                f"Found {float(self.minimum_K[k])} with a loss of {float(losses_K[k])} at step {step}."
            )
        above_K = torch.where(active_K, above_K, 1.0) + _SMALL
        changed_K = active_K & self.seen_K
        if changed_K.any():
            fall_K = torch.where(changed_K, self.previous_K - above_K.log(), 0.0)
            share_K = _softmax(self.logit_K, changed_K)
            gradient_K = share_K * (fall_K - (share_K * fall_K).sum())
            self.logit_K.copy_(self.adam.descend(self.logit_K, gradient_K, changed_K))
        self.previous_K.copy_(torch.where(active_K, above_K.log(), self.previous_K))
        self.seen_K |= active_K
        weights_K = _softmax(self.logit_K, active_K) / above_K
        return weights_K / weights_K.sum().clamp(min=torch.finfo(torch.float64).tiny)


def _softmax(logit_K: Tensor, active_K: Tensor) -> Tensor:
    """The softmax over the active tasks, 0 for the others (all of them where none is active)."""
    if not active_K.any():
        return torch.zeros_like(logit_K)
    return torch.softmax(logit_K.masked_fill(~active_K, -torch.inf), dim=0)
