"""The feed: batches cut from windows that were encoded whole are the batches that their rows make by themselves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec.batch import Batch, Label, label_values, make_batch
from mtrec.dataset import Source, open_dataset
from mtrec.features import Bucketized, Categorical, Dense, Encoder, join
from mtrec.feed import BadRows, bad_row, feed, refused_rows
from mtrec.reader import Reader

LABELS = {"click": Label("click", low=0, high=1, integer=True), "dwell": Label("dwell", scale=0.001, low=0.0)}
FEATURES = [
    Categorical("user", encoding="identity", num_embeddings=40),
    Categorical("tags", encoding="hash", num_embeddings=30),
    Categorical("item", min_count=1),
    Categorical("seen", weights="seen_weights", encoding="hash", num_embeddings=30),
    Categorical("bought", weights="bought_weight", encoding="hash", num_embeddings=30),
    Bucketized("price", boundaries=(1.0, 5.0)),
    Dense("age"),
    Dense("vector", width=2),
]
WHERE: dict[str | None, Callable[[int], bool]] = {
    None: lambda row: True,
    "bought < 45": lambda row: row < 45,
    "item in ['i0', 'i4']": lambda row: row % 11 in (0, 4),
}


def table(num_rows: int, first: int = 0) -> pa.Table:
    rows = range(first, first + num_rows)
    tags = [None if row % 7 == 0 else [row] * (row % 4) for row in rows]
    return pa.table(
        {
            "row_id": pa.array(rows, pa.int64()),
            "user": pa.array([None if row % 9 == 0 else row % 50 for row in rows], pa.int32()),
            "tags": pa.array(tags, pa.list_(pa.int64())),
            "item": pa.array([f"i{row % 11}" for row in rows]),
            "seen": pa.array([[row, row + 1][: row % 3] for row in rows], pa.list_(pa.int64())),
            "seen_weights": pa.array([[1.0, 0.5][: row % 3] for row in rows], pa.list_(pa.float64())),
            "bought": pa.array(rows, pa.int64()),
            "bought_weight": pa.array([0.25 * (row % 5) for row in rows]),
            "price": pa.array([None if row % 8 == 0 else row % 10 for row in rows], pa.float64()),
            "age": pa.array([None if row % 6 == 0 else row for row in rows], pa.float32()),
            "vector": pa.array([[row, -row] for row in rows], pa.list_(pa.float32())),
            "weight": pa.array([0.5 + row % 3 for row in rows], pa.float64()),
            "click": pa.array([row % 2 for row in rows], pa.int8()),
            "dwell": pa.array([None if row % 2 == 0 else 100.0 * row for row in rows], pa.float64()),
        }
    )


def assert_equal(one: Batch, other: Batch) -> None:
    assert torch.equal(one.dense_BF, other.dense_BF)
    for a, b in ((one.sparse, other.sparse), (one.weighted, other.weighted)):
        assert a is not None
        assert b is not None
        assert a.keys() == b.keys()
        assert torch.equal(a.values(), b.values())
        assert torch.equal(a.lengths(), b.lengths())
        assert a.length_per_key() == a.lengths().view(len(a.keys()), -1).sum(dim=1).tolist()
    assert torch.equal(one.weighted.weights(), other.weighted.weights())  # type: ignore[union-attr]
    for name, label in one.labels.items():
        assert torch.equal(label.nan_to_num(-1), other.labels[name].nan_to_num(-1))
    assert one.sample_weight_B is not None
    assert torch.equal(one.sample_weight_B, other.sample_weight_B)
    assert one.stream_rows == other.stream_rows


def files(folder: Path, sizes: list[int], row_group: int) -> Encoder:
    whole = table(sum(sizes))
    start = 0
    for number, size in enumerate(sizes):
        pq.write_table(whole.slice(start, size), folder / f"{number}.parquet", row_group_size=row_group)
        start += size
    batches = table(38).to_batches()  # ids from 38 on are not seen
    return Encoder.fit(FEATURES, batches, schema=whole.schema, embedding_dim=4)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    row_group=st.integers(5, 40),
    window=st.integers(3, 50),
    shuffle=st.booleans(),
    where=st.sampled_from(list(WHERE)),
    world_size=st.sampled_from([1, 2]),
    start=st.integers(0, 2),
)
def test_batches_cut_from_encoded_windows_are_those_of_their_rows(
    sizes: list[int],
    row_group: int,
    window: int,
    shuffle: bool,
    where: str | None,
    world_size: int,
    start: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("log")
    encoder = files(folder, sizes, row_group)
    columns = [*encoder.columns, "weight", "click", "dwell", "row_id"]
    data = open_dataset(Source(str(folder), where=where), columns, place="data.train")
    seen: list[int] = []
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "shuffle": shuffle, "shuffle_window": window}
        probe = Reader(data, columns, batch_size=8, num_streams=4, **options)  # type: ignore[arg-type]
        reader = Reader(data, columns, batch_size=8, num_streams=4, start_batch=min(start, probe.num_batches), **options)  # type: ignore[arg-type]
        for piece, batch in feed(reader, encoder, LABELS, "weight", keep_rows=True):
            assert_equal(batch, make_batch(piece.record_batch, encoder, LABELS, "weight", piece.stream_rows))
            seen += piece.record_batch["row_id"].to_pylist()
    assert len(seen) == len(set(seen))
    if start == 0:
        assert sorted(seen) == [row for row in range(sum(sizes)) if WHERE[where](row)]


def test_rows_are_dropped_unless_they_are_kept(tmp_path: Path) -> None:
    encoder = files(tmp_path, [20], 20)
    columns = [*encoder.columns, "weight", "click", "dwell"]
    data = open_dataset(Source(str(tmp_path)), columns, place="data.train")
    piece, batch = next(iter(feed(Reader(data, columns, batch_size=8, num_streams=4), encoder, LABELS, "weight")))
    assert batch.num_rows == 8
    assert piece.cuts is None
    with pytest.raises(ValueError, match="`keep_rows` should be set"):
        _ = piece.record_batch


def test_a_window_with_bad_rows_gives_its_other_rows_and_names_the_bad_ones(tmp_path: Path) -> None:
    encoder = files(tmp_path, [40], 20)
    broken = table(40).to_pylist()
    for row in (3, 25, 31):
        broken[row]["click"] = 7
    pq.write_table(pa.Table.from_pylist(broken, table(1).schema), tmp_path / "0.parquet", row_group_size=20)
    columns = [*encoder.columns, "weight", "click", "dwell", "row_id"]
    data = open_dataset(Source(str(tmp_path)), columns, place="data.train")
    bad = BadRows(0.5, 40)
    seen = []
    reader = Reader(data, columns, batch_size=8, num_streams=4, shuffle_window=10)
    for piece, batch in feed(reader, encoder, LABELS, "weight", keep_rows=True, bad=bad):
        assert_equal(batch, make_batch(piece.record_batch, encoder, LABELS, "weight", piece.stream_rows))
        seen += piece.record_batch["row_id"].to_pylist()
    assert sorted(seen) == [row for row in range(40) if row not in (3, 25, 31)]
    assert bad.skipped == {"click should be 0, 1 or null": 3}
    with pytest.raises(ValueError, match=r"0.parquet', row group 0, row 3: .*'click' should be 0, 1 or null. Found 7"):
        list(feed(Reader(data, columns, batch_size=8, num_streams=1, shuffle=False), encoder, LABELS, "weight"))


@pytest.mark.parametrize("shuffle", [True, False])
def test_rows_beside_bad_ones_are_found_in_the_files_also_where_some_are_dropped(tmp_path: Path, shuffle: bool) -> None:
    encoder, columns = write_broken(tmp_path, click={3: 7, 14: 7, 25: 7, 31: 7})
    columns += ["row_id"]
    data = open_dataset(Source(str(tmp_path), where="bought >= 10"), columns, place="data.train")
    bad, seen = BadRows(0.5, 40), []
    reader = Reader(data, columns, batch_size=12, num_streams=2, shuffle_window=10, shuffle=shuffle)
    for piece, batch in feed(reader, encoder, LABELS, "weight", keep_rows=True, bad=bad):
        ids = piece.record_batch["row_id"].to_pylist()
        found = [reader.locate(piece, number) for number in range(batch.num_rows)]
        assert [20 * row.row_group + row.row for row in found] == ids
        assert sum(piece.stream_rows) == len(ids)
        assert_equal(batch, make_batch(piece.record_batch, encoder, LABELS, "weight", piece.stream_rows))
        seen += ids
    assert sorted(seen) == [row for row in range(10, 40) if row not in (14, 25, 31)]
    assert sum(bad.skipped.values()) == 3


def write_broken(folder: Path, **values: dict[int, float]) -> tuple[Encoder, list[str]]:
    """40 rows in two row groups, of which some are given other values; an encoder and the columns to read."""
    encoder = files(folder, [40], 20)
    rows = table(40).to_pylist()
    for column, of_rows in values.items():
        for row, value in of_rows.items():
            rows[row][column] = value
    pq.write_table(pa.Table.from_pylist(rows, table(1).schema), folder / "0.parquet", row_group_size=20)
    return encoder, [*encoder.columns, "weight", "click", "dwell"]


def test_a_bad_row_of_a_later_stream_is_named_by_its_place(tmp_path: Path) -> None:
    encoder, columns = write_broken(tmp_path, click={25: 7})
    data = open_dataset(Source(str(tmp_path)), columns, place="data.train")
    reader = Reader(data, columns, batch_size=8, num_streams=4, shuffle=False)
    with pytest.raises(ValueError, match=r"0.parquet', row group 1, row 5: .*'click' should be 0, 1 or null. Found 7"):
        list(feed(reader, encoder, LABELS, "weight"))


def test_refused_rows_are_numbered_as_they_lie_in_the_files(tmp_path: Path) -> None:
    def look(rows: pa.RecordBatch) -> None:
        for label in LABELS.values():
            label_values(rows, label)

    _, columns = write_broken(tmp_path, click={3: 7, 12: 7, 31: 7}, dwell={11: -1.0, 35: -1.0})
    data = open_dataset(Source(str(tmp_path), where="bought >= 10"), columns, place="data.test")
    rows, good = refused_rows(data, columns, look)
    assert (rows.tolist(), good) == ([11, 12, 31, 35], 26)
    first = bad_row(data, columns, look)
    assert first is not None
    assert "0.parquet', row group 0, row 12: " in first


def test_parts_whose_keys_hold_one_value_in_one_and_lists_in_another_are_joined() -> None:
    encoder = Encoder.fit(
        [Categorical("a", encoding="identity", num_embeddings=40), Categorical("b", encoding="identity", num_embeddings=40)],
        [pa.record_batch({"a": [1], "b": [[1]]})],
        schema=pa.schema([("a", pa.int64()), ("b", pa.list_(pa.int64()))]),
        embedding_dim=4,
    )
    (lists,) = encoder.encode_rows(pa.record_batch({"a": [1, 2], "b": [[3, 4], []]}), [slice(0, 2)])
    (nothing,) = encoder.encode_rows(pa.record_batch({"a": [5], "b": pa.nulls(1)}), [np.array([0])])
    joined = join([(lists, 0, 2), (nothing, 0, 1), (lists, 1, 2)])
    assert joined.values.tolist() == [3, 4, 7, 4, 5, 6, 0]
    assert (joined.lengths_KB.tolist(), joined.counts) == ([[1, 1, 1, 1], [2, 0, 1, 0]], [4, 3])
    assert joined.single == (True, False)
    assert joined.values.dtype == np.int32


def test_weights_of_joined_parts_stay_with_their_keys() -> None:
    rows = pa.record_batch(
        {
            **{"a": [1, 2, 5], "a_weight": [0.5, 0.25, 2.0], "c": [7, 8, 9], "c_weight": [3.0, 4.0, 5.0]},
            **{"b": [[3, 4], [], None], "b_weight": [[1.0, 2.0], [], None]},
        }
    )
    features = [
        Categorical(key, weights=f"{key}_weight", encoding="identity", num_embeddings=40, pooling="sum") for key in "abc"
    ]
    encoder = Encoder.fit(features, [rows], schema=rows.schema, embedding_dim=4)
    (lists,) = encoder.encode_rows(rows.slice(0, 2), [slice(0, 2)])
    last = {name: pa.nulls(1) if name.startswith("b") else rows[name][2:] for name in rows.schema.names}
    (nothing,) = encoder.encode_rows(pa.record_batch(last), [np.array([0])])
    assert lists.weighted.single == (True, False, True)
    assert nothing.weighted.single == (True, True, True)
    joined, wanted = join([(lists, 0, 2), (nothing, 0, 1)]), encoder.encode(rows)
    assert wanted.weights.tolist() == [0.5, 0.25, 2.0, 1.0, 2.0, 1.0, 3.0, 4.0, 5.0]
    for name in ("weighted_values", "weighted_lengths_KB", "weighted_counts", "weights"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(wanted, name), err_msg=name)
