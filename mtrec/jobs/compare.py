"""The runs of a comparison as Ray Tune trials: resources, several at a time, restarts of those that died.

A trial is a function. With one worker it trains in its own process (a trainer of its own would cost some 17 s a trial); with
more, it asks for no CPU of its own and starts Ray Train's workers. What a trial leaves in the run's folder is the truth, so
Tune's own record is not needed to resume: `conduct` passes over what is done and goes on from the newest checkpoint.
"""

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtrec.compare.runs import conduct, folder_of, is_done
from mtrec.jobs.train import connect, train_on_ray
from mtrec.run import Run

MAX_FAILURES = 3  # restarts of a trial


def conduct_on_ray(
    folder: Path,
    names: Sequence[str],
    *,
    workers: int = 1,
    parallel: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Runs `conduct` for each named run of a comparison's folder, which every node must see.

    Args:
        workers: a run trains on so many.
        parallel: runs at a time; None: as many as the cluster's CPUs (or GPUs) allow.
        say: gets a line whenever a run is done.

    Raises RuntimeError (ValueError for a user's mistake) with the first cause, after all other runs have ended.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the other one prints a banner whatever its verbosity
    connect()
    import ray
    from ray import tune

    for name in ("ray.tune", "ray.train", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cpus, gpus = (int(ray.cluster_resources().get(each, 0)) for each in ("CPU", "GPU"))
    if workers > (gpus or cpus):
        raise ValueError(f"--workers {workers}: the Ray cluster has {cpus} CPUs and {gpus} GPUs.")
    # with workers of its own the trial only waits; if it held a CPU, they might never start
    resources = {"CPU": 0, "memory": 1} if workers > 1 else {"CPU": 1, "GPU": 1} if gpus else {"CPU": 1}
    at_once = max(1, (gpus or cpus) // workers)
    path = [each for each in sys.path if each]
    configs = [
        {"name": name, "run": str(folder_of(folder.absolute(), name)), "workers": workers, "gpu": gpus > 0, "path": path}
        for name in names
    ]
    tuner = tune.Tuner(
        tune.with_resources(_trial, resources),
        param_space={"spec": tune.grid_search(configs)},
        tune_config=tune.TuneConfig(max_concurrent_trials=min(parallel or at_once, at_once), reuse_actors=True),
        run_config=tune.RunConfig(
            name=f"{folder.name}-{int(time.time())}",
            storage_path=str(folder.absolute() / "ray"),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    )
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, list(names), ended, say), daemon=True)
    watcher.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            grid = tuner.fit()
    finally:
        ended.set()
        watcher.join()
    missing = [name for name in names if not is_done(folder, name)]
    if missing:
        raise _cause(missing, list(grid.errors))


def _watch(folder: Path, waiting: list[str], ended: threading.Event, say: Callable[[str], None]) -> None:
    """Says which run is done, how many are left, and how long that may take."""
    began, total = time.monotonic(), len(waiting)
    while True:
        last = ended.wait(0.5)
        for name in [each for each in waiting if is_done(folder, each)]:
            waiting.remove(name)
            done, seconds = total - len(waiting), time.monotonic() - began
            left = f", about {seconds / done * len(waiting) / 60:.0f} min left" if waiting else f", {seconds:.0f} s in all"
            say(f"{name} done ({done} of {total}{left})")
        if last:
            return


def _cause(missing: Sequence[str], errors: Sequence[BaseException]) -> Exception:
    """The first error of a trial as a sentence; a user's mistake stays a ValueError."""
    many = f"{len(missing)} runs are missing (first: {missing[0]}). `--resume` makes only these."
    if not errors:
        return RuntimeError(f"{many} No trial reported an error.")
    cause: BaseException = errors[0]
    inner = getattr(cause, "cause", None) or cause.__cause__
    while isinstance(inner, BaseException) and inner is not cause:
        cause, inner = inner, getattr(inner, "cause", None) or inner.__cause__
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = f"{many} {type(cause).__name__}: {lines[-1] if lines else ''}"
    return ValueError(text) if isinstance(cause, ValueError) else RuntimeError(text)


def _trial(config: dict[str, Any]) -> None:
    """What a Tune trial runs."""
    from ray import tune

    spec = config["spec"]
    sys.path += [each for each in spec["path"] if each not in sys.path]  # where `kind: module:Class` finds modules
    import torch

    for name in ("torchrec.distributed.planner", "torch.fx", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)

    def on_workers(run: Run) -> None:
        train_on_ray(run.folder, spec["workers"], spec["gpu"], run.experiment.training.max_failures, lambda: None)

    device = torch.device("cuda", 0) if spec["gpu"] and torch.cuda.is_available() else torch.device("cpu")
    conduct(Path(spec["run"]), device, on_workers if spec["workers"] > 1 else None)
    tune.report({"done": 1})
