"""Sees what `mtrec.train.train` does, from inside of the rank: the row ids of every batch, the state before its first step.

The wrappers are put around `feed` and `train_step` in the rank's own process. Ranks that a test starts call `watch`; workers of
Ray, which it does not start, load this module because an experiment names a feature's kind `witness:RowId` (see ray_trials.py).
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from runs import gathered

import mtrec.train
from mtrec.features import Categorical


class RowId(Categorical):
    """The feature that brings the row's number into the batches."""


def watch(folder: Path, attempt: str, restored: dict[str, torch.Tensor], seconds_per_step: float = 0.0) -> None:
    """From now on this rank writes {batch, rows} to `folder`/rows-`attempt`-`rank`.jsonl.

    Rank 0 also puts the state before its first step into `restored`, gathered (and a checkpoint of it into
    `folder`/restored-`attempt`); every step takes `seconds_per_step` longer.
    """
    feed, train_step, rank = mtrec.train.feed, mtrec.train.train_step, os.environ.get("RANK", "0")
    begun = False

    def recording_feed(*arguments: Any, **options: Any) -> Iterator[Any]:
        with (
            contextlib.closing(feed(*arguments, **options, keep_rows=True)) as fed,
            (folder / f"rows-{attempt}-{rank}.jsonl").open("a") as out,
        ):
            for item in fed:
                piece = item.piece
                rows = piece.record_batch["row_id"].to_pylist()
                out.write(json.dumps({"batch": [piece.epoch, piece.index], "rows": rows, "time": time.time()}) + "\n")
                out.flush()
                yield item

    def watched_step(state: Any, batch: Any, **options: Any) -> Any:
        nonlocal begun
        if not begun:
            restored.update(gathered(state, folder / f"restored-{attempt}") or {})
            begun = True
        time.sleep(seconds_per_step)
        return train_step(state, batch, **options)

    mtrec.train.feed, mtrec.train.train_step = recording_feed, watched_step  # type: ignore[assignment]


def batches(folder: Path, attempt: str, steps_per_epoch: int) -> dict[int, list[int]]:
    """{step: row ids of its global batch, rank after rank} of an attempt. Raises AssertionError for a batch fed twice."""
    found: dict[int, list[int]] = {}
    for path in sorted(folder.glob(f"rows-{attempt}-*.jsonl")):
        seen = set()
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                event = json.loads(line)
                epoch, index = event["batch"]
                step = epoch * steps_per_epoch + index + 1
                assert step not in seen, f"{path.name} was fed batch {index} of epoch {epoch} twice"
                seen.add(step)
                found.setdefault(step, []).extend(event["rows"])
    return found


if "WITNESS_FOLDER" in os.environ and "MASTER_PORT" in os.environ:  # in a worker of Ray: all of one attempt share the port
    _slow = json.loads(os.environ.get("WITNESS_SECONDS_PER_STEP", "{}"))
    watch(
        Path(os.environ["WITNESS_FOLDER"]),
        os.environ["MASTER_PORT"],
        {},
        float(_slow.get(os.environ["WORLD_SIZE"], 0.0)),
    )
