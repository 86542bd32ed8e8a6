"""A piece is scored, and pieces are joined to files.

Legend: B rows of a batch, N rows of a piece.
"""

import json
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mtrec.batch import Batch
from mtrec.features import BadRowsError
from mtrec.files import open_file
from mtrec.formula import SCORE
from mtrec.metrics import group_keys
from mtrec.score import NonFiniteError, Scorer, Tally
from mtrec.scored_files.inputs import (
    InputFile,
    Piece,
    Request,
    batches,
    group_column,
    group_type,
    named,
    without_view,
)
from mtrec.scored_files.output import RECORDS, HashedSink, Output, ParquetSink

T = TypeVar("T")

METADATA_KEY = b"mtrec"  # in the footer of every output file
AHEAD = 3  # batches read ahead of the model


def ahead(source: Iterator[T], depth: int) -> Generator[T]:
    """The items of `source`, made in a thread up to `depth` ahead; its errors come at their place."""
    end = object()
    with ThreadPoolExecutor(1, "mtrec-read") as pool:
        waiting: deque[Future[Any]] = deque(pool.submit(next, source, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, source, end))
                yield item
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class FileError(ValueError):
    """A file that could not be scored; the message names it."""


def score_piece(scorer: Scorer, piece: Piece, request: Request) -> Generator[int, None, dict[str, Any]]:
    """Scores a piece and writes it; yields the rows of each batch when it is scored, returns the piece's record.

    Raises FileError naming the file, and the row where there is one; nothing is then left of it.
    """
    file, output = piece.file, Output(request.output)
    tally = Tally.empty(scorer.encoder, scorer.experiment)
    columns = list(file.data.schema.names)
    labelled = file.labelled
    schema = output_schema(file, request, scorer.schema)
    done = 0

    def encoded() -> Iterator[tuple[pa.RecordBatch, Batch]]:
        """Batch after batch; the time that this takes counts as reading."""
        found = batches(piece, columns, request.batch_rows)
        while True:
            started = time.perf_counter()
            rows = next(found, None)
            if rows is None:
                return
            batch = scorer.encode(rows, tally.counts)
            tally.seconds["reading"] += time.perf_counter() - started
            yield rows, batch

    try:
        with (
            output.beside(piece.target) as sink,
            closing(ParquetSink(sink, schema, _footer(file))) as writer,
            closing(ahead(encoded(), AHEAD)) as source,
        ):
            for rows, batch in source:
                started = time.perf_counter()
                predictions = scorer.predict(batch)
                arrow = scorer.to_arrow(predictions)
                for name in scorer.columns:
                    tally.summaries[name].update(predictions[name])
                if labelled:
                    try:
                        tally.labelled.update(labelled, rows, predictions)
                    except ValueError as error:  # labels are not needed: scoring goes on without them, and says so
                        tally.notes.append(f"'{file.shown}': labels are not compared: {error}")
                        labelled = ()
                tally.seconds["scoring"] += time.perf_counter() - started
                writer.write(_output_rows(file, schema, rows, arrow))
                done += rows.num_rows
                tally.rows += rows.num_rows
                yield rows.num_rows
            tally.seconds["writing"] += writer.finish()
            record = _record(piece, tally, sink)
            sink.before_rename = lambda: _make_way(output, piece.target, record)
    except NonFiniteError as error:
        raise FileError(
            f"{_row(piece, done + error.row)}: {error}. Look at the features of that row"
            f"{' and at the formula' if error.column == SCORE else ''}."
        ) from error
    except BadRowsError as error:
        raise FileError(f"{_row(piece, done + int(error.rows[0]))}: {error.what}") from error
    except (ValueError, OSError, pa.ArrowException) as error:
        raise FileError(named(str(error), file.shown)) from error
    return record


def _row(piece: Piece, number: int) -> str:
    """File and row, in words, of a row of the piece; `number` counts from 0 those that `where` left."""
    begins = f" from row group {piece.row_groups[0].index} on" if piece.start else ""
    return f"'{piece.file.shown}', row {number} of those scored{begins}"


def _footer(file: InputFile) -> pq.FileMetaData:
    with open_file(file.data.files[0]) as parquet:
        return parquet.metadata


def _make_way(output: Output, target: str, record: dict[str, Any]) -> None:
    """Just before a file gets its place: what another job left there goes, then the record comes; never a record too many."""
    output.delete(f"{RECORDS}/{target}.json")
    output.delete(target)
    lasting = {key: value for key, value in record.items() if key != "seconds"}  # the same result, the same record
    output.write(f"{RECORDS}/{target}.json", json.dumps(lasting).encode())


def _record(piece: Piece, tally: Tally, sink: HashedSink) -> dict[str, Any]:
    return {
        "input": piece.file.shown,
        "output": piece.target,
        "identity": piece.file.identity,
        "bytes": sink.size,
        "sha256": sink.sha256,
        "rows_written": tally.rows,
        **tally.state(),
    }


def output_schema(file: InputFile, request: Request, made: pa.Schema) -> pa.Schema:
    """Kept columns with the types of the file, then the predictions; provenance as metadata, so that it is in the footer."""
    keys = dict(file.data.files[0].location.keys)
    stored = file.data.files[0].schema
    kept = [
        without_view(stored.field(name)) if name in stored.names and name not in keys else file.data.schema.field(name)
        for name in file.kept
    ]
    return pa.schema([*kept, *made], {METADATA_KEY: json.dumps(request.provenance, sort_keys=True)})


def _output_rows(file: InputFile, schema: pa.Schema, rows: pa.RecordBatch, made: pa.RecordBatch) -> pa.RecordBatch:
    arrays = []
    for name in file.kept:
        column, wanted = rows.column(name), schema.field(name).type
        arrays.append(column if column.type == wanted else column.cast(wanted))
    return pa.RecordBatch.from_arrays([*arrays, *made.columns], schema=schema)


def join(
    file: InputFile, pieces: Sequence[Piece], chosen: Sequence[NDArray[np.int64]] | None, request: Request
) -> dict[str, Any]:
    """Puts a file together from its pieces; of each piece all rows, or those `chosen`. Returns its record."""
    output = Output(request.output)
    records = [json.loads(output.read(f"{RECORDS}/{piece.target}.json")) for piece in pieces]
    written = 0
    with pq.ParquetFile(output.filesystem.open_input_file(output.path(pieces[0].target))) as first:
        schema = first.schema_arrow
    # of the input, as for a file that is scored whole: the bytes are the same, however it was cut
    with output.beside(file.relative) as sink, closing(ParquetSink(sink, schema, _footer(file))) as writer:
        for number, piece in enumerate(pieces):
            start = 0
            with pq.ParquetFile(output.filesystem.open_input_file(output.path(piece.target))) as parquet:
                for group in range(parquet.num_row_groups):
                    rows = parquet.read_row_group(group).combine_chunks()
                    stop = start + rows.num_rows
                    if chosen is not None:
                        own = chosen[number]
                        rows = rows.take(pa.array(own[(own >= start) & (own < stop)] - start))
                    for batch in rows.to_batches():
                        writer.write(batch)
                        written += batch.num_rows
                    start = stop
        writer.finish()
        record = {
            "input": file.shown,
            "output": file.relative,
            "identity": file.identity,
            "bytes": sink.size,
            "sha256": sink.sha256,
            "rows_written": written,
            "pieces": [{key: value for key, value in each.items() if key != "identity"} for each in records],
        }
        sink.before_rename = lambda: _make_way(output, file.relative, record)
    return record


def best_rows(pieces: Sequence[Piece], request: Request) -> list[NDArray[np.int64]]:
    """For each piece, the rows that are among the `top` of their group by `score`, over all pieces; ascending.

    Equal scores: the earlier row wins. Rows without a group are a group. Memory: 24 bytes for each row that is among the
    best of its own piece.
    """
    assert request.top is not None
    assert request.by is not None
    output = Output(request.output)
    common = group_type(request.by, [piece.file for piece in pieces])
    keys, scores, places, owners = [], [], [], []
    for number, piece in enumerate(pieces):
        table = pq.read_table(
            output.path(piece.target), columns=[request.by, SCORE], filesystem=output.filesystem, partitioning=None
        )
        key_N = group_keys(group_column(table[request.by], common, request.by, piece.file), f"--by {request.by}")
        score_N = table[SCORE].to_numpy()
        row_N = _best(key_N, score_N, request.top)
        keys.append(key_N[row_N])
        scores.append(score_N[row_N])
        places.append(row_N)
        owners.append(np.full(len(row_N), number, np.int32))
    key, score, place, owner = (np.concatenate(parts) for parts in (keys, scores, places, owners))
    chosen = _best(key, score, request.top)
    return [place[chosen[owner[chosen] == number]] for number in range(len(pieces))]


def _best(key_N: NDArray[np.int64], score_N: NDArray[np.float32], top: int) -> NDArray[np.int64]:
    """The rows with the `top` largest scores of each key, ascending.

    >>> _best(np.array([7, 7, 8, 7]), np.array([0.1, 0.3, 0.2, 0.3], np.float32), 2).tolist()
    [1, 2, 3]
    """
    order = np.lexsort((np.arange(len(key_N)), -score_N, key_N))
    sorted_key = key_N[order]
    starts = np.flatnonzero(np.r_[True, sorted_key[1:] != sorted_key[:-1]]) if len(key_N) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(key_N)])
    rank = np.arange(len(key_N)) - np.repeat(starts, lengths)
    return np.sort(order[rank < top])
