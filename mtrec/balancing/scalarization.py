"""Non-linear scalarisations S(L), differentiated at the global losses: w = dS/dL.  Legend: K tasks.

Differentiated at the losses of each rank they would give other weights on each rank, and another update than one
process.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.balancing.named import per_task
from mtrec.kinds import NonNegativeInt, PositiveFloat

_SMALL = 1e-12  # a loss of 0 has a large weight, not an infinite one


class GLS(nn.Module):
    """S = prod_k L_k^(p_k), p the preference with sum 1; w_k = p_k S / L_k.

    Source: Geometric Loss Strategy (Chennupati et al. 2019), with equal p. For losses >= 0; raises ValueError
    otherwise.

    Options:
        preference: {task: weight}; 1 where not named.

    >>> GLS(["click", "dwell"])(torch.tensor([0.5, 2.0]), None, 0, torch.tensor([True, True])).tolist()
    [1.0, 0.25]
    """

    needs_gramian = False
    preference_K: Tensor

    def __init__(self, tasks: Sequence[str], *, preference: dict[str, PositiveFloat] | None = None) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: p_k S / L_k, p and S over the active tasks and L_k at least 1e-12; 0 for the others.

        Raises ValueError where the loss of an active task is negative.
        """
        for k in (active_K & (losses_K < 0.0)).nonzero().flatten().tolist():
            raise ValueError(
                f"`tasks.{self.tasks[k]}` should have a loss of at least 0 with `balancing.kind: gls`. "
                f"Found {float(losses_K[k])} at step {step}."
            )
        share_K = torch.where(active_K, self.preference_K, 0.0)
        share_K = share_K / share_K.sum().clamp(min=_SMALL)
        safe_K = torch.where(active_K, losses_K.double(), 1.0).clamp(min=_SMALL)
        return share_K * ((share_K * safe_K.log()).sum() - safe_K.log()).exp()


class STCH(nn.Module):
    """S = mu log sum_k exp(p_k (l_k - z_k) / mu), p the preference with sum 1; w_k = dS/dL_k.

    Source: smooth Tchebycheff scalarisation (Lin et al. 2024). The largest p_k (l_k - z_k) gets most of the weight.
    Deviation: with warmup_steps > 0, l_k = L_k / (mean L_k of the first steps), since the losses of click and dwell
    have no common unit; the weights are p_k / (mean so far) until then. With 0, l_k = L_k as in the paper.

    Options:
        preference: {task: weight}; 1 where not named.
        ideal: {task: z}, in the unit of l; 0 where not named.
        mu: the smoothing; towards 0 only the largest p_k (l_k - z_k) gets weight.
        warmup_steps: steps whose mean loss is the unit of l; 0: the losses as they are.

    >>> method = STCH(["click", "dwell"], mu=1.0, warmup_steps=0)
    >>> [round(w, 4) for w in method(torch.tensor([0.5, 2.0]), None, 0, torch.tensor([True, True])).tolist()]
    [0.1604, 0.3396]
    """

    needs_gramian = False
    preference_K: Tensor
    ideal_K: Tensor
    sum_K: Tensor
    count_K: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        preference: dict[str, PositiveFloat] | None = None,
        ideal: dict[str, float] | None = None,
        mu: PositiveFloat = 0.1,
        warmup_steps: NonNegativeInt = 100,
    ) -> None:
        super().__init__()
        self.mu = mu
        self.warmup_steps = warmup_steps
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)
        self.register_buffer("ideal_K", per_task(ideal, tasks, "ideal", 0.0), persistent=False)
        self.register_buffer("sum_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("count_K", torch.zeros(len(tasks), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: p_k / u_k softmax_k(p_k (L_k / u_k - z_k) / mu) over the active tasks, 0 for the others.

        u_k is the mean of the task's first `warmup_steps` losses (its size, at least 1e-12); 1 where `warmup_steps` is 0.
        Before step `warmup_steps` the weights are p_k / u_k.
        """
        share_K = torch.where(active_K, self.preference_K, 0.0)
        share_K = share_K / share_K.sum().clamp(min=_SMALL)
        unit_K = torch.ones_like(share_K)
        if self.warmup_steps:
            filling_K = active_K & (self.count_K < self.warmup_steps)
            self.sum_K += torch.where(filling_K, losses_K.double(), 0.0)
            self.count_K += filling_K
            unit_K = (self.sum_K / self.count_K.clamp(min=1.0)).abs().clamp(min=_SMALL)
            if step < self.warmup_steps:
                return share_K / unit_K
        height_K = share_K * (losses_K.double() / unit_K - self.ideal_K)
        if not active_K.any():
            return torch.zeros_like(share_K)
        return share_K / unit_K * torch.softmax((height_K / self.mu).masked_fill(~active_K, -torch.inf), dim=0)
