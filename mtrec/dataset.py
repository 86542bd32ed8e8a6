"""A dataset: Parquet files on any filesystem as one table with one schema, known from the footers before a row is read.

`open_dataset` finds the files, reads their footers, agrees on one type a column, leaves out row groups in which no row
can satisfy `where` or `window`, and gives a `Dataset`, from which row groups are decoded a chunk at a time.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import os
import re
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mtrec import where as conditions
from mtrec.files import File, Location, find_files, open_file, read_footer, several
from mtrec.kinds import counted
from mtrec.row_groups import Look, RowGroup, Stored, footer_bounds, look_at, prune, unstored_bounds
from mtrec.schema import as_dictionary, check_column, holds_dictionary, is_text, key_types, key_value, unify
from mtrec.where import Bounds, Condition

_FOOTER_THREADS = 16  # latency, not work: most of the time is spent waiting for a disk or an object store
_SAMPLE_ROW_GROUPS = 16
# A value of text in full takes 4 bytes and its length. Writers give up dictionaries that grow large and write the other values in
# full, which Arrow would put into its dictionary one by one: that costs more than it saves.
_DICTIONARY_BYTES = 8
_MOST_BYTES, _LEAST_ROWS = 24 << 20, 1024  # of lists, to be decoded at once


@dataclass(frozen=True)
class Source:
    """What the configuration says of a dataset: `data.train`, `data.validation` or `data.test`.

    Args:
        path: a file, folder, glob or URI, or several of them.
        where: rows to keep, such as `dt <= 2026-01-14 and channel in [1, 2]` (see `mtrec.where`).
        window: first and last value of `window_column`, both included: `[2026-11-01, 2026-11-07]`.
        window_column: the column of the window, as a rule the key of date partitions (`dt=2026-11-01`).
    """

    path: str | Sequence[str]
    where: str | None = None
    window: tuple[conditions.Value, conditions.Value] | None = None
    window_column: str = "dt"


@dataclass(frozen=True)
class Dataset:
    """Parquet files as one table.

    Attributes:
        place: the YAML path for error messages, such as `data.train`.
        files: the files, in order.
        row_groups: those that are not empty and may hold wanted rows, in order.
        schema: the wanted columns in the order in which they were asked for, each with one type for all files.
        condition: `where` and `window`, bound to the types; None keeps every row.
        condition_schema: the columns that the condition reads.
        partition_types: of the keys of folders such as `dt=2026-01-01`.
        dictionaries: columns of text that the files hold as dictionaries and numbers in them, and the condition does not read.
        list_bytes: {column of lists: what the values of a row take when they are decoded, at most}, of the largest row groups.
        fingerprint: changes when the files' contents, their order or the condition change; not when they are moved.
        notes: what a user should know: other types in some files, missing optional columns, days without files.
    """

    place: str
    files: tuple[File, ...]
    row_groups: tuple[RowGroup, ...]
    schema: pa.Schema
    condition: Condition | None
    condition_schema: pa.Schema
    partition_types: Mapping[str, pa.DataType]
    dictionaries: frozenset[str]
    list_bytes: Mapping[str, float]
    fingerprint: str
    notes: tuple[str, ...]

    @property
    def num_rows(self) -> int:
        """Rows of `row_groups`, before `where` drops any of them."""
        return sum(group.num_rows for group in self.row_groups)

    @property
    def filtered(self) -> bool:
        """Whether `where` may drop rows inside of row groups."""
        return any(group.filtered for group in self.row_groups)

    def rows_at_once(self, most: int) -> int:
        """How many rows to decode at once: `most`, or a half, a quarter ... of them where long lists make rows large.

        Arrow holds twice what a list's values take as long as a row group is open.
        """
        rows, row_bytes = most, sum(self.list_bytes.get(name, 0.0) for name in self.schema.names)
        while rows > _LEAST_ROWS and rows * row_bytes > _MOST_BYTES:
            rows = -(-rows // 2)
        return rows

    def with_dictionaries(self, columns: Collection[str]) -> "Dataset":
        """The same rows; those of `columns` that are among `dictionaries` come as dictionary arrays (int32 indices).

        A value is then decoded once a row group.
        """
        chosen = self.dictionaries & {*columns}
        fields = [
            field.with_type(as_dictionary(field.type)) if field.name in chosen and not holds_dictionary(field.type) else field
            for field in self.schema
        ]
        return dataclasses.replace(self, schema=pa.schema(fields))

    def chunks(
        self, row_group: RowGroup, columns: Sequence[str], rows: int
    ) -> Generator[tuple[pa.RecordBatch, pa.BooleanArray | None], None, None]:
        """Decodes a row group, `rows` at a time: (columns in the dataset's types, mask of the rows that stay or None).

        Holds one chunk, not the row group. Raises ValueError naming file and row group where the file was replaced
        since the dataset was opened, is damaged, or holds a value that the common type cannot.
        """
        file = self.files[row_group.file_index]
        extra = self.condition_schema if row_group.filtered else pa.schema([])
        fields = [self.schema.field(name) for name in columns]
        fields += [field for field in extra if field.name not in columns]
        schema, keys, stored = pa.schema(fields), dict(file.location.keys), file.schema.names
        read = [field.name for field in fields if field.name not in keys and field.name in stored]
        dictionaries = [
            name for name in read if holds_dictionary(schema.field(name).type) and is_text(file.schema.field(name).type)
        ]
        with open_file(file, dictionaries) as parquet:
            batches = parquet.iter_batches(rows, row_groups=[row_group.index], columns=read, use_threads=False)
            # the common case, without a Python step for each column: all there, in the dataset's types
            found = parquet.schema_arrow if dictionaries else file.schema
            as_stored = all(name not in keys and name in stored for name in schema.names) and all(
                found.field(field.name).type == field.type for field in fields
            )

            decoded = 0

            def next_chunk() -> tuple[pa.RecordBatch, pa.BooleanArray | None] | None:
                """The next rows in the dataset's types and which of them stay; None at the end."""
                nonlocal decoded
                raw = self._decoded(batches, file, row_group)
                if raw is None:
                    return None
                decoded += raw.num_rows
                if as_stored:
                    batch = raw.select(schema.names).replace_schema_metadata()
                    if not batch.schema.equals(schema):  # in what may be null
                        batch = pa.RecordBatch.from_arrays(batch.columns, schema=schema)
                else:
                    batch = pa.RecordBatch.from_arrays(
                        [self._column(raw, field, file, row_group) for field in fields], schema=schema
                    )
                if row_group.filtered and self.condition is not None:
                    return batch.select(list(columns)), conditions.mask(self.condition, batch)
                return batch, None

            yield from iter(next_chunk, None)  # a loop's variable would hold the chunk until the next one is there
            if decoded < row_group.num_rows:
                should = f"should hold {counted(row_group.num_rows, 'row')}, as its footer says. Found {decoded}"
                raise ValueError(
                    f"'{file.path}', row group {row_group.index}, {should}: the file is damaged, or pyarrow cannot read one of "
                    f"{', '.join(read)[:200]}."
                )

    def _decoded(self, batches: Iterator[pa.RecordBatch], file: File, row_group: RowGroup) -> pa.RecordBatch | None:
        try:
            return next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"'{file.path}', row group {row_group.index}, cannot be decoded: {error}") from error

    def _column(self, raw: pa.RecordBatch, field: pa.Field, file: File, row_group: RowGroup) -> pa.Array:
        keys = dict(file.location.keys)
        if field.name in keys:
            value = key_value(keys[field.name], field.type)
            return pa.repeat(pa.scalar(value, field.type), raw.num_rows)
        if field.name not in file.schema.names:
            return pa.nulls(raw.num_rows, field.type)
        column = raw.column(field.name)
        if column.type == field.type:
            return column
        try:
            return column.cast(field.type)
        except pa.ArrowException as error:
            raise ValueError(
                f"'{file.path}', row group {row_group.index}, column '{field.name}': {column.type} should become "
                f"{field.type}, the type that suits all files of `{self.place}`, but: {error}"
            ) from error

    def read(self, row_group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """The wanted rows of a row group, decoded whole. Raises as `chunks`."""
        parts = [_kept(batch, mask) for batch, mask in self.chunks(row_group, columns, row_group.num_rows)]
        return pa.Table.from_batches(parts, pa.schema([self.schema.field(name) for name in columns]))

    def batches(
        self, columns: Sequence[str], rows: int, row_groups: Sequence[RowGroup] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The wanted rows in order, at most `rows` at a time (fewer where row groups end or `where` drops rows)."""
        for row_group in self.row_groups if row_groups is None else row_groups:
            for batch, mask in self.chunks(row_group, columns, rows):
                kept = _kept(batch, mask)
                if kept.num_rows:
                    yield kept

    def sample(self, rows: int, columns: Sequence[str]) -> pa.Table:
        """Some `rows` wanted rows from places spread over the dataset: the same ones each time, fewer if there are."""
        step = max(1, len(self.row_groups) // _SAMPLE_ROW_GROUPS)
        spread = [group for start in range(step) for group in self.row_groups[start::step]]
        share = -(-rows // min(_SAMPLE_ROW_GROUPS, len(spread)))
        found: list[pa.RecordBatch] = []
        read, missing = 0, rows
        for group in spread:
            wanted = min(share, missing)
            for batch in self.batches(columns, max(wanted, 1024), [group]):
                found.append(batch.slice(0, wanted))
                wanted -= found[-1].num_rows
                missing -= found[-1].num_rows
                if wanted == 0:
                    break
            read += group.num_rows
            if missing == 0 or read > 100 * max(rows, 65536):  # a rare condition: enough was searched
                break
        return pa.Table.from_batches(found, pa.schema([self.schema.field(name) for name in columns]))

    def minmax(self, column: str) -> tuple[Any, Any] | None:
        """Least and greatest value of a column (of its items, for lists), from the footers.

        None where the footers do not say, the column is all null, or `where` drops rows inside of row groups (then the
        extremes may be those of dropped rows). Raises KeyError for a column that is not in `schema`.
        """
        self.schema.field(column)
        if self.filtered:
            return None
        wanted: dict[int, list[RowGroup]] = {}
        for group in self.row_groups:
            wanted.setdefault(group.file_index, []).append(group)

        def bounds_of(item: tuple[int, list[RowGroup]]) -> list[Bounds | None]:
            """Least and greatest value of the column in these row groups of one file."""
            file = self.files[item[0]]
            if column not in file.schema.names or column in dict(file.location.keys):
                return [unstored_bounds(file, column, group, self.partition_types) for group in item[1]]
            with open_file(file) as parquet:
                bounds = footer_bounds(file, parquet.metadata, [column])[column]
            return [bounds[group.index] for group in item[1]]

        with ThreadPoolExecutor(_FOOTER_THREADS) as pool:
            bounds = [bound for found in pool.map(bounds_of, wanted.items()) for bound in found]
        known = [bound for bound in bounds if bound is None or bound.nulls != bound.rows]
        if not known or any(bound is None or bound.low is None or bound.high is None for bound in known):
            return None
        return min(bound.low for bound in known if bound), max(bound.high for bound in known if bound)


def open_dataset(
    source: Source,
    columns: Sequence[str],
    optional: Collection[str] = (),
    *,
    place: str,
    asked_by: Mapping[str, Sequence[str]] | None = None,
) -> Dataset:
    """Opens the Parquet files that `source` names, for reading `columns`; `asked_by` are the YAML paths that name each.

    Files may hold further columns, in any order. A column of `optional` may be missing from some or all files: it is
    null there. Types may differ as far as `mtrec.schema.common_type` goes. Folders `dt=2026-01-01` are columns (dates,
    integers or text, by all their values) and go before a column of that name in the file.

    Raises ValueError naming `place` (a YAML path, such as `data.train`), the file and what to do, for: a path that
    names nothing; a file that is no whole Parquet; a missing column (with the nearest name); types that do not go
    together; a condition that does not parse or bind; no rows.

    >>> import tempfile, pyarrow.parquet
    >>> folder = tempfile.mkdtemp()
    >>> pyarrow.parquet.write_table(pa.table({"user": [1, 2, 3]}), folder + "/a.parquet", row_group_size=2)
    >>> dataset = open_dataset(Source(folder, where="user >= 3"), ["user"], place="data.train")
    >>> len(dataset.row_groups), [batch.to_pydict() for batch in dataset.batches(["user"], rows=100)]
    (1, [{'user': [3]}])
    """
    locations, twice = find_files(source.path, place)
    dataset = _open(source, locations, key_types(locations), columns, frozenset(optional), place, asked_by or {}, columns)
    if not dataset.row_groups:
        raise ValueError(_no_rows(source, place, dataset))
    notes = [f"`{place}.path` names '{path}' twice; it is read once." for path in twice]
    return dataclasses.replace(dataset, notes=(*notes, *dataset.notes))


def open_each(
    source: Source, columns: Sequence[str], optional: Collection[str] = (), *, place: str
) -> list[tuple[Location, Dataset | ValueError]]:
    """Every file that `source` names as a dataset of its own, in order; of a file that cannot be read, the error.

    Types are those of the file itself, but for partition keys, which have one type for all files. A file may have no rows. Sizes
    (`list_bytes`, `dictionaries`) are known of all of its columns.
    Raises ValueError where `source` names nothing or its condition does not parse.
    """
    locations, _ = find_files(source.path, place)
    if source.where is not None:
        conditions.parse(source.where, f"{place}.where")
    partition_types = key_types(locations)

    def opened(location: Location) -> Dataset | ValueError:
        try:
            return _open(source, [location], partition_types, columns, frozenset(optional), place, {}, None)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(locations))) as pool:
        return list(zip(locations, pool.map(opened, locations), strict=True))


def _open(
    source: Source,
    locations: Sequence[Location],
    partition_types: Mapping[str, pa.DataType],
    columns: Sequence[str],
    optional: frozenset[str],
    place: str,
    asked_by: Mapping[str, Sequence[str]],
    sized: Sequence[str] | None,
) -> Dataset:
    """The dataset of some files; it may have no row groups. `sized`: columns whose sizes it is to know, None: all."""
    condition = None if source.where is None else conditions.parse(source.where, f"{place}.where")
    named = () if condition is None else conditions.columns_of(condition)
    named += (source.window_column,) if source.window is not None else ()
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(locations))) as pool:
        looks = list(pool.map(lambda location: look_at(location, sized, named), locations))
    files = _with_shared_schemas([look.file for look in looks])
    for name in named:
        if name in optional and not any(name in file.schema.names for file in files) and name not in partition_types:
            continue
        asks = "window_column" if source.window is not None and name == source.window_column else "where"
        check_column(name, files, partition_types, f"{place}.{asks}")
    needed = list(dict.fromkeys([*columns, *named]))
    types, notes = unify(needed, files, partition_types, optional, place, asked_by)
    condition = _bound_condition(source, condition, types, place)
    row_groups = prune(looks, condition, partition_types)
    return Dataset(
        place=place,
        files=tuple(files),
        row_groups=tuple(row_groups),
        schema=pa.schema([(name, types[name]) for name in dict.fromkeys(columns)]),
        condition=condition,
        condition_schema=pa.schema([(name, types[name]) for name in dict.fromkeys(named)]),
        partition_types=partition_types,
        dictionaries=frozenset(_repeating(looks, partition_types) - {*named}),
        list_bytes=_list_bytes(looks),
        fingerprint=_fingerprint(files, row_groups, condition),
        notes=(*notes, *_absent_days(source, locations, partition_types, place)),
    )


def _repeating(looks: Sequence[Look], partition_types: Mapping[str, pa.DataType]) -> set[str]:
    """The columns of text that all files hold as dictionaries, of which a value takes little."""
    found: dict[str, list[Stored]] = {}
    for look in looks:
        for name, stored in look.stored.items():
            if is_text(look.file.schema.field(name).type):
                found.setdefault(name, []).append(stored)
    return {
        name
        for name, chunks in found.items()
        if name not in partition_types
        and all(chunk.repeats for chunk in chunks)
        and sum(chunk.num_bytes for chunk in chunks) <= _DICTIONARY_BYTES * sum(chunk.num_values for chunk in chunks)
    }


def _list_bytes(looks: Sequence[Look]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for look in looks:
        for name, stored in look.stored.items():
            if stored.list_bytes:
                largest[name] = max(largest.get(name, 0.0), stored.list_bytes)
    return largest


def common_files(one: Dataset, other: Dataset) -> list[str]:
    """The files that both may read rows from, as messages name them; by place, links followed, not by contents."""
    first, second = ({_place(file): file.path for file in _read_files(each)} for each in (one, other))
    return [path for place, path in first.items() if place in second]


def _read_files(dataset: Dataset) -> list[File]:
    return [dataset.files[index] for index in dict.fromkeys(group.file_index for group in dataset.row_groups)]


def _place(file: File) -> str:
    kind, path = file.location.filesystem.type_name, file.location.path
    return f"{kind}:{os.path.realpath(path) if kind == 'local' else path}"


def _kept(batch: pa.RecordBatch, mask: pa.BooleanArray | None) -> pa.RecordBatch:
    return batch if mask is None else batch.filter(mask)


def _with_shared_schemas(files: list[File]) -> list[File]:
    """Thousands of files with equal schemas keep one object."""
    seen: dict[pa.Schema, pa.Schema] = {}
    return [dataclasses.replace(file, schema=seen.setdefault(file.schema, file.schema)) for file in files]


def _bound_condition(
    source: Source, condition: Condition | None, types: Mapping[str, pa.DataType], place: str
) -> Condition | None:
    bound = None if condition is None else conditions.bind(condition, types, f"{place}.where")
    if source.window is None:
        return bound
    first, last = (_window_value(value, types[source.window_column]) for value in source.window)
    if type(first) is type(last) and first > last:  # type: ignore[operator]  # of one type, then
        raise ValueError(f"`{place}.window` should be [first, last]. Found {first}, which is after {last}.")
    asked = conditions.window(source.window_column, first, last, types[source.window_column])
    window = conditions.bind(asked, types, f"{place}.window")
    return window if bound is None else conditions.Both(window, bound)


def _window_value(value: conditions.Value, type_: pa.DataType) -> conditions.Value:
    """Dates and numbers come from an experiment as text."""
    for is_number, number in ((pa.types.is_integer, int), (pa.types.is_floating, float)):
        if isinstance(value, str) and is_number(type_):
            with contextlib.suppress(ValueError):  # `bind` says what it should be
                return number(value)
    dated = isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value)
    return datetime.date.fromisoformat(value) if dated and isinstance(value, str) else value


def _absent_days(
    source: Source, locations: Sequence[Location], partition_types: Mapping[str, pa.DataType], place: str
) -> list[str]:
    """A note where days of the window have no files: no error (a day without traffic), but it should be seen."""
    if source.window is None or partition_types.get(source.window_column) != pa.date32():
        return []
    first, last = (_window_value(value, pa.date32()) for value in source.window)
    if not (isinstance(first, datetime.date) and isinstance(last, datetime.date)):
        return []
    present = {value for location in locations for key, value in location.keys if key == source.window_column}
    days = [(first + datetime.timedelta(days=i)).isoformat() for i in range((last - first).days + 1)]
    absent = [day for day in days if day not in present]
    if not absent:
        return []
    shown = ", ".join(absent[:7]) + (", ..." if len(absent) > 7 else "")
    return [f"`{place}.window`: no files for {len(absent)} of {counted(len(days), 'day')} ({shown})."]


def _no_rows(source: Source, place: str, dataset: Dataset) -> str:
    rows = 0
    for file in dataset.files:
        rows += read_footer(file.location)[1].num_rows
    if rows == 0:
        return f"`{place}` should have at least one row. Found {several(dataset.files)}, with no rows."
    limits = [f"where: {source.where}"] if source.where is not None else []
    if source.window is not None:
        limits.append(f"{source.window[0]} <= {source.window_column} <= {source.window[1]}")
    return (
        f"`{place}` should have at least one row. Found none with `{'` and `'.join(limits)}`: the footers and "
        f"folder names of {counted(len(dataset.files), 'file')} ({counted(rows, 'row')}) rule it out."
    )


def _fingerprint(files: Sequence[File], row_groups: Sequence[RowGroup], condition: Condition | None) -> str:
    digest = hashlib.blake2b(repr(condition).encode(), digest_size=16)
    for group in row_groups:
        file = files[group.file_index]
        digest.update(repr((file.identity.digest, file.location.keys, group.index, group.num_rows)).encode())
    return digest.hexdigest()
