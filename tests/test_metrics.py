"""Metrics against scikit-learn and brute force, however rows are cut, merged and spilled."""

import itertools
import json
import math
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score, root_mean_squared_error

from mtrec.metrics import (
    METRICS,
    NULL_GROUP,
    BinaryMetrics,
    DistributionSummary,
    DwellMetrics,
    MulticlassMetrics,
    RegressionMetrics,
    auc,
    calibration,
    calibration_error,
    gauc,
    group_keys,
    log_loss,
    normalized_entropy,
    population_stability_index,
    xauc,
)
from mtrec.metrics import rows as rows_module
from mtrec.metrics.ranking import ascending_pairs
from mtrec.metrics.rows import Order, SortedRows

TIGHT = {"rel": 1e-9, "abs": 1e-9}
TINY_LIMIT = 20_000  # bytes: a buffer of some 200 rows


def binary_data(num_rows, seed, levels=37, groups=25):
    """(prediction with ties, label, group, weight)"""
    rng = np.random.default_rng(seed)
    prediction = rng.integers(1, levels, num_rows) / levels
    label = (rng.random(num_rows) < prediction).astype(np.float64)
    return prediction, label, rng.integers(-3, groups, num_rows), rng.gamma(2.0, size=num_rows)


def number_data(num_rows, seed):
    """(prediction with ties, skewed label with many zeros and ties, weight)"""
    rng = np.random.default_rng(seed)
    label = np.round(rng.exponential(5.0, num_rows)) * (rng.random(num_rows) < 0.6)
    return np.round(0.3 * label + rng.exponential(2.0, num_rows), 1), label, rng.gamma(2.0, size=num_rows)


def brute_xauc(prediction, label, weight):
    right = total = 0.0
    for i, j in itertools.combinations(range(len(label)), 2):
        if label[i] != label[j]:
            sign = np.sign(prediction[i] - prediction[j]) * np.sign(label[i] - label[j])
            right += weight[i] * weight[j] * (1 + sign) / 2
            total += weight[i] * weight[j]
    return right / total


def brute_gauc(prediction, label, group, weight):
    areas, sizes = [], []
    for key in set(group.tolist()) - {NULL_GROUP}:
        rows = group == key
        if len(set(label[rows])) == 2:
            areas.append(roc_auc_score(label[rows], prediction[rows], sample_weight=weight[rows]))
            sizes.append(weight[rows].sum())
    return np.average(areas, weights=sizes), sum(sizes) / weight.sum()


def same(found, wanted, exact=False):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if exact:
            assert found[name] == value or (math.isnan(found[name]) and math.isnan(value)), name
        else:
            assert found[name] == pytest.approx(value, nan_ok=True, **TIGHT), name


def parts_of(num_rows, parts, seed):
    """A random cut of the rows into some parts, of uneven sizes (one may be empty)."""
    owner = np.random.default_rng(seed).choice(parts, num_rows, p=np.arange(1, parts + 1) / (parts * (parts + 1) / 2))
    return [np.flatnonzero(owner == part) for part in range(parts)]


# Plain functions


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


# Accumulators


def make(kind, seed, num_rows=3_000):
    """(an empty accumulator's factory, update(accumulator, rows))"""
    prediction, label, group, weight = binary_data(num_rows, seed)
    seconds_prediction, seconds, _ = number_data(num_rows, seed)
    if kind == "binary":
        return BinaryMetrics, lambda into, i: into.update(prediction[i], label[i], group[i])
    if kind == "binary, weighted":
        return BinaryMetrics, lambda into, i: into.update(prediction[i], label[i], group[i], weight[i])
    if kind == "dwell":
        return DwellMetrics, lambda into, i: into.update(
            seconds_prediction[i], seconds[i], weight[i], np.log1p(seconds_prediction[i])
        )
    if kind == "regression":
        return RegressionMetrics, lambda into, i: into.update(seconds_prediction[i], seconds[i])
    probability = np.stack([prediction, (1 - prediction) * 0.3, (1 - prediction) * 0.7], axis=1)
    classes = np.where(label == 1, 0, 1 + group % 2)
    return (
        lambda **options: MulticlassMetrics(3, **options),
        lambda into, i: into.update(probability[i], classes[i], weight[i]),
    )


KINDS = ["binary", "binary, weighted", "dwell", "regression", "multiclass"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("spilled", [False, True])
def test_merged_parts_give_the_same(kind, parts, spilled, tmp_path):
    accumulator, update = make(kind, 8, 2_000)
    whole = accumulator()
    update(whole, np.arange(2_000))
    options = {"memory_limit_bytes": TINY_LIMIT, "spill_folder": tmp_path} if spilled else {}
    merged = accumulator(**options)
    for rows in parts_of(2_000, parts, 9):
        part = accumulator(**options)
        for batch in np.array_split(rows, 5):
            update(part, batch)
        merged.merge(part)
    same(merged.compute(), whole.compute(), exact=kind == "binary")
    same(merged.compute(), whole.compute(), exact=kind == "binary")  # computing changes nothing
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_spilled_sums_are_equal_to_the_bit_over_many_chunks():
    prediction, label, group, _ = binary_data(60_000, 20, levels=10**6, groups=4_000)
    whole, merged = BinaryMetrics(), BinaryMetrics(memory_limit_bytes=300_000)
    whole.update(prediction, label, group)
    for rows in parts_of(60_000, 3, 21):
        part = BinaryMetrics(memory_limit_bytes=200_000)
        part.update(prediction[rows], label[rows], group[rows])
        merged.merge(part)
    same(merged.compute(), whole.compute(), exact=True)


@pytest.mark.parametrize("kind", [*KINDS, "binned"])
@pytest.mark.parametrize("spilled", [False, True])
def test_pieces_and_arrays_carry_everything(kind, spilled):
    accumulator, update = make("binary" if kind == "binned" else kind, 10, 2_000)
    options = {"memory_limit_bytes": TINY_LIMIT} if spilled else {}
    metrics = accumulator(**options, **({"bins": 64} if kind == "binned" else {}))
    update(metrics, np.arange(2_000))
    received = type(metrics).from_arrays(metrics.arrays())
    same(received.compute(), metrics.compute())
    pieces = list(metrics.pieces(450))
    assert len(pieces) == 5
    first, *others = [type(metrics).from_arrays(piece, memory_limit_bytes=TINY_LIMIT) for piece in pieces]
    for other in others:
        first.merge(other)
    same(first.compute(), metrics.compute())
    before = metrics.arrays()
    update(metrics, np.arange(10))
    same(type(metrics).from_arrays(before).compute(), received.compute())  # a copy, not a view of the state


@pytest.mark.parametrize("kind", [*KINDS, "binned"])
def test_nothing_seen_is_nan_and_merges(kind):
    accumulator, update = make("binary" if kind == "binned" else kind, 11, 200)
    options = {"bins": 64} if kind == "binned" else {}
    empty = accumulator(**options)
    found = empty.compute()
    assert found.pop("rows") == 0
    assert found.pop("positives", 0) == 0
    assert all(math.isnan(value) for value in found.values())
    full = accumulator(**options)
    update(full, np.arange(200))
    wanted = full.compute()
    full.merge(type(full).from_arrays(empty.arrays()))
    empty.merge(full)
    same(full.compute(), wanted)
    same(empty.compute(), wanted)


def test_binary_metrics_against_the_oracles():
    prediction, label, group, weight = binary_data(5_000, 12)
    label[::7] = np.nan  # unobserved: as if the rows were not there
    prediction[::7] = np.nan
    metrics = BinaryMetrics()
    metrics.update(prediction.astype(np.float32), label.astype(np.float32), group, weight)
    rows = ~np.isnan(label)
    p, y, g, w = prediction.astype(np.float32).astype(np.float64)[rows], label[rows], group[rows], weight[rows]
    found = metrics.compute()
    wanted_gauc, coverage = brute_gauc(p, y, g, w)
    loss = sklearn_log_loss(y, p, sample_weight=w)
    rate = np.average(y, weights=w)
    same(
        found,
        {
            "auc": roc_auc_score(y, p, sample_weight=w),
            "gauc": wanted_gauc,
            "gauc_coverage": coverage,
            "log_loss": loss,
            "normalized_entropy": loss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate)),
            "calibration": (p @ w) / (y @ w),
            "ece": calibration_error(p, y, w)[0],
            "ece_if_calibrated": calibration_error(p, y, w)[1],
            "positives": int(y.sum()),
            "rows": len(y),
        },
    )


def test_dwell_and_regression_against_the_oracles():
    prediction, label, weight = number_data(500, 13)
    log_prediction = np.log1p(prediction) * 0.9
    dwell, regression = DwellMetrics(), RegressionMetrics()
    for rows in np.array_split(np.arange(500), 3):
        dwell.update(prediction[rows], label[rows], weight[rows], log_prediction[rows])
        regression.update(prediction[rows] + 1e8, label[rows] + 1e8)  # far from 0: no cancellation
    shared = {
        "mae": mean_absolute_error(label, prediction, sample_weight=weight),
        "rmse": root_mean_squared_error(label, prediction, sample_weight=weight),
        "xauc": brute_xauc(prediction, label, weight),
        "rows": 500,
    }
    r2 = r2_score(np.log1p(label), log_prediction, sample_weight=weight)
    same(dwell.compute(), {**shared, "sum_ratio": (prediction @ weight) / (label @ weight), "r2_log1p": r2})
    assert regression.compute()["r2"] == pytest.approx(r2_score(label, prediction), rel=1e-6)
    assert regression.compute()["rmse"] == pytest.approx(root_mean_squared_error(label, prediction), rel=1e-6)


def test_multiclass_against_scikit_learn():
    rng = np.random.default_rng(14)
    probability = rng.dirichlet(np.ones(4), 2_000).round(2)
    probability /= probability.sum(axis=1, keepdims=True)
    label = np.array([rng.choice(4, p=row) for row in probability]).astype(float)
    metrics = MulticlassMetrics(4)
    metrics.update(probability, label)
    metrics.update(np.full((3, 4), np.nan), np.full(3, np.nan))  # unobserved
    found = metrics.compute()
    assert found["auc"] == pytest.approx(roc_auc_score(label, probability, multi_class="ovr"), **TIGHT)
    assert found["log_loss"] == pytest.approx(sklearn_log_loss(label, probability), **TIGHT)
    assert found["accuracy"] == np.mean(probability.argmax(axis=1) == label)
    assert found["rows"] == 2_000


def test_one_class_only():
    metrics = BinaryMetrics()
    metrics.update([0.2, 0.4], [0, 0], np.array([1, 1]))
    found = metrics.compute()
    for name in ("auc", "gauc", "normalized_entropy", "calibration"):
        assert math.isnan(found[name]), name
    assert found["gauc_coverage"] == 0
    assert found["log_loss"] == pytest.approx(sklearn_log_loss([0, 0], [0.2, 0.4], labels=[0, 1]), **TIGHT)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bins", [2, 10, 100, 4_096])
def test_binned_auc_keeps_its_bound(bins, weighted):
    rng = np.random.default_rng(15)
    prediction = rng.beta(0.5, 20, 20_000)
    prediction[:50], prediction[50:100] = 0.0, 1.0
    label = rng.random(20_000) < prediction
    group, weight = rng.integers(0, 50, 20_000), rng.gamma(2.0, size=20_000) if weighted else None
    binned, exact = BinaryMetrics(bins=bins), BinaryMetrics()
    for rows in np.array_split(rng.permutation(20_000), 3):
        part = BinaryMetrics(bins=bins)
        for into in (part, exact):
            into.update(prediction[rows], label[rows], group[rows], None if weight is None else weight[rows])
        binned.merge(part)
    found, wanted = binned.compute(), exact.compute()
    bound = found.pop("auc_error_bound")
    error = abs(found["auc"] - wanted["auc"])
    assert error <= bound <= 0.5
    assert bins < 4_096 or bound < 1e-3
    assert bins > 2 or error > 1e-4  # the bound is not held for want of an error
    for name in ("gauc", "gauc_coverage", "log_loss", "normalized_entropy", "calibration", "positives", "rows"):
        assert found[name] == pytest.approx(wanted[name], **TIGHT), name
    assert bins < 4_096 or found["ece"] == pytest.approx(wanted["ece"], rel=0.05)


def test_update_errors_name_the_row():
    metrics = BinaryMetrics()
    with pytest.raises(ValueError, match=r"`prediction` should be finite, from 0 to 1\. Found 1\.5 in row 2\."):
        metrics.update([0.1, 9.0, 1.5], [0, np.nan, 1])
    with pytest.raises(ValueError, match=r"`label` should be 0, 1 or NaN \(unobserved\)\. Found 2\.0 in row 1\."):
        metrics.update([0.1, 0.2], [np.nan, 2])
    with pytest.raises(ValueError, match=r"`weight` should be finite and not negative\. Found -1\.0 in row 0\."):
        metrics.update([0.1], [0], weight_N=[-1.0])
    with pytest.raises(ValueError, match="`group` should be int64"):
        metrics.update([0.1], [0], np.array([1.0]))
    with pytest.raises(ValueError, match="of one length"):
        metrics.update([0.1], [0, 1])
    with pytest.raises(ValueError, match=r"`label` should be finite, from 0 to inf\. Found -1\.0 in row 1\."):
        DwellMetrics().update([1.0, 1.0], [0.0, -1.0])
    with pytest.raises(ValueError, match=r"`log_prediction` should be finite\. Found nan in row 1\."):
        DwellMetrics().update([1.0, 1.0], [np.nan, 1.0], log_prediction_N=[0.0, np.nan])
    with pytest.raises(ValueError, match="`label` should be a whole number from 0 to 1"):
        MulticlassMetrics(2).update([[0.5, 0.5]], [2])
    assert metrics.compute()["rows"] == 0  # a refused update leaves nothing behind
    with pytest.raises(ValueError, match="`bins` should be the same"):
        metrics.merge(BinaryMetrics(bins=8))
    with pytest.raises(ValueError, match="`num_classes` should be the same"):
        MulticlassMetrics(2).merge(MulticlassMetrics(3))
    assert set(METRICS) == {"binary", "dwell", "regression", "multiclass"}


# Rows and spills


def test_runs_are_merged_in_levels(monkeypatch):
    monkeypatch.setattr(rows_module, "FAN_IN", 3)
    rng = np.random.default_rng(16)
    columns, orders = [("key", "i8"), ("value", "f8")], {"both": Order(("key", "value"), skip=("key", 4))}
    store = SortedRows(columns, orders, memory_limit_bytes=16 * 4 * 10)
    key, value = rng.integers(0, 9, 1_000), rng.integers(0, 30, 1_000).astype(float)
    for rows in np.array_split(np.arange(1_000), 90):
        store.append({"key": key[rows], "value": value[rows]})
    levels = store._runs["both"]
    assert len(levels) >= 4
    assert all(len(level) < 3 for level in levels)
    wanted = sorted((k, v) for k, v in zip(key, value, strict=True) if k != 4)
    for chunk_rows in (1, 7, 64, 5_000):
        chunks = list(store.chunks("both", chunk_rows))
        assert [(k, v) for chunk in chunks for k, v in chunk.tolist()] == wanted
        assert {len(chunk) for chunk in chunks[:-1]} <= {chunk_rows}


def test_a_constant_prediction_spills_and_merges():
    metrics = BinaryMetrics(memory_limit_bytes=TINY_LIMIT)
    metrics.update(np.full(2_000, 0.5), np.arange(2_000) % 2, np.zeros(2_000, np.int64))
    assert metrics.compute()["auc"] == metrics.compute()["gauc"] == 0.5
    dwell = DwellMetrics(memory_limit_bytes=TINY_LIMIT)
    dwell.update(np.full(2_000, 0.5), np.arange(2_000) % 5)
    assert dwell.compute()["xauc"] == 0.5


@pytest.mark.parametrize("metrics_type", [BinaryMetrics, DwellMetrics])
def test_memory_stays_within_the_limit(metrics_type):
    def peak_megabytes(limit):
        rng = np.random.default_rng(19)
        tracemalloc.start()  # knows numpy's memory; the mapped files are not counted, the system can drop their pages
        metrics = metrics_type(memory_limit_bytes=limit * 2**20)
        for _ in range(16):
            metrics.update(rng.random(50_000), rng.integers(0, 2, 50_000))
        metrics.compute()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak / 2**20

    assert peak_megabytes(4) < 4 + 10  # 20 MB of rows; beside the limit: the batch, the work arrays of a chunk
    assert peak_megabytes(1_000) > 40


def mapped_megabytes():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssFile", "RssShmem")) / 2**10


def test_spilled_rows_do_not_stay_mapped():
    rows = SortedRows([("x", "f8"), ("y", "f8")], {"x": Order(("x",))}, memory_limit_bytes=40 * 2**20)
    rng = np.random.default_rng(5)
    for _ in range(100):
        rows.append({"x": rng.random(65_536), "y": rng.random(65_536)})
    assert rows.num_runs == 9
    before, most, last = mapped_megabytes(), 0.0, -1.0
    for chunk in rows.chunks("x"):
        assert chunk["x"][0] > last
        last = chunk["x"][-1]
        most = max(most, mapped_megabytes())
    assert most - before < 10  # of 90 MB of files
    assert sum(len(piece["x"]) for piece in rows.pieces(100_000)) == rows.num_rows
    assert mapped_megabytes() - before < 10


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    metrics = BinaryMetrics(memory_limit_bytes=TINY_LIMIT, spill_folder=tmp_path / "missing")
    with pytest.raises(FileNotFoundError) as caught:
        metrics.update(np.full(2_000, 0.5), np.zeros(2_000))
    assert str(tmp_path / "missing") in "".join(caught.value.__notes__)


# Group keys


def test_group_keys_are_equal_for_equal_values_of_any_encoding():
    words = ["", "a", "b", "ab", "ba", None, "a", "\0", "\0\0", "ünï", "user_1234567890", "user_1234567891"]
    keys = group_keys(pa.array(words))
    assert keys[5] == NULL_GROUP
    assert keys[1] == keys[6]
    assert len(set(keys.tolist())) == len(set(words))
    plain = pa.array(words)
    for other in (
        pa.array(words, pa.large_string()),
        plain.dictionary_encode(),
        plain.cast(pa.binary()),
        pa.chunked_array([plain[:4], plain[4:]]),
        pa.concat_arrays([pa.array(["x", None]), plain])[2:],
    ):
        assert group_keys(other).tolist() == keys.tolist()
    assert group_keys(plain[3:5]).tolist() == keys[3:5].tolist()
    assert group_keys(pa.array([], pa.string())).tolist() == []
    assert group_keys(pa.array(["a"])).tolist() == [keys[1]]
    big = pa.array([str(number) for number in range(300_000)])
    assert len(np.unique(group_keys(big))) == 300_000


def test_the_string_hash_is_the_same_in_every_process():
    program = "import pyarrow as pa; from mtrec.metrics import group_keys; print(group_keys(pa.array(['user_7', ''])))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert found.strip() == str(group_keys(pa.array(["user_7", ""])))


def test_group_keys_of_integers_dates_and_others():
    big = [2**53 + 1, None, -5]
    assert group_keys(pa.array(big)).tolist() == [2**53 + 1, NULL_GROUP, -5]
    assert group_keys(pa.array([3, None], pa.int8())).tolist() == [3, NULL_GROUP]
    assert group_keys(pa.array([2**64 - 1, None], pa.uint64())).tolist() == [-1, NULL_GROUP]
    assert group_keys(pa.array([True, None, False])).tolist() == [1, NULL_GROUP, 0]
    assert group_keys(pa.array([19_000, None], pa.date32())).tolist() == [19_000, NULL_GROUP]
    assert group_keys(pa.array([10**15], pa.timestamp("us", "UTC"))).tolist() == [10**15]
    assert group_keys(pa.nulls(2)).tolist() == [NULL_GROUP] * 2
    with pytest.raises(ValueError, match=r"`evaluation\.group` should be a column of integers.* Found double\."):
        group_keys(pa.array([1.0]), "evaluation.group")


# Distributions


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.floats(-1e100, 1e100), st.sampled_from([0.0, 1e-13, -1e-300, 1.0, -2.5])), min_size=1, max_size=60
    ),
    shares=st.lists(st.integers(0, 20).map(lambda twentieth: twentieth / 20), min_size=1, max_size=5),
)
def test_quantiles_are_within_one_percent(values, shares):
    summary = DistributionSummary()
    summary.update(values)
    wanted = np.quantile(values, shares, method="inverted_cdf")
    assert summary.quantiles(shares) == pytest.approx(wanted, rel=0.0100001, abs=1e-12)


def test_summary_agrees_with_numpy_and_merges_exactly():
    rng = np.random.default_rng(17)
    values = np.concatenate([rng.lognormal(0, 2, 30_000), -rng.exponential(1, 5_000), np.zeros(1_000), [1e8 + 1]])
    whole, merged = DistributionSummary(), DistributionSummary()
    whole.update(values)
    for part in np.array_split(rng.permutation(values), 4):
        other = DistributionSummary()
        other.update(part)
        state = json.loads(json.dumps({name: array.tolist() for name, array in other.arrays().items()}))
        merged.merge(DistributionSummary.from_arrays(state))
    assert (whole.minimum, whole.maximum, whole.count) == (values.min(), values.max(), 36_001)
    assert whole.mean == pytest.approx(values.mean(), **TIGHT)
    assert whole.sd == pytest.approx(values.std(), **TIGHT)
    assert merged.mean == pytest.approx(whole.mean, **TIGHT)
    assert merged.sd == pytest.approx(whole.sd, **TIGHT)
    shares = np.linspace(0, 1, 21)
    assert merged.quantiles(shares) == whole.quantiles(shares)
    assert whole.stability_index(merged) == 0
    with pytest.raises(ValueError, match=r"`value` should be finite\. Found inf in row 1\."):
        whole.update([1.0, np.inf])
    empty = DistributionSummary()
    assert math.isnan(empty.mean)
    assert math.isnan(whole.stability_index(empty))


def test_stability_index_is_that_of_the_formula():
    expected, actual = np.array([10.0, 30.0, 60.0]), np.array([2.0, 3.0, 5.0])
    e, a = expected / 100, actual / 10
    wanted = np.sum(a * np.log(a / e)) + np.sum(e * np.log(e / a))  # Kullback-Leibler both ways
    assert population_stability_index(expected, actual) == pytest.approx(wanted, **TIGHT)
    assert population_stability_index(actual, expected) == pytest.approx(wanted, **TIGHT)
    emptied = population_stability_index([50, 50], [100, 0])
    assert emptied == pytest.approx((1 - 0.5) * math.log(2) + (1e-4 - 0.5) * math.log(1e-4 / 0.5), **TIGHT)
    assert math.isnan(population_stability_index([0, 0], [1, 1]))
    with pytest.raises(ValueError, match="same bins"):
        population_stability_index([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"`actual_counts` should be finite and not negative\. Found -1\.0 in row 0\."):
        population_stability_index([1, 2], [-1, 2])


def test_stability_index_of_samples():
    rng = np.random.default_rng(18)

    def summary(values):
        made = DistributionSummary()
        made.update(values)
        return made

    training = summary(rng.normal(size=50_000))
    chance = np.mean([training.stability_index(summary(rng.normal(size=2_000))) for _ in range(40)])
    assert chance == pytest.approx(9 * (1 / 50_000 + 1 / 2_000), rel=0.35)
    # PSI of N(0, 1) and N(m, 1) without binning is m^2; ten bins lose some of it
    assert training.stability_index(summary(rng.normal(0.5, 1, 50_000))) == pytest.approx(0.25, rel=0.15)
    constant = summary(np.full(100, 0.3))
    assert constant.stability_index(summary(np.full(7, 0.3))) == 0
    for moved in (0.2, 0.4):
        assert constant.stability_index(summary(np.full(100, moved))) > 1
