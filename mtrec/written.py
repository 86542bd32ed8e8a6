"""Files of a run that are read again: what is wrong with a damaged one is told with its path."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

DAMAGE = (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, pa.ArrowException)


@contextmanager
def as_written(place: str | Path, form: str) -> Iterator[None]:
    """Around reading a file, or a line of one, that should be of this form. Raises ValueError naming the place where it is not.

    >>> with as_written("run.json", "JSON"):
    ...     raise ValueError("Expecting value: line 1")
    Traceback (most recent call last):
    ValueError: run.json should be JSON, as mtrec wrote it. Found: Expecting value: line 1. Put it back from a copy.
    """
    try:
        yield
    except (*DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the storage; Arrow's, of what it read, have none
            raise
        found = str(error).strip().rstrip(".") if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{place} should be {form}, as mtrec wrote it. Found: {found}. Put it back from a copy.") from error
