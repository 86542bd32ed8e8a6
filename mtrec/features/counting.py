"""Streaming sums of the fit, each bounded in memory: counts of ids, a sample of numbers, moments.

Shapes: n values of a batch, U distinct keys.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mtrec.features.hashing import mix64

_BUFFER = 1 << 17  # values gathered before they are sorted into the counts


class KeyCounter:
    """How often each key came: exact up to `limit` distinct keys, else lossy counting (Manku and Motwani, 2002).

    When more than `limit` keys are held, the rarest are dropped until at most half of the limit is left. `error` is the
    most that any reported count can be below the truth (0 while nothing was dropped); no count is ever too high, and
    every key that came more than `error` times is held. Deviation from the paper: its bucket width follows from a
    wanted error, here the error follows from the wanted memory (16 to 24 bytes a key, for strings plus their bytes).

    >>> counter = KeyCounter(text=False, limit=100)
    >>> counter.update(np.array([7, 7, -1]))
    >>> [part.tolist() for part in counter.result()]
    [[-1, 7], [1, 2]]
    """

    def __init__(self, *, text: bool, limit: int) -> None:
        self.error = 0
        self._text = text
        self._limit = limit
        self._keys: Any = pa.array([], pa.large_binary()) if text else np.zeros(0, np.int64)
        self._counts_U = np.zeros(0, np.int64)
        self._missed_U = np.zeros(0, np.int64)  # how often a key may have come before it was (again) held
        self._pending: list[tuple[Any, npt.NDArray[np.int64] | None]] = []
        self._num_pending = 0
        self._ascending = True

    def update(self, keys_n: Any, counts_n: npt.NDArray[np.int64] | None = None) -> None:
        """Adds keys (int64 array, or large_binary array without nulls), each once or `counts_n` times."""
        if not len(keys_n):
            return
        if self._text and counts_n is None:
            seen = pc.value_counts(keys_n)
            keys_n, counts_n = seen.field(0), seen.field(1).to_numpy()
        elif not self._text:
            keys_n = np.array(keys_n)  # a copy: the batch's memory is not kept
        self._pending.append((keys_n, counts_n))
        self._num_pending += len(keys_n)
        if self._num_pending >= max(_BUFFER, len(self._counts_U)):
            self._merge()

    def result(self) -> tuple[Any, npt.NDArray[np.int64]]:
        """(keys, counts_U): ascending keys."""
        self._merge()
        if not self._ascending:
            order = pc.array_sort_indices(self._keys).to_numpy()
            self._keys, self._ascending = self._keys.take(pa.array(order)), True
            self._counts_U, self._missed_U = self._counts_U[order], self._missed_U[order]
        return self._keys, self._counts_U

    def _merge(self) -> None:
        if not self._pending:
            return
        if self._text:
            self._merge_texts()
        else:
            self._merge_integers()
        self._pending, self._num_pending = [], 0
        if len(self._counts_U) > self._limit:
            self._drop()

    def _merge_integers(self) -> None:
        plain = [keys for keys, counts in self._pending if counts is None]
        parts = [(keys, counts) for keys, counts in self._pending if counts is not None]
        if plain:
            keys, counts = np.unique(np.concatenate(plain), return_counts=True)
            parts.append((keys, counts))
        keys = np.concatenate([self._keys, *(keys for keys, _ in parts)])
        counts = np.concatenate([self._counts_U, *(counts for _, counts in parts)])
        missed = np.full(len(keys), self.error, np.int64)
        missed[: len(self._missed_U)] = self._missed_U
        order = np.argsort(keys, kind="stable")  # held keys come first among equals, and keep what they may have missed
        keys = keys[order]
        first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        self._keys = keys[first]
        self._counts_U = np.add.reduceat(counts[order], first)
        self._missed_U = missed[order][first]

    def _merge_texts(self) -> None:
        counts = [counts for _, counts in self._pending if counts is not None]
        every = np.concatenate([self._counts_U, *counts])
        self._keys, self._counts_U = _summed([self._keys, *(keys for keys, _ in self._pending)], every)
        missed = np.full(len(self._keys), self.error, np.int64)
        missed[: len(self._missed_U)] = self._missed_U
        self._missed_U, self._ascending = missed, False

    def _drop(self) -> None:
        bound_U = self._counts_U + self._missed_U  # no key came more often than this
        keep = self._limit // 2
        self.error = max(self.error, int(np.partition(bound_U, len(bound_U) - keep - 1)[len(bound_U) - keep - 1]))
        held = np.flatnonzero(bound_U > self.error)
        self._keys = self._keys.take(pa.array(held)) if self._text else self._keys[held]
        self._counts_U, self._missed_U = self._counts_U[held], self._missed_U[held]


def _summed(keys: Sequence[Any], counts_n: npt.NDArray[np.int64]) -> tuple[Any, npt.NDArray[np.int64]]:
    """(distinct keys, the sum of the counts of each) of arrays of strings; in the order in which the keys come first.

    >>> keys, counts_U = _summed([pa.array(["b"]), pa.array(["a", "b"])], np.array([1, 1, 5]))
    >>> keys.to_pylist(), counts_U.tolist()
    (['b', 'a'], [6, 1])
    """
    encoded = pa.concat_arrays(keys).dictionary_encode()  # several times as fast as Arrow's group_by
    sums_U = np.bincount(encoded.indices, counts_n, len(encoded.dictionary))  # in float64, exact below 2^53
    return encoded.dictionary, sums_U.astype(np.int64)


class Sample:
    """A uniform sample of at most `size` numbers of a stream: all of them while they are no more than that.

    The kept ones are those whose hashed position in the stream is smallest (bottom-k sampling; Cohen and Kaplan, 2007),
    so the sample does not depend on how the stream is cut into batches. A quantile of 65,536 numbers has a standard
    error of at most 0.2 points of rank. With `width` W, a stream of rows of W numbers.

    >>> sample = Sample()
    >>> sample.update(np.array([3.0, 1.0]), 0)
    >>> sample.values().tolist()
    [1.0, 3.0]
    """

    def __init__(self, size: int = 1 << 16, width: int | None = None) -> None:
        self._size = size
        self._values = np.zeros(0 if width is None else (0, width))
        self._priorities = np.zeros(0, np.uint64)
        self._bar = np.uint64(2**64 - 1)

    def update(self, values_n: npt.NDArray[np.float64], start: int) -> None:
        """Adds numbers (or rows) that stand at `start`, `start` + 1, ... of the stream."""
        priority_n = mix64(np.arange(start, start + len(values_n), dtype=np.int64))
        below = np.flatnonzero(priority_n <= self._bar)
        if not len(below):
            return
        self._values = np.concatenate([self._values, values_n[below]])
        self._priorities = np.concatenate([self._priorities, priority_n[below]])
        if len(self._values) > 2 * self._size:
            self._shrink()

    def values(self) -> npt.NDArray[np.float64]:
        """The sample, ascending (each column of rows for itself)."""
        if len(self._values) > self._size:
            self._shrink()
        return np.sort(self._values, axis=0)

    def _shrink(self) -> None:
        kept = np.argpartition(self._priorities, self._size - 1)[: self._size]
        self._values, self._priorities = self._values[kept], self._priorities[kept]
        self._bar = self._priorities.max()


class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of W streams (Chan, Golub and LeVeque, 1983); each (W,).

    >>> moments = Moments(1)
    >>> moments.update(np.array([[1.0], [2.0]])); moments.update(np.array([[6.0]]))
    >>> moments.mean_W.tolist(), moments.sd_W.round(3).tolist(), moments.low_W.tolist(), moments.high_W.tolist()
    ([3.0], [2.16], [1.0], [6.0])
    """

    def __init__(self, width: int) -> None:
        self.count_W = np.zeros(width, np.int64)
        self.mean_W, self.squares_W = np.zeros(width), np.zeros(width)
        self.low_W, self.high_W = np.full(width, np.inf), np.full(width, -np.inf)

    @property
    def sd_W(self) -> npt.NDArray[np.float64]:
        """Standard deviations (divided by the count); 0 of no numbers."""
        return np.sqrt(self.squares_W / np.maximum(self.count_W, 1))

    def update(self, values_BW: npt.NDArray[np.float64], known_BW: npt.NDArray[np.bool_] | None = None) -> None:
        """Adds finite numbers, of which those count that are known. Of some beyond 1e154 squares, or means, may be none."""
        if not len(values_BW):
            return
        values_WB, known_WB = values_BW.T, None if known_BW is None else known_BW.T
        where: Any = True if known_WB is None else known_WB
        columns = np.arange(len(values_WB))
        if known_WB is None:
            count_W, one_W = np.full(len(columns), len(values_BW)), values_BW[0]
        else:
            count_W, one_W = np.count_nonzero(known_WB, axis=1), values_WB[columns, known_WB.argmax(axis=1)]
        total_W = self.count_W + count_W
        share_W = count_W / np.maximum(total_W, 1)
        with np.errstate(over="ignore", invalid="ignore"):
            # of a constant column all deviations are 0, and so its mean is exact, however they are added up
            deviations_WB = values_WB - one_W[:, None]
            mean_W = one_W + deviations_WB.sum(axis=1, where=where) / np.maximum(count_W, 1)
            squares_W = np.square(values_WB - mean_W[:, None]).sum(axis=1, where=where)
            delta_W = np.where(count_W > 0, mean_W - self.mean_W, 0.0)
            squares_W += np.where(self.count_W > 0, delta_W * delta_W * self.count_W * share_W, 0.0)
            self.squares_W = self.squares_W + np.where(count_W > 0, squares_W, 0.0)
            self.mean_W = self.mean_W + delta_W * share_W
        self.count_W = total_W
        self.low_W = np.minimum(self.low_W, values_WB.min(axis=1, where=where, initial=np.inf))
        self.high_W = np.maximum(self.high_W, values_WB.max(axis=1, where=where, initial=-np.inf))
