"""How much of its files the reader holds at once."""

import dataclasses
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_files import write_files

from mtrec import dataset as dataset_module
from mtrec.dataset import Source, open_dataset
from mtrec.reader import Reader
from mtrec.windows import windows_held


def peak_bytes(path: Path, rows_total: int, row_group_size: int) -> int:
    random = np.random.default_rng(0)
    columns = {f"x{i}": random.integers(0, 1 << 60, rows_total) for i in range(10)}
    layout = {"row_group_size": row_group_size, "use_dictionary": False, "data_page_size": 65_536}
    pq.write_table(pa.table(columns), path, **layout)
    dataset = open_dataset(Source(str(path)), list(columns), place="data.train")
    before, peak, total = pa.total_allocated_bytes(), 0, 0
    for piece in Reader(dataset, list(columns), batch_size=256, num_streams=2, shuffle_window=2_048, prefetch=2):
        peak = max(peak, pa.total_allocated_bytes() - before)
        total += piece.record_batch.num_rows
    assert total == rows_total
    return peak


def test_memory_grows_neither_with_the_rows_nor_with_the_row_groups(tmp_path: Path) -> None:
    small = peak_bytes(tmp_path / "small.parquet", 20_000, 20_000)
    many = peak_bytes(tmp_path / "many.parquet", 200_000, 20_000)
    large = peak_bytes(tmp_path / "large.parquet", 200_000, 200_000)  # 16 MB decoded
    assert many < 1.5 * small
    assert large < 1.5 * small
    assert small < 8_000_000


class _Ready:
    """What a window is prepared as; it counts the rows of those that are still there."""

    alive, most = 0, 0
    lock = threading.RLock()  # they are made in one thread and let go in another

    def __init__(self, rows: int) -> None:
        self.rows = rows
        with self.lock:
            _Ready.alive += rows
            _Ready.most = max(_Ready.most, _Ready.alive)

    def __del__(self) -> None:
        with self.lock:
            _Ready.alive -= self.rows


@pytest.mark.parametrize(
    ("sizes", "window", "num_streams", "wide"),
    [
        ([[1_000] * 4], 50, 2, False),  # of large row groups, of which four windows are decoded at once
        ([[40] * 100], 100, 2, False),  # small ones are put together
        ([[1_000]], 300, 4, False),
        ([[60, 0, 20]], 100, 1, False),  # fewer rows than there may be
        ([[110, 100, 100, 100, 100]], 100, 1, True),  # windows of 55 and 100 rows, one by one
        ([[110] * 5], 100, 1, False),  # no more than a row group is decoded at once
        ([[100, 10] * 20], 100, 1, False),  # short windows between long ones
    ],
)
def test_readers_hold_no_more_rows_than_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[list[int]], window: int, num_streams: int, wide: bool
) -> None:
    monkeypatch.setattr(_Ready, "alive", 0)
    monkeypatch.setattr(_Ready, "most", 0)
    dataset = write_files(tmp_path, sizes)
    if wide:
        monkeypatch.setattr(dataset_module, "_LEAST_ROWS", 10)
        dataset = dataclasses.replace(dataset, list_bytes={"tags": 1e9})

    def prepare(batch: pa.RecordBatch, orders: list[np.ndarray]) -> list[_Ready]:
        return [_Ready(len(order)) for order in orders]

    options = {"shuffle_window": window, "num_streams": num_streams, "batch_size": num_streams * 5, "prefetch": 1}
    pieces = Reader(dataset, ["row"], **options).map(lambda piece: sum(piece.stream_rows), prepare, keep_rows=False)
    assert sum(pieces) == dataset.num_rows
    told = windows_held(dataset, num_streams, window)
    assert 0.6 * told <= _Ready.most <= told <= dataset.num_rows
