"""Metrics collected over batches and ranks: the same however rows are cut, merged, sent and spilled."""

import math

import numpy as np
import pytest
from oracles import TIGHT, TINY_LIMIT, binary_data, brute_gauc, brute_xauc, number_data
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score, root_mean_squared_error

from mtrec.metrics import METRICS, BinaryMetrics, DwellMetrics, MulticlassMetrics, RegressionMetrics, calibration_error

# how the metrics of two ways should agree; pytest.approx wants the same names in both, too
CLOSE = {**TIGHT, "nan_ok": True}
EXACT = {"rel": 0, "abs": 0, "nan_ok": True}


def parts_of(num_rows, parts, seed):
    """A random cut of the rows into some parts, of uneven sizes (one may be empty)."""
    owner = np.random.default_rng(seed).choice(parts, num_rows, p=np.arange(1, parts + 1) / (parts * (parts + 1) / 2))
    return [np.flatnonzero(owner == part) for part in range(parts)]


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
    for _ in range(2):  # computing changes nothing
        assert merged.compute() == pytest.approx(whole.compute(), **(EXACT if kind == "binary" else CLOSE))
    assert list(tmp_path.iterdir()) == []  # the files have no names


def test_spilled_sums_are_equal_to_the_bit_over_many_chunks():
    prediction, label, group, _ = binary_data(60_000, 20, levels=10**6, groups=4_000)
    whole, merged = BinaryMetrics(), BinaryMetrics(memory_limit_bytes=300_000)
    whole.update(prediction, label, group)
    for rows in parts_of(60_000, 3, 21):
        part = BinaryMetrics(memory_limit_bytes=200_000)
        part.update(prediction[rows], label[rows], group[rows])
        merged.merge(part)
    assert merged.compute() == whole.compute()


@pytest.mark.parametrize("kind", [*KINDS, "binned"])
@pytest.mark.parametrize("spilled", [False, True])
def test_pieces_and_arrays_carry_everything(kind, spilled):
    accumulator, update = make("binary" if kind == "binned" else kind, 10, 2_000)
    options = {"memory_limit_bytes": TINY_LIMIT} if spilled else {}
    metrics = accumulator(**options, **({"bins": 64} if kind == "binned" else {}))
    update(metrics, np.arange(2_000))
    received = type(metrics).from_arrays(metrics.arrays())
    assert received.compute() == pytest.approx(metrics.compute(), **CLOSE)
    pieces = list(metrics.pieces(450))
    assert len(pieces) == 5
    first, *others = [type(metrics).from_arrays(piece, memory_limit_bytes=TINY_LIMIT) for piece in pieces]
    for other in others:
        first.merge(other)
    assert first.compute() == pytest.approx(metrics.compute(), **CLOSE)
    before = metrics.arrays()
    update(metrics, np.arange(10))
    copied = type(metrics).from_arrays(before)  # a copy, not a view of the state
    assert copied.compute() == pytest.approx(received.compute(), **CLOSE)


@pytest.mark.parametrize("kind", [*KINDS, "binned"])
def test_a_part_sent_in_pieces_weighs_no_more_than_one_sent_whole(kind):
    accumulator, update = make("binary" if kind == "binned" else kind, 23, 600)
    options = {"bins": 64} if kind == "binned" else {}
    whole, small, large = (accumulator(**options) for _ in range(3))
    update(whole, np.arange(600))
    update(small, np.arange(200))
    update(large, np.arange(200, 600))
    merged = accumulator(**options)
    for piece in (*small.pieces(), *large.pieces(50)):
        merged.merge(type(merged).from_arrays(piece))
    assert merged.compute() == pytest.approx(whole.compute(), **CLOSE)


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
    assert full.compute() == pytest.approx(wanted, **CLOSE)
    assert empty.compute() == pytest.approx(wanted, **CLOSE)


def test_binary_metrics_against_the_oracles():
    prediction, label, group, weight = binary_data(5_000, 12)
    label[::7] = np.nan  # unobserved: as if the rows were not there
    prediction[::7] = np.nan
    metrics = BinaryMetrics()
    metrics.update(prediction.astype(np.float32), label.astype(np.float32), group, weight)
    rows = ~np.isnan(label)
    p, y, g, w = prediction.astype(np.float32).astype(np.float64)[rows], label[rows], group[rows], weight[rows]
    wanted_gauc, coverage = brute_gauc(p, y, g, w)
    loss = sklearn_log_loss(y, p, sample_weight=w)
    rate = np.average(y, weights=w)
    wanted = {
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
    }
    assert metrics.compute() == pytest.approx(wanted, **TIGHT)


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
    wanted = {**shared, "sum_ratio": (prediction @ weight) / (label @ weight), "r2_log1p": r2}
    assert dwell.compute() == pytest.approx(wanted, **TIGHT)
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


def test_a_weight_of_a_multiclass_row_is_so_many_rows():
    rng = np.random.default_rng(22)
    probability, label, weight = rng.dirichlet(np.ones(3), 300), rng.integers(0, 3, 300), rng.integers(0, 4, 300)
    weighted, repeated = MulticlassMetrics(3), MulticlassMetrics(3)
    weighted.update(probability, label, weight)
    repeated.update(np.repeat(probability, weight, axis=0), np.repeat(label, weight))
    assert weighted.compute() == pytest.approx({**repeated.compute(), "rows": 300}, **TIGHT)


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


def test_binned_auc_tells_rare_events_apart():
    rng = np.random.default_rng(24)
    prediction = np.exp(rng.uniform(math.log(1e-7), math.log(1e-5), 20_000))
    label = rng.random(20_000) < prediction * 2e4
    for p in (prediction, 1 - prediction):
        binned, exact = BinaryMetrics(bins=4_096), BinaryMetrics()
        for into in (binned, exact):
            into.update(p, label)
        assert binned.compute()["auc_error_bound"] < 0.002
        assert binned.compute()["auc"] == pytest.approx(exact.compute()["auc"], abs=0.002)


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
