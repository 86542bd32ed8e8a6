"""Encoded rows (a window of the reader, say), and a batch cut from several of them.

Shapes: B rows, F dense columns, K sparse keys, S those of them with one value a row.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", bound=np.generic)
Int64s = npt.NDArray[np.int64]
Integers = npt.NDArray[Any]  # int32 where all rows of all tables fit: half of what windows and batches take, and messages
Floats = npt.NDArray[np.float32]
Order = Int64s | slice
"""Which of some rows, and in which order: their numbers, or a range [start, stop) as it lies."""


@dataclass(frozen=True)
class Ids:
    """A feature's part of some rows: `values`, row after row; `lengths_B` (None: one each); `weights` (None: none)."""

    values: Int64s
    lengths_B: Int64s | None
    weights: npt.NDArray[np.float32] | None
    null_rows: int


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch as arrays. Values lie key after key (in the order of the encoder's keys), and row after row within a key.

    `dense_BF` float32; of the unweighted keys `values`, rows of tables (int32 or int64), `lengths_KB` int32, `counts` of values a
    key, `single` whether every row is known to have one value of a key; of the weighted ones `weighted_values`,
    `weighted_lengths_KB`, `weighted_counts` and `weights` (float32, one a value).
    """

    dense_BF: Floats
    values: Integers
    lengths_KB: npt.NDArray[np.int32]
    counts: list[int]
    single: tuple[bool, ...]
    weighted_values: Integers
    weighted_lengths_KB: npt.NDArray[np.int32]
    weighted_counts: list[int]
    weights: Floats

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.dense_BF)


@dataclass(frozen=True, eq=False)
class _Bags:
    """A key with any number of values a row: those of row b, `lengths_B[b]`, are `values[offsets[b] : offsets[b + 1]]`."""

    values: Integers
    weights: Floats | None
    offsets: Int64s
    lengths_B: npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class EncodedIds:
    """The ids of some rows, key by key, so that any range of rows can be cut out.

    Attributes:
        single: of each key, whether it has one value a row; these lie in `rows_SB` (and `weights_SB`) in order, the others
            in `bags`.
    """

    single: tuple[bool, ...]
    rows_SB: Integers
    weights_SB: Floats | None
    bags: tuple[_Bags, ...]

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return _bytes(self.rows_SB, self.weights_SB) + sum(_bytes(*vars(bag).values()) for bag in self.bags)

    def all_as_bags(self) -> "EncodedIds":
        """The same with every key in `bags`."""
        num_rows, bags, of_single, given = self.rows_SB.shape[1], [], 0, iter(self.bags)
        for single in self.single:
            if single:
                weights = None if self.weights_SB is None else self.weights_SB[of_single]
                one_each = np.ones(num_rows, np.int32)
                bags.append(_Bags(self.rows_SB[of_single], weights, np.arange(num_rows + 1), one_each))
                of_single += 1
            else:
                bags.append(next(given))
        weights_SB = None if self.weights_SB is None else self.weights_SB[:0]
        return EncodedIds((False,) * len(self.single), self.rows_SB[:0], weights_SB, tuple(bags))


@dataclass(frozen=True, eq=False)
class EncodedRows:
    """Some rows, encoded. `dense_BF` float32, in any layout; `ids` of the unweighted keys, `weighted` of the others."""

    dense_BF: Floats
    ids: EncodedIds
    weighted: EncodedIds

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.dense_BF)

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return self.dense_BF.nbytes + self.ids.nbytes + self.weighted.nbytes


def _bytes(*arrays: npt.NDArray[Any] | None) -> int:
    return sum(array.nbytes for array in arrays if array is not None)


Part = tuple[EncodedRows, int, int]
"""Rows [start, stop) of encoded ones."""


def encoded_ids(
    keys: Iterable[Ids], num_keys: int, orders: Sequence[Order], *, weighted: bool, dtype: npt.DTypeLike = np.int64
) -> list[EncodedIds]:
    """For each of `orders` these rows of the keys of one group together, as `dtype`.

    Each key is put in order before the next is asked for: what it is made from is then still in the cache.
    """
    rows_KB = [np.empty((num_keys, num_rows(order)), dtype) for order in orders]
    weights_KB = [np.empty(each.shape, np.float32) if weighted else None for each in rows_KB]
    single: list[bool] = []
    bags: list[list[_Bags]] = [[] for _ in orders]
    num_single = 0
    for ids in keys:
        single.append(ids.lengths_B is None)
        if ids.lengths_B is None:
            _put(rows_KB, num_single, ids.values, orders)
            if weighted:
                assert ids.weights is not None
                _put(weights_KB, num_single, ids.weights, orders)
            num_single += 1
        else:
            values, offsets = ids.values.astype(dtype, copy=False), _offsets(ids.lengths_B)
            for ordered, order in zip(bags, orders, strict=True):
                ordered.append(_bags(values, ids.weights, offsets, ids.lengths_B, order))
    kinds = tuple(single)
    return [
        EncodedIds(kinds, rows[:num_single], None if weights is None else weights[:num_single], tuple(each))
        for rows, weights, each in zip(rows_KB, weights_KB, bags, strict=True)
    ]


def num_rows(order: Order) -> int:
    """How many rows there are in it."""
    return order.stop - order.start if isinstance(order, slice) else len(order)


def taken(values: npt.NDArray[T], order: Order) -> npt.NDArray[T]:
    """These rows of an array: itself where they are all as they lie, else a copy, which does not hold the others in memory."""
    if not isinstance(order, slice):
        return values.take(order, axis=0)
    return values if num_rows(order) == len(values) else values[order].copy()


def put(outs: Iterable[npt.NDArray[Any]], values: npt.NDArray[Any], orders: Sequence[Order]) -> None:
    """Writes to each of `outs` the values of these rows, in this order."""
    narrow: npt.NDArray[Any] | None = None
    for out, order in zip(outs, orders, strict=True):
        if isinstance(order, slice):
            out[:] = values[order]
        else:
            if narrow is None:
                narrow = values.astype(out.dtype, copy=False)
            narrow.take(order, out=out, mode="wrap")  # the default mode goes through a buffer


def _put(outs_KB: Iterable[npt.NDArray[Any] | None], key: int, values: npt.NDArray[Any], orders: Sequence[Order]) -> None:
    put((out_KB[key] for out_KB in outs_KB if out_KB is not None), values, orders)


def _bags(values: Integers, weights: Floats | None, offsets: Int64s, lengths_B: Int64s, order: Order) -> _Bags:
    if isinstance(order, slice):
        first, end = offsets[order.start], offsets[order.stop]
        kept = None if weights is None else taken(weights, slice(first, end))
        ordered = offsets[order.start : order.stop + 1] - first
        return _Bags(taken(values, slice(first, end)), kept, ordered, lengths_B[order].astype(np.int32))
    lengths_B = lengths_B.take(order)
    ordered = _offsets(lengths_B)
    # the k-th value kept is the (first of its row + k - first of its row among those kept)-th
    places = np.repeat(offsets.take(order) - ordered[:-1], lengths_B)
    places += np.arange(len(places))
    kept = None if weights is None else weights.take(places, mode="wrap")
    return _Bags(values.take(places, mode="wrap"), kept, ordered, lengths_B.astype(np.int32))


def _offsets(lengths_B: Int64s) -> Int64s:
    offsets = np.zeros(len(lengths_B) + 1, np.int64)
    np.cumsum(lengths_B, out=offsets[1:])
    return offsets


def join(parts: Sequence[Part]) -> Encoded:
    """The batch of these rows, one part after the other (at least one part).

    >>> rows = EncodedIds((True,), np.array([[5, 6, 7]]), None, ())
    >>> none = EncodedIds((), np.zeros((0, 3), np.int64), None, ())
    >>> encoded = EncodedRows(np.zeros((3, 0), np.float32), rows, none)
    >>> join([(encoded, 1, 3), (encoded, 0, 1)]).values.tolist()
    [6, 7, 5]
    """
    ids = _joined([(rows.ids, start, stop) for rows, start, stop in parts])
    weighted = _joined([(rows.weighted, start, stop) for rows, start, stop in parts])
    dense = [rows.dense_BF[start:stop] for rows, start, stop in parts]
    dense_BF = np.empty((sum([len(each) for each in dense]), dense[0].shape[1]), np.float32)
    return Encoded(
        dense_BF=np.concatenate(dense, out=dense_BF),
        values=ids.values,
        lengths_KB=ids.lengths_KB,
        counts=ids.counts,
        single=ids.single,
        weighted_values=weighted.values,
        weighted_lengths_KB=weighted.lengths_KB,
        weighted_counts=weighted.counts,
        weights=weighted.weights,
    )


class _Joined(NamedTuple):
    """What `Encoded` holds of the keys that have no weights, or of those that have."""

    values: Integers
    lengths_KB: npt.NDArray[np.int32]
    counts: list[int]
    single: tuple[bool, ...]
    weights: Floats


def _joined(parts: Sequence[tuple[EncodedIds, int, int]]) -> _Joined:
    """The ids of one group of keys in all parts together."""
    num_rows = sum([stop - start for _, start, stop in parts])
    like = parts[0][0]
    single = like.single
    if not single:
        return _Joined(like.rows_SB.reshape(-1), np.empty((0, num_rows), np.int32), [], single, np.empty(0, np.float32))
    if any(ids.single != single for ids, _, _ in parts):
        single = tuple(all(each) for each in zip(*(ids.single for ids, _, _ in parts), strict=True))
        parts = [(ids.all_as_bags(), start, stop) for ids, start, stop in parts]
        like = parts[0][0]
    weighted = like.weights_SB is not None
    cuts = [[_cut(ids.bags[bag], start, stop) for ids, start, stop in parts] for bag in range(len(like.bags))]
    of_bags = iter([sum([len(values) for values, _, _ in each]) for each in cuts])
    counts = [num_rows if one else next(of_bags) for one in like.single]
    values, lengths_KB = np.empty(sum(counts), like.rows_SB.dtype), np.empty((len(counts), num_rows), np.int32)
    weights = np.empty(len(values) if weighted else 0, np.float32)
    at = 0  # in `values`
    for run in _runs(like.single):
        keys = slice(run.key, run.key + run.count)
        there = slice(at, at + sum(counts[keys]))
        if run.single:
            many, shape = slice(run.first, run.first + run.count), (run.count, num_rows)
            rows_SB = [ids.rows_SB[many, i:j] for ids, i, j in parts]
            np.concatenate(rows_SB, axis=1, out=values[there].reshape(shape), casting="equiv")  # never cut to fewer bits
            lengths_KB[keys] = 1
            if weighted:
                chosen = [ids.weights_SB[many, i:j] for ids, i, j in parts if ids.weights_SB is not None]
                np.concatenate(chosen, axis=1, out=weights[there].reshape(shape))
        else:
            bags = cuts[run.first]
            np.concatenate([each for each, _, _ in bags], out=values[there], casting="equiv")
            np.concatenate([each for _, each, _ in bags], out=lengths_KB[run.key])
            if weighted:
                np.concatenate([each for _, _, each in bags if each is not None], out=weights[there])
        at = there.stop
    return _Joined(values, lengths_KB, counts, single, weights)


def _cut(bags: _Bags, start: int, stop: int) -> tuple[Integers, npt.NDArray[np.int32], Floats | None]:
    """(values, lengths, weights) of rows [start, stop)."""
    first, end = bags.offsets.item(start), bags.offsets.item(stop)
    weights = None if bags.weights is None else bags.weights[first:end]
    return bags.values[first:end], bags.lengths_B[start:stop], weights


@dataclass(frozen=True)
class _Run:
    """Keys that lie side by side in a batch and among the single ones (from `first` on), or one key of `bags`."""

    single: bool
    key: int
    first: int
    count: int


@lru_cache(maxsize=64)
def _runs(single: tuple[bool, ...]) -> tuple[_Run, ...]:
    runs: list[_Run] = []
    singles = bags = 0
    for key, one in enumerate(single):
        if one and runs and runs[-1].single:
            runs[-1] = _Run(True, runs[-1].key, runs[-1].first, runs[-1].count + 1)
        else:
            runs.append(_Run(one, key, singles if one else bags, 1))
        singles, bags = singles + one, bags + (not one)
    return tuple(runs)
