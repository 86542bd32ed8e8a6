"""A metric of one variant with its interval: the same two sources of chance as in `statistics`, without a baseline.

Legend: N test rows, R runs (one a seed).
"""

import dataclasses
import math

import numpy as np

from mtrec.compare.sample import Scores, sample_metric
from mtrec.compare.statistics import half_width


@dataclasses.dataclass(frozen=True)
class Interval:
    """A metric averaged over seeds, the ends of its 95 % interval (NaN with one seed), and its value for each seed."""

    value: float
    low: float
    high: float
    by_seed: dict[int, float]


def metric_interval(metric: str, scores: Scores, bootstrap_draws: int = 200) -> Interval:
    """The metric of `scores`, as `paired_difference` computes it.

    >>> label = np.array([0.0, 1.0, 1.0, 0.0, np.nan])
    >>> first, second = np.array([0.1, 0.9, 0.8, 0.85, 0.5]), np.array([0.1, 0.9, 0.8, 0.2, 0.5])
    >>> scores = Scores({0: first, 1: second}, label, user=np.array([1, 1, 2, 2, 3]))
    >>> metric_interval("auc", scores).by_seed
    {0: 0.75, 1: 1.0}
    """
    seeds = sorted(scores.prediction)
    sample = sample_metric(metric, [(scores, seeds)], bootstrap_draws, seed=0)
    value = float(np.mean(sample.value))
    half = math.nan
    if len(seeds) > 1 and np.isfinite(sample.value).all():
        users = (sample.variance(np.full(len(seeds), 1 / len(seeds))), sample.degrees)
        by_seed = (float(np.var(sample.value, ddof=1)) / len(seeds), len(seeds) - 1.0)
        if not math.isnan(users[0]):
            half = half_width([users, by_seed], 0.05)
    return Interval(value, value - half, value + half, dict(zip(seeds, sample.value.tolist(), strict=True)))
