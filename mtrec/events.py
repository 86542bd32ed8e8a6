"""What a training says of itself: the events of the loop (`train.py`), and how it fails.

Plain numbers and text, nothing on a device: printed, logged (`recorder.py`), reported to Ray by whoever iterates the loop.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A logged step. `losses`, `weights`, `balancing`, `gates` by task; `rows_per_second` and `data_wait` since the last one."""

    step: int
    epoch: int
    total_steps: int
    losses: dict[str, float]
    weights: dict[str, float]
    balancing: dict[str, float]
    gates: dict[str, float]
    learning_rate: float
    rows_per_second: float
    data_wait: float
    nonfinite_steps: int


@dataclasses.dataclass(frozen=True)
class Validation:
    """Metrics over the validation rows after `step` steps; `metric` is what the best checkpoint goes by."""

    step: int
    epoch: int
    metrics: dict[str, Any]
    metric: float | None
    seconds: float


@dataclasses.dataclass(frozen=True)
class WarmStarted:
    """The weights come from the checkpoint `folder` of another run; `notes`: what changed since, was dropped or begins anew."""

    step: int
    folder: str
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Restarted:
    """Workers died, or became more or fewer; these took over at the newest checkpoint, of `step`.

    `cause`: what is known of the failure, None where there was none (Ray gave the run more or fewer workers);
    `repeated_steps`: at least so many are done again, those that had been logged after the checkpoint.
    """

    step: int
    world_size: int
    world_size_before: int
    repeated_steps: int
    cause: str | None


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint that was started (in the background) or written."""

    step: int
    folder: str


@dataclasses.dataclass(frozen=True)
class Ended:
    """The last event. `reason`: finished, early_stopping, max_steps or stopped.

    `skipped_rows`: {reason: rows} left out by `data.on_bad_rows: skip` since the (re)start, on all ranks (on rank 0 only).
    """

    step: int
    reason: str
    best_step: int | None
    best_metric: float | None
    skipped_rows: dict[str, int]


Event = Step | Validation | Saved | WarmStarted | Restarted | Ended


class Failed(RuntimeError):
    """Work that could not be done though nothing was wrong with what was asked; the message says what can be done now."""


class TrainingFailed(Failed):
    """Workers failed more often than `training.max_failures` allows; what is saved can be resumed."""


DIVERGED = (
    "its weights have diverged. Train it again with a lower `optimizer.dense.learning_rate` or `optimizer.tables.learning_rate`."
)


class NotFiniteError(FloatingPointError, ValueError):
    """Outputs, or too many gradients in a row, are not finite: data or rates are to be changed, a restart would not help."""
