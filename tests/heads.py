"""Every kind of task, logits for their heads, and what a constant logit comes to under a loss. C logits, N labels."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from mtrec.tasks import Binary, Dwell, Multiclass, Regression, Task

NAN = math.nan
LOSS_FORMS: list[str | dict[str, Any]] = [
    "logsun",
    "log_mse",
    "huber",
    {"kind": "huber", "on": "seconds", "delta": 30.0},
    "weighted_logistic",
    {"kind": "weighted_logistic", "variant": "covington"},
    "ziln",
    "tweedie",
    {"kind": "tweedie", "power": 1.05},
    {"kind": "tweedie", "power": 1.95},
    "poisson",
]
ALL_TASKS: list[Task] = [
    Binary("like"),
    Regression("price"),
    Regression("price", loss="huber", scale=5.0),
    Multiclass("reaction", num_classes=4),
    *[Dwell("dwell", loss=form) for form in LOSS_FORMS],
]


def task_id(task: Task) -> str:
    loss = getattr(task, "dwell_loss", None)
    options = [str(value) for value in vars(loss).values()] if loss is not None else []
    return "-".join([task.family, *([type(loss).__name__] if loss is not None else []), *options])


def random_logits(rows: int, columns: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def skewed_seconds(rows: int = 4001) -> Tensor:
    """Zero-inflated log-normal by its quantiles: 40 % zeros, log T ~ N(2, 1.2^2)."""
    quantiles = (np.arange(rows) + 0.5) / rows
    seconds = np.exp(scipy.stats.norm.ppf(quantiles, 2.0, 1.2))
    zeros = np.zeros(rows * 2 // 3)
    return torch.tensor(np.concatenate([zeros, seconds]), dtype=torch.float32)


def fit_constant(loss: Callable[[Tensor, Tensor], Tensor], start_C: Tensor, seconds_N: Tensor) -> Tensor:
    """(1, C) constant logits after gradient descent (L-BFGS) on the mean loss."""
    logits_C = start_C.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits_C], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(logits_C.expand(len(seconds_N), -1), seconds_N).mean()
        total.backward()
        return total

    optimizer.step(closure)
    return logits_C.detach().reshape(1, -1)
