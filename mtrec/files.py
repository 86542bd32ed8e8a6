"""Parquet files: found by path, folder, glob, list or URI; their footers read, remembered and verified.

A footer (schema, row groups, statistics) is the last part of a Parquet file. Its digest is the file's identity: a file
that is replaced while it is in use is noticed at the next row group, because its footer no longer has that digest.
"""

import contextlib
import fnmatch
import functools
import glob
import hashlib
import os
import re
import urllib.parse
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from mtrec.kinds import counted, nearest

SUFFIXES = (".parquet", ".parq", ".pq")
_MAGIC = b"PAR1"
_TAIL_BYTES = 65536  # one read; holds the footer of most files
_BUFFER_BYTES = 65536  # per column chunk of an open row group, instead of the whole compressed chunk


@dataclass(frozen=True)
class Location:
    """Where a file is: `path` in `filesystem`, `shown` in messages, `keys` of Hive folders such as `dt=2026-01-01`.

    `root`: the folder that it was looked for in (the named one, the fixed part of a glob, the file's own), as `path` begins.
    """

    filesystem: pa.fs.FileSystem
    path: str
    shown: str
    keys: tuple[tuple[str, str | None], ...]
    size: int
    root: str


def find_files(paths: str | Sequence[str], place: str) -> tuple[list[Location], list[str]]:
    """The Parquet files that `paths` name, in their order and sorted within each, and the paths met twice (kept once).

    A path is a file, a folder (all Parquet files below it; names that start with `_` or `.` are left out), a glob with
    `*`, `?`, `[a-z]`, `**`, or a URI (`s3://bucket/logs/dt=*`; options of the filesystem after `?`, as in
    `s3://bucket/logs?endpoint_override=localhost:9000&scheme=http`, otherwise from the environment). Raises ValueError
    naming `place` (a YAML path) where a path names nothing.
    """
    entries = [paths] if isinstance(paths, str) else list(paths)
    if not entries:
        raise ValueError(f"`{place}.path` should name at least one Parquet file. Found an empty list.")
    check_not_empty(entries, f"`{place}.path` ")
    found: dict[str, Location] = {}
    twice: list[str] = []
    for entry in entries:
        for file in _remote_files(entry, place) if "://" in entry else _local_files(entry, place):
            identity = f"{file.filesystem.type_name}:{file.path}"
            if identity in found:
                twice.append(file.shown)
            found.setdefault(identity, file)
    return list(found.values()), twice


def check_not_empty(paths: str | Sequence[str], what: str = "") -> None:
    """Raises ValueError for an empty path, which would mean the current folder; the message begins with `what`."""
    if not all(path.strip() for path in ([paths] if isinstance(paths, str) else paths)):
        raise ValueError(f"{what}should name files or a folder. Found an empty path: is a variable in it (${{DATA}}) empty?")


def _local_files(entry: str, place: str) -> list[Location]:
    filesystem = pa.fs.LocalFileSystem()
    path = os.path.expanduser(entry)
    if glob.has_magic(path) and not os.path.exists(path):
        matches = sorted(glob.glob(path, recursive=True))
        parts = path.split("/")
        root = "/".join(parts[: next(number for number, part in enumerate(parts) if glob.has_magic(part))])
        found = {
            file.path: file
            for match in matches
            for file in (
                _below(filesystem, match, "", root) if os.path.isdir(match) else [_local_file(filesystem, match, root)]
            )
        }
        if not found:
            raise ValueError(f"`{place}.path` should match at least one Parquet file. Found none for '{entry}'.")
        return [found[path] for path in sorted(found)]
    if not os.path.exists(path):
        folder, name = os.path.split(path.rstrip("/"))
        beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        hint = nearest(name, beside) or ("" if beside else f" The folder '{folder}' does not exist or is empty.")
        raise ValueError(f"`{place}.path` should name a file or folder that exists. Found '{entry}'.{hint}")
    if os.path.isdir(path):
        return _some(_below(filesystem, path, "", path), entry, place)
    return [_local_file(filesystem, path, os.path.dirname(path))]


def _local_file(filesystem: pa.fs.FileSystem, path: str, root: str) -> Location:
    return Location(filesystem, path, path, _keys(path), os.path.getsize(path), root.rstrip("/"))


def _remote_files(entry: str, place: str) -> list[Location]:
    address, _, options = entry.partition("?")
    scheme, _, rest = address.partition("://")
    parts = rest.split("/")
    magic = next((number for number, part in enumerate(parts) if "*" in part or "[" in part), None)
    fixed = "/".join(parts[:magic])
    uri = f"{scheme}://{fixed}" + (f"?{options}" if options else "")
    try:
        filesystem, base = pa.fs.FileSystem.from_uri(uri)
        info = filesystem.get_file_info(base)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise ValueError(f"`{place}.path` should be a URI that pyarrow can open. Found '{entry}': {error}") from error
    prefix = "" if scheme == "file" else f"{scheme}://"
    if info.type == pa.fs.FileType.NotFound:
        raise ValueError(f"`{place}.path` should name a file or folder that exists. Found '{entry}'.")
    if magic is None and info.type == pa.fs.FileType.File:
        return [Location(filesystem, base, prefix + base, _keys(base), info.size, base.rpartition("/")[0])]
    below = _below(filesystem, base, prefix, base)
    if magic is not None:
        start = len(base.rstrip("/")) + 1
        below = [file for file in below if _matches(file.path[start:].split("/"), parts[magic:])]
    return _some(below, entry, place)


def _some(files: list[Location], entry: str, place: str) -> list[Location]:
    if not files:
        raise ValueError(f"`{place}.path` should hold at least one file named *.parquet. Found none in '{entry}'.")
    return files


def _below(filesystem: pa.fs.FileSystem, base: str, prefix: str, root: str) -> list[Location]:
    """The Parquet files of a folder and its folders, by name."""
    found = []
    start = len(base.rstrip("/")) + 1
    if filesystem.type_name == "local":
        _refuse_broken_links(base)
    for info in filesystem.get_file_info(pa.fs.FileSelector(base, recursive=True)):
        names = info.path[start:].split("/")
        hidden = any(name.startswith(("_", ".")) and "=" not in name for name in names)
        if info.type == pa.fs.FileType.File and info.path.endswith(SUFFIXES) and not hidden:
            found.append(Location(filesystem, info.path, prefix + info.path, _keys(info.path), info.size, root.rstrip("/")))
    return sorted(found, key=lambda file: file.path)


def _refuse_broken_links(base: str) -> None:
    """pyarrow's listing leaves them out, and with them rows that somebody expects."""
    for folder, _, names in os.walk(base):
        for name in names:
            path = os.path.join(folder, name)
            if name.endswith(SUFFIXES) and os.path.islink(path) and not os.path.exists(path):
                raise ValueError(f"'{path}' should be a readable Parquet file. Found a link to a file that is not there.")


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the file, or a folder that it is in, matches the glob; both as parts between slashes.

    >>> _matches(["dt=2026-01-01", "a.parquet"], ["dt=2026-01-*"]), _matches(["a.parquet"], ["**", "b*"])
    (True, False)
    """
    if not pattern or pattern == [""]:
        return True
    if pattern[0] == "**":
        return any(_matches(names[skip:], pattern[1:]) for skip in range(len(names)))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _matches(names[1:], pattern[1:])


def _keys(path: str) -> tuple[tuple[str, str | None], ...]:
    """Partition keys and values of the folders of a path.

    >>> _keys("logs/dt=2026-01-01/country=C%C3%B4te/part-0.parquet")
    (('dt', '2026-01-01'), ('country', 'Côte'))
    """
    found = []
    for name in path.split("/")[:-1]:
        match = re.fullmatch(r"([^=]+)=(.*)", name)
        if match:
            value = urllib.parse.unquote(match.group(2))
            found.append((match.group(1), None if value == "__HIVE_DEFAULT_PARTITION__" else value))
    return tuple(found)


@dataclass(frozen=True)
class Identity:
    """What a file was when it was first read: size and digest of its footer (with the closing length and magic)."""

    size: int
    footer_bytes: int
    digest: bytes


@dataclass(frozen=True)
class File:
    """A file, what it was when its footer was first read, and the types of its columns."""

    location: Location
    identity: Identity
    schema: pa.Schema

    @property
    def path(self) -> str:
        """As messages name it."""
        return self.location.shown


def several(files: Sequence[File]) -> str:
    """Some files as messages name them: the first, and how many others."""
    return f"'{files[0].path}'" + (f" and {counted(len(files) - 1, 'other file')}" if len(files) > 1 else "")


def read_footer(location: Location) -> tuple[File, pq.FileMetaData]:
    """A file and its footer. Raises ValueError naming the file where it is not whole Parquet, or has a column twice."""
    with _handle(location) as handle:
        size, footer = handle.size(), _footer(handle, location, _TAIL_BYTES)
    metadata = _parsed(footer, location)
    identity = Identity(size, len(footer), hashlib.blake2b(footer, digest_size=16).digest())
    return File(location, identity, _schema(metadata, location)), metadata


def _schema(metadata: pq.FileMetaData, location: Location) -> pa.Schema:
    schema = metadata.schema.to_arrow_schema().remove_metadata()
    if len(set(schema.names)) < len(schema.names):
        twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
        raise ValueError(f"'{location.shown}' should have each column once. Found twice: {', '.join(twice)}.")
    return schema


class ChangedFile(ValueError):
    """A file is not the one that was there when the data was opened."""


def leaves_of(schema: pa.Schema) -> dict[str, range]:
    """{column: numbers of the columns of plain values that it consists of in its file}: one, but for structs and maps.

    By their order, since a path such as `a.b.list.element` does not tell whether the column is `a` or `a.b`.

    >>> leaves_of(pa.schema({"a.b": pa.list_(pa.string()), "c": pa.map_(pa.string(), pa.int64()), "d": pa.int64()}))
    {'a.b': range(0, 1), 'c': range(1, 3), 'd': range(3, 4)}
    """
    leaves: dict[str, range] = {}
    first = 0
    for field in schema:
        leaves[field.name] = range(first, first + _num_leaves(field.type))
        first = leaves[field.name].stop
    return leaves


def _num_leaves(type_: pa.DataType) -> int:
    if isinstance(type_, pa.BaseExtensionType):
        return _num_leaves(type_.storage_type)
    if not pa.types.is_nested(type_):
        return 1
    return sum(_num_leaves(type_.field(number).type) for number in range(type_.num_fields))


@contextlib.contextmanager
def open_file(file: File, dictionaries: Collection[str] = ()) -> Iterator[pq.ParquetFile]:
    """The file, open until the context ends. Raises ChangedFile naming the file where it is not the one first read.

    `dictionaries`: columns of text, or of lists of it, that are read as dictionary arrays.
    """
    location, identity = file.location, file.identity
    with _handle(location) as handle:
        if handle.size() != identity.size:
            raise ChangedFile(_changed(location, f"its size was {identity.size} bytes and is {handle.size()}"))
        footer = _footer(handle, location, identity.footer_bytes)
        if hashlib.blake2b(footer, digest_size=16).digest() != identity.digest:
            raise ChangedFile(_changed(location, "its footer is another"))
        remote, metadata = location.filesystem.type_name != "local", _parsed(footer, location)
        leaves = leaves_of(file.schema) if dictionaries else {}
        yield pq.ParquetFile(
            handle,
            metadata=metadata,
            read_dictionary=[metadata.schema.column(leaves[name][0]).path for name in dictionaries],
            pre_buffer=remote,  # fetches the column chunks of a row group together: one round trip, not one a column
            buffer_size=0 if remote else _BUFFER_BYTES,
        )


def _changed(location: Location, how: str) -> str:
    return f"'{location.shown}' was replaced while it was in use: {how}. Start again with files that stay as they are."


def _handle(location: Location) -> pa.NativeFile:
    try:
        return location.filesystem.open_input_file(location.path)
    except OSError as error:
        raise ValueError(f"'{location.shown}' should be a readable Parquet file. Found: {error}") from error


def _footer(handle: pa.NativeFile, location: Location, first_read: int) -> bytes:
    size: int = handle.size()
    tail: bytes = handle.read_at(min(size, first_read), max(0, size - first_read))
    if size < 12 or tail[-4:] != _MAGIC:
        encrypted = tail[-4:] == b"PARE"
        what = "an encrypted footer" if encrypted else f"{size} bytes that do not end with {_MAGIC.decode()}"
        hint = "encrypted Parquet is not read" if encrypted else "the file was cut short, or is still being written"
        if size and handle.read_at(min(size, 4), 0) != _MAGIC[: min(size, 4)]:
            hint = "it is no Parquet, or was cut short"
        raise ValueError(f"'{location.shown}' should be a whole Parquet file. Found {what}: {hint}.")
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    if needed + len(_MAGIC) > size:
        raise ValueError(
            f"'{location.shown}' should be a whole Parquet file. Found a footer of {needed} bytes in a file of {size}: "
            "the file was damaged."
        )
    return tail[-needed:] if needed <= len(tail) else handle.read_at(needed, size - needed)


def _parsed(footer: bytes, location: Location) -> pq.FileMetaData:
    try:
        return _parse(footer)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"'{location.shown}' should be a whole Parquet file. Found a damaged footer: {error}") from error


@functools.lru_cache(maxsize=32)  # parsing costs as much as decoding some thousand rows; bounded, not one a file
def _parse(footer: bytes) -> pq.FileMetaData:
    return pq.read_metadata(pa.BufferReader(footer))
