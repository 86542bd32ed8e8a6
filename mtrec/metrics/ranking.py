"""How well predictions order the rows: AUC within and over groups for binary labels, XAUC for numbers.

Legend: N rows, M cells (rows with equal group and prediction, added up), G groups, W rows of a block. Pairs are counted
exactly, with ties, and never more than a chunk of rows at a time: counts of neighbouring chunks merge.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mtrec.metrics.groups import NULL_GROUP
from mtrec.metrics.rows import EVERYTHING, Array, Floats, Ints, Order, Run, SortedRows, observed_rows, require

BINARY_COLUMNS = [("group", "i8"), ("prediction", "f8"), ("weight", "f8"), ("label", "u1")]
BY_PREDICTION = Order(("prediction",))
BY_GROUP = Order(("group", "prediction"), skip=("group", NULL_GROUP))
NUMBER_COLUMNS = [("prediction", "f8"), ("label", "f8"), ("weight", "f8")]
BY_PREDICTION_AND_LABEL = Order(("prediction", "label"))


class Cells(NamedTuple):
    """Rows with equal (outer, inner) key added up, in ascending order of the keys; all fields are (M,)."""

    outer: Array  # the group; one constant where there are none
    inner: Array  # the prediction
    positive: Array  # sum of w y
    negative: Array  # sum of w (1 - y)
    square: Array  # sum of w^2
    rows: Array


class Pairs(NamedTuple):
    """Pairs of a positive and a negative row of a group, each counted by the product of their weights; all fields
    (G,)."""

    outer: Array
    ordered: Array  # the positive row has the greater prediction
    tied: Array  # equal predictions
    positive: Array
    negative: Array
    weight: Array

    def auc(self) -> Array:
        """(G,) AUC of each group, NaN where it lacks a class."""
        with np.errstate(invalid="ignore"):
            return np.asarray((self.ordered + self.tied / 2) / (self.positive * self.negative))

    def tied_share(self) -> Array:
        """(G,) share of the pairs that are tied, NaN where there is none."""
        with np.errstate(invalid="ignore"):
            return np.asarray(self.tied / (self.positive * self.negative))


def row_cells(prediction_N: Floats, label_N: Array, weight_N: Floats, outer_N: Array | None = None) -> Cells:
    """Every row as a cell of its own."""
    outer = np.zeros(len(prediction_N), np.int64) if outer_N is None else outer_N
    positive = weight_N * label_N
    return Cells(outer, prediction_N, positive, weight_N - positive, weight_N**2, np.ones(len(prediction_N), np.int64))


def add_equal(stream: Iterable[Cells]) -> Iterator[Cells]:
    """Add up neighbours with equal keys in a stream that is sorted by (outer, inner). No output is empty."""
    held: Cells | None = None  # the last cell may go on in the next chunk
    for cells in stream:
        if held is not None:
            cells = _joined(held, cells)
        if len(cells.inner) == 0:
            continue
        starts = _starts((cells.outer[1:] != cells.outer[:-1]) | (cells.inner[1:] != cells.inner[:-1]))
        if len(starts) < len(cells.inner):
            cells = Cells(
                cells.outer[starts], cells.inner[starts], *(np.add.reduceat(field, starts) for field in cells[2:])
            )
        held = Cells(*(field[-1:] for field in cells))
        if len(starts) > 1:
            yield Cells(*(field[:-1] for field in cells))
    if held is not None:
        yield held


def count_pairs(stream: Iterable[Cells]) -> Iterator[Pairs]:
    """The pairs of each group from cells sorted by (outer, inner), each key once.

    A group may stretch over chunks: what follows has greater predictions, so that all its positives are ordered above
    the negatives before (Pairs of neighbouring ranges form a monoid).
    """
    held: Pairs | None = None
    for cells in stream:
        starts = _starts(cells.outer[1:] != cells.outer[:-1])
        below = np.cumsum(cells.negative) - cells.negative
        below -= np.repeat(below[starts], np.diff(np.append(starts, len(below))))
        positive, negative = np.add.reduceat(cells.positive, starts), np.add.reduceat(cells.negative, starts)
        pairs = Pairs(
            cells.outer[starts],
            np.add.reduceat(cells.positive * below, starts),
            np.add.reduceat(cells.positive * cells.negative, starts),
            positive,
            negative,
            positive + negative,
        )
        if held is not None and held.outer[0] == pairs.outer[0]:
            pairs.ordered[0] += held.ordered[0] + held.negative[0] * pairs.positive[0]
            for mine, before in zip(pairs[2:], held[2:], strict=True):
                mine[0] += before[0]
        elif held is not None:
            yield held
        held = Pairs(*(field[-1:] for field in pairs))
        if len(starts) > 1:
            yield Pairs(*(field[:-1] for field in pairs))
    if held is not None:
        yield held


def binary_cells(rows: SortedRows, order: str) -> Iterator[Cells]:
    """Cells of `BINARY_COLUMNS` rows, by prediction or by group and prediction (`order`)."""
    grouped = order == "group"
    return add_equal(
        row_cells(
            np.ascontiguousarray(chunk["prediction"]),
            chunk["label"],
            np.ascontiguousarray(chunk["weight"]),
            np.ascontiguousarray(chunk["group"]) if grouped else None,
        )
        for chunk in rows.chunks(order)
    )


def mean_auc(pairs: Iterable[Pairs]) -> tuple[float, float]:
    """The weighted mean AUC of the groups that have both classes, and the sum of their weights."""
    total = covered = 0.0
    for some in pairs:
        both = (some.positive > 0) & (some.negative > 0)
        total += float(np.sum(some.auc()[both] * some.weight[both]))
        covered += float(np.sum(some.weight[both]))
    return (total / covered if covered > 0 else float("nan")), covered


def binary_rows(
    prediction_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    group_N: npt.ArrayLike | None,
    weight_N: npt.ArrayLike | None,
    prediction_range: tuple[float, float] = EVERYTHING,
) -> dict[str, Array]:
    """The observed rows as columns for a `BINARY_COLUMNS` store. ValueError for labels other than 0, 1, NaN."""
    label_N = np.asarray(label_N, np.float64)
    require((label_N == 0) | (label_N == 1) | np.isnan(label_N), "label", "0, 1 or NaN (unobserved)", label_N)
    keep_N, prediction_N, label_N, weight_N = observed_rows(
        prediction_N, label_N, weight_N, prediction_range=prediction_range
    )
    group_N = np.full(len(keep_N), NULL_GROUP) if group_N is None else np.asarray(group_N)
    if group_N.dtype != np.int64 or group_N.shape != keep_N.shape:
        raise ValueError(
            "`group` should be int64 with one key for each row (see group_keys). "
            f"Found {group_N.dtype} of shape {group_N.shape}."
        )
    return {"group": group_N[keep_N], "prediction": prediction_N, "weight": weight_N, "label": label_N.astype(np.uint8)}


def _in_memory(columns: dict[str, Array], names: list[tuple[str, str]], orders: dict[str, Order]) -> SortedRows:
    rows = SortedRows(names, orders, memory_limit_bytes=2**62)
    rows.append(columns)
    return rows


def auc(prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in which the positive has the greater
    prediction.

    Ties count one half; a pair counts by the product of its weights; rows with a NaN label are left out; NaN where a
    class is missing. Predictions may be any finite numbers.

    >>> auc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    0.875
    """
    rows = _in_memory(
        binary_rows(prediction_N, label_N, None, weight_N), BINARY_COLUMNS, {"prediction": BY_PREDICTION}
    )
    return mean_auc(count_pairs(binary_cells(rows, "prediction")))[0]


def gauc(
    prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, group_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None
) -> tuple[float, float]:
    """(mean AUC within groups, share of the rows in groups that count); Zhu et al., 2017 (Optimized Cost per Click).

    A group counts if it has both classes, by its number of rows (impressions); with weights, by their sum, and the
    share is a share of weight. `group_N` is int64 (see `group_keys`); rows of `NULL_GROUP` belong to none. NaN where no
    group counts.

    >>> gauc([0.1, 0.4, 0.6, 0.3, 0.9], [0, 1, 1, 0, 1], np.array([1, 1, 2, 2, 3]))
    (1.0, 0.8)
    """
    columns = binary_rows(prediction_N, label_N, group_N, weight_N)
    rows = _in_memory(columns, BINARY_COLUMNS, {"group": BY_GROUP})
    mean, covered = mean_auc(count_pairs(binary_cells(rows, "group")))
    total = float(np.sum(columns["weight"]))
    return mean, covered / total if total > 0 else float("nan")


def xauc(prediction_N: npt.ArrayLike, label_N: npt.ArrayLike, weight_N: npt.ArrayLike | None = None) -> float:
    """Share of the pairs with different labels that the predictions order as the labels do; ties in prediction count
    1/2.

    Zhan et al., 2022 (Deconfounding Duration Bias in Watch-time Prediction), exactly over all pairs where the paper
    samples them; the same as (Somers' D + 1) / 2. A pair counts by the product of its weights. O(N log N). NaN without
    such a pair.

    >>> xauc([1.0, 2.0, 2.0, 5.0], [0.0, 3.0, 9.0, 4.0])
    0.75
    """
    _, prediction_N, label_N, weight_N = observed_rows(prediction_N, label_N, weight_N)
    columns = {"prediction": prediction_N, "label": label_N, "weight": weight_N}
    return concordance(_in_memory(columns, NUMBER_COLUMNS, {"prediction": BY_PREDICTION_AND_LABEL}))


def concordance(rows: SortedRows) -> float:
    """XAUC of `NUMBER_COLUMNS` rows, within the store's memory limit.

    In the order (prediction, label), each pair tied in prediction stands as if ordered rightly, so
    concordant + tied / 2 = (pairs whose later row has the greater label) - tied / 2.
    """
    counter = _BlockCounter(rows)
    block_rows = max(1, min(rows.memory_limit_bytes // 128, rows.num_rows))  # some 100 bytes of work arrays a row
    tied = 0.0
    for some in count_pairs(add_equal(counter.counting(rows.chunks("prediction", block_rows)))):
        tied += float(np.sum(some.ordered))
    return (counter.ascending - tied / 2) / counter.comparable if counter.comparable > 0 else float("nan")


class _BlockCounter:
    """Counts pairs of rows in blocks that arrive in ascending order of (prediction, label).

    Pairs within a block are counted by `ascending_pairs`, pairs of blocks by binary search of one sorted block in
    another: O(N log N) in one block; with B blocks (spilled rows) N B / 2 searches, which are fast since the needles
    are sorted.
    """

    def __init__(self, rows: SortedRows) -> None:
        self.ascending = 0.0  # the later row has the greater label
        self.comparable = 0.0  # different labels
        self._rows = rows
        self._earlier: list[Run] = []

    def counting(self, blocks: Iterable[Array]) -> Iterator[Cells]:
        """Pass the blocks on, as cells by prediction and label, whose `ordered` pairs are the tied ones."""
        for block in blocks:
            prediction_W, label_W, weight_W = (np.ascontiguousarray(block[name]) for name, _ in NUMBER_COLUMNS)
            self.ascending += ascending_pairs(label_W, None if np.all(weight_W == 1) else weight_W)
            order = np.argsort(label_W)
            before = np.concatenate([[0.0], np.cumsum(weight_W[order])])  # weight of the rows before each place
            mine = np.stack([np.append(label_W[order], np.inf), before])  # (2, W + 1)
            self.comparable += _below(mine, mine)
            for stored in self._earlier:
                other = stored[:].reshape(2, -1)
                ascending = _below(other, mine)
                self.ascending += ascending
                self.comparable += ascending + _below(mine, other)
            flat = mine.ravel()
            on_disk = self._rows.num_runs > 0
            self._earlier.append(self._rows.write_temporary(iter([flat]), np.float64, flat.size) if on_disk else flat)
            yield Cells(prediction_W, label_W, weight_W, weight_W, weight_W, np.ones(len(block), np.int64))


def _below(left: Array, right: Array) -> float:
    """Sum of w_i w_j over the pairs (i of left, j of right) with label_i < label_j; arrays as in `_BlockCounter`."""
    places = np.searchsorted(left[0, :-1], right[0, :-1], "left")
    return float(np.dot(left[1][places], np.diff(right[1])))


def ascending_pairs(label_N: Floats, weight_N: Floats | None = None) -> float:
    """Sum of w_i w_j over the places i < j with label_i < label_j, in O(N log N) without a Python loop over rows.

    The merge sort's count turned round: rows are laid out by label and parted by the bits of their place, the highest
    first. Parting block by block, a row of the right half (bit set) has as partners the rows of the left half before
    it. Equal labels are laid out with the later place first and so never count; blocks are full, since N is padded to
    2^n.

    >>> ascending_pairs(np.array([2.0, 1.0, 3.0, 3.0]))
    4.0
    """
    count = len(label_N)
    bits = max(1, (count - 1).bit_length())
    size = 1 << bits
    places = count - 1 - np.argsort(label_N[::-1], kind="stable")
    places = np.concatenate([np.arange(size - 1, count - 1, -1), places]).astype(np.int32 if bits < 31 else np.int64)
    weights = None if weight_N is None else np.concatenate([weight_N, np.zeros(size - count)])[places]
    total = 0.0
    for bit in reversed(range(bits)):
        half, blocks = 1 << bit, size >> (bit + 1)
        right = (places & half) != 0
        left = ~right
        if weights is None:
            # sum over right rows of (index in the block - right rows before it); the latter are 0, 1, ..., half - 1
            indices = int(np.sum(np.flatnonzero(right))) - 2 * half * half * (blocks * (blocks - 1) // 2)
            total += indices - blocks * (half * (half - 1) // 2)
        else:
            lefts = np.cumsum(np.where(left, weights, 0.0).reshape(blocks, 2 * half), axis=1).ravel()
            total += float(np.dot(lefts[right], weights[right]))
            weights = _parted(weights, left, right, half)
        places = _parted(places, left, right, half)
    return total


def _parted(values: Array, left: npt.NDArray[np.bool_], right: npt.NDArray[np.bool_], half: int) -> Array:
    return np.concatenate([values[left].reshape(-1, half), values[right].reshape(-1, half)], axis=1).ravel()


def _starts(changes: npt.NDArray[np.bool_]) -> Ints:
    """Where runs of equal values start, given where neighbours differ."""
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(changes) + 1])


def _joined(first: Cells, second: Cells) -> Cells:
    return Cells(*(np.concatenate(pair) for pair in zip(first, second, strict=True)))
