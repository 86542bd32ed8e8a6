"""The runs of a comparison as Ray Tune trials (mtrec/jobs/trials.py says how).

`conduct` passes over what is done and goes on from the newest checkpoint.
"""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtrec.compare.runs import conduct, folder_of, is_done
from mtrec.events import Failed
from mtrec.jobs.train import train_on_ray
from mtrec.jobs.trials import enter, remaining, root_cause, run_trials, slot_on_ray
from mtrec.run import Run


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
        say: gets a line whenever a run is done, and where the first one has to wait until something is free.

    Raises Failed (ValueError for a user's mistake) with the first cause, after all other runs have ended.
    """
    slot = slot_on_ray(workers, parallel, say)
    from ray import tune

    configs = [{"name": name, "run": str(folder_of(folder.absolute(), name)), **slot.spec()} for name in names]
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(folder, list(names), ended, say), daemon=True)
    watcher.start()
    try:
        errors = run_trials(folder, _trial, slot, {"spec": tune.grid_search(configs)})
    finally:
        ended.set()
        watcher.join()
    missing = [name for name in names if not is_done(folder, name)]
    if missing:
        raise _cause(missing, errors)


def _watch(folder: Path, waiting: list[str], ended: threading.Event, say: Callable[[str], None]) -> None:
    """Says which run is done, how many are left, and how long that may take."""
    began, total = time.monotonic(), len(waiting)
    while True:
        last = ended.wait(0.5)
        for name in [each for each in waiting if is_done(folder, each)]:
            waiting.remove(name)
            say(f"{name} done ({remaining(total - len(waiting), total, time.monotonic() - began)})")
        if last:
            return


def _cause(missing: Sequence[str], errors: Sequence[BaseException]) -> Exception:
    """The first error of a trial as a sentence; a user's mistake stays a ValueError."""
    many = f"{len(missing)} runs are missing (first: {missing[0]}). `--resume` makes only these."
    if not errors:
        return Failed(f"{many} No trial reported an error.")
    cause = root_cause(errors[0])
    lines = [line for line in str(cause).strip().splitlines() if line.strip()]
    text = f"{many} {type(cause).__name__}: {lines[-1] if lines else ''}"
    return ValueError(text) if isinstance(cause, ValueError) else Failed(text)


def _trial(config: dict[str, Any]) -> None:
    """What a Tune trial runs."""
    from ray import tune

    spec = config["spec"]
    device = enter(spec)

    def on_workers(run: Run) -> None:
        train_on_ray(run.folder, spec["workers"], spec["gpu"], run.experiment.training.max_failures)

    conduct(Path(spec["run"]), device, on_workers if spec["workers"] > 1 else None)
    tune.report({"done": 1})
