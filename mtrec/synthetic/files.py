"""Writes the synthetic logs to Parquet (zstd), row group by row group: memory does not grow with the rows."""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtrec.synthetic.draws import CHUNK_ROWS
from mtrec.synthetic.log import SyntheticLog
from mtrec.synthetic.reference import ReferenceLog


class _Log(Protocol):
    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop` (excluded) of an endless log."""


@dataclass(frozen=True)
class LogSummary:
    """What was written. Rates are over `rows` and `validation_rows` together; dwell in seconds a click."""

    folder: Path
    files: tuple[Path, ...]
    rows: int
    validation_rows: int
    num_bytes: int
    click_rate: float
    conversion_rate: float  # of the clicked rows
    mean_dwell_seconds: float


def write_log(
    folder: Path,
    *,
    rows: int,
    seed: int,
    files: int = 8,
    row_group_rows: int = CHUNK_ROWS,
    conflict: float = 0.0,
    days: int | None = None,
    drift: float = 0.0,
    validation_rows: int | None = None,
    start_date: str = "2026-11-01",
    overwrite: bool = False,
) -> LogSummary:
    """Write `rows` impressions with known truth (see `SyntheticLog`) as Parquet files below `folder`.

    Without `days`: `folder/train/part-000.parquet` ... (`files` of them), and the rows that follow, `validation_rows`
    of them (default a tenth), in `folder/validation/`. With `days`: the rows cut into `folder/dt=2026-11-01/` and the
    following days (`files` shared out among them, at least one a day; the last day takes what is left of the rows),
    where the share `drift` of users and items is replaced a day. A day is the validation of the day before, so
    `validation_rows` does not go with it.
    The same arguments write the same rows; `files` and `row_group_rows` only say how they are cut.

    Raises ValueError for a count that is not positive, more files than rows, or a folder that already holds a log
    (unless `overwrite`, which first removes the part files of that log).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     summary = write_log(Path(folder), rows=1000, seed=7, files=2)
    ...     [str(file.relative_to(folder)) for file in summary.files], summary.validation_rows
    (['train/part-000.parquet', 'train/part-001.parquet', 'validation/part-000.parquet'], 100)
    """
    _check_counts(rows=rows, files=files, row_group_rows=row_group_rows)
    if days is None:
        if drift:
            raise ValueError(f"`drift` should be given together with `days`: ids drift from day to day. Found {drift}.")
        validation_rows = rows // 10 if validation_rows is None else validation_rows
        parts = _train_and_validation(rows, validation_rows, files)
        log = SyntheticLog(seed=seed, conflict=conflict)
    else:
        _check_counts(days=days)
        if validation_rows:
            raise ValueError(
                "`validation_rows` should not be given with `days`: the next day is the validation. "
                f"Found {validation_rows}."
            )
        if rows < days:
            raise ValueError(f"`rows` should be at least `days`, {days}. Found {rows}.")
        validation_rows = 0
        try:
            first = datetime.date.fromisoformat(start_date)
        except ValueError:
            raise ValueError(f"`start_date` should be a date as 2026-11-01. Found '{start_date}'.") from None
        parts = []
        rows_per_day = rows // days
        for day in range(days):
            stop = rows if day == days - 1 else (day + 1) * rows_per_day
            name = f"dt={first + datetime.timedelta(days=day)}"
            parts += _parts(name, day * rows_per_day, stop, max(1, files // days))
        log = SyntheticLog(seed=seed, conflict=conflict, rows_per_day=rows_per_day, days=days, drift=drift)
    return _write(folder, log, parts, row_group_rows, rows, validation_rows, overwrite)


def write_reference(
    folder: Path,
    *,
    rows: int = 2_000_000,
    seed: int,
    files: int = 8,
    row_group_rows: int = CHUNK_ROWS,
    validation_rows: int = 0,
    overwrite: bool = False,
) -> LogSummary:
    """Write the workload that speed is measured on (see `ReferenceLog`): `folder/train/part-000.parquet` ...

    Raises ValueError as `write_log` does.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     summary = write_reference(Path(folder), rows=1000, seed=7, files=1)
    ...     pq.read_schema(summary.files[0]).names[24:29]
    ['c24', 'c25', 'items', 'd0', 'd1']
    """
    _check_counts(rows=rows, files=files, row_group_rows=row_group_rows)
    parts = _train_and_validation(rows, validation_rows, files)
    return _write(folder, ReferenceLog(seed=seed), parts, row_group_rows, rows, validation_rows, overwrite)


def row_ranges(start: int, stop: int, parts: int) -> Iterator[tuple[int, int]]:
    """`parts` consecutive ranges over rows `start` to `stop`, their lengths equal to within one row.

    >>> list(row_ranges(0, 10, 3))
    [(0, 3), (3, 6), (6, 10)]
    """
    count = stop - start
    for part in range(parts):
        yield start + part * count // parts, start + (part + 1) * count // parts


_Part = tuple[str, int, int]  # file below the folder, first row, row after the last


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` should be a positive integer. Found {count}.")


def _parts(name: str, start: int, stop: int, files: int) -> list[_Part]:
    if files > stop - start:
        raise ValueError(f"`files` should be at most the {stop - start} rows of {name}. Found {files}.")
    return [
        (f"{name}/part-{part:03d}.parquet", *ends) for part, ends in enumerate(row_ranges(start, stop, files))
    ]


def _train_and_validation(rows: int, validation_rows: int, files: int) -> list[_Part]:
    if validation_rows < 0:
        raise ValueError(f"`validation_rows` should be an integer of at least 0. Found {validation_rows}.")
    parts = _parts("train", 0, rows, files)
    if validation_rows:
        # Files of about the same size as those of the training part.
        parts += _parts("validation", rows, rows + validation_rows, max(1, files * validation_rows // rows))
    return parts


def _write(
    folder: Path,
    log: _Log,
    parts: list[_Part],
    row_group_rows: int,
    rows: int,
    validation_rows: int,
    overwrite: bool,
) -> LogSummary:
    folder = Path(folder)
    present = sorted(
        path for below in ("train", "validation", "dt=*") for path in folder.glob(f"{below}/part-*.parquet")
    )
    if present and not overwrite:
        raise ValueError(
            f"`{folder}` should be a new folder, or `overwrite` be given. Found {len(present)} Parquet files of a log, "
            f"the first {present[0]}."
        )
    for path in present:
        path.unlink()

    files, clicks, conversions, seconds = [], 0, 0, 0.0
    for name, start, stop in parts:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        writer: pq.ParquetWriter | None = None
        for first in range(start, stop, row_group_rows):
            table = log.rows(first, min(first + row_group_rows, stop))
            if writer is None:
                writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=_repeating(table))
            writer.write_table(table, row_group_size=row_group_rows)
            clicked = table["click"].to_numpy() == 1
            clicks += int(clicked.sum())
            conversions += int(table["conversion"].to_numpy().sum())
            seconds += float(table["dwell_seconds"].to_numpy()[clicked].sum(dtype=np.float64))
        if writer is not None:
            writer.close()
        files.append(path)
    return LogSummary(
        folder=folder,
        files=tuple(files),
        rows=rows,
        validation_rows=validation_rows,
        num_bytes=sum(path.stat().st_size for path in files),
        click_rate=clicks / (rows + validation_rows),
        conversion_rate=conversions / max(clicks, 1),
        mean_dwell_seconds=seconds / max(clicks, 1),
    )


def _repeating(table: pa.Table) -> list[str]:
    """Columns worth a dictionary in Parquet: all but the numbers that hardly repeat."""
    names = []
    for field in table.schema:
        if field.name == "row_id" or pa.types.is_floating(field.type):
            continue
        # Parquet names the values of a list column by their path in the file.
        names.append(f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name)
    return names
