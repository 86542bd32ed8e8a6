"""One class of several. B rows, C logits (one a class), N labels of a sample."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mtrec.kinds import TwoOrMore
from mtrec.tasks.finite import bounded
from mtrec.tasks.task import Family, LabelRange


class Multiclass:
    """A label in 0 .. num_classes - 1: softmax, trained with cross-entropy; predicts `p_<name>_0`, `p_<name>_1`, ...

    Raises ValueError for fewer than two classes.

    Options:
        num_classes: at least two.

    >>> task = Multiclass("reaction", num_classes=3)
    >>> logits_BC = torch.tensor([[1.0, 1.0, -1e4]])
    >>> task.predict(logits_BC).tolist(), task.loss(logits_BC, torch.tensor([2.0])).tolist()
    ([[0.5, 0.5, 0.0]], [10001.693359375])
    >>> task.prediction_names()
    ('p_reaction_0', 'p_reaction_1', 'p_reaction_2')
    """

    family: Family = "multiclass"
    label_scale = 1.0

    def __init__(self, name: str, *, num_classes: TwoOrMore) -> None:
        if num_classes < 2:
            raise ValueError(f"`tasks.{name}.num_classes` should be at least 2. Found {num_classes}.")
        self.name = name
        self.num_logits = num_classes
        self.label_range = LabelRange(0.0, float(num_classes - 1), True)

    def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """(B,): -log softmax(logits) of the label's class; labels are whole numbers, of any type."""
        return F.cross_entropy(bounded(logits_BC), labels_B.long(), reduction="none")

    def predict(self, logits_BC: Tensor) -> Tensor:
        """(B, C): softmax(logits)."""
        return bounded(logits_BC).softmax(dim=1)

    def log_prediction(self, logits_BC: Tensor) -> Tensor | None:
        """None: a probability is not on a log scale."""
        return None

    def initial_bias(self, mean: float, sample_N: Tensor) -> Tensor:
        """(C,): the logarithms of the classes' shares of the sample, which sum to 1; `mean` is not looked at."""
        counts_C = torch.bincount(sample_N.long(), minlength=self.num_logits).float()
        # A class that the sample lacks counts as a hundredth of a row: rare, not impossible.
        rates_C = counts_C.clamp(min=0.01)
        return (rates_C / rates_C.sum()).log()

    def prediction_names(self) -> tuple[str, ...]:
        """`p_<name>_0` to `p_<name>_<C - 1>`."""
        return tuple(f"p_{self.name}_{index}" for index in range(self.num_logits))
