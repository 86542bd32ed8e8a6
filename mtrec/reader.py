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

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import pyarrow as pa

from mtrec.dataset import Dataset
from mtrec.row_order import BY_ROW, Window, plan_streams, plan_windows
from mtrec.windows import Decoder, Loaded, Origin, Prepare

T = TypeVar("T")
MOST_TOGETHER = 8  # pieces: between steps of training all that puts one together has left the cache, code and rows alike


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
    Reading goes on in background threads (pyarrow and numpy only), `prefetch` pieces ahead; they end with the iteration, also
    when it is left early. Small pieces are put together several at a time, where one thread reads: up to eight, of at most
    `shuffle_window` rows, and at least as many ahead. What goes wrong there is raised at the piece it belongs to, or where what
    was decoded with it begins. Memory: for each owned stream up to five windows of `shuffle_window` rows (as they are, or as
    `prepare` made them, or both), four being decoded for each thread, the pieces ahead and those put together with the last one.

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
        prefetch: pieces that are made ahead, at least.
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
        # within as many rows as a window has hardly more than one stream comes to where its next window is loaded
        together = min(MOST_TOGETHER, shuffle_window // (self.piece_rows * len(self.owned)))
        self._together = max(1, together) if num_threads == 1 else 1
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
        groups: deque[_Group[T]] = deque()
        asked = self.start_batch
        ahead = max(self.prefetch, self._together)  # else hardly one is left when the next ones are begun
        try:
            for index in range(self.start_batch, self.num_batches):
                while asked < self.num_batches and asked - index <= ahead:
                    pieces = self._taken(streams, min(self._together, self.num_batches - asked))
                    made: deque[T] = deque()
                    done = pool.submit(_assemble, self.epoch, asked, pieces, schema, transform, made)
                    groups.append(_Group(made, done))
                    asked += len(pieces)
                    del pieces, done  # these hold windows, and perhaps an error, whose traceback leads here
                    for stream in streams:
                        stream.load_ahead()
                while not groups[0].made:
                    groups[0].done.exception()  # waits for all: for each piece the thread would give up the interpreter
                    if not groups[0].made:
                        groups.popleft().done.result()  # raises what went wrong with the next piece
                yield groups[0].made.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for stream in streams:
                stream.decoder.close()

    def _taken(self, streams: "Sequence[_Stream]", most: int) -> "list[list[list[_Slice]]]":
        """The slices of the next piece, and of those after it that need no further windows: each then waits for its own alone."""
        pieces = [[stream.take(self.piece_rows) for stream in streams]]
        while len(pieces) < most and all(stream.rows_asked_for() >= self.piece_rows for stream in streams):
            pieces.append([stream.take(self.piece_rows) for stream in streams])
        return pieces

    def _stream(
        self, stream: int, begin: float, pool: ThreadPoolExecutor, prepare: Prepare | None, keep_rows: bool
    ) -> "_Stream":
        windows = plan_windows(self._spans[stream], self._row_group_rows, self.shuffle_window)
        key = (BY_ROW, self.seed, self.epoch, stream) if self.shuffle else None
        decoder = Decoder(self.dataset, self.columns, windows, self.shuffle_window, key, prepare, keep_rows)
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


def _with_rows(piece: Piece) -> Piece:
    _ = piece.record_batch  # put together here, in the background
    return piece


class _Group(NamedTuple, Generic[T]):
    """Pieces that are put together one after the other: those that are there, and what is done when all are, or one cannot be."""

    made: deque[T]
    done: "Future[None]"


def _assemble(
    epoch: int,
    first: int,
    pieces: Sequence[Sequence[Sequence[_Slice]]],
    schema: pa.Schema,
    transform: Callable[[Piece], T],
    made: deque[T],
) -> None:
    """Waits for the windows that pieces (from number `first` on) are cut from, and adds each, put together, to `made`."""
    for index, streams in enumerate(pieces, first):
        made.append(transform(_cut(epoch, index, streams, schema)))


def _cut(epoch: int, index: int, streams: Sequence[Sequence[_Slice]], schema: pa.Schema) -> Piece:
    """A piece, of the slices of each stream."""
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
    return Piece(epoch, index, tuple(cuts), tuple(stream_rows), parts_of(cuts), schema)


class _Stream:
    """Cuts a stream into pieces, and has its windows loaded ahead.

    All by the consumer's thread and without waiting: a piece is a list of slices of windows that will be there when a
    background thread comes to assemble it. Tasks are queued in an order in which each waits for earlier ones only, so
    one thread suffices and none waits for ever. `begin`: once more than this share of a window is given, the next is loaded.
    """

    def __init__(
        self, windows: Sequence[Window], skip_rows: int, begin: float, decoder: Decoder, pool: ThreadPoolExecutor
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
            if stop == length:
                self.loads.popleft()
                self.number, self.row = self.number + 1, 0
        return slices

    def rows_asked_for(self) -> float:
        """How many of the next rows lie in windows that are being loaded; all, where there are no more windows."""
        end = self.number + len(self.loads)
        return sum(self.lengths[self.number : end]) - self.row if end < len(self.lengths) else math.inf

    def load_ahead(self) -> None:
        """Has the next window loaded where it is time to; for when what was taken has been asked for, which then comes first."""
        coming = self.number + len(self.loads)
        due = not self.loads or (len(self.loads) == 1 and self.row > self.begin * self.lengths[self.number])
        if due and coming < len(self.lengths):
            self._load(coming)

    def _load(self, number: int) -> None:
        before = self.before

        def load() -> Loaded:
            if before is not None:
                before.wait()  # the decoder goes through the windows in order, one at a time
            return self.decoder.load(number)

        self.before = _Pending(self.pool.submit(load))
        self.loads.append(self.before)
