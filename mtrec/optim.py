"""Optimizers and learning rates: fused row-wise Adagrad for the tables, AdamW for the rest, each with its own schedule."""

import math
from typing import Any, Literal

import torch
import torchrec
from torch import Tensor, nn

from mtrec.experiment import DenseOptimizer, Experiment, TableOptimizer

REFERENCE_BATCH = 512  # the dense learning rate's default was found at this batch size


def schedule(kind: Literal["constant", "linear", "cosine"], step: int, total_steps: int, warmup_steps: int) -> float:
    """The factor on the learning rate at `step` (0 is the first), in (0, 1].

    A linear warm-up over `warmup_steps`, then constant, or down to 0 at `total_steps` linearly or as half a cosine wave
    (Loshchilov and Hutter, 2017, without restarts).

    >>> [round(schedule("cosine", step, 10, 2), 3) for step in (0, 1, 2, 6, 9)]
    [0.5, 1.0, 1.0, 0.5, 0.038]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


class Schedules:
    """Learning rates as pure functions of the step, so that a resumed run needs nothing but the step."""

    def __init__(self, experiment: Experiment, batch_size: int, total_steps: int) -> None:
        self.tables, self.dense = experiment.optimizer.tables, experiment.optimizer.dense
        self.total_steps = total_steps
        rate = self.dense.learning_rate
        self.dense_rate = 1e-3 * math.sqrt(batch_size / REFERENCE_BATCH) if rate == "auto" else rate
        warmup = self.dense.warmup_steps
        self.dense_warmup = min(500, total_steps // 20) if warmup == "auto" else warmup

    def dense_learning_rate(self, step: int) -> float:
        """Of the dense part at a step, from 0."""
        return self.dense_rate * schedule(self.dense.schedule, step, self.total_steps, self.dense_warmup)

    def table_learning_rate(self, step: int) -> float:
        """Of the tables at a step, from 0."""
        return self.tables.learning_rate * schedule(
            self.tables.schedule, step, self.total_steps, self.tables.warmup_steps
        )


def table_optimizer(config: TableOptimizer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """(class, its options), as torch's own optimizers take them; what `parallel.shard` fuses into the backward pass."""
    options: dict[str, Any] = {"lr": config.learning_rate}
    if config.kind != "sgd":
        options["eps"] = config.eps
    classes: dict[str, type[torch.optim.Optimizer]] = {
        "rowwise_adagrad": torchrec.optim.RowWiseAdagrad,
        "adagrad": torch.optim.Adagrad,
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
    }
    return classes[config.kind], options


def replicated_optimizer(config: TableOptimizer, parameters: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The tables' optimizer for `sharding: data_parallel` tables, on dense gradients; row for row the fused one's result."""
    if not parameters:
        return None
    if config.kind == "adam":
        raise ValueError(
            "`optimizer.tables.kind` adam does not go with `sharding: data_parallel`. Use rowwise_adagrad."
        )
    optimizer_class, options = table_optimizer(config)
    if config.kind == "rowwise_adagrad":
        optimizer_class = torchrec.optim.RowWiseAdagrad
    made: torch.optim.Optimizer = optimizer_class(parameters, **options)
    return made


def dense_optimizer(
    config: DenseOptimizer, parameters: list[nn.Parameter], learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer of interaction, architecture, towers and heads, in torch's fused form (one pass over memory)."""
    if config.kind == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, weight_decay=config.weight_decay, fused=True)
    make = torch.optim.AdamW if config.kind == "adamw" else torch.optim.Adam
    return make(
        parameters, lr=learning_rate, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def skip_where(optimizer: torch.optim.Optimizer, skipped: Tensor) -> None:
    """The next `step()` of a fused optimizer changes nothing if `skipped` (bool, one number, on its device) is true.

    The device looks, the host does not: it is what a gradient scaler tells the optimizer when it found an infinity.
    """
    assert getattr(optimizer, "_step_supports_amp_scaling", False), type(optimizer)
    optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
