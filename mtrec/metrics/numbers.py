"""Metrics of tasks that predict a number (dwell, regression), collected over batches and ranks.

Legend: N rows of an update.
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from mtrec.metrics.distribution import Moments
from mtrec.metrics.ranking import BY_PREDICTION_AND_LABEL, NUMBER_COLUMNS, concordance
from mtrec.metrics.rows import MEMORY_LIMIT_BYTES, PIECE_ROWS, Array, Floats, SortedRows, observed_rows, require

ROUNDING = 1e-13  # of a mean, in its own size
SUMS = 4  # of w |error|, w error^2, w prediction, w label


class _NumberRows:
    """What `DwellMetrics` and `RegressionMetrics` share: rows for XAUC (24 bytes each), sums, moments of the labels."""

    def __init__(self, memory_limit_bytes: int, spill_folder: str | os.PathLike[str] | None) -> None:
        self.rows = SortedRows(
            NUMBER_COLUMNS,
            {"prediction": BY_PREDICTION_AND_LABEL},
            memory_limit_bytes=memory_limit_bytes,
            spill_folder=spill_folder,
        )
        self.sums = np.zeros(SUMS)
        self.labels = Moments()

    def add(self, prediction_N: Floats, label_N: Floats, weight_N: Floats) -> None:
        self.rows.append({"prediction": prediction_N, "label": label_N, "weight": weight_N})
        error_N = prediction_N - label_N
        values = (np.abs(error_N), error_N**2, prediction_N, label_N)
        self.sums += [float(np.dot(weight_N, value)) for value in values]
        self.labels.add(label_N, weight_N)

    def merge(self, other: Self) -> None:
        self.rows.merge(other.rows)
        self.sums += other.sums
        self.labels.add_values(other.labels.values)

    def pieces(self, rows: int) -> Iterator[dict[str, Array]]:
        sums, labels = self.sums.copy(), self.labels.values
        for piece in self.rows.pieces(rows):
            yield {**piece, "sums": sums, "labels": labels}
            sums, labels = np.zeros_like(sums), np.zeros_like(labels)

    def add_arrays(self, arrays: Mapping[str, Array]) -> None:
        self.rows.append({name: arrays[name] for name, _ in NUMBER_COLUMNS})
        self.sums += arrays["sums"]
        self.labels.add_values(arrays["labels"])

    def compute(self) -> dict[str, float]:
        """Weighted mean errors and the share of pairs in order; NaN where no row counts."""
        absolute, square, _, _ = self.sums.tolist()
        weight = float(self.labels.values[0])
        return {
            "mae": absolute / weight if weight > 0 else math.nan,
            "rmse": math.sqrt(square / weight) if weight > 0 else math.nan,
            "xauc": concordance(self.rows),
            "rows": self.rows.num_rows,
        }


def _r2(square_error: float, labels: Moments) -> float:
    """1 - sum of squared errors / that of predicting the mean; NaN where all labels are equal."""
    weight, mean, deviation = labels.values.tolist()
    rounding = weight * (ROUNDING * mean) ** 2  # what is left of equal labels' deviation
    return 1 - square_error / deviation if deviation > rounding else math.nan


class RegressionMetrics:
    """Mean absolute error, root mean squared error, R2 and XAUC of a number.

    >>> metrics = RegressionMetrics()
    >>> metrics.update(np.array([1.0, 2.0, 4.0]), np.array([1.0, 3.0, np.nan]))
    >>> metrics.compute()
    {'mae': 0.5, 'rmse': 0.7071067811865476, 'xauc': 1.0, 'rows': 2, 'r2': 0.5}
    """

    def __init__(
        self,
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._numbers = _NumberRows(memory_limit_bytes, spill_folder)

    def update(
        self, prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None
    ) -> None:
        """Add N rows: predictions, labels (NaN: unobserved, not counted), weights >= 0. ValueError where not finite."""
        self._numbers.add(*observed_rows(prediction_N, label_N, weight_N)[1:])

    def merge(self, other: Self) -> None:
        """Add what the other has seen; it stays as it is."""
        self._numbers.merge(other._numbers)

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[dict[str, Array]]:
        """Everything seen, in one or more dictionaries of at most `rows` rows, each for `from_arrays`; merged, they are
        it."""
        return self._numbers.pieces(rows)

    def arrays(self) -> dict[str, Array]:
        """Everything seen as one dictionary of arrays (in memory: `pieces` where that is too much)."""
        return next(self.pieces(max(1, self._numbers.rows.num_rows)))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The accumulator that `arrays()` or `pieces()` was called on."""
        made = cls(memory_limit_bytes=memory_limit_bytes, spill_folder=spill_folder)
        made._numbers.add_arrays(arrays)
        return made

    def compute(self) -> dict[str, float]:
        """`mae`, `rmse`, `r2` (over the mean label of these rows), `xauc` and `rows`; NaN where one is undefined."""
        return {**self._numbers.compute(), "r2": _r2(float(self._numbers.sums[1]), self._numbers.labels)}


class DwellMetrics:
    """Metrics of predicted seconds: mean absolute error, root mean squared error, XAUC, ratio of sums, R2 of log1p.

    R2 is that of log1p(label) and the head's log-scale output, over the rows for which one was given; heads without one
    have none, and it is NaN (log1p of the predicted mean is biased low, and would be another metric).

    >>> metrics = DwellMetrics()
    >>> metrics.update(np.array([2.0, 6.0]), np.array([0.0, 10.0]), log_prediction_N=np.log1p([0.0, 10.0]))
    >>> metrics.compute()
    {'mae': 3.0, 'rmse': 3.1622776601683795, 'xauc': 1.0, 'rows': 2, 'sum_ratio': 0.8, 'r2_log1p': 1.0}
    """

    def __init__(
        self,
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self._numbers = _NumberRows(memory_limit_bytes, spill_folder)
        self._log_square = np.zeros(1)  # sum of w (log1p(label) - log prediction)^2
        self._log_labels = Moments()

    def update(
        self,
        prediction_N: npt.ArrayLike,
        label_N: npt.ArrayLike,
        weight_N: npt.ArrayLike | None = None,
        log_prediction_N: npt.ArrayLike | None = None,
    ) -> None:
        """Add N rows: predicted seconds, labels in seconds (>= 0; NaN: unobserved, not counted), weights >= 0, and the
        output on the scale of log1p(seconds) if the head has one. ValueError where not finite or a label is
        negative."""
        keep, prediction, label, weight = observed_rows(prediction_N, label_N, weight_N, label_range=(0.0, math.inf))
        if log_prediction_N is not None:
            log_prediction = np.asarray(log_prediction_N, np.float64)
            if log_prediction.shape != keep.shape:
                raise ValueError(
                    f"`log_prediction` should have one number for each row, shape {keep.shape}. "
                    f"Found shape {log_prediction.shape}."
                )
            require(~keep | np.isfinite(log_prediction), "log_prediction", "finite", log_prediction)
            log_label = np.log1p(label)
            self._log_square += np.dot(weight, (log_label - log_prediction[keep]) ** 2)
            self._log_labels.add(log_label, weight)
        self._numbers.add(prediction, label, weight)

    def merge(self, other: Self) -> None:
        """Add what the other has seen; it stays as it is."""
        self._numbers.merge(other._numbers)
        self._log_square += other._log_square
        self._log_labels.add_values(other._log_labels.values)

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[dict[str, Array]]:
        """Everything seen, in one or more dictionaries of at most `rows` rows, each for `from_arrays`; merged, they are
        it."""
        log_square, log_labels = self._log_square.copy(), self._log_labels.values
        for piece in self._numbers.pieces(rows):
            yield {**piece, "log_square": log_square, "log_labels": log_labels}
            log_square, log_labels = np.zeros_like(log_square), np.zeros_like(log_labels)

    def arrays(self) -> dict[str, Array]:
        """Everything seen as one dictionary of arrays (in memory: `pieces` where that is too much)."""
        return next(self.pieces(max(1, self._numbers.rows.num_rows)))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The accumulator that `arrays()` or `pieces()` was called on."""
        made = cls(memory_limit_bytes=memory_limit_bytes, spill_folder=spill_folder)
        made._numbers.add_arrays(arrays)
        made._log_square += arrays["log_square"]
        made._log_labels.add_values(arrays["log_labels"])
        return made

    def compute(self) -> dict[str, float]:
        """`mae`, `rmse` (seconds), `xauc`, `sum_ratio` (predicted over true), `r2_log1p`, `rows`; NaN where
        undefined."""
        prediction, label = self._numbers.sums[2:].tolist()
        return {
            **self._numbers.compute(),
            "sum_ratio": prediction / label if label > 0 else math.nan,
            "r2_log1p": _r2(float(self._log_square[0]), self._log_labels),
        }
