"""Small logs for the tests, written with pyarrow alone."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

HUGE = 3e38  # a sample weight that is finite, and two of which are not


def write_log(folder: Path, rows: int = 4_000, seed: int = 0, files: int = 3, row_group_rows: int = 500) -> Path:
    """Impressions with a learnable click, conversion and dwell; row_id counts from 0 over the files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, 200, rows), rng.integers(0, 80, rows)
    effect = np.random.default_rng(99)
    user_effect, item_effect = effect.normal(size=200), effect.normal(size=80)
    age = rng.normal(40, 10, rows)
    logit = user_effect[users] + item_effect[items] + 0.05 * (age - 40) - 0.3
    click = rng.random(rows) < 1 / (1 + np.exp(-logit))
    conversion = click & (rng.random(rows) < 1 / (1 + np.exp(-item_effect[items])))
    dwell = np.where(click, rng.lognormal(2 + 0.5 * user_effect[users], 0.7), 0.0)
    lengths = rng.integers(0, 6, rows)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tags = pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(rng.integers(0, 30, offsets[-1]), pa.int64())
    )
    table = pa.table(
        {
            "row_id": np.arange(rows),
            "user_id": users.astype(np.int64) * 7_919 + 2**40,
            "item_id": pa.array([f"item{i}" for i in items]),
            "tags": tags,
            "age": pa.array(age.astype(np.float32), mask=rng.random(rows) < 0.05),
            "price": rng.lognormal(1, 1, rows).astype(np.float32),
            "click": click.astype(np.int8),
            "conversion": conversion.astype(np.int8),
            "dwell_seconds": pa.array(dwell.astype(np.float32), mask=~click),
        }
    )
    bounds = np.linspace(0, rows, files + 1).astype(int)
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        pq.write_table(
            table.slice(start, stop - start), folder / f"part-{index}.parquet", row_group_size=row_group_rows
        )
    return folder


def experiment_tree(train: Path, validation: Path | None = None) -> dict[str, object]:
    """An experiment over `write_log`'s columns, small enough for a second of training."""
    return {
        "data": {
            "train": str(train),
            "batch_size": 128,
            "shuffle_window": 256,
            **({"validation": str(validation)} if validation else {}),
        },
        "features": {
            "user_id": {"kind": "categorical"},
            "item_id": {"kind": "categorical"},
            "tags": {"kind": "categorical", "pooling": "mean"},
            "age": {"kind": "dense"},
            "price": {"kind": "dense", "transform": "log1p"},
        },
        "tasks": {
            "click": {"kind": "binary"},
            "conversion": {"kind": "binary", "given": "click", "space": "entire"},
            "dwell": {"kind": "dwell", "label": "dwell_seconds", "given": "click"},
        },
        "model": {
            "embedding_dim": 8,
            "interaction": {"kind": "dcn_v2", "layers": 1, "rank": 8},
            "architecture": {"kind": "mmoe", "num_experts": 3, "expert_layers": [16, 8]},
            "tower_layers": [8],
        },
        "training": {"log_every": 1},
        "seed": 5,
    }


def write_poisoned_log(folder: Path, steps: tuple[int, ...], rows: int = 1_600) -> dict[str, Any]:
    """An experiment with a weight column that makes the loss of some batches of 128 infinite."""
    table = pa.concat_tables([pq.read_table(path) for path in sorted(write_log(folder / "clean", rows).glob("*"))])
    weights = np.ones(rows)
    for step in steps:
        weights[(step - 1) * 128 : step * 128] = HUGE
    (folder / "train").mkdir()
    pq.write_table(table.append_column("weight", pa.array(weights)), folder / "train" / "part-0.parquet")
    tree: dict[str, Any] = experiment_tree(folder / "train")
    tree["data"]["sample_weight"] = "weight"
    return tree
