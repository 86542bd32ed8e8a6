"""How scoring cuts its input into batches, rows that cannot be scored, which columns of its output get a dictionary, files that
fail at the last moment.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import small_run, train_on

from mtrec.dataset import Source, open_dataset
from mtrec.formula import ranking_formula
from mtrec.run import Run, open_run
from mtrec.score import open_scorer
from mtrec.scored_files import Asked, inputs, job, output, score_files
from mtrec.scored_files.job import score_here


@pytest.mark.parametrize("where", [None, "odd == 1"])
def test_batches_of_a_piece_are_full_but_where_units_end(
    where: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.parquet"
    with pq.ParquetWriter(path, pa.schema([("row", pa.int64()), ("odd", pa.int64())])) as writer:
        for start, stop in ((0, 130), (130, 137), (137, 300), (300, 301)):
            rows = np.arange(start, stop)
            writer.write_table(pa.table({"row": rows, "odd": rows % 2}))
    monkeypatch.setattr(inputs, "DECODED_ROWS", 64)
    monkeypatch.setattr(inputs, "UNIT_ROWS", 135)
    source = Source(str(path), where=where)
    data = open_dataset(source, ["row"], place="--where")
    file = inputs.InputFile(data, "rows.parquet", ("row",), (), (), "")
    groups = len(data.row_groups)
    found = [batch.column(0).to_pylist() for batch in inputs.batches(inputs.Piece(file, 0, groups, True), ["row"], 20)]
    wanted = [row for row in range(301) if where is None or row % 2]
    assert [row for batch in found for row in batch] == wanted
    ends = {sum(row < stop for row in wanted) for stop in (137, 300, 301)}
    before = 0
    for batch in found:
        before += len(batch)
        assert len(batch) == 20 or before in ends


def test_a_dictionary_is_written_where_the_input_shows_that_values_repeat(tmp_path: Path) -> None:
    rows = np.arange(4_000)
    given = pa.table(
        {
            "few": rows % 7,
            "unique": rows * 10**9,
            "noise": np.random.default_rng(0).normal(size=4_000),
            "name": [f"n{row}" for row in rows],
            "lists": [[row, row * 10**9] for row in rows.tolist()],
            "few_lists": [[row % 3] for row in rows.tolist()],
        }
    )
    pq.write_table(given, tmp_path / "given.parquet")
    footer = pq.ParquetFile(tmp_path / "given.parquet").metadata
    schema = pa.schema([*given.schema, pa.field("day", pa.int32()), pa.field("score", pa.float32(), nullable=False)])
    found = output.repeating_paths(schema, footer)
    assert found == ["few", "name", "few_lists.list.element", "day"]  # strings, and the keys of folders, as before


def test_what_goes_wrong_before_a_file_is_at_its_place_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    place = output.Output(str(tmp_path))
    place.write("day/a.parquet", b"old")

    def fails() -> None:
        raise OSError("no space")

    def replaced() -> None:
        with place.beside("day/a.parquet") as sink:
            sink.write(b"new")
            sink.before_rename = fails

    with pytest.raises(OSError, match="no space"):
        replaced()
    assert [path.name for path in (tmp_path / "day").iterdir()] == ["a.parquet"]
    assert place.read("day/a.parquet") == b"old"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With a feature that refuses some rows: its weights may not be negative."""
    run = small_run(tmp_path_factory.mktemp("files"), "features.user_id.weights=price", "training.max_steps=2")
    train_on(1, run)
    return open_run(run.folder)


@pytest.fixture
def rows(run: Run) -> pa.RecordBatch:
    path = run.folder.parent / "log-4000" / "validation" / "part-0.parquet"
    return pq.read_table(path).combine_chunks().to_batches()[0]


@pytest.mark.parametrize(
    ("workers", "place"), [(1, "row 255 of those scored"), (2, "row 55 of those scored from row group 2 on")]
)
def test_a_row_that_cannot_be_encoded_is_named_by_its_number(
    workers: int, place: str, run: Run, rows: pa.RecordBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = pa.table(rows)
    prices = good["price"].to_numpy().copy()
    prices[[255, 300]] = -1.0
    bad = good.set_column(good.column_names.index("price"), "price", pa.array(prices))
    (tmp_path / "in").mkdir()
    pq.write_table(bad, tmp_path / "in" / "a.parquet", row_group_size=100)
    pq.write_table(good, tmp_path / "in" / "b.parquet")
    monkeypatch.setattr(inputs, "UNIT_ROWS", 100)
    monkeypatch.setattr(job, "sampled_counts", lambda files, encoder: (encoder.counts(), {}))  # as where the sample misses it
    asked = Asked(str(run.folder), Source(str(tmp_path / "in")), str(tmp_path / "out"), batch_rows=50)
    manifest = score_files(asked, score_here, workers=workers)
    assert (tmp_path / "out" / "b.parquet").exists()
    assert not (tmp_path / "out" / "a.parquet").exists()
    (message,) = manifest["failed"].values()
    assert f"a.parquet', {place}: `features.user_id.weights`: column 'price' should hold finite" in message


@pytest.mark.parametrize("row", [-2, 10**6])
@pytest.mark.parametrize("ids", ["sparse", "weighted"])
def test_a_row_that_no_table_has_is_refused_by_the_look_up(ids: str, row: int, run: Run, rows: pa.RecordBatch) -> None:
    cpu = torch.device("cpu")
    with open_scorer(run, run.best(), ranking_formula(run.experiment), cpu) as scorer:
        batch = scorer.encode(rows)
        getattr(batch, ids).values()[3] = row
        with pytest.raises(RuntimeError, match=f"out of bounds: {row}"):
            scorer.predict(batch)
