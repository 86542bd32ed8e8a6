"""The log files of a run, which rank 0 writes from the events of its training."""

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mtrec.atomic import write_atomically
from mtrec.events import Event, Step, Validation

BLOCK_BYTES = 65_536


class Recorder:
    """Writes the events of rank 0 to `log.jsonl` and TensorBoard; the newest validation also to `metrics.json`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second, on rank 0 only

        self._folder = folder
        _drop_cut_line(folder / "log.jsonl")
        self._log = (folder / "log.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(folder / "tensorboard")

    def __call__(self, event: Event) -> None:
        line = {"event": type(event).__name__.lower(), "time": time.time(), **dataclasses.asdict(event)}
        try:
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
            if isinstance(event, Validation):
                write_atomically(self._folder / "metrics.json", json.dumps(event.metrics, indent=1))
        except OSError as error:
            raise ValueError(
                f"The log of {self._folder} cannot be written any more: {error}. --resume goes on from the newest checkpoint."
            ) from error
        for name, value in _scalars(event):
            self._board.add_scalar(name, value, event.step)

    def close(self) -> None:
        """Closes the log and the board; what was written stays."""
        with suppress(OSError):  # of a full disk: it was raised when the line was written
            self._log.close()
        self._board.close()


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
