"""Rows kept for a metric that needs an order: in memory up to a limit, beyond it in sorted runs on disk.

Legend: N rows given.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MEMORY_LIMIT_BYTES = 256 * 2**20
CHUNK_ROWS = 16_384  # fixed, so that sums are added in the same order whether the rows were spilled or not
PIECE_ROWS = 1_000_000  # of one message between ranks, by default
EVERYTHING = (float("-inf"), float("inf"))
FAN_IN = 64  # runs merged at once; also bounds the open files of an order to FAN_IN for each level of merging


class Order(NamedTuple):
    """A sort order: its key columns, most important first; rows whose column `skip[0]` equals `skip[1]` are left
    out."""

    keys: tuple[str, ...]
    skip: tuple[str, int] | None = None


class SortedRows:
    """Rows of fixed columns that can be read back in one or more sort orders, with bounded memory.

    At most a quarter of `memory_limit_bytes` is buffered (sorting needs the rest); a full buffer is sorted and written
    to one file for each order, an external merge sort. The files are unnamed temporary files in `spill_folder`
    (default: the system's), which vanish with the object or the process, however it ends. Rows with equal keys come in
    any order.

    >>> rows = SortedRows([("x", "f8"), ("y", "i8")], {"by_x": Order(("x",))}, memory_limit_bytes=64)
    >>> rows.append({"x": np.array([3.0, 1.0, 2.0]), "y": np.array([30, 10, 20])})
    >>> [chunk["y"].tolist() for chunk in rows.chunks("by_x")], rows.num_runs > 0
    ([[10, 20, 30]], True)
    """

    def __init__(
        self,
        columns: Sequence[tuple[str, str]],
        orders: Mapping[str, Order],
        *,
        memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
        spill_folder: str | os.PathLike[str] | None = None,
    ) -> None:
        if memory_limit_bytes <= 0:
            raise ValueError(f"`memory_limit_bytes` should be a positive integer. Found {memory_limit_bytes}.")
        self.dtype = np.dtype(list(columns))
        self.memory_limit_bytes = memory_limit_bytes
        self.num_rows = 0
        self._orders = dict(orders)
        self._spill_folder = spill_folder
        self._buffer_rows = max(1, memory_limit_bytes // (4 * self.dtype.itemsize))
        self._buffer: list[Array] = []
        self._buffered = 0
        self._runs: dict[str, list[list[Run]]] = {name: [] for name in orders}  # [level][run]

    @property
    def num_runs(self) -> int:
        """Sorted files on disk now."""
        return sum(len(level) for levels in self._runs.values() for level in levels)

    def append(self, columns: Mapping[str, Array]) -> None:
        """Add N rows, given as one array (N,) for each column."""
        rows = np.empty(len(next(iter(columns.values()))), self.dtype)
        for name in self.dtype.names or ():
            rows[name] = columns[name]
        self.append_rows(rows)

    def append_rows(self, rows: Array) -> None:
        """Add rows that are a structured array of `dtype` already."""
        self.num_rows += len(rows)
        for start in range(0, len(rows), self._buffer_rows):
            part = rows[start : start + self._buffer_rows]
            if self._buffered + len(part) > self._buffer_rows:
                self._spill()
            self._buffer.append(part)
            self._buffered += len(part)

    def merge(self, other: Self) -> None:
        """Add the other's rows. Its files are shared, not copied, and `other` stays as it is."""
        if other.dtype != self.dtype or other._orders != self._orders:
            raise ValueError("`other` should hold the same columns in the same orders.")
        self.num_rows += other.num_rows - other._buffered
        for name, levels in other._runs.items():
            for number, level in enumerate(levels):
                for run in level:
                    self._add_run(name, number, run)
        for part in list(other._buffer):
            self.append_rows(part)

    def chunks(self, order: str, rows: int = CHUNK_ROWS) -> Iterator[Array]:
        """All rows in this order, as structured arrays of `rows` rows (the last may be shorter)."""
        return rechunk(self._sorted_parts(order), rows)

    def pieces(self, rows: int) -> Iterator[dict[str, Array]]:
        """All rows in no particular order as {column: (rows,)}; at least one piece, all but the last are full.

        The files of the first order are read, so that one should skip no row that was added.
        """
        first = next(iter(self._orders))
        runs = [run for level in self._runs[first] for run in level]
        parts = (part for run in [*runs, *self._buffer] for part in _slices(run, self._buffer_rows))
        pieces = rechunk(parts, rows) if self.num_rows else iter([np.empty(0, self.dtype)])
        for piece in pieces:
            yield {name: np.ascontiguousarray(piece[name]) for name in self.dtype.names or ()}

    def _sorted_parts(self, order: str) -> Iterator[Array]:
        runs: list[Run] = [run for level in self._runs[order] for run in level]
        if self._buffer:
            runs.append(self._sort(order, np.concatenate(self._buffer)))
        runs = [run for run in runs if len(run)]
        if len(runs) == 1:
            yield from _slices(runs[0], self._buffer_rows)
        elif runs:
            yield from merge_sorted(runs, self._orders[order].keys, max(1, self._buffer_rows // len(runs)))

    def _sort(self, order: str, rows: Array) -> Array:
        keys, skip = self._orders[order]
        if skip is not None:
            rows = rows[rows[skip[0]] != skip[1]]
        return rows[_argsort(rows, keys)]

    def _spill(self) -> None:
        buffered = np.concatenate(self._buffer)
        for name in self._orders:
            rows = self._sort(name, buffered)
            if len(rows):
                self._add_run(name, 0, self.write_temporary(iter([rows]), self.dtype, len(rows)))
        self._buffer, self._buffered = [], 0

    def _add_run(self, order: str, level: int, run: "Run") -> None:
        """Equal levels are merged FAN_IN at a time, so a row is rewritten once for each level: log(rows) times."""
        levels = self._runs[order]
        while len(levels) <= level:
            levels.append([])
        levels[level].append(run)
        if len(levels[level]) == FAN_IN:
            runs, levels[level] = levels[level], []
            parts = merge_sorted(runs, self._orders[order].keys, max(1, self._buffer_rows // FAN_IN))
            num_rows = sum(len(run) for run in runs)
            self._add_run(order, level + 1, self.write_temporary(parts, self.dtype, num_rows))

    def write_temporary(self, parts: Iterator[Array], dtype: Any, size: int) -> "StoredArray":
        """The parts, `size` items in all, as one array in the spill folder."""
        try:
            file = tempfile.TemporaryFile(dir=self._spill_folder)  # noqa: SIM115  # the array closes it
            stored = StoredArray(file, np.dtype(dtype), size)
            for part in parts:
                file.write(np.ascontiguousarray(part).view(np.uint8).data)
            file.flush()
            return stored
        except OSError as error:
            folder = tempfile.gettempdir() if self._spill_folder is None else os.fspath(self._spill_folder)
            error.add_note(
                f"The rows of a metric outgrew `memory_limit_bytes` ({self.memory_limit_bytes}) and "
                f"{size * np.dtype(dtype).itemsize} bytes could not be written to `spill_folder` ({folder})."
            )
            raise


class StoredArray:
    """A one-dimensional array in an unnamed temporary file, of which slices are read; the file goes with it.

    Not a mapped file: pages of one count as this process's memory once they were read, and whole files of them soon do.
    """

    def __init__(self, file: IO[bytes], dtype: np.dtype[Any], size: int) -> None:
        self._file, self.dtype, self._size = file, dtype, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(self._size)
        found = np.empty(max(0, stop - start), self.dtype)
        view, done = found.view(np.uint8).data, 0
        while done < len(view):
            done += os.preadv(self._file.fileno(), [view[done:]], start * self.dtype.itemsize + done)
        return found

    def __del__(self) -> None:
        self._file.close()


Run = Array | StoredArray


def _slices(run: Run, rows: int) -> Iterator[Array]:
    for start in range(0, len(run), rows):
        yield run[start : start + rows]


def rechunk(parts: Iterator[Array], rows: int) -> Iterator[Array]:
    """The same rows in arrays of `rows` rows; the last may be shorter, none is empty.

    >>> [part.tolist() for part in rechunk(iter([np.arange(2), np.arange(2, 5)]), 3)]
    [[0, 1, 2], [3, 4]]
    """
    pending: list[Array] = []
    count = 0
    for part in parts:
        start = 0
        while count + len(part) - start >= rows:
            stop = start + rows - count
            whole = [*pending, part[start:stop]]
            yield whole[0] if len(whole) == 1 else np.concatenate(whole)
            pending, count, start = [], 0, stop
        if start < len(part):
            pending.append(part[start:])
            count += len(part) - start
    if pending:
        yield np.concatenate(pending)


def merge_sorted(runs: Sequence[Run], keys: Sequence[str], block_rows: int) -> Iterator[Array]:
    """Merge structured arrays, each sorted by `keys`, holding at most `block_rows` rows of each in memory.

    In each step the smallest of the last keys of the blocks bounds what may leave: no later row can be smaller. So at least
    one block leaves whole, and is replaced by the next of its run.
    """
    blocks, read = [run[:0] for run in runs], [0] * len(runs)
    while True:
        for number, run in enumerate(runs):
            if not len(blocks[number]) and read[number] < len(run):
                blocks[number] = run[read[number] : read[number] + block_rows]
                read[number] += len(blocks[number])
        if not any(len(block) for block in blocks):
            return
        lasts = [
            tuple(block[-1][key] for key in keys)
            for block, cursor, run in zip(blocks, read, runs, strict=True)
            if cursor < len(run)
        ]
        bound = min(lasts) if lasts else None
        ends = [len(block) if bound is None else _upper_bound(block, keys, bound) for block in blocks]
        rows = np.concatenate([block[:end] for block, end in zip(blocks, ends, strict=True)])
        blocks = [block[end:] for block, end in zip(blocks, ends, strict=True)]
        yield rows[_argsort(rows, keys)]


def _argsort(rows: Array, keys: Sequence[str]) -> Ints:
    if len(keys) == 1:
        return np.argsort(np.ascontiguousarray(rows[keys[0]]))
    return np.lexsort(tuple(np.ascontiguousarray(rows[key]) for key in reversed(keys)))


def _upper_bound(block: Array, keys: Sequence[str], bound: tuple[Any, ...]) -> int:
    """The number of rows of a sorted block whose keys are <= bound, lexicographically."""
    low, high = 0, len(block)
    for key, value in zip(keys, bound, strict=True):
        column = np.ascontiguousarray(block[key][low:high])
        high = low + int(np.searchsorted(column, value, "right"))
        low += int(np.searchsorted(column, value, "left"))
    return high


def observed_rows(
    prediction_N: npt.ArrayLike,
    label_N: npt.ArrayLike,
    weight_N: npt.ArrayLike | None,
    *,
    prediction_range: tuple[float, float] = EVERYTHING,
    label_range: tuple[float, float] = EVERYTHING,
) -> tuple[npt.NDArray[np.bool_], Floats, Floats, Floats]:
    """Which rows count (a NaN label is unobserved), and the predictions, labels and weights of those, in float64.

    Raises ValueError where lengths differ, where a label or the prediction of a row that counts is not finite or
    outside its range, or a weight is negative or not finite. It names the row, by its number within the arrays given.
    """
    prediction, label = np.asarray(prediction_N, np.float64), np.asarray(label_N, np.float64)
    weight = np.ones(label.shape) if weight_N is None else np.asarray(weight_N, np.float64)
    if prediction.ndim != 1 or prediction.shape != label.shape or weight.shape != label.shape:
        raise ValueError(
            "`prediction`, `label` and `weight` should be one-dimensional and of one length. "
            f"Found shapes {prediction.shape}, {label.shape} and {weight.shape}."
        )
    keep = ~np.isnan(label)
    for name, values, (low, high) in (("prediction", prediction, prediction_range), ("label", label, label_range)):
        wish = "finite" if (low, high) == EVERYTHING else f"finite, from {low:g} to {high:g}"
        require(~keep | (np.isfinite(values) & (values >= low) & (values <= high)), name, wish, values)
    require(np.isfinite(weight) & (weight >= 0), "weight", "finite and not negative", weight)
    return (keep, prediction, label, weight) if keep.all() else (keep, prediction[keep], label[keep], weight[keep])


def require(good_N: npt.NDArray[np.bool_], name: str, wish: str, values_N: Array) -> None:
    """Raise ValueError that names the first row where `good_N` is false.

    >>> require(np.array([True, False]), "label", "0 or 1", np.array([0.0, 2.0]))
    Traceback (most recent call last):
    ...
    ValueError: `label` should be 0 or 1. Found 2.0 in row 1.
    """
    if not good_N.all():
        row = int(np.argmin(good_N))
        raise ValueError(f"`{name}` should be {wish}. Found {values_N[row]} in row {row}.")
