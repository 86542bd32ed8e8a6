"""Conflict-averse gradient descent.  Legend: K tasks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.balancing.named import per_task
from mtrec.balancing.programs import Array, conflict_averse, on_active
from mtrec.kinds import Fraction, PositiveFloat


class CAGrad(nn.Module):
    """The weights of argmax_d min_k g_k . d subject to |d - g_0| <= c |g_0|, g_0 the (preferred) mean gradient.

    c = 0 is the mean; a larger c looks more after the task that improves least. Source: Liu, Liu, Jin, Stone & Liu
    2021. Deviations: solved exactly (TorchJD's needs cvxpy for the same program); a preference may replace the equal
    weights in g_0; where no direction improves all tasks, see `mtrec.balancing.programs.conflict_averse`.

    Options:
        c: how far the direction may lie from the mean gradient, as a share of its norm; 0: the mean itself.
        preference: {task: weight}; 1 where not named.

    >>> method = CAGrad(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> [round(w, 4) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [0.9472, 0.5]
    """

    needs_gramian = True
    preference_K: Tensor

    def __init__(
        self, tasks: Sequence[str], *, c: Fraction = 0.4, preference: dict[str, PositiveFloat] | None = None
    ) -> None:
        super().__init__()
        self.c = c
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: the w >= p with sum_k w_k g_k = d, p the active tasks' preference with sum 1; 0 for the others."""
        share = self.preference_K[active_K].numpy()

        def solve(gramian: Array) -> Array:
            return conflict_averse(gramian, share / share.sum(), self.c)

        return on_active(solve, gramian_KK, active_K)
