"""How well predictions are probabilities: log loss, normalized entropy, calibration.

Legend: N rows, M cells (rows with equal prediction, added up), Q calibration bins.
"""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from mtrec.metrics.ranking import BINARY_COLUMNS, BY_PREDICTION, Cells, binary_cells, binary_rows
from mtrec.metrics.rows import Array, SortedRows

CALIBRATION_BINS = 20
CLIP = float(np.finfo(np.float64).eps)  # 2.2e-16, as scikit-learn clips float64


class Sums:
    """Sums over rows: `weight`, `positive` (of w y), `prediction` (of w p) and `loss` (of w times the log loss)."""

    def __init__(self) -> None:
        self.values = np.zeros(4)

    def add(self, cells: Cells) -> None:
        """Add cells (or single rows) in any order; `inner` is the predicted probability."""
        p = np.clip(cells.inner, CLIP, 1 - CLIP)
        weight = cells.positive + cells.negative
        loss = -np.sum(cells.positive * np.log(p) + cells.negative * np.log1p(-p))
        self.values += [np.sum(weight), np.sum(cells.positive), np.sum(weight * cells.inner), loss]

    def log_loss(self) -> float:
        """Mean log loss, in nats."""
        weight, _, _, loss = self.values.tolist()
        return loss / weight if weight > 0 else math.nan

    def normalized_entropy(self) -> float:
        """Log loss over the entropy of the base rate; NaN where a class is missing."""
        weight, positive, _, _ = self.values.tolist()
        if not 0 < positive < weight:
            return math.nan
        rate = positive / weight
        return self.log_loss() / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))

    def calibration(self) -> float:
        """Sum of predictions over sum of labels; NaN without positives."""
        _, positive, prediction, _ = self.values.tolist()
        return prediction / positive if positive > 0 else math.nan


class CalibrationError:
    """Expected calibration error over `bins` bins of equally many rows; cells come in ascending order of prediction.

    Rows with equal predictions stay in one bin (that of their middle row), so bins can be uneven or empty.
    """

    def __init__(self, num_rows: int, bins: int = CALIBRATION_BINS) -> None:
        self._num_rows, self._seen = num_rows, 0
        self._weight = 0.0
        self._excess_Q, self._variance_Q = np.zeros(bins), np.zeros(bins)

    def add(self, cells: Cells) -> None:
        """Add the next cells."""
        bins = len(self._excess_Q)
        before = np.cumsum(cells.rows) - cells.rows + self._seen
        place = (2 * before + cells.rows - 1) * bins // (2 * self._num_rows)
        p, weight = cells.inner, cells.positive + cells.negative
        self._excess_Q += np.bincount(place, weight * p - cells.positive, bins)
        self._variance_Q += np.bincount(place, cells.square * p * (1 - p), bins)
        self._weight += float(np.sum(weight))
        self._seen += int(np.sum(cells.rows))

    def error(self) -> tuple[float, float]:
        """(the error, its expected value if every prediction were the true probability)."""
        if self._weight == 0:
            return math.nan, math.nan
        expected = math.sqrt(2 / math.pi) * float(np.sum(np.sqrt(self._variance_Q)))
        return float(np.sum(np.abs(self._excess_Q))) / self._weight, expected / self._weight


class Histogram:
    """Rows added up in bins of equal width in the log odds: constant memory, an AUC with a bound on its error.

    `values` is (6, bins): sums of w y, w (1 - y), w^2, rows, w p, positives. 4,096 bins are .009 wide between the log
    odds -18 and 18 (p = 1.5e-8 and 1 - 1.5e-8); what lies outside is in the outermost ones.
    """

    def __init__(self, bins: int) -> None:
        self.values = np.zeros((6, bins))

    @property
    def positives(self) -> int:
        """Rows with label 1."""
        return int(np.sum(self.values[5]))

    @property
    def num_rows(self) -> int:
        """Rows added."""
        return int(np.sum(self.values[3]))

    def add(self, rows: Cells, label_N: Array) -> None:
        """Add single rows in any order, and their labels (which a weight of 0 hides)."""
        bins = self.values.shape[1]
        p = np.clip(rows.inner, 1e-300, 1 - CLIP)
        place = np.clip((np.log(p) - np.log1p(-p) + 18) * (bins / 36), 0, bins - 1).astype(np.int64)
        weight = rows.positive + rows.negative
        sums = (rows.positive, rows.negative, rows.square, rows.rows, weight * rows.inner, label_N)
        self.values += np.stack([np.bincount(place, field, bins) for field in sums])

    def cells(self) -> Iterator[Cells]:
        """The bins that have rows, as one batch of cells in ascending order, with their mean prediction."""
        positive, negative, square, rows, prediction, _ = self.values[:, self.values[3] > 0]
        if len(rows):
            weight = positive + negative
            # A bin of weight 0 counts for nothing, but needs a number
            mean = np.divide(prediction, weight, out=np.zeros_like(weight), where=weight > 0)
            yield Cells(np.zeros(len(rows), np.int64), mean, positive, negative, square, rows.astype(np.int64))


def _tally(prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None) -> Sums:
    sums = Sums()
    for cells in _probability_cells(probability_rows(prediction_N, label_N, None, weight_N)):
        sums.add(cells)
    return sums


def _probability_cells(columns: dict[str, Array]) -> Iterator[Cells]:
    rows = SortedRows(BINARY_COLUMNS, {"prediction": BY_PREDICTION}, memory_limit_bytes=2**62)
    rows.append(columns)
    return binary_cells(rows, "prediction")


def probability_rows(
    prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, group_N: npt.ArrayLike | None, weight_N: npt.ArrayLike | None
) -> dict[str, Array]:
    """As `binary_rows`, for predictions that have to lie in [0, 1]; else ValueError."""
    return binary_rows(prediction_N, label_N, group_N, weight_N, (0.0, 1.0))


def log_loss(prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None) -> float:
    """Mean of -(y ln p + (1 - y) ln(1 - p)), in nats, computed in float64 with p clipped to [2.2e-16, 1 - 2.2e-16].

    A float32 sigmoid is exactly 1 from logits of 17 on: compute predictions in float64 where that matters. NaN labels
    are left out; NaN where there are no rows.

    >>> round(log_loss([0.5, 0.5], [0, 1]), 6)
    0.693147
    """
    return _tally(prediction_N, label_N, weight_N).log_loss()


def normalized_entropy(
    prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None
) -> float:
    """Log loss over that of predicting the base rate (He et al., 2014); below 1 is better than knowing only the rate.

    The base rate is that of the rows given (the paper takes the training data's). NaN where a class is missing.

    >>> round(normalized_entropy([0.25, 0.25, 0.25, 0.25], [0, 0, 0, 1]), 12)
    1.0
    """
    return _tally(prediction_N, label_N, weight_N).normalized_entropy()


def calibration(prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None) -> float:
    """Sum of predictions over sum of labels (1 is right, above predicts too much); NaN without positives.

    >>> calibration([0.5, 0.25, 0.75], [1, 0, 0])
    1.5
    """
    return _tally(prediction_N, label_N, weight_N).calibration()


def calibration_error(
    prediction_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    weight_N: npt.ArrayLike | None = None,
    bins: int = CALIBRATION_BINS,
) -> tuple[float, float]:
    """(ECE, its expected value under perfect calibration): sum over bins of |sum of p - sum of y| over the number of
    rows.

    Naeini et al., 2015, with bins of equally many rows by prediction instead of equal width, since rare events crowd
    near 0; equal predictions stay together. Chance alone makes ECE positive, so it means little without the second
    number: the sum over bins of sqrt(2 / pi) sd, sd^2 = sum of p (1 - p), i.e. the mean absolute deviation of a normal
    variable (too high by 1 % where a bin expects 10 positives, by 8 % where it expects one).

    >>> error, if_calibrated = calibration_error([0.1, 0.1, 0.9, 0.9], [0, 0, 1, 1], bins=2)
    >>> round(error, 12), round(if_calibrated, 3)
    (0.1, 0.169)
    """
    columns = probability_rows(prediction_N, label_N, None, weight_N)
    error = CalibrationError(len(columns["label"]), bins)
    for cells in _probability_cells(columns):
        error.add(cells)
    return error.error()
