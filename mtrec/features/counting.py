"""Streaming sums of the fit, each bounded in memory: counts of ids, a sample of numbers, moments.

Shapes: n values of a batch, U distinct keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
    error of at most 0.2 points of rank.

    >>> sample = Sample()
    >>> sample.update(np.array([3.0, 1.0]), 0)
    >>> sample.values().tolist()
    [1.0, 3.0]
    """

    def __init__(self, size: int = 1 << 16) -> None:
        self._size = size
        self._values = np.zeros(0)
        self._priorities = np.zeros(0, np.uint64)
        self._bar = np.uint64(2**64 - 1)

    def update(self, values_n: npt.NDArray[np.float64], start: int) -> None:
        """Adds numbers that stand at `start`, `start` + 1, ... of the stream."""
        priority_n = mix64(np.arange(start, start + len(values_n), dtype=np.int64))
        below = priority_n <= self._bar
        self._values = np.concatenate([self._values, values_n[below]])
        self._priorities = np.concatenate([self._priorities, priority_n[below]])
        if len(self._values) > 2 * self._size:
            self._shrink()

    def values(self) -> npt.NDArray[np.float64]:
        """The sample, ascending."""
        if len(self._values) > self._size:
            self._shrink()
        return np.sort(self._values)

    def _shrink(self) -> None:
        kept = np.argpartition(self._priorities, self._size - 1)[: self._size]
        self._values, self._priorities = self._values[kept], self._priorities[kept]
        self._bar = self._priorities.max()


@dataclass
class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of a stream (Chan, Golub and LeVeque, 1983).

    >>> moments = Moments()
    >>> moments.update(np.array([1.0, 2.0])); moments.update(np.array([6.0]))
    >>> moments.mean, round(moments.sd, 3), moments.low, moments.high
    (3.0, 2.16, 1.0, 6.0)
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    low: float = np.inf
    high: float = -np.inf

    @property
    def sd(self) -> float:
        """Standard deviation (divided by the count); 0 of no numbers."""
        return float(np.sqrt(self.squares / self.count)) if self.count else 0.0

    def update(self, values_n: npt.NDArray[np.float64]) -> None:
        """Adds finite numbers. Of numbers beyond 1e154 `squares`, or `mean`, may be no finite number."""
        count = len(values_n)
        if not count:
            return
        with np.errstate(over="ignore", invalid="ignore"):
            mean = float(values_n.mean())
            squares = float(np.square(values_n - mean).sum())
        delta, total = mean - self.mean, self.count + count
        self.squares += squares + (delta * delta * self.count * count / total if self.count else 0.0)
        self.mean += delta * count / total
        self.count = total
        self.low = min(self.low, float(values_n.min()))
        self.high = max(self.high, float(values_n.max()))
