"""Weights that are written down: constant, or with a schedule.  Legend: K tasks."""

from collections.abc import Sequence

from torch import Tensor, nn

from mtrec.balancing.named import per_task
from mtrec.kinds import PositiveFloat, PositiveInt


class Static(nn.Module):
    """Constant weights. What every other method is to be judged against, once tuned.

    Options:
        weights: {task: weight}; 1 where not named.

    >>> import torch
    >>> method = Static(["click", "dwell"], weights={"dwell": 0.3})
    >>> method(torch.tensor([0.5, 2.0]), None, 0, torch.tensor([True, True])).tolist()
    [1.0, 0.3]
    """

    needs_gramian = False
    weights_K: Tensor

    def __init__(self, tasks: Sequence[str], *, weights: dict[str, PositiveFloat] | None = None) -> None:
        super().__init__()
        # Not state: a run that continues with other weights in its file shall use those.
        self.register_buffer("weights_K", per_task(weights, tasks, "weights"), persistent=False)

    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: the weights as given, of inactive tasks too; no argument is looked at."""
        return self.weights_K.clone()


class Scheduled(nn.Module):
    """w_k(t) = w_k(0) * ratio_k ^ t  (PLE, Tang et al. 2020, equation 10).

    Deviation: the paper's t counts epochs; here t = step / period, a real number, since one epoch is the rule.

    Options:
        weights: {task: w(0)}; 1 where not named.
        ratio: {task: ratio}; 1 where not named.
        period: steps after which a weight has been multiplied by its ratio once.

    >>> import torch
    >>> method = Scheduled(["click", "dwell"], ratio={"dwell": 0.5}, period=100)
    >>> method(torch.tensor([0.5, 2.0]), None, 200, torch.tensor([True, True])).tolist()
    [1.0, 0.25]
    """

    needs_gramian = False
    weights_K: Tensor
    ratio_K: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        weights: dict[str, PositiveFloat] | None = None,
        ratio: dict[str, PositiveFloat] | None = None,
        period: PositiveInt = 1000,
    ) -> None:
        super().__init__()
        self.period = period
        self.register_buffer("weights_K", per_task(weights, tasks, "weights"), persistent=False)
        self.register_buffer("ratio_K", per_task(ratio, tasks, "ratio"), persistent=False)

    def forward(self, losses_K: Tensor, gramian_KK: Tensor | None, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: w_k(0) ratio_k ^ (step / period), of inactive tasks too; of the arguments only `step` is looked at."""
        # Overflow of ratio ** t would be an infinite weight; e^300 is far beyond any use and still finite.
        exponent_K = (self.ratio_K.log() * (step / self.period)).clamp(-300.0, 300.0)
        return self.weights_K * exponent_K.exp()
