"""A corpus of bad inputs: files, rows, configurations; each told in one error that names the place, what was found, what to do.

Each is made from a good log and a good experiment by one change, and is met by `mtrec check` or, where only rows show it, by
`mtrec train`. More of them stand in test_errors.py (met by both commands) and test_config.py (the words of single keys).
"""

import copy
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from changes import (
    Change,
    Tree,
    added,
    both,
    by_day,
    column,
    empty_folder,
    feature,
    in_file,
    in_table,
    linked,
    put,
    replaced,
    train_is,
    value,
)
from logs import experiment_tree, write_log
from runs import small_run
from typer.testing import CliRunner

from mtrec.cli import app
from mtrec.events import Ended, Step
from mtrec.files import ChangedFile
from mtrec.run import Run
from mtrec.train import train

ROWS, HALF = 600, 300


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_log(folder / "train", rows=ROWS, files=2, row_group_rows=100)
    write_log(folder / "validation", rows=200, seed=1, files=1)
    return folder


I8, I64, F32, F64 = pa.int8(), pa.int64(), pa.float32(), pa.float64()
PART = "train/part-1.parquet'"
LAST, SEVENTEENTH = f"{PART}, row group 2, row 99", f"{PART}, row group 2, row 17"
BOTH_FILES = ["train/part-0.parquet", "train/part-1.parquet"]
VALIDATION = "validation/part-0.parquet"
no_rows, no_clicks = (lambda table: table.slice(0, 0)), (lambda table: replaced(table, "click", pa.array([0] * len(table), I8)))


def no_seconds(table: pa.Table) -> pa.Table:
    return replaced(table, "dwell_seconds", pa.nulls(len(table), F32))


FILES: dict[str, tuple[Change, list[str]]] = {
    "empty": (in_file(lambda old: b""), [PART, "should be a whole Parquet file. Found 0 bytes"]),
    "CSV": (in_file(lambda old: b"user_id,item_id\n" * 10), [PART, "it is no Parquet"]),
    "six bytes": (in_file(lambda old: old[:6]), [PART, "Found 6 bytes", "cut short"]),
    "half": (in_file(lambda old: old[: len(old) // 2]), [PART, "that do not end with PAR1: the file was cut short"]),
    "footer longer than the file": (
        in_file(lambda old: old[:-8] + (10**8).to_bytes(4, "little") + b"PAR1"),
        [PART, "Found a footer of 100000008 bytes in a file of", "damaged"],
    ),
    "footer damaged": (in_file(lambda old: old[:-108] + bytes(100) + old[-8:]), [PART, "Found a damaged footer"]),
    "page damaged": (in_file(lambda old: old[:4] + bytes(3000) + old[3004:]), [f"{PART}, row group 0, cannot be decoded"]),
    "encrypted": (in_file(lambda old: old[:-4] + b"PARE"), [PART, "encrypted Parquet is not read"]),
    "broken link": (
        lambda tree, folder: (folder / "train/part-2.parquet").symlink_to(folder / "gone"),
        ["train/part-2.parquet'", "a link to a file that is not there"],
    ),
    "folder without Parquet": (both(empty_folder, train_is(path="{}/other")), ["`data.train.path`", "/other'"]),
    "folder misspelt": (train_is(path="{}/trian"), ["`data.train.path`", "/trian'", "Did you mean 'train'?"]),
    "glob of nothing": (train_is(path="{}/train/*.pq"), ["`data.train.path` should match", "/*.pq'"]),
    "no path": (put(data__train=[]), ["`data.train.path` should name at least one", "an empty list"]),
    "unknown file system": (train_is(path="ftp://host/logs"), ["`data.train.path`", "ftp://host/logs", "Unrecognized"]),
    "column missing in one file": (
        in_table(lambda table: table.drop_columns(["price"])),
        ["`data.train` should have a column 'price', which `features.price` asks for", PART, "`optional: true` on `features"],
    ),
    "column missing in all files": (
        put(features__cost={"kind": "dense"}),
        ["column 'cost', which `features.cost` asks for", "Columns there: row_id", "`optional: true` on `features.cost` reads"],
    ),
    "group misspelt": (
        put(evaluation__group_by="userid"),
        ["`data.validation` should have a column 'userid', which `evaluation.group_by` asks for", "Did you mean 'user_id'?"],
    ),
    "column twice": (in_table(lambda table: table.append_column("price", table["price"])), [PART, "Found twice: price"]),
    "strings beside integers": (
        column("user_id", lambda old: old.cast(pa.string())),
        ["`data.train`", "one type for column 'user_id'", "int64 in", "string in", *BOTH_FILES],
    ),
    "lists beside scalars": (
        column("item_id", lambda old: pa.array([[each] for each in old.to_pylist()])),
        ["one type for column 'item_id'", "list<", *BOTH_FILES],
    ),
    "numbers beside strings": (
        column("item_id", lambda old: pa.array([1.5] * len(old))),
        ["one type for column 'item_id'", "double in", *BOTH_FILES],
    ),
    "unsigned ids that signed ones cannot hold": (
        column("user_id", lambda old: pa.array([2**63 + 5] * len(old), pa.uint64())),
        [f"{PART}, row group 0, column 'user_id'", "uint64 should become int64", "9223372036854775813"],
    ),
    "integers that floats cannot hold": (
        both(
            put(features__row={"kind": "dense", "column": "row_id"}),
            in_table(lambda table: replaced(table, "row_id", pa.array([0.5] * HALF)), "train/part-0.parquet"),
            value("row_id", 2**53 + 1, I64),
        ),
        [f"{PART}, row group 2, column 'row_id'", "int64 should become double", "9007199254740993"],
    ),
    "structs": (
        both(added("s", [{"a": 1}], pa.struct([("a", I64)])), put(features__s={"kind": "categorical"})),
        ["`features.s.column` should hold ids", "column 's' of type struct"],
    ),
    "no rows": (
        both(in_table(no_rows), in_table(no_rows, "train/part-0.parquet")),
        ["`data.train` should have at least one row", "part-0.parquet' and 1 other file, with no rows"],
    ),
    "window without files": (
        both(by_day, train_is(path="{}/days", window=["2027-01-01", "2027-01-02"])),
        ["`data.train`", "2027-01-01 <= dt <= 2027-01-02", "2 files (600 rows) rule it out"],
    ),
    "window turned round": (
        both(by_day, train_is(path="{}/days", window=["2026-11-02", "2026-11-01"])),
        ["`data.train.window` should be [first, last]. Found 2026-11-02, which is after 2026-11-01"],
    ),
    "window of words": (
        both(by_day, train_is(path="{}/days", window=["first", "last"])),
        ["`data.train.window` should compare 'dt'", "a date such as", "Found first"],
    ),
    "window over no column": (
        train_is(window=["2026-11-01", "2026-11-02"]),
        ["`data.train.window_column` should name a column", "'dt'"],
    ),
    "where over no column": (train_is(where="pirce > 3"), ["`data.train.where`", "'pirce'", "Did you mean 'price'?"]),
    "where not readable": (train_is(where="price >"), ["`data.train.where`", "at column 8", "'price >'"]),
    "where of another type": (train_is(where="price == 'high'"), ["`data.train.where`", "'price', which is float", "high"]),
    "where that drops all": (train_is(where="price < -5"), ["`data.train`", "`where: price < -5`"]),
    "validation without label": (
        in_table(lambda table: table.drop_columns(["click"]), VALIDATION),
        ["`data.validation` should have a column 'click', which `tasks.click.label`", VALIDATION, "Columns there: row_id"],
    ),
    "validation without rows": (in_table(no_rows, VALIDATION), ["`data.validation` should have at least one row", VALIDATION]),
    "validation of other types": (
        in_table(lambda table: replaced(table, "item_id", pa.array(range(len(table)))), VALIDATION),
        ["`data.validation`", "`features.item_id.column` should hold strings, as in the training data", "int64"],
    ),
}

BINARY, NUMBERS = "should be 0, 1 or null. Found ", "should hold finite numbers of at least 0, or null. Found "
FEW = {"kind": "multiclass", "num_classes": 4}
OWN_ROWS = {"kind": "categorical", "encoding": "identity", "num_embeddings": 9}
BAD_ROWS: dict[str, tuple[Change, list[str]]] = {
    "label NaN": (value("click", float("nan"), F32), [f"{SEVENTEENTH}: label: column 'click' {BINARY}nan"]),
    "label infinite": (value("click", float("inf"), F32), [SEVENTEENTH, f"{BINARY}inf"]),
    "label a half": (value("click", 0.5, F32), [SEVENTEENTH, f"{BINARY}0.5"]),
    "label -1": (value("click", -1, I8), [SEVENTEENTH, f"{BINARY}-1"]),
    "label 300": (value("conversion", 300, pa.int16()), [SEVENTEENTH, "column 'conversion'", f"{BINARY}300"]),
    "dwell NaN": (value("dwell_seconds", float("nan"), F32), [SEVENTEENTH, f"'dwell_seconds' {NUMBERS}nan"]),
    "dwell infinite": (value("dwell_seconds", float("inf"), F32), [SEVENTEENTH, f"{NUMBERS}inf"]),
    "dwell negative": (value("dwell_seconds", -0.25, F32), [SEVENTEENTH, f"{NUMBERS}-0.25"]),
    "dwell beyond float32": (value("dwell_seconds", 1e39, F64), [SEVENTEENTH, f"{NUMBERS}1e+39"]),
    "label NaN among the validation rows": (
        in_table(lambda table: replaced(table, "click", pa.array([float("nan")] * len(table), F32)), VALIDATION),
        [f"{VALIDATION}', row group 0, row ", f"column 'click' {BINARY}nan"],
    ),
    "class out of range": (
        both(added("m", [0, 1, 2], I8, last=7), put(tasks__m=FEW)),
        [LAST, "column 'm' should hold whole numbers of at least 0 and at most 3, or null. Found 7"],
    ),
    "class not whole": (
        both(added("m", [0.0, 1.0, 2.0], F32, last=1.5), put(tasks__m=FEW)),
        [LAST, "column 'm' should hold whole numbers", "Found 1.5"],
    ),
    "number out of range": (
        both(added("m", [0.25, 0.5], F32, last=4.0), put(tasks__m={"kind": "regression", "low": 0, "high": 1})),
        [LAST, "at least 0 and at most 1, or null. Found 4.0"],
    ),
    "number infinite": (
        both(added("m", [0.25, 0.5], F32, last=float("-inf")), put(tasks__m={"kind": "regression"})),
        [LAST, "should hold finite numbers, or null. Found -inf"],
    ),
    "all labels null": (
        both(added("m", [None], F32), put(tasks__m={"kind": "binary"})),
        ["`tasks.m.label`: column 'm' should hold labels. Found none in"],
    ),
    "no label where `given` is 1": (
        both(in_table(no_seconds), in_table(no_seconds, "train/part-0.parquet")),
        ["`tasks.dwell.label`: column 'dwell_seconds' should hold labels where click is 1. Found none in"],
    ),
    "`given` never 1": (
        both(in_table(no_clicks), in_table(no_clicks, "train/part-0.parquet")),
        ["`tasks.dwell.given`: click should be 1 in some rows", "Found column 'click' 1 in none of the 600"],
    ),
    "text for a weight": (put(data__sample_weight="item_id"), ["`data.sample_weight`", "numbers", "'item_id' of type string"]),
    "weight negative": (
        both(added("w", [1.0], F64, last=-1.0), put(data__sample_weight="w")),
        [f"{LAST}: `data.sample_weight`: column 'w' should hold finite weights, not negative. Found -1.0"],
    ),
    "weight NaN": (both(added("w", [1.0], F64, last=float("nan")), put(data__sample_weight="w")), [LAST, "Found nan"]),
    "weight infinite": (both(added("w", [1.0], F64, last=float("inf")), put(data__sample_weight="w")), [LAST, "Found inf"]),
    "weights of another number than the ids": (
        both(added("w", [[1.0] * 9], pa.list_(F32)), put(features__tags={"kind": "categorical", "weights": "w"})),
        ["`features.tags.weights`: column 'w' should hold a weight for each value. Found", ", row group "],
    ),
    "weight of an id negative": (
        both(
            added("ids", [[1, 2]], pa.list_(I64)),
            added("w", [[0.5, 1.0]], pa.list_(F32), last=[0.5, -2.0]),
            put(features__ids={"kind": "categorical", "weights": "w"}),
        ),
        [f"{LAST}: `features.ids.weights`: column 'w' should hold finite weights, not negative. Found -2.0"],
    ),
    "one weight for many ids": (
        put(features__tags={"kind": "categorical", "weights": "price"}),
        ["`features.tags.weights` should be a list column", "'price' of type float"],
    ),
    "vector of another width": (
        both(added("v", [[1.0, 2.0]], pa.list_(F32), last=[1.0]), put(features__v={"kind": "dense", "width": 2})),
        [f"{LAST}: `features.v.column`: column 'v' should hold 2 numbers a row. Found 1 numbers"],
    ),
    "id beyond the table": (
        both(added("k", [1, 2], I64, last=99), put(features__k=OWN_ROWS)),
        ["`features.k.column` should hold ids from 0 to num_embeddings - 3", "Found 99 in column 'k'", "raise num_embeddings"],
    ),
    "id negative": (
        both(added("k", [1, 2], I64, last=-3), put(features__k=OWN_ROWS)),
        ["`features.k.column` should hold ids from 0", "Found -3"],
    ),
    "groups of floats": (put(evaluation__group_by="price"), ["`evaluation.group_by`", "integers, strings, dates", "float"]),
    "more bad rows than may be skipped": (
        both(column("click", [2] * HALF, I8), put(data__on_bad_rows="skip")),
        ["`data.max_bad_fraction` (0.01) is exceeded: 100 bad rows (click should be 0, 1 or null: 100 rows)"],
    ),
}


CATEGORICAL = {"kind": "categorical"}
CONFIGURATIONS: dict[str, tuple[Change, list[str]]] = {
    "no data": (put(data=None), ["`data` is missing"]),
    "no features": (put(features={}), ["`features` should hold at least one entry"]),
    "features in a list": (put(features=["user_id"]), ["`features` should be a mapping. Found ['user_id']"]),
    "unknown section": (put(optimiser={}), ["`optimiser` is not a known key. Did you mean 'optimizer'?"]),
    "number for a section": (put(training=3), ["`training` should be a mapping. Found 3"]),
    "batch of no rows": (put(data__batch_size=0), ["`data.batch_size` should be greater", "or be 'auto'. Found 0"]),
    "unknown treatment of bad rows": (put(data__on_bad_rows="ignore"), ["`data.on_bad_rows` should be 'error' or 'skip'"]),
    "more than all rows bad": (put(data__max_bad_fraction=2), ["`data.max_bad_fraction`", "Found 2"]),
    "half a window": (train_is(window=["2026-11-01"]), ["`data.train.window` should have more entries. Found only 1"]),
    "weight of no column": (put(data__sample_weight="prize"), ["column 'prize'", "Did you mean 'price'?", "part-0.parquet"]),
    "unset variable": (put(data__train="${NOT_SET_HERE}/x"), ["`data.train`", "environment variable NOT_SET_HERE is not set"]),
    "unknown kind of feature": (feature("age", kind="numeric"), ["`features.age.kind` should be one of", "'numeric'"]),
    "no kind of feature": (feature("age"), ["`features.age.kind` is missing"]),
    "unknown transform": (feature("age", kind="dense", transform="sqrt"), ["`features.age.transform` should be", "'sqrt'"]),
    "clip turned round": (feature("age", kind="dense", clip=[3, 1]), ["`features.age.clip` should be [least, largest]"]),
    "boundaries unsorted": (feature("age", kind="bucketized", boundaries=[3, 2]), ["`features.age.boundaries`", "[3.0, 2.0]"]),
    "hash into no number of rows": (feature("user_id", **CATEGORICAL, encoding="hash"), ["`features.user_id.num_embeddings`"]),
    "strings as rows": (
        feature("item_id", **CATEGORICAL, encoding="identity", num_embeddings=99),
        ["`features.item_id.encoding` should be vocabulary or hash", "strings"],
    ),
    "floats as ids": (feature("p", **CATEGORICAL, column="price"), ["`features.p.column`", "'price' of type float", "int64"]),
    "length of a scalar": (feature("user_id", **CATEGORICAL, max_length=3), ["`features.user_id.max_length`", "list column"]),
    "unknown pooling": (feature("tags", **CATEGORICAL, pooling="max"), ["`features.tags.pooling` should be 'sum' or 'mean'"]),
    "a table of strings and integers": (
        both(feature("user_id", **CATEGORICAL, table="x"), feature("item_id", **CATEGORICAL, table="x")),
        ["`features.item_id.table` and `features.user_id.table`", "strings", "integers"],
    ),
    "a dimension that fbgemm lacks": (
        put(model__embedding_dim=10),
        ["`model.embedding_dim` should be a multiple of 4 for the table", "Found 10."],
    ),
    "a feature's dimension that fbgemm lacks": (
        feature("item_id", **CATEGORICAL, dim=6),
        ["`features.item_id.dim` should be a multiple of 4 for the table 'item_id'", "Found 6."],
    ),
    "a table of two dimensions": (
        both(
            feature("user_id", **CATEGORICAL, table="x", dim=4),
            feature("row", **CATEGORICAL, column="row_id", table="x", dim=8),
        ),
        ["`features.row.dim` and `features.user_id.dim` should agree", "8 and 4"],
    ),
    "shards that do not divide": (
        feature("user_id", **CATEGORICAL, sharding="column_wise", num_column_shards=3),
        ["`features.user_id.num_column_shards` should divide the dimension 8"],
    ),
    "unknown kind of task": (put(tasks__click__kind="binray"), ["`tasks.click.kind`", "Did you mean 'binary'?"]),
    "entire space of nothing": (put(tasks__click__space="entire"), ["`tasks.click.space`", "`tasks.click.given`"]),
    "given a number": (put(tasks__click__given="dwell"), ["`tasks.click.given` should name a binary task", "'dwell'"]),
    "also on a number": (put(tasks__click__also_on="dwell"), ["`tasks.click.also_on` should name a binary task", "'dwell'"]),
    "unknown unit": (put(tasks__dwell__unit="hours"), ["`tasks.dwell.unit` should be", "'hours'"]),
    "unknown loss": (put(tasks__dwell__loss="l3"), ["`tasks.dwell.loss` should be one of", "'l3'"]),
    "one class": (put(tasks__m={"kind": "multiclass", "num_classes": 1}), ["`tasks.m.num_classes`", "equal to 2"]),
    "bounds turned round": (put(tasks__m={"kind": "regression", "low": 3, "high": 1}), ["`tasks.m.low`", "`tasks.m.high`"]),
    "weight of nothing": (put(tasks__click__weight=0), ["`tasks.click.weight` should be greater than 0 or be 'auto'. Found 0"]),
    "two tasks of one column": (
        put(tasks__conversion_and_click={"kind": "binary", "label": "click"}),
        ["`tasks.conversion_and_click`", "'p_conversion_and_click'", "`tasks.conversion` predicts too"],
    ),
    "only auxiliary tasks": (
        put(tasks__click__auxiliary=True, tasks__conversion__auxiliary=True, tasks__dwell__auxiliary=True),
        ["`tasks` should hold a task that is not auxiliary"],
    ),
    "unknown architecture": (put(model__architecture="mmoo"), ["`model.architecture.kind`", "Did you mean 'mmoe'?"]),
    "experts of no layers": (
        put(model__architecture={"kind": "mmoe", "expert_layers": []}),
        ["`model.architecture.expert_layers` should hold at least one entry"],
    ),
    "all dropped": (put(model__dropout=1.5), ["`model.dropout` should be less than 1. Found 1.5"]),
    "layer of no units": (put(model__tower_layers=[0]), ["`model.tower_layers.0`", "Found 0"]),
    "no such module": (put(model__architecture="no_module:Net"), ["`model.architecture.kind`", "no module 'no_module'"]),
    "no such class": (put(model__architecture="pathlib:Pth"), ["`model.architecture.kind`", "no class 'Pth'"]),
    "unknown balancer": (put(balancing="gradnrom"), ["`balancing.kind`", "Did you mean 'gradnorm'?"]),
    "balancer's option elsewhere": (put(balancing={"kind": "static", "alpha": 1}), ["`balancing.alpha` is not a known key"]),
    "nothing shared": (
        put(balancing="gradnorm", model__architecture="single_task", model__interaction="none"),
        ["`balancing.at`", "tasks share no dense parameter", "single_task"],
    ),
    "rate below 0": (put(optimizer__dense__learning_rate=-1), ["`optimizer.dense.learning_rate` should be greater than 0"]),
    "a beta of 1": (put(optimizer__dense__betas=[0.9, 1.0]), ["`optimizer.dense.betas.1` should be less than 1", "Found 1.0."]),
    "one beta": (put(optimizer__dense__betas=[0.9]), ["`optimizer.dense.betas` should have more entries. Found only 1"]),
    "unknown schedule": (put(optimizer__tables__schedule="step"), ["`optimizer.tables.schedule`", "'step'"]),
    "unknown precision": (put(training__precision="fp16"), ["`training.precision` should be 'fp32' or 'bf16'"]),
    "checkpoint never": (put(training__checkpoint_every=0), ["`training.checkpoint_every`", "Found 0"]),
    "metric misspelt": (put(training__best_metric="click/acu"), ["`training.best_metric`", "Did you mean 'auc'?"]),
    "no memory": (put(evaluation__memory_limit_mb=0), ["`evaluation.memory_limit_mb`", "Found 0"]),
    "formula not readable": (put(scoring__formula="p_click *"), ["`scoring.formula`", "'p_click *', not readable"]),
    "formula of code": (put(scoring__formula="exec(p_click)"), ["`scoring.formula` should use the functions", "'exec'"]),
    "formula of no prediction": (put(scoring__formula="p_clik"), ["`scoring.formula`", "Did you mean 'p_click'?"]),
}
CORPUS = {
    f"{part}: {name}": case
    for part, cases in (("file", FILES), ("rows", BAD_ROWS), ("configuration", CONFIGURATIONS))
    for name, case in cases.items()
}


@pytest.mark.parametrize("name", list(CORPUS))
def test_a_bad_input_is_named(name: str, good: Path, tmp_path: Path) -> None:
    change, expected = CORPUS[name]
    folder = linked(good, tmp_path)
    tree: Tree = copy.deepcopy(experiment_tree(folder / "train", folder / "validation"))
    change(tree, folder)
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(tree))
    result = CliRunner().invoke(app, ["train", str(path), "--local", "--output", str(tmp_path / "run")])
    assert isinstance(result.exception, ValueError), result.output
    if name.startswith("configuration"):
        expected = [f"{path}:", *expected]
    for part in expected:
        assert part in str(result.exception)
    assert "Traceback" not in str(result.exception)
    # what is not seen in a single row only is seen by `mtrec check`, too
    if not name.startswith("rows"):
        result = CliRunner().invoke(app, ["check", str(path)])
        assert isinstance(result.exception, ValueError), result.output
        for part in expected:
            assert part in str(result.exception)
        assert not (tmp_path / "run" / "run.json").exists()


def test_the_corpus_is_as_large_as_it_was_promised() -> None:
    assert len(FILES) >= 25
    assert len(BAD_ROWS) >= 25
    assert len(CONFIGURATIONS) >= 40
    told = [tuple(expected) for _, expected in CORPUS.values()]
    assert len(set(told)) > 0.95 * len(told)


def test_a_file_that_is_replaced_while_it_is_trained_on_is_named(good: Path, tmp_path: Path) -> None:
    folder = linked(good, tmp_path)
    little = ("data.prefetch=1", "data.batch_size=16", "data.num_streams=1", "data.shuffle_window=32")  # read as it is trained
    run = small_run(tmp_path, *little, tree=experiment_tree(folder / "train"))
    events = train(run, device=torch.device("cpu"))
    assert isinstance(next(events), Step)
    table = pq.read_table(folder / "train/part-1.parquet")
    for path in sorted((folder / "train").iterdir()):
        path.unlink()
        pq.write_table(table.slice(0, 250), path)
    with pytest.raises(ChangedFile, match=r"train/part-\d.parquet' was replaced while it was in use: .*Start again with files"):
        list(events)
    # and one that was replaced between two starts
    with pytest.raises(ValueError, match=r"data.train is not what .* was prepared from: files were added, removed or replaced"):
        list(train(run, device=torch.device("cpu")))


def test_validation_rows_that_changed_between_two_starts_are_named(tmp_path: Path) -> None:
    run = small_run(tmp_path, "training.max_steps=2", rows=600)
    write_log(tmp_path / "log-600" / "validation" / "more", rows=100, seed=2, files=1)
    with pytest.raises(ValueError, match=r"data.validation is not what .* was prepared from: files were added"):
        list(train(run, device=torch.device("cpu")))
    info = {key: value for key, value in run.info.items() if key != "validation"}
    (run.folder / "run.json").write_text(json.dumps(info))  # as an earlier mtrec wrote it
    assert isinstance(list(train(Run(run.folder), device=torch.device("cpu")))[-1], Ended)
