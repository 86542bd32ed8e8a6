"""Metrics as plain functions, against scikit-learn and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import TIGHT, binary_data, brute_gauc, brute_xauc, number_data
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from mtrec.metrics import (
    NULL_GROUP,
    DwellMetrics,
    RegressionMetrics,
    auc,
    calibration,
    calibration_error,
    gauc,
    log_loss,
    normalized_entropy,
    xauc,
)
from mtrec.metrics.ranking import ascending_pairs


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("num_rows", "levels"), [(12, 4), (400, 9), (70_000, 300), (140_000, 10**6)])
def test_auc_and_log_loss_agree_with_scikit_learn(num_rows, levels, weighted):
    prediction, label, _, weight = binary_data(num_rows, 1, levels)
    weight = weight if weighted else None
    wanted = roc_auc_score(label, prediction, sample_weight=weight)
    assert auc(prediction, label, weight) == pytest.approx(wanted, **TIGHT)
    wanted = sklearn_log_loss(label, prediction, sample_weight=weight)
    assert log_loss(prediction, label, weight) == pytest.approx(wanted, **TIGHT)
    rate = np.average(label, weights=weight)
    entropy = sklearn_log_loss(label, np.full(num_rows, rate), sample_weight=weight)
    assert normalized_entropy(prediction, label, weight) == pytest.approx(wanted / entropy, **TIGHT)
    weight = np.ones(num_rows) if weight is None else weight
    assert calibration(prediction, label, weight) == pytest.approx((prediction @ weight) / (label @ weight), **TIGHT)


def test_log_loss_clips_as_documented():
    assert log_loss([0.0, 1.0], [1, 0]) == pytest.approx(-math.log(np.finfo(float).eps), **TIGHT)
    assert log_loss([0.0, 1.0], [0, 1]) == pytest.approx(0.0, abs=1e-15)
    assert log_loss([0.0, 1.0, 0.3], [1, 1, 0]) == pytest.approx(sklearn_log_loss([1, 1, 0], [0.0, 1.0, 0.3]), **TIGHT)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("groups", [1, 7, 60, 900])
def test_gauc_agrees_with_a_loop_over_groups(groups, weighted):
    prediction, label, group, weight = binary_data(3_000, 2, groups=groups)
    group[::17] = NULL_GROUP
    wanted = brute_gauc(prediction, label, group, weight if weighted else np.ones(len(label)))
    assert gauc(prediction, label, group, weight if weighted else None) == pytest.approx(wanted, **TIGHT)


def test_gauc_of_groups_longer_than_a_chunk():
    prediction, label, group, _ = binary_data(200_000, 3, levels=5_000, groups=-1)  # two groups, -3 and -2
    assert set(group) == {-3, -2}
    wanted = brute_gauc(prediction, label, group, np.ones(200_000))
    assert gauc(prediction, label, group) == pytest.approx(wanted, **TIGHT)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_rows", [2, 3, 64, 65, 300])
def test_xauc_agrees_with_all_pairs(num_rows, weighted):
    prediction, label, weight = number_data(num_rows, 4)
    label[0] += 1  # at least one pair differs
    wanted = brute_xauc(prediction, label, weight if weighted else np.ones(num_rows))
    assert xauc(prediction, label, weight if weighted else None) == pytest.approx(wanted, **TIGHT)


def test_xauc_of_a_binary_label_is_auc():
    prediction, label, _, weight = binary_data(100_000, 5)
    assert xauc(prediction, label) == pytest.approx(roc_auc_score(label, prediction), **TIGHT)
    wanted = roc_auc_score(label, prediction, sample_weight=weight)
    assert xauc(prediction, label, weight) == pytest.approx(wanted, **TIGHT)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0, 3.0])), min_size=2, max_size=40
    )
)
def test_ranks_of_few_values(rows):
    prediction, label, weight = (np.array(column, np.float64) for column in zip(*rows, strict=True))
    pairs = itertools.combinations(range(len(label)), 2)
    wanted = sum(weight[i] * weight[j] for i, j in pairs if label[i] < label[j])
    assert ascending_pairs(label, weight) == pytest.approx(wanted, **TIGHT)
    total = sum(weight[i] * weight[j] for i, j in itertools.combinations(range(len(label)), 2) if label[i] != label[j])
    if total == 0:
        assert math.isnan(xauc(prediction, label, weight))
    else:
        assert xauc(prediction, label, weight) == pytest.approx(brute_xauc(prediction, label, weight), **TIGHT)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_row_of_weight_two_is_two_rows(seed):
    prediction, label, group, _ = binary_data(40, seed, levels=6, groups=3)
    twice = np.random.default_rng(seed).integers(0, 3, 40)
    rows = np.repeat(np.arange(40), twice)
    for metric in (auc, xauc, log_loss, calibration):
        found, wanted = metric(prediction, label, twice), metric(prediction[rows], label[rows])
        assert found == pytest.approx(wanted, nan_ok=True, **TIGHT)
    wanted = gauc(prediction[rows], label[rows], group[rows])
    assert gauc(prediction, label, group, twice) == pytest.approx(wanted, nan_ok=True, **TIGHT)


def test_calibration_error_agrees_with_a_loop_over_bins():
    rng = np.random.default_rng(6)
    prediction, weight = rng.beta(1, 9, 4_000), rng.gamma(2.0, size=4_000)
    label = (rng.random(4_000) < prediction**1.3).astype(float)
    bins = np.split(np.argsort(prediction), 20)
    for w in (np.ones(4_000), weight):
        wanted = sum(abs(w[b] @ (prediction[b] - label[b])) for b in bins) / w.sum()
        deviations = [math.sqrt(w[b] ** 2 @ (prediction[b] * (1 - prediction[b]))) for b in bins]
        noise = math.sqrt(2 / math.pi) * sum(deviations) / w.sum()
        assert calibration_error(prediction, label, w) == pytest.approx((wanted, noise), **TIGHT)


def test_equal_predictions_share_a_calibration_bin():
    # Sorted into bins by label, half of the rows would seem to be all positive and half all negative
    assert calibration_error(np.full(1_000, 0.25), np.arange(1_000) % 4 == 0)[0] == pytest.approx(0.0, abs=1e-12)
    # The middle one of the three equal rows is in the second bin, so the first holds 0.1 alone
    found = calibration_error([0.1, 0.2, 0.2, 0.2], [1, 0, 0, 0], bins=2)[0]
    assert found == pytest.approx((0.9 + 0.6) / 4, **TIGHT)


@pytest.mark.parametrize(("rate", "tolerance"), [(0.3, 0.02), (0.02, 0.02), (0.001, 0.10)])
def test_ece_if_calibrated_is_the_mean_over_calibrated_labels(rate, tolerance):
    rng = np.random.default_rng(7)
    prediction = rng.uniform(0.5, 1.5, 20_000) * rate  # 1,000 rows a bin: 300, 20, 1 positives expected
    errors = [calibration_error(prediction, rng.random(20_000) < prediction)[0] for _ in range(40)]
    expected = calibration_error(prediction, np.zeros(20_000))[1]
    assert np.mean(errors) == pytest.approx(expected, rel=tolerance + 3 * np.std(errors) / expected / math.sqrt(40))


@pytest.mark.parametrize("label", [12.345, 30.0, 1e-9, 0.0, 1e9])
@pytest.mark.parametrize("rows", [3, 1_000])
def test_r2_of_equal_labels_is_undefined(label: float, rows: int) -> None:
    metrics, dwell = RegressionMetrics(), DwellMetrics()
    for part in range(2):
        predictions = np.linspace(0.0, 1.0 + part, rows)
        metrics.update(predictions, np.full(rows, label))
        dwell.update(predictions, np.full(rows, label), log_prediction_N=predictions)
    assert math.isnan(metrics.compute()["r2"])
    assert math.isnan(dwell.compute()["r2_log1p"])
    metrics.update(np.zeros(1), np.full(1, label + 1e-3 * max(1.0, label)))
    assert math.isfinite(metrics.compute()["r2"])
