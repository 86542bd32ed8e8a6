"""Weights with a learned scale a task: uncertainty weighting and IMTL-L.  Legend: K tasks.

The scales are no parameters of the model: the gradient of the scalarisation by a scale is known in closed form from the
global losses, so each rank makes the same Adam step on the same buffers and nothing has to be reduced.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtrec.balancing.adam import Adam
from mtrec.kinds import PositiveFloat


class Uncertainty(nn.Module):
    """S = sum_k 1/2 exp(-s_k) L_k + 1/2 s_k; w_k = dS/dL_k = 1/2 exp(-s_k); s_k = log(sigma_k^2) is learned.

    Source: Kendall, Gal & Cipolla 2018. Deviations: all tasks have the factor 1/2 that the paper gives to regression
    (as LibMTL and TorchJD do); |s_k| <= log_variance_bound, because a loss that nears 0 would drive its weight to
    infinity. S may be negative: it is not a loss to log; log the unweighted sum.

    Options:
        learning_rate: of Adam on s.
        log_variance_bound: of |s_k|; 4: weights within [.009, 27].

    >>> method = Uncertainty(["click", "dwell"])
    >>> method(torch.tensor([0.5, 2.0]), None, 0, torch.tensor([True, True])).tolist()
    [0.5, 0.5]
    >>> method.log_variance_K  # Adam's first step is the learning rate, up where the loss is above 1
    tensor([-0.0100,  0.0100], dtype=torch.float64)
    """

    needs_gramian = False
    log_variance_K: Tensor

    def __init__(
        self, tasks: Sequence[str], *, learning_rate: PositiveFloat = 0.01, log_variance_bound: PositiveFloat = 4.0
    ) -> None:
        super().__init__()
        self.bound = log_variance_bound
        self.adam = Adam(len(tasks), learning_rate)
        self.register_buffer("log_variance_K", torch.zeros(len(tasks), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: 1/2 exp(-s_k); then Adam steps s_k of the active tasks against dS/ds_k = 1/2 - 1/2 exp(-s_k) L_k."""
        weights_K = 0.5 * torch.exp(-self.log_variance_K)
        gradient_K = 0.5 - weights_K * losses_K
        stepped_K = self.adam.descend(self.log_variance_K, gradient_K, active_K)
        self.log_variance_K.copy_(stepped_K.clamp(-self.bound, self.bound))
        return weights_K


class IMTLL(nn.Module):
    """S = sum_k exp(s_k) L_k - s_k; w_k = dS/dL_k = exp(s_k); s_k is learned.

    Source: IMTL-L (Liu et al. 2021). Deviation: |s_k| <= log_scale_bound, for the reason given in `Uncertainty`.

    Options:
        learning_rate: of Adam on s.
        log_scale_bound: of |s_k|; 4: weights within [.018, 55].

    >>> method = IMTLL(["click", "dwell"])
    >>> method(torch.tensor([0.5, 2.0]), None, 0, torch.tensor([True, True])).tolist()
    [1.0, 1.0]
    """

    needs_gramian = False
    log_scale_K: Tensor

    def __init__(
        self, tasks: Sequence[str], *, learning_rate: PositiveFloat = 0.01, log_scale_bound: PositiveFloat = 4.0
    ) -> None:
        super().__init__()
        self.bound = log_scale_bound
        self.adam = Adam(len(tasks), learning_rate)
        self.register_buffer("log_scale_K", torch.zeros(len(tasks), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: exp(s_k); then Adam steps s_k of the active tasks against dS/ds_k = exp(s_k) L_k - 1."""
        weights_K = torch.exp(self.log_scale_K)
        stepped_K = self.adam.descend(self.log_scale_K, weights_K * losses_K - 1.0, active_K)
        self.log_scale_K.copy_(stepped_K.clamp(-self.bound, self.bound))
        return weights_K
