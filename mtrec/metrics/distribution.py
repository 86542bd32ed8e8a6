"""Distributions of numbers in little, mergeable memory, and how far one has drifted from another.

Legend: N values given, S buckets in use.
"""

import math
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mtrec.metrics.rows import Array, Floats, Ints, require

RELATIVE_ERROR = 0.01  # of a quantile
SMALLEST = 1e-12  # what lies nearer to 0 counts as 0
SHARE_FLOOR = 1e-4  # of an empty bin in the population stability index

_LOG_GAMMA = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_OFFSET = 1 - math.ceil(math.log(SMALLEST) / _LOG_GAMMA)  # makes the bucket of SMALLEST number 1


class Moments:
    """Weighted mean and sum of squared deviations, merged by Chan, Golub and LeVeque (1979): no cancellation.

    >>> moments = Moments()
    >>> moments.add(np.array([1e9 + 1, 1e9 + 3]), np.ones(2))
    >>> moments.values.tolist()
    [2.0, 1000000002.0, 2.0]
    """

    def __init__(self) -> None:
        self.values = np.zeros(3)  # weight, mean, sum of w (x - mean)^2

    def add(self, value_N: Floats, weight_N: Floats) -> None:
        """Add N finite values with weights >= 0."""
        weight = float(np.sum(weight_N))
        if weight > 0:
            mean = float(np.dot(weight_N, value_N)) / weight
            self.add_values(np.array([weight, mean, float(np.dot(weight_N, (value_N - mean) ** 2))]))

    def add_values(self, values: Floats) -> None:
        """Add the `values` of other moments."""
        (weight, mean, square), (more, other, other_square) = self.values.tolist(), values.tolist()
        if more > 0:
            total, step = weight + more, other - mean
            self.values = np.array(
                [total, mean + step * more / total, square + other_square + step * step * weight * more / total]
            )


class DistributionSummary:
    """Count, mean, standard deviation, minimum, maximum and quantiles of a stream of numbers.

    Quantiles by DDSketch (Masson, Rim and Lee, 2019): buckets of exponentially growing width, the same everywhere, so
    that merging is exact; a quantile is within 1 % of the value of that rank (or 1e-12 of 0). Memory: 16 bytes for each
    bucket in use, which are some 115 for each factor of 10 in magnitude; no bucket is ever collapsed, unlike in the
    paper.

    >>> summary = DistributionSummary()
    >>> summary.update(np.arange(1, 1001))
    >>> summary.count, summary.mean, round(summary.sd, 3), summary.minimum, summary.maximum
    (1000, 500.5, 288.675, 1.0, 1000.0)
    >>> [round(value) for value in summary.quantiles([0.1, 0.5, 0.9])]
    [100, 498, 907]
    """

    def __init__(self) -> None:
        self._moments = Moments()
        self._range = np.array([math.inf, -math.inf])
        self._bucket_S: Ints = np.zeros(0, np.int64)  # ascending, in the order of the values
        self._count_S: Ints = np.zeros(0, np.int64)

    def update(self, value_N: npt.ArrayLike) -> None:
        """Add numbers of any shape. Raises ValueError where one is not finite."""
        value_N = np.asarray(value_N, np.float64).ravel()
        require(np.isfinite(value_N), "value", "finite", value_N)
        if len(value_N):
            self._moments.add(value_N, np.ones(len(value_N)))
            self._range = np.array([min(self._range[0], value_N.min()), max(self._range[1], value_N.max())])
            self._add_buckets(*_counted(_buckets(value_N)))

    def _add_buckets(self, bucket_S: Ints, count_S: Ints) -> None:
        every = np.union1d(self._bucket_S, bucket_S)
        counts = np.zeros(len(every), np.int64)
        counts[np.searchsorted(every, self._bucket_S)] = self._count_S
        counts[np.searchsorted(every, bucket_S)] += count_S
        self._bucket_S, self._count_S = every, counts

    def merge(self, other: Self) -> None:
        """Add what the other has seen; it stays as it is."""
        self._moments.add_values(other._moments.values)
        self._range = np.array([min(self._range[0], other._range[0]), max(self._range[1], other._range[1])])
        self._add_buckets(other._bucket_S, other._count_S)

    def arrays(self) -> dict[str, Array]:
        """The state, for `from_arrays`; as lists (`.tolist()`) it is JSON, if anything was seen (else the range is
        inf)."""
        return {
            "moments": self._moments.values,
            "range": self._range,
            "buckets": self._bucket_S,
            "counts": self._count_S,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> Self:
        """The summary whose `arrays()` (or lists of them) these are."""
        made = cls()
        made._moments.values = np.array(arrays["moments"], np.float64)
        made._range = np.array(arrays["range"], np.float64)
        made._bucket_S = np.array(arrays["buckets"], np.int64)
        made._count_S = np.array(arrays["counts"], np.int64)
        return made

    @property
    def count(self) -> int:
        """Numbers seen."""
        return int(np.sum(self._count_S))

    @property
    def mean(self) -> float:
        """NaN where nothing was seen; so are the others."""
        return float(self._moments.values[1]) if self.count else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation (divided by the count, not by one less)."""
        return math.sqrt(self._moments.values[2] / self.count) if self.count else math.nan

    @property
    def minimum(self) -> float:
        """The least number seen, exact."""
        return float(self._range[0]) if self.count else math.nan

    @property
    def maximum(self) -> float:
        """The largest number seen, exact."""
        return float(self._range[1]) if self.count else math.nan

    def quantiles(self, shares: npt.ArrayLike) -> list[float]:
        """For each share q in [0, 1] the value of rank ceil(q count) (at least 1), within 1 %."""
        shares = np.asarray(shares, np.float64)
        require((shares >= 0) & (shares <= 1), "shares", "in [0, 1]", shares)
        if not self.count:
            return [math.nan] * len(shares)
        values = _values(self._bucket_S[self._places(shares)])
        return [float(value) for value in np.clip(values, *self._range)]

    def _places(self, shares: Floats) -> Ints:
        """The bucket (its place in `_bucket_S`) that holds each of these shares of the count."""
        ranks = np.maximum(np.ceil(shares * self.count - 1e-9), 1)
        return np.searchsorted(np.cumsum(self._count_S), ranks, "left").astype(np.int64)

    def stability_index(self, actual: Self, bins: int = 10) -> float:
        """Population stability index from this (expected) distribution to the `actual` one.

        Bins are quantile bins of this distribution, `bins` or fewer where values are tied, and one more on each side
        for values beyond its range. NaN where either is empty.

        >>> training, today = DistributionSummary(), DistributionSummary()
        >>> training.update(np.linspace(0, 1, 1000))
        >>> today.update(np.linspace(0.1, 1.1, 1000))
        >>> round(training.stability_index(training), 6), training.stability_index(today) > 0.25
        (0.0, True)
        """
        if not self.count or not actual.count:
            return math.nan
        inner = self._bucket_S[self._places(np.arange(1, bins) / bins)]
        cuts = np.unique(np.concatenate([self._bucket_S[:1] - 1, inner, self._bucket_S[-1:]]))
        return population_stability_index(self._counts(cuts), actual._counts(cuts))

    def _counts(self, cuts: Ints) -> Floats:
        """Numbers in the buckets up to the first cut, from there to the second, ..., beyond the last."""
        places = np.searchsorted(cuts, self._bucket_S, "left")
        return np.bincount(places, self._count_S, len(cuts) + 1).astype(np.float64)


def _buckets(value_N: Floats) -> Ints:
    """0 for zero; +-k, k >= 1, ascending with the value."""
    size = np.abs(value_N)
    number = np.ceil(np.log(np.maximum(size, SMALLEST)) / _LOG_GAMMA).astype(np.int64) + _OFFSET
    number[size <= SMALLEST] = 0
    return np.where(value_N < 0, -number, number)


def _counted(bucket_N: Ints) -> tuple[Ints, Ints]:
    """(each bucket, ascending; how often it is there). Counted in place, not sorted: a double has some 74,000 buckets at most."""
    low = int(bucket_N.min())
    counts = np.bincount(bucket_N - low)
    used = np.flatnonzero(counts)
    return used + low, counts[used]


def _values(bucket_S: Ints) -> Floats:
    """The number within 1 % of every number of a bucket."""
    size = np.exp((np.abs(bucket_S) - _OFFSET) * _LOG_GAMMA) * (1 - RELATIVE_ERROR)
    return np.where(bucket_S == 0, 0.0, np.sign(bucket_S) * size)


def population_stability_index(expected_counts: npt.ArrayLike, actual_counts: npt.ArrayLike) -> float:
    """Sum over bins of (a - e) ln(a / e), a and e the bins' shares: the symmetric Kullback-Leibler divergence, in nats.

    Shares below 1e-4 are taken as 1e-4, so that an empty bin gives no infinity (about 0.7 for a bin of 10 % gone
    empty). Rule of thumb (Siddiqi, 2006): below 0.1 little drift, above 0.25 much. Chance alone gives about (bins - 1)
    (1 / rows expected + 1 / rows actual). NaN where either has no rows.

    Raises ValueError where lengths differ or a count is negative or not finite.

    >>> round(population_stability_index([50, 50], [60, 40]), 5)
    0.04055
    """
    expected, actual = np.asarray(expected_counts, np.float64), np.asarray(actual_counts, np.float64)
    if expected.ndim != 1 or expected.shape != actual.shape:
        raise ValueError(
            "`expected_counts` and `actual_counts` should have one number for each of the same bins. "
            f"Found shapes {expected.shape} and {actual.shape}."
        )
    require(np.isfinite(expected) & (expected >= 0), "expected_counts", "finite and not negative", expected)
    require(np.isfinite(actual) & (actual >= 0), "actual_counts", "finite and not negative", actual)
    if not expected.sum() or not actual.sum():
        return math.nan
    e = np.maximum(expected / expected.sum(), SHARE_FLOOR)
    a = np.maximum(actual / actual.sum(), SHARE_FLOOR)
    return float(np.sum((a - e) * np.log(a / e)))
