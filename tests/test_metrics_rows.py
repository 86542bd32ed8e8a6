"""Rows that a metric keeps beyond its memory: sorted runs on disk, merged, and never held mapped."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from oracles import TINY_LIMIT

from mtrec.metrics import BinaryMetrics, DwellMetrics
from mtrec.metrics import rows as rows_module
from mtrec.metrics.rows import Order, SortedRows


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
