"""A scoring job from its first check to its manifest; who scores the pieces (this process, Ray actors) is passed in."""

import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.fs
import torch

from mtrec.checkpoint import Checkpoint
from mtrec.dataset import Source
from mtrec.files import check_not_empty
from mtrec.formula import ranking_formula
from mtrec.kinds import counted
from mtrec.metrics import DistributionSummary
from mtrec.run import Run, open_run, versions
from mtrec.score import (
    Scorer,
    Tally,
    check_golden,
    check_memory,
    checkpoint_digest,
    free_memory,
    null_jumps,
    open_scorer,
    training_summaries,
)
from mtrec.scored_files.inputs import (
    INPUT,
    PIECES,
    InputFile,
    Piece,
    Request,
    check_output,
    group_type,
    open_inputs,
    plan_pieces,
    sampled_counts,
)
from mtrec.scored_files.output import RECORDS, Output, read_record, recorded_files, stored_record
from mtrec.scored_files.pieces import FileError, best_rows, join, score_piece

MANIFEST = "_manifest.json"
BATCH_ROWS = 16_384  # of the reference workload 4 % more rows/s than 8,192, 3 % more than 32,768
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
JOINERS = 4  # threads that put pieces together; the work is pyarrow's


@dataclasses.dataclass(frozen=True)
class Work:
    """All that a worker must know to score pieces of this job (picklable)."""

    run: str
    checkpoint: Checkpoint
    formula: str
    request: Request


@dataclasses.dataclass(frozen=True)
class Progress:
    """Of a worker: it is ready (`golden`: largest difference of a golden row), or has scored `rows` more."""

    rows: int = 0
    golden: float | None = None


@dataclasses.dataclass(frozen=True)
class Done:
    """Piece number `index` is written (`record`), or could not be (`problem`)."""

    index: int
    record: dict[str, Any] | None = None
    problem: str | None = None


Event = Progress | Done
Spread = Callable[[Work, Sequence[Piece]], Iterator[Event]]


def score_here(work: Work, pieces: Sequence[Piece]) -> Iterator[Event]:
    """Scores the pieces in this process, one after the other."""
    run = open_run(work.run)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    check_memory(run.encoder, free_memory(device), "this machine")
    with open_scorer(run, work.checkpoint, ranking_formula(run.experiment, work.formula), device) as scorer:
        yield Progress(golden=check_golden(scorer, run, work.checkpoint))
        for index, piece in enumerate(pieces):
            yield from scored(scorer, index, piece, work.request)


def scored(scorer: Scorer, index: int, piece: Piece, request: Request) -> Iterator[Event]:
    """The events of one piece, `Done` the last; rows are told of about twice a second."""
    rows, told = 0, time.monotonic()
    steps = score_piece(scorer, piece, request)
    while True:
        try:
            rows += next(steps)
        except StopIteration as end:
            yield Progress(rows=rows)
            yield Done(index, record=end.value)
            return
        except FileError as error:
            yield Done(index, problem=str(error))
            return
        if time.monotonic() - told > 0.5:
            yield Progress(rows=rows)
            rows, told = 0, time.monotonic()


@dataclasses.dataclass(frozen=True)
class Asked:
    """The words of the command `mtrec score`; see `Request` for those that are not plain."""

    run: str
    source: Source
    output: str
    columns: tuple[str, ...] | None = None
    formula: str | None = None
    top: int | None = None
    by: str | None = None
    overwrite: bool = False
    allow_null_jump: bool = False
    batch_rows: int = BATCH_ROWS


def score_files(
    asked: Asked,
    spread: Spread = score_here,
    *,
    workers: int = 1,
    on_start: Callable[[dict[str, Any]], None] = lambda facts: None,
    on_rows: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Scores the files of a source with a run's best checkpoint; returns the manifest and, as `session`, what this call did.

    Args:
        spread: scores pieces and yields what happens; `workers` of them at once.
        on_start: told what there is to do (files, rows, finished), before the first worker starts.
        on_rows: told of rows as they are scored.

    Files that cannot be scored are in the manifest's `failed`; the others are scored. Raises ValueError before anything is
    scored where run, formula, columns, output or null shares forbid it, LockedError where another process scores into the same
    local folder, CheckpointError where golden rows differ.
    """
    began = time.monotonic()
    run = open_run(asked.run)
    work = _work(asked, run)
    request = work.request
    files, failed = _inputs(request, run)
    output = Output(request.output)
    check_output(output.filesystem, output.base, request.source.path, files)
    with output.locked():
        manifest, session = _score_files(asked, run, work, files, failed, spread, workers, on_start, on_rows)
    return {**manifest, "session": {**session, "wall_seconds": time.monotonic() - began}}


def _score_files(
    asked: Asked,
    run: Run,
    work: Work,
    files: Sequence[InputFile],
    failed: dict[str, str],
    spread: Spread,
    workers: int,
    on_start: Callable[[dict[str, Any]], None],
    on_rows: Callable[[int], None],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the manifest, what this call did) for the files that can be opened; `failed`: {path: what is wrong with the others}."""
    request, output = work.request, Output(work.request.output)
    finished = {file.relative for file in files if read_record(output, file.relative, file.identity) is not None}
    _check_nothing_is_replaced(request, output, [file for file in files if file.relative not in finished])
    lost = _outputs_of_lost_inputs(request, output, files)
    if request.top is not None and len(finished) < len(files):
        finished = set()  # the best rows are chosen among those of all files: a file is only done when all are
    pending = [file for file in files if file.relative not in finished]
    failed.update(_check_rows(run, pending, asked.allow_null_jump))
    sound = [file for file in pending if file.shown not in failed]
    pieces = plan_pieces(sound, workers, split=request.top is not None)
    left = [piece for piece in pieces if piece.whole or read_record(output, piece.target, piece.file.identity) is None]
    on_start(
        {
            "files": len(files),
            "finished": len(finished),
            "rows": sum(file.data.num_rows for file in files),  # of the row groups in which `where` can be true
            "where": asked.source.where,
            "rows_left": sum(piece.rows for piece in left),
            "failed": dict(failed),
            **request.provenance,
        }
    )
    told = _run(work, left, spread, on_rows)
    failed.update(told.problems)
    _join_pieces(pieces, failed, request)
    records = _records(output, [file for file in files if file.shown not in failed])
    for target in lost:
        output.delete(f"{RECORDS}/{target}.json")
        output.delete(target)
    manifest = _manifest(run, work, records, failed)
    output.write(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    if not failed:
        for folder in (PIECES, f"{RECORDS}/{PIECES}"):
            output.delete_folder(folder)
    session = {
        "rows": sum(piece.rows for piece in left if piece.file.shown not in failed),
        "golden": told.golden,
        "seconds": told.seconds,
        "removed": lost,
    }
    return manifest, session


def _work(asked: Asked, run: Run) -> Work:
    """What is asked, made definite: paths absolute, the formula parsed, the checkpoint chosen and hashed."""
    formula = ranking_formula(run.experiment, asked.formula)
    if (asked.top is None) != (asked.by is None):
        raise ValueError("--top K and --by COLUMN should come together: the best K rows of each value of the column.")
    check_not_empty(asked.source.path, f"{INPUT} ")
    check_not_empty(asked.output, "OUTPUT ")
    found = run.best()
    request = Request(
        source=dataclasses.replace(asked.source, path=_absolute_paths(asked.source.path)),
        output=_absolute(asked.output),
        columns=asked.columns,
        top=asked.top,
        by=asked.by,
        batch_rows=asked.batch_rows,
        overwrite=asked.overwrite,
        provenance={
            "run": str(run.folder),
            "checkpoint": found.folder.name,
            "checkpoint_sha256": checkpoint_digest(found),
            "formula": formula.text,
            "version": versions().get("mtrec", "not installed"),
        },
    )
    return Work(str(run.folder), found, formula.text, request)


def _absolute(path: str) -> str:
    """Workers may have another current folder."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _absolute_paths(paths: str | Sequence[str]) -> str | list[str]:
    return _absolute(paths) if isinstance(paths, str) else [_absolute(path) for path in paths]


def _inputs(request: Request, run: Run) -> tuple[list[InputFile], dict[str, str]]:
    """The files that can be scored, and {path: what is wrong} of the others. Raises ValueError where there is none to score."""
    made = Tally.empty(run.encoder, run.experiment)
    files, failed = open_inputs(request, run.encoder, made.labelled, tuple(made.summaries))
    if not files:
        shown = list(failed.values())[:3]
        raise ValueError("\n".join([*shown, *([f"... and {counted(len(failed) - 3, 'more file')}"] if len(failed) > 3 else [])]))
    if request.by is not None:
        group_type(request.by, files)
    return files if request.top is None else _one_identity(files), failed


def _one_identity(files: Sequence[InputFile]) -> list[InputFile]:
    """With `top`, every file's result depends on all files."""
    every = hashlib.sha256("".join(file.identity for file in files).encode()).hexdigest()
    return [dataclasses.replace(file, identity=hashlib.sha256((file.identity + every).encode()).hexdigest()) for file in files]


def _check_nothing_is_replaced(request: Request, output: Output, pending: Sequence[InputFile]) -> None:
    there = [file.relative for file in pending if output.exists(file.relative)]
    there = [target for target in there if stored_record(output, target) != {}]  # a damaged record: the file is scored anew
    if there and not request.overwrite:
        raise ValueError(
            f"OUTPUT {request.output} holds {_several(there)} already, made by another job: another checkpoint, formula, choice "
            "of columns or rows, mtrec, or other input. Add --overwrite to replace them, or choose another folder."
        )


def _outputs_of_lost_inputs(request: Request, output: Output, files: Sequence[InputFile]) -> list[str]:
    """The scored files in the output whose input lay in INPUT, and is not there any more; those of other inputs stay.

    Raises ValueError where there are some and --overwrite is not asked for.
    """
    own = {file.relative for file in files}
    others = [target for target in recorded_files(output) if target not in own]

    def is_lost(target: str) -> bool:
        record = stored_record(output, target) or {}
        return _is_lost(str(record.get("input")), files) and output.exists(target)

    with ThreadPoolExecutor(JOINERS) as pool:  # a folder of years of days on an object store has many
        lost = [target for target, gone in zip(others, pool.map(is_lost, others), strict=True) if gone]
    if lost and not request.overwrite:
        raise ValueError(
            f"OUTPUT {request.output} holds {_several(lost)}, made by an earlier job of files that are not in INPUT any more. "
            "Add --overwrite to delete what was made of them, or choose another folder."
        )
    return lost


def _is_lost(shown: str, files: Sequence[InputFile]) -> bool:
    """Whether the file of this name lay where this job's files lie, and is not there now."""
    for location in {file.data.files[0].location.root: file.data.files[0].location for file in files}.values():
        path = shown.removeprefix(location.shown.removesuffix(location.path))
        if path.startswith(f"{location.root}/"):
            return bool(location.filesystem.get_file_info(path).type == pa.fs.FileType.NotFound)
    return False


def _several(targets: Sequence[str]) -> str:
    return f"'{targets[0]}'" + (f" and {counted(len(targets) - 1, 'other file')}" if len(targets) > 1 else "")


def _check_rows(run: Run, files: Sequence[InputFile], allow_null_jump: bool) -> dict[str, str]:
    """{path: what is wrong} of files with rows that cannot be encoded, by a sample. Raises ValueError where nulls are many."""
    counts, bad = sampled_counts(files, run.encoder)
    jumps = {} if allow_null_jump else null_jumps(run.encoder, counts)
    if jumps:
        listed = "; ".join(f"`features.{name}`: {before:.1%} -> {now:.1%}" for name, (before, now) in jumps.items())
        raise ValueError(
            f"Nulls are more than 10 points more frequent in the input than in training ({listed}). If a source of these "
            "features is broken, the scores are worth little. If it is meant, add --allow-null-jump."
        )
    return bad


@dataclasses.dataclass
class _Told:
    """What the workers told: the largest difference of a golden row, what pieces took, {path: what is wrong with the file}."""

    golden: float | None
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"reading": 0.0, "scoring": 0.0, "writing": 0.0})
    problems: dict[str, str] = dataclasses.field(default_factory=dict)


def _run(work: Work, pieces: Sequence[Piece], spread: Spread, on_rows: Callable[[int], None]) -> _Told:
    """Has the pieces scored; no worker starts where there are none."""
    told = _Told(golden=0.0 if pieces else None)
    for event in spread(work, pieces) if pieces else ():
        if isinstance(event, Progress):
            told.golden = max(told.golden or 0.0, event.golden or 0.0)
            on_rows(event.rows)
        elif event.record is not None:
            for name in told.seconds:
                told.seconds[name] += event.record["seconds"][name]
        else:
            told.problems.setdefault(pieces[event.index].file.shown, event.problem or "")
    return told


def _join_pieces(pieces: Sequence[Piece], failed: dict[str, str], request: Request) -> None:
    """Files of several pieces, and with `top` all files, get their place."""
    cut = [piece for piece in pieces if not piece.whole and piece.file.shown not in failed]
    chosen = best_rows(cut, request) if request.top is not None and cut else None
    by_file: dict[str, list[int]] = {}
    for number, piece in enumerate(cut):
        by_file.setdefault(piece.file.relative, []).append(number)
    with ThreadPoolExecutor(JOINERS) as pool:
        joins = [
            pool.submit(
                join,
                cut[numbers[0]].file,
                [cut[number] for number in numbers],
                None if chosen is None else [chosen[number] for number in numbers],
                request,
            )
            for numbers in by_file.values()
        ]
        for each in joins:
            each.result()


def _records(output: Output, files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """The records of files that are finished."""
    records = []
    for file in files:
        record = read_record(output, file.relative, file.identity)
        assert record is not None, file.relative
        records.append(record)
    return records


def _manifest(run: Run, work: Work, records: Sequence[dict[str, Any]], failed: dict[str, str]) -> dict[str, Any]:
    """What stands in `_manifest.json`: the same for the same result, however it came about (no times in it)."""
    request, total = work.request, Tally.empty(run.encoder, run.experiment)
    for record in records:
        for part in record.get("pieces", [record]):
            total.merge(Tally.empty(run.encoder, run.experiment).restore(part))
    before = training_summaries(run, work.checkpoint, ranking_formula(run.experiment, work.formula))
    nulls, unseen = total.counts.null_share(), total.counts.unseen_share()
    return {
        "format": 1,
        **request.provenance,
        "input": request.source.path,
        "where": request.source.where,
        "top": request.top,
        "by": request.by,
        "complete": not failed,
        "rows": sum(record["rows_written"] for record in records),
        "rows_scored": total.rows,
        "files": [
            {"output": r["output"], "input": r["input"], "rows": r["rows_written"], "bytes": r["bytes"], "sha256": r["sha256"]}
            for r in records
        ],
        "failed": failed,
        "features": {
            name: {
                "null_share": _number(nulls[name]),
                "training_null_share": _number(float(run.encoder.statistics[name]["null_share"])),
                "unseen_share": _number(unseen[name]),
            }
            for name in nulls
        },
        "null_jumps": sorted(null_jumps(run.encoder, total.counts)),
        "predictions": {name: _against(before[name], summary) for name, summary in total.summaries.items()},
        "labels": total.labelled.compute(),
        "notes": total.notes,
    }


def _against(before: DistributionSummary, summary: DistributionSummary) -> dict[str, float | None]:
    """A column's distribution beside its training one."""
    figures = {}
    for side, each in (("", summary), ("training_", before)):
        figures[f"{side}mean"] = _number(each.mean)
        for share, value in zip(QUANTILES, each.quantiles(QUANTILES), strict=True):
            figures[f"{side}q{share:g}"] = _number(value)
    return {**figures, "psi": _number(before.stability_index(summary))}


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value
