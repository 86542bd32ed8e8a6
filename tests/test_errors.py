"""Each mistake gets one clear error that names the place, from `mtrec check` and from `mtrec train`, before a worker starts."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from logs import experiment_tree, write_log
from typer.testing import CliRunner

from mtrec.cli import app

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    write_log(folder / "train", rows=1_000, files=2)
    write_log(folder / "validation", rows=300, seed=1, files=1)
    return folder


def altered(log: Path, out: Path, change: Callable[[pa.Table], pa.Table]) -> str:
    """A copy of the training files, the second one changed."""
    out.mkdir()
    for index, path in enumerate(sorted((log / "train").iterdir())):
        table = pq.read_table(path)
        pq.write_table(change(table) if index == 1 else table, out / path.name)
    return str(out)


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.names.index(name), name, values)


def put(tree: Tree, path: str, value: Any) -> None:
    *keys, last = path.split(".")
    for key in keys:
        tree = tree[key]
    tree[last] = value


def _label_two(table: pa.Table) -> pa.Table:
    return set_column(table, "click", pa.array([2] + [0] * (len(table) - 1), pa.int8()))


def _negative_dwell(table: pa.Table) -> pa.Table:
    return set_column(table, "dwell_seconds", pa.array([-3.5] * len(table), pa.float32()))


def _weighted(log: Path, out: Path) -> str:
    """The training files with a weight `w` and a vector `v`, of which those of the second file's fourth row cannot be used."""

    def added(table: pa.Table, bad: bool) -> pa.Table:
        rest = len(table) - 4
        table = table.append_column("w", pa.array([1.0, 0.0, None, -2.0 if bad else 2.0] + [2.5] * rest))
        return table.append_column("v", pa.array([[1.0, 2.0]] * 3 + [[1.0] if bad else [0.0, 0.0]] + [[1.0, 2.0]] * rest))

    out.mkdir()
    for index, path in enumerate(sorted((log / "train").iterdir())):
        pq.write_table(added(pq.read_table(path), index == 1), out / path.name)
    return str(out)


def _half_click(table: pa.Table) -> pa.Table:
    return set_column(table, "click", pc.cast(table["click"], pa.float32()).combine_chunks().fill_null(0.5)).slice(0)


CASES: dict[str, tuple[Callable[[Tree, Path, Path], None], list[str]]] = {
    "unknown key": (lambda t, log, out: put(t, "training.epoch", 3), ["`training.epoch` is not a known key", "'epochs'"]),
    "wrong type": (lambda t, log, out: put(t, "training.epochs", "many"), ["`training.epochs` should be", "'many'"]),
    "missing file": (lambda t, log, out: put(t, "data.train", str(out / "none.parquet")), ["`data.train", "none.parquet"]),
    "missing column": (
        lambda t, log, out: put(t, "features.user_id.column", "user_idd"),
        ["user_idd", "Did you mean 'user_id'?"],
    ),
    "string for a number": (
        lambda t, log, out: put(t, "features.age.column", "item_id"),
        ["`features.age.column`", "item_id", "string"],
    ),
    "list for a scalar": (lambda t, log, out: put(t, "features.age.column", "tags"), ["`features.age", "tags", "list"]),
    "list for a label": (lambda t, log, out: put(t, "tasks.click.label", "tags"), ["tags", "tasks.click"]),
    "text for a label": (lambda t, log, out: put(t, "tasks.click.label", "item_id"), ["item_id", "tasks.click"]),
    "label 2": (
        lambda t, log, out: put(t, "data.train", altered(log, out / "two", _label_two)),
        ["`tasks.click.label`", "column 'click' should be 0 or 1", "Found 2"],
    ),
    "negative dwell": (
        lambda t, log, out: put(t, "data.train", altered(log, out / "negative", _negative_dwell)),
        ["`tasks.dwell.label`", "column 'dwell_seconds' should be at least 0", "Found -3.5"],
    ),
    "given names no task": (lambda t, log, out: put(t, "tasks.dwell.given", "clik"), ["`tasks.dwell.given`", "'click'"]),
    "given in a circle": (
        lambda t, log, out: put(t, "tasks.click.given", "conversion"),
        ["given`", "Found", "->"],
    ),
    "table of no rows": (
        lambda t, log, out: put(t, "features.user_id.num_embeddings", 0),
        ["`features.user_id.num_embeddings", "Found 0"],
    ),
    "sharding that the CPU lacks": (
        lambda t, log, out: put(t, "features.user_id.sharding", "row_wise"),
        ["`features.user_id.sharding`", "row_wise", "CPU"],
    ),
    "optimizer that the CPU lacks": (
        lambda t, log, out: put(t, "optimizer", {"tables": {"kind": "adam"}}),
        ["`optimizer.tables.kind`", "adam", "CPU"],
    ),
    "no training rows": (
        lambda t, log, out: put(t, "data.train", {"path": str(log / "train"), "where": "row_id < 0"}),
        ["`data.train", "row_id < 0"],
    ),
    "file cut short": (lambda t, log, out: put(t, "data.train", _cut(log, out / "cut")), ["part-1.parquet"]),
    "best metric of no task": (
        lambda t, log, out: put(t, "training.best_metric", "clik/auc"),
        ["`training.best_metric`", "clik", "'click'"],
    ),
    "also_on names no task": (
        lambda t, log, out: put(t, "tasks.click.also_on", "convresion"),
        ["`tasks.click.also_on`", "'conversion'"],
    ),
    "label 2 among the validation rows": (
        lambda t, log, out: put(t, "data.validation", altered(log, out / "two", _label_two)),
        ["`tasks.click.label`", "Found 2", "`data.validation`"],
    ),
    "best metric without a direction": (
        lambda t, log, out: put(t, "training.best_metric", "click/calibration"),
        ["`training.best_metric`", "click/calibration", "log_loss"],
    ),
    "early stopping without validation": (
        lambda t, log, out: (t["data"].pop("validation"), put(t, "training.early_stopping", {"patience": 2})),
        ["`training.early_stopping` needs `data.validation`"],
    ),
    "also_on names the task itself": (
        lambda t, log, out: put(t, "tasks.click.also_on", "click"),
        ["`tasks.click.also_on` should name another task"],
    ),
    "negative weight": (
        lambda t, log, out: (put(t, "data", {"train": _weighted(log, out / "w")}), put(t, "data.sample_weight", "w")),
        ["part-1.parquet', row group 0, row 3: `data.sample_weight`: column 'w' should hold finite weights", "Found -2.0"],
    ),
    "vector of another width": (
        lambda t, log, out: (
            put(t, "data", {"train": _weighted(log, out / "v")}),
            put(t, "features.v", {"kind": "dense", "width": 2}),
        ),
        ["part-1.parquet', row group 0, row 3: `features.v.column`: column 'v' should hold 2 numbers a row. Found 1 numbers"],
    ),
    "storage that is no URI": (
        lambda t, log, out: put(t, "training.checkpoint_storage", "runs/x"),
        ["`training.checkpoint_storage` should be a URI", "'runs/x'"],
    ),
    "group column missing": (lambda t, log, out: put(t, "evaluation", {"group_by": "usr"}), ["usr"]),
}


def _cut(log: Path, out: Path) -> str:
    out.mkdir()
    for path in (log / "train").iterdir():
        content = path.read_bytes()
        (out / path.name).write_bytes(content[: len(content) // 2] if path.name == "part-1.parquet" else content)
    return str(out)


def test_check_tells_where_nothing_is_held_out(log: Path, tmp_path: Path) -> None:
    tree = experiment_tree(log / "train", log / "train")
    tree["data"]["test"] = str(log / "validation")  # type: ignore[index]
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    text = " ".join(CliRunner().invoke(app, ["check", str(path)]).output.split())
    assert "`data.train` and `data.validation` read the same rows, as those of '" in text
    assert text.count("nothing is held out there") == 1


def test_check_tells_what_shuffling_takes(tmp_path: Path) -> None:
    rows = 3_000
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8 * rows, dtype=np.float32)), 8)
    table = pa.table({"user": np.arange(rows) % 7, "vector": vectors, "click": np.arange(rows) % 2, "weight": np.ones(rows)})
    pq.write_table(table, tmp_path / "log.parquet", row_group_size=1_000)
    tree = {
        "data": {"train": str(tmp_path / "log.parquet"), "shuffle_window": 250, "num_streams": 2, "sample_weight": "weight"},
        "features": {"user": {"kind": "categorical"}, "vector": {"kind": "dense"}},
        "tasks": {"click": {"kind": "binary"}},
    }
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(tree))
    text = " ".join(CliRunner().invoke(app, ["check", str(tmp_path / "experiment.yaml")]).output.split())
    # an id, eight numbers, a label and a weight, of 4 bytes each; of two streams four windows each, and one that is read ahead
    told = "an encoded row takes 44 bytes; the readers of all workers hold 2,500 of them at most, 0.1 MB"
    assert f"{told} (`data.shuffle_window` 250, 2 streams)" in text


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("command", ["check", "train"])
def test_a_mistake_is_named_before_a_worker_starts(name: str, command: str, log: Path, tmp_path: Path) -> None:
    change, expected = CASES[name]
    tree = copy.deepcopy(experiment_tree(log / "train", log / "validation"))
    change(tree, log, tmp_path)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    output = tmp_path / "run"
    arguments = ["check", str(path)] if command == "check" else ["train", str(path), "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ValueError), result.output
    for part in expected:
        assert part in str(result.exception)
    assert not (output / "run.json").exists()


def test_two_features_with_one_name(log: Path, tmp_path: Path) -> None:
    text = yaml.safe_dump(experiment_tree(log / "train")).replace("features:\n", "features:\n  age: {kind: categorical}\n")
    (tmp_path / "twice.yaml").write_text(text)
    for command in ("check", "train"):
        result = CliRunner().invoke(app, [command, str(tmp_path / "twice.yaml")])
        assert isinstance(result.exception, ValueError)
        assert "the key `age` stands twice" in str(result.exception)


def test_a_bad_label_that_footers_do_not_show_is_named_by_its_row(log: Path, tmp_path: Path) -> None:
    def late(table: pa.Table) -> pa.Table:
        return set_column(table, "click", pa.array([0] * (len(table) - 1) + [7], pa.int8()))

    tree = experiment_tree(log / "train")
    tree["data"] = {"train": {"path": altered(log, tmp_path / "late", late), "where": "price > -1"}, "batch_size": 128}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["train", str(path), "--local", "--output", str(tmp_path / "run")])
    assert isinstance(result.exception, ValueError)
    assert "column 'click' should be 0, 1 or null. Found 7" in str(result.exception)
    assert "part-1.parquet', row group 0, row 499: " in str(result.exception)


def test_check_shows_sizes_rates_drift_leaks_and_broken_funnels(log: Path, tmp_path: Path) -> None:
    def leak(table: pa.Table) -> pa.Table:
        return table.append_column("clicked_before", table["click"])

    def numbers(table: pa.Table) -> pa.Table:
        table = table.append_column("cost", pa.array([math.inf, -math.inf, None, *[1.5] * (len(table) - 3)]))
        table = table.append_column("nothing", pa.array([0.0] * len(table)))
        return table.append_column("vector", pa.array([[0.5, math.inf]] * len(table), pa.list_(pa.float32(), 2)))

    leaking = tmp_path / "leak"
    leaking.mkdir()
    for path in (log / "train").iterdir():
        table = numbers(leak(pq.read_table(path)))
        pq.write_table(set_column(table, "conversion", pa.array([1] * len(table), pa.int8())), leaking / path.name)
    tree = copy.deepcopy(experiment_tree(leaking, leaking))
    tree["features"]["leak"] = {"kind": "categorical", "column": "clicked_before"}
    tree["features"]["row"] = {"kind": "dense", "column": "row_id"}
    tree["features"] |= {"cost": {"kind": "dense"}, "vector": {"kind": "dense"}}
    tree["features"]["once"] = {"kind": "categorical", "column": "row_id"}
    tree["data"]["sample_weight"] = "nothing"
    tree["data"]["validation"] = {"path": str(leaking), "where": "row_id >= 900"}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["check", str(path)])
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "`features.leak` gives the label of task 'click' away" in text
    assert "`features.row` drifts" in text
    assert "`features.cost`: 4 of 1,000 sampled values in column 'cost' are infinite (0.40%). They count as missing." in text
    assert "`features.vector`: 1,000 of 2,000 sampled values" in text
    assert text.count("are infinite") == 2
    assert "have a label above 0 in column 'conversion' although click is 0" in text
    assert "nothing is held out" not in text
    assert "table once (once): no id came `min_count` times in the sample: all are unseen." in text
    assert "`data.sample_weight`: all sampled rows that `tasks.dwell` learns from have the weight 0." in text
    assert "dense part:" in text
    assert "MFLOP a row" in text
