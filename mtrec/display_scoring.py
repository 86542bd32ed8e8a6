"""What a person sees of `mtrec score`: progress, and what came out of it."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mtrec.kinds import counted
from mtrec.terminal import console, say

DRIFT_PSI = 0.25  # Siddiqi (2006): above it is a shift
UNSEEN_SHARE = 0.01  # of a feature's ids, from which on it is listed


class ScoreDisplay:
    """The progress bar of a scoring job: `start` once, `advance` for rows; a context."""

    def __init__(self) -> None:
        self._console = console()
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._progress is not None:
            self._progress.stop()

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        say(self._console, line)

    def start(self, facts: Mapping[str, Any]) -> None:
        """Says what there is to do: the argument of `score_files`' `on_start`."""
        chosen = f" to look through for those with {facts['where']}" if facts["where"] is not None else ""
        finished = f", {facts['finished']:,} of them finished already" if facts["finished"] else ""
        say(
            self._console,
            f"{counted(facts['files'], 'file')}, {counted(facts['rows'], 'row')}{chosen}{finished}; {facts['run']}, "
            f"{facts['checkpoint']}; score = {facts['formula']}",
        )
        for message in facts["failed"].values():
            say(self._console, message, word="not scored", style="red")
        if self._console.is_terminal and facts["rows_left"]:
            self._progress = Progress(
                TextColumn("rows"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), console=self._console
            )
            self._task = self._progress.add_task("scoring", total=facts["rows_left"])
            self._progress.start()

    def advance(self, rows: int) -> None:
        """So many more rows are scored."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, rows)


def show_scoring(manifest: Mapping[str, Any], output: str) -> None:
    """The tables that end `mtrec score`: what `score_files` returned."""
    to = console()
    predictions = Table(title="predictions, and what they were in training", title_justify="left", box=None, pad_edge=False)
    predictions.add_column("", no_wrap=True)
    for name in ("mean", "p1", "p10", "p50", "p90", "p99", "PSI"):
        predictions.add_column(name, justify="right")
    for column, found in manifest["predictions"].items():
        for side, heading in (("", column), ("training_", "  in training")):
            shown = [found[f"{side}{key}"] for key in ("mean", "q0.01", "q0.1", "q0.5", "q0.9", "q0.99")]
            predictions.add_row(heading, *map(_number, shown), "" if side else _number(found["psi"]))
    to.print(predictions)
    if manifest["labels"]:
        labels = Table(title="against the labels in the input", title_justify="left", box=None, pad_edge=False)
        for name in ("task", "rows", "AUC (binned)", "sum p / sum y"):
            labels.add_column(name, justify="left" if name == "task" else "right")
        for task, found in manifest["labels"].items():
            labels.add_row(task, f"{found['rows']:,}", _number(found.get("auc")), _number(found["calibration"]))
        to.print(labels)
    unseen = {
        name: each["unseen_share"] for name, each in manifest["features"].items() if (each["unseen_share"] or 0) > UNSEEN_SHARE
    }
    if unseen:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in sorted(unseen.items(), key=lambda item: -item[1]))
        say(to, f"ids not seen in training: {shares}")
    for name, found in manifest["predictions"].items():
        if (found["psi"] or 0) > DRIFT_PSI:
            drift = f"{name} has drifted since training: PSI {found['psi']:.2f} (above {DRIFT_PSI} is a shift)"
            say(to, drift, word="warning", style="yellow")
    for name in manifest["null_jumps"]:
        jump = f"`features.{name}` has more than 10 points more nulls than in training"
        say(to, jump, word="warning", style="yellow")
    for note in manifest["notes"]:
        say(to, note, word="note", style="yellow")
    removed = manifest["session"]["removed"]
    if removed:
        listed = ", ".join(removed[:3]) + (", ..." if len(removed) > 3 else "")
        deleted = f"{counted(len(removed), 'file')} deleted, made of files that are not in INPUT any more: {listed}"
        say(to, deleted, word="note", style="yellow")
    _show_session(manifest["session"], to)
    if not manifest["rows"] and manifest["where"] is not None:
        say(to, f"no row of the input fulfils --where {manifest['where']}", word="warning", style="yellow")
    say(
        to,
        f"{counted(len(manifest['files']), 'file')}, {counted(manifest['rows'], 'row')} in {output}; "
        f"what they are: {output}/_manifest.json",
    )
    if manifest["failed"]:
        say(to, f"{counted(len(manifest['failed']), 'file')} could not be scored:", style="red")
        for message in manifest["failed"].values():
            say(to, f"  {message}")


def _show_session(session: Mapping[str, Any], to: Console) -> None:
    if not session["rows"]:
        to.print("nothing was left to score")
        return
    spent = sum(session["seconds"].values())
    shares = ", ".join(f"{name} {seconds / spent:.0%}" for name, seconds in session["seconds"].items()) if spent else ""
    say(
        to,
        f"{session['rows'] / session['wall_seconds']:,.0f} rows/s over {session['wall_seconds']:.1f} s ({shares}); "
        f"golden rows differ by at most {session['golden']:.1g}",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
