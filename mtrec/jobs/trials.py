"""What `mtrec compare` and `mtrec tune` share of Ray Tune: resources, several trials at a time, restarts of those that died.

A trial is a function. With one worker it trains in its own process (a trainer of its own would cost some 17 s a trial); with
more, it asks for no CPU of its own and starts Ray Train's workers. What a trial leaves in its folder is the truth, so Tune's
own record is not needed to resume.
"""

import dataclasses
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mtrec.jobs.resources import tell_wait, whole_cluster

MAX_FAILURES = 3  # restarts of a trial
STOP_SECONDS = 600  # a stopped trial may take so long to end (2 by default), or the one after it in its process would fail


@dataclasses.dataclass(frozen=True)
class Slot:
    """What one trial gets, and how many go at a time."""

    workers: int
    gpu: bool
    resources: dict[str, float]
    at_once: int

    def spec(self) -> dict[str, Any]:
        """What a trial has to know of it, for `enter`."""
        return {"workers": self.workers, "gpu": self.gpu, "path": [each for each in sys.path if each]}


def slot_on_ray(workers: int, parallel: int | None, say: Callable[[str], None]) -> Slot:
    """Connects to Ray (or starts it).

    Args:
        workers: of each trial.
        parallel: trials at a time; None: as many as the cluster's CPUs (or GPUs) allow.
        say: gets a line where the first trial has to wait until something is free.

    Raises ValueError where the cluster has too few for one trial.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Tune's takes Ctrl-C for the end of what was asked
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other one prints a banner whatever its verbosity
    cluster = whole_cluster()
    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    there, with_gpu = cluster.of(cluster.kind), cluster.gpus > 0
    if workers > there:
        raise ValueError(f"--workers {workers}: the Ray cluster has {cluster.cpus} CPUs and {cluster.gpus} GPUs.")
    tell_wait({cluster.kind: workers} if workers > 1 or not with_gpu else {"CPU": 1, "GPU": 1}, say)
    # with workers of its own the trial only waits; if it held a CPU, they might never start
    resources = {"CPU": 0.0, "memory": 1.0} if workers > 1 else {"CPU": 1.0, "GPU": 1.0} if with_gpu else {"CPU": 1.0}
    most = max(1, there // workers)
    return Slot(workers, with_gpu, resources, min(parallel or most, most))


def run_trials(
    folder: Path,
    trial: Callable[[dict[str, Any]], None],
    slot: Slot,
    space: dict[str, Any],
    *,
    callbacks: Sequence[Any] = (),
    **how: Any,
) -> list[BaseException]:
    """Runs the trials to their end; the errors of those that failed for good. `how`: more of Tune's TuneConfig."""
    from ray import tune

    tuner = tune.Tuner(
        tune.with_resources(trial, slot.resources),
        param_space=space,
        tune_config=tune.TuneConfig(max_concurrent_trials=slot.at_once, reuse_actors=True, **how),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{int(time.time())}",
            storage_path=str(folder.absolute() / "ray"),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=list(callbacks),
            verbose=0,
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grid = tuner.fit()
    return list(grid.errors)


def remaining(done: int, total: int, seconds: float) -> str:
    """How far a number of trials is after so many seconds, and how long the others may take.

    >>> remaining(2, 8, 100.0), remaining(2, 4, 20.0), remaining(4, 4, 41.2)
    ('2 of 8, about 5 min left', '2 of 4, about 20 s left', '4 of 4, 41 s in all')
    """
    if done == total:
        return f"{done} of {total}, {seconds:.0f} s in all"
    left = seconds / done * (total - done)
    return f"{done} of {total}, about {f'{left / 60:.0f} min' if left >= 90 else f'{left:.0f} s'} left"


def enter(spec: dict[str, Any]) -> torch.device:
    """What a trial's process does first: it finds the user's modules, is quiet, and has this device."""
    os.environ["TUNE_FUNCTION_THREAD_TIMEOUT_S"] = str(STOP_SECONDS)  # Tune reads it here, before it reuses this process
    sys.path += [each for each in spec["path"] if each not in sys.path]  # where `kind: module:Class` finds modules
    for name in ("torchrec.distributed.planner", "torch.fx", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return torch.device("cuda", 0) if spec["gpu"] and torch.cuda.is_available() else torch.device("cpu")


def root_cause(error: BaseException) -> BaseException:
    """The error of the trial's own code inside Ray's."""
    cause: BaseException = error
    inner = getattr(cause, "cause", None) or cause.__cause__
    while isinstance(inner, BaseException) and inner is not cause:
        cause, inner = inner, getattr(inner, "cause", None) or inner.__cause__
    return cause
