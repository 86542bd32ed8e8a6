"""The reader: every row once an epoch, the same batches for every number of workers, exact positions, clean ends."""

import collections
import dataclasses
import gc
import os
import re
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parquet_files import COLUMNS, write_files

from mtrec import dataset as dataset_module
from mtrec import reader as reader_module
from mtrec.dataset import Dataset, Source, open_dataset
from mtrec.files import ChangedFile
from mtrec.reader import Piece, Reader, Row
from mtrec.row_order import BY_ROW, permutation
from mtrec.windows import rows_in


def rows(piece: Piece) -> list[int]:
    return [row - 2**60 for row in piece.record_batch["row"].to_pylist()]


def streams_of(piece: Piece) -> list[list[int]]:
    """The rows of each owned stream."""
    found, start, all_rows = [], 0, rows(piece)
    for count in piece.stream_rows:
        found.append(all_rows[start : start + count])
        start += count
    assert start == len(all_rows)
    return found


def global_batches(dataset: Dataset, world_size: int, **options: object) -> list[list[list[int]]]:
    """For each global batch the rows of each of the V streams, put together from all ranks."""
    ranks = [list(Reader(dataset, COLUMNS, rank=r, world_size=world_size, **options)) for r in range(world_size)]
    assert len({len(pieces) for pieces in ranks}) == 1
    return [[stream for pieces in ranks for stream in streams_of(pieces[i])] for i in range(len(ranks[0]))]


def flat(batches: list[list[list[int]]]) -> list[int]:
    return [row for batch in batches for stream in batch for row in stream]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=5), min_size=1, max_size=4).filter(
        lambda files: sum(map(sum, files)) > 0
    ),
    num_streams=st.sampled_from([1, 3, 8]),
    piece_rows=st.integers(1, 9),
    shuffle_window=st.integers(1, 30),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63),
    num_threads=st.integers(1, 3),
    least_decoded=st.sampled_from([1, 3, 1024]),
)
def test_every_row_once_whole_and_locatable(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[list[int]],
    num_streams: int,
    piece_rows: int,
    shuffle_window: int,
    shuffle: bool,
    seed: int,
    num_threads: int,
    least_decoded: int,
) -> None:
    dataset = write_files(tmp_path_factory.mktemp("rows") / "x", sizes)
    dataset = dataclasses.replace(dataset, list_bytes={"tags": 1e9})  # so that as few rows as may be are decoded at once
    total = sum(map(sum, sizes))
    reader = Reader(
        dataset,
        COLUMNS,
        batch_size=piece_rows * num_streams,
        num_streams=num_streams,
        shuffle=shuffle,
        shuffle_window=shuffle_window,
        seed=seed,
        num_threads=num_threads,
    )
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset_module, "_LEAST_ROWS", least_decoded)
        pieces = list(reader)
    for number, piece in enumerate(pieces):
        assert piece.index == number
        found = piece.record_batch.to_pylist()
        for place, values in enumerate(found):
            row = values["row"] - 2**60
            assert values == {
                "row": row + 2**60,
                "text": None if row % 5 == 0 else f"t{row}",
                "tags": None if row % 7 == 0 else [row] * (row % 4),
                "number": None if row % 3 == 0 else row / 2,
            }
            located = reader.locate(piece, place)
            assert (located.path, located.row_group) in reader.sources(piece)
            seen.append(row)
            assert _row_at(dataset, sizes, located) == row
    assert number + 1 == reader.num_batches
    assert sorted(seen) == list(range(total))


def _row_at(dataset: Dataset, sizes: list[list[int]], located: Row) -> int:
    file = [file.path for file in dataset.files].index(located.path)
    return sum(map(sum, sizes[:file])) + sum(sizes[file][: located.row_group]) + located.row


SIZES = [[100, 0, 37], [1, 250], [64, 64, 64, 64], [3]]


@pytest.mark.parametrize("condition", [None, "row >= 1152921504606847046 and number is not null"])
def test_the_same_global_batches_for_any_number_of_workers(tmp_path: Path, condition: str | None) -> None:
    write_files(tmp_path / "x", SIZES)
    dataset = open_dataset(Source(str(tmp_path / "x"), where=condition), COLUMNS, place="data.train")
    options = {"batch_size": 64, "num_streams": 8, "shuffle_window": 40, "seed": 3}
    alone = global_batches(dataset, 1, **options)
    wanted = [row for row in range(647) if condition is None or (row >= 70 and row % 3)]
    assert sorted(flat(alone)) == wanted
    for world_size in (2, 3, 5, 8):
        assert global_batches(dataset, world_size, **options) == alone


def test_batches_are_of_one_size_and_streams_differ_by_one_row(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, SIZES)
    batches = global_batches(dataset, 3, batch_size=64, num_streams=8, shuffle_window=40)
    assert [sum(map(len, batch)) for batch in batches] == [64] * 10 + [7]
    assert {len(stream) for batch in batches[:-1] for stream in batch} == {8}
    assert {len(stream) for stream in batches[-1]} == {0, 1}


def test_fewer_rows_than_streams_and_ranks_without_rows(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, [[2], [1]])
    batches = global_batches(dataset, 8, batch_size=16, num_streams=8)
    assert sorted(flat(batches)) == [0, 1, 2]
    pieces = list(Reader(dataset, COLUMNS, batch_size=16, num_streams=8, rank=0, world_size=8))
    assert [piece.record_batch.num_rows for piece in pieces] == [0]
    assert pieces[0].record_batch.schema == dataset.schema


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("shuffle_window", [16, 40, 10_000])
def test_start_batch_equals_skipping(tmp_path: Path, world_size: int, shuffle_window: int) -> None:
    dataset = write_files(tmp_path, SIZES)
    options = {"batch_size": 48, "num_streams": 8, "shuffle_window": shuffle_window, "epoch": 2}
    whole = global_batches(dataset, world_size, **options)
    for start in (1, 5, len(whole) - 1, len(whole)):
        assert global_batches(dataset, world_size, start_batch=start, **options) == whole[start:]
    assert next(iter(Reader(dataset, COLUMNS, start_batch=5, **options))).index == 5


def test_epochs_and_seeds_differ_and_repeat(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, SIZES)

    def order(seed: int, epoch: int) -> list[int]:
        return flat(global_batches(dataset, 1, batch_size=64, shuffle_window=40, seed=seed, epoch=epoch))

    assert order(0, 0) == order(0, 0)
    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert len({tuple(found) for found in orders}) == 4
    assert len({tuple(sorted(found)) for found in orders}) == 1


def test_rows_are_permuted_by_seed_epoch_stream_and_window(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, [[80]])  # two streams of 40 rows, each two windows of 20
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        batches = global_batches(dataset, 1, batch_size=40, num_streams=2, shuffle_window=20, seed=seed, epoch=epoch)
        for window, batch in enumerate(batches):
            for stream, found in enumerate(batch):
                order = permutation(20, BY_ROW, seed, epoch, stream, window)
                assert found == [40 * stream + 20 * window + row for row in order]


def test_rows_that_where_drops_leave_their_places_empty(tmp_path: Path) -> None:
    options = {"batch_size": 64, "num_streams": 8, "shuffle_window": 40, "seed": 3}
    whole = global_batches(write_files(tmp_path, SIZES), 1, **options)
    dataset = open_dataset(Source(str(tmp_path), where="number is not null"), COLUMNS, place="data.train")
    assert global_batches(dataset, 1, **options) == [[[row for row in stream if row % 3] for stream in batch] for batch in whole]


def test_without_shuffle_files_keep_their_order_in_each_stream(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, SIZES)
    alone = global_batches(dataset, 1, batch_size=50, num_streams=1, shuffle=False)
    assert flat(alone) == list(range(647))
    batches = global_batches(dataset, 1, batch_size=64, num_streams=8, shuffle=False, shuffle_window=16)
    for stream in range(8):
        found = [row for batch in batches for row in batch[stream]]
        assert found == sorted(found)


def test_rows_are_mixed_evenly_inside_windows(tmp_path: Path) -> None:
    # a row group of 4,000 rows is one window: the first piece's rows come from all of it
    dataset = write_files(tmp_path, [[4_000]])
    first = next(iter(Reader(dataset, COLUMNS, batch_size=1_000, num_streams=1, shuffle_window=4_000)))
    counts = np.histogram(rows(first), bins=8, range=(0, 4_000))[0]
    assert counts.min() > 90  # 125 expected, standard deviation 9
    assert counts.max() < 160
    # and a batch holds rows of 8 row groups
    dataset = write_files(tmp_path / "groups", [[100] * 16])
    batches = global_batches(dataset, 1, batch_size=80, num_streams=8, shuffle_window=100)
    assert all(len({row // 100 for stream in batch for row in stream}) == 8 for batch in batches)


def test_each_row_group_is_decoded_at_most_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write_files(tmp_path, [[1_000, 900, 800], [950, 1_100]])
    decoded: collections.Counter[int] = collections.Counter()
    original = Dataset.chunks

    def counting(self: Dataset, row_group: object, columns: object, chunk_rows: int) -> object:
        for batch, mask in original(self, row_group, columns, chunk_rows):
            decoded[self.row_groups.index(row_group)] += batch.num_rows
            yield batch, mask

    monkeypatch.setattr(Dataset, "chunks", counting)
    options = {"batch_size": 60, "num_streams": 3, "shuffle_window": 100}
    assert len(flat(global_batches(dataset, 1, **options))) == dataset.num_rows
    assert all(decoded[i] <= 2 * group.num_rows for i, group in enumerate(dataset.row_groups))
    assert sum(decoded.values()) < 1.6 * dataset.num_rows


# Ends and errors


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("mtrec-reader")]


def open_files(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    targets = [os.readlink(link) for link in links if os.path.islink(link)]
    return [target for target in targets if target.startswith(str(folder))]


@pytest.mark.parametrize("num_threads", [1, 3])
def test_leaving_early_ends_the_threads_and_closes_the_files(tmp_path: Path, num_threads: int) -> None:
    dataset = write_files(tmp_path, SIZES)
    reader = Reader(dataset, COLUMNS, batch_size=8, shuffle_window=40, num_threads=num_threads)
    assert reader_threads() == []
    for piece in reader:
        assert reader_threads()
        if piece.index == 3:
            break
    del piece
    assert reader_threads() == []
    if os.path.isdir("/proc/self/fd"):
        assert open_files(tmp_path) == []
    iterator = iter(reader)
    next(iterator)
    iterator.close()
    assert reader_threads() == []
    assert len(list(reader)) == reader.num_batches  # and the reader can be used again
    assert reader_threads() == []


def test_the_transform_runs_in_the_background_in_order(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, SIZES)
    reader = Reader(dataset, COLUMNS, batch_size=64, num_threads=3)

    def transform(piece: Piece) -> tuple[int, str]:
        time.sleep(0.002 * (piece.index % 3))
        return piece.index, threading.current_thread().name

    found = list(reader.map(transform))
    assert [index for index, _ in found] == list(range(reader.num_batches))
    assert all(name.startswith("mtrec-reader") for _, name in found)


@pytest.mark.parametrize(
    ("shuffle_window", "num_threads", "together"),
    [
        (16_384, 1, [8, 3]),
        (320, 1, [5, 5, 1]),
        (60, 1, [1] * 11),
        (16_384, 2, [1] * 11),
        (130, 1, [2, 2, 2, 2, 2, 1]),
    ],
)
def test_small_pieces_are_put_together_several_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shuffle_window: int, num_threads: int, together: list[int]
) -> None:
    asked: list[range] = []
    original = reader_module._assemble

    def noted(epoch: int, first: int, pieces: Any, *arguments: Any) -> Any:
        asked.append(range(first, first + len(pieces)))
        return original(epoch, first, pieces, *arguments)

    monkeypatch.setattr(reader_module, "_assemble", noted)
    dataset = write_files(tmp_path, SIZES)
    reader = Reader(dataset, COLUMNS, batch_size=64, shuffle_window=shuffle_window, num_threads=num_threads)
    assert list(reader.map(lambda piece: piece.index)) == list(range(reader.num_batches))
    assert [index for each in sorted(asked, key=min) for index in each] == list(range(reader.num_batches))
    assert [len(each) for each in sorted(asked, key=min)] == together


class BadLabel(ValueError):
    """One that can be referred to weakly."""


def error_of(iterator: Iterator[Any]) -> BadLabel:
    try:
        next(iterator)
    except BadLabel as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("bad", [0, 1, 4, 7, 8, 10])  # eight are put together, then three
def test_an_error_in_the_transform_is_raised_at_its_piece(tmp_path: Path, bad: int) -> None:
    dataset = write_files(tmp_path, SIZES)
    reader = Reader(dataset, COLUMNS, batch_size=64)

    def transform(piece: Piece) -> int:
        if piece.index == bad:
            path, row_group, row = reader.locate(piece, 0)
            raise BadLabel(f"bad label in {path}, row group {row_group}, row {row}")
        return piece.index

    iterator = reader.map(transform)
    assert [next(iterator) for _ in range(bad)] == list(range(bad))
    gc.disable()
    try:
        error = error_of(iterator)
        assert re.search(r"bad label in .*\.parquet, row group \d, row \d+", str(error))
        assert reader_threads() == []
        raised = weakref.ref(error)
        del error
        assert raised() is None  # nor what it leads to: windows are large
    finally:
        gc.enable()


@pytest.mark.parametrize(("shuffle_window", "first", "second"), [(10, 4, 5), (40, 8, 8), (16_384, 16, 16)])
def test_prefetch_bounds_what_is_read_ahead(tmp_path: Path, shuffle_window: int, first: int, second: int) -> None:
    dataset = write_files(tmp_path, [[1_000]])
    made: list[int] = []
    reader = Reader(dataset, COLUMNS, batch_size=10, num_streams=1, prefetch=3, shuffle_window=shuffle_window)
    iterator = reader.map(lambda piece: made.append(piece.index))
    for expected in (first, second):
        next(iterator)
        deadline = time.monotonic() + 30
        while len(made) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)  # time in which one more would be made
        assert made == list(range(expected))
    iterator.close()


def test_no_batch_has_to_load_the_next_windows_of_all_streams(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, [[32] * 4, [32] * 4])
    done: list[str] = []

    def prepare(batch: pa.RecordBatch, orders: list[np.ndarray]) -> list[str]:
        done.extend(["window"] * len(orders))
        return ["something"] * len(orders)

    reader = Reader(dataset, COLUMNS, batch_size=16, num_streams=4, shuffle_window=32, prefetch=1)
    for _ in reader.map(lambda piece: done.append("piece"), prepare):
        pass
    loads = [len(each) for each in "".join("w" if what == "window" else "p" for what in done).split("p")]
    assert sum(loads) == 8
    assert loads[0] == 4  # the first windows of all
    assert loads[1:] == [0, 1, 0, 1, 0, 1, 0, 1, *[0] * 8]  # then at one, three, five and seven eighths; two pieces at once


def test_windows_of_a_large_row_group_are_decoded_and_prepared_four_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_files(tmp_path, [[100]])
    done: list[object] = []
    original = Dataset.chunks

    def noted(self: Dataset, row_group: object, columns: object, chunk_rows: int) -> object:
        for batch, mask in original(self, row_group, columns, chunk_rows):
            done.append(("decoded", batch.num_rows))
            yield batch, mask

    def prepare(batch: pa.RecordBatch, orders: list[np.ndarray]) -> list[str]:
        for window, order in enumerate(orders):
            assert sorted(order.tolist()) == list(range(window * 10, window * 10 + 10))
        done.append(("prepared", batch.num_rows))
        return ["something"] * len(orders)

    monkeypatch.setattr(Dataset, "chunks", noted)
    reader = Reader(dataset, COLUMNS, batch_size=5, num_streams=1, shuffle_window=10, prefetch=1)
    for _ in reader.map(lambda piece: None, prepare):
        pass
    assert done == [(what, number) for number in (40, 40, 20) for what in ("decoded", "prepared")]


@pytest.mark.parametrize("condition", [None, "row >= 1152921504606847046 and number is not null"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_is_prepared_of_several_windows_is_cut_into_the_same_rows(
    tmp_path: Path, condition: str | None, shuffle: bool
) -> None:
    write_files(tmp_path, [[100, 7, 3], [45, 64], [9] * 6])
    dataset = open_dataset(Source(str(tmp_path), where=condition), COLUMNS, place="data.train")
    asked: list[int] = []

    def prepare(batch: pa.RecordBatch, orders: list[np.ndarray | slice]) -> list[pa.RecordBatch | None]:
        asked.append(len(orders))
        windows = [rows_in(batch, order) for order in orders]
        return [None if 2**60 + 77 in window["row"].to_pylist() else window for window in windows]  # 77 cannot be used

    def prepared_rows(piece: Piece) -> list[tuple[list[int], bool]]:
        found = []
        for window, start, stop in piece.cuts or ():
            rows_of = (window.rows if window.prepared is None else window.prepared).slice(start, stop - start)
            found.append(([row - 2**60 for row in rows_of["row"].to_pylist()], window.prepared is not None))
        return found

    options = {"batch_size": 12, "num_streams": 2, "shuffle_window": 10, "shuffle": shuffle, "start_batch": 3}
    expected = [rows(piece) for piece in Reader(dataset, COLUMNS, **options)]
    found = list(Reader(dataset, COLUMNS, **options).map(prepared_rows, prepare))
    assert [[row for each, _ in cuts for row in each] for cuts in found] == expected
    declined = {row for cuts in found for each, ready in cuts if not ready for row in each}
    assert 77 in declined
    assert len(declined) <= 10
    assert max(asked) == 4


def test_the_rows_of_a_piece_are_those_of_all_its_windows_or_refused(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, [[10] * 4])
    reader = Reader(dataset, COLUMNS, batch_size=25, num_streams=1, shuffle=False, shuffle_window=10)
    piece = next(iter(reader))
    assert piece.cuts is not None
    assert len(piece.cuts) == 3
    assert rows(piece) == list(range(25))
    for missing in range(3):
        cuts = list(piece.cuts)
        window, start, stop = cuts[missing]
        cuts[missing] = window._replace(rows=None), start, stop
        with pytest.raises(ValueError, match="`keep_rows` should be set"):
            rows(dataclasses.replace(piece, cuts=tuple(cuts)))


def test_a_file_replaced_during_the_epoch_is_named(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, [[50] * 4, [50] * 4])
    write_files(tmp_path / "other", [[50] * 3 + [49], [50] * 4])
    reader = Reader(dataset, COLUMNS, batch_size=10, num_streams=1, shuffle=False, shuffle_window=50, prefetch=1)
    iterator = iter(reader)
    assert [row for _ in range(3) for row in rows(next(iterator))] == list(range(30))
    os.replace(tmp_path / "other" / "00.parquet", tmp_path / "00.parquet")
    with pytest.raises(ChangedFile, match=r"00\.parquet' was replaced while it was in use"):
        list(iterator)
    assert reader_threads() == []


def test_arguments_that_do_not_go_together(tmp_path: Path) -> None:
    dataset = write_files(tmp_path, [[10]])
    for options, expected in [
        ({"batch_size": 12}, r"`batch_size` should be a multiple of `num_streams` \(8\), such as 8\. Found 12\."),
        ({"batch_size": 8, "world_size": 9}, "`world_size` should be at most `num_streams`"),
        ({"batch_size": 8, "rank": 1}, "rank 1"),
        ({"batch_size": 8, "start_batch": 3}, r"`start_batch` should be between 0 and 2\. Found 3\."),
        ({"batch_size": 8, "prefetch": 0}, "`prefetch` should be a positive integer"),
    ]:
        with pytest.raises(ValueError, match=expected):
            Reader(dataset, COLUMNS, **options)
