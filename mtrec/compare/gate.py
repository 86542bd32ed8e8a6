"""May a new model replace the one in service? A test of non-inferiority on the same rows.

"No difference found" is no answer to that: it is what few rows always say. The question is turned round (Piaggio et al.,
2012, the CONSORT statement on noninferiority trials): the whole interval of the difference has to lie above - margin.

Legend: N rows.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from mtrec.compare.sample import Scores, sample_metric
from mtrec.compare.statistics import check_same_rows
from mtrec.compare.verdict import direction


@dataclass(frozen=True)
class NonInferiority:
    """A candidate beside the model in service; NaN where the metric is undefined on these rows.

    Attributes:
        metric, margin: as given.
        in_service, candidate: the metric of either.
        value: candidate - in service; `low`, `high`: the ends of its interval.
        num_rows: observed; `num_users`: with such rows, None where there is no user column.
        method: in words.
    """

    metric: str
    margin: float
    in_service: float
    candidate: float
    value: float
    low: float
    high: float
    num_rows: int
    num_users: int | None
    method: str

    @property
    def passed(self) -> bool:
        """Whether the candidate is worse by less than the margin, at the interval's confidence; never where undefined."""
        worst = self.low if direction(self.metric) > 0 else -self.high
        return worst > -self.margin


def non_inferiority(
    metric: str,
    in_service: Scores,
    candidate: Scores,
    margin: float,
    *,
    confidence: float = 0.95,
    bootstrap_draws: int = 400,
    seed: int = 0,
) -> NonInferiority:
    """The paired difference of two models on the same rows, its interval over users, and whether it clears the margin.

    It is about these two models as they are, so that seeds have no part in it (`paired_difference` asks which recipe is
    better): variance and degrees of freedom are those over users of `sample_metric`. With a two-sided 95 % interval a
    candidate that is worse by the margin passes once in 40 times.

    Args:
        metric: of which more, or less, is better; not a ratio that is best at 1.
        in_service, candidate: one run each.
        margin: a positive number in the metric's units.

    Raises ValueError for another metric or number of runs, a margin that is not positive, or sides that differ in rows.

    >>> rng = np.random.default_rng(0)
    >>> user = np.arange(3_000) // 3
    >>> label = (rng.random(3_000) < 0.5).astype(float)
    >>> old = label + rng.normal(0, 1.0, 3_000)
    >>> new = old + rng.normal(0, 0.1, 3_000)
    >>> found = non_inferiority("auc", Scores({0: old}, label, user), Scores({0: new}, label, user), margin=0.01)
    >>> found.low < 0 < found.high, found.passed
    (True, True)
    """
    if direction(metric) == 0:
        raise ValueError(f"`metric` should be one of which more, or less, is better. Found '{metric}', which is best at 1.")
    if not margin > 0:
        raise ValueError(f"`margin` should be above 0: without one nothing can be shown to be as good. Found {margin}.")
    if len(in_service.prediction) != 1 or len(candidate.prediction) != 1:
        raise ValueError(
            f"`in_service` and `candidate` should be one run each. Found {len(in_service.prediction)} and "
            f"{len(candidate.prediction)}."
        )
    check_same_rows(in_service, candidate)
    sides = [(each, list(each.prediction)) for each in (in_service, candidate)]
    sample = sample_metric(metric, sides, bootstrap_draws, seed)
    before, after = sample.value.tolist()
    error = math.sqrt(sample.variance(np.array([-1.0, 1.0])))
    half = error * float(stats.t.ppf((1 + confidence) / 2, sample.degrees)) if error > 0 else error
    value = after - before
    return NonInferiority(
        metric=metric,
        margin=margin,
        in_service=before,
        candidate=after,
        value=value,
        low=value - half,
        high=value + half,
        num_rows=sample.num_rows,
        num_users=sample.num_users,
        method=sample.method,
    )
