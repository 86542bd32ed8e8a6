"""Runs prepared from the small log, training them on spawned ranks, scoring with them."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from logs import experiment_tree, write_log
from ranks import run_ranks

from mtrec import parallel
from mtrec.checkpoint import Saver, find, read
from mtrec.config import apply_overrides, parse_experiment
from mtrec.dataset import Source
from mtrec.events import Step, Validation
from mtrec.prepare import prepare
from mtrec.run import Run, open_run
from mtrec.scored_files import Asked, score_files
from mtrec.step import TrainState
from mtrec.train import train


def small_run(
    folder: Path,
    *overrides: str,
    rows: int = 4_000,
    tree: Mapping[str, Any] | None = None,
    previous: Run | None = None,
) -> Run:
    """A prepared run over a small log in `folder` (written on first use); the run's own folder is new each time."""
    log = folder / f"log-{rows}"
    if not log.exists():
        write_log(log / "train", rows=rows)
        write_log(log / "validation", rows=1_000, seed=1)
    whole = apply_overrides(copy.deepcopy(tree or experiment_tree(log / "train", log / "validation")), overrides)
    number = len(list(folder.glob("run-*")))
    return prepare(parse_experiment(whole), folder / f"run-{number}", previous)


def gathered(state: TrainState, folder: Path) -> dict[str, torch.Tensor] | None:
    """Everything in the state, gathered to rank 0 (None elsewhere); a collective."""
    saved = Saver(folder, keep_last=1, keep_best=0, in_background=False).save(state.tensors(), {"step": state.step})
    return read(saved) if parallel.rank() == 0 else None


def trained(folder: str, resume: bool = False) -> dict[str, Any]:
    """Trains the run in this process (one of the ranks); losses of every step and the last metrics."""
    torch.set_num_threads(1)
    run = Run(Path(folder))
    found = find(run.checkpoints) if resume else []
    losses, metrics = [], None
    for event in train(run, device=torch.device("cpu"), resume_from=found[0] if found else None):
        if isinstance(event, Step):
            losses.append([event.losses[name] for name in sorted(event.losses)])
        elif isinstance(event, Validation):
            metrics = event.metrics
    return {"losses": torch.tensor(losses, dtype=torch.float64), "metrics": metrics, "rank": os.environ.get("RANK")}


def train_on(world_size: int, run: Run, resume: bool = False) -> dict[str, Any]:
    """What rank 0 saw when `world_size` spawned ranks trained the run."""
    return run_ranks(world_size, trained, str(run.folder), resume, folder=run.folder / "ranks")[0]


def run_to_score(folder: Path, world_size: int) -> Run:
    """A run that such many ranks have trained, with a learning rate that shows in what it predicts."""
    run = small_run(folder, "optimizer.dense.learning_rate=0.02")
    train_on(world_size, run)
    return open_run(run.folder)


def score(run: Run, source: Path | str, out: Path, **options: Any) -> dict[str, Any]:
    """The manifest of a job in this process; `options` are those of `Asked`, and `where`."""
    where = options.pop("where", None)
    return score_files(Asked(str(run.folder), Source(str(source), where), str(out), **options))
