"""Variances over users, by placement values and by the bootstrap, against brute force.

Legend: N rows, G users, R runs.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_comparisons import simulated
from sklearn.metrics import roc_auc_score

from mtrec import metrics
from mtrec.compare.auc_variance import auc_influence, placements
from mtrec.compare.bootstrap import SUM_METRICS, Rows, bootstrap, user_counts
from mtrec.compare.statistics import (
    paired_difference,
)
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
