"""What is made of differences: corrections, power, verdicts, the seesaw, the front."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mtrec.compare.statistics import METRIC_NAMES, Difference, holm, smallest_detectable, what_sharpens
from mtrec.compare.table import summary
from mtrec.compare.verdict import DIRECTION, delta_m, direction, none_seen, outcome, pareto_front, seesaw, verdict


def made(value: float = 0.0, error: float = 0.0006, p: float = 0.5, metric: str = "auc", **more: float) -> Difference:
    fields = {"variance_users": error**2 / 2, "variance_seeds": error**2 / 2, "degrees_users": 1e4, "degrees_seeds": 4.0, **more}
    return Difference(
        metric=metric,
        value=value,
        low=value - 2 * error,
        high=value + 2 * error,
        standard_error=math.sqrt(fields["variance_users"] + fields["variance_seeds"]),
        num_seeds=5,
        num_users=12951,
        p_value=p,
        method="",
        confidence=0.95,
        num_rows=90_000,
        baseline=0.7,
        variant=0.7 + value,
        **fields,
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    numbers = range(len(p_values))
    subsets = [s for size in numbers for s in itertools.combinations(numbers, size + 1)]
    for number, found in enumerate(holm(p_values)):
        assert found == pytest.approx(max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets if number in s))


def test_holm_leaves_undefined_ones_out() -> None:
    np.testing.assert_allclose(holm([0.02, math.nan, 0.01]), [0.02, math.nan, 0.02])
    assert holm([]).shape == (0,)


@pytest.mark.parametrize(("degrees_seeds", "comparisons"), [(4.0, 1), (1.0, 1), (1e9, 1), (4.0, 6)])
def test_the_smallest_detectable_difference_is_detected(degrees_seeds: float, comparisons: int) -> None:
    d = made(variance_users=0.0, variance_seeds=0.25, degrees_seeds=degrees_seeds)
    shift = smallest_detectable(d, comparisons=comparisons)
    rng = np.random.default_rng(0)
    error = 0.5 * np.sqrt(rng.chisquare(degrees_seeds, 100_000) / degrees_seeds)
    statistic = (shift + 0.5 * rng.normal(size=100_000)) / error
    assert np.mean(statistic > stats.t.ppf(1 - 0.025 / comparisons, degrees_seeds)) == pytest.approx(0.8, abs=0.006)


@pytest.mark.parametrize(("seeds", "degrees_seeds", "comparisons"), [(1.0, 1.0, 1), (0.1, 1.0, 15), (2.0, 2.0, 6), (1.0, 4.0, 1)])
def test_it_is_detected_with_the_luck_of_both_variances(seeds: float, degrees_seeds: float, comparisons: int) -> None:
    d = made(variance_users=1.0, degrees_users=30.0, variance_seeds=seeds, degrees_seeds=degrees_seeds)
    rng, level = np.random.default_rng(1), 0.05 / comparisons
    found = smallest_detectable(d, comparisons=comparisons) + math.sqrt(1 + seeds) * rng.normal(size=100_000)
    parts = [(1.0, 30.0), (seeds, degrees_seeds)]
    squared = sum(v * rng.chisquare(df, 100_000) / df * stats.t.isf(level / 2, df) ** 2 for v, df in parts)
    assert np.mean(found > np.sqrt(squared)) == pytest.approx(0.8, abs=0.006)


def test_with_many_degrees_of_freedom_it_is_the_normal_one() -> None:
    d = made(variance_users=1.0, variance_seeds=0.0, degrees_users=1e8)
    assert smallest_detectable(d) == pytest.approx(stats.norm.ppf(0.975) + stats.norm.ppf(0.8), rel=1e-5)
    assert smallest_detectable(made(variance_users=0.0, variance_seeds=0.0)) == 0


@pytest.mark.parametrize("degrees", [0.01, 0.001, 0.0005, 1e-6])
def test_no_difference_is_large_enough_for_a_variance_of_nearly_one_user(degrees: float) -> None:
    d = made(variance_users=1e-4, degrees_users=degrees, variance_seeds=1e-5)
    assert smallest_detectable(d, comparisons=12) == math.inf
    assert what_sharpens(d) in ("more rows", "more seeds")


def test_a_difference_that_cannot_be_is_never_one_that_would_be_seen() -> None:
    def row(variant: str, error: float, metric: str = "auc") -> dict[str, object]:
        d = made(0.0001, error, metric=metric)
        size, told = smallest_detectable(d), verdict(variant, "base", "click", d, 0.5)
        difference = {"metric": metric, "low": d.low, "high": d.high, "detectable": size, "verdict": told}
        return {"variant": variant, "task": "click", "primary": True, "outcome": "no difference", **difference}

    def told(*rows: dict[str, object]) -> list[str]:
        return summary({"primary": {"click": rows[0]["metric"]}, "differences": rows, "baseline": "base", "again": "base again"})

    far, large, small, other = row("far", 9.0), row("large", 1.0), row("small", 0.001), row("other", 0.01)
    unseen = "not even .5 would be seen: too few seeds or rows"
    assert told(far, large) == [f"click: no difference to base found for far, large; {unseen}"]
    few, many = (f".{round(scale * smallest_detectable(made(0, e))):03d}" for e, scale in ((0.001, 1e4), (0.01, 1e3)))
    assert told(far, small, other, large) == [
        f"click: no difference to base found for far, large; {unseen}",
        f"click: no difference to base found for small, other; {few.replace('.', '.0')} to {many} would be seen",
    ]
    assert told(far)[0].endswith(f"; {unseen}")
    wide = told(row("a", 9.0, "mae"), row("b", 9.0, "mae"))[0]
    assert wide == f"click: no difference to base found for a, b; {smallest_detectable(made(0, 9.0)):.0f} would be seen"
    assert none_seen("mae", math.inf) == "no difference would be seen: too few seeds or rows"
    assert none_seen("accuracy_given", 1.2) == "not even 1.0 would be seen: too few seeds or rows"


def test_what_sharpens_is_the_larger_part() -> None:
    assert what_sharpens(made(variance_users=1.0, variance_seeds=0.01)) == "more rows"
    assert what_sharpens(made(variance_users=0.01, variance_seeds=1.0)) == "more seeds"
    # As large a part, but known to one degree of freedom: seeds also tame the t distribution
    assert what_sharpens(made(variance_users=1.0, variance_seeds=1.0, degrees_seeds=1.0)) == "more seeds"


def test_the_outcome_has_the_metric_s_sense() -> None:
    assert set(DIRECTION) == set(METRIC_NAMES)
    assert outcome(made(0.01, p=0.01)) == "better"
    assert outcome(made(0.01, p=0.01, metric="log_loss")) == "worse"
    assert outcome(made(-0.01, p=0.01, metric="mae_given")) == "better"
    assert outcome(made(-0.01, p=0.01, metric="sum_ratio")) == "lower"
    assert outcome(made(0.01, p=0.01), adjusted_p=0.06) == "no difference"
    with pytest.raises(ValueError, match="Found 'recall'"):
        direction("recall")


def test_the_verdict_is_one_sentence() -> None:
    assert verdict("PLE", "MMoE", "click", made(0.0031, p=0.004), 0.012) == (
        "PLE against MMoE, click: better (AUC +.0031, +.0019 to +.0043; 5 seeds, 12,951 users; p = .012)"
    )
    assert verdict("PLE", "MMoE", "dwell", made(-3.21, 0.9, p=1e-9, metric="mae"), 1e-6) == (
        "PLE against MMoE, dwell: better (MAE -3.2, -5.0 to -1.4; 5 seeds, 12,951 users; p < .001)"
    )
    corrected = verdict("PLE", "MMoE", "click", made(0.0014, p=0.03), 0.18, comparisons=6)
    assert corrected.startswith(
        "PLE against MMoE, click: no difference found once corrected for 6 comparisons (AUC +.0014, +.0002"
    )
    assert corrected.endswith(f"; .{round(1e4 * smallest_detectable(made(), comparisons=6)):04d} would be seen")


def test_seesaw_needs_a_gain_and_a_loss() -> None:
    gain, loss, none = made(0.01, p=0.01), made(0.5, p=0.01, metric="mae"), made(-0.01, p=0.5)
    assert seesaw({"click": gain, "dwell": loss})
    assert not seesaw({"click": gain, "dwell": none})
    assert not seesaw({"click": gain, "dwell": loss}, {"click": 0.02, "dwell": 0.2})
    assert not seesaw({"click": loss, "dwell": loss})


def test_delta_m_refuses_what_it_cannot_mean() -> None:
    assert delta_m({"a": "auc", "b": "log_loss"}, {"a": 0.66, "b": 0.33}, {"a": 0.6, "b": 0.3}) == pytest.approx(0)
    with pytest.raises(ValueError, match=r"`metrics.a` should be a metric where more or less is better"):
        delta_m({"a": "sum_ratio"}, {"a": 1.0}, {"a": 0.9})
    with pytest.raises(ValueError, match=r"`single_task.a` should not be 0"):
        delta_m({"a": "r2"}, {"a": 1.0}, {"a": 0.0})


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=1, max_size=8))
def test_the_front_is_what_nobody_beats(rows: list[tuple[int, int, int]]) -> None:
    def beats(first: tuple[int, int, int], second: tuple[int, int, int]) -> bool:
        gains = [first[0] - second[0], first[1] - second[1], second[2] - first[2]]
        return min(gains) >= 0 and max(gains) > 0

    found = pareto_front(np.array(rows, float), maximise=[True, True, False])
    assert found.tolist() == [not any(beats(other, mine) for other in rows) for mine in rows]
