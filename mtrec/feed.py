"""The feed: a reader's pieces encoded into batches, in the reader's background thread; bad rows are named by file and row."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mtrec.batch import Batch, Label, label_values, make_batch
from mtrec.config import Data
from mtrec.dataset import Dataset
from mtrec.features import BadRowsError, Encoder, Feature, FeatureCounts
from mtrec.reader import Piece, Reader

LOOK_ROWS = 65_536


class Fed(NamedTuple):
    """A piece of the data and the batch made of it."""

    piece: Piece
    batch: Batch


@dataclasses.dataclass
class BadRows:
    """Rows that were left out, counted by reason; the column is part of it.

    Args:
        rows: of this rank in an epoch; more than `max_fraction` of them is an error.
    """

    max_fraction: float
    rows: float
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)

    def skip(self, error: BadRowsError, place: str) -> None:
        """Counts the rows of an error. Raises ValueError where they become too many; `place` is where the newest one is."""
        self.skipped[error.reason] += len(error.rows)
        total = self.skipped.total()
        if total > self.max_fraction * self.rows:
            listed = "; ".join(f"{reason}: {count:,} rows" for reason, count in self.skipped.most_common())
            raise ValueError(
                f"`data.max_bad_fraction` ({self.max_fraction:g}) is exceeded: {total:,} bad rows ({listed}). "
                f"The newest one: {place}: {error.what}"
            ) from error


def bad_rows(data: Data, num_rows: int, world_size: int = 1) -> BadRows | None:
    """What `data.on_bad_rows` asks for on one of `world_size` ranks that share `num_rows` rows; None: bad rows are errors."""
    return BadRows(data.max_bad_fraction, num_rows / world_size) if data.on_bad_rows == "skip" else None


def without_bad_rows(
    batches: Iterable[pa.RecordBatch], labels: Mapping[str, Label], features: Sequence[Feature], bad: BadRows | None
) -> Iterator[pa.RecordBatch]:
    """The batches, for the fit: where `bad` is given, without rows that have a label or vector which cannot be used."""
    looks: list[Callable[[pa.RecordBatch], object]] = [functools.partial(label_values, label=label) for label in labels.values()]
    looks += [functools.partial(_fit_alone, feature=each) for each in features if getattr(each, "width", None) is not None]
    for batch in batches:
        for look in looks if bad is not None else ():
            try:
                look(batch)
            except BadRowsError as error:
                assert bad is not None
                bad.skip(error, "while vocabularies and statistics were fitted")
                batch = batch.filter(pa.array(_kept(batch.num_rows, error)))
        yield batch


def _fit_alone(batch: pa.RecordBatch, feature: Any) -> None:
    """Fits a feature of fixed-size vectors to a batch; BadRowsError where one has another size."""
    if feature.column in batch.schema.names:
        array = batch.column(feature.column)
        feature.start(array.type).update(array)


def bad_row(data: Dataset, columns: Sequence[str], look: Callable[[pa.RecordBatch], object]) -> str | None:
    """Where the first row is that `look` refuses (BadRowsError), and why; reads until it is found. None where there is none."""
    for group in data.row_groups:
        start = 0
        for batch, mask in data.chunks(group, columns, LOOK_ROWS):
            places = np.arange(batch.num_rows) if mask is None else np.flatnonzero(mask)
            try:
                look(batch if mask is None else batch.filter(mask))
            except BadRowsError as error:
                row = start + int(places[error.rows[0]])
                return f"'{data.files[group.file_index].path}', row group {group.index}, row {row}: {error.what}"
            start += batch.num_rows
    return None


def check_encodes(encoder: Encoder, data: Dataset) -> None:
    """Raises ValueError naming `data.place` where columns have types that the features were not fitted for."""
    schema = pa.schema([data.schema.field(name) for name in encoder.columns if name in data.schema.names])
    try:
        encoder.encode(pa.RecordBatch.from_pylist([], schema))
    except ValueError as error:
        raise ValueError(f"`{data.place}`: {error}") from error


def usable_rows(table: pa.Table, encoder: Encoder) -> pa.Table:
    """The rows of a table whose features can be encoded (the others are counted where they are trained on)."""
    found = []
    for batch in table.to_batches():
        while True:
            try:
                encoder.encode(batch)
            except BadRowsError as error:
                batch = batch.filter(pa.array(_kept(batch.num_rows, error)))
            else:
                break
        found.append(batch)
    return pa.Table.from_batches(found, table.schema)


def _kept(num_rows: int, error: BadRowsError) -> NDArray[np.bool_]:
    kept = np.ones(num_rows, np.bool_)
    kept[error.rows] = False
    return kept


def _without(piece: Piece, kept: NDArray[np.bool_]) -> Piece:
    """The piece without some rows: their places in the streams stay empty, as those of rows that `where` drops."""
    stream_rows, parts, start = [], [], 0
    for rows in piece.stream_rows:
        stream_rows.append(int(kept[start : start + rows].sum()))
        start += rows
    start = 0
    for part in piece.parts:
        parts.append(part._replace(rows=part.rows[kept[start : start + len(part.rows)]]))
        start += len(part.rows)
    batch = piece.record_batch.filter(pa.array(kept))
    return dataclasses.replace(piece, record_batch=batch, stream_rows=tuple(stream_rows), parts=tuple(parts))


def feed(
    reader: Reader,
    encoder: Encoder,
    labels: Mapping[str, Label],
    sample_weight: str | None = None,
    *,
    counts: FeatureCounts | None = None,
    pin: bool = False,
    bad: BadRows | None = None,
) -> Generator[Fed]:
    """The batches of a reader, in its order.

    Args:
        labels: {task: Label}; empty where labels may be absent.
        counts: nulls and unseen values are added to it (with one reading thread).
        bad: rows that cannot be used are left out and counted there (with one reading thread); None: they are errors.
        pin: put batches into page-locked memory, for copies to a GPU that overlap with computation.

    Raises ValueError naming file, row group, row and column for a row that cannot be used.
    """

    def place(piece: Piece, error: BadRowsError) -> str:
        path, row_group, row = reader.locate(piece, int(error.rows[0]))
        return f"'{path}', row group {row_group}, row {row}"

    def encode(piece: Piece) -> Fed:
        while True:
            try:
                batch = make_batch(piece.record_batch, encoder, labels, sample_weight, piece.stream_rows, counts)
            except BadRowsError as error:
                if bad is None:
                    more = f" {len(error.rows)} such rows in this batch." if len(error.rows) > 1 else ""
                    raise ValueError(f"{place(piece, error)}: {error.what}{more}") from error
                bad.skip(error, place(piece, error))
                piece = _without(piece, _kept(piece.record_batch.num_rows, error))
            else:
                return Fed(piece, batch.pin_memory() if pin else batch)

    return reader.map(encode)
