"""A bootstrap over users, for metrics that are a function of sums over users.

Every user is reduced to a few sums, so that a draw (users with replacement, all their rows with them) is a matrix product.

Legend: N rows (all with a label), G users, J sums of a metric, R runs, T draws.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtrec.metrics.probability import CLIP
from mtrec.metrics.ranking import add_equal, count_pairs, row_cells

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CHUNK_NUMBERS = 4_000_000  # counts of users held at a time: 32 MB


class Rows(NamedTuple):
    """The rows of one run; all fields (N,), `prediction` (N, C) for a multiclass task; `user` from 0 to `num_users` - 1."""

    prediction: Floats
    label: Floats
    weight: Floats
    user: Ints
    num_users: int


class SumMetric(NamedTuple):
    """A metric as sums over users and a function of their totals.

    `sums`: rows -> (G, J); `value`: totals (J, ...) -> (...), NaN where undefined.
    """

    sums: Callable[[Rows], Floats]
    value: Callable[[Floats], Floats]


def _by_user(rows: Rows, columns: Sequence[Floats]) -> Floats:
    return np.stack([np.bincount(rows.user, rows.weight * column_N, rows.num_users) for column_N in columns], axis=1)


def _ratio(upper: Floats, lower: Floats) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(lower > 0, upper / lower, np.nan))


def _log_loss_rows(rows: Rows) -> Floats:
    if rows.prediction.ndim == 2:
        own_N = np.take_along_axis(rows.prediction, rows.label.astype(np.int64)[:, None], axis=1)[:, 0]
        return np.asarray(-np.log(np.clip(own_N, CLIP, 1 - CLIP)))
    p = np.clip(rows.prediction, CLIP, 1 - CLIP)
    return np.asarray(-(rows.label * np.log(p) + (1 - rows.label) * np.log1p(-p)))


def _mean_of(row_values: Callable[[Rows], Floats]) -> SumMetric:
    def sums(rows: Rows) -> Floats:
        return _by_user(rows, [row_values(rows), np.ones(len(rows.label))])

    return SumMetric(sums, lambda total: _ratio(total[0], total[1]))


def _entropy_sums(rows: Rows) -> Floats:
    return _by_user(rows, [_log_loss_rows(rows), rows.label, np.ones(len(rows.label))])


def _normalized_entropy(total: Floats) -> Floats:
    rate = _ratio(total[1], total[2])
    with np.errstate(invalid="ignore", divide="ignore"):
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    return _ratio(_ratio(total[0], total[2]), np.nan_to_num(entropy))


def _r2_sums(rows: Rows) -> Floats:
    centred_N = rows.label - np.average(rows.label, weights=rows.weight)  # or the squares would cancel
    if len(centred_N) and np.all(rows.label == rows.label[0]):
        centred_N = np.zeros_like(centred_N)  # not what rounding leaves of them
    return _by_user(rows, [(rows.prediction - rows.label) ** 2, centred_N**2, centred_N, np.ones(len(rows.label))])


def _r2(total: Floats) -> Floats:
    return 1 - _ratio(total[0], total[1] - _ratio(total[2] ** 2, total[3]))


def _gauc_sums(rows: Rows) -> Floats:
    """(G, 2): weight x AUC and weight of the users who have both classes."""
    order = np.lexsort((rows.prediction, rows.user))
    cells = row_cells(rows.prediction[order], rows.label[order], rows.weight[order], rows.user[order])
    found = np.zeros((rows.num_users, 2))
    for pairs in count_pairs(add_equal([cells])):
        both = (pairs.positive > 0) & (pairs.negative > 0)
        weight = pairs.weight[both]
        found[pairs.outer[both]] = np.stack([weight * pairs.auc()[both], weight], axis=1)
    return found


_SUM_RATIO = SumMetric(lambda rows: _by_user(rows, [rows.prediction, rows.label]), lambda total: _ratio(total[0], total[1]))
_SQUARE_ERROR = _mean_of(lambda rows: (rows.prediction - rows.label) ** 2)

SUM_METRICS: dict[str, SumMetric] = {
    "accuracy": _mean_of(lambda rows: (rows.prediction.argmax(axis=1) == rows.label).astype(np.float64)),
    "calibration": _SUM_RATIO,
    "gauc": SumMetric(_gauc_sums, lambda total: _ratio(total[0], total[1])),
    "log_loss": _mean_of(_log_loss_rows),
    "mae": _mean_of(lambda rows: np.abs(rows.prediction - rows.label)),
    "normalized_entropy": SumMetric(_entropy_sums, _normalized_entropy),
    "r2": SumMetric(_r2_sums, _r2),
    "r2_log1p": SumMetric(lambda rows: _r2_sums(rows._replace(label=np.log1p(rows.label))), _r2),
    "rmse": SumMetric(_SQUARE_ERROR.sums, lambda total: np.sqrt(_SQUARE_ERROR.value(total))),
    "sum_ratio": _SUM_RATIO,
}


def user_counts(num_users: int, draws: int, seed: int) -> Floats:
    """(T, G): how often each user was drawn, G of G with replacement.

    >>> user_counts(4, 2, seed=0).sum(axis=1)
    array([4., 4.])
    """
    return np.concatenate(list(_count_chunks(num_users, draws, seed)))


def _count_chunks(num_users: int, draws: int, seed: int) -> Iterator[Floats]:
    generator = np.random.default_rng(seed)
    step = max(1, CHUNK_NUMBERS // num_users)
    for start in range(0, draws, step):
        size = min(step, draws - start)
        drawn = generator.integers(0, num_users, (size, num_users))
        drawn += num_users * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * num_users).reshape(size, num_users).astype(np.float64)


def bootstrap(metric: SumMetric, runs: Sequence[Rows], draws: int, seed: int) -> tuple[Floats, Floats]:
    """(the metric of R runs (R,), the same in every draw (T, R)); all runs see the same draws.

    >>> rows = Rows(np.array([1.0, 2.0, 4.0]), np.array([1.0, 1.0, 1.0]), np.ones(3), np.array([0, 0, 1]), 2)
    >>> value, drawn = bootstrap(SUM_METRICS["mae"], [rows], draws=50, seed=1)
    >>> value.round(3), np.unique(drawn.round(3))  # user 0 errs by .5 in the mean of two rows, user 1 by 3 in one
    (array([1.333]), array([0.5  , 1.333, 3.   ]))
    """
    sums = np.stack([metric.sums(rows) for rows in runs], axis=1)  # (G, R, J)
    num_users, num_runs, num_sums = sums.shape
    flat = sums.reshape(num_users, -1)
    totals = np.concatenate([counts @ flat for counts in _count_chunks(num_users, draws, seed)])
    drawn = metric.value(np.moveaxis(totals.reshape(-1, num_runs, num_sums), -1, 0))
    return metric.value(np.moveaxis(sums.sum(axis=0), -1, 0)), drawn


def contrast_variance(drawn_TR: Floats, contrast_R: Floats) -> float:
    """Variance of `contrast_R @ metric` over the draws where it is defined; NaN where that is under half of them."""
    value_T = drawn_TR @ contrast_R
    value_T = value_T[np.isfinite(value_T)]
    return float(np.var(value_T, ddof=1)) if 2 * len(value_T) > len(drawn_TR) else math.nan
