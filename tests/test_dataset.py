"""Files as one dataset: partitions and windows, one schema for all, errors that name the place, what it tells."""

import dataclasses
import datetime
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_files import message, rows_of, write

from mtrec.dataset import Dataset, Source, common_files, open_dataset

# Partitions and windows


def test_hive_partitions_become_typed_columns(tmp_path: Path) -> None:
    for day, hour, country in [("2026-01-01", "07", "C%C3%B4te"), ("2026-01-02", "11", "__HIVE_DEFAULT_PARTITION__")]:
        write(tmp_path / f"dt={day}" / f"hour={hour}" / f"country={country}" / "a.parquet", x=[1, 2])
    dataset = open_dataset(Source(str(tmp_path)), ["dt", "hour", "country", "x"], place="data.train")
    assert dataset.schema.types == [pa.date32(), pa.int64(), pa.string(), pa.int64()]
    assert dataset.read(dataset.row_groups[0], ["dt", "hour", "country"]).to_pylist()[0] == {
        "dt": datetime.date(2026, 1, 1),
        "hour": 7,
        "country": "Côte",
    }
    assert rows_of(dataset, "country") == ["Côte", "Côte", None, None]
    assert dataset.minmax("dt") == (datetime.date(2026, 1, 1), datetime.date(2026, 1, 2))


@pytest.mark.parametrize("last", ["2026-01-03", datetime.date(2026, 1, 3)])
def test_window_over_partitions_keeps_both_ends_and_says_absent_days(tmp_path: Path, last: object) -> None:
    for day in (1, 2, 4, 5):
        write(tmp_path / f"dt=2026-01-0{day}" / "a.parquet", x=[day])
    dataset = open_dataset(Source(str(tmp_path), window=("2026-01-02", last)), ["x"], place="data.train")
    assert rows_of(dataset, "x") == [2]
    assert not dataset.filtered  # the folder's name decides: no row is compared
    assert any("1 of 2 days (2026-01-03)" in note for note in dataset.notes)


def test_window_over_a_named_column_of_timestamps_includes_the_last_day(tmp_path: Path) -> None:
    moments = [datetime.datetime(2026, 1, day, 23, 59) for day in (1, 2, 3)]
    write(tmp_path / "a.parquet", at=moments, x=[1, 2, 3])
    source = Source(str(tmp_path), window=("2026-01-01", "2026-01-02"), window_column="at")
    assert rows_of(open_dataset(source, ["x"], place="data.train"), "x") == [1, 2]


# One schema


def test_rows_come_in_the_datasets_types_whatever_a_file_says_beside_them(tmp_path: Path) -> None:
    fields = [pa.field("x", pa.int64(), nullable=False, metadata={"from": "x"}), pa.field("tags", pa.list_(pa.int64()))]
    for number, schema in enumerate([pa.schema(fields, {"pandas": "{}"}), None]):
        pq.write_table(pa.table({"x": [number], "tags": [[number]]}, schema), tmp_path / f"{number}.parquet")
    dataset = open_dataset(Source(str(tmp_path)), ["x", "tags"], place="data.train")
    batches = [batch for group in dataset.row_groups for batch, _ in dataset.chunks(group, ["tags", "x"], 10)]
    wanted = pa.schema([dataset.schema.field("tags"), dataset.schema.field("x")])
    assert [(batch.schema.equals(wanted), batch.schema.metadata) for batch in batches] == [(True, None)] * 2
    assert pa.concat_batches(batches).to_pylist() == [{"tags": [0], "x": 0}, {"tags": [1], "x": 1}]


def test_schema_drift_is_read_and_said(tmp_path: Path) -> None:
    write(
        tmp_path / "1.parquet",
        id=pa.array([1, 2], pa.int32()),
        name=pa.array(["a", "b"]).dictionary_encode(),
        tags=pa.array([[1], None], pa.list_(pa.int32())),
        value=pa.array([1, 2], pa.int64()),
        nothing=pa.nulls(2),
        seen=pa.array([True, False]),
    )
    write(
        tmp_path / "2.parquet",
        seen=pa.array([0, 1], pa.int8()),
        nothing=pa.array([2.5, None]),
        value=pa.array([0.5, None]),
        tags=pa.array([[2**40, None], []], pa.large_list(pa.int64())),
        name=pa.array(["c", None], pa.large_string()),
        id=pa.array([2**60 + 1, 4], pa.int64()),
        rare=pa.array([7, 8]),
    )
    columns = ["id", "name", "tags", "value", "nothing", "seen", "rare"]
    dataset = open_dataset(Source(str(tmp_path)), columns, ["rare"], place="data.train")
    table = pa.concat_tables([dataset.read(group, columns) for group in dataset.row_groups])
    assert table.schema == dataset.schema
    assert table.to_pydict() == {
        "id": [1, 2, 2**60 + 1, 4],
        "name": ["a", "b", "c", None],
        "tags": [[1], None, [2**40, None], []],
        "value": [1.0, 2.0, 0.5, None],
        "nothing": [None, None, 2.5, None],
        "seen": [1, 0, 0, 1],
        "rare": [None, None, 7, 8],
    }
    for column in columns:
        assert any(f"'{column}'" in note for note in dataset.notes), column


def test_equal_files_give_no_notes_and_a_dataset_travels_by_pickle(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", x=[1, 2])
    write(tmp_path / "2.parquet", x=[3])
    dataset = open_dataset(Source(str(tmp_path), where="x > 1"), ["x"], place="data.train")
    assert dataset.notes == ()
    assert rows_of(pickle.loads(pickle.dumps(dataset)), "x") == [2, 3]


def test_an_id_that_the_common_type_cannot_hold_is_an_error_not_rounded(tmp_path: Path) -> None:
    write(tmp_path / "1.parquet", x=[0.5])
    write(tmp_path / "2.parquet", x=[2**53 + 1])
    dataset = open_dataset(Source(str(tmp_path)), ["x"], place="data.train")
    with pytest.raises(ValueError, match=r"2\.parquet', row group 0, column 'x': int64 should become double"):
        rows_of(dataset, "x")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([1]), pa.array(["a"])),
        (pa.array([1]), pa.array([[1]])),
        (pa.array([[1]]), pa.array([["a"]])),
        (pa.array([[1, 2]], pa.list_(pa.int64(), 2)), pa.array([[1, 2, 3]], pa.list_(pa.int64(), 3))),
        (pa.array([datetime.date(2026, 1, 1)]), pa.array([datetime.datetime(2026, 1, 1)])),
    ],
)
def test_conflicting_types_name_both_files(tmp_path: Path, one: pa.Array, other: pa.Array) -> None:
    first = write(tmp_path / "1.parquet", x=one)
    second = write(tmp_path / "2.parquet", x=other)
    with pytest.raises(ValueError, match=r"`data\.train` should have one type for column 'x'") as error:
        open_dataset(Source(str(tmp_path)), ["x"], place="data.train")
    assert first in str(error.value)
    assert second in str(error.value)


# Errors


def test_missing_columns_name_the_nearest(tmp_path: Path) -> None:
    first = write(tmp_path / "1.parquet", user_id=[1], item_id=[2])
    found = message(Source(first), ["user_ids"])
    assert found == f"`data.train` should have a column 'user_ids'. Found none in '{first}'. Did you mean 'user_id'?"
    assert "Columns there: user_id, item_id." in message(Source(first), ["zzz"])
    second = write(tmp_path / "2.parquet", item_id=[2])
    found = message(Source([first, second]), ["user_id"])
    assert second in found
    assert first not in found
    assert "Other files have it." in found
    for source in (Source(first, where="user_ids > 3"), Source(first, window=(1, 2), window_column="user_ids")):
        assert "Did you mean 'user_id'?" in message(source, ["item_id"])
    for source, key in ((Source(first, where="dt > 3"), "where"), (Source(first, window=(1, 2)), "window_column")):
        assert message(source, ["item_id"]).startswith(f"`data.train.{key}` should name a column of the data. Found 'dt'.")


def test_no_rows(tmp_path: Path) -> None:
    empty = write(tmp_path / "empty.parquet", x=pa.array([], pa.int64()))
    assert "should have at least one row" in message(Source(empty), ["x"])
    full = write(tmp_path / "full.parquet", x=[1, 2, 3])
    found = message(Source([empty, full], where="x > 3"), ["x"])
    assert found.startswith("`data.train` should have at least one row. Found none with `where: x > 3`")
    assert rows_of(open_dataset(Source([empty, full]), ["x"], place="data.train"), "x") == [1, 2, 3]


# What a dataset tells


def test_fingerprint_follows_contents_and_condition_not_the_folder(tmp_path: Path) -> None:
    def fingerprint(folder: str, where: str | None = None) -> str:
        return open_dataset(Source(str(tmp_path / folder), where=where), ["x"], place="data.train").fingerprint

    write(tmp_path / "one" / "a.parquet", x=[1, 2, 3])
    write(tmp_path / "two" / "a.parquet", x=[1, 2, 3])
    write(tmp_path / "three" / "a.parquet", x=[1, 2, 4])
    assert fingerprint("one") == fingerprint("two") != fingerprint("three")
    assert fingerprint("one", "x > 1") not in (fingerprint("one"), fingerprint("one", "x > 2"))


def test_common_files_are_those_that_both_read(tmp_path: Path) -> None:
    for day in ("01", "02", "03"):
        (tmp_path / "log" / f"dt=2026-01-{day}").mkdir(parents=True)
        pq.write_table(pa.table({"user": [1, 2]}), tmp_path / "log" / f"dt=2026-01-{day}" / "a.parquet")
    (tmp_path / "link").symlink_to(tmp_path / "log")

    def opened(path: str | list[str], **limits: Any) -> Dataset:
        return open_dataset(Source(path, **limits), ["user"], place="data.train")

    log, second = str(tmp_path / "log"), str(tmp_path / "log" / "dt=2026-01-02" / "a.parquet")
    assert common_files(opened(log), opened(second)) == [second]
    assert common_files(opened(f"{tmp_path}/link"), opened(second)) == [f"{tmp_path}/link/dt=2026-01-02/a.parquet"]
    assert common_files(opened(second), opened(f"file://{log}/*/*.parquet")) == [second]
    assert len(common_files(opened(log), opened(log))) == 3
    assert common_files(opened(log, where="dt > 2026-01-02"), opened(second)) == []  # its row groups are ruled out
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(Path(second).read_bytes())
    assert common_files(opened(str(copy)), opened(second)) == []


def test_minmax_from_footers(tmp_path: Path) -> None:
    write(
        tmp_path / "1.parquet",
        row_group_size=2,
        x=[3, 1, None, None],
        s=["b", "a", "c", "d"],
        tags=[[1, 9], [], [2], None],
    )
    write(tmp_path / "2.parquet", x=[-5, 2], s=["x", "y"], tags=[[4], [3]])
    dataset = open_dataset(Source(str(tmp_path)), ["x", "s", "tags"], place="data.train")
    assert dataset.minmax("x") == (-5, 3)
    assert dataset.minmax("s") == ("a", "y")
    assert dataset.minmax("tags") == (1, 9)
    with pytest.raises(KeyError):
        dataset.minmax("y")
    bare = tmp_path / "bare" / "a.parquet"
    bare.parent.mkdir()
    pq.write_table(pa.table({"x": [1, 2]}), bare, write_statistics=False)
    assert open_dataset(Source(str(bare)), ["x"], place="data.train").minmax("x") is None
    # row groups that are kept in part may have extremes that no kept row has
    source = Source([str(tmp_path / "1.parquet"), str(tmp_path / "2.parquet")], where="x > -5")
    assert open_dataset(source, ["x", "s"], place="data.train").minmax("x") is None


def test_sample_is_spread_filtered_and_bounded(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", row_group_size=100, x=list(range(10_000)))
    dataset = open_dataset(Source(str(tmp_path), where="x >= 5000 and x != 5100"), ["x"], place="data.train")
    sample = dataset.sample(320, ["x"])["x"].to_pylist()
    assert len(sample) == len(set(sample)) == 320
    assert min(sample) < 5500
    assert max(sample) > 9500
    assert all(x >= 5000 and x != 5100 for x in sample)
    assert sample == dataset.sample(320, ["x"])["x"].to_pylist()
    assert sorted(dataset.sample(100_000, ["x"])["x"].to_pylist()) == [x for x in range(5000, 10_000) if x != 5100]


def test_fewer_rows_are_decoded_at_once_where_they_are_large(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).normal(size=2_000 * 500)
    vectors = pa.ListArray.from_arrays(np.arange(0, len(numbers) + 1, 500, dtype=np.int32), pa.array(numbers))
    path = write(tmp_path / "a.parquet", 1_000, vector=vectors, id=range(2_000))
    wide, narrow = (open_dataset(Source(path), [name], ["none"], place="data.train") for name in ("vector", "id"))
    assert wide.list_bytes == {"vector": pytest.approx(500 * (8 + 4), rel=0.1)}
    assert narrow.list_bytes == {}
    assert (wide.rows_at_once(65_536), narrow.rows_at_once(65_536)) == (2_048, 65_536)
    assert wide.rows_at_once(1_000) == 1_000
    assert dataclasses.replace(wide, list_bytes={"vector": 1e9}).rows_at_once(65_536) == 1_024
    flags = pa.ListArray.from_arrays(vectors.offsets, pa.array((numbers > 0).astype(np.float32)))
    small = write(tmp_path / "b.parquet", 2_000, vector=flags)  # 1 bit a number in the file
    assert open_dataset(Source(small), ["vector"], place="data.train").list_bytes == {"vector": 500 * (4 + 4)}


def test_what_a_row_takes_is_told_by_the_largest_row_group(tmp_path: Path) -> None:
    lists, first = pa.array([[float(number)] * 3 for number in range(3_000)]), tmp_path / "a.parquet"
    with pq.ParquetWriter(first, pa.schema({"x": lists.type})) as writer:
        for part in (lists[:1], lists[1:]):
            writer.write_table(pa.table({"x": part}))
    assert open_dataset(Source(str(first)), ["x"], place="data.train").list_bytes["x"] < 50


def test_a_row_group_with_fewer_rows_than_its_footer_says_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=[1, 2, 3])
    dataset = open_dataset(Source(path), ["x"], place="data.train")
    short = dataclasses.replace(dataset.row_groups[0], num_rows=4)
    with pytest.raises(ValueError, match=r"a.parquet', row group 0, should hold 4 rows, as its footer says. Found 3: "):
        list(dataset.chunks(short, ["x"], 2))


def test_a_window_on_numbers_is_read_from_an_experiment_s_text(tmp_path: Path) -> None:
    for day in (20261101, 20261102, 20261103):
        (tmp_path / f"dt={day}").mkdir()
        pq.write_table(pa.table({"hour": [1.0, 9.0]}), tmp_path / f"dt={day}" / "a.parquet")
    whole = Source(str(tmp_path), window=("20261101", "20261102"))
    assert open_dataset(whole, ["hour"], place="data.train").num_rows == 4
    hours = Source(str(tmp_path), window=("0.5", "2"), window_column="hour")
    assert sum(batch.num_rows for batch in open_dataset(hours, ["hour"], place="data.train").batches(["hour"], 10)) == 3
    with pytest.raises(ValueError, match=r"`data\.train\.window` should compare 'dt', which is int64, with an integer"):
        open_dataset(Source(str(tmp_path), window=("first", "last")), ["hour"], place="data.train")


def test_statistics_that_python_cannot_hold_rule_nothing_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latin = pa.array([b"f\xfcr", b"x"])
    text = pa.Array.from_buffers(pa.string(), 2, pa.array(["abc", "x"]).buffers()[:1] + latin.buffers()[1:])
    late = pa.array([2**62, 0]).cast(pa.timestamp("us"))
    pq.write_table(pa.table({"late": late, "text": text, "x": [1.0, 2.0]}), tmp_path / "a.parquet")
    for where in ("late is not null", "text is not null", "x >= 2"):
        opened = open_dataset(Source(str(tmp_path / "a.parquet"), where=where), ["x"], place="data.train")
        assert opened.num_rows == 2
    monkeypatch.setattr("mtrec.row_groups._low_and_high", lambda statistics: (1.0, math.nan))  # as old writers left them
    assert open_dataset(Source(str(tmp_path / "a.parquet"), where="x > 0"), ["x"], place="data.train").num_rows == 2


def test_list_views_are_refused_by_name(tmp_path: Path) -> None:
    views = pa.array([[1, 2], [3]], pa.list_view(pa.int64()))
    pq.write_table(pa.table({"tags": views}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"`data\.train`: column 'tags' should hold lists\. Found list_view<.* write it as list"):
        open_dataset(Source(str(tmp_path / "a.parquet")), ["tags"], place="data.train")
