"""Metrics of a binary task (click, conversion), collected over batches and ranks.

Legend: N rows of an update.
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from mtrec.metrics.groups import NULL_GROUP
from mtrec.metrics.probability import CalibrationError, Histogram, Sums, probability_rows
from mtrec.metrics.ranking import (
    BINARY_COLUMNS,
    BY_GROUP,
    BY_PREDICTION,
    Cells,
    binary_cells,
    count_pairs,
    mean_auc,
    row_cells,
)
from mtrec.metrics.rows import MEMORY_LIMIT_BYTES, PIECE_ROWS, Array, SortedRows


class BinaryMetrics:
    """AUC, GAUC, log loss, normalized entropy and calibration of predicted probabilities.

    Exact: rows are kept (25 bytes each), beyond `memory_limit_bytes` in sorted files in `spill_folder`. Without weights
    the result is the same to the bit however rows are cut into updates, merges and spills; with weights to rounding.
    With `bins`, rows are added up in a histogram instead: `auc` then errs by at most `auc_error_bound` (half the share
    of pairs that share a bin) and ECE sees bins as ties, the rest stays exact; rows with a group are still kept, for an
    exact GAUC.

    >>> metrics = BinaryMetrics()
    >>> metrics.update(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1]))
    >>> other = BinaryMetrics()
    >>> other.update(np.array([0.9, 0.5]), np.array([1, np.nan]))
    >>> metrics.merge(other)
    >>> found = metrics.compute()
    >>> found["rows"], found["positives"], round(found["auc"], 4), found["gauc"]
    (5, 3, 0.9167, nan)
    """

    def __init__(
        self,
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        bins: int | None = None,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if bins is not None and bins < 2:
            raise ValueError(f"`bins` should be at least 2, or None for exact metrics. Found {bins}.")
        orders = {"prediction": BY_PREDICTION, "group": BY_GROUP} if bins is None else {"group": BY_GROUP}
        self._rows = SortedRows(
            BINARY_COLUMNS, orders, memory_limit_bytes=memory_limit_bytes, spill_folder=spill_folder
        )
        self._positives = 0  # of the rows kept
        self._histogram = None if bins is None else Histogram(bins)
        self._sums = Sums()  # filled with the histogram; otherwise found from the sorted rows

    def update(
        self,
        prediction_N: npt.ArrayLike,
        label_N: npt.ArrayLike,
        group_N: npt.ArrayLike | None = None,
        weight_N: npt.ArrayLike | None = None,
    ) -> None:
        """Add N rows: probabilities, labels (0, 1, or NaN: unobserved, not counted), int64 group keys, weights >= 0.

        Raises ValueError naming the row of a prediction outside [0, 1] or a label that is none of these.
        """
        columns = probability_rows(prediction_N, label_N, group_N, weight_N)
        if self._histogram is not None:
            rows = row_cells(columns["prediction"], columns["label"], columns["weight"])
            self._histogram.add(rows, columns["label"])
            self._sums.add(rows)
            grouped = columns["group"] != NULL_GROUP
            columns = {name: column[grouped] for name, column in columns.items()}
        self._keep(columns)

    def _keep(self, columns: Mapping[str, Array]) -> None:
        self._rows.append(columns)
        self._positives += int(np.sum(columns["label"], dtype=np.int64))

    def merge(self, other: Self) -> None:
        """Add what the other has seen; it stays as it is. Raises ValueError where `bins` differ."""
        if self._bins != other._bins:
            raise ValueError(f"`bins` should be the same on both sides. Found {self._bins} and {other._bins}.")
        self._rows.merge(other._rows)
        self._positives += other._positives
        self._sums.values += other._sums.values
        if self._histogram is not None and other._histogram is not None:
            self._histogram.values += other._histogram.values

    @property
    def _bins(self) -> int | None:
        return None if self._histogram is None else self._histogram.values.shape[1]

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[dict[str, Array]]:
        """Everything seen, in one or more dictionaries of at most `rows` rows, each for `from_arrays`; merged, they are
        it."""
        histogram = np.zeros((6, 0)) if self._histogram is None else self._histogram.values.copy()
        sums = self._sums.values.copy()
        for piece in self._rows.pieces(rows):
            yield {**piece, "histogram": histogram, "sums": sums}
            histogram, sums = np.zeros_like(histogram), np.zeros_like(sums)

    def arrays(self) -> dict[str, Array]:
        """Everything seen as one dictionary of arrays (in memory: `pieces` where that is too much)."""
        return next(self.pieces(max(1, self._rows.num_rows)))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The accumulator that `arrays()` or `pieces()` was called on; `bins` is read from the arrays."""
        bins = arrays["histogram"].shape[1] or None
        made = cls(memory_limit_bytes=memory_limit_bytes, bins=bins, spill_folder=spill_folder)
        made._keep({name: arrays[name] for name, _ in BINARY_COLUMNS})
        made._sums.values += arrays["sums"]
        if made._histogram is not None:
            made._histogram.values += arrays["histogram"]
        return made

    def compute(self) -> dict[str, float]:
        """The metrics; NaN where one is undefined (a class is missing, no groups were given).

        `auc`, `gauc`, `gauc_coverage`, `log_loss`, `normalized_entropy`, `calibration`, `ece`, `ece_if_calibrated` are
        those of the functions of the same name; `positives` and `rows` are counts without weights; `auc_error_bound`
        with `bins`.
        """
        histogram, sums = self._histogram, self._sums if self._histogram is not None else Sums()
        num_rows = self._rows.num_rows if histogram is None else histogram.num_rows
        error = CalibrationError(num_rows)

        def watched(stream: Iterator[Cells]) -> Iterator[Cells]:
            for cells in stream:
                error.add(cells)
                if histogram is None:
                    sums.add(cells)
                yield cells

        stream = binary_cells(self._rows, "prediction") if histogram is None else histogram.cells()
        pairs = next(count_pairs(watched(stream)), None)  # one group, so one item
        auc = math.nan if pairs is None else float(pairs.auc()[0])
        gauc, covered = mean_auc(count_pairs(binary_cells(self._rows, "group")))
        weight = float(sums.values[0])
        ece, ece_if_calibrated = error.error()
        found: dict[str, float] = {
            "auc": auc,
            "gauc": gauc,
            "gauc_coverage": covered / weight if weight > 0 else math.nan,
            "log_loss": sums.log_loss(),
            "normalized_entropy": sums.normalized_entropy(),
            "calibration": sums.calibration(),
            "ece": ece,
            "ece_if_calibrated": ece_if_calibrated,
            "positives": self._positives if histogram is None else histogram.positives,
            "rows": num_rows,
        }
        if histogram is not None:
            found["auc_error_bound"] = math.nan if pairs is None else float(pairs.tied_share()[0] / 2)
        return found
