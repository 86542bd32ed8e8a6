"""Arithmetic that stays finite at any logit: a loss of inf or NaN in one row would cost the whole step."""

import torch
import torch.nn.functional as F
from torch import Tensor

LOGIT_LIMIT = 1e6  # its square times a batch still fits float32
LOG_SECONDS_LOW, LOG_SECONDS_HIGH = -10.0, 14.0  # 45 microseconds to 14 days: beyond them, exp of a logit is held


def bounded(logits: Tensor) -> Tensor:
    """Logits as float32 (float64 stays) within +-1e6, any shape; gradient 0 beyond. Infinite or NaN logits become NaN.

    >>> bounded(torch.tensor([2.0, -3e38, float("inf")])).tolist()
    [2.0, -1000000.0, nan]
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    # The product is 0, or NaN where a logit is not finite: a model that has diverged must not look healthy.
    return logits.clamp(-LOGIT_LIMIT, LOGIT_LIMIT) + logits * 0.0


def tangent(loss: Tensor, slope: Tensor, logit: Tensor, held: Tensor) -> Tensor:
    """A convex loss, computed at the `held` (clamped) logit, continued as its tangent to the true one.

    `slope` is d loss / d logit at `held`. Inside the clamp nothing changes; outside, the gradient keeps pulling back.

    >>> logit = torch.tensor([0.0, 100.0])
    >>> held = logit.clamp(max=2.0)
    >>> tangent(held.exp(), held.exp(), logit, held) / torch.e**2
    tensor([ 0.1353, 99.0000])
    """
    return loss + slope.detach() * (logit - held)


def hold_log_seconds(logit: Tensor) -> Tensor:
    """A logarithm of seconds, clamped to where exp is a duration of this world (45 microseconds to 14 days)."""
    return logit.clamp(LOG_SECONDS_LOW, LOG_SECONDS_HIGH)


def log_softplus(logit: Tensor) -> Tensor:
    """log(softplus(logit)), exact also where softplus underflows to 0 (there softplus(x) is exp(x)).

    >>> log_softplus(torch.tensor([-1e4, 0.0])).tolist()
    [-10000.0, -0.3665129244327545]
    """
    return torch.where(logit < -15.0, logit, F.softplus(logit.clamp(min=-15.0)).log())


def inverse_softplus(value: float) -> float:
    """The logit whose softplus is `value` > 0.

    >>> round(F.softplus(torch.tensor(inverse_softplus(3.0))).item(), 5)
    3.0
    """
    held = torch.tensor(max(value, 1e-6), dtype=torch.float64)
    return float(held + torch.log(-torch.expm1(-held)))
