"""Losses for seconds. Each owns its logits, its loss a row, and the seconds those logits mean.

| kind              | C | orders by            | seconds add up            |
|-------------------|---|----------------------|---------------------------|
| logsun (default)  | 2 | E[log1p T]           | yes, by the ratio branch  |
| log_mse           | 1 | E[log1p T]           | no: far too few           |
| huber             | 1 | a robust centre      | no                        |
| weighted_logistic | 1 | E[T]                 | yes; covington: too many  |
| ziln              | 3 | E[T]                 | if zero or log-normal     |
| tweedie, poisson  | 1 | E[T]                 | yes                       |

T seconds, f a logit on the log1p scale, z a logit on the log scale, B rows, C logits, N labels of a sample. Logarithms
of seconds are held within [-10, 14] (45 microseconds to 14 days; f to at most 14) before their exp is taken, and the losses
of tweedie and poisson continue beyond as their tangents, so that every loss and gradient is finite for any finite logits.
"""

import math
from typing import Annotated, Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from annotated_types import Gt, Lt
from torch import Tensor

from mtrec.kinds import PositiveFloat
from mtrec.tasks.finite import (
    LOG_SECONDS_HIGH,
    LOG_SECONDS_LOW,
    bounded,
    hold_log_seconds,
    inverse_softplus,
    log_softplus,
    tangent,
)
from mtrec.tasks.huber import huber_center

TweediePower = Annotated[float, Gt(1.0), Lt(2.0)]


@runtime_checkable
class DwellLoss(Protocol):
    """What a dwell loss provides; a class of your own needs these members and no base class.

    >>> isinstance(LogMSE(), DwellLoss)
    True
    """

    num_logits: int

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,) losses, finite with finite gradients for any finite float32 logits and labels >= 0 in seconds."""

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,) predicted seconds."""

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """(B,) predictions of log1p(T), or None where the loss has no log-scale output."""

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(C,) constant logits that predict `mean` seconds, or for log_mse and huber the centre of the sample on their scale."""


def log_mean(mean: float) -> float:
    """log(mean) within the held range; a mean of 0 seconds gives its lower end.

    >>> log_mean(1.0), log_mean(0.0)
    (0.0, -10.0)
    """
    return min(max(math.log(mean), LOG_SECONDS_LOW), LOG_SECONDS_HIGH) if mean > 0.0 else LOG_SECONDS_LOW


class LogSUN:
    """log-MSE for the order and a ratio branch for the seconds: both a good XAUC and sums that add up.

    Two logits. f is trained by (f - log1p T)^2. The ratio branch z = softplus(second logit) answers "how many times
    more seconds than f says": seconds = z (|expm1 f| + eps). Its own loss, added with `branch_weight`, is the Poisson
    half-deviance of the ratio T / (|expm1 f| + eps), which is minimal at z = E[ratio | x] whatever the distribution;
    f is detached in it, so the branch adds no gradient to f's logit (the layers below see both). Ratios are clipped at
    `max_ratio` before they are learned: the clip bounds the gradient of a single row, and the seconds beyond that many
    times (|expm1 f| + eps) are lost: 10 lost a quarter of a simulated log with 44 % zeros, 100 none to speak of.

    Source: the design measurements of this package (KuaiRand-Pure); the idea of correcting a log-scale model by a
    learned ratio is that of smearing (Duan, 1983), here for each row.

    Options:
        eps_seconds: eps, which keeps the ratio finite where f is near 0.
        max_ratio: ratios are clipped here before they are learned.
        branch_weight: of the ratio branch's loss.

    >>> loss = LogSUN()
    >>> logits_BC = loss.initial_bias(4.0, torch.tensor([0.0, 8.0])).float().expand(2, 2)
    >>> loss.log1p_seconds(logits_BC)[0].exp().item(), loss.seconds(logits_BC)[0].item()  # e^f = 3: too few seconds
    (3.0, 4.0)
    """

    num_logits = 2

    def __init__(
        self, *, eps_seconds: PositiveFloat = 1.0, max_ratio: PositiveFloat = 100.0, branch_weight: PositiveFloat = 0.1
    ) -> None:
        self.eps_seconds = eps_seconds
        self.max_ratio = max_ratio
        self.branch_weight = branch_weight

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,): (f - log1p T)^2 + branch_weight (r log(r / z) - r + z), r = min(T / (|expm1 f| + eps), max_ratio).

        f is detached in r; z = softplus(second logit).
        """
        f_B, ratio_logit_B = bounded(logits_BC).unbind(1)
        order_B = (f_B - seconds_B.log1p()).square()
        ratio_B = (seconds_B / self._scale(f_B.detach())).clamp(max=self.max_ratio)
        return order_B + self.branch_weight * _ratio_deviance(ratio_logit_B, ratio_B)

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,): z (|expm1 f| + eps), z = softplus(second logit), expm1 of an f of at most 14."""
        f_B, ratio_logit_B = bounded(logits_BC).unbind(1)
        return F.softplus(ratio_logit_B) * self._scale(f_B)

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """(B,): f, which orders; it is not log1p of `seconds`, and may be below 0."""
        return bounded(logits_BC[:, 0])

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(2,): f = mean of log1p(sample), and the second logit with which `seconds` is then `mean`."""
        f = sample_N.double().log1p().mean()
        return torch.tensor([float(f), inverse_softplus(mean / float(self._scale(f)))])

    def _scale(self, f: Tensor) -> Tensor:
        return f.clamp(max=LOG_SECONDS_HIGH).expm1().abs() + self.eps_seconds


def _ratio_deviance(logit_B: Tensor, ratio_B: Tensor) -> Tensor:
    """Poisson half-deviance of `ratio_B` >= 0 under the mean softplus(logit_B)."""
    return torch.xlogy(ratio_B, ratio_B) - ratio_B - ratio_B * log_softplus(logit_B) + F.softplus(logit_B)


class LogMSE:
    """(f - log1p T)^2: a good order, but expm1(f) is near the median, so its seconds add up to far too few.

    >>> LogMSE().loss(torch.tensor([[0.0]]), torch.tensor([math.e - 1])).item()
    1.0
    """

    num_logits = 1

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,): (f - log1p T)^2."""
        return (bounded(logits_BC[:, 0]) - seconds_B.log1p()).square()

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,): expm1(f), f held within [0, 14]."""
        return bounded(logits_BC[:, 0]).clamp(0.0, LOG_SECONDS_HIGH).expm1()

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """(B,): f, which may be below 0."""
        return bounded(logits_BC[:, 0])

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(1,): the mean of log1p(sample); `mean` is not looked at."""
        return sample_N.double().log1p().mean().reshape(1)


class Huber:
    """Half the squared error within `delta`, linear beyond (Huber, 1964); on log1p(T), or on seconds.

    The prediction lies between mean and median of the scale: robust, not additive.

    Options:
        delta: where the loss becomes linear, in units of the scale.
        on: the scale, log1p of the seconds or the seconds.

    >>> Huber(delta=2.0, on="seconds").loss(torch.tensor([[1.0], [1.0]]), torch.tensor([2.0, 11.0])).tolist()
    [0.5, 18.0]
    """

    num_logits = 1

    def __init__(self, *, delta: PositiveFloat = 1.0, on: Literal["log1p", "seconds"] = "log1p") -> None:
        self.delta = delta
        self.on = on

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,): e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2), e = f - log1p T; on seconds e = logit - T."""
        target_B = seconds_B.log1p() if self.on == "log1p" else seconds_B
        return F.huber_loss(bounded(logits_BC[:, 0]), target_B, reduction="none", delta=self.delta)

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,): expm1(f), f held within [0, 14]; on seconds the logit, at least 0."""
        center_B = bounded(logits_BC[:, 0]).clamp(min=0.0)
        return center_B.clamp(max=LOG_SECONDS_HIGH).expm1() if self.on == "log1p" else center_B

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """(B,): f, which may be below 0; None on seconds."""
        return bounded(logits_BC[:, 0]) if self.on == "log1p" else None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(1,): the constant of least loss on the sample, by 50 steps of reweighted least squares; `mean` is not looked at."""
        return huber_center(sample_N.double().log1p() if self.on == "log1p" else sample_N, self.delta)


class WeightedLogistic:
    """Logistic regression whose positives weigh T seconds; e^z is the prediction.

    Source: Covington, Adams and Sargin (2016); the unbiased variant adds the unit weight of the positives as negatives.

    Options:
        variant: `unbiased`: T softplus(-z) + softplus(z) on every row, minimal at e^z = E[T | x]. `covington`, as published:
            a row with T > 0 counts as T softplus(-z), any other as softplus(z); then e^z = E[T | x] / P(T = 0 | x), too
            large by that factor, and without bound where no row has T = 0.

    >>> loss = WeightedLogistic()
    >>> round(loss.loss(torch.tensor([[0.0]]), torch.tensor([3.0])).item() / math.log(2), 5)
    4.0
    >>> loss.seconds(loss.initial_bias(20.0, torch.tensor([20.0])).reshape(1, 1)).round().item()
    20.0
    """

    num_logits = 1

    def __init__(self, *, variant: Literal["unbiased", "covington"] = "unbiased") -> None:
        self.variant = variant

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,): T softplus(-z) + n softplus(z), n = 1; for covington n is 1 where T = 0, else 0."""
        z_B = bounded(logits_BC[:, 0])
        negative_B = torch.ones_like(seconds_B) if self.variant == "unbiased" else (seconds_B == 0.0).float()
        return seconds_B * F.softplus(-z_B) + negative_B * F.softplus(z_B)

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,): e^z, z held within [-10, 14]."""
        return hold_log_seconds(bounded(logits_BC[:, 0])).exp()

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """None: z is the logarithm of a mean, not a mean of logarithms."""
        return None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(1,): log(mean), for covington log(mean / share of T = 0 in the sample), within [-10, 14]; 14 where that share is 0."""
        zeros = 1.0 if self.variant == "unbiased" else float((sample_N == 0.0).double().mean())
        return torch.tensor([log_mean(mean / zeros) if zeros > 0.0 else LOG_SECONDS_HIGH])


class ZILN:
    """Zero-inflated log-normal: the exact negative log-likelihood of T = 0 with 1 - p, else log T ~ N(mu, sigma^2).

    Three logits: p's, mu, and sigma's; the prediction is p exp(mu + sigma^2 / 2).

    Source: Wang, Liu and Miao (2019). Deviation: sigma = 0.05 + (max_sigma - 0.05) sigmoid(logit), where they take
    softplus without an upper bound.

    Options:
        max_sigma: bound of sigma, because the prediction holds exp(sigma^2 / 2): at sigma 4 that is 3,000.

    >>> loss = ZILN()
    >>> round(loss.loss(torch.tensor([[0.0, 5.0, 0.0]]), torch.tensor([0.0])).item() / math.log(2), 5)
    1.0
    """

    num_logits = 3
    min_sigma = 0.05

    def __init__(self, *, max_sigma: Annotated[float, Gt(0.05)] = 2.5) -> None:
        self.max_sigma = max_sigma

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,): -log(1 - p) where T = 0, else -log p + (log T - mu)^2 / (2 sigma^2) + log(sigma T) + log(2 pi) / 2.

        It is a density's likelihood where T > 0, so it may be negative.
        """
        logit_B, mu_B, raw_B = bounded(logits_BC).unbind(1)
        positive_B = (seconds_B > 0.0).float()
        log_B = torch.where(seconds_B > 0.0, seconds_B, 1.0).log()
        sigma_B = self._sigma(raw_B)
        normal_B = 0.5 * ((log_B - mu_B) / sigma_B).square() + sigma_B.log() + 0.5 * math.log(2.0 * math.pi)
        is_zero_B = F.binary_cross_entropy_with_logits(logit_B, positive_B, reduction="none")
        return is_zero_B + positive_B * (normal_B + log_B)

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,): p exp(mu + sigma^2 / 2), its logarithm held within [-10, 14]."""
        logit_B, mu_B, raw_B = bounded(logits_BC).unbind(1)
        return hold_log_seconds(F.logsigmoid(logit_B) + mu_B + 0.5 * self._sigma(raw_B).square()).exp()

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """None: mu is of the positive rows alone."""
        return None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(3,): the logits of the sample's share of T > 0 and of sigma, the sd of its log T; mu so that `seconds` is `mean`.

        sigma starts at least 2 % of its range away from either bound.
        """
        positive_N = sample_N[sample_N > 0.0].double()
        rate = min(max(len(positive_N) / len(sample_N), 1e-6), 1.0 - 1e-6)
        spread = float(positive_N.log().std(correction=0)) if len(positive_N) > 1 else 1.0
        share = (spread - self.min_sigma) / (self.max_sigma - self.min_sigma)
        share = min(max(share, 0.02), 0.98)  # sigmoid must not start where its gradient is gone
        sigma = self.min_sigma + (self.max_sigma - self.min_sigma) * share
        mu = log_mean(mean) - math.log(rate) - 0.5 * sigma**2  # p exp(mu + sigma^2 / 2) is then the mean
        return torch.tensor([math.log(rate) - math.log1p(-rate), mu, math.log(share) - math.log1p(-share)])

    def _sigma(self, raw_B: Tensor) -> Tensor:
        return self.min_sigma + (self.max_sigma - self.min_sigma) * raw_B.sigmoid()


class Tweedie:
    """Half the Tweedie deviance of mean e^z and variance ~ e^(`power` z), 1 < power < 2: many zeros, a heavy tail.

    Half of scikit-learn's `mean_tweedie_deviance` row by row; minimal at e^z = E[T | x].

    Source: Jorgensen (1987). Deviation: beyond z = -10 and 14 the loss goes on as its tangent.

    Options:
        power: of the mean in the variance; near 1 as Poisson, near 2 as gamma.

    >>> loss = Tweedie(power=1.5)
    >>> loss.loss(torch.tensor([[0.0]]), torch.tensor([4.0])).item()
    2.0
    """

    num_logits = 1

    def __init__(self, *, power: TweediePower = 1.5) -> None:
        self.power = power

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,): T e^((1 - p) z) / (p - 1) + e^((2 - p) z) / (2 - p) - T^(2 - p) / ((p - 1) (2 - p)), p the power."""
        z_B = bounded(logits_BC[:, 0])
        held_B = hold_log_seconds(z_B)
        low, high = self.power - 1.0, 2.0 - self.power
        pull_B, push_B = seconds_B * (-low * held_B).exp(), (high * held_B).exp()
        loss_B = pull_B / low + push_B / high - seconds_B.pow(high) / (low * high)
        return tangent(loss_B, push_B - pull_B, z_B, held_B)

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,): e^z, z held within [-10, 14]."""
        return hold_log_seconds(bounded(logits_BC[:, 0])).exp()

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """None: z is the logarithm of a mean, not a mean of logarithms."""
        return None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(1,): log(mean) within [-10, 14]; the sample is not looked at."""
        return torch.tensor([log_mean(mean)])


class Poisson:
    """Half the Poisson deviance of mean e^z: minimal at e^z = E[T | x]. It is T log(T / e^z) - T + e^z, in seconds.

    Its size grows as the seconds do (Tweedie's as their power 2 - p), so a loss weight below `auto`'s may be due.
    Deviation: beyond z = -10 and 14 the loss goes on as its tangent.

    >>> Poisson().loss(torch.tensor([[0.0]]), torch.tensor([0.0])).item()
    1.0
    """

    num_logits = 1

    def loss(self, logits_BC: Tensor, seconds_B: Tensor) -> Tensor:
        """(B,): T log(T) - T z - T + e^z, where 0 log 0 = 0."""
        z_B = bounded(logits_BC[:, 0])
        held_B = hold_log_seconds(z_B)
        mean_B = held_B.exp()
        loss_B = torch.xlogy(seconds_B, seconds_B) - seconds_B * held_B - seconds_B + mean_B
        return tangent(loss_B, mean_B - seconds_B, z_B, held_B)

    def seconds(self, logits_BC: Tensor) -> Tensor:
        """(B,): e^z, z held within [-10, 14]."""
        return hold_log_seconds(bounded(logits_BC[:, 0])).exp()

    def log1p_seconds(self, logits_BC: Tensor) -> Tensor | None:
        """None: z is the logarithm of a mean, not a mean of logarithms."""
        return None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(1,): log(mean) within [-10, 14]; the sample is not looked at."""
        return torch.tensor([log_mean(mean)])


DWELL_LOSSES: dict[str, type] = {
    "logsun": LogSUN,
    "log_mse": LogMSE,
    "huber": Huber,
    "weighted_logistic": WeightedLogistic,
    "ziln": ZILN,
    "tweedie": Tweedie,
    "poisson": Poisson,
}
