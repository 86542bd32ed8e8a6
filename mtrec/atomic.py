"""Files that have their old content or the new one, whatever happens meanwhile; places that can be written to at all."""

import contextlib
import os
import re
import time
from pathlib import Path

ABANDONED_SECONDS = 3_600.0  # what is that old is no longer being written: its writer was killed


def write_atomically(path: Path, text: str) -> None:
    """The file has its old content or the new one, never a part; what a killed writer of it left behind is deleted."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # another writer of this file deletes them, too
        for other in path.parent.iterdir():
            abandoned = is_unfinished(other.name) and other.name.startswith(f".{path.name}.")
            if abandoned and time.time() - other.stat().st_mtime > ABANDONED_SECONDS:
                other.unlink()


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is what a writer of `write_atomically` is at, or was.

    >>> is_unfinished(".run.json.4711"), is_unfinished("run.json"), is_unfinished(".metadata")
    (True, False, False)
    """
    return re.fullmatch(r"\..+\.\d+", name) is not None


def check_file(path: Path | None, option: str) -> None:
    """Raises ValueError naming the option where a file cannot be written there; to be called before the work."""
    if path is None:
        return
    if is_uri(path):
        raise ValueError(f"`{option}` should be a file on a local or mounted disk. Found '{as_typed(path)}'.")
    if path.is_dir():
        raise ValueError(f"`{option}` should be a file. Found the folder '{path}': name a file in it.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ValueError(f"`{option}` should be a file in a folder. Found '{path}': '{above}' is a file.")
    if not path.exists() and not os.access(above, os.W_OK):
        raise ValueError(f"`{option}` should be a file that can be written. Found '{path}': no right to write into '{above}'.")


def check_folder(path: Path | None, option: str) -> None:
    """Raises ValueError naming the option for the URI of a folder, which would become a local one with an odd name."""
    if path is not None and is_uri(path):
        raise ValueError(
            f"`{option}` should be a local or mounted folder. Found '{as_typed(path)}'. "
            "For copies of checkpoints at a URI there is `training.checkpoint_storage`."
        )


def is_uri(path: Path) -> bool:
    """Whether a path was made of a URI; of its :// a path keeps one slash.

    >>> is_uri(Path("s3://bucket/run")), is_uri(Path("runs/a:b"))
    (True, False)
    """
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)) is not None


def as_typed(path: Path) -> str:
    """The URI that a path was made of.

    >>> as_typed(Path("s3://bucket/run")), as_typed(Path("file:///tmp/run"))
    ('s3://bucket/run', 'file:///tmp/run')
    """
    return str(path).replace(":/", ":///" if str(path).startswith("file:") else "://", 1)
