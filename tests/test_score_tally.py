"""What a scoring tells of its rows beside the predictions: labels that are there, unseen ids, drift; its sums over files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logs import experiment_tree
from runs import run_to_score, score

from mtrec.config import parse_experiment
from mtrec.display_scoring import show_scoring
from mtrec.formula import ranking_formula
from mtrec.launch import evaluate_run
from mtrec.model import task_specs
from mtrec.run import Run
from mtrec.score import LabelledSums, Tally, open_scorer
from mtrec.tasks import Objectives

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_to_score(tmp_path_factory.mktemp("tally"), 1)


@pytest.fixture(scope="module")
def log(run: Run) -> Path:
    return run.folder.parent / "log-4000" / "validation"


def test_labels_may_be_absent_and_unseen_ids_are_counted(run: Run, log: Path, tmp_path: Path) -> None:
    table = pq.read_table(log / "part-0.parquet").drop_columns(["click", "conversion", "dwell_seconds"])
    users = table["user_id"].to_numpy().copy()
    users[: len(users) // 4] = -1 - np.arange(len(users) // 4)
    (tmp_path / "in").mkdir()
    pq.write_table(table.set_column(1, "user_id", pa.array(users)), tmp_path / "in" / "a.parquet")
    manifest = score(run, tmp_path / "in", tmp_path / "out")
    assert manifest["labels"] == {}
    assert 1 not in run.encoder.encode(table.to_batches()[0]).values[: table.num_rows].tolist()  # all were trained
    assert manifest["features"]["user_id"]["unseen_share"] == pytest.approx((len(users) // 4) / len(users))
    assert manifest["features"]["item_id"]["unseen_share"] == 0


def test_labels_that_are_there_are_compared(
    run: Run, log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = score(run, log, tmp_path / "out")
    found = manifest["labels"]
    show_scoring(manifest, "out")
    assert "AUC (binned)" in capsys.readouterr().out  # `evaluate` shows another number as AUC
    metrics = evaluate_run(run.folder, str(log))["tasks"]
    for task in ("click", "conversion"):
        assert found[task]["calibration"] == pytest.approx(metrics[task]["calibration"], rel=1e-6)
        assert abs(found[task]["auc"] - metrics[task]["auc"]) <= found[task]["auc_error_bound"] + 1e-9
        assert found[task]["auc_error_bound"] < 0.01
    assert found["dwell"]["calibration"] == pytest.approx(metrics["dwell"]["sum_ratio"], rel=1e-6)
    table = pq.read_table(log / "part-0.parquet")
    bad = table.set_column(table.column_names.index("click"), "click", pa.array([7] * table.num_rows))
    pq.write_table(bad, tmp_path / "bad.parquet")
    manifest = score(run, tmp_path / "bad.parquet", tmp_path / "bad", columns=("row_id",))
    assert manifest["complete"]
    assert "labels are not compared: " in manifest["notes"][0]


def test_drift_of_predictions_shows(run: Run, log: Path, tmp_path: Path) -> None:
    same = score(run, log, tmp_path / "same")["predictions"]["p_click"]
    assert same["psi"] < 0.1
    assert same["mean"] == pytest.approx(same["training_mean"], abs=0.03)
    table = pq.read_table(log / "part-0.parquet")
    liked = pq.read_table(tmp_path / "same" / "part-0.parquet")["p_click"].to_numpy()
    pq.write_table(table.filter(pa.array(liked > np.median(liked))), tmp_path / "liked.parquet")
    assert score(run, tmp_path / "liked.parquet", tmp_path / "liked")["predictions"]["p_click"]["psi"] > 0.25


def test_a_tally_goes_through_json(run: Run, log: Path) -> None:
    with open_scorer(run, run.best(), ranking_formula(run.experiment), CPU) as scorer:
        tally = Tally.empty(run.encoder, run.experiment)
        rows = pq.read_table(log).combine_chunks().to_batches()[0]
        made = scorer.predict(scorer.encode(rows, tally.counts))
    tally.labelled.update(["click", "conversion", "dwell"], rows, made)
    for name, values in made.items():
        tally.summaries[name].update(values)
    restored = Tally.empty(run.encoder, run.experiment).restore(json.loads(json.dumps(tally.state())))
    assert restored.state() == tally.state()
    both = Tally.empty(run.encoder, run.experiment)
    both.merge(tally)
    both.merge(restored)
    assert both.labelled.compute()["click"]["rows"] == 2 * tally.labelled.compute()["click"]["rows"]
    assert both.counts.null_share() == tally.counts.null_share()


def test_sums_leave_out_rows_without_a_label_and_tasks_whose_labels_are_not_all_there(tmp_path: Path) -> None:
    tree: dict[str, Any] = experiment_tree(tmp_path)
    tree["tasks"]["spent"] = {"kind": "regression", "label": "dwell_seconds"}
    experiment = parse_experiment(tree)
    objectives = Objectives(task_specs(experiment))
    rows = pa.record_batch(
        {
            "click": pa.array([1, 1, 0, None], pa.int8()),
            "conversion": pa.array([1, 0, None, 1], pa.int8()),
            "dwell_seconds": pa.array([4.0, None, 6.0, None]),
        }
    )
    predictions = {name: np.full(4, 0.5) for name in ("p_click", "p_conversion_and_click")}
    predictions |= {"dwell_seconds_expected": np.array([1.0, 2.0, 3.0, 9.0]), "spent": np.array([5.0, 99.0, 7.0, 99.0])}
    sums = LabelledSums(experiment, objectives)
    assert sums.known(["click", "conversion"]) == ("click", "conversion")
    assert sums.known(["conversion", "dwell_seconds"]) == ("spent",)
    for _ in range(2):
        sums.update(["click", "conversion", "dwell", "spent"], rows, predictions)
    found = sums.compute()
    assert {name: each["rows"] for name, each in found.items()} == {"click": 6, "conversion": 6, "dwell": 4, "spent": 4}
    assert {name: each["calibration"] for name, each in found.items()} == pytest.approx(
        {"click": 1.5 / 2, "conversion": 1.5 / 1, "dwell": (1.0 + 3.0) / 4.0, "spent": 12.0 / 10.0}
    )
