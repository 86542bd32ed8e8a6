"""Batch scoring: the same numbers as `mtrec evaluate`, whole files or none, and every refusal that makes it safe to trust."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from logs import write_log
from runs import run_to_score, score, train_on
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from mtrec import parallel
from mtrec.checkpoint import CheckpointError
from mtrec.cli import app
from mtrec.config import load_experiment, parse_experiment
from mtrec.dataset import Source
from mtrec.formula import prediction_columns, ranking_formula
from mtrec.launch import evaluate_run
from mtrec.predictions import load_model
from mtrec.prepare import prepare
from mtrec.run import Run, open_run
from mtrec.score import Scorer, check_memory
from mtrec.scored_files import Asked, inputs, output, score_files
from mtrec.scored_files.job import score_here

CPU = torch.device("cpu")
PREDICTIONS = ["p_click", "p_conversion", "p_conversion_and_click", "dwell_seconds", "dwell_seconds_expected"]
FORMULA = "p_click * p_conversion**0.5 * log1p(dwell_seconds)"
DATA = Path(os.environ.get("KUAIRAND") or Path(__file__).parents[2] / "shared/data/kuairand_pure")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained on two ranks, so that golden rows come from both."""
    return run_to_score(tmp_path_factory.mktemp("score"), 2)


@pytest.fixture(scope="module")
def log(run: Run) -> Path:
    """Validation rows in three files of several row groups."""
    return run.folder.parent / "log-4000" / "validation"


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names(folder)}


def test_files_rows_and_columns_are_those_of_the_input(run: Run, log: Path, tmp_path: Path) -> None:
    manifest = score(run, log, tmp_path / "out", formula=FORMULA)
    assert names(tmp_path / "out") == names(log)
    for name in names(log):
        given, made = pq.read_table(log / name), pq.read_table(tmp_path / "out" / name)
        kept = [column for column in given.column_names if column not in ("click", "conversion", "dwell_seconds")]
        assert made.column_names == [*kept, *PREDICTIONS, "score"]
        assert made.select(kept).equals(given.select(kept))
        p = {column: made[column].to_numpy().astype(np.float64) for column in PREDICTIONS}
        np.testing.assert_allclose(p["p_conversion_and_click"], p["p_click"] * p["p_conversion"], rtol=1e-6)
        wanted = p["p_click"] * np.sqrt(p["p_conversion"]) * np.log1p(p["dwell_seconds"])
        np.testing.assert_allclose(made["score"].to_numpy(), wanted, rtol=1e-6)
    assert manifest["rows"] == sum(file["rows"] for file in manifest["files"]) == 1_000
    stored = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert stored["complete"] is True
    assert {key: value for key, value in manifest.items() if key != "session"} == stored


def test_auc_of_the_output_is_that_of_evaluate(run: Run, log: Path, tmp_path: Path) -> None:
    score(run, log, tmp_path / "out", batch_rows=100)
    metrics = evaluate_run(run.folder, str(log))["tasks"]
    truth = pq.read_table(log, columns=["click", "conversion", "dwell_seconds"])
    made = pq.read_table(tmp_path / "out")
    for column, task in (("p_click", "click"), ("p_conversion_and_click", "conversion")):
        assert roc_auc_score(truth[task].to_numpy(), made[column].to_numpy()) == pytest.approx(metrics[task]["auc"], abs=1e-6)
    dwell = np.abs(made["dwell_seconds_expected"].to_numpy() - truth["dwell_seconds"].fill_null(0).to_numpy()).mean()
    assert dwell == pytest.approx(metrics["dwell"]["mae"], rel=1e-6)


def test_types_of_kept_columns_stay(run: Run, log: Path, tmp_path: Path) -> None:
    table = pq.read_table(log / "part-0.parquet").slice(0, 50)
    count = table.num_rows
    odd = {
        "item_id": table["item_id"].dictionary_encode(),
        "tags": table["tags"].cast(pa.large_list(pa.int32())),
        "user_id": table["user_id"].cast(pa.uint64()),
        "at": pa.array(range(count), pa.timestamp("us", "UTC")),
        "money": pa.array([None, *range(count - 1)], pa.int32()).cast(pa.decimal128(12, 2)),
        "pair": pa.array([{"a": i, "b": [i]} for i in range(count)]),
        "vector": pa.array([[1.0, 2.0]] * count, pa.list_(pa.float16(), 2)),
    }
    given = pa.table({**{name: table[name] for name in ("age", "price")}, **odd})
    pq.write_table(given, tmp_path / "odd.parquet", row_group_size=20)
    score(run, tmp_path / "odd.parquet", tmp_path / "out", where="item_id != 'item1' and price > 2")
    made = pq.read_table(tmp_path / "out" / "odd.parquet")
    wanted = pc.and_(pc.not_equal(given["item_id"].cast(pa.string()), "item1"), pc.greater(given["price"], 2))
    expected = given.filter(wanted)
    assert made.drop_columns([*PREDICTIONS, "score"]).schema == given.schema.remove_metadata()
    assert made["money"].to_pylist() == expected["money"].to_pylist()
    assert 0 < made.num_rows < count
    score(run, tmp_path / "odd.parquet", tmp_path / "few", columns=("user_id", "money"))
    assert pq.read_schema(tmp_path / "few" / "odd.parquet").names == ["user_id", "money", *PREDICTIONS, "score"]


def test_names_of_columns_may_have_blanks_and_stand_twice(run: Run, log: Path, tmp_path: Path) -> None:
    asked = ["score", str(run.folder), str(log), str(tmp_path / "out"), "--local", "--columns", "user_id, item_id,,user_id"]
    result = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert result.exit_code == 0
    assert pq.read_schema(tmp_path / "out" / "part-0.parquet").names == ["user_id", "item_id", *PREDICTIONS, "score"]


def test_groups_of_an_evaluation_are_in_the_order_of_their_values(run: Run, log: Path, tmp_path: Path) -> None:
    table = pq.read_table(log).slice(0, 300)
    hours = [number % 12 for number in range(300)]
    hour = pa.array([None if each == 3 else each for each in hours], pa.int32())
    size = pa.array([None if each == 3 else math.nan if each == 4 else each / 1 for each in hours])
    pq.write_table(table.append_column("hour", hour).append_column("size", size), tmp_path / "a.parquet")
    others = [0, 1, 2, *range(5, 12)]
    wanted = {
        "hour": [*map(str, [0, 1, 2, *range(4, 12)]), "null"],
        "size": [*(f"{each}.0" for each in others), "nan", "null"],
    }
    for column, order in wanted.items():
        assert list(evaluate_run(run.folder, str(tmp_path / "a.parquet"), by=column)["by"][column]) == order


def test_any_batch_size_gives_the_same_numbers(run: Run, log: Path, tmp_path: Path) -> None:
    score(run, log, tmp_path / "one", batch_rows=8_192)
    score(run, log, tmp_path / "other", batch_rows=37)
    one, other = (pq.read_table(tmp_path / name) for name in ("one", "other"))
    assert one["row_id"].equals(other["row_id"])
    for column in [*PREDICTIONS, "score"]:
        np.testing.assert_allclose(one[column].to_numpy(), other[column].to_numpy(), rtol=1e-6)


def test_a_file_in_pieces_has_the_bytes_of_a_whole_one(
    run: Run, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "UNIT_ROWS", 100)
    monkeypatch.setattr(output, "UNIT_ROWS", 100)
    pq.write_table(pq.read_table(log), tmp_path / "large.parquet", row_group_size=64)
    asked = Asked(str(run.folder), Source(str(tmp_path / "large.parquet")), str(tmp_path / "whole"), batch_rows=50)
    manifest = score_files(asked)
    counted: list[int] = []

    def counting(work: Any, pieces: Any) -> Iterator[Any]:
        counted.append(len(pieces))
        return score_here(work, pieces)

    cut = score_files(Asked(str(run.folder), asked.source, str(tmp_path / "cut"), batch_rows=50), counting, workers=3)
    assert counted == [8]  # 1,000 rows in units of 128, about four a worker
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert not (tmp_path / "cut" / "_pieces").exists()
    for each in (manifest, cut):
        del each["session"]
    assert cut["labels"]["click"]["auc"] == pytest.approx(manifest["labels"]["click"]["auc"], abs=1e-12)
    assert cut["files"] == manifest["files"]


def _killed_in_the_second_file(asked: Asked) -> None:
    """Scores until some rows of the second file are written, then dies as if by `kill -9`."""
    torch.set_num_threads(1)
    written: list[int] = []
    write = output.ParquetSink.write

    def counted(self: output.ParquetSink, rows: pa.RecordBatch) -> None:
        write(self, rows)
        written.append(rows.num_rows)
        if sum(written) > 400:
            os.kill(os.getpid(), signal.SIGKILL)

    output.ParquetSink.write = counted  # type: ignore[method-assign]
    score_files(asked)


def kill_and_restart(asked: Asked) -> dict[str, Any]:
    process = multiprocessing.get_context("forkserver").Process(target=_killed_in_the_second_file, args=(asked,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in Path(asked.output).rglob("*.parquet") if path.name[0] != "."}
    assert len(before) == 1  # the second was half-written, and is not there
    manifest = score_files(asked)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "a finished file was scored again"
    assert not list(Path(asked.output).rglob("*.unfinished"))
    return manifest


def test_a_killed_job_goes_on_and_writes_the_same_bytes(run: Run, log: Path, tmp_path: Path) -> None:
    calm = score(run, log, tmp_path / "calm", formula=FORMULA, batch_rows=100)
    asked = Asked(str(run.folder), Source(str(log)), str(tmp_path / "killed"), formula=FORMULA, batch_rows=100)
    killed = kill_and_restart(asked)
    assert contents(tmp_path / "killed") == contents(tmp_path / "calm")
    assert 0 < killed["session"]["rows"] < calm["session"]["rows"] == 1_000
    for each in (calm, killed):
        del each["session"]
    assert killed == calm  # sums over finished files come from their records
    assert score_files(asked)["session"]["rows"] == 0


def test_nothing_is_replaced_without_overwrite(run: Run, log: Path, tmp_path: Path) -> None:
    score(run, log, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds 'part-0.parquet' and 2 other files already, .* Add --overwrite"):
        score(run, log, tmp_path / "out", formula="p_click + 1")
    assert contents(tmp_path / "out") == before
    score(run, log, tmp_path / "out", formula="p_click + 1", overwrite=True)
    made = pq.read_table(tmp_path / "out")
    np.testing.assert_allclose(made["score"].to_numpy(), made["p_click"].to_numpy() + 1, rtol=1e-6)
    foreign = tmp_path / "foreign" / "part-1.parquet"
    foreign.parent.mkdir()
    shutil.copy(log / "part-1.parquet", foreign)
    with pytest.raises(ValueError, match=r"holds 'part-1\.parquet' already"):
        score(run, log, tmp_path / "foreign")


def test_the_output_does_not_lie_in_the_input(run: Run, log: Path, tmp_path: Path) -> None:
    for out in (log, log / "scores"):
        with pytest.raises(ValueError, match="OUTPUT should lie outside of INPUT"):
            score(run, log, out)
    with pytest.raises(ValueError, match="OUTPUT should be a folder"):
        score(run, log, run.folder / "run.json")


def test_bad_files_are_named_and_the_others_scored(run: Run, log: Path, tmp_path: Path) -> None:
    shutil.copytree(log, tmp_path / "in")
    whole = (log / "part-1.parquet").read_bytes()
    (tmp_path / "in" / "part-1.parquet").write_bytes(whole[:-100])  # no footer
    table = pq.read_table(log / "part-0.parquet")
    pq.write_table(table.drop_columns(["age"]), tmp_path / "in" / "part-3.parquet")
    pq.write_table(table.set_column(1, "user_id", table["item_id"]), tmp_path / "in" / "part-4.parquet")
    damaged = bytearray(whole)
    damaged[200:2_000] = os.urandom(1_800)  # the footer is whole, the pages are not
    (tmp_path / "in" / "part-5.parquet").write_bytes(damaged)
    pq.write_table(table.append_column("p_click", table["age"]), tmp_path / "in" / "part-6.parquet")
    done = CliRunner().invoke(app, ["score", str(run.folder), str(tmp_path / "in"), str(tmp_path / "out"), "--local"])
    assert done.exit_code == 1, done.output
    assert names(tmp_path / "out") == ["part-0.parquet", "part-2.parquet"]
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["complete"] is False
    problems = {Path(path).name: message for path, message in manifest["failed"].items()}
    assert sorted(problems) == [f"part-{i}.parquet" for i in (1, 3, 4, 5, 6)]
    for name, message in problems.items():
        assert name in message
    assert "cut short" in problems["part-1.parquet"]
    assert "should have a column 'age'" in problems["part-3.parquet"]
    assert "features.user_id" in problems["part-4.parquet"]
    assert "has a column 'p_click' as the output will" in problems["part-6.parquet"]
    shutil.copy(log / "part-1.parquet", tmp_path / "in" / "part-1.parquet")  # mended
    for number in (3, 4, 5, 6):
        (tmp_path / "in" / f"part-{number}.parquet").unlink()
    again = score(run, tmp_path / "in", tmp_path / "out")
    assert again["complete"]
    assert (again["rows"], again["session"]["rows"]) == (1_000, 333)


def test_only_bad_files_is_an_error_before_anything_starts(run: Run, tmp_path: Path) -> None:
    write_log(tmp_path / "in", rows=60, files=5)
    for path in (tmp_path / "in").iterdir():
        pq.write_table(pq.read_table(path).rename_columns({"age": "agee"}), path)
    with pytest.raises(ValueError, match=r"(?s)column 'age'.*Did you mean 'agee'\?.*and 2 more files"):
        score(run, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_golden_rows_refuse_another_model(run: Run, log: Path, tmp_path: Path) -> None:
    assert score(run, log, tmp_path / "out")["session"]["golden"] <= 1e-5
    changed = tmp_path / "run"
    shutil.copytree(run.folder, changed)
    state = json.loads((changed / "encoder" / "encoder.json").read_text())
    assert state["states"]["age"]
    for key in ("mean", "shift", "center"):
        if key in state["states"]["age"]:
            value = state["states"]["age"][key]
            state["states"]["age"][key] = [v + 5 for v in value] if isinstance(value, list) else value + 5
            break
    else:
        raise AssertionError(state["states"]["age"])
    (changed / "encoder" / "encoder.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"of a golden row differs by .* more than 1e-05"):
        score(open_run(changed), log, tmp_path / "refused")
    assert not names(tmp_path / "refused")
    (changed / "sample.parquet").unlink()
    with pytest.raises(ValueError, match=r"is no whole run any more: sample\.parquet is missing"):
        score(open_run(changed), log, tmp_path / "refused")


def test_every_checkpoint_holds_its_own_predictions(run: Run) -> None:
    sample = pq.read_table(run.folder / "sample.parquet")
    stored = pq.read_table(run.best().folder / "predictions.parquet")
    assert 3_000 < sample.num_rows == stored.num_rows <= 4_096
    manifest = json.loads((run.best().folder / "manifest.json").read_text())
    assert "predictions.parquet" in manifest["files"]
    with parallel.process_group(CPU):
        model = load_model(run, run.best(), CPU)
        scorer = Scorer(model, run.encoder, run.experiment, ranking_formula(run.experiment), CPU)
        made = scorer(sample.combine_chunks().to_batches()[0])
    for name in PREDICTIONS:
        np.testing.assert_allclose(made[name].to_numpy(), stored[name].to_numpy(), rtol=1e-6)


def test_provenance_stands_in_the_footer(run: Run, log: Path, tmp_path: Path) -> None:
    manifest = score(run, log, tmp_path / "out", formula=FORMULA)
    found = json.loads(pq.read_metadata(tmp_path / "out" / "part-0.parquet").metadata[b"mtrec"])
    assert found == {key: manifest[key] for key in ("run", "checkpoint", "checkpoint_sha256", "formula", "version")}
    assert found["run"] == str(run.folder)
    assert found["formula"] == FORMULA


def test_a_jump_of_nulls_is_refused(run: Run, log: Path, tmp_path: Path) -> None:
    table = pq.read_table(log / "part-0.parquet")
    age = pc.if_else(pa.array(np.arange(table.num_rows) % 4 == 0), pa.scalar(None, pa.float32()), table["age"])
    pq.write_table(table.set_column(table.column_names.index("age"), "age", age), tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=r"`features.age`: \d\.\d% -> 2\d\.\d%.*--allow-null-jump"):
        score(run, tmp_path / "in.parquet", tmp_path / "out")
    manifest = score(run, tmp_path / "in.parquet", tmp_path / "out", allow_null_jump=True)
    assert manifest["null_jumps"] == ["age"]
    assert manifest["features"]["age"]["null_share"] == pytest.approx(age.null_count / len(age))


def test_a_prediction_that_is_not_finite_fails_the_file(run: Run, log: Path, tmp_path: Path) -> None:
    rows = [pq.read_table(log / name)["age"].to_numpy() for name in names(log)]
    limit = float(np.nanmax(rows[0]))  # all fail: the score is infinite in every row
    manifest = score(run, log, tmp_path / "out", formula=f"p_click / (p_click - p_click) + {limit:f}")
    assert not names(tmp_path / "out")
    message = manifest["failed"][str(log / "part-0.parquet")]
    assert "row 0 of those scored: column 'score' should be finite. Found inf" in message


def test_top_rows_of_each_group_over_all_files(run: Run, log: Path, tmp_path: Path) -> None:
    score(run, log, tmp_path / "all")
    score(run, log, tmp_path / "top", top=2, by="item_id", columns=("row_id",))
    assert names(tmp_path / "top") == names(log)
    scored = pq.read_table(tmp_path / "all").to_pylist()
    groups: dict[str, list[tuple[float, int]]] = {}
    for place, row in enumerate(scored):
        groups.setdefault(row["item_id"], []).append((-row["score"], place))
    wanted = sorted(place for rows in groups.values() for _, place in sorted(rows)[:2])
    kept = pq.read_table(tmp_path / "top")
    assert kept["row_id"].to_pylist() == [scored[place]["row_id"] for place in wanted]
    assert kept.column_names == ["row_id", "item_id", *PREDICTIONS, "score"]
    assert score(run, log, tmp_path / "top", top=2, by="item_id", columns=("row_id",))["session"]["rows"] == 0
    with pytest.raises(ValueError, match=r"should have a column 'item'.* Did you mean 'item_id'"):
        score(run, log, tmp_path / "no", top=2, by="item", columns=())
    with pytest.raises(ValueError, match="--top K and --by COLUMN should come together"):
        score(run, log, tmp_path / "no", top=2)


def test_partitions_conditions_and_files_without_rows(run: Run, log: Path, tmp_path: Path) -> None:
    table = pq.read_table(log / "part-0.parquet")
    for day in ("2026-01-01", "2026-01-02"):
        (tmp_path / "in" / f"dt={day}").mkdir(parents=True)
        pq.write_table(table, tmp_path / "in" / f"dt={day}" / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "in" / "dt=2026-01-02" / "empty.parquet")
    score(run, tmp_path / "in", tmp_path / "out", columns=("dt", "row_id"), where="dt >= 2026-01-02 and row_id < 9")
    made = {name: pq.read_table(tmp_path / "out" / name, partitioning=None) for name in names(tmp_path / "out")}
    assert {name: each.num_rows for name, each in made.items()} == {
        "dt=2026-01-01/a.parquet": 0,
        "dt=2026-01-02/a.parquet": 9,
        "dt=2026-01-02/empty.parquet": 0,
    }
    assert made["dt=2026-01-02/a.parquet"]["dt"].type == pa.date32()
    assert len({each.schema for each in made.values()}) == 1
    # columns that no feature reads, kept or not
    score(run, tmp_path / "in" / "dt=2026-01-02" / "a.parquet", tmp_path / "other", where="row_id < 9 and click == 0")
    made_other = pq.read_table(tmp_path / "other" / "a.parquet")
    assert made_other["row_id"].to_pylist() == [row for row in range(9) if table["click"][row].as_py() == 0]
    assert "click" not in made_other.column_names
    score(run, str(tmp_path / "in" / "dt=*" / "a*"), tmp_path / "glob")
    assert names(tmp_path / "glob") == ["dt=2026-01-01/a.parquet", "dt=2026-01-02/a.parquet"]


def test_auxiliary_tasks_are_not_written(run: Run, log: Path) -> None:
    tree = run.experiment.model_dump(mode="json")
    tree["tasks"]["click"]["auxiliary"] = True
    experiment = parse_experiment(tree)
    with parallel.process_group(CPU):
        objectives = load_model(run, run.best(), CPU).objectives
    assert prediction_columns(experiment, objectives) == tuple(PREDICTIONS[1:])
    assert ranking_formula(experiment).text == "p_conversion_and_click"
    with pytest.raises(ValueError, match=r"`--formula` should use the predictions p_conversion, .* Found 'p_click'"):
        ranking_formula(experiment, "p_click")
    tree["scoring"] = {"formula": "p_clic * 2"}
    with pytest.raises(ValueError, match=r"`scoring.formula` should use"):
        ranking_formula(parse_experiment(tree))


def test_tables_that_do_not_fit_are_stated_with_their_size(run: Run) -> None:
    size = sum(table.num_embeddings * table.dim * 4 for table in run.encoder.tables)
    check_memory(run.encoder, 2 * size, "node a", 2)
    with pytest.raises(ValueError, match=r"The tables take .* in each of 2 scoring processes; node a has 0\.0 GB free"):
        check_memory(run.encoder, 2 * size - 1, "node a", 2)


@pytest.mark.skipif(not (DATA / "val.parquet").is_file(), reason=f"{DATA} holds no val.parquet; set KUAIRAND")
def test_kuairand_in_seven_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUAIRAND", str(DATA))
    recipe = Path(__file__).parents[1] / "pipelines" / "kuairand" / "mmoe.yaml"
    experiment = load_experiment(recipe, ["training.max_steps=30", "data.validation=null", "model.embedding_dim=4"])
    run = prepare(experiment, tmp_path / "run")
    train_on(1, run)
    table = pq.read_table(DATA / "val.parquet")
    (tmp_path / "in").mkdir()
    for index in range(7):
        start, stop = (table.num_rows * i // 7 for i in (index, index + 1))
        pq.write_table(table.slice(start, stop - start), tmp_path / "in" / f"{index}.parquet", row_group_size=2_000)
    columns = ("user_id", "video_id", "time_ms")
    asked = {"formula": "p_click * p_conversion**0.5 * log1p(dwell_seconds)", "columns": columns, "batch_rows": 1_000}
    score(run, tmp_path / "in", tmp_path / "calm", **asked)
    for name in names(tmp_path / "in"):
        given, made = pq.read_table(tmp_path / "in" / name), pq.read_table(tmp_path / "calm" / name)
        assert made.select(columns).equals(given.select(columns))
    made = pq.read_table(tmp_path / "calm")
    metrics = evaluate_run(run.folder, str(DATA / "val.parquet"))["tasks"]
    for task, label in (("click", "label_click"), ("conversion", "label_engage")):
        auc = roc_auc_score(table[label].to_numpy(), made[f"p_{task}"].to_numpy())
        assert auc == pytest.approx(metrics[task]["auc"], abs=1e-6)
    (tmp_path / "in" / "4.parquet").write_bytes((tmp_path / "in" / "4.parquet").read_bytes()[:-1])
    manifest = score(run, tmp_path / "in", tmp_path / "corrupt", **asked)
    assert list(manifest["failed"]) == [str(tmp_path / "in" / "4.parquet")]
    calm = contents(tmp_path / "calm")
    del calm["4.parquet"]
    assert contents(tmp_path / "corrupt") == calm


def test_the_rows_to_look_through_are_those_of_row_groups_in_which_the_condition_can_be_true(
    run: Run, log: Path, tmp_path: Path
) -> None:
    told: list[dict[str, Any]] = []
    asked = Asked(str(run.folder), Source(str(log), "row_id < 50"), str(tmp_path / "out"))
    manifest = score_files(asked, on_start=told.append)
    assert manifest["rows"] == 50
    groups = [pq.ParquetFile(path).metadata.row_group(0).num_rows for path in sorted(log.glob("*.parquet"))]
    assert told[0]["rows"] == groups[0] < sum(groups)
    assert told[0]["where"] == "row_id < 50"
