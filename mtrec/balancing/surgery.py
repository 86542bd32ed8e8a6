"""Gradient surgery: PCGrad and GradVac, on the Gramian.  Legend: K tasks.

Each changed gradient is a combination of the K gradients, so inner products come from the Gramian and no gradient is
touched. TorchJD has both, but draws the orders from torch's global generator, which ranks and other threads advance
differently, and keeps GradVac's targets for one fixed set of tasks. These follow its loops with a generator keyed by
(seed, step): given the same orders, the same weights.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mtrec.balancing.draws import generator
from mtrec.balancing.programs import Array, on_active
from mtrec.kinds import NonNegativeInt, Probability

_SMALL = 1e-12  # relative to the largest squared gradient norm


class PCGrad(nn.Module):
    """Each gradient is projected onto the normal plane of each other one it conflicts with, in random order; then
    summed.

    Source: Yu et al. 2020, algorithm 1.

    Options:
        seed: of the orders; null: the experiment's.

    >>> method = PCGrad(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, -1.0], [-1.0, 2.0]])
    >>> method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()
    [2.0, 1.5]
    """

    needs_gramian = True

    def __init__(self, tasks: Sequence[str], *, seed: NonNegativeInt | None = None) -> None:
        super().__init__()
        self.seed = seed or 0

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: w_k = sum_i c_ik over the active tasks, sum_k c_ik g_k the changed gradient i; 0 for the others.

        c starts as the identity; for each j in random order c_ij -= u / G_jj where u = g_j . (changed gradient i) < 0.
        """
        draws = generator(self.seed, step)

        def solve(gramian: Array) -> Array:
            """PCGrad: each row of the identity without what conflicts."""
            size = len(gramian)
            changed_KK = np.eye(size)
            for i in range(size):
                for j in torch.randperm(size, generator=draws).tolist():
                    inner = float(gramian[j] @ changed_KK[i])
                    if j != i and inner < 0.0:
                        changed_KK[i, j] -= inner / gramian[j, j]
            return np.asarray(changed_KK.sum(axis=0))

        return on_active(solve, gramian_KK, active_K)


class GradVac(nn.Module):
    """As PCGrad, but each pair is brought to its target cosine, a moving average of the cosines seen, if it lies below.

    Source: Wang, Tsvetkov, Firat & Cao 2021. A pair's target moves only in steps in which both tasks are active.

    Options:
        beta: share of the new cosine in the target.
        seed: of the orders; null: the experiment's.

    >>> method = GradVac(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()
    [1.0, 1.0]
    >>> round(method.target_KK[0, 1].item(), 6)
    0.25
    """

    needs_gramian = True
    target_KK: Tensor

    def __init__(self, tasks: Sequence[str], *, beta: Probability = 0.5, seed: NonNegativeInt | None = None) -> None:
        super().__init__()
        self.beta = beta
        self.seed = seed or 0
        self.register_buffer("target_KK", torch.zeros(len(tasks), len(tasks), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: w_k = sum_i c_ik over the active tasks, sum_k c_ik g_k the changed gradient i; 0 for the others.

        x is the cosine of g_j and the changed gradient i, of norm n; where x is below the target t of the pair (i, j),
        c_ij += n (t sqrt(1 - x^2) - x sqrt(1 - t^2)) / (|g_j| sqrt(1 - t^2)). Then t moves towards x, for the next step too.
        """
        draws = generator(self.seed, step)
        index = active_K.nonzero().flatten()
        target = self.target_KK[index][:, index].numpy()  # a copy

        def solve(gramian: Array) -> Array:
            """Each row lifted to the wished cosines, which follow those that are seen."""
            size = len(gramian)
            changed_KK = np.eye(size)
            for i in range(size):
                others = [j for j in range(size) if j != i]
                for j in (others[n] for n in torch.randperm(len(others), generator=draws).tolist()):
                    inner_K = changed_KK[i] @ gramian
                    norm = np.sqrt(max(float(inner_K @ changed_KK[i]), 0.0))
                    cosine = float(inner_K[j]) / (norm * np.sqrt(gramian[j, j]) + _SMALL)
                    wish = target[i, j]
                    if cosine < wish:
                        sine, wish_sine = np.sqrt(max(1.0 - cosine**2, 0.0)), np.sqrt(max(1.0 - wish**2, 0.0))
                        lift = norm * (wish * sine - cosine * wish_sine)
                        changed_KK[i, j] += lift / (np.sqrt(gramian[j, j]) * wish_sine + _SMALL)
                    target[i, j] = (1.0 - self.beta) * wish + self.beta * cosine
            return np.asarray(changed_KK.sum(axis=0))

        weights_K = on_active(solve, gramian_KK, active_K)
        self.target_KK[index[:, None], index] = torch.from_numpy(target)
        return weights_K
