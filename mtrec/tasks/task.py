"""The protocol a task satisfies. A class of your own needs these members and no base class.

B rows of this rank, C logits of the head.
"""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

Family = Literal["binary", "dwell", "regression", "multiclass"]


class LabelRange(NamedTuple):
    """The labels a task accepts, in natural units; None is no bound.

    >>> LabelRange(0.0, None, False).low
    0.0
    """

    low: float | None
    high: float | None
    integer: bool


@runtime_checkable
class Task(Protocol):
    """A head: how many logits it takes, its loss a row, its prediction in natural units.

    `__init__(self, name, *, options)`: the house gives the name; the keyword-only parameters are the options a user
    writes beside `kind:`. Rows without a label, and rows outside the task's space, never count: `Objectives` masks
    them, so `loss` sees labels within `label_range` only.

    >>> class Median:
    ...     family = "regression"
    ...     num_logits, label_scale = 1, 1.0
    ...     label_range = LabelRange(None, None, False)
    ...     def __init__(self, name: str) -> None:
    ...         self.name = name
    ...     def loss(self, logits_BC, labels_B):
    ...         return (logits_BC[:, 0] - labels_B).abs()
    ...     def predict(self, logits_BC):
    ...         return logits_BC[:, 0]
    ...     def log_prediction(self, logits_BC):
    ...         return None
    ...     def initial_bias(self, mean, sample_N):
    ...         return sample_N.median().reshape(1)
    ...     def prediction_names(self):
    ...         return (self.name,)
    >>> isinstance(Median("price"), Task)
    True
    """

    name: str
    family: Family
    """Which metrics it gets. `binary` promises more: one logit, p = sigmoid(logit), labels 0 and 1; only such a task
    may be another's `given`."""
    num_logits: int
    label_range: LabelRange
    label_scale: float
    """Factor from the label's column to natural units: 0.001 for a column in milliseconds."""

    def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """(B,) losses; finite, with finite gradients, for any finite float32 logits."""

    def predict(self, logits_BC: Tensor) -> Tensor:
        """(B,) predictions in natural units, or (B, P) where the task has P > 1 prediction names."""

    def log_prediction(self, logits_BC: Tensor) -> Tensor | None:
        """(B,) predictions of log1p(label), for R2 of log1p; None where the head has no log-scale output."""

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(C,) constant logits that predict the base rate, from the labels' mean and a sample of N >= 1 of them."""

    def prediction_names(self) -> tuple[str, ...]:
        """The output columns, one for each column of `predict`."""
