"""The log files of a run, which rank 0 writes from the events of its training."""

import dataclasses
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mtrec.atomic import write_atomically
from mtrec.events import Event, Step, Validation

log = logging.getLogger(__name__)
BLOCK_BYTES = 65_536
METRICS = "metrics.json"
BOARDS = itertools.count()  # of this process


class Recorder:
    """Writes the events of rank 0 to `log.jsonl` and TensorBoard; the newest validation also to `metrics.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        _drop_cut_line(folder / "log.jsonl")
        self._log = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._board = Board(folder / "tensorboard")

    def __call__(self, event: Event) -> None:
        line = {"event": type(event).__name__.lower(), "time": time.time(), **dataclasses.asdict(event)}
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
            if isinstance(event, Validation):
                self._write_metrics(event.metrics)
        except OSError as error:
            raise ValueError(
                f"The log of {self._folder} cannot be written any more: {error}. --resume goes on from the newest checkpoint."
            ) from error
        self._board.add(event.step, dict(_scalars(event)))

    def catch_up(self, found: Mapping[str, Any] | None) -> None:
        """Writes the newest validation of the checkpoints where a kill, or a new machine, left it out here."""
        if found is None:
            return
        if not self._has(found):
            self(Validation(**found))
        elif _metrics(self._folder) != found["metrics"]:
            self._write_metrics(found["metrics"])

    def _has(self, validation: Mapping[str, Any]) -> bool:
        with (self._folder / "log.jsonl").open(encoding="utf-8") as lines:
            return any(_holds(line, validation) for line in lines if line.startswith('{"event": "validation"'))

    def _write_metrics(self, metrics: Mapping[str, Any]) -> None:
        write_atomically(self._folder / METRICS, json.dumps(metrics, indent=1))

    def close(self) -> None:
        """Closes the log and the board; what was written stays."""
        with suppress(OSError):  # of a full disk: it was raised when the line was written
            self._log.close()
        self._board.close()


def _holds(line: str, values: Mapping[str, Any]) -> bool:
    """Whether a line of the log says all of these."""
    with suppress(ValueError):
        event = json.loads(line)
        return bool(event == {**event, **values})
    return False


def _metrics(folder: Path) -> Any:
    """What metrics.json holds; None where it is missing or damaged."""
    with suppress(OSError, ValueError):
        return json.loads((folder / METRICS).read_text())
    return None


class Board:
    """A file of scalars for TensorBoard. One that cannot be written is let go with a warning: the log has all of it.

    torch's SummaryWriter writes in a thread, which prints a stack trace of its own where the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # on rank 0 only
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._folder = event_pb2.Event, summary_pb2.Summary, folder
        self._records: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(BOARDS)}"
            self._records = RecordWriter((folder / name).open("wb"))
        except OSError as error:
            self._let_go(error)
        self._write(file_version="brain.Event:2")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """The scalars of a step, by name."""
        if scalars:
            values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        """Closes the file; what was written stays."""
        records, self._records = self._records, None
        with suppress(OSError):  # every event was flushed
            if records is not None:
                records.close()

    def _write(self, **content: Any) -> None:
        if self._records is None:
            return
        try:
            self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
            self._records.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        log.warning("TensorBoard's file in %s cannot be written (%s): training goes on without it.", self._folder, error)
        self.close()


def _drop_cut_line(log: Path) -> None:
    """Takes away the end of a log that a full disk or a kill cut short: the next event would be glued to it."""
    if log.is_file():
        os.truncate(log, whole_lines(log))


def whole_lines(log: Path) -> int:
    """Bytes of a file up to the end of its last whole line."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - BLOCK_BYTES)
            file.seek(start)
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                return start + last + 1
            end = start
    return 0


def _scalars(event: Event) -> Iterator[tuple[str, float]]:
    if isinstance(event, Step):
        for group in ("losses", "weights", "balancing", "gates"):
            yield from ((f"{group}/{name}", value) for name, value in getattr(event, group).items())
        yield from ((f"speed/{name}", getattr(event, name)) for name in ("rows_per_second", "data_wait"))
        yield "learning_rate/dense", event.learning_rate
    elif isinstance(event, Validation):
        for task, metrics in event.metrics["tasks"].items():
            yield from (
                (f"validation/{task}/{name}", float(value)) for name, value in metrics.items() if value is not None
            )
