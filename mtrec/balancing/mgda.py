"""The multiple-gradient descent algorithm.  Legend: K tasks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mtrec.balancing.programs import min_norm, on_active


class MGDA(nn.Module):
    """w = argmin |sum_k w_k g_k / n_k|^2 on the simplex, then w_k / n_k.

    The sum is a direction along which no loss increases, or 0 where there is none (a Pareto stationary point).
    n_k = 1 (normalization "none": the task with the smallest gradient gets the most weight), |g_k| ("l2") or
    L_k ("loss"). Source: Désidéri 2012; normalisations of Sener & Koltun 2018. Deviations: solved exactly instead of by
    Frank-Wolfe; w_k is divided by n_k, so that the promise holds for the gradients themselves (as LibMTL; the authors'
    code applies w to the losses as they are). A task with weight 0 trains its own tower no more in this step: set
    `min_weight` where that hurts.

    Options:
        normalization: what gradients are divided by: "none", "l2" (their norm) or "loss", for which every loss must be
            positive.

    >>> method = MGDA(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> [round(w, 6) for w in method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()]
    [0.75, 0.25]
    """

    needs_gramian = True

    def __init__(self, tasks: Sequence[str], *, normalization: Literal["none", "l2", "loss"] = "none") -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.normalization = normalization

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64 with sum 1, in proportion to a_k / n_k, a = argmin |sum_k a_k g_k / n_k|^2 over the active tasks, else 0.

        Raises ValueError where `normalization` is "loss" and an active task's loss is not positive.
        """
        gramian_KK = gramian_KK.double()
        unit_K = torch.ones(len(active_K), dtype=torch.float64)
        if self.normalization == "l2":
            unit_K = gramian_KK.diagonal().sqrt()
        if self.normalization == "loss":
            unit_K = losses_K.double()
            for k in (active_K & (unit_K <= 0.0)).nonzero().flatten().tolist():
                raise ValueError(
                    f"`tasks.{self.tasks[k]}` should have a positive loss with `balancing.normalization: loss`. "
                    f"Found {float(losses_K[k])} at step {step}."
                )
        unit_K = torch.where(active_K, unit_K, 1.0)
        weights_K = on_active(min_norm, gramian_KK / unit_K[:, None] / unit_K, active_K) / unit_K
        return weights_K / weights_K.sum().clamp(min=torch.finfo(torch.float64).tiny)
