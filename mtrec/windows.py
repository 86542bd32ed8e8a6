"""Windows of rows: decoded from row groups, permuted, and prepared several at a time; what the streams of `mtrec.reader` hold."""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mtrec.dataset import Dataset
from mtrec.row_order import Span, Window, permutation, window_rows

Prepare = Callable[[pa.RecordBatch, Sequence[np.ndarray | slice]], Sequence[Any]]
"""Of rows, and of which of them each window has and in which order: what is made of each window, None where it is declined."""

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


class Decoder:
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
        """Lets go the row group that is open."""
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
