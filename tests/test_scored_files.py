"""How scoring cuts its input into batches and reads it ahead, rows that cannot be scored, which columns of its output get a
dictionary, files that fail at the last moment.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import small_run, train_on

from mtrec.dataset import Source, open_dataset
from mtrec.display_scoring import show_scoring
from mtrec.formula import ranking_formula
from mtrec.locking import LockedError
from mtrec.run import Run, open_run
from mtrec.score import open_scorer
from mtrec.scored_files import Asked, inputs, job, output, pieces, score_files
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


def test_what_is_read_ahead_comes_in_order_and_errors_at_their_place() -> None:
    def numbers() -> Iterator[int]:
        yield from range(5)
        raise OSError("disk")

    source = pieces.ahead(numbers(), 3)
    assert [next(source) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="disk"):
        next(source)


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


def test_a_record_that_came_before_its_file_is_not_taken_for_that_of_the_old_one(tmp_path: Path) -> None:
    place = output.Output(str(tmp_path))
    place.write("day/a.parquet", b"old")
    record = {"identity": "asked", "bytes": 3, "seconds": {"writing": 1.0}}
    pieces._make_way(place, "day/a.parquet", record)
    assert output.read_record(place, "day/a.parquet", "asked") is None  # as where the process died here
    place.write("day/a.parquet", b"new")
    assert output.read_record(place, "day/a.parquet", "asked") == {"identity": "asked", "bytes": 3}  # the same at every run
    assert output.read_record(place, "day/a.parquet", "another") is None


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_the_best_rows_of_all_files_are_chosen_anew_where_a_job_was_cut_short(
    run: Run, rows: pa.RecordBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        pq.write_table(pa.table(rows).slice(number * 150, 150), tmp_path / "in" / f"{number}.parquet")
    source = Source(str(tmp_path / "in"))
    asked = Asked(str(run.folder), source, str(tmp_path / "out"), top=1, by="click", batch_rows=50)
    score_files(asked, score_here)
    whole = contents(tmp_path / "out")
    assert sum(pq.read_table(tmp_path / "out" / name).num_rows for name in ("0.parquet", "1.parquet")) == 2

    joined = job.join

    def no_room(file: inputs.InputFile, *others: Any) -> dict[str, Any]:
        if file.relative == "1.parquet":
            raise OSError("no space left")
        return joined(file, *others)

    again = dataclasses.replace(asked, output=str(tmp_path / "again"))
    with monkeypatch.context() as patched:
        patched.setattr(job, "join", no_room)
        with pytest.raises(OSError, match="no space left"):
            score_files(again, score_here)
    assert (tmp_path / "again" / "0.parquet").exists()
    assert score_files(again, score_here)["session"]["rows"] == 0  # all pieces were there
    assert contents(tmp_path / "again") == whole


def test_what_another_job_wrote_is_neither_taken_for_finished_nor_replaced(
    run: Run, rows: pa.RecordBatch, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        pq.write_table(pa.table(rows).slice(number * 40, 40), tmp_path / "in" / f"{number}.parquet")
    columns = ("row_id", "item_id", "click")
    asked = Asked(str(run.folder), Source(str(tmp_path / "in")), str(tmp_path / "out"), columns=columns)
    score_files(asked, score_here)
    before = contents(tmp_path / "out")
    assert score_files(asked, score_here)["session"]["rows"] == 0
    others: list[dict[str, Any]] = [
        {"columns": ("row_id", "click")},
        {"columns": ("item_id", "row_id", "click")},
        {"columns": None},
        {"top": 1, "by": "item_id"},
        {"batch_rows": 7},
        {"formula": "p_click + 1"},
        {"source": Source(str(tmp_path / "in"), "row_id > 3")},
    ]
    for other in others:
        with pytest.raises(ValueError, match=r"holds '0.parquet' and 1 other file already, made by another job"):
            score_files(dataclasses.replace(asked, **other), score_here)
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "1.parquet").write_bytes(before["1.parquet"][:-1])
    with pytest.raises(ValueError, match=r"holds '1.parquet' already"):
        score_files(asked, score_here)
    score_files(dataclasses.replace(asked, overwrite=True), score_here)
    assert contents(tmp_path / "out") == before


def test_the_best_rows_of_some_files_are_not_those_of_others(run: Run, rows: pa.RecordBatch, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        pq.write_table(pa.table(rows).slice(number * 40, 40), tmp_path / "in" / f"{number}.parquet")
    out = tmp_path / "out"
    first = Asked(str(run.folder), Source(str(tmp_path / "in")), str(out), columns=("row_id",), top=2, by="click")
    score_files(first, score_here)
    for other in ({"top": 3}, {"by": "item_id"}, {"source": Source([str(tmp_path / "in" / "0.parquet")])}):
        with pytest.raises(ValueError, match=r"holds '0.parquet'.* already, made by another job"):
            score_files(dataclasses.replace(first, **other), score_here)
    pq.write_table(pa.table(rows).slice(80, 40), tmp_path / "in" / "2.parquet")
    with pytest.raises(ValueError, match=r"holds '0.parquet' and 1 other file already, made by another job"):
        score_files(first, score_here)
    score_files(dataclasses.replace(first, overwrite=True), score_here)
    assert pq.read_table(out).num_rows == 4
    (tmp_path / "in" / "2.parquet").unlink()
    with pytest.raises(ValueError, match=r"holds '0.parquet' and 1 other file already, made by another job"):
        score_files(first, score_here)


@pytest.mark.parametrize(
    ("given", "output"),
    [("file://{}/in/*.parquet", "file://{}/in"), ("file://{}/in/a.parquet", "{}/in"), ("{}/in", "file://{}/in/scores")],
)
def test_an_output_that_would_replace_its_input_is_refused(
    run: Run, rows: pa.RecordBatch, tmp_path: Path, given: str, output: str
) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")
    asked = Asked(str(run.folder), Source(given.format(tmp_path)), output.format(tmp_path), overwrite=True)
    with pytest.raises(ValueError, match="OUTPUT should lie outside of INPUT"):
        score_files(asked, score_here)
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.parquet"]


def test_output_paths_begin_below_the_fixed_part_of_a_glob(run: Run, rows: pa.RecordBatch, tmp_path: Path) -> None:
    for day in ("dt=1", "dt=2"):
        (tmp_path / "logs" / day).mkdir(parents=True)
        pq.write_table(pa.table(rows).slice(0, 150), tmp_path / "logs" / day / "a.parquet")
    for number, given in enumerate(("logs/dt=?", "logs/dt=[12]/*", "logs")):
        out = tmp_path / f"out-{number}"
        score_files(Asked(str(run.folder), Source(str(tmp_path / given)), str(out)), score_here)
        assert sorted(str(path.relative_to(out)) for path in out.rglob("a.parquet")) == ["dt=1/a.parquet", "dt=2/a.parquet"]


def test_one_process_at_a_time_scores_into_a_folder(run: Run, rows: pa.RecordBatch, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")
    place = output.Output(str(tmp_path / "out"))
    with place.locked(), pytest.raises(LockedError, match=r"The output .*out is being written by process"):
        score_files(Asked(str(run.folder), Source(str(tmp_path / "in")), place.address), score_here)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


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


def test_columns_of_text_views_are_kept_and_chosen_by(run: Run, rows: pa.RecordBatch, tmp_path: Path) -> None:
    views = pa.table(rows).append_column("note", rows["item_id"].cast(pa.string_view()))
    pq.write_table(views, tmp_path / "a.parquet")
    source = Source(str(tmp_path / "a.parquet"), where="row_id < 100")
    score_files(Asked(str(run.folder), source, str(tmp_path / "out"), columns=("note",), top=1, by="note"), score_here)
    found = pq.read_table(tmp_path / "out" / "a.parquet")["note"].to_pylist()
    assert sorted(found) == sorted(set(rows["item_id"].to_pylist()[:100]))


NUMBERS = pa.array([number % 3 for number in range(60)])
TIMES, DAYS = NUMBERS.cast(pa.timestamp("ms")), NUMBERS.cast(pa.int32()).cast(pa.date32())


def score_groups(run: Run, rows: pa.RecordBatch, folder: Path, one: pa.Array, other: pa.Array) -> dict[str, Any]:
    """The best five rows of each group of two files whose groups are these."""
    (folder / "in").mkdir()
    for name, groups in (("a", one), ("b", other)):
        pq.write_table(pa.table(rows).slice(0, len(groups)).append_column("g", groups), folder / "in" / f"{name}.parquet")
    source = Source(str(folder / "in"))
    asked = Asked(str(run.folder), source, str(folder / "out"), columns=("row_id",), top=5, by="g")
    return score_files(asked, score_here)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (TIMES, TIMES.cast(pa.timestamp("us"))),
        (DAYS.cast(pa.date64()), DAYS),
        (NUMBERS.cast(pa.int32()), NUMBERS.dictionary_encode()),
        (NUMBERS.cast(pa.string()).dictionary_encode(), NUMBERS.cast(pa.large_string())),
    ],
)
def test_groups_are_those_of_all_files_whatever_type_each_has(
    one: pa.Array, other: pa.Array, run: Run, rows: pa.RecordBatch, tmp_path: Path
) -> None:
    assert score_groups(run, rows, tmp_path, one, other)["rows"] == 15
    for name in ("a.parquet", "b.parquet"):
        given, made = (pq.read_schema(tmp_path / folder / name).field("g").type for folder in ("in", "out"))
        assert made == given


@pytest.mark.parametrize(
    ("one", "other"), [(NUMBERS.cast(pa.string()), NUMBERS), (TIMES, TIMES.cast(pa.timestamp("us", "UTC")))]
)
def test_groups_whose_types_do_not_go_together_are_refused(
    one: pa.Array, other: pa.Array, run: Run, rows: pa.RecordBatch, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="`INPUT` should have one type for column 'g'") as error:
        score_groups(run, rows, tmp_path, one, other)
    for part in ("a.parquet", "b.parquet", str(one.type), str(other.type)):
        assert part in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_group_that_the_type_of_all_files_cannot_hold_is_an_error(run: Run, rows: pa.RecordBatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"b\.parquet', column 'g': uint64 should become int64, the type that suits all files"):
        score_groups(run, rows, tmp_path, pa.array([-1, 1]), pa.array([2**63, 1], pa.uint64()))


def three_files(run: Run, rows: pa.RecordBatch, folder: Path) -> Asked:
    """Three input files, scored into out."""
    (folder / "in").mkdir()
    for number, name in enumerate("abc"):
        pq.write_table(pa.table(rows).slice(number * 50, 50), folder / "in" / f"{name}.parquet")
    asked = Asked(str(run.folder), Source(str(folder / "in")), str(folder / "out"))
    score_files(asked, score_here)
    return asked


def test_scores_of_a_file_that_is_gone_do_not_stay(
    run: Run, rows: pa.RecordBatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = three_files(run, rows, tmp_path)
    (tmp_path / "in" / "c.parquet").unlink()
    with pytest.raises(ValueError, match=r"holds 'c\.parquet', made by an earlier job .* Add --overwrite to delete"):
        score_files(asked, score_here)
    assert (tmp_path / "out" / "c.parquet").exists()
    manifest = score_files(dataclasses.replace(asked, overwrite=True), score_here)
    assert manifest["session"]["removed"] == ["c.parquet"]
    assert (manifest["rows"], manifest["session"]["rows"]) == (100, 0)
    assert pq.read_table(tmp_path / "out").num_rows == 100
    assert not (tmp_path / "out" / "_records" / "c.parquet.json").exists()
    show_scoring(manifest, "out")
    assert "note: 1 file deleted, made of files that are not in INPUT any more: c.parquet" in capsys.readouterr().out
    assert score_files(asked, score_here)["session"]["removed"] == []


@pytest.mark.parametrize("gone", [False, True])
def test_scores_of_another_input_stay(gone: bool, run: Run, rows: pa.RecordBatch, tmp_path: Path) -> None:
    asked = three_files(run, rows, tmp_path)
    (tmp_path / "tomorrow").mkdir()
    pq.write_table(pa.table(rows).slice(150, 50), tmp_path / "tomorrow" / "d.parquet")
    if gone:
        shutil.rmtree(tmp_path / "in")
    later = dataclasses.replace(asked, source=Source(str(tmp_path / "tomorrow")))
    assert score_files(later, score_here)["session"]["removed"] == []
    alone = dataclasses.replace(asked, source=Source(str(tmp_path / "tomorrow" / "d.parquet")), overwrite=True)
    assert score_files(alone, score_here)["session"]["removed"] == []
    assert pq.read_table(tmp_path / "out").num_rows == 200


def test_what_an_earlier_job_made_of_a_file_that_is_damaged_now_does_not_stop_the_others(
    run: Run, rows: pa.RecordBatch, tmp_path: Path
) -> None:
    asked = three_files(run, rows, tmp_path)
    damaged = tmp_path / "in" / "b.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    pq.write_table(pa.table(rows).slice(150, 50), tmp_path / "in" / "d.parquet")
    manifest = score_files(asked, score_here)
    assert list(manifest["failed"]) == [str(damaged)]
    assert manifest["session"]["rows"] == 50


@pytest.mark.parametrize("garbled", ["{}", "[]", '{"identity": "x", ', "\xff"])
def test_a_file_with_a_garbled_record_is_scored_anew(garbled: str, run: Run, rows: pa.RecordBatch, tmp_path: Path) -> None:
    asked = three_files(run, rows, tmp_path)
    record = tmp_path / "out" / "_records" / "b.parquet.json"
    sound, made = record.read_text(), contents(tmp_path / "out")
    record.write_text(garbled, encoding="latin-1")
    assert score_files(asked, score_here)["session"]["rows"] == 50
    assert contents(tmp_path / "out") == made
    assert record.read_text() == sound


def test_an_empty_path_is_not_the_current_folder(
    run: Run, rows: pa.RecordBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "in" / "a.parquet")
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(ValueError, match=r"INPUT should name files or a folder\. Found an empty path"):
        score_files(Asked(str(run.folder), Source(""), str(tmp_path / "out")), score_here)
    with pytest.raises(ValueError, match=r"OUTPUT should name files or a folder\. Found an empty path"):
        score_files(Asked(str(run.folder), Source(str(tmp_path / "in")), ""), score_here)
