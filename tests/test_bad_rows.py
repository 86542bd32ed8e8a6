"""Rows that cannot be trained on: named by file, row group, row and column; or left out and counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logs import experiment_tree, write_log
from ranks import run_ranks
from runs import small_run

from mtrec.atomic import write_atomically
from mtrec.config import to_yaml
from mtrec.dataset import Dataset
from mtrec.events import Ended
from mtrec.feed import bad_rows, feed
from mtrec.labels import labels_of
from mtrec.model import task_specs
from mtrec.reader import Reader
from mtrec.run import Run
from mtrec.sources import label_columns, open_source
from mtrec.train import train

BAD_CLICKS, BAD_DWELLS, BAD_WEIGHTS = (5, 700, 701, 1_999), (701, 1_500), (42, 1_501)
BAD = {*BAD_CLICKS, *BAD_DWELLS, *BAD_WEIGHTS}
ROWS = 2_000


def broken_tree(folder: Path) -> dict[str, Any]:
    """An experiment over a log with some bad labels and weights, in two files."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(write_log(folder / "whole", ROWS).glob("*"))])
    clicks, weights = table["click"].to_numpy().copy(), np.ones(ROWS)
    dwells = table["dwell_seconds"].to_pylist()
    clicks[list(BAD_CLICKS)] = 2
    weights[list(BAD_WEIGHTS)] = -1.0
    for row in BAD_DWELLS:
        dwells[row] = -0.5
    table = table.set_column(table.schema.get_field_index("click"), "click", pa.array(clicks))
    table = table.set_column(
        table.schema.get_field_index("dwell_seconds"), "dwell_seconds", pa.array(dwells, pa.float32())
    ).append_column("weight", pa.array(weights))
    (folder / "train").mkdir()
    for index in range(2):  # without statistics in the footers, which would give the bad values away
        part = table.slice(index * 1_000, 1_000)
        pq.write_table(part, folder / "train" / f"part-{index}.parquet", row_group_size=300, write_statistics=False)
    tree: dict[str, Any] = experiment_tree(folder / "train")
    tree["data"]["sample_weight"] = "weight"
    tree["features"]["row"] = {"kind": "categorical", "column": "row_id", "encoding": "identity", "num_embeddings": ROWS + 2}
    return tree


def fed_rows(run: Run, data: Dataset, rank: int, world_size: int, threads: int = 1) -> tuple[list[int], dict[str, int], int]:
    """Ids of the rows that a rank is fed in an epoch, what it left out, and the number of its batches."""
    config = run.experiment.data
    assert isinstance(config.batch_size, int)
    reader = Reader(
        data,
        [*run.encoder.columns, *label_columns(run.experiment)],
        batch_size=config.batch_size,
        rank=rank,
        world_size=world_size,
        seed=run.experiment.seed,
        shuffle_window=config.shuffle_window,
        num_threads=threads,
    )
    bad = bad_rows(config, data.num_rows)
    assert bad is not None
    rows, batches = [], 0
    labels = labels_of(run.experiment, task_specs(run.experiment))
    for piece, batch in feed(reader, run.encoder, labels, config.sample_weight, keep_rows=True, bad=bad):
        assert batch.num_rows == piece.record_batch.num_rows == sum(piece.stream_rows)
        for row, number in enumerate(piece.record_batch["row_id"].to_pylist()):
            path, group, place = reader.locate(piece, row)
            assert (int(Path(path).stem[-1]) * 1_000 + group * 300 + place) == number
        rows += piece.record_batch["row_id"].to_pylist()
        batches += 1
    return rows, dict(bad.skipped), batches


@pytest.mark.parametrize("threads", [1, 3])
def test_skipped_rows_are_left_out_and_counted_by_reason_and_column(tmp_path: Path, threads: int) -> None:
    options = ("data.on_bad_rows=skip", f"training.reading_threads={threads}")
    run = small_run(tmp_path, *options, tree=broken_tree(tmp_path))
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    for world_size in (1, 3):
        parts = [fed_rows(run, data, rank, world_size, threads) for rank in range(world_size)]
        rows = [row for part, _, _ in parts for row in part]
        assert sorted(rows) == sorted(set(range(ROWS)) - BAD)
        assert {batches for _, _, batches in parts} == {16}
    ended = list(train(run, device=torch.device("cpu")))[-1]
    assert isinstance(ended, Ended)
    # a row with two faults counts for the first that is found: labels are looked at after weights
    assert sum(ended.skipped_rows.values()) == len(BAD)
    assert {reason.split()[0]: count for reason, count in ended.skipped_rows.items()} == {
        "click": len(BAD_CLICKS),
        "dwell_seconds": len(set(BAD_DWELLS) - set(BAD_CLICKS)),
        "weight": len(BAD_WEIGHTS),
    }


def test_by_default_a_bad_row_is_an_error_that_names_its_place(tmp_path: Path) -> None:
    tree = broken_tree(tmp_path)
    with pytest.raises(ValueError, match=r"column 'click' should be 0, 1 or null. Found 2"):
        small_run(tmp_path, tree=tree)
    run = small_run(tmp_path, "data.on_bad_rows=skip", "data.shuffle=false", "data.num_streams=1", tree=tree)
    strict = run.experiment.model_copy(update={"data": run.experiment.data.model_copy(update={"on_bad_rows": "error"})})
    object.__setattr__(run, "__dict__", {**run.__dict__, "experiment": strict})
    with pytest.raises(ValueError, match=r"part-0.parquet', row group 0, row 42: .*column 'weight' should hold finite weights"):
        list(train(run, device=torch.device("cpu")))


def epoch_with_bad_rows(folder: str) -> str:
    """What the training of a run ends with on this rank."""
    torch.set_num_threads(1)
    try:
        return str(list(train(Run(Path(folder)), device=torch.device("cpu")))[-1])
    except ValueError as error:
        return str(error)


def test_how_many_rows_are_bad_is_judged_over_all_ranks(tmp_path: Path) -> None:
    options = ("data.on_bad_rows=skip", "data.shuffle=false", "training.exchange=gloo")
    run = small_run(tmp_path, *options, tree=broken_tree(tmp_path))  # 7 bad rows of 2,000: 4 in the first half, 3 in the other
    for limit, passes in ((0.0036, True), (0.0034, False)):
        data = run.experiment.data.model_copy(update={"max_bad_fraction": limit})
        write_atomically(run.folder / "experiment.yaml", to_yaml(run.experiment.model_copy(update={"data": data})))
        for found in run_ranks(2, epoch_with_bad_rows, str(run.folder), folder=tmp_path):
            if passes:
                assert found.startswith("Ended("), found
            else:
                assert "`data.max_bad_fraction` (0.0034) is exceeded: 7 bad rows (" in found
                assert "They are rows of `data.train`." in found


def test_too_many_bad_rows_end_the_run(tmp_path: Path) -> None:
    tree = broken_tree(tmp_path)
    words = r"`data.max_bad_fraction` \(0.002\) is exceeded: 5 bad rows \(click should be 0, 1 or null: \d rows; "
    with pytest.raises(ValueError, match=words):
        small_run(tmp_path, "data.on_bad_rows=skip", "data.max_bad_fraction=0.002", tree=tree)
    run = small_run(tmp_path, "data.on_bad_rows=skip", tree=tree)
    data = run.experiment.data.model_copy(update={"max_bad_fraction": 0.003})
    write_atomically(run.folder / "experiment.yaml", to_yaml(run.experiment.model_copy(update={"data": data})))
    run = Run(run.folder)  # prepared, and then asked to take fewer
    words = r"is exceeded: 7 bad rows .*The newest one: '.*part-\d.parquet', row group \d, row \d+:"
    with pytest.raises(ValueError, match=words):
        list(train(run, device=torch.device("cpu")))


def test_a_vector_of_another_width_is_left_out_of_the_fit_and_of_the_training(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", 600, files=2)
    for number, path in enumerate(sorted(log.glob("*"))):
        table = pq.read_table(path)
        vectors = [[float(row), 1.0] for row in range(len(table))]
        if number == 1:
            vectors[17] = [1.0, 2.0, 3.0]
        pq.write_table(table.append_column("vector", pa.array(vectors, pa.list_(pa.float32()))), path)
    tree: dict[str, Any] = experiment_tree(log)
    tree["features"]["vector"] = {"kind": "dense", "width": 2}
    with pytest.raises(ValueError, match=r"part-1.parquet', row group 0, row 17: .*'vector' should hold 2 numbers a row"):
        small_run(tmp_path, tree=tree)
    run = small_run(tmp_path, "data.on_bad_rows=skip", tree=tree)
    assert run.info["train"]["kept"] == 599
    ended = list(train(run, device=torch.device("cpu")))[-1]
    assert isinstance(ended, Ended)
    assert ended.skipped_rows == {"vector should hold 2 numbers a row": 1}


def test_the_share_is_judged_on_whole_epochs(tmp_path: Path) -> None:
    options = ("data.on_bad_rows=skip", "data.max_bad_fraction=0.004", "data.shuffle=false", "data.num_streams=1")
    run = small_run(tmp_path, *options, "data.prefetch=1", "training.max_steps=1", tree=broken_tree(tmp_path))
    ended = list(train(run, device=torch.device("cpu")))[-1]
    assert isinstance(ended, Ended)
    assert sum(ended.skipped_rows.values()) >= 2


def test_rows_that_where_drops_are_no_part_of_the_share(tmp_path: Path) -> None:
    tree = broken_tree(tmp_path)
    tree["data"]["train"] = {"path": tree["data"]["train"], "where": "row_id >= 695 and row_id < 705"}  # two of ten are bad
    with pytest.raises(ValueError, match=r"max_bad_fraction` \(0\.1\) is exceeded: 2 bad rows .* They are rows of `data\.train`"):
        small_run(tmp_path, "data.on_bad_rows=skip", "data.max_bad_fraction=0.1", tree=tree)
    small_run(tmp_path, "data.on_bad_rows=skip", "data.max_bad_fraction=0.3", tree=tree)
