"""The statistics of comparisons, against brute force, and against simulated comparisons whose truth is known.

Legend: N rows, G users, R runs.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from mtrec import metrics
from mtrec.compare.auc_variance import auc_influence, placements
from mtrec.compare.bootstrap import SUM_METRICS, Rows, bootstrap, user_counts
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
from mtrec.compare.xauc_variance import weight_below, xauc_influence

NUMBERS = np.ndarray


def some_rows(seed: int, users: int = 12, binary: bool = True) -> tuple[NUMBERS, NUMBERS, NUMBERS, NUMBERS]:
    """(predictions (2, N) with ties, labels, weights, user numbers)."""
    rng = np.random.default_rng(seed)
    user = np.sort(rng.integers(0, users, 6 * users))
    user[:users] = np.arange(users)
    label = rng.integers(0, 2 if binary else 5, len(user)).astype(float)
    prediction = rng.integers(0, 8, (2, len(user))) + label
    return prediction.astype(float), label, rng.integers(1, 4, len(user)).astype(float), user


def pair_wins(prediction: NUMBERS) -> NUMBERS:
    """(N, N): 1 where the row's prediction is the greater, 1/2 where equal."""
    return (prediction[:, None] > prediction[None]) + 0.5 * (prediction[:, None] == prediction[None])


# --- AUC and XAUC: placement values


@pytest.mark.parametrize("seed", range(3))
def test_placements_are_shares_of_pairs(seed: int) -> None:
    predictions, label, weight, _ = some_rows(seed)
    for prediction in predictions:
        wins, positive = pair_wins(prediction), label == 1
        found = placements(prediction, label, weight)
        for row in range(len(label)):
            others = positive != positive[row]
            share = np.average(wins[row, others] if positive[row] else wins[others, row], weights=weight[others])
            assert found[row] == pytest.approx(share, abs=1e-12)
        assert np.average(found[positive], weights=weight[positive]) == pytest.approx(
            roc_auc_score(label, prediction, sample_weight=weight), abs=1e-12
        )


def obuchowski(predictions: NUMBERS, label: NUMBERS, user: NUMBERS) -> NUMBERS:
    """(2, 2) covariance of two AUCs as printed in the paper, with loops over rows and users."""
    positive, negative = np.flatnonzero(label == 1), np.flatnonzero(label == 0)
    m, n = len(positive), len(negative)
    groups = np.unique(user)
    tests = []
    for prediction in predictions:
        wins = pair_wins(prediction)
        auc = np.mean([wins[i, j] for i in positive for j in negative])
        ten = {i: np.mean([wins[i, j] for j in negative]) for i in positive}
        one = {j: np.mean([wins[i, j] for i in positive]) for j in negative}
        of_positives = [sum(ten[i] - auc for i in positive if user[i] == g) for g in groups]
        of_negatives = [sum(one[j] - auc for j in negative if user[j] == g) for g in groups]
        tests.append((of_positives, of_negatives))
    i10, i01, i = len(np.unique(user[positive])), len(np.unique(user[negative])), len(groups)
    covariance = np.zeros((2, 2))
    for r, s in itertools.product(range(2), range(2)):
        s10 = i10 / ((i10 - 1) * m) * np.dot(tests[r][0], tests[s][0])
        s01 = i01 / ((i01 - 1) * n) * np.dot(tests[r][1], tests[s][1])
        s11 = i / (i - 1) * np.dot(tests[r][0], tests[s][1])
        s11_turned = i / (i - 1) * np.dot(tests[s][0], tests[r][1])
        covariance[r, s] = s10 / m + s01 / n + (s11 + s11_turned) / (m * n)
    return covariance


@pytest.mark.parametrize("seed", range(4))
def test_auc_variance_is_obuchowskis(seed: int) -> None:
    predictions, label, _, user = some_rows(seed)
    found = auc_influence(predictions, label, np.ones(len(label)), user, 12)
    for prediction, area in zip(predictions, found.auc, strict=True):
        assert area == pytest.approx(roc_auc_score(label, prediction), abs=1e-12)
    covariance = obuchowski(predictions, label, user)
    for contrast in (np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.array([-1.0, 1.0])):
        assert found.variance(contrast) == pytest.approx(contrast @ covariance @ contrast, rel=1e-9)


def test_rows_as_users_give_delong() -> None:
    predictions, label, _, _ = some_rows(1)
    found = auc_influence(predictions, label, np.ones(len(label)), np.arange(len(label)), len(label))
    values = np.stack([placements(each, label, np.ones(len(label))) for each in predictions])
    positive = label == 1
    covariance = np.cov(values[:, positive]) / positive.sum() + np.cov(values[:, ~positive]) / (~positive).sum()
    contrast = np.array([-1.0, 1.0])
    assert found.variance(contrast) == pytest.approx(contrast @ covariance @ contrast, rel=1e-9)


def test_weights_of_auc_count_as_repeated_rows() -> None:
    predictions, label, weight, user = some_rows(2)
    times = weight.astype(int)
    weighted = auc_influence(predictions, label, weight, user, 12)
    repeated = [np.repeat(each, times, axis=-1) for each in (predictions, label, user)]
    copied = auc_influence(repeated[0], repeated[1], np.ones(len(repeated[1])), repeated[2], 12)
    np.testing.assert_allclose(weighted.auc, copied.auc, atol=1e-12)
    assert weighted.variance(np.array([-1.0, 1.0])) == pytest.approx(copied.variance(np.array([-1.0, 1.0])), rel=1e-9)


def test_auc_without_a_class_is_undefined() -> None:
    found = auc_influence(np.array([[0.1, 0.2, 0.3]]), np.ones(3), np.ones(3), np.arange(3), 3)
    assert math.isnan(found.auc[0])
    assert math.isnan(found.variance(np.ones(1)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40))
def test_weight_below_is_that_of_all_pairs(rows: list[tuple[int, int, int]]) -> None:
    first, second, weight = np.array(rows, float).T
    below = (first[None] < first[:, None]) & (second[None] < second[:, None])
    np.testing.assert_allclose(weight_below(first, second, weight), below @ weight, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_xauc_influence_is_that_of_all_pairs(seed: int) -> None:
    predictions, label, weight, user = some_rows(seed, binary=False)
    values, influence = xauc_influence(predictions, label, weight, user, 12)
    pairs = weight[:, None] * weight[None] * (label[:, None] != label[None])
    for prediction, value, found in zip(predictions, values, influence, strict=True):
        wins = pair_wins(prediction)
        right = np.where(label[:, None] > label[None], wins, wins.T)
        assert value == pytest.approx(metrics.xauc(prediction, label, weight), abs=1e-12)
        by_row = 2 * np.sum(pairs * (right - value), axis=1) / np.sum(pairs)
        np.testing.assert_allclose(found, np.bincount(user, by_row, 12), atol=1e-12)


def test_xauc_of_two_labels_varies_as_auc() -> None:
    predictions, label, weight, user = some_rows(3)
    area = auc_influence(predictions, label, weight, user, 12)
    value, influence = xauc_influence(predictions, label, weight, user, 12)
    np.testing.assert_allclose(value, area.auc, atol=1e-12)
    summed = area.positive / area.positive_weight.sum() + area.negative / area.negative_weight.sum()
    np.testing.assert_allclose(influence, summed, atol=1e-12)


# --- The bootstrap over users


def whole_metric(name: str, prediction: NUMBERS, label: NUMBERS, weight: NUMBERS, user: NUMBERS) -> float:
    """The metric of `mtrec.metrics`."""
    if name in ("auc", "xauc", "log_loss", "normalized_entropy", "calibration"):
        return float(getattr(metrics, name)(prediction, label, weight))
    if name == "gauc":
        return metrics.gauc(prediction, label, user, weight)[0]
    if name == "accuracy":
        multiclass = metrics.MulticlassMetrics(prediction.shape[1])
        multiclass.update(prediction, label, weight)
        return multiclass.compute()[name]
    if name in ("sum_ratio", "r2_log1p"):
        dwell = metrics.DwellMetrics()
        dwell.update(prediction, label, weight, prediction)
        return dwell.compute()[name]
    number = metrics.RegressionMetrics()
    number.update(prediction, label, weight)
    return number.compute()[name]


def rows_for(name: str, seed: int = 0, users: int = 12) -> tuple[NUMBERS, NUMBERS, NUMBERS, NUMBERS]:
    """(predictions (2, N[, C]), labels, weights, users) that suit the metric."""
    binary = name in ("auc", "gauc", "log_loss", "normalized_entropy", "calibration")
    predictions, label, weight, user = some_rows(seed, users, binary)
    if binary:
        predictions = predictions / 10 + 0.02
    elif name == "accuracy":
        predictions = np.random.default_rng(seed).dirichlet(np.ones(5), predictions.shape)
    return predictions, label, weight, user


@pytest.mark.parametrize("name", sorted(SUM_METRICS))
def test_sums_over_users_give_the_metric_in_every_draw(name: str) -> None:
    predictions, label, weight, user = rows_for(name)
    runs = [Rows(each, label, weight, user, 12) for each in predictions]
    value, drawn = bootstrap(SUM_METRICS[name], runs, 7, seed=3)
    for run, prediction in enumerate(predictions):
        assert value[run] == pytest.approx(whole_metric(name, prediction, label, weight, user), rel=1e-9)
        for draw, counts in enumerate(user_counts(12, 7, seed=3)):
            # Each copy of a user is a user of its own
            rows = np.concatenate([np.flatnonzero(user == g) for g in range(12) for _ in range(int(counts[g]))])
            copy = np.concatenate([np.full(np.sum(user == g), 100 * g + c) for g in range(12) for c in range(int(counts[g]))])
            expected = whole_metric(name, prediction[rows], label[rows], weight[rows], copy)
            assert drawn[draw, run] == pytest.approx(expected, rel=1e-9)


def test_log_loss_of_classes_is_that_of_the_own_class() -> None:
    predictions, label, weight, user = rows_for("accuracy")
    value, _ = bootstrap(SUM_METRICS["log_loss"], [Rows(predictions[0], label, weight, user, 12)], 2, seed=0)
    multiclass = metrics.MulticlassMetrics(5)
    multiclass.update(predictions[0], label, weight)
    assert value[0] == pytest.approx(multiclass.compute()["log_loss"], rel=1e-12)


def test_draws_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = user_counts(30, 20, seed=5)
    monkeypatch.setattr("mtrec.compare.bootstrap.CHUNK_NUMBERS", 70)
    np.testing.assert_array_equal(user_counts(30, 20, seed=5), whole)
    assert (whole.sum(axis=1) == 30).all()
    assert whole.max() > 2


@pytest.mark.parametrize("name", ["auc", "xauc"])
def test_placement_variance_agrees_with_the_bootstrap(name: str) -> None:
    rng = np.random.default_rng(4)
    baseline, variant = simulated(rng, users=80, kind="click" if name == "auc" else "dwell")
    user, counts = baseline.user, user_counts(80, 400, seed=2)
    assert user is not None
    measure = metrics.auc if name == "auc" else metrics.xauc
    seeds = list(baseline.prediction)[:2]
    left, right = (replace(each, prediction={s: each.prediction[s] for s in seeds}) for each in (baseline, variant))
    found = paired_difference(name, left, right)

    def difference(weight: NUMBERS) -> float:
        sides = [[measure(each.prediction[s], each.label, weight) for s in seeds] for each in (left, right)]
        return float(np.mean(sides[1]) - np.mean(sides[0]))

    drawn = [difference(count[user]) for count in counts]
    # 400 draws know a variance to 7 %
    assert found.variance_users == pytest.approx(np.var(drawn, ddof=1), rel=0.2)
    assert found.value == pytest.approx(difference(np.ones(len(user))), abs=1e-12)


# --- One comparison


def simulated(
    rng: np.random.Generator,
    *,
    users: int = 250,
    seeds: int = 4,
    gain: float = 0.0,
    kind: str = "click",
    skill: float = 0.05,
    user_error: float = 0.6,
) -> tuple[Scores, Scores]:
    """Two variants with equal populations (but for `gain`) on a fresh test set.

    Users differ in size and taste; each variant errs on users and rows in its own way, that all its seeds share; a seed has a
    skill of its own and errs on rows of its own. Dwell is log-normal up to the length of the video.
    """
    user = np.repeat(np.arange(users), rng.geometric(0.15, users))
    truth = rng.normal(0, 0.8, users)[user] + rng.normal(0, 1, len(user))
    if kind == "click":
        label = (rng.random(len(user)) < 1 / (1 + np.exp(1 - truth))).astype(float)
    else:
        label = np.minimum(np.exp(truth + rng.normal(0, 1, len(user))), 15) * (rng.random(len(user)) < 0.8)
    sides = []
    for side in range(2):
        own = user_error * rng.normal(0, 1, users)[user] + 0.6 * rng.normal(0, 1, len(user))
        predictions = {}
        for seed in range(seeds):
            signal = (1 + skill * rng.normal() + (side - 0.5) * gain) * truth + own + 0.3 * rng.normal(0, 1, len(user))
            predictions[seed] = 1 / (1 + np.exp(1 - signal)) if kind == "click" else np.minimum(np.exp(signal), 15)
        sides.append(Scores(predictions, label, user))
    return sides[0], sides[1]


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
