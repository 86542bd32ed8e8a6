"""A batch as the model takes it.

Legend: B rows on this rank, F dense columns, K sparse keys, T tasks.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from pyarrow import types
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtrec.features import BadRowsError, EncodedRows, Encoder, FeatureCounts, join
from mtrec.features.arrays import floats, is_number, nulls, plain
from mtrec.features.encoded import Order, put, taken
from mtrec.kinds import nearest


@dataclass
class Batch:
    """Features and labels of some rows.

    Attributes:
        dense_BF: float32.
        sparse: rows of the unweighted tables, keys in the encoder's order; values int32 where all tables' rows fit, else int64;
            lengths int32.
        weighted: the same for tables with weights; None where there are none.
        labels: {task: (B,) float32}; NaN is unobserved.
        sample_weight_B: float32, or None.
        stream_rows: rows of each of this rank's streams, in order; they sum to B.
        single: keys of `sparse` of which every row is known to have one id: their mean is their sum.
    """

    dense_BF: Tensor
    sparse: KeyedJaggedTensor
    weighted: KeyedJaggedTensor | None
    labels: dict[str, Tensor]
    sample_weight_B: Tensor | None
    stream_rows: tuple[int, ...]
    single: frozenset[str] = frozenset()

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.dense_BF)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The batch on a device, itself where it is on the CPU and stays there; copies overlap with computation where the batch
        is pinned.
        """
        device = torch.device(device)
        if device.type == self.dense_BF.device.type == "cpu":
            return self
        weight = self.sample_weight_B
        return Batch(
            self.dense_BF.to(device, non_blocking=non_blocking),
            self.sparse.to(device, non_blocking=non_blocking),
            None if self.weighted is None else self.weighted.to(device, non_blocking=non_blocking),
            {name: label.to(device, non_blocking=non_blocking) for name, label in self.labels.items()},
            None if weight is None else weight.to(device, non_blocking=non_blocking),
            self.stream_rows,
            self.single,
        )

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory (CUDA only)."""
        weight = self.sample_weight_B
        return Batch(
            self.dense_BF.pin_memory(),
            self.sparse.pin_memory(),
            None if self.weighted is None else self.weighted.pin_memory(),
            {name: label.pin_memory() for name, label in self.labels.items()},
            None if weight is None else weight.pin_memory(),
            self.stream_rows,
            self.single,
        )


@dataclass(frozen=True)
class Label:
    """Where a label comes from: a column of numbers times `scale` (such as 0.001 for milliseconds to seconds).

    `low` and `high` bound the scaled value (None: open); `integer` allows whole numbers only.
    """

    column: str
    scale: float = 1.0
    low: float | None = None
    high: float | None = None
    integer: bool = False


def label_values(batch: pa.RecordBatch, label: Label) -> npt.NDArray[np.float32]:
    """(B,) labels in natural units, NaN for null.

    Raises ValueError for a column that is missing or holds no numbers, BadRowsError for a NaN, an infinity or a value
    outside of the range.

    >>> batch = pa.record_batch({"watch_ms": [1500, None]})
    >>> label_values(batch, Label("watch_ms", scale=0.001, low=0.0)).tolist()
    [1.5, nan]
    """
    array = _column(batch, label.column, "label")
    plain_B = _plain_values(array, label)
    if plain_B is not None:
        return plain_B
    values_B = floats(array)
    null_B = nulls(array)
    if types.is_null(array.type):
        null_B = np.ones(len(array), np.bool_)
    with np.errstate(over="ignore"):
        scaled_B = values_B if label.scale == 1.0 else values_B * label.scale
        narrow_B = scaled_B.astype(np.float32)  # a double above 3.4e38 would be an infinite label
    if _all_good(scaled_B, 0 if null_B is None else int(np.count_nonzero(null_B)), label):
        return narrow_B
    good_B = np.isfinite(narrow_B)
    if label.low is not None:
        good_B &= scaled_B >= label.low
    if label.high is not None:
        good_B &= scaled_B <= label.high
    if label.integer:
        good_B &= np.floor(scaled_B) == scaled_B
    if null_B is not None:
        good_B |= null_B
    if not good_B.all():
        bad = np.flatnonzero(~good_B)
        raise BadRowsError("label", label.column, bad, _wish(label), array[int(bad[0])].as_py())
    return narrow_B


def _finite_range(label: Label) -> tuple[float, float]:
    limit = float(np.finfo(np.float32).max)
    return (
        -limit if label.low is None else max(label.low, -limit),
        limit if label.high is None else min(label.high, limit),
    )


def _plain_values(array: Any, label: Label) -> npt.NDArray[np.float32] | None:
    """The same as `label_values` where nothing is to be converted or found fault with, as nearly always; else None."""
    # what becomes a float32 as it is
    as_it_is = types.is_integer(array.type) or (types.is_floating(array.type) and not label.integer)
    if not as_it_is or label.scale != 1.0 or array.null_count == len(array):
        return None
    values_B: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)  # NaN for a null
    if not array.null_count:
        least, largest = np.minimum.reduce(values_B), np.maximum.reduce(values_B)  # NaN where there is one
    elif np.count_nonzero(np.isnan(values_B)) == array.null_count:
        least, largest = np.fmin.reduce(values_B), np.fmax.reduce(values_B)
    else:
        return None
    low, high = _finite_range(label)
    if not (low <= least.item() and largest.item() <= high):  # not in the column's own type, which may round the bounds
        return None
    return values_B.astype(np.float32)


def _all_good(values_B: npt.NDArray[np.float64], num_null: int, label: Label) -> bool:
    """Whether all values but the nulls (which are NaN) may stand: what is nearly always so, without a mask for each condition."""
    if np.count_nonzero(np.isnan(values_B)) != num_null:
        return False
    if num_null == len(values_B):
        return True
    low, high = _finite_range(label)
    if not (low <= np.fmin.reduce(values_B) and np.fmax.reduce(values_B) <= high):
        return False
    return not label.integer or np.count_nonzero(np.floor(values_B) == values_B) == len(values_B) - num_null


@dataclass(frozen=True)
class Examples:
    """Encoded rows with their labels, one row of `labels_TB` a task, and weights or None: what batches are cut from."""

    rows: EncodedRows
    tasks: tuple[str, ...]
    labels_TB: npt.NDArray[np.float32]
    sample_weight_B: npt.NDArray[np.float32] | None

    @property
    def num_rows(self) -> int:
        """B."""
        return self.rows.num_rows

    @property
    def nbytes(self) -> int:
        """Of all arrays."""
        return self.rows.nbytes + self.labels_TB.nbytes + (0 if self.sample_weight_B is None else self.sample_weight_B.nbytes)


def make_examples(
    record_batch: pa.RecordBatch,
    encoder: Encoder,
    labels: Mapping[str, Label],
    sample_weight: str | None,
    orders: Sequence[Order],
    counts: FeatureCounts | None = None,
) -> list[Examples]:
    """For each of `orders` these rows of a record batch, in this order, encoded.

    Args:
        labels: {task: Label}; empty for scoring.
        sample_weight: column with a finite weight a row, not negative; null counts as 1.
        counts: nulls and unseen values of all rows are added to it.

    Raises ValueError and BadRowsError as `Encoder.encode` and `label_values` do, for any row of the batch.
    """
    parts = encoder.encode_rows(record_batch, orders, counts)
    weight_B = None if sample_weight is None else sample_weights(record_batch, sample_weight)
    labels_TB = [np.empty((len(labels), rows.num_rows), np.float32) for rows in parts]
    for task, label in enumerate(labels.values()):
        put((label_TB[task] for label_TB in labels_TB), label_values(record_batch, label), orders)
    weights = [None if weight_B is None else taken(weight_B, order) for order in orders]
    tasks = tuple(labels)
    return [Examples(*part) for part in zip(parts, [tasks] * len(parts), labels_TB, weights, strict=True)]


def join_examples(
    parts: Sequence[tuple[Examples, int, int]], encoder: Encoder, stream_rows: tuple[int, ...] | None = None
) -> Batch:
    """The batch, on the CPU, of rows [start, stop) of each part, one after the other (at least one part).

    `stream_rows` must sum to these rows; None: all are of one stream.
    """
    num_rows = sum([stop - start for _, start, stop in parts])
    of_streams = (num_rows,) if stream_rows is None else tuple(stream_rows)
    if sum(of_streams) != num_rows:
        raise ValueError(f"`stream_rows` should sum to the {num_rows} rows of the batch. Found {of_streams}.")
    encoded = join([(each.rows, start, stop) for each, start, stop in parts])
    weighted = None
    if encoder.weighted_keys:
        weighted = KeyedJaggedTensor(
            keys=list(encoder.weighted_keys),
            values=torch.from_numpy(encoded.weighted_values),
            weights=torch.from_numpy(encoded.weights),
            lengths=torch.from_numpy(encoded.weighted_lengths_KB).reshape(-1),
            stride=num_rows,
            length_per_key=encoded.weighted_counts,
        )
    labels_TB = torch.from_numpy(np.concatenate([each.labels_TB[:, start:stop] for each, start, stop in parts], axis=1))
    weights = [each.sample_weight_B[start:stop] for each, start, stop in parts if each.sample_weight_B is not None]
    return Batch(
        dense_BF=torch.from_numpy(encoded.dense_BF),
        sparse=KeyedJaggedTensor(
            keys=list(encoder.sparse_keys),
            values=torch.from_numpy(encoded.values),
            lengths=torch.from_numpy(encoded.lengths_KB).reshape(-1),
            stride=num_rows,
            length_per_key=encoded.counts,
        ),
        weighted=weighted,
        labels=dict(zip(parts[0][0].tasks, labels_TB.unbind(), strict=True)),
        sample_weight_B=torch.from_numpy(np.concatenate(weights)) if weights else None,
        stream_rows=of_streams,
        single=_chosen(encoder.sparse_keys, encoded.single),
    )


@lru_cache(maxsize=64)
def _chosen(keys: tuple[str, ...], chosen: tuple[bool, ...]) -> frozenset[str]:
    return frozenset(itertools.compress(keys, chosen))


def make_batch(
    record_batch: pa.RecordBatch,
    encoder: Encoder,
    labels: Mapping[str, Label],
    sample_weight: str | None,
    stream_rows: tuple[int, ...] | None = None,
    counts: FeatureCounts | None = None,
) -> Batch:
    """The batch, on the CPU, of all rows of a record batch: `make_examples`, then `join_examples`."""
    (examples,) = make_examples(record_batch, encoder, labels, sample_weight, [slice(0, record_batch.num_rows)], counts)
    return join_examples([(examples, 0, examples.num_rows)], encoder, stream_rows)


def sample_weights(batch: pa.RecordBatch, column: str) -> npt.NDArray[np.float32]:
    """(B,) weights; null counts as 1. Raises ValueError for a column that is missing or holds no numbers, BadRowsError for a
    weight that is negative or not finite.
    """
    array = _column(batch, column, "`data.sample_weight`")
    values_B = floats(array)
    null_B = nulls(array)
    if null_B is not None:
        values_B = np.where(null_B, 1.0, values_B)
    with np.errstate(over="ignore"):
        weight_B = values_B.astype(np.float32)
    bad = np.flatnonzero(~((values_B >= 0) & np.isfinite(weight_B)))
    if len(bad):
        found = array[int(bad[0])].as_py()
        raise BadRowsError("`data.sample_weight`", column, bad, "hold finite weights, not negative", found)
    return weight_B


def _column(batch: pa.RecordBatch, name: str, place: str) -> Any:
    index = batch.schema.get_field_index(name)
    if index < 0:
        raise ValueError(f"{place}: there should be a column '{name}'. Found none.{nearest(name, batch.schema.names)}")
    array = plain(batch.column(index))
    if not is_number(array.type):
        raise ValueError(f"{place}: column '{name}' should hold numbers. Found type {array.type}.")
    return array


def _wish(label: Label) -> str:
    if label.integer and (label.low, label.high) == (0, 1):
        return "be 0, 1 or null"
    bounds = [f"at least {label.low:g}"] if label.low is not None else []
    bounds += [f"at most {label.high:g}"] if label.high is not None else []
    unit = f" (after times {label.scale:g})" if label.scale != 1.0 else ""
    numbers = "whole numbers" if label.integer else "finite numbers"
    return f"hold {numbers}{' of ' if bounds else ''}{' and '.join(bounds)}{unit}, or null"
