"""Files that have their old content or the new one, whatever happens meanwhile."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """The file has its old content or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
