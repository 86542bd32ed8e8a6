"""Small Parquet files, what a dataset reads of them, and what it says instead."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrec.dataset import Dataset, Source, open_dataset

COLUMNS = ["row", "text", "tags", "number"]  # of `write_files`


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


def write_files(folder: Path, sizes: list[list[int]]) -> Dataset:
    """One file for each list, with row groups of the given sizes; `row` counts on over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for index, groups in enumerate(sizes):
        schema = pa.schema(
            [("row", pa.int64()), ("text", pa.string()), ("tags", pa.list_(pa.int64())), ("number", pa.float32())]
        )
        with pq.ParquetWriter(folder / f"{index:02}.parquet", schema) as writer:
            for size in groups:
                rows = range(number, number + size)
                values = {
                    "row": [2**60 + row for row in rows],
                    "text": [None if row % 5 == 0 else f"t{row}" for row in rows],
                    "tags": [None if row % 7 == 0 else [row] * (row % 4) for row in rows],
                    "number": [None if row % 3 == 0 else row / 2 for row in rows],
                }
                writer.write_table(pa.table(values, schema=schema))
                number += size
    return open_dataset(Source(str(folder)), COLUMNS, place="data.train")
