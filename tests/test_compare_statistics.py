"""The statistics of comparisons: one comparison, and many simulated ones whose truth is known."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from simulated_comparisons import simulated
from sklearn.metrics import roc_auc_score

from mtrec import metrics
from mtrec.compare.interval import metric_interval
from mtrec.compare.statistics import (
    METRIC_NAMES,
    Difference,
    Scores,
    _difference,
    half_width,
    paired_difference,
    smallest_detectable,
    what_sharpens,
)
from mtrec.compare.verdict import outcome, verdict

# --- One comparison


@pytest.mark.parametrize("metric", ["auc", "xauc", "gauc", "log_loss", "normalized_entropy", "calibration", "r2"])
def test_a_metric_of_rows_without_weight_is_undefined(metric: str) -> None:
    sides = [replace(each, weight=np.zeros(len(each.label))) for each in simulated(np.random.default_rng(0), gain=0.2)]
    found = paired_difference(metric, *sides)
    assert all(math.isnan(value) for value in (found.value, found.low, found.high, found.p_value))


def test_the_parts_add_up() -> None:
    baseline, variant = simulated(np.random.default_rng(0), gain=0.2)
    found = paired_difference("auc", baseline, variant)
    by_seed = [
        roc_auc_score(variant.label, variant.prediction[s]) - roc_auc_score(baseline.label, baseline.prediction[s])
        for s in range(4)
    ]
    assert found.value == pytest.approx(np.mean(by_seed), abs=1e-12)
    assert found.variance_seeds == pytest.approx(np.var(by_seed, ddof=1) / 4, rel=1e-9)
    assert found.standard_error == pytest.approx(math.sqrt(found.variance_users + found.variance_seeds))
    assert found.value == pytest.approx(found.variant - found.baseline)
    assert found.num_seeds == 4
    assert found.num_users == 250
    # The interval and the p-value are of one test: at the edge of the interval p is 1 - confidence
    assert found.degrees_seeds == 3
    assert 50 < found.degrees_users < 250
    assert found.high - found.value == pytest.approx(found.value - found.low)
    t_users, t_seeds = (stats.t.ppf(0.975, degrees) for degrees in (found.degrees_users, found.degrees_seeds))
    squared = t_users**2 * found.variance_users + t_seeds**2 * found.variance_seeds
    assert found.high - found.value == pytest.approx(math.sqrt(squared), rel=1e-9)
    edge = paired_difference("auc", baseline, variant, confidence=1 - found.p_value)
    assert edge.low == pytest.approx(0, abs=1e-9)


def test_turning_the_sides_turns_the_sign() -> None:
    for metric, kind in (("auc", "click"), ("log_loss", "click"), ("xauc", "dwell"), ("mae", "dwell")):
        baseline, variant = simulated(np.random.default_rng(1), users=40, kind=kind)
        there, back = paired_difference(metric, baseline, variant), paired_difference(metric, variant, baseline)
        assert there.value == pytest.approx(-back.value)
        assert there.variance_users == pytest.approx(back.variance_users)
        assert there.p_value == pytest.approx(back.p_value)


def test_other_seeds_are_not_paired() -> None:
    baseline, variant = simulated(np.random.default_rng(2), users=40, seeds=5)
    moved = replace(variant, prediction={s + 100: each for s, each in variant.prediction.items()})
    found = paired_difference("auc", baseline, moved)
    by_side = [[roc_auc_score(each.label, p) for p in each.prediction.values()] for each in (baseline, variant)]
    assert found.variance_seeds == pytest.approx(sum(np.var(each, ddof=1) / 5 for each in by_side), rel=1e-9)
    assert found.value == pytest.approx(paired_difference("auc", baseline, variant).value)
    assert found.degrees_seeds == 4
    assert "not paired" in found.method
    fewer = replace(moved, prediction={s: each for s, each in moved.prediction.items() if s < 102})
    assert paired_difference("auc", baseline, fewer).degrees_seeds == 1  # of the side that knows least


def test_a_seed_that_one_side_lacks_is_left_out() -> None:
    baseline, variant = simulated(np.random.default_rng(3), users=40)
    fewer = replace(variant, prediction={s: variant.prediction[s] for s in (1, 3)})
    both = [replace(each, prediction={s: each.prediction[s] for s in (1, 3)}) for each in (baseline, variant)]
    assert paired_difference("auc", baseline, fewer) == paired_difference("auc", *both)


def test_unobserved_rows_do_not_count() -> None:
    baseline, variant = simulated(np.random.default_rng(4), users=40)
    hidden = np.random.default_rng(5).random(len(baseline.label)) < 0.4
    label = np.where(hidden, np.nan, baseline.label)
    masked = [
        replace(each, label=label, prediction={s: np.where(hidden, np.nan, p) for s, p in each.prediction.items()})
        for each in (baseline, variant)
    ]
    kept = [
        Scores(
            {s: p[~hidden] for s, p in each.prediction.items()},
            each.label[~hidden],
            None if each.user is None else each.user[~hidden],
        )
        for each in (baseline, variant)
    ]
    for metric in ("auc", "log_loss"):
        assert paired_difference(metric, *masked) == paired_difference(metric, *kept)


def test_a_null_user_is_a_user_of_its_own() -> None:
    baseline, variant = simulated(np.random.default_rng(6), users=40)
    assert baseline.user is not None
    nulls = baseline.user < 10
    alone = np.where(nulls, 1000 + np.arange(len(nulls)), baseline.user)
    for metric in ("auc", "log_loss"):
        with_null, with_own = (
            paired_difference(metric, replace(baseline, user=user), replace(variant, user=user))
            for user in (np.where(nulls, metrics.NULL_GROUP, baseline.user), alone)
        )
        assert with_null.variance_users == pytest.approx(with_own.variance_users, rel=0.3 if metric == "log_loss" else 1e-9)
        assert with_null.num_users == with_own.num_users == 30 + np.sum(nulls)


def test_without_users_it_is_delong_and_says_so() -> None:
    baseline, variant = (replace(each, user=None) for each in simulated(np.random.default_rng(7), users=100))
    found = paired_difference("auc", baseline, variant)
    assert found.num_users is None
    assert "DeLong" in found.method
    assert "no user column" in found.method
    rows = np.arange(len(baseline.label))
    clustered = paired_difference("auc", replace(baseline, user=rows), replace(variant, user=rows))
    assert clustered.variance_users == pytest.approx(found.variance_users, rel=1e-12)
    assert "Obuchowski" in clustered.method
    assert "rows, taken as independent" in verdict("a", "b", "click", found, 1.0)


@pytest.mark.parametrize("metric", ["auc", "gauc", "log_loss", "normalized_entropy", "calibration"])
def test_one_class_is_undefined_not_an_error(metric: str) -> None:
    baseline, variant = (replace(each, label=np.zeros(len(each.label))) for each in simulated(np.random.default_rng(8), users=20))
    found = paired_difference(metric, baseline, variant)
    if metric == "log_loss":
        assert not math.isnan(found.value)
        return
    assert math.isnan(found.value)
    assert math.isnan(found.p_value)
    assert math.isnan(smallest_detectable(found))
    assert outcome(found) == "undefined"
    assert what_sharpens(found) == ""
    assert "not defined" in verdict("a", "b", "click", found, math.nan)


@pytest.mark.parametrize("metric", METRIC_NAMES)
def test_no_observed_row_is_undefined(metric: str) -> None:
    side = Scores({0: np.zeros(3), 1: np.zeros(3)}, np.full(3, np.nan), np.arange(3))
    assert math.isnan(paired_difference(metric, side, side).value)


@pytest.mark.parametrize("metric", [name for name in METRIC_NAMES if name != "accuracy"])
@pytest.mark.parametrize("heavy", [30, 400, 4_000])
def test_rows_that_are_nearly_all_of_one_user_are_too_few_users(metric: str, heavy: int) -> None:
    rng = np.random.default_rng(heavy)
    label = np.concatenate([[0.0, 1.0, 0.0, 1.0], (rng.random(heavy) < 0.4).astype(float)])
    user = np.concatenate([[1, 1, 2, 2], np.zeros(heavy, int)])
    sides = [
        Scores({seed: 1 / (1 + np.exp(-rng.normal(label, 1))) for seed in range(5)}, label, user) for _ in ("baseline", "variant")
    ]
    found = paired_difference(metric, *sides)
    told = verdict("a", "b", "t", found, found.p_value)
    assert all(math.isnan(value) for value in (found.value, found.low, found.high, found.p_value))
    assert math.isfinite(found.baseline)
    assert math.isfinite(found.variant)
    assert found.method.endswith("clustered by user: too few users; 5 paired seeds")
    assert outcome(found) == "undefined"
    assert told.startswith("a against b, t: no interval for ")
    assert told.endswith(": too few users, or nearly all rows are of one (5 seeds, 3 users)")
    assert math.isnan(smallest_detectable(found, comparisons=12))
    assert what_sharpens(found) == ""
    assert math.isnan(metric_interval(metric, sides[0]).low)


def test_two_users_of_equal_size_are_enough() -> None:
    rng = np.random.default_rng(3)
    label, user = np.tile([0.0, 1.0], 40), np.repeat([0, 1], 40)
    sides = [Scores({seed: rng.normal(label, 1) for seed in range(3)}, label, user) for _ in range(2)]
    for metric in ("auc", "xauc", "mae"):
        found = paired_difference(metric, *sides)
        assert found.degrees_users == pytest.approx(1, rel=0.01)
        assert found.low < found.value < found.high
        assert found.p_value > 0


def test_the_same_predictions_do_not_differ() -> None:
    baseline, _ = simulated(np.random.default_rng(9), users=20)
    for metric in ("auc", "log_loss", "xauc"):
        found = paired_difference(metric, baseline, baseline)
        assert (found.value, found.low, found.high, found.p_value) == (0, 0, 0, 1)
        assert outcome(found) == "no difference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b, v: ("aucc", b, v), r"`metric` should be one of accuracy, auc.* Found 'aucc'"),
        (lambda b, v: ("auc", b, replace(v, label=1 - v.label)), "`label` should be the same"),
        (lambda b, v: ("auc", b, replace(v, user=None)), "`user` should be the same"),
        (lambda b, v: ("auc", b, replace(v, weight=np.full(len(v.label), 2.0))), "`weight` should be the same"),
        (lambda b, v: ("gauc", replace(b, user=None), replace(v, user=None)), "`user` should be given for 'gauc'"),
        (lambda b, v: ("auc", b, replace(v, prediction={0: v.prediction[0]})), "at least 2 seeds"),
        (
            lambda b, v: ("auc", b, replace(v, prediction={0: v.prediction[0], 1: v.prediction[0][:-1]})),
            r"`prediction\[1\]` should",
        ),
        (lambda b, v: ("auc", b, replace(v, prediction={0: v.prediction[0], 1: v.prediction[1] * np.nan})), "should be finite"),
    ],
)
def test_mistakes_are_named(change: Callable[[Scores, Scores], tuple[str, Scores, Scores]], message: str) -> None:
    metric, baseline, variant = change(*simulated(np.random.default_rng(0), users=10))
    with pytest.raises(ValueError, match=message):
        paired_difference(metric, baseline, variant)


# --- Many comparisons: what the intervals promise


def told(value: float, users: tuple[float, float], seeds: tuple[float, float], confidence: float = 0.95) -> Difference:
    """What is said of a difference whose (variance, degrees of freedom) are these."""
    return _difference(
        metric="auc",
        value=value,
        variance_users=users[0],
        degrees_users=users[1],
        variance_seeds=seeds[0],
        degrees_seeds=seeds[1],
        confidence=confidence,
        num_seeds=2,
        num_users=500,
        num_rows=500,
        baseline=0.5,
        variant=0.5 + value,
        method="",
    )


@pytest.mark.parametrize("level", [0.05, 0.001])
@pytest.mark.parametrize("num_seeds", [2, 3, 5])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 1.0, 4.0, 9.0])
def test_few_seeds_hold_the_level(num_seeds: int, ratio: float, level: float) -> None:
    # Without draws: over quantiles of the estimates of both variances, the seeds' being `ratio` times the users'
    free, middle = num_seeds - 1, (np.arange(300) + 0.5) / 300
    rejected = []
    for of_users in stats.chi2.ppf([0.1, 0.3, 0.5, 0.7, 0.9], 500) / 500:
        for of_seeds in ratio * stats.chi2.ppf(middle, free) / free:
            found = told(0.0, (of_users, 500.0), (of_seeds, free), 1 - level)
            rejected.append(2 * stats.norm.sf(found.high / math.sqrt(1 + ratio)))
    assert np.mean(rejected) <= 1.01 * level
    assert level < 0.05 or np.mean(rejected) > 0.01  # a test that never says anything would be no test


def test_two_seeds_that_happen_to_be_alike_are_no_proof() -> None:
    # 4.5 standard errors of the users, and two seeds that differ by a fifth of that error
    found = told(4.5, (1.0, 500.0), (0.01, 1.0))
    assert 0.01 < found.p_value < 0.02
    assert told(4.5, (1.0, 500.0), (0.01, 9.0)).p_value < 0.001


@settings(max_examples=80, deadline=None)
@given(
    st.floats(1e-12, 1e12),
    st.sampled_from([0.0, 1e-30, 1e-6, 0.3, 1.0, 40.0, 1e9]),
    st.sampled_from([0.0, 1e-30, 1e-6, 0.3, 1.0, 40.0, 1e9]),
    st.sampled_from([0.3, 1.0, 2.0, 40.0, 500.0, 1e7, math.inf]),
    st.sampled_from([1.0, 2.0, 9.0]),
)
def test_at_the_edge_of_the_interval_p_is_its_level(size: float, users: float, seeds: float, free: float, few: float) -> None:
    found = told(-size, (users, free), (seeds, few))
    assert 0 <= found.p_value <= 1
    assert (found.p_value < 0.05) == (found.high < 0)
    if 1e-250 < found.p_value < 1 - 1e-6:
        assert half_width([(users, free), (seeds, few)], found.p_value) == pytest.approx(size, rel=1e-6)


def test_undefined_variances_are_told_as_undefined() -> None:
    for users, seeds in (((math.nan, 9.0), (1.0, 1.0)), ((1.0, 9.0), (math.nan, 1.0)), ((math.nan, math.nan), (0.0, 1.0))):
        found = told(1.0, users, seeds)
        assert math.isnan(found.low)
        assert math.isnan(found.p_value)


@pytest.mark.parametrize("seeds", [2, 3])
def test_equal_variants_of_few_seeds_are_rarely_told_apart(seeds: int) -> None:
    rng = np.random.default_rng(15)
    found = [paired_difference("auc", *simulated(rng, users=60, seeds=seeds, skill=0.7, user_error=0.3)) for _ in range(600)]
    assert np.mean([each.variance_seeds for each in found]) > np.mean([each.variance_users for each in found])
    assert np.mean([each.p_value < 0.05 for each in found]) <= 0.05
    assert np.mean([each.p_value < 0.001 for each in found]) <= 1 / 600

@pytest.mark.parametrize(
    ("metric", "kind", "users", "naive_at_least"),
    [("auc", "click", 150, 0.2), ("log_loss", "click", 150, 0.1), ("xauc", "dwell", 60, 0.2)],
)
def test_equal_variants_are_rarely_told_apart(metric: str, kind: str, users: int, naive_at_least: float) -> None:
    rng = np.random.default_rng(10)
    found = [paired_difference(metric, *simulated(rng, kind=kind, users=users), bootstrap_draws=200) for _ in range(500)]
    wrong = sum(outcome(each) in ("better", "worse") for each in found)
    assert wrong <= stats.binom.ppf(0.99, 500, 0.05)  # 37
    assert wrong >= stats.binom.ppf(0.01, 500, 0.02)  # a test that never says anything would be no test
    seeds_only = [2 * stats.t.sf(abs(each.value) / math.sqrt(each.variance_seeds), each.num_seeds - 1) for each in found]
    assert np.mean(np.array(seeds_only) < 0.05) > naive_at_least  # the paired t-test over seeds, which misleads


def test_independent_rows_tell_equal_variants_apart_too_often() -> None:
    rng = np.random.default_rng(11)
    wrong = {"user": 0, "none": 0}
    for _ in range(300):
        baseline, variant = simulated(rng, users=100, skill=0.0, user_error=1.2)
        wrong["user"] += paired_difference("auc", baseline, variant).p_value < 0.05
        without = paired_difference("auc", replace(baseline, user=None), replace(variant, user=None))
        wrong["none"] += without.p_value < 0.05
    assert wrong["user"] <= stats.binom.ppf(0.99, 300, 0.05)
    assert wrong["none"] > stats.binom.ppf(0.99, 300, 0.05)


def test_a_planted_gain_is_found_with_the_stated_power() -> None:
    rng = np.random.default_rng(12)
    without = [paired_difference("auc", *simulated(rng, users=500)) for _ in range(100)]
    wish = float(np.mean([smallest_detectable(each) for each in without]))
    gains = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    differences = []
    for gain in gains:
        # Over very many users
        sides = simulated(np.random.default_rng(13), users=20_000, seeds=1, gain=gain, skill=0.0)
        areas = [roc_auc_score(each.label, each.prediction[0]) for each in sides]
        differences.append(areas[1] - areas[0])
    planted = float(np.interp(wish, np.array(differences) - differences[0], gains))
    found = [paired_difference("auc", *simulated(rng, users=500, gain=planted)) for _ in range(300)]
    assert np.mean([each.value for each in found]) == pytest.approx(wish, rel=0.1)
    rate = np.mean([outcome(each) == "better" for each in found])
    assert 0.74 < rate < 0.86
    assert not any(outcome(each) == "worse" for each in found)


@pytest.mark.parametrize(
    ("metric", "kind", "users"),
    [("auc", "click", 150), ("gauc", "click", 150), ("log_loss", "click", 150), ("xauc", "dwell", 60), ("mae", "dwell", 250)],
)
def test_intervals_cover_the_true_difference(metric: str, kind: str, users: int) -> None:
    rng = np.random.default_rng(14)
    found = [
        paired_difference(metric, *simulated(rng, kind=kind, users=users, gain=0.15), bootstrap_draws=200) for _ in range(500)
    ]
    truth = np.mean([each.value for each in found])  # known to 1 / sqrt(500) of a standard error
    assert abs(truth) > 0
    # of four seeds somewhat more than it says
    assert 0.93 <= np.mean([each.low <= truth <= each.high for each in found]) <= 0.985
