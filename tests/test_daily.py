"""The recipe of daily training: what is promoted, what is kept out, and that it goes on where it was."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from logs import experiment_tree
from recipes import recipe

from mtrec.compare.gate import NonInferiority
from mtrec.config import parse_experiment
from mtrec.experiment import Source
from mtrec.run import open_run

daily: Any = recipe("daily/daily.py")


def gate(value: float, half: float = 0.002, in_service: float = 0.75) -> NonInferiority:
    return NonInferiority("auc", 0.01, in_service, in_service + value, value, value - half, value + half, 9, 9, "")


@pytest.mark.parametrize(
    ("gates", "decision"),
    [
        ({}, "promoted"),
        ({"click/auc": gate(0.001), "buy/auc": gate(-0.005)}, "promoted"),
        ({"click/auc": gate(0.02), "buy/auc": gate(-0.009)}, "kept out"),  # one task may be worse by more than the margin
        ({"click/auc": gate(0.001, half=0.02), "buy/auc": gate(0.0)}, "kept out"),  # too few rows to know
        ({"click/auc": gate(math.nan), "buy/auc": gate(0.0)}, "kept out"),
        ({"click/auc": gate(0.0, in_service=0.5), "buy/auc": gate(0.0)}, "undecided"),  # broken labels: all models are alike
        ({"click/auc": gate(0.1, in_service=0.5), "buy/auc": gate(0.0)}, "promoted"),  # the world changed, the candidate knows
    ],
)
def test_decisions(gates: dict[str, NonInferiority], decision: str) -> None:
    assert daily.decide(gates, {"click/auc": 0.75, "buy/auc": 0.75}, max_drop=0.05)[0] == decision


def test_a_day_keeps_what_the_experiment_says_of_its_rows(tmp_path: Path) -> None:
    tree: dict[str, Any] = experiment_tree(tmp_path / "train", tmp_path / "validation")
    tree["data"]["train"] = {"path": "logs", "where": "tab in [0, 1] or vip"}
    tree["training"] = {"best_metric": "click/auc", "early_stopping": {"patience": 2}}
    tree["training"]["checkpoint_storage"] = "s3://b/runs/?region=eu"
    experiment = parse_experiment(tree)
    source = Source(path="logs", window=("a", "b"), where=daily.both(experiment.data.train.where, "dt != 2026-11-01", None))
    made = parse_experiment(daily.of_day(experiment, "2026-11-02", source).model_dump(mode="json"))
    assert made.data.train.where == "(tab in [0, 1] or vip) and (dt != 2026-11-01)"
    assert made.data.validation is None
    assert made.training.checkpoint_storage == "s3://b/runs/2026-11-02?region=eu"
    assert made.training.best_metric is made.training.early_stopping is None


@pytest.mark.slow
def test_a_day_of_broken_labels_is_not_promoted_and_its_rows_are_left_out(tmp_path: Path) -> None:
    arguments = [str(tmp_path), "--days", "4", "--bad-day", "3", "--rows", "25000", "--margin", "0.02"]
    daily.main(arguments)
    days = daily.read_days(tmp_path)
    first, second, third, fourth = [each.day for each in days]
    assert [each.decision for each in days] == ["promoted", "undecided", "kept out", "promoted"]
    assert [each.started_from for each in days] == [None, first, first, first]
    assert (days[2].window, days[2].rows) == ((third, third), 25_000)  # a day that looks broken is tried alone
    assert (days[3].window, days[3].left_out, days[3].rows) == ((second, fourth), (third,), 50_000)
    assert all(0 < day.new_ids["user_id"] < 200 for day in days[1:])
    assert json.loads((tmp_path / "in_service.json").read_text())["day"] == fourth
    run = open_run(tmp_path / "runs" / fourth)
    assert run.info["warm_start"] == str(tmp_path / "runs" / first)
    assert all(days[2].gates[name].high < 0 for name in ("click/auc", "dwell/xauc"))
    # the labels of the broken day are those of other rows, its features are its own
    broken = pq.read_table(tmp_path / "logs" / f"dt={third}")
    assert broken["click"].to_numpy().mean() == pytest.approx(0.3, abs=0.03)
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"- {second}: undecided, the model in service fell from click/auc" in text

    # what was decided stays, a day whose decision was lost is decided again, from its finished run
    (tmp_path / "days.json").write_text(json.dumps([dataclasses.asdict(each) for each in days[:-1]]))
    daily.main(arguments)
    again = daily.read_days(tmp_path)
    assert [dataclasses.replace(each, seconds=0) for each in again] == [dataclasses.replace(each, seconds=0) for each in days]
