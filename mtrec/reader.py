"""The reader: a dataset as a fixed sequence of global batches, of which every rank reads its part.

The rows of an epoch are cut into V logical streams, as long as each other to within one row; global batch i is the i-th
piece of every stream. Rank r of W reads the streams v with v * W // V == r. So the batches, and the rows of each stream
within them, are the same for every number of ranks; every row comes once an epoch; and the position is one integer.

    row groups, in an order drawn from (seed, epoch), are dealt to the streams; those left over are cut
    each stream is a line of windows of at most `shuffle_window` rows
    rows are permuted inside their window, the permutation drawn from (seed, epoch, stream, window)
    the line is cut into pieces of `batch_size / V` rows

Large row groups are cut into equal windows, small ones are put together. Four windows of a large row group (fewer, or parts of
one, where rows are large) are decoded and prepared at once, and let go one by one: a rank holds up to four for each of its
streams (and one more for each that is being read ahead), and four decoded ones, never a large row group. A stream that begins
inside a row group decodes the rows before its own and drops them: many row groups of at most some 100,000 rows read faster than
a few large ones. Rows that `where` drops leave their place empty: positions count rows before `where`, so that they are known
without reading.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec.dataset import Dataset
from mtrec.row_order import BY_ROW, Span, Window, permutation, plan_streams, plan_windows, window_rows

T = TypeVar("T")
Prepare = Callable[[pa.RecordBatch, Sequence[np.ndarray | slice]], Sequence[Any]]

WINDOWS_DECODED = 4  # of a large row group at once, and prepared: what a call and a column cost is shared by their rows


class Origin(NamedTuple):
    """Where the rows of a window come from: its spans, and for each row that `where` left, in the order in which they are read,
    its number among the window's rows.
    """

    window: Window
    numbers: np.ndarray


class Loaded(NamedTuple):
    """A window in its final order, without the rows that `where` drops: what `prepare` made of it, its rows, or both.

    `prepared` is None where `prepare` was not given or declined; `rows` is None where it did not, and rows are not kept.
    `kept_before`: rows kept of the first n, for n = 0 ... window rows; None if all are.
    """

    origin: Origin
    prepared: Any
    rows: pa.RecordBatch | None
    kept_before: np.ndarray | None


# tuples: a batch is cut from many windows, and names would cost a call for each
Cut = tuple[Loaded, int, int]
"""Rows [start, stop) of a window."""
Part = tuple[Origin, int, int]
"""Where these rows of a window come from: its `numbers` [start, stop)."""


def parts_of(cuts: Sequence[Cut]) -> tuple[Part, ...]:
    """Where the rows of each cut come from."""
    return tuple([(loaded.origin, start, stop) for loaded, start, stop in cuts])


@dataclass(frozen=True)
class Piece:
    """This rank's part of a global batch: the rows of its streams, one stream after the other.

    Attributes:
        epoch: the epoch, from 0.
        index: the number of the global batch in the epoch, from 0.
        cuts: the rows that `where` left, window by window, may have none; None where they were let go (they hold whole windows).
        stream_rows: rows of each stream that this rank owns, in order; adds up to the rows of `cuts`.
        parts: where the rows of each cut come from; see `Reader.locate`.
    """

    epoch: int
    index: int
    cuts: tuple[Cut, ...] | None = field(repr=False)
    stream_rows: tuple[int, ...]
    parts: tuple[Part, ...] = field(repr=False)
    schema: pa.Schema = field(repr=False)

    @cached_property
    def record_batch(self) -> pa.RecordBatch:
        """The rows as they are in the files. Raises ValueError where the reader was not told to keep them."""
        batches = [loaded.rows.slice(start, stop - start) for loaded, start, stop in self.cuts or () if loaded.rows is not None]
        if self.cuts is None or len(batches) < len(self.cuts):
            raise ValueError("`keep_rows` should be set where the rows of a piece are read beside what is prepared of them.")
        if not batches:  # the owned streams are one row shorter than others, and at their end
            return pa.RecordBatch.from_pylist([], self.schema)
        return batches[0] if len(batches) == 1 else pa.concat_batches(batches)

    def without_cuts(self) -> "Piece":
        """The piece with its cuts let go."""
        return Piece(self.epoch, self.index, None, self.stream_rows, self.parts, self.schema)


class Row(NamedTuple):
    """A row in the files: `row` counts from 0 within row group `row_group` of the file `path`."""

    path: str
    row_group: int
    row: int


class Reader:
    """Iterates over this rank's pieces of an epoch's global batches, from `start_batch` on; see the module's text.

    Every rank gets the same number of pieces, `num_batches - start_batch`; the pieces may differ in rows, down to none.
    Reading goes on in background threads (pyarrow and numpy only) up to `prefetch` pieces ahead; they end with the
    iteration, also when it is left early. What goes wrong there is raised at the piece it belongs to, or where what was
    decoded with it begins. Memory: for each owned stream up to five windows of `shuffle_window` rows (as they are, or as
    `prepare` made them, or both), four being decoded for each thread, and `prefetch` pieces.

    Args:
        dataset: what to read.
        columns: columns of `dataset.schema`.
        batch_size: rows of a global batch before `where`; a multiple of `num_streams`.
        num_streams: V; part of the experiment: another V gives other batches.
        rank, world_size: this process and the number of them; at most V.
        seed: draws the order of row groups and rows, anew for each epoch.
        shuffle: False keeps the order of the files within each stream; V = 1 then keeps it altogether.
        shuffle_window: rows among which a row's place is drawn.
        epoch, start_batch: the position to begin at; with `dataset.fingerprint`, all that a checkpoint must hold.
        prefetch: pieces kept ready.
        num_threads: background threads; 2 let decoding overlap with what `map` does.

    Raises ValueError where `batch_size`, `num_streams`, `world_size` or `start_batch` do not go together.

    >>> import tempfile, pyarrow.parquet
    >>> from mtrec.dataset import Source, open_dataset
    >>> path = tempfile.mkdtemp() + "/a.parquet"
    >>> pyarrow.parquet.write_table(pa.table({"user": range(10)}), path)
    >>> dataset = open_dataset(Source(path), ["user"], place="data.train")
    >>> reader = Reader(dataset, ["user"], batch_size=4, num_streams=2, shuffle=False)
    >>> [piece.record_batch["user"].to_pylist() for piece in reader]
    [[0, 1, 5, 6], [2, 3, 7, 8], [4, 9]]
    """

    def __init__(
        self,
        dataset: Dataset,
        columns: Sequence[str],
        *,
        batch_size: int,
        num_streams: int = 8,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_window: int = 16_384,
        epoch: int = 0,
        start_batch: int = 0,
        prefetch: int = 4,
        num_threads: int = 1,
    ) -> None:
        for name, count in (("num_streams", num_streams), ("shuffle_window", shuffle_window), ("prefetch", prefetch)):
            if count < 1:
                raise ValueError(f"`{name}` should be a positive integer. Found {count}.")
        if batch_size < 1 or batch_size % num_streams:
            below = max(1, batch_size // num_streams) * num_streams
            wish = f"a multiple of `num_streams` ({num_streams}), such as {below}"
            raise ValueError(f"`batch_size` should be {wish}. Found {batch_size}.")
        if not 0 <= rank < world_size <= num_streams:
            raise ValueError(
                f"`world_size` should be at most `num_streams` ({num_streams}), and `rank` below it. "
                f"Found world_size {world_size}, rank {rank}: use fewer workers or more streams."
            )
        self.dataset, self.columns = dataset, tuple(columns)
        self.rank, self.world_size, self.seed, self.shuffle = rank, world_size, seed, shuffle
        self.shuffle_window, self.epoch, self.start_batch = shuffle_window, epoch, start_batch
        self.prefetch, self.num_threads = prefetch, num_threads
        self.piece_rows = batch_size // num_streams
        self._row_group_rows = [group.num_rows for group in dataset.row_groups]
        self._spans = plan_streams(self._row_group_rows, num_streams, seed=seed, epoch=epoch, shuffle=shuffle)
        self._stream_rows = [sum(span.stop - span.start for span in spans) for spans in self._spans]
        self.owned = tuple(stream for stream in range(num_streams) if stream * world_size // num_streams == rank)
        if not 0 <= start_batch <= self.num_batches:
            raise ValueError(f"`start_batch` should be between 0 and {self.num_batches}. Found {start_batch}.")

    @property
    def num_batches(self) -> int:
        """Global batches of the epoch; the last may be smaller."""
        return -(-max(self._stream_rows) // self.piece_rows)

    def __iter__(self) -> Iterator[Piece]:
        return self.map(_with_rows)

    def map(
        self, transform: Callable[[Piece], T], prepare: Prepare | None = None, *, keep_rows: bool = False
    ) -> Generator[T]:
        """The pieces, each transformed in a background thread, in order. Ends its threads when it is closed or dropped.

        Where one has to be waited for, and one thread reads, those up to the middle of `prefetch` are waited for with it.

        Args:
            transform: of pieces; may run in several threads at once where `num_threads` is above 1.
            prepare: called in a background thread with the rows of all windows that were decoded together, in the order of
                the files, and for each window which of them are to be read, in which order (numbers, or a range as it lies).
                What it makes of so many rows at once costs less than what `transform` makes of the small cuts that a piece
                consists of. It returns for each window anything with these rows in that order, or None: then the cuts hold
                the rows.
            keep_rows: the cuts hold the rows beside what `prepare` returned.
        """
        schema = pa.schema([self.dataset.schema.field(name) for name in self.columns])
        pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="mtrec-reader")
        # their windows end together: begun at different places, the next ones are not all loaded within the same batches
        begin = [(place + 0.5) / len(self.owned) for place in range(len(self.owned))]
        streams = [self._stream(*each, pool, prepare, keep_rows) for each in zip(self.owned, begin, strict=True)]
        ready: deque[Future[T]] = deque()
        try:
            for index in range(self.start_batch, self.num_batches):
                slices = [stream.take(self.piece_rows) for stream in streams]
                ready.append(pool.submit(_assemble, self.epoch, index, slices, schema, transform))
                if len(ready) > self.prefetch:
                    if self.num_threads == 1 and not ready[0].done():
                        # for several at once: each wait that ends takes the interpreter from the thread; more than one thread
                        # would lack windows, which are asked for here
                        ready[self.prefetch // 2].exception()
                    yield ready.popleft().result()
            while ready:
                yield ready.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for stream in streams:
                stream.decoder.close()

    def _stream(
        self, stream: int, begin: float, pool: ThreadPoolExecutor, prepare: Prepare | None, keep_rows: bool
    ) -> "_Stream":
        windows = plan_windows(self._spans[stream], self._row_group_rows, self.shuffle_window)
        key = (BY_ROW, self.seed, self.epoch, stream) if self.shuffle else None
        decoder = _Decoder(self.dataset, self.columns, windows, self.shuffle_window, key, prepare, keep_rows)
        return _Stream(windows, self.start_batch * self.piece_rows, begin, decoder, pool)

    def locate(self, piece: Piece, row: int) -> Row:
        """The place in the files of row `row` of `piece.record_batch`, for error messages."""
        for (window, numbers), start, stop in piece.parts:
            if row < stop - start:
                return self._row(window, int(numbers[start + row]))
            row -= stop - start
        raise IndexError(f"The piece has no such row: {row} rows too few.")

    def _row(self, window: Window, number: int) -> Row:
        for span in window:
            if number < span.stop - span.start:
                group = self.dataset.row_groups[span.row_group]
                return Row(self.dataset.files[group.file_index].path, group.index, span.start + number)
            number -= span.stop - span.start
        raise AssertionError("a part's rows are rows of its window")

    def sources(self, piece: Piece) -> list[tuple[str, int]]:
        """The (file, row group) pairs that the piece's windows come from, each once."""
        groups = [self.dataset.row_groups[span.row_group] for origin, _, _ in piece.parts for span in origin.window]
        return list(dict.fromkeys((self.dataset.files[group.file_index].path, group.index) for group in groups))


class _Pending:
    """A window that is, or will be, loaded by a background thread."""

    def __init__(self, future: "Future[Loaded]") -> None:
        self._future = future
        self._loaded: Loaded | None = None

    def wait(self) -> Loaded:
        """The window, once it is there. Asked for by every piece that is cut from it, of which a future would lock each time."""
        if self._loaded is None:
            self._loaded = self._future.result()
        return self._loaded


_Slice = tuple[_Pending, int, int]  # places [start, stop) of a window


class _Decoder:
    """Loads the windows of a stream, in order; keeps the row group open in which the last one ended."""

    def __init__(
        self,
        dataset: Dataset,
        columns: Sequence[str],
        windows: Sequence[Window],
        shuffle_window: int,
        key: tuple[int, ...] | None,
        prepare: Prepare | None,
        keep_rows: bool,
    ) -> None:
        self.dataset, self.columns, self.windows, self.shuffle_window, self.key = dataset, columns, windows, shuffle_window, key
        self.prepare, self.keep_rows = prepare, keep_rows
        self.made: deque[Loaded] = deque()  # windows decoded with one that was asked for
        self.row_group = -1
        self.chunks: Generator[tuple[pa.RecordBatch, pa.BooleanArray | None], None, None] | None = None
        self.chunk: tuple[pa.RecordBatch, pa.BooleanArray | None] | None = None
        self.at = 0  # row of the row group at which `chunk` begins

    def close(self) -> None:
        if self.chunks is not None:
            self.chunks.close()
        self.chunks = self.chunk = None

    def load(self, number: int) -> Loaded:
        """Window `number`; they are asked for in order. Those decoded with it are made at once, so that the rows can go."""
        if not self.made:
            number = self._make_from(number)
            while self._holds(number):
                number = self._make_from(number)
        return self.made.popleft()

    def _holds(self, number: int) -> bool:
        """Whether all rows of a window are among those decoded last."""
        if self.chunk is None or number == len(self.windows):
            return False
        first, *more = self.windows[number]
        if more or first.row_group != self.row_group:
            return False
        return self.at <= first.start and first.stop <= self.at + self.chunk[0].num_rows

    def _make_from(self, number: int) -> int:
        """Makes window `number`, and those after it that were decoded with it; returns the number of the next one."""
        window = self.windows[number]
        parts, stop = [part for span in window for part in self._decode(span)], number + 1
        if len(parts) == 1:
            while self._holds(stop):
                stop += 1
            if stop > number + 1:
                parts = list(self._decode(Span(window[0].row_group, window[0].start, self.windows[stop - 1][0].stop)))
        self.made += self._make(list(enumerate(self.windows[number:stop], number)), parts)
        return stop

    def _make(
        self, windows: Sequence[tuple[int, Window]], parts: Sequence[tuple[pa.RecordBatch, pa.BooleanArray | None]]
    ) -> list[Loaded]:
        """Numbered windows whose rows are `parts`: `where` applied, permuted, prepared together."""
        rows_of = [self._permuted(number, window) for number, window in windows]
        begins = np.cumsum([0, *map(len, rows_of)])  # among the rows of the parts
        batch = parts[0][0] if len(parts) == 1 else pa.concat_batches([part[0] for part in parts])
        kept_before: list[np.ndarray | None] = [None] * len(windows)
        places = None
        if any(mask is not None for _, mask in parts):
            kept = np.concatenate([_as_numpy(mask, part.num_rows) for part, mask in parts])
            batch, places = batch.filter(pa.array(kept)), np.concatenate([[0], np.cumsum(kept)])
            for index, rows in enumerate(rows_of):
                kept_rows = kept[begins[index] + rows]
                kept_before[index] = np.concatenate([[0], np.cumsum(kept_rows)])
                rows_of[index] = rows[kept_rows]
        orders: list[np.ndarray | slice] = []
        for rows, begin, end in zip(rows_of, begins, begins[1:], strict=False):
            if self.key is None:
                first, last = (begin, end) if places is None else (places[begin], places[end])
                orders.append(slice(int(first), int(last)))
            else:
                orders.append(begin + rows if places is None else places[begin + rows])
        prepared = [None] * len(windows) if self.prepare is None else self.prepare(batch, orders)
        return [
            Loaded(
                Origin(window, rows.astype(np.int32)),
                ready,
                rows_in(batch, order) if ready is None or self.keep_rows else None,
                before,
            )
            for (_, window), ready, order, rows, before in zip(windows, prepared, orders, rows_of, kept_before, strict=True)
        ]

    def _permuted(self, number: int, window: Window) -> np.ndarray:
        """Its rows before `where`, in the order in which they are to be read."""
        num_rows = sum(span.stop - span.start for span in window)
        return np.arange(num_rows) if self.key is None else permutation(num_rows, *self.key, number)

    def _decode(self, span: Span) -> Iterator[tuple[pa.RecordBatch, pa.BooleanArray | None]]:
        if self.chunks is None or span.row_group != self.row_group or span.start < self.at:
            self.close()
            group = self.dataset.row_groups[span.row_group]
            rows = self.dataset.rows_at_once(WINDOWS_DECODED * window_rows(group.num_rows, self.shuffle_window))
            self.chunks = self.dataset.chunks(group, self.columns, rows)
            self.row_group, self.at = span.row_group, 0
        while True:
            if self.chunk is None:
                self.chunk = next(self.chunks)
            batch, mask = self.chunk
            end = self.at + batch.num_rows
            first, last = max(span.start, self.at) - self.at, min(span.stop, end) - self.at
            if first < last:
                yield batch.slice(first, last - first), None if mask is None else mask.slice(first, last - first)
            if span.stop < end:
                return
            self.chunk, self.at = None, end
            if end == self.dataset.row_groups[span.row_group].num_rows:
                self.close()  # pyarrow would hold what it decoded last
            if span.stop == end:
                return


def windows_held(dataset: Dataset, num_streams: int, shuffle_window: int) -> int:
    """So many rows, before `where`, the windows of all streams hold at most: what was decoded at once, and one read ahead."""

    def decoded(row_group_rows: int) -> int:
        if row_group_rows <= shuffle_window:  # several make a window
            return shuffle_window
        window = window_rows(row_group_rows, shuffle_window)
        return min(row_group_rows, max(window, dataset.rows_at_once(WINDOWS_DECODED * window)))

    most = max(map(decoded, {group.num_rows for group in dataset.row_groups}), default=0)
    return min(dataset.num_rows, num_streams * (most + shuffle_window))


def rows_in(batch: pa.RecordBatch, order: np.ndarray | slice) -> pa.RecordBatch:
    """Rows of a record batch: those numbers in their order, or a range [start, stop) as it lies."""
    if isinstance(order, slice):
        return batch.slice(order.start, order.stop - order.start)
    return pc.take(batch, pa.array(order.astype(np.int32)), boundscheck=False)


def _as_numpy(mask: pa.BooleanArray | None, num_rows: int) -> np.ndarray:
    return np.ones(num_rows, dtype=bool) if mask is None else mask.to_numpy(zero_copy_only=False)


def _with_rows(piece: Piece) -> Piece:
    _ = piece.record_batch  # put together here, in the background
    return piece


def _assemble(
    epoch: int, index: int, streams: Sequence[Sequence[_Slice]], schema: pa.Schema, transform: Callable[[Piece], T]
) -> T:
    """Waits for the windows that a piece is cut from, and puts its rows together."""
    cuts: list[Cut] = []
    stream_rows = []
    for slices in streams:
        rows = 0
        for pending, start, stop in slices:
            loaded = pending.wait()
            if loaded.kept_before is not None:
                start, stop = loaded.kept_before.item(start), loaded.kept_before.item(stop)
            rows += stop - start
            cuts.append((loaded, start, stop))
        stream_rows.append(rows)
    return transform(Piece(epoch, index, tuple(cuts), tuple(stream_rows), parts_of(cuts), schema))


class _Stream:
    """Cuts a stream into pieces, and has its windows loaded ahead.

    All by the consumer's thread and without waiting: a piece is a list of slices of windows that will be there when a
    background thread comes to assemble it. Tasks are queued in an order in which each waits for earlier ones only, so
    one thread suffices and none waits for ever. `begin`: once more than this share of a window is given, the next is loaded.
    """

    def __init__(
        self, windows: Sequence[Window], skip_rows: int, begin: float, decoder: _Decoder, pool: ThreadPoolExecutor
    ) -> None:
        self.lengths = [sum(span.stop - span.start for span in window) for window in windows]
        self.begin, self.decoder, self.pool = begin, decoder, pool
        self.number, self.row = 0, skip_rows  # the next row to give, as window and place in it
        while self.number < len(self.lengths) and self.row >= self.lengths[self.number]:
            self.row -= self.lengths[self.number]
            self.number += 1
        self.loads: deque[_Pending] = deque()  # of window `number` and perhaps the one after it
        self.before: _Pending | None = None

    def take(self, rows: int) -> list[_Slice]:
        """The next `rows` rows, or what is left."""
        slices = []
        while rows and self.number < len(self.lengths):
            if not self.loads:
                self._load(self.number)
            length = self.lengths[self.number]
            stop = min(length, self.row + rows)
            slices.append((self.loads[0], self.row, stop))
            rows -= stop - self.row
            self.row = stop
            if stop > self.begin * length and len(self.loads) == 1 and self.number + 1 < len(self.lengths):
                self._load(self.number + 1)
            if stop == length:
                self.loads.popleft()
                self.number, self.row = self.number + 1, 0
        return slices

    def _load(self, number: int) -> None:
        before = self.before

        def load() -> Loaded:
            if before is not None:
                before.wait()  # the decoder goes through the windows in order, one at a time
            return self.decoder.load(number)

        self.before = _Pending(self.pool.submit(load))
        self.loads.append(self.before)
