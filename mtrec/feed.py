"""The feed: a reader's pieces encoded into batches, in the reader's background threads; bad rows are named by file and row."""

import dataclasses
import functools
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mtrec.batch import Batch, Examples, Label, join_examples, label_values, make_examples, sample_weights
from mtrec.dataset import Dataset
from mtrec.experiment import Data
from mtrec.features import BadRowsError, Encoder, Feature
from mtrec.features.encoded import Order
from mtrec.kinds import counted
from mtrec.reader import Piece, Reader, parts_of
from mtrec.windows import Loaded, rows_in

LOOK_ROWS = 65_536


class Fed(NamedTuple):
    """A piece of the data and the batch made of it."""

    piece: Piece
    batch: Batch


@dataclasses.dataclass
class BadRows:
    """Rows that were left out on this rank, counted by reason; the column is part of it.

    More than `max_fraction` of the rows that are read is an error: at once where this rank alone meets so many of all `rows`
    (of all ranks in an epoch, before `where`), else when all have read theirs (`check`, of the sums). So it depends neither on
    the number of ranks nor on what `where` drops. `kept`: rows that were not left out.
    """

    max_fraction: float
    rows: int
    kept: int = 0
    skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock, repr=False, compare=False)

    def skip(self, error: BadRowsError, place: str) -> None:
        """Counts the rows of an error. Raises ValueError where they become too many; `place` is where the newest one is."""
        with self._lock:  # of several reading threads
            self.skipped[error.reason] += len(error.rows)
            self.check(self.skipped, self.rows, f"The newest one: {place}: {error.what}", error)

    def keep(self, rows: int) -> None:
        """Counts rows that were not left out."""
        with self._lock:
            self.kept += rows

    def check(self, skipped: Counter[str], rows: int, more: str, cause: Exception | None = None) -> None:
        """Raises ValueError where so many of `rows` are too many; `more`: a sentence on them."""
        if skipped.total() > self.max_fraction * rows:
            listed = "; ".join(f"{reason}: {counted(count, 'row')}" for reason, count in skipped.most_common())
            raise ValueError(
                f"`data.max_bad_fraction` ({self.max_fraction:g}) is exceeded: {skipped.total():,} bad rows ({listed}). {more}"
            ) from cause


def bad_rows(data: Data, num_rows: int) -> BadRows | None:
    """What `data.on_bad_rows` asks for, of `num_rows` rows on all ranks; None: bad rows are errors."""
    return BadRows(data.max_bad_fraction, num_rows) if data.on_bad_rows == "skip" else None


def label_looks(labels: Mapping[str, Label], sample_weight: str | None) -> dict[str, Callable[[pa.RecordBatch], object]]:
    """{key of the experiment: what raises BadRowsError where a label, or weight, of a batch cannot be used}."""
    looks: dict[str, Callable[[pa.RecordBatch], object]] = {
        f"tasks.{name}.label": functools.partial(label_values, label=label) for name, label in labels.items()
    }
    if sample_weight is not None:
        looks["data.sample_weight"] = functools.partial(sample_weights, column=sample_weight)
    return looks


def without_bad_rows(
    batches: Iterable[pa.RecordBatch],
    labels: Mapping[str, Label],
    sample_weight: str | None,
    features: Sequence[Feature],
    bad: BadRows | None,
) -> Iterator[pa.RecordBatch]:
    """The batches, for the fit: where `bad` is given, without rows that have a label, weight or vector which cannot be used."""
    looks = list(label_looks(labels, sample_weight).values())
    looks += [functools.partial(_fit_alone, feature=each) for each in features if getattr(each, "width", None) is not None]
    for batch in batches:
        for look in looks if bad is not None else ():
            try:
                look(batch)
            except BadRowsError as error:
                assert bad is not None
                bad.skip(error, "while vocabularies and statistics were fitted")
                batch = batch.filter(pa.array(_kept(batch.num_rows, error)))
        if bad is not None:
            bad.keep(batch.num_rows)
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


def refused_rows(
    data: Dataset, columns: Sequence[str], look: Callable[[pa.RecordBatch], object]
) -> tuple[NDArray[np.int64], int]:
    """(the numbers of all rows that `look` refuses (BadRowsError), counted before `where`, ascending; how many it does not)."""
    found, start, good = [np.zeros(0, np.int64)], 0, 0
    for group in data.row_groups:
        for batch, mask in data.chunks(group, columns, LOOK_ROWS):
            places = start + (np.arange(batch.num_rows) if mask is None else np.flatnonzero(mask))
            start += batch.num_rows
            rows = batch if mask is None else batch.filter(mask)
            while True:
                try:
                    look(rows)
                except BadRowsError as error:
                    found.append(places[error.rows])
                    kept = _kept(rows.num_rows, error)
                    rows, places = rows.filter(pa.array(kept)), places[kept]
                else:
                    break
            good += rows.num_rows
    return np.sort(np.concatenate(found)), good


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


def _without(piece: Piece, rows: NDArray[np.int64]) -> Piece:
    """The piece without some rows: their places in the streams stay empty, as those of rows that `where` drops."""
    kept = np.ones(sum(piece.stream_rows), np.bool_)
    kept[rows] = False
    stream_rows, cuts, first = [], [], 0
    for count in piece.stream_rows:
        stream_rows.append(int(kept[first : first + count].sum()))
        first += count
    first = 0
    for loaded, start, stop in piece.cuts or ():
        kept_here = kept[first : first + stop - start]
        first += stop - start
        if loaded.rows is not None and not kept_here.all():
            origin = loaded.origin._replace(numbers=loaded.origin.numbers[start:stop][kept_here])
            rows_here = loaded.rows.slice(start, stop - start).filter(pa.array(kept_here))
            loaded, start, stop = Loaded(origin, None, rows_here, None), 0, rows_here.num_rows
        cuts.append((loaded, start, stop))
    return dataclasses.replace(piece, cuts=tuple(cuts), stream_rows=tuple(stream_rows), parts=parts_of(cuts))


def feed(
    reader: Reader,
    encoder: Encoder,
    labels: Mapping[str, Label],
    sample_weight: str | None = None,
    *,
    keep_rows: bool = False,
    pin: bool = False,
    bad: BadRows | None = None,
) -> Generator[Fed]:
    """The batches of a reader, in its order. Windows are encoded whole; those with bad rows, cut by cut as they are needed.

    Args:
        labels: {task: Label}; empty where labels may be absent.
        keep_rows: `record_batch` of the pieces will be read.
        bad: rows that cannot be used are left out and counted there; None: they are errors.
        pin: put batches into page-locked memory, for copies to a GPU that overlap with computation.

    Raises ValueError naming file, row group, row and column for a row that cannot be used.
    """

    def prepare(rows: pa.RecordBatch, orders: Sequence[Order]) -> Sequence[Examples | None]:
        """The windows encoded together, or one by one where a row is refused: None for those that hold such a row."""
        try:
            return make_examples(rows, encoder, labels, sample_weight, orders)
        except BadRowsError:
            if len(orders) == 1:
                return [None]  # raised again, or skipped, with the cut that the row belongs to
        windows = [rows_in(rows, order) for order in orders]  # most have no such row
        return [each for window in windows for each in prepare(window, [slice(0, window.num_rows)])]

    def batch_of(piece: Piece) -> Fed:
        """The batch of a piece, from what was prepared of its cuts; the others are encoded here."""
        assert piece.cuts is not None
        examples = [(loaded.prepared, start, stop) for loaded, start, stop in piece.cuts]
        before = 0
        for number, (prepared, start, stop) in enumerate(examples):
            if prepared is None:
                piece, prepared = _encoded(piece, number, before)
                examples[number] = prepared, 0, prepared.num_rows
                before += prepared.num_rows
            else:
                before += stop - start
        if not examples:
            (nothing,) = make_examples(piece.record_batch, encoder, labels, sample_weight, [slice(0, 0)])
            examples = [(nothing, 0, 0)]
        batch = join_examples(examples, encoder, piece.stream_rows)
        if bad is not None:
            bad.keep(batch.num_rows)
        if not keep_rows:
            piece = piece.without_cuts()
        return Fed(piece, batch.pin_memory() if pin else batch)

    def _encoded(piece: Piece, number: int, before: int) -> tuple[Piece, Examples]:
        """Cut `number`, which begins `before` rows into the piece, and the piece without its bad rows."""
        while True:
            assert piece.cuts is not None
            loaded, start, stop = piece.cuts[number]
            assert loaded.rows is not None
            rows = loaded.rows.slice(start, stop - start)
            try:
                return piece, make_examples(rows, encoder, labels, sample_weight, [slice(0, rows.num_rows)])[0]
            except BadRowsError as error:
                path, row_group, row = reader.locate(piece, before + int(error.rows[0]))
                place = f"'{path}', row group {row_group}, row {row}"
                if bad is None:
                    more = f" {len(error.rows)} such rows in this batch." if len(error.rows) > 1 else ""
                    raise ValueError(f"{place}: {error.what}{more}") from error
                bad.skip(error, place)
                piece = _without(piece, before + error.rows)

    return reader.map(batch_of, prepare, keep_rows=keep_rows)
