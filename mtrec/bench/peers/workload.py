"""The rows that a peer trains on: the first ones of the reference log, read with pyarrow into NumPy arrays.

Imported by the peers' interpreter, which has no mtrec. Both peers train from memory: deepctr-torch's `fit` takes arrays;
torch-rechub's reader of Parquet refuses lists of unequal lengths, and what it gives is no pair of features and labels, as its
trainer takes.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray


@dataclass(frozen=True)
class Workload:
    """What mtrec asks of a peer: SPEC, the first argument.

    Attributes:
        files: Parquet files, read until there are rows enough.
        ids, lists: {column: rows of its table}; ids are taken modulo that.
        numbers: columns of float32.
        labels: two columns of 0 and 1, and one of seconds, null where not observed.
        embedding_dim, num_experts, expert_layers, tower_layers: of the MMoE.
        batch_size: rows of a batch.
        warmup, steps: untimed and timed batches.
    """

    files: list[str]
    ids: dict[str, int]
    lists: dict[str, int]
    numbers: list[str]
    labels: list[str]
    embedding_dim: int
    num_experts: int
    expert_layers: list[int]
    tower_layers: list[int]
    batch_size: int
    warmup: int
    steps: int

    @property
    def sequences(self) -> dict[str, int]:
        """`lists` under names that torch's ModuleDict, in which both libraries keep tables, takes: `items` is a method of it."""
        return {f"list_{name}": size for name, size in self.lists.items()}


@dataclass(frozen=True)
class Rows:
    """Columns of features, (N,) or padded with 0 to (N, longest list), and labels (N, 3)."""

    features: dict[str, NDArray[Any]]
    labels: NDArray[np.float32]

    def between(self, start: int, stop: int) -> "Rows":
        """Rows `start` to `stop` (excluded)."""
        return Rows({name: values[start:stop] for name, values in self.features.items()}, self.labels[start:stop])

    def longest(self, sequence: str) -> int:
        """Entries of the longest list."""
        return int(self.features[sequence].shape[1])


def _table(work: Workload) -> pa.Table:
    columns, wanted = [*work.ids, *work.lists, *work.numbers, *work.labels], (work.warmup + work.steps) * work.batch_size
    parts, rows = [], 0
    for path in work.files:
        parquet = pq.ParquetFile(path)
        for group in range(parquet.num_row_groups):
            if rows < wanted:
                parts.append(parquet.read_row_group(group, columns=columns))
                rows += parts[-1].num_rows
    if rows < wanted:
        raise ValueError(f"{work.warmup} + {work.steps} batches need {wanted:,} rows. Found {rows:,} in {len(work.files)} files.")
    return pa.concat_tables(parts).slice(0, wanted).combine_chunks()


def _padded(column: pa.ChunkedArray, size: int) -> NDArray[np.int64]:
    """Ids 1 to `size` - 1; 0 pads, as both libraries want it."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().fill_null(0).to_numpy()
    padded = np.zeros((len(lists), max(1, lengths.max())), np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = 1 + lists.flatten().to_numpy() % (size - 1)
    return padded


def read(work: Workload) -> Rows:
    """The rows of all batches, the untimed first. Seconds become log(1 + seconds), labels not observed 0."""
    table = _table(work)
    features: dict[str, NDArray[Any]] = {name: table[name].to_numpy() % size for name, size in work.ids.items()}
    for name, (column, size) in zip(work.sequences, work.lists.items(), strict=True):
        features[name] = _padded(table[column], size)
    features |= {name: table[name].to_numpy() for name in work.numbers}
    click, conversion, seconds = (np.nan_to_num(table[name].to_numpy()).astype(np.float32) for name in work.labels)
    return Rows(features, np.stack([click, conversion, np.log1p(seconds)], axis=1))


def speeds(
    work: Workload, rows: Rows, train: Callable[[Rows], float], predict: Callable[[Rows], float]
) -> tuple[float, float]:
    """(training's, prediction's) rows/s over all rows but the untimed ones, on which both are called before."""
    untimed = work.warmup * work.batch_size
    first, rest = rows.between(0, untimed), rows.between(untimed, len(rows.labels))
    train(first)
    trained = train(rest)
    predict(first)
    return trained, predict(rest)


def asked() -> Workload:
    """What the first argument says."""
    return Workload(**json.loads(sys.argv[1]))


def answer(train: float, predict: float) -> None:
    """Writes the speeds in rows/s to the file that the second argument names."""
    Path(sys.argv[2]).write_text(json.dumps({"rows_per_second": train, "score_rows_per_second": predict}))
