"""Row groups: what footers and folder names say of their columns, and in which of them a condition can be true."""

import dataclasses
import datetime
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from mtrec.files import File, Location, leaves_of, read_footer
from mtrec.schema import key_value
from mtrec.where import TRUE, Bounds, Condition, columns_of, outcomes

_VALUE_BYTES = {"FLOAT": 4, "DOUBLE": 8, "INT32": 4, "INT64": 8, "INT96": 12, "BOOLEAN": 1}  # of the others: what they take
_LEVEL_BYTES = 4  # with which a value in a list says where lists begin, and what is null
_COMPARABLE = (bool, int, float, str, datetime.date)


@dataclass(frozen=True)
class RowGroup:
    """A row group of the dataset: row group `index` of file `file_index`. `filtered`: `where` may drop rows in it."""

    file_index: int
    index: int
    num_rows: int
    filtered: bool = False


class Stored(NamedTuple):
    """What a column takes in a row group: in the file before compression, and of a list's values when they are decoded (a row).

    `repeats`: written as a dictionary and numbers in it.
    """

    num_bytes: int
    num_values: int
    repeats: bool
    list_bytes: float


class Look(NamedTuple):
    """A file as its footer tells of it: the rows of each row group, {column: its bounds in each}, {column: what it takes in the
    largest one}.
    """

    file: File
    rows: tuple[int, ...]
    bounds: dict[str, list[Bounds | None]]
    stored: dict[str, Stored]


def look_at(location: Location, columns: Collection[str] | None, bounded: Collection[str]) -> Look:
    """Reads the footer of a file: what `columns` (None: all) take, and the bounds of `bounded`. Raises as `read_footer`."""
    file, metadata = read_footer(location)
    rows = tuple(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))
    return Look(file, rows, footer_bounds(file, metadata, bounded), _stored(file, metadata, rows, columns))


def _stored(
    file: File, metadata: pq.FileMetaData, rows: Sequence[int], columns: Collection[str] | None
) -> dict[str, Stored]:
    """Of the row group with the most rows, which stands for the others."""
    if not rows:
        return {}
    group, leaves = metadata.row_group(rows.index(max(rows))), leaves_of(file.schema)
    return {
        name: _stored_leaf(group, leaves[name][0], metadata.schema.column(leaves[name][0]).max_repetition_level > 0)
        for name in (leaves if columns is None else columns)
        if len(leaves.get(name, ())) == 1
    }


def _stored_leaf(group: pq.RowGroupMetaData, leaf: int, in_list: bool) -> Stored:
    chunk = group.column(leaf)
    num_bytes, num_values = chunk.total_uncompressed_size, chunk.num_values
    decoded = max(num_bytes, num_values * _VALUE_BYTES.get(chunk.physical_type, 0)) + num_values * _LEVEL_BYTES
    return Stored(num_bytes, num_values, chunk.has_dictionary_page, decoded / max(1, group.num_rows) if in_list else 0.0)


def prune(looks: Sequence[Look], condition: Condition | None, partition_types: Mapping[str, pa.DataType]) -> list[RowGroup]:
    """The row groups in which the condition can be true for a row; None keeps all that are not empty."""
    kept = []
    for file_index, look in enumerate(looks):
        file, bounds = look.file, look.bounds
        keys = dict(file.location.keys)
        for index, num_rows in enumerate(look.rows):
            group = RowGroup(file_index, index, num_rows)
            if num_rows == 0:
                continue
            if condition is None:
                kept.append(group)
                continue
            known = {
                name: unstored_bounds(file, name, group, partition_types)
                if name in keys or name not in bounds
                else bounds[name][index]
                for name in columns_of(condition)
            }
            outcome = outcomes(condition, known.get)
            if outcome & TRUE:
                kept.append(dataclasses.replace(group, filtered=outcome != TRUE))
    return kept


def unstored_bounds(file: File, column: str, group: RowGroup, partition_types: Mapping[str, pa.DataType]) -> Bounds:
    """Bounds of a column that is not stored in the file: one value for a partition key, null for a missing column."""
    keys = dict(file.location.keys)
    value = key_value(keys[column], partition_types[column]) if column in keys else None
    return Bounds(value, value, group.num_rows if value is None else 0, group.num_rows)


def footer_bounds(file: File, metadata: pq.FileMetaData, columns: Collection[str]) -> dict[str, list[Bounds | None]]:
    """{column: what the footer says of it, for each row group}, of the columns that the file has.

    None where it says nothing, and for columns of several leaves (structs). A list's bounds are those of its items.
    """
    if not columns:
        return {}
    leaves, groups = leaves_of(file.schema), range(metadata.num_row_groups)
    return {
        name: [_chunk_bounds(metadata, i, leaves[name][0]) if len(leaves[name]) == 1 else None for i in groups]
        for name in columns
        if name in leaves
    }


def _chunk_bounds(metadata: pq.FileMetaData, row_group: int, leaf: int) -> Bounds | None:
    group = metadata.row_group(row_group)
    chunk = group.column(leaf)
    statistics = chunk.statistics if chunk.is_stats_set else None
    if statistics is None:
        return None
    # below a list, nulls are counted over its items, not over rows
    nested = metadata.schema.column(leaf).max_repetition_level > 0
    nulls = statistics.null_count if statistics.has_null_count and not nested else None
    unsure = Bounds(None, None, nulls, group.num_rows)
    if not statistics.has_min_max or statistics.physical_type in ("FIXED_LEN_BYTE_ARRAY", "INT96"):
        return unsure
    try:
        low, high = _low_and_high(statistics)
    except (OverflowError, ValueError):  # a date that Python's calendar does not have, text that is no UTF-8
        return unsure
    if low != low or high != high:  # NaN, which old writers left there: Parquet says to pass such bounds over
        return unsure
    if isinstance(low, datetime.datetime) and low.tzinfo is not None:
        low, high = (moment.astimezone(datetime.UTC).replace(tzinfo=None) for moment in (low, high))
    return Bounds(low, high, nulls, group.num_rows) if isinstance(low, _COMPARABLE) else unsure


def _low_and_high(statistics: pq.Statistics) -> tuple[Any, Any]:
    """The bounds as Python holds them; (None, None) where it cannot compare them."""
    logical = json.loads(statistics.logical_type.to_json())
    if logical.get("timeUnit") != "nanoseconds":
        return statistics.min, statistics.max
    if logical["Type"] != "Timestamp":
        return None, None
    # Python's clock ends at microseconds: round outwards
    return _from_microseconds(statistics.min_raw // 1000), _from_microseconds(-(-statistics.max_raw // 1000))


def _from_microseconds(count: int) -> datetime.datetime:
    return datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=count)
