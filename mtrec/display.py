"""What a person sees in the terminal: progress, metrics, the report of a check. Reads events from a run's log.jsonl."""

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mtrec.checkpoint import Checkpoint
from mtrec.kinds import counted
from mtrec.recorder import whole_lines
from mtrec.run import Run
from mtrec.terminal import console, say

QUIET_SECONDS = 5.0  # where the output is no terminal, a line at most so often

MEANINGS = {
    "auc": "AUC",
    "gauc": "GAUC",
    "log_loss": "log loss",
    "normalized_entropy": "NE",
    "calibration": "sum p / sum y",
    "ece": "ECE",
    "xauc": "XAUC",
    "mae": "MAE",
    "rmse": "RMSE",
    "r2": "R2",
    "r2_log1p": "R2 log1p",
    "sum_ratio": "sum p / sum y",
    "accuracy": "accuracy",
}


class TrainDisplay:
    """Progress of one training, read from the run's log."""

    def __init__(self, folder: Path) -> None:
        self._console = console()
        self._folder = folder
        self._log: io.TextIOWrapper | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._printed = 0.0
        self._metrics: dict[str, Any] | None = None
        self.ended: str | None = None  # the reason, once training has ended
        self._began = time.monotonic()

    def __enter__(self) -> "TrainDisplay":
        return self

    def __exit__(self, *error: object) -> None:
        """Gives the terminal back as it was, also after an error."""
        if self._progress is not None:
            self._progress.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """Around the fit of vocabularies and statistics."""
        with self._console.status("checking the data, fitting vocabularies and statistics ..."):
            yield

    def say(self, line: str) -> None:
        """Prints a line as it is."""
        say(self._console, line)

    def start(self, run: Run, resumed: Checkpoint | None) -> None:
        """Says what is trained, and begins to follow the log."""
        rows = run.info["train"]["rows"]
        tables = run.encoder.tables
        size = filesize.decimal(sum(table.num_embeddings * table.dim * 4 for table in tables))
        say(
            self._console,
            f"{rows:,} training rows, batches of {run.experiment.data.batch_size:,}, "
            f"{len(tables)} tables ({size}), {run.experiment.model.architecture.kind}, "
            f"tasks {', '.join(run.experiment.tasks)}",
            word=f"run {run.folder}",
            style="bold",
        )
        kept = run.info["train"].get("kept", rows)
        if kept < rows:
            size_kept = int(run.experiment.data.batch_size) * kept / rows  # type: ignore[arg-type]
            self._console.print(
                f"{kept:,} of the rows are trained on (`where`, bad rows): a batch holds {size_kept:,.0f} of them on average",
                soft_wrap=True,
            )
        for note in run.info.get("notes", []):  # files that differ, days without files
            self.say(note)
        if resumed is not None:
            self._console.print(f"continues from step {resumed.step:,} ({resumed.folder.name})")
        path = self._folder / "log.jsonl"
        path.touch()
        self._log = path.open(encoding="utf-8")
        self._log.seek(whole_lines(path))  # a line that was cut short is taken away when the training goes on
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._console,
            )
            self._task = self._progress.add_task("starting workers", total=None)
            self._progress.start()

    def poll(self) -> None:
        """Shows what was logged since the last call."""
        while self._log is not None:
            position = self._log.tell()
            line = self._log.readline()
            if not line.endswith("\n"):
                self._log.seek(position)  # a line that is being written
                return
            self._show(json.loads(line))

    def _show(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            losses = "  ".join(f"{name} {value:.4f}" for name, value in event["losses"].items())
            text = f"{event['rows_per_second']:,.0f} rows/s, data wait {event['data_wait']:.0%}, losses {losses}"
            if event["nonfinite_steps"]:
                text += f", {counted(event['nonfinite_steps'], 'step')} not finite"
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, completed=event["step"], total=event["total_steps"], description=text)
            elif time.monotonic() - self._printed > QUIET_SECONDS or event["step"] == event["total_steps"]:
                self._printed = time.monotonic()
                self._console.print(f"step {event['step']:,}/{event['total_steps']:,}  {text}", soft_wrap=True)
        elif event["event"] == "validation":
            self._metrics = event["metrics"]
            metric = "undefined" if event["metric"] is None else f"{event['metric']:.5f}"
            self._console.print(
                f"step {event['step']:,}: validation of {self._metrics['rows']:,} rows in {event['seconds']:.1f} s, "
                f"metric {metric}"
            )
        elif event["event"] == "warmstarted":
            say(self._console, f"starts from the weights of {event['folder']}")
            for note in event["notes"]:
                say(self._console, f"  {note}")
        elif event["event"] == "restarted":
            self._console.print(
                _restart(event),
                soft_wrap=True,
                markup=False,  # an error's text may hold brackets
                style="yellow",
            )
        elif event["event"] == "ended":
            self.ended = event["reason"]
            reason = {
                "finished": "all epochs done",
                "early_stopping": "stopped early",
                "max_steps": "max_steps reached",
                "stopped": "asked to stop",
            }
            best = f", best at step {event['best_step']:,}" if event["best_step"] else ""
            self._console.print(f"ended at step {event['step']:,}: {reason[event['reason']]}{best}")
            for what, count in event["skipped_rows"].items():
                say(self._console, f"{counted(count, 'row')} left out: {what}", style="yellow")

    def close(self) -> None:
        """Prints the last validation's metrics and where the run lies."""
        self.poll()
        self.__exit__()
        if self._metrics is not None:
            show_metrics(self._metrics, title="validation", to=self._console)
        self._console.print(
            f"run folder: {self._folder}  ({time.monotonic() - self._began:.0f} s in all)", soft_wrap=True
        )


def _restart(event: Mapping[str, Any]) -> str:
    """One line about workers that died, or that became more or fewer.

    >>> event = {"step": 20, "repeated_steps": 5, "world_size": 1, "world_size_before": 2, "cause": "worker 1 died"}
    >>> _restart(event)
    'worker 1 died: went on with 1 worker instead of 2 from the checkpoint of step 20; 5 logged steps are repeated'
    >>> _restart(event | {"world_size": 2, "world_size_before": 1, "cause": None})
    'grew from 1 to 2 workers: went on from the checkpoint of step 20; 5 logged steps are repeated'
    """
    size, before = event["world_size"], event["world_size_before"]
    if event["cause"] is None:
        what = f"{'grew' if size > before else 'shrank'} from {before} to {counted(size, 'worker')}: went on"
    else:
        what = f"{event['cause']}: went on with {counted(size, 'worker')}" + (f" instead of {before}" if size != before else "")
    return f"{what} from the checkpoint of step {event['step']:,}; {event['repeated_steps']:,} logged steps are repeated"


def show_metrics(metrics: Mapping[str, Any], title: str, to: Console | None = None) -> None:
    """A table a task, with a row for all rows and one for each value of `by`; `_given` metrics get rows of their own."""
    to = to or console()
    groups = {"all": metrics} | {
        f"{column} = {value}": part for column, values in metrics.get("by", {}).items() for value, part in values.items()
    }
    for task in metrics["tasks"]:
        of_groups = {group: part["tasks"][task] for group, part in groups.items() if task in part["tasks"]}
        names = [name for name in MEANINGS if any(_has(found, name) for found in of_groups.values())]
        table = Table(box=None, pad_edge=False)
        if len(groups) > 1:
            table.add_column("", overflow="fold")  # what has no room; the numbers have
        table.add_column("rows", justify="right", no_wrap=True)
        for name in names:
            table.add_column(MEANINGS[name], justify="right", min_width=6)
        for group, found in of_groups.items():
            for suffix in ("", "_given"):
                if not any(f"{name}{suffix}" in found for name in names):
                    continue
                rows = found.get(f"rows{suffix}")
                cells = [group] if len(groups) > 1 else []
                cells.append(f"{rows:,}" + (" (given)" if suffix else "") if rows is not None else "")
                table.add_row(*cells, *(_number(found.get(f"{name}{suffix}")) for name in names))
        say(to, f"{title}: {task}", style="italic")  # the table's own would be as narrow as the table
        to.print(table)


def _has(found: Mapping[str, Any], name: str) -> bool:
    return found.get(name) is not None or found.get(f"{name}_given") is not None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:,.1f}"


def show_check(report: Mapping[str, Any]) -> None:
    """The tables of `mtrec check`."""
    to = console()
    for heading, rows in report["tables"].items():
        if not rows:
            continue
        table = Table(title=heading, title_justify="left", box=None, pad_edge=False, header_style="bold")
        for name in rows[0]:
            table.add_column(
                name, justify="right" if isinstance(rows[0][name], int | float) else "left", overflow="fold"
            )
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        to.print(table)
        to.print()
    for line in report["facts"]:
        to.print(line, soft_wrap=True)
    for warning in report["warnings"]:
        say(to, warning, word="warning", style="yellow")
    if report["warnings"]:
        say(to, "The experiment can be trained; look at the warnings.")
    else:
        say(to, "The experiment is sound.", style="green")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def show_rows(rows: Sequence[Mapping[str, str]], empty: str) -> None:
    """A table with a column a key, or the word for none."""
    to = console()
    if not rows:
        to.print(empty)
        return
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    to.print(table)


def show_run(found: Mapping[str, Any]) -> None:
    """The tables of `mtrec inspect`."""
    to = console()
    versions = ", ".join(f"{k} {v}" for k, v in found["info"]["versions"].items())
    say(to, f"made {found['info']['made']} with {versions}", word=str(found["run"]), style="bold")
    table = Table(title="checkpoints", title_justify="left", box=None, pad_edge=False)
    for name in ("folder", "step", "metric", "MB", "verified"):
        table.add_column(name)
    for each in found["checkpoints"]:
        megabytes = f"{each['bytes'] / 1e6:.1f}" if "bytes" in each else "-"
        table.add_row(
            each["folder"], _cell(each.get("step")), _cell(each.get("metric")), megabytes, each["problem"] or "yes"
        )
    to.print(table)
    tables = Table(title="tables", title_justify="left", box=None, pad_edge=False)
    for name in ("table", "rows", "known ids", "rows trained", "dim", "sharding", "MB"):
        tables.add_column(name)
    for each in found["tables"]:
        known = None if each.get("encoding") in ("hash", "identity") else each["used"]  # their rows are there for any id
        tables.add_row(
            each["table"],
            *(_cell(value) for value in (each["rows"], known, each["touched"], each["dim"], each["sharding"])),
            f"{each['bytes'] / 1e6:.2f}",
        )
    to.print(tables)
    to.print("rows trained: those that a gradient reached, the rows for null and for unseen ids among them", soft_wrap=True)
