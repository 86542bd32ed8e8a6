"""Drawing many values at once: hashes, Zipf ranks, look-up tables, and rows by chunks.

Dimensions: N draws, R rows of a table of probabilities, C outcomes.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
HashArray = NDArray[np.uint64]

CHUNK_ROWS = 65_536  # rows drawn at a time, from a generator keyed by (seed, chunk)
LOOKUP_BITS = 12  # of a hash, that a draw by look-up uses


def mix(values: HashArray) -> HashArray:
    """Hash 64-bit integers one to one (SplitMix64: Steele, Lea, Flood 2014); any shape.

    >>> int(mix(np.array([0], dtype=np.uint64))[0])
    16294208416658607535
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def uniform(hashes: HashArray) -> FloatArray:
    """Numbers in [0, 1) from 64-bit hashes; any shape."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def zipf(count: int, exponent: float) -> FloatArray:
    """Probabilities (count,) of the ranks 1 to count, proportional to rank ** -exponent.

    >>> zipf(3, 1.0).round(3).tolist()
    [0.545, 0.273, 0.182]
    """
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return np.asarray(weights / weights.sum())


def draw(cumulative_C: FloatArray, uniform_N: FloatArray) -> IntArray:
    """Outcomes (N,) of the distribution with these cumulative probabilities.

    >>> draw(np.array([0.5, 1.0]), np.array([0.1, 0.5, 0.9])).tolist()
    [0, 1, 1]
    """
    # Rounding may leave the last cumulative probability just below 1.
    return np.minimum(np.searchsorted(cumulative_C, uniform_N, side="right"), len(cumulative_C) - 1)


def lookup(probabilities_RC: FloatArray) -> NDArray[np.int32]:
    """A table (R, 2 ** LOOKUP_BITS) of outcomes for each row: a draw is one gather instead of a search.

    >>> lookup(np.array([[1.0, 3.0]]))[0, [0, 1023, 1024, 4095]].tolist()
    [0, 0, 1, 1]
    """
    middles = (np.arange(1 << LOOKUP_BITS) + 0.5) / (1 << LOOKUP_BITS)
    cumulative_RC = np.cumsum(probabilities_RC, axis=1)
    cumulative_RC /= cumulative_RC[:, -1:]
    return np.stack([draw(row, middles) for row in cumulative_RC]).astype(np.int32)


def sigmoid(logit: FloatArray) -> FloatArray:
    """1 / (1 + exp(-logit)) without overflow; any shape."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logit)))


def solve_bias(logit_N: FloatArray, rate: float, weight_N: FloatArray | None = None) -> float:
    """The constant that, added to the logits, makes the (weighted) mean probability equal `rate`: by bisection.

    >>> round(solve_bias(np.array([-1.0, 1.0]), 0.5), 6) + 0.0
    0.0
    """
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        if np.average(sigmoid(logit_N + middle), weights=weight_N) < rate:
            low = middle
        else:
            high = middle
    return 0.5 * (low + high)


class Chunks:
    """Rows of an endless table that is drawn chunk by chunk: row i is the same however the table is cut."""

    def __init__(self, make: Callable[[int], pa.Table]):
        self._make = make
        self._last: tuple[int, pa.Table] | None = None

    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop` (excluded). Raises ValueError where there are none."""
        if not 0 <= start < stop:
            raise ValueError(f"`start` should be at least 0 and below `stop`. Found {start} and {stop}.")
        pieces = []
        for chunk in range(start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)):
            # Consecutive calls mostly cut the same chunk: the last one is kept.
            if self._last is None or self._last[0] != chunk:
                self._last = chunk, self._make(chunk)
            first = chunk * CHUNK_ROWS
            low, high = max(start, first), min(stop, first + CHUNK_ROWS)
            pieces.append(self._last[1].slice(low - first, high - low))
        return pa.concat_tables(pieces)
