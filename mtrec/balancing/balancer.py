"""The Balancer: one method and what is common to all of them.  Legend: K tasks.

Promise between ranks: the weights are a function of the global losses, the reduced Gramian, the step and the buffers,
so every rank computes the same ones and nothing is broadcast. All of it is arithmetic on K or K x K numbers in float64
on the CPU; on a GPU a call copies the losses, which tasks are active and any Gramian to the host, which waits for them, and
the weights back.
"""

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mtrec.balancing.named import task_index
from mtrec.balancing.programs import Array
from mtrec.balancing.static import Scheduled, Static
from mtrec.kinds import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt


@runtime_checkable
class Observing(Protocol):
    """A method that wants to see the losses of every step, also where no Gramian is taken."""

    def observe(self, losses_K: Tensor, step: int, active_K: Tensor) -> None:
        """Called at every step in which the losses are finite, before a weight is computed.

        losses_K: (K,) float64 on the CPU, over the global batch, 0 for inactive tasks; active_K: (K,) bool, on the CPU.
        """


class Balancer(nn.Module):
    """(global losses, reduced Gramian or None, step, active) -> weights, by `method`, within the common options.

    `method` is a module (tasks, *, options) with the class attribute `needs_gramian` and
    `forward(losses_K, gramian_KK, step, active_K) -> weights_K`; a weight it gives to an inactive task is ignored.

    The weights of a step are those of the method, clipped to [min_weight, max_weight] and scaled so that they sum to
    the number of tasks that were weighed, times `factors_K` (the gate of auxiliary tasks, the guard of the primary
    one).

    - A task is weighed where it is active (has labels in the global batch) and, for a method on the Gramian, its
      gradient there is finite and not 0. Any other task is left out and keeps the weight it had (at first its
      constant one, or 1), until it is weighed again.
    - The Gramian is expected every `every` steps (`needs_gramian_at`); methods that need it change their weights then,
      methods on the losses at every step. A Gramian given to a method that does not need it is only described.

    Options:
        every: steps between two Gramians.
        ema: share of the past in a moving average of the Gramian (per pair of tasks, over the steps in which both had a
            gradient, corrected for its start); 0: none.
        min_weight, max_weight: bounds of a weight, before the factors. A negative weight would train a task's own tower
            uphill, so the least is 0.
        normalize: sum of weights = number of tasks, so that the learning rate keeps its meaning. Where bounds are given
            too, the weights are clip(c w, min, max) with the c that gives the sum. Default: yes, but not for `static`
            and `scheduled`, whose weights are meant as written.
        primary: a task that the others may not harm: the weights of those whose gradient conflicts with its own are
            shrunk by one factor, until the step decreases the primary loss, to first order, at no less than `guard`
            times the rate that its own weighted gradient gives.
        guard: see primary.
        auxiliary_gate: for auxiliary tasks, by the cosine of their gradient with the primary task's (without `primary`:
            the first task that is not auxiliary). "sign": weight 0 where it is negative; "cosine": weight times
            max(0, cosine) (Du et al. 2018); "none".

    Raises ValueError naming the task and the step for a loss that is not finite, and where a Gramian is due and
    missing.

    >>> from mtrec.balancing.mgda import MGDA
    >>> balancer = Balancer(MGDA(["click", "dwell"]), ["click", "dwell"], every=2)
    >>> both = torch.tensor([True, True])
    >>> losses, gramian = torch.tensor([0.5, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> balancer(losses, gramian, 0, both)
    tensor([1.5000, 0.5000])
    >>> balancer.needs_gramian_at(1), balancer(losses, None, 1, both)
    (False, tensor([1.5000, 0.5000]))
    """

    weights_K: Tensor
    factors_K: Tensor
    gramian_KK: Tensor
    mean_KK: Tensor
    mass_KK: Tensor
    weighed_K: Tensor
    has_gramian_K: Tensor

    def __init__(
        self,
        method: nn.Module,
        tasks: Sequence[str],
        auxiliary: Sequence[str] = (),
        *,
        every: PositiveInt = 10,
        ema: Fraction = 0.0,
        min_weight: NonNegativeFloat = 0.0,
        max_weight: PositiveFloat | None = None,
        normalize: bool | None = None,
        primary: str | None = None,
        guard: Fraction = 0.5,
        auxiliary_gate: Literal["none", "sign", "cosine"] = "none",
    ) -> None:
        super().__init__()
        self.method = method
        self.tasks = tuple(tasks)
        self.every = every
        self.ema = ema
        self.min_weight = min_weight
        self.max_weight = max_weight
        self.normalize = not isinstance(method, Static | Scheduled) if normalize is None else normalize
        self.guard = None if primary is None else guard
        self.auxiliary_gate = auxiliary_gate
        self.auxiliary = tuple(task_index(name, tasks, "auxiliary") for name in auxiliary)
        main = [k for k in range(len(tasks)) if k not in self.auxiliary]
        self.primary = main[0] if primary is None and main else 0
        if primary is not None:
            self.primary = task_index(primary, tasks, "primary")
        self._check(main)
        size = len(self.tasks)
        self.register_buffer("weights_K", torch.ones(size, dtype=torch.float64))  # of the method, bounded
        self.register_buffer("factors_K", torch.ones(size, dtype=torch.float64))
        self.register_buffer("gramian_KK", torch.zeros(size, size, dtype=torch.float64))  # last one given, for the log
        self.register_buffer("mean_KK", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("mass_KK", torch.zeros(size, size, dtype=torch.float64))
        self.register_buffer("weighed_K", torch.zeros(size, dtype=torch.bool))  # in the last call
        self.register_buffer("has_gramian_K", torch.zeros(size, dtype=torch.bool))  # in the last Gramian
        constant_K = self.constant()
        if constant_K is not None:
            self.weights_K.copy_(constant_K)

    def _check(self, main: list[int]) -> None:
        if self.normalize and self.min_weight > 1.0:
            raise ValueError(
                "`balancing.min_weight` should be at most 1 while `balancing.normalize` is true, since the weights "
                f"average to 1. Found {self.min_weight}."
            )
        if self.max_weight is not None and self.max_weight < (1.0 if self.normalize else self.min_weight):
            raise ValueError(
                "`balancing.max_weight` should be at least `balancing.min_weight`, and at least 1 while "
                f"`balancing.normalize` is true, since the weights average to 1. Found {self.max_weight}."
            )
        if not main:
            raise ValueError("`tasks` should hold a task that is not auxiliary. Found auxiliary: true for all of them.")
        if self.auxiliary_gate != "none" and not self.auxiliary:
            raise ValueError(
                "`balancing.auxiliary_gate` should be none unless a task has `auxiliary: true`. "
                f"Found '{self.auxiliary_gate}' and no such task."
            )
        if self.primary in self.auxiliary:
            raise ValueError(
                f"`balancing.primary` should be a task without `auxiliary: true`. Found '{self.tasks[self.primary]}'."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The state stays in float64 on the CPU wherever the model that holds this module is moved or cast to.
        return self

    @property
    def needs_gramian(self) -> bool:
        """Whether a Gramian has to be computed at all."""
        return bool(self.method.needs_gramian) or self.guard is not None or self.auxiliary_gate != "none"

    def needs_gramian_at(self, step: int) -> bool:
        """Whether the Gramian of this step has to be given."""
        return self.needs_gramian and step % self.every == 0

    def current(self, like: Tensor) -> Tensor:
        """The weights of the last call, on the device and in the type of `like`; before the first one the constant ones, or 1.

        Changes nothing.
        """
        return (self.weights_K * self.factors_K).to(like)

    def constant(self) -> Tensor | None:
        """(K,) float64: the weights of active tasks, where they depend on nothing that a step sees; else None.

        >>> Balancer(Static(["click", "dwell"], weights={"dwell": 0.3}), ["click", "dwell"], max_weight=0.9).constant()
        tensor([0.9000, 0.3000], dtype=torch.float64)
        """
        if not isinstance(self.method, Static) or self.needs_gramian or self.normalize:
            return None
        return self.method.weights_K.double().clamp(self.min_weight, self.max_weight)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """The weights (K,), on the device and in the type of `losses_K`.

        losses_K: (K,), over the global batch; whatever stands for an inactive task is ignored.
        gramian_KK: (K, K), reduced over the ranks, or None.
        step: counted from 0, the same on all ranks.
        active_K: (K,) bool, whether the global batch has labels of the task.
        """
        active_K = active_K.detach().cpu()
        known_K = losses_K.detach().to("cpu", torch.float64)
        self._check_losses(known_K, active_K, step)
        known_K = torch.where(active_K, known_K, 0.0)
        if gramian_KK is None and self.needs_gramian_at(step):
            raise ValueError(
                f"`gramian_KK` should be given at step {step}, a multiple of `balancing.every` ({self.every}). "
                "Found None."
            )
        if isinstance(self.method, Observing):
            self.method.observe(known_K, step, active_K)
        smooth_KK = None
        if gramian_KK is not None:
            self._take(gramian_KK.detach().to("cpu", torch.float64), active_K)
            smooth_KK = torch.where(self.mass_KK > 0.0, self.mean_KK / self.mass_KK.clamp(min=1e-300), 0.0)
        if not self.method.needs_gramian:
            self._weigh(known_K, smooth_KK, step, active_K)
        elif smooth_KK is not None:
            self._weigh(known_K, smooth_KK, step, self.has_gramian_K)
        if smooth_KK is not None:
            self.factors_K.copy_(self._factors(smooth_KK))
        return self.current(losses_K)

    def describe(self) -> dict[str, float]:
        """Scalars of the last call, for the log; the caller puts the place where gradients were taken before the names.

        weight/TASK: as returned; weighed/TASK: 1, or 0 where it was left out and kept its weight; factor/TASK: gate and
        guard, where there are any; gradient_norm/TASK and cosine/TASK/OTHER: of the last Gramian, without its moving
        average, for tasks that had a gradient.

        >>> balancer = Balancer(Static(["click", "dwell"]), ["click", "dwell"])
        >>> _ = balancer(torch.ones(2), torch.tensor([[1.0, 1.0], [1.0, 4.0]]), 0, torch.tensor([True, True]))
        >>> balancer.describe()["gradient_norm/dwell"], balancer.describe()["cosine/click/dwell"]
        (2.0, 0.5)
        """
        scalars: dict[str, float] = {}
        weights = (self.weights_K * self.factors_K).tolist()
        norms = self.gramian_KK.diagonal().sqrt().tolist()
        for k, task in enumerate(self.tasks):
            scalars[f"weight/{task}"] = weights[k]
            scalars[f"weighed/{task}"] = float(self.weighed_K[k])
            if self.guard is not None or self.auxiliary_gate != "none":
                scalars[f"factor/{task}"] = float(self.factors_K[k])
            if not self.has_gramian_K[k]:
                continue
            scalars[f"gradient_norm/{task}"] = norms[k]
            for j in range(k):
                if self.has_gramian_K[j]:
                    cosine = float(self.gramian_KK[j, k]) / norms[j] / norms[k]
                    scalars[f"cosine/{self.tasks[j]}/{task}"] = min(1.0, max(-1.0, cosine))
        return scalars

    def _check_losses(self, losses_K: Tensor, active_K: Tensor, step: int) -> None:
        if losses_K.shape != (len(self.tasks),):
            raise ValueError(f"`losses_K` should have shape ({len(self.tasks)},). Found {tuple(losses_K.shape)}.")
        for k in (active_K & ~losses_K.isfinite()).nonzero().flatten().tolist():
            raise ValueError(
                f"The loss of task '{self.tasks[k]}' should be finite. Found {float(losses_K[k])} at step {step}. "
                "Look at its labels and at the learning rate; the weights were left as they are."
            )

    def _take(self, gramian_KK: Tensor, active_K: Tensor) -> None:
        """Keeps the Gramian, 0 where a task has no usable gradient, and moves its average."""
        if gramian_KK.shape != self.gramian_KK.shape:
            size = len(self.tasks)
            raise ValueError(f"`gramian_KK` should have shape ({size}, {size}). Found {tuple(gramian_KK.shape)}.")
        diagonal_K = gramian_KK.diagonal()
        has_K = active_K & diagonal_K.isfinite() & (diagonal_K > 0.0)
        both_KK = has_K[:, None] & has_K
        finite_KK = torch.where(both_KK, gramian_KK, 0.0)
        for j, k in (~finite_KK.isfinite()).nonzero().tolist():
            raise ValueError(
                f"The inner product of the gradients of '{self.tasks[j]}' and '{self.tasks[k]}' should be finite. "
                f"Found {float(gramian_KK[j, k])}, while their norms are finite."
            )
        self.has_gramian_K.copy_(has_K)
        self.gramian_KK.copy_((finite_KK + finite_KK.T) / 2.0)
        # not mean += share * (new - mean): after a far larger Gramian that would leave nothing of this one
        moved_KK = self.ema * self.mean_KK + (1.0 - self.ema) * self.gramian_KK
        self.mean_KK.copy_(torch.where(both_KK, moved_KK, self.mean_KK))
        self.mass_KK += both_KK.double() * (1.0 - self.ema) * (1.0 - self.mass_KK)

    def _weigh(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, weighed_K: Tensor) -> None:
        self.weighed_K.copy_(weighed_K)
        if not weighed_K.any():
            return
        raw_K = self.method(losses_K, gramian_KK, step, weighed_K)
        if not raw_K[weighed_K].isfinite().all():
            found = dict(zip(self.tasks, raw_K.tolist(), strict=True))
            raise ValueError(
                f"The weights of {type(self.method).__name__} should be finite. Found {found} at step {step}."
            )
        raw = raw_K[weighed_K].double().numpy()
        bounded = bound(raw, self.min_weight, self.max_weight, float(len(raw)) if self.normalize else None)
        self.weights_K[weighed_K] = torch.from_numpy(bounded)

    def _factors(self, gramian_KK: Tensor) -> Tensor:
        """(K,): gate and guard by the given Gramian; as they were where the primary task has no gradient."""
        if (self.guard is None and self.auxiliary_gate == "none") or not self.has_gramian_K[self.primary]:
            return self.factors_K
        new_K = torch.ones_like(self.factors_K)
        towards_K = gramian_KK[self.primary]
        if self.auxiliary_gate != "none":
            norms_K = gramian_KK.diagonal().sqrt().clamp(min=1e-300)
            cosine_K = (towards_K / norms_K / norms_K[self.primary]).clamp(-1.0, 1.0)
            open_K = (cosine_K >= 0.0).double() if self.auxiliary_gate == "sign" else cosine_K.clamp(min=0.0)
            new_K[list(self.auxiliary)] = open_K[list(self.auxiliary)]
        new_K = torch.where(self.has_gramian_K, new_K, self.factors_K)
        if self.guard is not None:
            gain_K = torch.where(self.has_gramian_K, self.weights_K * new_K * towards_K, 0.0)
            harm = float(-gain_K.clamp(max=0.0).sum())
            allowed = float(gain_K.clamp(min=0.0).sum() - self.guard * gain_K[self.primary])
            if harm > allowed:
                new_K = torch.where(gain_K < 0.0, new_K * (allowed / harm), new_K)
        return new_K


def bound(raw: Array, low: float, high: float | None, total: float | None) -> Array:
    """clip(c raw, low, high) with the c > 0 that gives the sum `total`; without a total, c = 1.

    Where no c does, because weights of 0 or below leave too little for `high`, these share what is missing; where all
    are, all weights are equal. Needs low <= total / len(raw) <= high.

    >>> bound(np.array([1.0, 3.0]), 0.0, None, 2.0).tolist()
    [0.5, 1.5]
    >>> bound(np.array([1.0, 3.0]), 0.0, 1.2, 2.0).tolist()
    [0.8, 1.2]
    >>> bound(np.array([1.0, 0.0, -1.0]), 0.0, 2.0, 3.0).tolist()
    [2.0, 0.5, 0.5]
    """
    top = np.inf if high is None else high
    if total is None:
        return np.asarray(np.clip(raw, low, top))
    raw = np.maximum(raw, 0.0)
    if raw.max() <= 0.0:
        return np.full(len(raw), total / len(raw))
    raw = raw / raw.max()
    positive = raw > 1e-100
    # Sum over c is piecewise linear and grows; its corners are where a weight leaves `low` or reaches `high`.
    corners = np.sort(np.concatenate([low / raw[positive], top / raw[positive] if high is not None else []]))
    sums = np.array([np.clip(c * np.where(positive, raw, 0.0), low, top).sum() for c in corners])
    after = int(np.searchsorted(sums, total))
    if after < len(corners):
        before = max(after - 1, 0)
        rise = sums[after] - sums[before]
        share = (total - sums[before]) / rise if rise > 0.0 else 0.0
        c = corners[before] + (corners[after] - corners[before]) * share
        return np.asarray(np.clip(c * np.where(positive, raw, 0.0), low, top))
    if high is None:  # beyond the last corner every positive weight grows
        free = np.where(positive, raw, 0.0)
        return np.where(positive, free * (total - low * (~positive).sum()) / free.sum(), low)
    return np.where(positive, high, (total - high * positive.sum()) / max(int((~positive).sum()), 1))
