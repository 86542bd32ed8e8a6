"""A metric of several runs on the same test rows, and how it varies with the users who happen to be in them.

Legend: N test rows, R runs, G users, T draws.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mtrec.compare.auc_variance import auc_influence
from mtrec.compare.bootstrap import SUM_METRICS, Rows, bootstrap, contrast_variance
from mtrec.compare.xauc_variance import xauc_influence
from mtrec.metrics import NULL_GROUP

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

METRIC_NAMES = tuple(sorted(["auc", "xauc", *SUM_METRICS]))
FEWEST_DEGREES = 0.9  # two equal users have 1, less what draws of a bootstrap cost; of less, a variance says nothing


@dataclass(frozen=True)
class Scores:
    """What the runs of one variant predicted for one task.

    Attributes:
        prediction: {seed: (N,) float64}, in natural units; for `r2_log1p` the output on the log scale; for the metrics of a
            multiclass task (N, C) probabilities.
        label: (N,) float64, NaN where unobserved; the same in both sides of a comparison.
        user: (N,) int64 of `mtrec.metrics.group_keys`, or None where the data have no user column.
        weight: (N,) sample weights >= 0 that the metrics count rows by, or None.
    """

    prediction: Mapping[int, Floats]
    label: Floats
    user: Ints | None
    weight: Floats | None = None


class Sample(NamedTuple):
    """A metric of R runs; NaN where undefined, the variance also where nearly all rows are of one user.

    `value` (R,); `variance`: contrast (R,) -> variance over users of `contrast @ value`, with `degrees` of freedom; `method` in
    words; `num_users` with observed rows (None where there is no user column); `num_rows` observed.
    """

    value: Floats
    variance: Callable[[Floats], float]
    degrees: float
    method: str
    num_users: int | None
    num_rows: int


def sample_metric(metric: str, sides: Sequence[tuple[Scores, Sequence[int]]], bootstrap_draws: int, seed: int) -> Sample:
    """The metric of the runs of each side, (scores, seeds), in this order; all sides have the same rows, labels and users.

    A row of `NULL_GROUP` is a user of its own, and so is every row where there is no user column. Raises ValueError for an
    unknown metric, or one that needs users where there are none.

    >>> label, user = np.array([0.0, 1.0, 1.0, 0.0]), np.array([1, 1, 2, 2])
    >>> scores = Scores({0: np.array([0.1, 0.9, 0.8, 0.85]), 1: np.array([0.1, 0.9, 0.8, 0.2])}, label, user)
    >>> found = sample_metric("auc", [(scores, [0, 1])], 100, 0)
    >>> found.value, found.variance(np.array([0.5, 0.5])), found.num_users
    (array([0.75, 1.  ]), 0.0625, 2)
    """
    kind = metric.removesuffix("_given")
    if kind not in METRIC_NAMES:
        raise ValueError(f"`metric` should be one of {', '.join(METRIC_NAMES)}. Found '{metric}'.")
    first = sides[0][0]
    if kind == "gauc" and first.user is None:
        raise ValueError("`user` should be given for 'gauc': it is a mean over users. Found None.")
    keep_N = ~np.isnan(first.label)
    label_N = first.label[keep_N]
    weight_N = np.ones(len(label_N)) if first.weight is None else first.weight[keep_N]
    user_N, num_users = _user_numbers(None if first.user is None else first.user[keep_N], len(label_N))
    runs = [
        Rows(scores.prediction[each][keep_N], label_N, weight_N, user_N, num_users) for scores, seeds in sides for each in seeds
    ]
    found: Estimate
    if not np.sum(weight_N):
        found = np.full(len(runs), math.nan), _unknown, math.nan, "no observed rows" if not num_users else "no row with a weight"
    elif kind == "auc":
        found = _auc(runs, first.user is not None)
    elif kind == "xauc":
        found = _xauc(runs)
    else:
        found = _bootstrapped(kind, runs, bootstrap_draws, seed)
    value, variance, degrees, method = found
    by = "rows taken as independent: no user column" if first.user is None else "clustered by user"
    few = num_users < 2 or degrees < FEWEST_DEGREES
    return Sample(
        value,
        _unknown if few else variance,
        degrees,
        f"{method}, {by}{': too few users' if few else ''}",
        None if first.user is None else num_users,
        len(label_N),
    )


Estimate = tuple[Floats, Callable[[Floats], float], float, str]


def _unknown(contrast_R: Floats) -> float:
    return math.nan


def _auc(runs: Sequence[Rows], has_users: bool) -> Estimate:
    _, label_N, weight_N, user_N, num_users = runs[0]
    found = auc_influence(np.stack([run.prediction for run in runs]), label_N, weight_N, user_N, num_users)
    return found.auc, found.variance, found.effective_users() - 1, f"{'Obuchowski' if has_users else 'DeLong'}'s variance"


def _xauc(runs: Sequence[Rows]) -> Estimate:
    _, label_N, weight_N, user_N, num_users = runs[0]
    xauc, influence_RG = xauc_influence(np.stack([run.prediction for run in runs]), label_N, weight_N, user_N, num_users)

    def variance(contrast_R: Floats) -> float:
        return num_users / (num_users - 1) * float(np.sum((contrast_R @ influence_RG) ** 2))

    return xauc, variance, _effective_users(runs[0]) - 1, "placement values"


def _bootstrapped(kind: str, runs: Sequence[Rows], draws: int, seed: int) -> Estimate:
    value, drawn_TR = bootstrap(SUM_METRICS[kind], runs, draws, seed)

    def variance(contrast_R: Floats) -> float:
        return contrast_variance(drawn_TR, contrast_R)

    # The draws have noise of their own
    degrees = 1 / (1 / max(_effective_users(runs[0]) - 1, 1e-9) + 1 / (draws - 1))
    return value, variance, degrees, f"bootstrap of {draws} draws"


def _effective_users(rows: Rows) -> float:
    """Kish's number of equally large users."""
    size_G = np.bincount(rows.user, rows.weight)
    return float(np.sum(size_G)) ** 2 / float(size_G @ size_G)


def _user_numbers(user_N: Ints | None, num_rows: int) -> tuple[Ints, int]:
    """(numbers 0, 1, ... of the users (N,), how many)."""
    if user_N is None:
        return np.arange(num_rows), num_rows
    keys, number_N = np.unique(user_N, return_inverse=True)
    number_N = number_N.reshape(-1).astype(np.int64)
    if len(keys) and keys[0] == NULL_GROUP:
        null_N = number_N == 0
        number_N[null_N] = len(keys) + np.arange(np.sum(null_N))
        return number_N - 1, len(keys) - 1 + int(np.sum(null_N))
    return number_N, len(keys)
