"""A number. B rows, C = 1 logit, N labels of a sample."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mtrec.kinds import PositiveFloat
from mtrec.tasks.finite import bounded
from mtrec.tasks.huber import huber_center
from mtrec.tasks.task import Family, LabelRange


class Regression:
    """A number, predicted as it is in a column `<name>`: prediction = logit x `scale`.

    Options:
        loss: `squared` (of the error / scale; predicts the mean) or `huber` (half the square within `delta`; less moved by
            outliers, and no longer the mean).
        delta: where `huber` becomes linear, in scales.
        scale: size of a usual deviation, in the label's units; it makes the loss near 1, so that one learning rate fits all
            tasks.
        low, high: the labels allowed; null: no bound.

    Raises ValueError where `low` is not below `high`.

    >>> task = Regression("price", scale=10.0, low=0.0)
    >>> logits_BC = torch.tensor([[2.0]])
    >>> task.predict(logits_BC).item(), task.loss(logits_BC, torch.tensor([25.0])).item()
    (20.0, 0.25)
    """

    family: Family = "regression"
    num_logits = 1
    label_scale = 1.0

    def __init__(
        self,
        name: str,
        *,
        loss: Literal["squared", "huber"] = "squared",
        delta: PositiveFloat = 1.0,
        scale: PositiveFloat = 1.0,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        if low is not None and high is not None and low >= high:
            raise ValueError(f"`tasks.{name}.low` should be below `tasks.{name}.high`, which is {high}. Found {low}.")
        self.name = name
        self.loss_kind = loss
        self.delta = delta
        self.scale = scale
        self.label_range = LabelRange(low, high, False)

    def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """(B,): e^2, e = logit - label / scale; for huber e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2)."""
        prediction_B, target_B = bounded(logits_BC[:, 0]), labels_B.float() / self.scale
        if self.loss_kind == "huber":
            return F.huber_loss(prediction_B, target_B, reduction="none", delta=self.delta)
        return (prediction_B - target_B).square()

    def predict(self, logits_BC: Tensor) -> Tensor:
        """(B,): logit x scale, in the label's units; `low` and `high` do not bound it."""
        return bounded(logits_BC[:, 0]) * self.scale

    def log_prediction(self, logits_BC: Tensor) -> Tensor | None:
        """None: the logit is on the label's own scale."""
        return None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(1,): mean / scale; for huber, which predicts no mean, the constant of least loss on the sample."""
        if self.loss_kind == "huber":
            return huber_center(sample_N.double() / self.scale, self.delta).float()
        return torch.tensor([mean / self.scale])

    def prediction_names(self) -> tuple[str, ...]:
        """The task's name, as it is."""
        return (self.name,)
