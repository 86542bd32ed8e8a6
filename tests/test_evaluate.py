"""A whole evaluation: the same on any number of ranks, and scikit-learn's."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logs import experiment_tree, write_log
from ranks import run_ranks
from runs import small_run, train_on
from sklearn.metrics import roc_auc_score

import mtrec.evaluate
from mtrec import parallel
from mtrec.launch import evaluate_run
from mtrec.model import MultiTaskModel
from mtrec.step import build_state
from mtrec.train import train

CPU = torch.device("cpu")


def evaluated(folder: str, data: str) -> dict[str, Any]:
    return evaluate_run(Path(folder), data, by="click")


def evaluated_in_pieces(folder: str, data: str) -> dict[str, Any]:
    """As `evaluated`, the rows sent to rank 0 seventeen at a time."""
    mtrec.evaluate.PIECE_ROWS = 17
    return evaluated(folder, data)


def test_evaluation_is_the_same_on_one_two_and_three_ranks(tmp_path: Path) -> None:

    run = small_run(tmp_path, "evaluation.group_by=user_id", "features.tags.sharding=data_parallel")
    train_on(1, run)
    data = str(run.experiment.data.validation.path)  # type: ignore[union-attr]
    one, *others = (run_ranks(world, evaluated, str(run.folder), data, folder=tmp_path / "ranks")[0] for world in (1, 2, 3))
    assert one["rows"] == 1_000
    assert one["tasks"]["click"]["gauc"] is not None
    pieces = run_ranks(3, evaluated_in_pieces, str(run.folder), data, folder=tmp_path / "ranks")[0]
    for other in (*others, pieces):
        assert _flat(other).keys() == _flat(one).keys()
        for path, value in _flat(one).items():
            assert _flat(other)[path] == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-6)), path


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {name: value for key, below in tree.items() for name, value in _flat(below, f"{path}/{key}").items()}


def test_auc_of_a_whole_evaluation_is_scikit_learns(tmp_path: Path) -> None:
    from mtrec.evaluate import whole_reader
    from mtrec.feed import feed
    from mtrec.labels import labels_of
    from mtrec.launch import load_model
    from mtrec.sources import label_columns, open_source

    run = small_run(tmp_path)
    list(train(run, device=CPU))
    validation = run.experiment.data.validation
    assert validation is not None
    metrics = evaluate_run(run.folder, str(validation.path))
    with parallel.process_group(CPU), torch.no_grad():
        model = load_model(run, run.best(), CPU)
        data = open_source(run.experiment, validation, "data.validation")
        reader = whole_reader(data, run.encoder, label_columns(run.experiment), 300)
        found: dict[str, list[Any]] = {
            "p_click": [],
            "p_conversion": [],
            "p_conversion_and_click": [],
            "click": [],
            "conversion": [],
        }
        for _, batch in feed(reader, run.encoder, labels_of(run.experiment, model.specs)):
            columns = model.objectives.predictions({name: x.double() for name, x in model(batch).items()})
            for name in found:
                found[name].append((columns[name] if name in columns else batch.labels[name]).numpy())
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    clicked = joined["click"] == 1
    tasks = metrics["tasks"]
    assert tasks["click"]["auc"] == pytest.approx(roc_auc_score(joined["click"], joined["p_click"]), abs=1e-6)
    joint = roc_auc_score(joined["conversion"], joined["p_conversion_and_click"])
    assert tasks["conversion"]["auc"] == pytest.approx(joint, abs=1e-6)
    given = roc_auc_score(joined["conversion"][clicked], joined["p_conversion"][clicked])
    assert tasks["conversion"]["auc_given"] == pytest.approx(given, abs=1e-6)


def test_segments_weights_groups_and_rows_of_another_task_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from oracles import brute_gauc

    from mtrec.batch import make_batch
    from mtrec.evaluate import evaluate
    from mtrec.metrics import group_keys
    from mtrec.sources import open_source

    table = pa.concat_tables([pq.read_table(path) for path in sorted(write_log(tmp_path / "plain", 1_500).glob("*"))])
    rng = np.random.default_rng(3)
    weight, country = rng.integers(1, 5, 1_500), rng.choice(["DE", "FR", "PL"], 1_500)
    table = table.append_column("weight", pa.array(weight)).append_column("country", pa.array(country.tolist()))
    (tmp_path / "log").mkdir()
    pq.write_table(table, tmp_path / "log" / "a.parquet", row_group_size=400)
    tree: dict[str, Any] = experiment_tree(tmp_path / "log", tmp_path / "log")
    tree["data"]["sample_weight"] = "weight"
    tree["evaluation"] = {"group_by": "item_id", "batch_size": 256}
    tree["tasks"]["late"] = {"kind": "binary", "label": "conversion", "also_on": "click"}
    run = small_run(tmp_path, tree=tree)
    validation = run.experiment.data.validation
    assert validation is not None
    with parallel.process_group(CPU), torch.no_grad():
        model = MultiTaskModel(run.experiment, run.encoder, run.labels, CPU)
        build_state(run.experiment, model, run.labels, batch_size=128, total_steps=1, device=CPU)
        for parameter in model.dense.parameters():
            parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(1))
        data = open_source(run.experiment, validation, "data.validation", ["weight", "country"])
        metrics = evaluate(model, data, run.experiment, run.encoder, device=CPU, by="country")
        model.eval()
        logits = model(make_batch(table.combine_chunks().to_batches()[0], run.encoder, {}, None))
        predictions = model.objectives.predictions({name: each.double() for name, each in logits.items()})
        found = {name: each.numpy() for name, each in predictions.items()}
    click, conversion = table["click"].to_numpy(), table["conversion"].to_numpy()
    seconds = np.where(click == 1, table["dwell_seconds"].fill_null(0).to_numpy(), 0.0)
    groups = group_keys(table["item_id"])

    def assert_metrics(tasks: dict[str, Any], rows: np.ndarray) -> None:
        clicked = rows & (click == 1)
        gauc, coverage = brute_gauc(found["p_click"][rows], click[rows].astype(float), groups[rows], weight[rows])
        for path, wanted in {
            "click/auc": roc_auc_score(click[rows], found["p_click"][rows], sample_weight=weight[rows]),
            "click/gauc": gauc,
            "click/gauc_coverage": coverage,
            "late/auc": roc_auc_score(conversion[rows], found["p_late"][rows], sample_weight=weight[rows]),
            "late/auc_given": roc_auc_score(conversion[clicked], found["p_late"][clicked], sample_weight=weight[clicked]),
            "dwell/mae": np.average(np.abs(found["dwell_seconds_expected"] - seconds)[rows], weights=weight[rows]),
            "dwell/mae_given": np.average(np.abs(found["dwell_seconds"] - seconds)[clicked], weights=weight[clicked]),
        }.items():
            name, metric = path.split("/")
            assert tasks[name][metric] == pytest.approx(wanted, rel=1e-5), path

    assert_metrics(metrics["tasks"], np.ones(1_500, np.bool_))
    assert list(metrics["by"]["country"]) == ["DE", "FR", "PL"]
    for name, segment in metrics["by"]["country"].items():
        assert segment["rows"] == (country == name).sum()
        assert_metrics(segment["tasks"], country == name)


def test_segments_keep_every_row_of_null_and_nan() -> None:
    column = pa.array([None, "null", "DE", None])
    found = {value: rows.tolist() for value, rows in mtrec.evaluate._split(column)}
    assert found == {None: [0, 3], "null": [1], "DE": [2]}
    names: dict[str, Any] = {}
    for value in ("DE", "null", None):
        names[mtrec.evaluate.segment_name(value, names)] = value
    assert names == {"DE": "DE", "null": "null", "(null)": None}
    floats = pa.array([math.nan, 1.0, None, math.nan])
    assert {value: rows.tolist() for value, rows in mtrec.evaluate._split(floats)} == {None: [2], 1.0: [1], "nan": [0, 3]}
