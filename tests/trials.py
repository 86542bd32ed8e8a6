"""A trial of resuming: ranks that train are killed, others go on, and what they did is held against a run that lived.

Training is `mtrec.train.train` itself. What it does is seen by a witness in the ranks' own processes (witness.py): the row ids
of every batch, the state before the first step. A wrapper around `train_step` sets off the SIGKILL.
"""

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import witness
from logs import experiment_tree
from ranks import run_dying_ranks, run_ranks
from runs import small_run

import mtrec.checkpoint
import mtrec.events
import mtrec.train
from mtrec.checkpoint import folder_of, newest, read
from mtrec.run import Run

ROWS, BATCH, EPOCHS = 3_000, 128, 2
STEPS_PER_EPOCH = 24
COMPARED_STEPS = 20
OVERRIDES = (
    f"training.epochs={EPOCHS}",
    "training.checkpoint_every=5",
    "training.validate_every=1000",
    "balancing.kind=gradnorm",  # a balancer with state of its own
    "balancing.every=3",
    "model.dropout=0.2",
    "model.architecture.gate_dropout=0.2",
    "features.user_id.sharding=column_wise",
    "features.user_id.num_column_shards=2",
    "features.item_id.sharding=table_wise",
    "features.tags.sharding=data_parallel",
)


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL to a rank, `seconds` after it has begun the step after `step` steps; or while it writes the next checkpoint."""

    rank: int
    step: int
    seconds: float = 0.0
    in_checkpoint: bool = False


@dataclasses.dataclass(frozen=True)
class Trial:
    """`before` ranks train, one is killed, `after` ranks go on."""

    before: int
    after: int
    seed: int

    def kill(self) -> Kill:
        drawn = random.Random(f"{self.before} {self.after} {self.seed}")
        return Kill(drawn.randrange(self.before), drawn.randrange(6, 25), drawn.uniform(0, 0.03))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a trial found; `failures` is empty where everything holds that should."""

    trial: Trial
    kill: Kill
    resumed_step: int
    died_at_step: int
    loss_difference: float
    metric_difference: float
    bit_equal: bool
    failures: tuple[str, ...]


def prepared(folder: Path) -> Run:
    """The run that all trials are copies of; a feature made of the row's number brings it into the batches."""
    tree: dict[str, Any] = experiment_tree(folder / f"log-{ROWS}" / "train", folder / f"log-{ROWS}" / "validation")
    tree["features"]["row"] = {"kind": "categorical", "column": "row_id", "encoding": "hash", "num_embeddings": 50}
    return small_run(folder, *OVERRIDES, f"data.batch_size={BATCH}", rows=ROWS, tree=tree)


def rank_that_trains(folder: str, attempt: str, kill: Kill | None) -> dict[str, Any] | None:
    """One rank of an attempt: `train()` from the newest checkpoint to its end, or to its death."""
    torch.set_num_threads(1)
    run, rank = Run(Path(folder)), int(os.environ["RANK"])
    restored: dict[str, torch.Tensor] = {}
    witness.watch(run.folder, attempt, restored)
    train_step, async_save = mtrec.train.train_step, mtrec.checkpoint.async_save

    def deadly_step(state: Any, batch: Any, **options: Any) -> Any:
        if kill is not None and not kill.in_checkpoint and (rank, state.step) == (kill.rank, kill.step):
            threading.Timer(kill.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return train_step(state, batch, **options)

    def deadly_save(*arguments: Any, **options: Any) -> Any:
        begun = async_save(*arguments, **options)
        if (
            kill is not None
            and kill.in_checkpoint
            and rank == kill.rank
            and options["checkpoint_id"] >= folder_of(run.checkpoints, kill.step)
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return begun

    mtrec.train.train_step = deadly_step  # type: ignore[assignment]
    mtrec.checkpoint.async_save = deadly_save
    metrics = None
    with (run.folder / f"losses-{attempt}.jsonl").open("a") as out:
        for event in mtrec.train.train(run, device=torch.device("cpu"), resume_from=newest(run.checkpoints)):
            if isinstance(event, mtrec.events.Step) and rank == 0:
                out.write(json.dumps({"step": event.step, "losses": event.losses}) + "\n")
                out.flush()
            elif isinstance(event, mtrec.events.Validation):
                metrics = event.metrics
    return {"restored": restored, "metrics": metrics}


def losses(run: Run, attempt: str) -> dict[int, dict[str, float]]:
    """{step: losses} of an attempt; a line cut short by the kill is left out."""
    found = {}
    for line in (run.folder / f"losses-{attempt}.jsonl").read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            event = json.loads(line)
            found[event["step"]] = event["losses"]
    return found


def batches(run: Run, attempt: str) -> dict[int, list[int]]:
    return witness.batches(run.folder, attempt, STEPS_PER_EPOCH)


def copy_of(run: Run, folder: Path) -> Run:
    shutil.copytree(run.folder, folder)
    return Run(folder)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The run that nobody killed."""

    losses: dict[int, dict[str, float]]
    state: dict[str, torch.Tensor]
    metrics: dict[str, Any]
    batches: dict[int, list[int]]


@cache
def reference(base: Run, world_size: int) -> Reference:
    run = copy_of(base, base.folder.parent / f"reference-{world_size}")
    ended = run_ranks(world_size, rank_that_trains, str(run.folder), "whole", None, folder=run.folder)
    last = newest(run.checkpoints)
    assert last is not None
    return Reference(losses(run, "whole"), read(last.folder), ended[0]["metrics"], batches(run, "whole"))


def conduct(base: Run, trial: Trial, kill: Kill | None = None) -> Outcome:
    """Kills (by default where the seed says), resumes, compares."""
    whole = reference(base, trial.before)
    run = copy_of(base, base.folder.parent / f"trial-{trial.before}-{trial.after}-{trial.seed}-{kill is None}")
    kill = kill or trial.kill()
    codes = run_dying_ranks(trial.before, rank_that_trains, str(run.folder), "first", kill, folder=run.folder)
    failures = [] if codes[kill.rank] == -signal.SIGKILL else [f"rank {kill.rank} should die of SIGKILL; exit codes {codes}"]
    saved = newest(run.checkpoints)
    at = saved.step if saved else 0
    before = read(saved.folder) if saved else None
    ended = run_ranks(trial.after, rank_that_trains, str(run.folder), "second", None, folder=run.folder)[0]
    last = newest(run.checkpoints)
    assert last is not None

    failures += wrongly_restored(before, ended["restored"])
    failures += _rows(run, at, whole)
    second = losses(run, "second")
    steps = [step for step in sorted(second) if step <= at + COMPARED_STEPS]
    if steps != list(range(at + 1, at + COMPARED_STEPS + 1)):
        failures.append(f"resumed from {at}, but trained the steps {steps[:1]} to {steps[-1:]}")
    loss_difference = max(
        abs(second[step][task] - value) / max(1e-12, abs(value)) for step in steps for task, value in whole.losses[step].items()
    )
    if loss_difference > (0.0 if trial.before == trial.after else 1e-5):
        failures.append(f"losses differ by {loss_difference:.1e} of their value within {COMPARED_STEPS} steps")
    metric_difference = max(metric_differences(whole.metrics, ended["metrics"]))
    if metric_difference > 1e-3:
        failures.append(f"final metrics differ by {metric_difference:.1e}")
    state = read(last.folder)
    bit_equal = state.keys() == whole.state.keys() and all(torch.equal(state[key], whole.state[key]) for key in state)
    if trial.before == trial.after and not bit_equal:
        failures.append("the same number of ranks should end bit for bit like the run that lived")
    died_at = max(losses(run, "first"), default=0)
    return Outcome(trial, kill, at, died_at, loss_difference, metric_difference, bit_equal, tuple(failures))


def wrongly_restored(before: dict[str, torch.Tensor] | None, restored: dict[str, torch.Tensor]) -> list[str]:
    """What was read back, gathered from the ranks, must be what was saved, to the bit."""
    if before is None:
        return []
    wrong = [
        key
        for key in {*before, *restored}
        if key not in before or key not in restored or not torch.equal(before[key], restored[key])
    ]
    return [f"restored otherwise than saved: {', '.join(sorted(wrong))}"] if wrong else []


def _rows(run: Run, at: int, whole: Reference) -> list[str]:
    """Every row once an epoch, in the same global batches: the first attempt up to its checkpoint, then the second."""
    first, second = batches(run, "first"), batches(run, "second")
    lived = {**{step: rows for step, rows in first.items() if step <= at}, **second}
    again = [f"resumed from step {at}, but step {min(second)} was fed again"] if min(second) <= at else []
    return again + wrong_rows(lived, whole.batches)


def wrong_rows(lived: dict[int, list[int]], expected: dict[int, list[int]]) -> list[str]:
    """What is wrong with the batches of the steps that count: not every row once an epoch, or not those expected."""
    failures = []
    for epoch in range(max(expected) // STEPS_PER_EPOCH):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        count = Counter(row for step in steps for row in lived.get(step, []))
        if set(count) != set(range(ROWS)) or set(count.values()) != {1}:
            often = sum(each > 1 for each in count.values())
            failures.append(f"epoch {epoch}: {ROWS - len(count)} rows never trained on, {often} more than once")
    different = [step for step, rows in expected.items() if sorted(lived.get(step, [])) != sorted(rows)]
    return [*failures, *([f"other rows than without the kill in the batches of steps {different}"] if different else [])]


def metric_differences(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[float]:
    for task, metrics in expected["tasks"].items():
        for name, value in metrics.items():
            if value is not None:
                yield abs(found["tasks"][task][name] - value) / max(1.0, abs(value))
