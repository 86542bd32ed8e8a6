"""Any log trains: random types, nulls, empty lists, huge ids, row groups of any size; every row exactly once an epoch.

Training is `mtrec.train.train` in this process; which rows a step saw is taken from what `feed` gives it, by their row_id.
"""

import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import experiment_tree, write_log
from runs import small_run
from typer.testing import CliRunner

import mtrec.train
from mtrec.cli import app
from mtrec.config import parse_experiment
from mtrec.events import Ended, Step
from mtrec.prepare import prepare
from mtrec.run import Run
from mtrec.train import train

EPOCHS = 2
I32, I64 = pa.int32(), pa.int64()
# the types in which files may hold a column: all have one type that holds the values of all
TYPES: dict[str, tuple[pa.DataType, ...]] = {
    "user": (I32, I64, pa.int16(), pa.dictionary(I32, I64)),
    "item": (pa.string(), pa.large_string(), pa.dictionary(I32, pa.string()), pa.dictionary(pa.int8(), pa.large_string())),
    "tags": (pa.list_(I32), pa.large_list(I64), pa.list_(I64)),
    "words": (pa.list_(pa.string()), pa.large_list(pa.large_string())),
    "huge": (I64, pa.uint64(), pa.dictionary(I32, I64)),
    "number": (pa.float32(), pa.float64(), pa.int16(), pa.null()),
    "sometimes": (I64, pa.null(), pa.int8()),
    "click": (pa.int8(), pa.float32(), I64),
    "dwell": (pa.float32(), pa.float64()),
}
OPTIONAL = ("sometimes", "number")


class Log:
    """Files below a folder, drawn from a seed, and which of their rows are bad.

    Args:
        files: for each its rows; row_group_rows: rows of a row group, drawn up to this; nulls: their share in the features.
        bad: this share of the rows has a label that cannot be used.
    """

    def __init__(
        self, folder: Path, seed: int, files: list[int], row_group_rows: int, nulls: float, bad: float, statistics: bool
    ) -> None:
        self.rng, self.nulls = np.random.default_rng(seed), nulls
        self.rows: set[int] = set()
        self.bad: set[int] = set()
        for number, rows in enumerate(files):
            ids = list(range(len(self.rows), len(self.rows) + rows))
            self.rows.update(ids)
            names = self.rng.permutation([*TYPES, "row_id", "unused"]).tolist()
            names = [name for name in names if name not in OPTIONAL or self.rng.random() < 0.7]
            bad_rows = {row for row in ids if row > 1 and self.rng.random() < bad}
            self.bad |= bad_rows
            table = pa.table({name: self.column(name, ids, bad_rows) for name in names})
            options: Any = {"write_statistics": statistics, "use_dictionary": bool(self.rng.random() < 0.5)}
            with pq.ParquetWriter(folder / f"part-{number}.parquet", table.schema, **options) as writer:
                start = 0
                while start < rows:
                    size = int(self.rng.integers(0, row_group_rows + 1))  # a row group may be empty
                    writer.write_table(table.slice(start, size))
                    start += size

    def column(self, name: str, ids: list[int], bad: set[int]) -> pa.Array:
        if name == "row_id":
            return pa.array(ids, I64)
        if name == "unused":
            return pa.array([str(row) for row in ids])
        types = TYPES[name]
        type_ = types[self.rng.integers(len(types))]
        if pa.types.is_null(type_):
            return pa.nulls(len(ids))
        values = [self.value(name, row, bad) for row in ids]
        plain = type_.value_type if pa.types.is_dictionary(type_) else type_
        whole = pa.array(values, plain)
        return whole.dictionary_encode().cast(type_) if pa.types.is_dictionary(type_) else whole

    def value(self, name: str, row: int, bad: set[int]) -> Any:
        rng = self.rng
        if name == "click":
            return 2 if row in bad else 1 if row == 0 else 0 if row == 1 else [0, 1, None][rng.integers(3)]
        if name == "dwell":
            return 3.5 if row == 0 else float(rng.integers(0, 100))
        if rng.random() < self.nulls:
            return None
        if name == "tags":
            return [int(each) for each in rng.integers(-9, 9, rng.integers(0, 4))]
        if name == "words":
            return ["", "é", "word"][: rng.integers(0, 4)]
        if name == "huge":
            return int(rng.integers(2**62, 2**63 - 1) if rng.random() < 0.5 else rng.integers(0, 5))
        return f"item{rng.integers(20)}" if name == "item" else int(rng.integers(0, 30))


def tree_over(folder: Path, seed: int, options: dict[str, Any], where: str | None) -> dict[str, Any]:
    return {
        "data": {"train": {"path": str(folder), "where": where}, **options},
        "features": {
            "user": {"kind": "categorical"},
            "item": {"kind": "categorical"},
            "tags": {"kind": "categorical", "max_length": 2},
            "words": {"kind": "categorical", "encoding": "hash", "num_embeddings": 8},
            "huge": {"kind": "categorical"},
            "number": {"kind": "dense", "optional": True},
            "sometimes": {"kind": "categorical", "optional": True},
            "row": {"kind": "categorical", "column": "row_id", "encoding": "hash", "num_embeddings": 8},
        },
        "tasks": {"click": {"kind": "binary"}, "dwell": {"kind": "dwell", "given": "click"}},
        "model": {
            "embedding_dim": 4,
            "interaction": "none",
            "architecture": {"kind": "shared_bottom", "expert_layers": [4]},
            "tower_layers": [],
        },
        "training": {"epochs": EPOCHS, "log_every": 1, "checkpoint_async": False},
        "seed": seed,
    }


def trained_rows(run: Run, monkeypatch: pytest.MonkeyPatch) -> tuple[list[list[int]], list[Any]]:
    """(row ids of every step, events) of a training."""
    steps: list[list[int]] = []
    real = mtrec.train.feed

    def recording(*arguments: Any, **options: Any) -> Iterator[Any]:
        fed = real(*arguments, **options, keep_rows=True)
        try:
            for item in fed:
                steps.append(item.piece.record_batch["row_id"].to_pylist())
                yield item
        finally:
            fed.close()

    monkeypatch.setattr(mtrec.train, "feed", recording)
    return steps, list(train(run, device=torch.device("cpu")))


logs = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**32 - 1),
        "files": st.lists(st.integers(0, 60), min_size=1, max_size=3).map(lambda counts: [counts[0] + 20, *counts[1:]]),
        "row_group_rows": st.integers(1, 40),
        "nulls": st.sampled_from([0.0, 0.3, 1.0]),
        "bad": st.sampled_from([0.0, 0.1]),
        "statistics": st.booleans(),
    }
)
readings = st.fixed_dictionaries(
    {
        "num_streams": st.sampled_from([1, 2, 8]),
        "shuffle_window": st.integers(1, 50),
        "shuffle": st.booleans(),
        "prefetch": st.integers(1, 3),
    }
)


@settings(max_examples=16)
@given(logs, readings, st.integers(1, 5), st.booleans(), st.sampled_from(["skip", "error"]))
def test_every_row_is_trained_on_once_an_epoch(
    log: dict[str, Any], reading: dict[str, Any], rows_a_stream: int, has_where: bool, on_bad_rows: str
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "log").mkdir()
        made = Log(folder / "log", **log)
        batch_size = reading["num_streams"] * rows_a_stream
        options = {**reading, "batch_size": batch_size, "on_bad_rows": on_bad_rows, "max_bad_fraction": 1.0}
        where = "row_id <= 1 or row_id >= 7" if has_where else None
        left_out = set(range(2, 7)) if has_where else set()
        experiment = parse_experiment(tree_over(folder / "log", log["seed"], options, where))
        bad = made.bad - left_out
        if bad and on_bad_rows == "error":
            with pytest.raises(ValueError, match="column 'click' should be 0") as caught:
                prepare(experiment, folder / "run")
            place = re.search(r"part-(\d).parquet', row group (\d+), row (\d+): ", str(caught.value))
            assert place is not None or log["statistics"], caught.value
            if place is not None:
                number, group, row = map(int, place.groups())
                parquet = pq.ParquetFile(folder / "log" / f"part-{number}.parquet")
                assert parquet.read_row_group(group, ["row_id"])["row_id"][row].as_py() in bad
            return
        run = prepare(experiment, folder / "run")
        with pytest.MonkeyPatch.context() as patch:
            steps, events = trained_rows(run, patch)
        wanted = made.rows - left_out - bad
        steps_per_epoch = len(steps) // EPOCHS
        for epoch in range(EPOCHS):
            seen = Counter(row for step in steps[epoch * steps_per_epoch : (epoch + 1) * steps_per_epoch] for row in step)
            assert set(seen) == wanted
            assert set(seen.values()) == {1}
        assert max(map(len, steps)) <= batch_size
        ended = events[-1]
        assert isinstance(ended, Ended)
        assert ended.step == len(steps)
        assert sum(ended.skipped_rows.values()) == EPOCHS * len(bad)
        assert run.info["train"]["kept"] == len(wanted)
        for event in events:
            if isinstance(event, Step):
                assert all(map(math.isfinite, event.losses.values()))
    finally:
        shutil.rmtree(folder)


def drifted(folder: Path, plain: Path) -> None:
    """The same rows, every file in types of its own."""
    folder.mkdir()
    ways = [
        {},
        {"user_id": I32, "item_id": pa.dictionary(I32, pa.string()), "tags": pa.large_list(I64), "click": pa.bool_()},
        {"item_id": pa.large_string(), "tags": pa.list_(I32), "age": pa.float64()},
    ]
    for number, types in enumerate(ways):
        table = pq.read_table(plain / f"part-{number}.parquet")
        columns = {}
        for name in reversed(table.column_names) if number else table.column_names:
            values, type_ = table[name].combine_chunks(), types.get(name)
            if type_ is not None and pa.types.is_dictionary(type_):
                values = values.dictionary_encode().cast(type_)
            columns[name] = values if type_ is None else values.cast(type_)
        if number == 1:
            del columns["seldom"]
        pq.write_table(pa.table(columns), folder / f"part-{number}.parquet", row_group_size=500)


def small_ids(folder: Path) -> Path:
    """A log whose ids fit into int32, with a column that is null in its second file."""
    write_log(folder, rows=1_500)
    for number in range(3):
        path = folder / f"part-{number}.parquet"
        table = pq.read_table(path)
        users = pa.array(table["user_id"].to_numpy() % 1_000_003)
        seldom = pa.nulls(len(table), I64) if number == 1 else pa.array(np.arange(len(table)) % 5)
        table = table.set_column(table.schema.get_field_index("user_id"), "user_id", users).append_column("seldom", seldom)
        pq.write_table(table, path, row_group_size=500)
    return folder


def test_files_of_different_types_train_as_if_they_had_one_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small_ids(tmp_path / "plain")
    drifted(tmp_path / "drifted", plain)
    found = []
    for name in ("plain", "drifted"):
        tree: dict[str, Any] = experiment_tree(tmp_path / name)
        tree["features"]["seldom"] = {"kind": "categorical", "optional": True}
        tree["features"]["row"] = {"kind": "categorical", "column": "row_id", "encoding": "hash", "num_embeddings": 50}
        run = small_run(tmp_path, tree=tree)
        with pytest.MonkeyPatch.context() as patch:
            steps, events = trained_rows(run, patch)
        found.append((steps, [event.losses for event in events if isinstance(event, Step)], run))
    assert found[0][:2] == found[1][:2], "the same batches and, to the bit, the same losses"
    assert sorted(row for step in found[1][0] for row in step) == list(range(1_500))
    assert found[0][2].info["notes"] == []
    notes = "\n".join(found[1][2].info["notes"])
    for words in (
        r"'user_id' is read as int64; found int64 in '.*part-0.parquet', int32 in '.*part-1.parquet'",
        r"'item_id' is read as large_string; found string in .*dictionary<.*large_string in '.*part-2",
        r"'tags' is read as large_list<item: int64>; found list<.*large_list<",
        r"'click' is read as int8; found int8 in .*bool in '.*part-1",
        r"'age' is read as double; found float in",
        r"'seldom' is missing from '.*part-1.parquet' and null there",
    ):
        assert re.search(words, notes), notes

    path = tmp_path / "drifted.yaml"
    path.write_text(yaml.safe_dump({**experiment_tree(tmp_path / "drifted"), "training": {"max_steps": 1}}))
    monkeypatch.chdir(tmp_path)
    for command in (["check", str(path)], ["train", str(path), "--local", "--output", str(tmp_path / "said")]):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        text = " ".join(result.output.split())
        assert "Column 'user_id' is read as int64; found int64 in" in text
