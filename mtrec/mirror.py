"""Copies of a run's files below a URI (`s3://bucket/runs/mine`, `gs://`, `hdfs://`, `file://`), for a machine whose disks may go.

What is copied last says that the rest is there: `run.json` of a run, `manifest.json` of a checkpoint.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.fs

KEY = "training.checkpoint_storage"


class StorageError(OSError, ValueError):
    """The storage failed, or cannot be reached; the message names the URI and the key."""


class Mirror:
    """The files below a URI, by their path relative to it; `local` is the folder that they are copies of.

    Raises ValueError naming the key where the URI cannot be understood, StorageError where the storage fails.

    >>> import tempfile
    >>> local, far = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    >>> mirror = Mirror(far.as_uri(), local)
    >>> _ = (local / "a.json").write_text("1")
    >>> mirror.put("a.json")
    >>> (local / "a.json").unlink()
    >>> mirror.get("a.json", local / "again.json")
    >>> (local / "again.json").read_text(), mirror.names("")
    ('1', ['a.json'])
    """

    def __init__(self, uri: str, local: Path) -> None:
        try:
            self._files, base = pyarrow.fs.FileSystem.from_uri(uri)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"`{KEY}` should be a URI such as s3://bucket/runs/mine (a bucket that exists). Found {uri!r}: {error}"
            ) from error
        self.uri, self._base, self._local = uri, base.rstrip("/"), local

    def _far(self, name: str) -> str:
        return f"{self._base}/{name}" if name else self._base

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(f"{what} {self.uri} (`{KEY}`) failed: {error}") from error

    def put(self, *names: str) -> None:
        """Copies files there, in this order."""
        here = pyarrow.fs.LocalFileSystem()
        with self._named("the copy to"):
            for name in names:
                far = self._far(name)
                self._files.create_dir(far.rpartition("/")[0], recursive=True)
                pyarrow.fs.copy_files(str(self._local / name), far, source_filesystem=here, destination_filesystem=self._files)

    def get(self, name: str, to: Path) -> None:
        """Copies a file, or a folder with all that is in it, from there."""
        here, far, paths = pyarrow.fs.LocalFileSystem(), self._far(name), {}
        with self._named("the copy from"):
            if self._files.get_file_info(far).type == pyarrow.fs.FileType.File:
                paths[far] = to
            else:
                for info in self._files.get_file_info(pyarrow.fs.FileSelector(far, recursive=True)):
                    if info.type == pyarrow.fs.FileType.File:
                        paths[info.path] = to / info.path.removeprefix(f"{far}/")
            for path, local in paths.items():
                local.parent.mkdir(parents=True, exist_ok=True)
                pyarrow.fs.copy_files(path, str(local), source_filesystem=self._files, destination_filesystem=here)

    def read(self, name: str) -> bytes | None:
        """The content of a small file, None where there is none."""
        with self._named("reading from"):
            if self._files.get_file_info(self._far(name)).type != pyarrow.fs.FileType.File:
                return None
            with self._files.open_input_stream(self._far(name)) as file:
                return bytes(file.read())

    def names(self, folder: str) -> list[str]:
        """What lies directly in a folder; nothing where there is no such folder."""
        with self._named("listing"):
            selector = pyarrow.fs.FileSelector(self._far(folder), allow_not_found=True)
            return sorted(info.base_name for info in self._files.get_file_info(selector))

    def delete(self, folder: str, first: str) -> None:
        """Deletes a folder, and the file `first` in it before all others."""
        with self._named("deleting an old checkpoint below"):
            if self.read(f"{folder}/{first}") is not None:
                self._files.delete_file(self._far(f"{folder}/{first}"))
            self._files.delete_dir(self._far(folder))
