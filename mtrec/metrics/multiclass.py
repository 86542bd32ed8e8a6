"""Metrics of a multiclass task, collected over batches and ranks.

Legend: N rows of an update, C classes.
"""

import math
import os
from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import numpy.typing as npt

from mtrec.metrics.groups import NULL_GROUP
from mtrec.metrics.probability import CLIP
from mtrec.metrics.ranking import BINARY_COLUMNS, BY_PREDICTION, binary_cells, count_pairs, mean_auc
from mtrec.metrics.rows import MEMORY_LIMIT_BYTES, PIECE_ROWS, Array, Ints, SortedRows, require


class MulticlassMetrics:
    """Accuracy, log loss and macro AUC (mean over the classes that occur of one class against the rest, unweighted).

    The AUC is exact and keeps C rows of 25 bytes for each row; `memory_limit_bytes` is shared among the classes.

    >>> metrics = MulticlassMetrics(3)
    >>> metrics.update(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.3, 0.4, 0.3]]), np.array([0, 2, 0]))
    >>> found = metrics.compute()
    >>> round(found["accuracy"], 4), round(found["log_loss"], 4), found["auc"], found["rows"]
    (0.6667, 0.6905, 1.0, 3)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"`num_classes` should be at least 2. Found {num_classes}.")
        self._rows_C = [
            SortedRows(
                BINARY_COLUMNS,
                {"prediction": BY_PREDICTION},
                memory_limit_bytes=max(1, memory_limit_bytes // num_classes),
                spill_folder=spill_folder,
            )
            for _ in range(num_classes)
        ]
        self._sums = np.zeros(3)  # of w, w right, w loss

    def update(
        self, probability_NC: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None
    ) -> None:
        """Add N rows: probabilities, labels 0 to C - 1 (NaN: unobserved, not counted), weights >= 0.

        A tie of probabilities is decided for the lowest class. Log loss as in `log_loss`, of the label's probability,
        which is not normalised. Raises ValueError naming the row of a value outside its range.
        """
        probability_NC = np.asarray(probability_NC, np.float64)
        label_N = np.asarray(label_N, np.float64)
        weight_N = np.ones(label_N.shape) if weight_N is None else np.asarray(weight_N, np.float64)
        classes = len(self._rows_C)
        if probability_NC.shape != (*label_N.shape, classes) or label_N.ndim != 1 or weight_N.shape != label_N.shape:
            raise ValueError(
                f"`probability`, `label` and `weight` should have shapes (N, {classes}), (N,) and (N,). "
                f"Found {probability_NC.shape}, {label_N.shape} and {weight_N.shape}."
            )
        keep_N = ~np.isnan(label_N)
        wish = f"a whole number from 0 to {classes - 1}, or NaN where unobserved"
        require(~keep_N | np.isin(label_N, np.arange(classes)), "label", wish, label_N)
        require(np.isfinite(weight_N) & (weight_N >= 0), "weight", "finite and not negative", weight_N)
        good_N = ((probability_NC >= 0) & (probability_NC <= 1)).all(axis=1)
        require(~keep_N | good_N, "probability", "in [0, 1]", probability_NC)
        self._keep(probability_NC[keep_N], label_N[keep_N].astype(np.int64), weight_N[keep_N])

    def _keep(self, probability_NC: Array, label_N: Ints, weight_N: Array) -> None:
        own_N = np.clip(np.take_along_axis(probability_NC, label_N[:, None], axis=1)[:, 0], CLIP, 1 - CLIP)
        right_N = probability_NC.argmax(axis=1) == label_N
        self._sums += [np.sum(weight_N), np.sum(weight_N[right_N]), -np.dot(weight_N, np.log(own_N))]
        group_N = np.full(len(label_N), NULL_GROUP)
        for number, rows in enumerate(self._rows_C):
            columns = {"group": group_N, "prediction": probability_NC[:, number], "weight": weight_N}
            rows.append({**columns, "label": (label_N == number).astype(np.uint8)})

    def merge(self, other: Self) -> None:
        """Add what the other has seen; it stays as it is. Raises ValueError where the numbers of classes differ."""
        if len(self._rows_C) != len(other._rows_C):
            raise ValueError(
                f"`num_classes` should be the same on both sides. Found {len(self._rows_C)} and {len(other._rows_C)}."
            )
        for mine, theirs in zip(self._rows_C, other._rows_C, strict=True):
            mine.merge(theirs)
        self._sums += other._sums

    def pieces(self, rows: int = PIECE_ROWS) -> Iterator[dict[str, Array]]:
        """Everything seen, in one or more dictionaries of at most `rows` rows, each for `from_arrays`; merged, they are
        it."""
        sums = self._sums.copy()
        streams = zip(*(store.pieces(rows) for store in self._rows_C), strict=True)
        for number_pieces in streams:
            yield {
                "prediction": np.concatenate([piece["prediction"] for piece in number_pieces]),
                "label": np.concatenate([piece["label"] for piece in number_pieces]),
                "weight": np.concatenate([piece["weight"] for piece in number_pieces]),
                "sums": sums,
                "num_classes": np.array(len(self._rows_C)),
            }
            sums = np.zeros_like(sums)

    def arrays(self) -> dict[str, Array]:
        """Everything seen as one dictionary of arrays (in memory: `pieces` where that is too much)."""
        return next(self.pieces(max(1, self._rows_C[0].num_rows)))

    @classmethod
    def from_arrays(
        cls,
        arrays: Mapping[str, Array],
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> Self:
        """The accumulator that `arrays()` or `pieces()` was called on."""
        classes = int(arrays["num_classes"])
        made = cls(classes, memory_limit_bytes=memory_limit_bytes, spill_folder=spill_folder)
        for number, rows in enumerate(made._rows_C):
            columns = {name: np.split(arrays[name], classes)[number] for name in ("prediction", "label", "weight")}
            rows.append({**columns, "group": np.full(len(columns["label"]), NULL_GROUP)})
        made._sums += arrays["sums"]
        return made

    def compute(self) -> dict[str, float]:
        """`accuracy`, `log_loss` (nats), `auc` and `rows`; NaN where one is undefined."""
        weight, right, loss = self._sums.tolist()
        areas = [mean_auc(count_pairs(binary_cells(rows, "prediction")))[0] for rows in self._rows_C]
        known = [area for area in areas if not math.isnan(area)]
        return {
            "accuracy": right / weight if weight > 0 else math.nan,
            "log_loss": loss / weight if weight > 0 else math.nan,
            "auc": sum(known) / len(known) if known else math.nan,
            "rows": self._rows_C[0].num_rows,
        }
