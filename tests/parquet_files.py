"""Small Parquet files, what a dataset reads of them, and what it says instead."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec.dataset import Dataset, Source, open_dataset


def write(path: Path, row_group_size: int | None = None, **columns: object) -> str:
    """The path of a new file with these columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return str(path)


def rows_of(dataset: Dataset, column: str) -> list[object]:
    """All values of a column, in the order of the rows."""
    return [value for batch in dataset.batches([column], rows=7) for value in batch[column].to_pylist()]


def message(source: Source, columns: list[str], optional: tuple[str, ...] = ()) -> str:
    """What the error says with which opening this source is refused."""
    with pytest.raises(ValueError, match=r".") as error:
        open_dataset(source, columns, optional, place="data.train")
    return str(error.value)
