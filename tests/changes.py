"""Changes of a good experiment and of the log that it reads, of which bad inputs are made."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Tree = dict[str, Any]
Change = Callable[[Tree, Path], None]  # of the experiment, and of the files below the folder: train/part-0, -1 and validation/


def linked(good: Path, folder: Path) -> Path:
    """The files of the good log under another folder: what is changed is written anew."""
    for path in good.rglob("*.parquet"):
        place = folder / path.relative_to(good)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, place)
    return folder


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def in_file(change: Callable[[bytes], bytes], name: str = "train/part-1.parquet") -> Change:
    """Changes the bytes of a file."""
    return lambda tree, folder: rewrite(folder / name, change((folder / name).read_bytes()))


def in_table(change: Callable[[pa.Table], pa.Table], name: str = "train/part-1.parquet") -> Change:
    """Changes the rows of a file; its footer then has no statistics, so that the bad value is met as a row."""

    def changed(tree: Tree, folder: Path) -> None:
        table = change(pq.read_table(folder / name))
        (folder / name).unlink()
        pq.write_table(table, folder / name, row_group_size=100, write_statistics=False)

    return changed


def column(name: str, values: Any, type_: pa.DataType | None = None) -> Change:
    """Another column in the second file: of these values, or of what a function makes of the old ones."""

    def changed(table: pa.Table) -> pa.Table:
        made = values(table[name]) if callable(values) else pa.array(values, type_)
        place = table.schema.get_field_index(name)
        return table.append_column(name, made) if place < 0 else table.set_column(place, name, made)

    return in_table(changed)


def value(name: str, found: Any, type_: pa.DataType, row: int = 217) -> Change:
    """One value of a column of the second file: its row 217 is row 17 of row group 2."""

    def changed(old: pa.ChunkedArray) -> pa.Array:
        values = old.to_pylist()
        values[row] = found
        return pa.array(values, type_)

    return column(name, changed)


def added(name: str, values: list[Any], type_: pa.DataType, last: Any = "as the others") -> Change:
    """A new column of repeated values in all files; `last`: in the last row of the second training file."""

    def changed(tree: Tree, folder: Path) -> None:
        for path in sorted(folder.rglob("*.parquet")):
            table = pq.read_table(path)
            column = (values * (len(table) // len(values) + 1))[: len(table)]
            if path.name == "part-1.parquet" and last != "as the others":
                column[-1] = last
            path.unlink()
            made = table.append_column(name, pa.array(column, type_))
            pq.write_table(made, path, row_group_size=100, write_statistics=False)

    return changed


def by_day(tree: Tree, folder: Path) -> None:
    """The training files as two days."""
    for number in range(2):
        day = folder / "days" / f"dt=2026-11-0{number + 1}"
        day.mkdir(parents=True)
        (folder / f"train/part-{number}.parquet").rename(day / "part-0.parquet")


def empty_folder(tree: Tree, folder: Path) -> None:
    (folder / "other").mkdir()
    (folder / "other" / "rows.csv").write_text("user_id,click")


def put(**values: Any) -> Change:
    """Sets keys of the experiment; two underscores stand for a point. `None` takes a key away."""

    def changed(tree: Tree, folder: Path) -> None:
        for path, found in values.items():
            *keys, last = path.split("__")
            node = tree
            for key in keys:
                node = node.setdefault(key, {})
            if found is None:
                node.pop(last, None)
            else:
                node[last] = found

    return changed


def both(*changes: Change) -> Change:
    def changed(tree: Tree, folder: Path) -> None:
        for change in changes:
            change(tree, folder)

    return changed


def train_is(**source: Any) -> Change:
    """Another `data.train`; `{}` in it is the log's folder."""

    def changed(tree: Tree, folder: Path) -> None:
        whole = {"path": "{}/train", **source}
        whole["path"] = whole["path"].format(folder)
        tree["data"]["train"] = whole

    return changed


def replaced(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.schema.get_field_index(name), name, values)


def feature(name: str, **options: Any) -> Change:
    return put(**{f"features__{name}": options})
