"""Is a variant better than the baseline? The paired difference of a metric, with both sources of chance in its interval.

    difference = paired_difference("auc", baseline, variant)     # one task, one metric, the same test rows
    adjusted = holm([difference.p_value, ...])                   # over variants x the primary metric of each task
    verdict("PLE", "MMoE", "click", difference, adjusted[0])     # mtrec.compare.verdict

Legend: N test rows, R runs (those of the baseline, then those of the variant).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from mtrec.compare.sample import METRIC_NAMES, Scores, sample_metric

__all__ = [
    "METRIC_NAMES",
    "Difference",
    "Scores",
    "half_width",
    "holm",
    "paired_difference",
    "smallest_detectable",
    "undefined_difference",
    "what_sharpens",
]

Floats = NDArray[np.float64]
Part = tuple[float, float]  # an estimate of a variance, and its degrees of freedom
_NODES, _WEIGHTS = (each / 2 for each in np.polynomial.legendre.leggauss(128))  # Gauss and Legendre's, of probability
_NODES = _NODES + 0.5
BEYOND = 1e9  # standard errors: no difference that is so large is ever met


@dataclass(frozen=True)
class Difference:
    """Variant minus baseline, averaged over seeds. All numbers are NaN where the metric is undefined on these rows.

    Attributes:
        metric: as given.
        value: in the metric's units.
        low, high: the interval of `confidence`.
        standard_error: square root of `variance_users + variance_seeds`.
        variance_users: of the seed-averaged difference, from the users who happen to be in the test rows.
        variance_seeds: of the seed-averaged difference, from the seeds (already divided by their number).
        num_seeds: pairs of runs (the smaller number of runs where the seeds are not paired).
        num_users: with observed rows; None where there is no user column.
        p_value: two-sided, not corrected for other comparisons.
        method: in words, for the report.
        confidence: of the interval.
        num_rows: observed.
        baseline, variant: the metric itself, averaged over seeds.
        degrees_users, degrees_seeds: degrees of freedom of the two variances.
    """

    metric: str
    value: float
    low: float
    high: float
    standard_error: float
    variance_users: float
    variance_seeds: float
    num_seeds: int
    num_users: int | None
    p_value: float
    method: str
    confidence: float
    num_rows: int
    baseline: float
    variant: float
    degrees_users: float
    degrees_seeds: float


def paired_difference(
    metric: str,
    baseline: Scores,
    variant: Scores,
    *,
    confidence: float = 0.95,
    bootstrap_draws: int = 400,
    seed: int = 0,
) -> Difference:
    """The seed-averaged difference variant - baseline of a metric, its interval and its p-value.

    variance = variance over users of the seed-averaged difference + variance of the differences by seed / number of seeds,
    and an interval in which each of the two has a Student's t of its own (`half_width`): of few seeds, the chance that they
    happen to be alike counts too. A test over seeds alone, on one fixed set of test rows, takes the luck of those users for a
    property of the variant.

    Seeds that both sides have are paired, if there are at least two (others are left out); else (the baseline again with other
    seeds) the variances by seed of both sides add up, with the degrees of freedom of the side that has fewer: so the level
    holds whatever the two are, and the A/A row has the t of the rows beside it. The variance over users: of AUC by Obuchowski
    (1997) from placement values, of XAUC by the same projection, of the others by a bootstrap over users. Without a user column
    every row stands for itself (AUC: plain DeLong), which is too narrow where a user has several rows. A row of `NULL_GROUP` is
    a user of its own. The variance by seed contains some of the users' luck too (runs err on different users), and `half_width`
    errs on the wide side: with 2 or 3 seeds the interval is wide, from 5 on somewhat. Of few users with heavy-tailed errors
    (squared seconds without a limit) it is too narrow, as every interval from a variance.

    Args:
        metric: a key of `METRIC_NAMES`; a suffix `_given` is allowed and means nothing here.
        confidence: of the interval.
        bootstrap_draws: for the metrics that need them.
        seed: of the draws.

    Raises ValueError for an unknown metric (or GAUC without users), sides that differ in rows, or fewer than two seeds.

    >>> rng = np.random.default_rng(0)
    >>> user = np.arange(600) // 3
    >>> label = (rng.random(600) < 0.5).astype(float)
    >>> noisy = {seed: label + rng.normal(0, 2, 600) for seed in range(3)}
    >>> clear = {seed: label + rng.normal(0, 1, 600) for seed in range(3)}
    >>> found = paired_difference("auc", Scores(noisy, label, user), Scores(clear, label, user))
    >>> round(found.value, 2), found.low > 0, found.num_seeds, found.num_users
    (0.12, True, 3, 200)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` should be between 0 and 1. Found {confidence}.")
    check_same_rows(baseline, variant)
    paired = sorted(baseline.prediction.keys() & variant.prediction.keys())
    is_paired = len(paired) > 1
    left_seeds, right_seeds = (paired, paired) if is_paired else (sorted(baseline.prediction), sorted(variant.prediction))
    if min(len(left_seeds), len(right_seeds)) < 2:
        raise ValueError(
            "`seeds` should name at least 2 seeds that were run for both variants: one run says nothing about re-runs. "
            f"Found {sorted(baseline.prediction)} for the baseline and {sorted(variant.prediction)} for the variant."
        )
    sample = sample_metric(metric, [(baseline, left_seeds), (variant, right_seeds)], bootstrap_draws, seed)
    left, right = sample.value[: len(left_seeds)], sample.value[len(left_seeds) :]
    contrast_R = np.concatenate([np.full(len(left), -1 / len(left)), np.full(len(right), 1 / len(right))])
    if is_paired:
        variance_seeds, degrees_seeds = float(np.var(right - left, ddof=1)) / len(left), len(left) - 1.0
    else:
        variance_seeds = sum(float(np.var(each, ddof=1)) / len(each) for each in (left, right))
        degrees_seeds = min(len(left), len(right)) - 1.0
    by_seeds = f"{len(left)} paired seeds" if is_paired else f"{len(left)} and {len(right)} seeds, not paired"
    return _difference(
        metric=metric,
        value=float(np.mean(right) - np.mean(left)),
        variance_users=sample.variance(contrast_R),
        variance_seeds=variance_seeds,
        degrees_users=sample.degrees,
        degrees_seeds=degrees_seeds,
        confidence=confidence,
        num_seeds=min(len(left), len(right)),
        num_users=sample.num_users,
        num_rows=sample.num_rows,
        baseline=float(np.mean(left)),
        variant=float(np.mean(right)),
        method=f"{sample.method}; {by_seeds}",
    )


def check_same_rows(baseline: Scores, variant: Scores) -> None:
    """Raises ValueError where two sides differ in labels, users or weights, or a prediction is not finite."""
    for name in ("label", "user", "weight"):
        left, right = getattr(baseline, name), getattr(variant, name)
        if (left is None) != (right is None) or (left is not None and not np.array_equal(left, right, equal_nan=name == "label")):
            raise ValueError(f"`{name}` should be the same for baseline and variant, row by row. Found different ones.")
    for side in (baseline, variant):
        for seed, prediction in side.prediction.items():
            if len(prediction) != len(side.label):
                raise ValueError(
                    f"`prediction[{seed}]` should have one row for each of the {len(side.label)} labels. Found {len(prediction)}."
                )
            bad = np.flatnonzero(~np.isfinite(prediction.reshape(len(prediction), -1)).all(axis=1) & ~np.isnan(side.label))
            if len(bad):
                raise ValueError(
                    f"`prediction[{seed}]` should be finite where there is a label. Found {prediction[bad[0]]} in row {bad[0]}."
                )


def half_width(parts: Sequence[Part], level: float) -> float:
    """Half of the 1 - `level` interval of a normal estimate whose variance is the sum of independently estimated parts.

    The root of the sum of (t x standard error) squared, where each part has the t of its own degrees of freedom (Banerjee,
    1960). The interval holds the truth at least as often as it says, whatever the true parts are: the distribution function
    of a squared normal variable is concave, so that the chance of the mixture is at least the mixture of the chances, and each
    of those is 1 - level. A single t with Satterthwaite's degrees of freedom does not: where two seeds happen to be alike, it
    takes the many degrees of the users, and of two seeds rejects equal variants in up to 13 % at 5 %, up to 5 % at .1 %.
    Cochran's mean of the t's, weighted by the variances, is narrower than the root and rejects up to .6 % at .1 %.

    >>> round(half_width([(1.0, math.inf)], 0.05), 3), round(half_width([(1.0, math.inf), (0.01, 1.0)], 0.05), 3)
    (1.96, 2.336)
    """
    return math.hypot(*(math.sqrt(variance) * _quantile(degrees, level) for variance, degrees in parts if variance != 0))


def _quantile(degrees: float, level: float) -> float:
    """What |t| exceeds with probability `level`; scipy's `stats.t` says the same in 80 times as long."""
    return -float(special.stdtrit(degrees, level / 2))


def _p_value(parts: Sequence[Part], value: float) -> float:
    """The level at which the interval of `half_width` just touches 0."""
    size, known = abs(value), [(math.sqrt(variance), degrees) for variance, degrees in parts if variance > 0]
    if size == 0 or not known:
        return float(size == 0)

    def largest(shared: float) -> float:
        return max(2 * float(special.stdtr(degrees, -size / shared / error)) for error, degrees in known)

    # Each part alone makes the interval too narrow; as many as there are, each as large as the largest, make it too wide
    low, high = largest(1.0), largest(math.sqrt(len(known)))
    if len(known) == 1 or low < 1e-290:
        return high if low < 1e-290 else low
    touches = optimize.brentq(
        lambda log_p: half_width(parts, math.exp(log_p)) / size - 1, math.log(low) - 1e-6, min(0.0, math.log(high) + 1e-6)
    )
    return math.exp(touches)


def _difference(
    *,
    metric: str,
    value: float,
    variance_users: float,
    variance_seeds: float,
    degrees_users: float,
    degrees_seeds: float,
    confidence: float,
    num_seeds: int,
    num_users: int | None,
    num_rows: int,
    baseline: float,
    variant: float,
    method: str,
) -> Difference:
    error = math.sqrt(variance_users + variance_seeds)
    parts = [(variance_users, degrees_users), (variance_seeds, degrees_seeds)]
    if math.isnan(value) or math.isnan(error):
        value = half = p_value = math.nan
    elif error == 0:
        half, p_value = 0.0, float(value == 0)
    else:
        half, p_value = half_width(parts, 1 - confidence), _p_value(parts, value)
    return Difference(
        metric=metric,
        value=value,
        low=value - half,
        high=value + half,
        standard_error=error,
        variance_users=variance_users,
        variance_seeds=variance_seeds,
        num_seeds=num_seeds,
        num_users=num_users,
        p_value=p_value,
        method=method,
        confidence=confidence,
        num_rows=num_rows,
        baseline=baseline,
        variant=variant,
        degrees_users=degrees_users,
        degrees_seeds=degrees_seeds,
    )


def undefined_difference(metric: str, num_seeds: int, num_users: int | None, num_rows: int, method: str) -> Difference:
    """One of which nothing is known; `method` says why."""
    return _difference(
        metric=metric,
        value=math.nan,
        variance_users=math.nan,
        variance_seeds=math.nan,
        degrees_users=math.nan,
        degrees_seeds=math.nan,
        confidence=0.95,
        num_seeds=num_seeds,
        num_users=num_users,
        num_rows=num_rows,
        baseline=math.nan,
        variant=math.nan,
        method=method,
    )


def holm(p_values: Sequence[float]) -> Floats:
    """Holm's (1979) adjusted p-values, in the order given; a NaN (an undefined metric) stays NaN and is not counted.

    >>> holm([0.01, 0.04, 0.03])
    array([0.03, 0.06, 0.06])
    """
    p = np.asarray(p_values, np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    order = known[np.argsort(p[known], kind="stable")]
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)), 1.0)
    return adjusted


def smallest_detectable(difference: Difference, power: float = 0.8, comparisons: int = 1) -> float:
    """The true difference that a comparison like this one finds with probability `power`, in the metric's units; NaN where
    undefined, infinite where no difference would be large enough.

    At the level (1 - confidence) / `comparisons`: what Holm's correction over that many comparisons certainly allows. Taken for
    the true ones, the variances make the mean of a difference normal and its interval as wide as their estimates happen to be.
    """
    d = difference
    parts = [(d.variance_users, d.degrees_users), (d.variance_seeds, d.degrees_seeds)]
    return _detectable(parts, (1 - d.confidence) / comparisons, power)


def _detectable(parts: Sequence[Part], level: float, power: float) -> float:
    error = math.sqrt(sum(variance for variance, _ in parts))
    if math.isnan(error) or error == 0:
        return error
    # The squared half width over the estimates of the variances, which are chi-squared: a grid with an axis a part
    squared, weight = np.zeros(()), np.ones(())
    for variance, degrees in parts:
        if variance > 0:
            estimate = variance * special.chdtri(degrees, 1 - _NODES) / degrees if degrees < 1e6 else np.array([variance])
            squared = np.add.outer(squared, estimate * _quantile(degrees, level) ** 2)
            weight = np.multiply.outer(weight, _WEIGHTS if degrees < 1e6 else np.ones(1))
    half = np.sqrt(squared)
    most = float(np.max(half)) + 10 * error
    if not most < BEYOND * error:
        return math.inf

    def missed(shift: float) -> float:
        return float(np.sum(weight * special.ndtr((shift - half) / error))) - power

    return float(optimize.brentq(missed, 0.0, most, maxiter=1000))


def what_sharpens(difference: Difference, power: float = 0.8) -> str:
    """Which of "more seeds" and "more rows", doubled, makes the smallest detectable difference smaller; "" where undefined."""
    d, level = difference, 1 - difference.confidence
    if math.isnan(d.standard_error):
        return ""
    users, seeds = (d.variance_users, d.degrees_users), (d.variance_seeds, d.degrees_seeds)
    more_seeds = _detectable([users, (seeds[0] / 2, 2 * seeds[1] + 1)], level, power)
    more_rows = _detectable([(users[0] / 2, 2 * users[1] + 1), seeds], level, power)
    return "more seeds" if more_seeds < more_rows else "more rows"
