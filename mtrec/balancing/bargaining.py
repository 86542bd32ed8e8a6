"""Nash-MTL and FairGrad: weights with which every task gains a fair share of the step.  Legend: K tasks.

TorchJD's Nash-MTL needs cvxpy with ecos and iterates a linearisation; its FairGrad minimises an absolute residual, so
that its answer depends on the unit of the loss. Both are the minimiser of one smooth convex function, found here by
Newton's method to rounding error.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mtrec.balancing.named import per_task
from mtrec.balancing.programs import Array, cosines, on_active
from mtrec.kinds import PositiveFloat


class NashMTL(nn.Module):
    """w with G w = p / w: the Nash bargaining solution; w_k (g_k . d) = p_k, so each task gains in proportion to p.

    Source: Navon et al. 2022, with p = 1. Deviations: solved exactly; an optional preference p (the asymmetric
    bargaining solution); no clipping of the norm of the update, since the Balancer normalises the weights. Two opposite
    gradients have no solution: the limit of a vanishing ridge on the cosines is taken.

    Options:
        preference: {task: p}; 1 where not named.

    >>> method = NashMTL(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> [round(w, 6) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [1.0, 0.5]
    """

    needs_gramian = True
    preference_K: Tensor

    def __init__(self, tasks: Sequence[str], *, preference: dict[str, PositiveFloat] | None = None) -> None:
        super().__init__()
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: the w > 0 with G w = p / w over the active tasks, 0 for the others.

        Raises ValueError where 200 Newton steps do not find it.
        """
        return fair_weights(gramian_KK, self.preference_K, 1.0, active_K)


class FairGrad(nn.Module):
    """w with G w = p w^(-1 / alpha): alpha-fair shares of the decrease (1: Nash, 2: least delay, large: max-min).

    Source: Ban & Ji 2024, equation 4, with p = 1. Deviations: solved exactly; an optional preference p.

    Options:
        alpha: above 0; 1: Nash, 2: least delay, large: max-min.
        preference: {task: p}; 1 where not named.

    >>> method = FairGrad(["click", "dwell"], alpha=1.0)
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> [round(w, 6) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [1.0, 0.5]
    """

    needs_gramian = True
    preference_K: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        alpha: PositiveFloat = 2.0,
        preference: dict[str, PositiveFloat] | None = None,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: the w > 0 with G w = p w^(-1 / alpha) over the active tasks, 0 for the others.

        Raises ValueError where 200 Newton steps do not find it; then an alpha nearer to 1 helps.
        """
        return fair_weights(gramian_KK, self.preference_K, self.alpha, active_K)


def fair_weights(gramian_KK: Tensor, preference_K: Tensor, alpha: float, active_K: Tensor) -> Tensor:
    """(K,): the w > 0 with G w = p w^(-1 / alpha) for the active tasks, 0 for the others."""
    p = preference_K[active_K].numpy()

    def solve(gramian: Array) -> Array:
        cosine_KK, norm_K = cosines(gramian)
        # With v = norm * w: C v = q v^(-1 / alpha), q = p norm^(1 / alpha - 1). Only the cosines are left in the
        # matrix.
        q_K = p * norm_K ** (1.0 / alpha - 1.0)
        return np.asarray(_newton(cosine_KK, q_K, 1.0 / alpha) / norm_K)

    weights_K = on_active(solve, gramian_KK, active_K)
    if not active_K.any():
        return weights_K
    # `on_active` divided the Gramian by its largest entry s: w(G) = s^(-1 / (1 + 1 / alpha)) w(G / s).
    scale = float(gramian_KK.diagonal()[active_K].max())
    return weights_K * float(scale ** (-alpha / (1.0 + alpha)))


def _newton(matrix_KK: Array, q_K: Array, power: float) -> Array:
    """The v > 0 with M v = q v^-power: minimises 1/2 v^T M v - sum q v^(1 - power) / (1 - power) (log v for power = 1).

    Convex for every power > 0, so damped Newton steps arrive. Steps are judged by the slope at their end, not by the
    value, whose largest terms would drown the others where norms differ by orders of magnitude.
    """
    v_K = q_K ** (1.0 / (1.0 + power))
    largest = np.inf
    for _ in range(200):
        target_K = q_K * v_K**-power
        gap_K = matrix_KK @ v_K - target_K
        # In log v the system is scaled by v on both sides, so that its conditioning is that of the cosines.
        hessian_KK = matrix_KK * v_K[:, None] * v_K + np.diag(power * target_K * v_K)
        scale_K = np.sqrt(hessian_KK.diagonal())
        relative_K = -np.linalg.solve(hessian_KK / scale_K[:, None] / scale_K, gap_K * v_K / scale_K) / scale_K
        largest = float(np.abs(relative_K).max())
        if largest < 1e-6:  # the step below squares that; with cosines near RIDGE rounding allows no less
            return np.asarray(v_K * (1.0 + relative_K))
        step = min(1.0, 0.9 / max(float(-relative_K.min()), 1e-300))  # no entry falls below a tenth: v stays positive
        slope = float(gap_K @ (v_K * relative_K))
        while step * largest > 1e-12:
            end_K = v_K * (1.0 + step * relative_K)
            if (matrix_KK @ end_K - q_K * end_K**-power) @ (v_K * relative_K) <= -0.5 * slope:
                break
            step /= 2.0
        v_K = v_K * (1.0 + step * relative_K)
    if largest < 0.05:  # opposite gradients of very different norms: rounding moves v by this much, back and forth
        return v_K
    raise ValueError(
        "`balancing.kind` nash_mtl or fairgrad found no weights within 200 steps. Choose an `alpha` nearer to 1, or "
        f"another method. Cosines: {matrix_KK.tolist()}, scaled norms: {q_K.tolist()}."
    )
