"""The output of a scoring job: files that are whole or not there, with checksums, and their records."""

import hashlib
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from mtrec.locking import locked
from mtrec.scored_files.inputs import PIECES, UNIT_ROWS

RECORDS, LOCK = "_records", "score.lock"
PLAIN_BYTES = {"INT32": 4, "INT64": 8, "FLOAT": 4, "DOUBLE": 8}
WORTH_IT = 0.8  # of the plain size
LOOKED_AT = 4  # row groups


class Output:
    """The output folder on its filesystem (picklable)."""

    def __init__(self, address: str) -> None:
        self.address = address
        if "://" in address:
            self.filesystem, base = pa.fs.FileSystem.from_uri(address)
        else:
            self.filesystem, base = pa.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(address))
        self.base = base.rstrip("/")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Around a job that writes here: a second one is refused (LockedError). Object stores have no locks, and get none."""
        if self.filesystem.type_name != "local":
            yield
            return
        with locked(Path(self.path(RECORDS)) / LOCK, f"The output {self.address}"):
            yield

    def path(self, relative: str) -> str:
        """The path on the file system."""
        return f"{self.base}/{relative}"

    def exists(self, relative: str) -> bool:
        """Whether there is such a file."""
        return bool(self.filesystem.get_file_info(self.path(relative)).type == pa.fs.FileType.File)

    def size(self, relative: str) -> int | None:
        """Bytes, None where there is no such file."""
        info = self.filesystem.get_file_info(self.path(relative))
        return int(info.size) if info.type == pa.fs.FileType.File else None

    def read(self, relative: str) -> bytes:
        """Its content."""
        with self.filesystem.open_input_stream(self.path(relative)) as stream:
            return bytes(stream.read())

    def write(self, relative: str, content: bytes) -> None:
        """The file has its old content or the new one, never a part."""
        with self.beside(relative) as sink:
            sink.write(content)

    @contextmanager
    def beside(self, relative: str) -> Iterator["HashedSink"]:
        """A sink whose file appears at its place when the context ends well, and not at all when it does not."""
        folder, _, name = self.path(relative).rpartition("/")
        # without a lock (see `locked`) two jobs that write the same file should at least not write into one
        own = "" if self.filesystem.type_name == "local" else f".{uuid.uuid4().hex[:8]}"
        unfinished = f"{folder}/.{name}{own}.unfinished"
        self.filesystem.create_dir(folder, recursive=True)
        try:
            with self.filesystem.open_output_stream(unfinished) as stream:
                sink = HashedSink(stream)
                yield sink
            if self.filesystem.type_name == "local":
                with open(unfinished, "rb") as file:
                    os.fsync(file.fileno())
            if sink.before_rename is not None:
                sink.before_rename()
            self.filesystem.move(unfinished, self.path(relative))
        except BaseException:
            with suppress(OSError):  # what went wrong before is what is said
                self.delete_path(unfinished)
            raise

    def delete(self, relative: str) -> None:
        """Deletes a file where there is one."""
        self.delete_path(self.path(relative))

    def delete_path(self, path: str) -> None:
        """Deletes a file where there is one; `path` is one on the file system, as `path()` returns it."""
        if self.filesystem.get_file_info(path).type == pa.fs.FileType.File:
            self.filesystem.delete_file(path)

    def delete_folder(self, relative: str) -> None:
        """Deletes a folder with all that is in it, where there is one."""
        if self.filesystem.get_file_info(self.path(relative)).type == pa.fs.FileType.Directory:
            self.filesystem.delete_dir(self.path(relative))


class HashedSink:
    """A file to write to, which knows its SHA-256 and size. `before_rename` runs when it is whole, before it is at its place."""

    closed = False

    def __init__(self, stream: Any) -> None:
        self._stream, self._digest, self.size = stream, hashlib.sha256(), 0
        self.before_rename: Callable[[], None] | None = None

    def write(self, data: Any) -> int:
        """Hashes the bytes and hands them on; returns how many they are."""
        view = memoryview(data)
        self._digest.update(view)
        self._stream.write(view)
        self.size += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Flushes the stream below."""
        self._stream.flush()

    def close(self) -> None:
        """The stream is closed by its owner."""

    def writable(self) -> bool:
        """True: it is only written to."""
        return True

    def readable(self) -> bool:
        """False: the bytes are hashed and gone."""
        return False

    def seekable(self) -> bool:
        """False: bytes are hashed in the order in which they come."""
        return False

    @property
    def sha256(self) -> str:
        """Of the bytes written so far, 64 hexadecimal digits."""
        return self._digest.hexdigest()


class ParquetSink:
    """Writes record batches as row groups of at least `UNIT_ROWS` rows (but the last), in a thread of its own.

    `source`: the footer of the file that the rows come from.
    """

    def __init__(self, sink: HashedSink, schema: pa.Schema, source: pq.FileMetaData) -> None:
        self._schema = schema
        repeating = repeating_paths(schema, source)
        self._writer = pq.ParquetWriter(sink, schema, compression="zstd", compression_level=1, use_dictionary=repeating or False)
        self._pool = ThreadPoolExecutor(1, "mtrec-write")
        self._held: list[pa.RecordBatch] = []
        self._rows = 0
        self._pending: deque[Future[float]] = deque()
        self._seconds = 0.0
        self._open = True

    def write(self, rows: pa.RecordBatch) -> None:
        """Holds the rows; once `UNIT_ROWS` or more are held, the thread gets them as one row group.

        Then waits until at most one row group is unwritten; raises what went wrong in the thread.
        """
        self._held.append(rows)
        self._rows += rows.num_rows
        if self._rows >= UNIT_ROWS:
            self._flush()

    def _flush(self) -> None:
        table, self._held, self._rows = pa.Table.from_batches(self._held, self._schema), [], 0
        self._pending.append(self._pool.submit(self._write, table))
        if len(self._pending) > 1:  # one is being written, one waits: memory stays bounded
            self._seconds += self._pending.popleft().result()

    def _write(self, table: pa.Table) -> float:
        started = time.perf_counter()
        self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        return time.perf_counter() - started

    def finish(self) -> float:
        """Writes what is left and the footer; returns the seconds that writing took in all."""
        if self._rows:
            self._flush()
        while self._pending:
            self._seconds += self._pending.popleft().result()
        started = time.perf_counter()
        self.close()
        return self._seconds + time.perf_counter() - started

    def close(self) -> None:
        """Ends the thread and writes the footer, without the rows that `finish` would write; a second call does nothing."""
        if self._open:
            self._open = False
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._writer.close()


def repeating_paths(schema: pa.Schema, source: pq.FileMetaData) -> list[str]:
    """Paths of the output's columns that are written with a dictionary. Predictions hardly repeat, nor do the numbers and ids
    of which the input's file (whose footer `source` is) holds nearly all in full: a dictionary costs time there, and room.
    """
    made, wide = _made(schema), _hardly_repeating(source)
    return [path for field in schema if field.name not in made for path in _leaves(field) if path not in wide]


def _made(schema: pa.Schema) -> set[str]:
    """The columns that scoring added: those from the first float32 that cannot be null to `score`, the last one."""
    names: set[str] = set()
    for field in reversed(list(schema)):
        if field.type != pa.float32() or field.nullable:
            break
        names.add(field.name)
    return names


def _hardly_repeating(source: pq.FileMetaData) -> set[str]:
    """Paths of the columns of numbers that take as much room in a file as their plain values would: no dictionary helps them."""
    taken: dict[str, int] = {}
    plain: dict[str, int] = {}
    for index in range(min(source.num_row_groups, LOOKED_AT)):
        group = source.row_group(index)
        for place in range(group.num_columns):
            column = group.column(place)
            path = column.path_in_schema
            taken[path] = taken.get(path, 0) + column.total_uncompressed_size
            plain[path] = plain.get(path, 0) + column.num_values * PLAIN_BYTES.get(column.physical_type, 0)
    return {path for path, size in plain.items() if size and taken[path] >= WORTH_IT * size}


def _leaves(field: pa.Field) -> list[str]:
    """The paths of a column's values in a Parquet file; none where it is nested in another way than as a list."""
    if pa.types.is_list(field.type) or pa.types.is_large_list(field.type) or pa.types.is_fixed_size_list(field.type):
        below = field.type.value_type
        return [] if pa.types.is_nested(below) else [f"{field.name}.list.element"]
    return [] if pa.types.is_nested(field.type) else [field.name]


def stored_record(output: Output, target: str) -> dict[str, Any] | None:
    """What the record of a piece or file says, {} where it cannot be read; None where there is none."""
    path = f"{RECORDS}/{target}.json"
    if not output.exists(path):
        return None
    try:
        record = json.loads(output.read(path))
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def read_record(output: Output, target: str, identity: str) -> dict[str, Any] | None:
    """The record of a finished piece or file with this identity, None where it is not finished, another, or cannot be read."""
    record = stored_record(output, target)
    if not record or record.get("identity") != identity or record.get("bytes") != output.size(target):
        return None
    return record


def recorded_files(output: Output) -> list[str]:
    """The files, not pieces, that have a record: those of earlier jobs, too."""
    folder = output.path(RECORDS)
    found = output.filesystem.get_file_info(pa.fs.FileSelector(folder, allow_not_found=True, recursive=True))
    names = [info.path.removeprefix(f"{folder}/") for info in found if info.type == pa.fs.FileType.File]
    records = [name for name in names if name.endswith(".json") and not name.startswith(f"{PIECES}/")]
    return sorted(name.removesuffix(".json") for name in records)
