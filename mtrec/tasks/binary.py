"""Click, conversion, like: does it happen? B rows, C = 1 logit, N labels of a sample."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mtrec.tasks.finite import bounded
from mtrec.tasks.task import Family, LabelRange


class Binary:
    """A label in {0, 1}: p = sigmoid(logit), trained with the log loss; predicts `p_<name>`.

    >>> task = Binary("click")
    >>> logits_BC = torch.tensor([[0.0], [-1e4]])
    >>> task.loss(logits_BC, torch.tensor([1.0, 1.0])).tolist()
    [0.6931471824645996, 10000.0]
    >>> task.prediction_names(), task.predict(logits_BC).tolist()
    (('p_click',), [0.5, 0.0])
    """

    family: Family = "binary"
    num_logits = 1
    label_scale = 1.0
    label_range = LabelRange(0.0, 1.0, True)

    def __init__(self, name: str) -> None:
        self.name = name

    def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """(B,): -y log p - (1 - y) log(1 - p), y the label, p = sigmoid(logit)."""
        return F.binary_cross_entropy_with_logits(bounded(logits_BC[:, 0]), labels_B.float(), reduction="none")

    def predict(self, logits_BC: Tensor) -> Tensor:
        """(B,): p = sigmoid(logit)."""
        return bounded(logits_BC[:, 0]).sigmoid()

    def log_prediction(self, logits_BC: Tensor) -> Tensor | None:
        """None: a probability is not on a log scale."""
        return None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(1,): log(mean / (1 - mean)), the mean held within [1e-6, 1 - 1e-6]; the sample is not looked at."""
        rate = min(max(mean, 1e-6), 1.0 - 1e-6)
        return torch.tensor([math.log(rate) - math.log1p(-rate)])

    def prediction_names(self) -> tuple[str, ...]:
        """`p_<name>`."""
        return (f"p_{self.name}",)
