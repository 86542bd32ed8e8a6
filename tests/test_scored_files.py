"""How scoring cuts its input into batches, which columns of its output get a dictionary, files that fail at the last moment."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec.dataset import Source, open_dataset
from mtrec.scored_files import inputs, output


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
