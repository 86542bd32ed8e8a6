"""The methods whose weights TorchJD computes from the Gramian: IMTL-G, Aligned-MTL, UPGrad, DualProj.  Legend: K tasks.

`_through` is the adapter: the active tasks' Gramian, divided by its largest entry and in float64, goes to a TorchJD
weighting. TorchJD's own projector for UPGrad and DualProj needs quadprog and adds 1e-4 to the diagonal; it takes
another one, and `ExactProjector` solves the same program exactly without that dependency. TorchJD is imported where it is first
needed: it brings a fifth of a second of imports, which every other training does without.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from mtrec.balancing.named import per_task
from mtrec.balancing.programs import Array, dual_cone, on_active
from mtrec.kinds import PositiveFloat


class IMTLG(nn.Module):
    """w = G^+ n / sum(G^+ n), n_k = |g_k|: the sum has the same projection onto every gradient's direction.

    Source: IMTL-G (Liu et al. 2021), generalised to dependent gradients by Quinton & Rey 2024; TorchJD's IMTLG. Weights
    may be negative, which would train a task's own tower uphill: the Balancer's `min_weight` (0) stands before that.

    >>> method = IMTLG(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> [round(w, 4) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [0.6667, 0.3333]
    """

    needs_gramian = True

    def __init__(self, tasks: Sequence[str]) -> None:
        super().__init__()

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: G^+ n / sum(G^+ n) over the active tasks, 0 for the others (for all, where the sum is 0)."""
        from torchjd.aggregation import IMTLGWeighting

        return _through(IMTLGWeighting(), gramian_KK, active_K)


class AlignedMTL(nn.Module):
    """w = sqrt(s) G^(-1/2) p: the gradients are made orthogonal and equally long before the (preferred) mean.

    s is the smallest ("min"), median or mean ("rmse") eigenvalue of G that is not 0. Source: Senushkin et al. 2023;
    TorchJD's AlignedMTL. Weights may be negative: see `IMTLG`.

    Options:
        scale: which eigenvalue s is, "min", "median" or "rmse" (the mean).
        preference: {task: weight}; 1 where not named.

    >>> method = AlignedMTL(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> [round(w, 4) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [0.5, 0.25]
    """

    needs_gramian = True
    preference_K: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        scale: Literal["min", "median", "rmse"] = "min",
        preference: dict[str, PositiveFloat] | None = None,
    ) -> None:
        super().__init__()
        self.scale: Literal["min", "median", "rmse"] = scale
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: sqrt(s) G^(-1/2) p over the active tasks, p their preference with sum 1; 0 for the others.

        G^(-1/2) leaves out the eigenvectors whose eigenvalue is 0.
        """
        from torchjd.aggregation import AlignedMTLWeighting

        share_K = _share(self.preference_K, active_K)
        return _through(AlignedMTLWeighting(share_K, scale_mode=self.scale), gramian_KK, active_K)


class UPGrad(nn.Module):
    """Each gradient is projected onto the cone of directions that increase no loss; then the (preferred) mean.

    The sum conflicts with no gradient, and small gradients move it little. Source: Quinton & Rey 2024; TorchJD's UPGrad
    with `ExactProjector`.

    Options:
        preference: {task: weight}; 1 where not named.

    >>> method = UPGrad(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
    >>> [round(w, 6) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [1.0, 0.75]
    """

    needs_gramian = True
    preference_K: Tensor

    def __init__(self, tasks: Sequence[str], *, preference: dict[str, PositiveFloat] | None = None) -> None:
        super().__init__()
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: sum_k argmin v^T G v subject to v >= p_k e_k, e_k the unit vector, p with sum 1; 0 for inactive tasks."""
        from torchjd.aggregation import UPGradWeighting

        share_K = _share(self.preference_K, active_K)
        return _through(UPGradWeighting(share_K, projector=ExactProjector()), gramian_KK, active_K)


class DualProj(nn.Module):
    """The (preferred) mean gradient, projected onto the cone of directions that increase no loss.

    Source: Lopez-Paz & Ranzato 2017, equation 11; TorchJD's DualProj with `ExactProjector`.

    Options:
        preference: {task: weight}; 1 where not named.

    >>> method = DualProj(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, -3.0], [-3.0, 16.0]])
    >>> [round(w, 6) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [1.5, 0.5]
    """

    needs_gramian = True
    preference_K: Tensor

    def __init__(self, tasks: Sequence[str], *, preference: dict[str, PositiveFloat] | None = None) -> None:
        super().__init__()
        self.register_buffer("preference_K", per_task(preference, tasks, "preference"), persistent=False)

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: argmin v^T G v subject to v >= p, the active tasks' preference with sum 1; 0 for the others."""
        from torchjd.aggregation import DualProjWeighting

        share_K = _share(self.preference_K, active_K)
        return _through(DualProjWeighting(share_K, projector=ExactProjector()), gramian_KK, active_K)


class ExactProjector:
    """TorchJD's `DualConeProjector`, by `mtrec.balancing.programs.dual_cone`.

    >>> ExactProjector()(torch.tensor([1.0, 0.0]).double(), torch.tensor([[1.0, -1.0], [-1.0, 2.0]]).double())
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    def __call__(self, U: Tensor, G: Tensor) -> Tensor:
        """For each vector u of U (..., K): argmin v^T G v subject to v >= u."""
        gramian = G.double().cpu().numpy()
        rows = U.double().cpu().numpy().reshape(-1, len(gramian))
        return torch.from_numpy(np.stack([dual_cone(gramian, row) for row in rows])).reshape(U.shape).to(G)


def _share(preference_K: Tensor, active_K: Tensor) -> Tensor:
    """The preference of the active tasks, with sum 1."""
    active = preference_K[active_K]
    return active / active.sum()


def _through(weighting: Callable[[Tensor], Any], gramian_KK: Tensor, active_K: Tensor) -> Tensor:
    def solve(gramian: Array) -> Array:
        return np.asarray(weighting(torch.from_numpy(gramian)).numpy())

    return on_active(solve, gramian_KK, active_K)
