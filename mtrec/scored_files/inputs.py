"""The input of a scoring job: what is asked, which files can be scored, how their rows are cut into pieces and batches."""

import dataclasses
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.fs

from mtrec.dataset import Dataset, Source, open_each
from mtrec.features import Encoder, FeatureCounts, check_schema
from mtrec.files import Location
from mtrec.metrics import group_keys
from mtrec.row_groups import RowGroup
from mtrec.schema import unify
from mtrec.score import LabelledSums

DECODED_ROWS = 65_536  # at once
UNIT_ROWS = 131_072  # row groups are taken together up to so many rows: pieces consist of whole units
PIECES = "_pieces"
INPUT = "INPUT"  # what messages call the input


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a scoring job; the same for all its workers.

    Attributes:
        source: the input files and which of their rows.
        output: a folder, or a URI of one.
        columns: input columns that are kept; None keeps all but the labels.
        top, by: keep only the `top` best rows by `score` for each value of the column `by`.
        batch_rows: rows that the model sees together.
        overwrite: replace what another job has written, delete what it has made of files that are not in the input any more.
        provenance: run, checkpoint, its hash, formula, version: into every footer and the manifest.
    """

    source: Source
    output: str
    columns: tuple[str, ...] | None
    top: int | None
    by: str | None
    batch_rows: int
    overwrite: bool
    provenance: dict[str, str]

    @property
    def kept(self) -> tuple[str, ...] | None:
        """The input columns of the output; `by` is one of them."""
        if self.columns is None or self.by is None or self.by in self.columns:
            return self.columns
        return (*self.columns, self.by)


@dataclasses.dataclass(frozen=True)
class InputFile:
    """A file that can be scored.

    Attributes:
        data: its rows; the schema has the types of the file.
        relative: its path below the input's folder, and the output's.
        kept: the input columns of the output.
        labelled: tasks whose labels it holds; label_columns: where.
        identity: changes when the result would.
    """

    data: Dataset
    relative: str
    kept: tuple[str, ...]
    labelled: tuple[str, ...]
    label_columns: tuple[str, ...]
    identity: str

    @property
    def shown(self) -> str:
        """Its path as messages name it."""
        return self.data.files[0].path


@dataclasses.dataclass(frozen=True)
class Piece:
    """Row groups of a file (positions in `data.row_groups`) that are scored together; `whole`: all of them, into the output."""

    file: InputFile
    start: int
    stop: int
    whole: bool

    @property
    def row_groups(self) -> tuple[RowGroup, ...]:
        """Those of the file that are scored together."""
        return self.file.data.row_groups[self.start : self.stop]

    @property
    def rows(self) -> int:
        """Before `where` drops any."""
        return sum(group.num_rows for group in self.row_groups)

    @property
    def target(self) -> str:
        """Where it is written, below the output."""
        return self.file.relative if self.whole else f"{PIECES}/{self.file.relative}/{self.start:06d}-{self.stop:06d}.parquet"


def open_inputs(
    request: Request, encoder: Encoder, labels: LabelledSums, made: Sequence[str]
) -> tuple[list[InputFile], dict[str, str]]:
    """The input files that can be scored, and {path: what is wrong} of the others.

    Args:
        labels: knows which label columns there may be; they need not be there.
        made: the columns that scoring adds.

    Raises ValueError where the input names nothing, or two of its files would become one.
    """
    features = encoder.features
    required = dict.fromkeys(column for feature in features if not feature.optional for column in feature.columns)
    optional = [column for column in encoder.columns if column not in required]
    label_columns = labels.columns(list(labels.labels))
    asked = request.kept or ((request.by,) if request.by else ())
    wanted = list(dict.fromkeys([*encoder.columns, *asked]))
    absent_labels = [column for column in label_columns if column not in wanted]
    found: list[InputFile] = []
    bad: dict[str, str] = {}
    each_opened = list(open_each(request.source, [*wanted, *absent_labels], [*optional, *absent_labels], place=INPUT))
    root = common_root([location for location, _ in each_opened])
    for location, opened in each_opened:
        try:
            if isinstance(opened, ValueError):
                raise opened
            found.append(_input_file(request, encoder, labels, made, opened, location, root))
        except ValueError as error:
            bad[location.shown] = str(error)
    paths = [each.relative for each in found]
    twice = sorted({path for path in paths if paths.count(path) > 1})
    if twice:
        raise ValueError(f"`{INPUT}` should have one file for each relative path. Found '{twice[0]}' twice.")
    return found, bad


def _input_file(
    request: Request,
    encoder: Encoder,
    labels: LabelledSums,
    made: Sequence[str],
    data: Dataset,
    location: Location,
    root: str,
) -> InputFile:
    file = data.files[0]
    check_schema(encoder.features, data.schema)
    keys = dict(location.keys)
    kept = request.kept
    if kept is None:
        outcomes = labels.columns(list(labels.labels))
        features = [name for name in file.schema.names if name not in keys and name not in outcomes]
        kept = (*features, *((request.by,) if request.by is not None and request.by not in features else ()))
    clash = [name for name in kept if name in made]
    if clash:
        raise ValueError(
            f"'{file.path}' has a column '{clash[0]}' as the output will: rename it, or leave it out with --columns "
            f"{','.join(name for name in kept if name not in made)[:80] or 'none'}."
        )
    known = labels.known([name for name in data.schema.names if name in file.schema.names])
    label_columns = labels.columns(known)
    names = dict.fromkeys([*(c for c in encoder.columns if c in data.schema.names), *kept, *label_columns])
    fields = []
    for name in names:
        if name in data.condition_schema.names:  # must suit the condition
            fields.append(data.condition_schema.field(name))
        elif name in file.schema.names and name not in keys:  # the file's own type: what is kept stays as it is
            fields.append(without_view(file.schema.field(name)))
        else:
            fields.append(data.schema.field(name))
    data = dataclasses.replace(data, schema=pa.schema(fields)).with_dictionaries(encoder.id_columns)
    what = {
        "provenance": request.provenance,
        "kept": kept,
        "top": request.top,
        "by": request.by,
        "batch_rows": request.batch_rows,
        "input": data.fingerprint,
    }
    identity = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    relative = location.path.removeprefix(root).lstrip("/")
    return InputFile(data, relative, kept, known, label_columns, identity)


def without_view(field: pa.Field) -> pa.Field:
    """A field whose views of text or bytes, which Arrow cannot take rows of, are plain.

    >>> without_view(pa.field("a", pa.string_view())).type, without_view(pa.field("b", pa.list_(pa.binary_view()))).type
    (DataType(large_string), ListType(list<element: large_binary>))
    """
    plain = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    if pa.types.is_list(field.type) and field.type.value_type in plain:
        return field.with_type(pa.list_(pa.field("element", plain[field.type.value_type])))
    return field.with_type(plain.get(field.type, field.type))


def common_root(files: Sequence[Location]) -> str:
    """The folder below which output paths are those of the input, on the files' filesystem: what their roots have in common."""
    roots = sorted({file.root for file in files})
    return roots[0] if len(roots) == 1 else os.path.commonpath(roots)


def units(row_groups: Sequence[RowGroup]) -> list[int]:
    """Where units of row groups end: the first places at which at least `UNIT_ROWS` rows have come together.

    >>> units([RowGroup(0, 0, 100_000), RowGroup(0, 1, 100_000), RowGroup(0, 2, 5)])
    [2, 3]
    """
    ends, held = [], 0
    for place, group in enumerate(row_groups, start=1):
        held += group.num_rows
        if held >= UNIT_ROWS or place == len(row_groups):
            ends.append(place)
            held = 0
    return ends


def plan_pieces(files: Sequence[InputFile], workers: int, split: bool) -> list[Piece]:
    """The pieces of a job, in order: whole files, but cut into about four pieces a worker where files are few and large.

    `split`: every file becomes pieces that are joined later (`top` chooses among all rows before files are written).
    """
    total = sum(file.data.num_rows for file in files)
    aim = max(UNIT_ROWS, -(-total // (4 * workers))) if workers > 1 else total + 1
    pieces = []
    for file in files:
        groups = file.data.row_groups
        cuts, held, before = [0], 0, 0
        for end in units(groups):
            held += sum(group.num_rows for group in groups[before:end])
            before = end
            if held >= aim or end == len(groups):
                cuts.append(end)
                held = 0
        ranges = list(itertools.pairwise(cuts)) or [(0, 0)]  # a file without rows becomes one without rows
        whole = len(ranges) == 1 and not split
        pieces += [Piece(file, start, stop, whole) for start, stop in ranges]
    return pieces


def batches(piece: Piece, columns: Sequence[str], rows: int) -> Iterator[pa.RecordBatch]:
    """The piece's rows in order, `rows` at a time; batches end where units do. Decoded are many more at once: that is cheaper."""
    start, data = 0, piece.file.data
    for end in units(piece.row_groups):
        held: list[pa.RecordBatch] = []  # less than a batch
        for group in piece.row_groups[start:end]:
            for chunk, mask in data.chunks(group, columns, max(rows, data.rows_at_once(DECODED_ROWS))):
                kept = chunk if mask is None else chunk.filter(mask)
                missing = rows - sum(each.num_rows for each in held)
                if held and kept.num_rows >= missing:
                    yield pa.concat_batches([*held, kept.slice(0, missing)])
                    kept, held = kept.slice(missing), []
                whole = 0 if held else kept.num_rows // rows * rows
                for at in range(0, whole, rows):
                    yield kept.slice(at, rows)
                if kept.num_rows > whole:
                    held.append(kept.slice(whole))
        if held:
            yield pa.concat_batches(held)
        start = end


def sampled_counts(
    files: Sequence[InputFile], encoder: Encoder, rows: int = 16_384, spread: int = 16
) -> tuple[FeatureCounts, dict[str, str]]:
    """Nulls and unseen ids in some rows of at most `spread` files, before anything is scored; {path: problem} of bad ones."""
    counts, bad = encoder.counts(), {}
    chosen = [file for file in files if file.data.row_groups]
    chosen = chosen[:: -(-len(chosen) // spread)] if chosen else []
    for file in chosen:
        names = [column for column in encoder.columns if column in file.data.schema.names]
        try:
            for batch in file.data.sample(-(-rows // len(chosen)), names).to_batches():
                encoder.encode(batch, counts)
        except ValueError as error:
            bad[file.shown] = named(str(error), file.shown)
    return counts, bad


def named(message: str, path: str) -> str:
    """The message, with the file's path in front where it does not name it."""
    return message if path in message else f"'{path}': {message}"


def check_output(filesystem: pa.fs.FileSystem, base: str, paths: str | Sequence[str], files: Sequence[InputFile]) -> None:
    """Raises ValueError where the output (`base` on its file system) lies in the input, or would replace a file of it.

    `paths`: the input as it was named.
    """
    local = filesystem.type_name == "local"
    out = str(Path(base).resolve()) if local else base
    for file in files:
        location = file.data.files[0].location
        if location.filesystem.type_name != filesystem.type_name:
            continue
        root = str(Path(location.root or ".").resolve()) if local else location.root
        source = str(Path(location.path).resolve()) if local else location.path
        below = out.startswith(f"{root}/") and _names_folder(paths, location)
        if out == root or below or f"{out}/{file.relative}" == source:
            raise ValueError(
                f"OUTPUT should lie outside of INPUT, or it would be scored, or replace it, next time. Found '{out}' in '{root}'."
            )
    if filesystem.get_file_info(base).type == pa.fs.FileType.File:
        raise ValueError(f"OUTPUT should be a folder. Found the file '{out}'.")


def _names_folder(paths: str | Sequence[str], found: Location) -> bool:
    """Whether the input, in which this file was found, is one folder: what lies in it later is input, too."""
    if not isinstance(paths, str):
        return False
    if "://" not in paths:
        return os.path.isdir(paths)
    address = paths.partition("?")[0].rstrip("/")
    return not glob.has_magic(address) and address.endswith(f"/{found.root.rpartition('/')[2]}")


def group_type(by: str, files: Sequence[InputFile]) -> pa.DataType:
    """The one type for all files of the column `by`, in which equal values have equal keys.

    Raises ValueError where it is no column that groups (not of integers, strings, dates or times), or naming two files whose
    types do not go together.
    """
    for file in files:
        group_keys(pa.array([], file.data.schema.field(by).type), f"--by {by}")
    types, _ = unify([by], [file.data.files[0] for file in files], files[0].data.partition_types, (), INPUT, {})
    group_keys(pa.array([], types[by]), f"--by {by}")
    return types[by]


def group_column(column: pa.ChunkedArray, common: pa.DataType, by: str, file: InputFile) -> pa.ChunkedArray:
    """The column `by` of a file in the type for all files. Raises ValueError naming the file for a value that it cannot hold."""
    if pa.types.is_dictionary(column.type) and column.type.value_type == common:
        return column  # hashed by its dictionary, which is shorter
    try:
        return column.cast(common)
    except pa.ArrowException as error:
        raise ValueError(
            f"'{file.shown}', column '{by}': {column.type} should become {common}, the type that suits all files of `{INPUT}`, "
            f"but: {error}"
        ) from error
