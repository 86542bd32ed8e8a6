"""Random loss weighting.  Legend: K tasks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mtrec.balancing.draws import generator
from mtrec.kinds import NonNegativeInt


class RLW(nn.Module):
    """w = K softmax(z), z ~ N(0, 1) drawn anew at each step; or w = K Dirichlet(1, ..., 1).

    Source: Lin, Ye, Zhang & Tsang 2022. A baseline: a method that does not beat it has learned nothing. The draw
    depends on (seed, step) alone, so it is one for all ranks and nothing has to be saved.

    Options:
        distribution: "normal": softmax of normal numbers; "dirichlet": uniform on the simplex.
        seed: of the draws; null: the experiment's.

    >>> method = RLW(["click", "dwell"], seed=1)
    >>> weights = method(torch.tensor([0.5, 2.0]), None, 5, torch.tensor([True, True]))
    >>> round(float(weights.sum()), 6)
    2.0
    """

    needs_gramian = False

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        distribution: Literal["normal", "dirichlet"] = "normal",
        seed: NonNegativeInt | None = None,
    ) -> None:
        super().__init__()
        self.seed = seed or 0
        self.distribution = distribution

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: softmax(z) over the active tasks times their number, 0 for the others.

        z is drawn for (seed, step): N(0, 1), or the logarithm of Exp(1), whose softmax is Dirichlet(1, ..., 1).
        """
        draws = generator(self.seed, step)
        if self.distribution == "normal":
            score_K = torch.randn(len(losses_K), generator=draws, dtype=torch.float64)
        else:  # normalised exponentials are Dirichlet(1, ..., 1); log(-log(u)) overflows nowhere for u in [1e-300, 1)
            uniform_K = torch.rand(len(losses_K), generator=draws, dtype=torch.float64).clamp(1e-300, 1.0 - 1e-16)
            score_K = (-uniform_K.log()).log()
        if not active_K.any():
            return torch.zeros_like(score_K)
        return torch.softmax(score_K.masked_fill(~active_K, -torch.inf), dim=0) * active_K.sum()
