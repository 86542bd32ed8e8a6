"""The trials of a search: their folders, and one trial from its values to its result.

    FOLDER/tune.json            what is searched: experiment, space, objectives, versions
    FOLDER/prepared/<key>/      encoder and label statistics, fitted once for equal data, features and tasks
    FOLDER/trials/007/          a run as `mtrec train` makes it, and beside it:
        trial.json              its values, as drawn; written once the folder is whole
        failed.json             why it cannot be trained, where so
        result.json             state, objectives, curve; a folder with it is a trial that is done

The files are the truth: `--resume` adds the draws that are missing and goes on with those that have no result.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from mtrec.atomic import write_atomically
from mtrec.compare.plan import varied
from mtrec.compare.runs import check_ended, copy_prepared, events_of, has_ended, prepared, train_here, with_budget
from mtrec.compare.space import active
from mtrec.events import Event, Validation
from mtrec.run import Run, open_run
from mtrec.tune.plan import Objective, Plan

TRIAL, FAILED, RESULT = "trial.json", "failed.json", "result.json"
AS_WRITTEN = 0  # the number of the experiment itself
WHOLE = 100  # the share of a trial's training that is reported at its end, in percent


def folder_of(folder: Path, number: int) -> Path:
    """Where a trial's run lies."""
    return folder / "trials" / f"{number:03d}"


def drawn(folder: Path) -> dict[int, dict[str, Any]]:
    """{number: trial.json} of the trials that have a folder."""
    paths = sorted((folder / "trials").glob(f"*/{TRIAL}"))
    return {int(path.parent.name): json.loads(path.read_text()) for path in paths}


def read_result(folder: Path, number: int) -> dict[str, Any] | None:
    """What result.json of a trial says; None while it is not done."""
    path = folder_of(folder, number) / RESULT
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return found


def make_trial(plan: Plan, folder: Path, number: int, shares: Mapping[str, float]) -> Path:
    """The folder of a trial, ready to be trained; `shares`: {path: where in its range} (none of them: as written).

    What cannot be prepared leaves failed.json there: a search does not end because of one draw.
    """
    place, space = folder_of(folder, number), plan.search.parameters
    if (place / TRIAL).is_file():
        return place
    if place.exists():
        shutil.rmtree(place)  # cut short before its trial.json, which is written last
    values = active(space, {path: space[path].at(share) for path, share in shares.items()})
    try:
        experiment = varied(plan.experiment, values, f"trial {number}")
        source = prepared(folder, experiment)
        rows = source.info["train"]["rows"]
        copy_prepared(source, with_budget(experiment, rows, plan.search.budget, plan.search.curve_points), place)
    except ValueError as error:
        note_failure(place, error)
    write_atomically(place / TRIAL, json.dumps({"number": number, "values": values, "shares": dict(shares)}, indent=1))
    return place


def note_failure(place: Path, error: BaseException) -> None:
    """So that a restart does not meet the same error again, and the report can tell it."""
    place.mkdir(parents=True, exist_ok=True)
    text = str(error).strip()
    write_atomically(place / FAILED, json.dumps({"error": f"{type(error).__name__}: {text}" if text else repr(error)}))


def failure(place: Path) -> str | None:
    """Why the trial failed; None where it did not."""
    path = place / FAILED
    found: str | None = json.loads(path.read_text())["error"] if path.is_file() else None
    return found


def best_validation(run: Run, objectives: tuple[Objective, ...]) -> dict[str, Any] | None:
    """The validation that the run's best checkpoint is of, among those so far; None where no objective was defined yet."""
    found = None
    for event in events_of(run):
        if event["event"] == "validation" and event["metric"] is not None:
            known = all(each.value(event) is not None for each in objectives)
            if known and (found is None or event["metric"] > found["metric"]):
                found = event
    return found


def values_at(event: Mapping[str, Any], objectives: tuple[Objective, ...]) -> list[float]:
    """The objectives of a validation where all of them are defined."""
    return [value for each in objectives if (value := each.value(event)) is not None]


def total_steps(run: Run) -> int:
    """Steps of the run when it is trained to its end."""
    training, batch_size = run.experiment.training, run.experiment.data.batch_size
    assert isinstance(batch_size, int)
    whole = -(-run.info["train"]["rows"] // batch_size) * training.epochs
    return int(min(whole, training.max_steps or whole))


def train_trial(
    place: Path,
    objectives: tuple[Objective, ...],
    device: torch.device,
    report: Callable[[int, list[float]], None],
    train_run: Callable[[Run, Callable[[], None]], None] | None = None,
) -> None:
    """Trains a trial (or goes on with it); its errors that a restart would meet again are noted in its folder.

    Args:
        report: gets the share of the training that is done, in percent below 100, and the objectives at the best
            validation so far; may raise SystemExit, which ends the trial.
        train_run: (run, called after events or now and then) -> trains it elsewhere; by default in this process.

    Raises ValueError where the trial failed before, or where an objective is undefined on the validation rows, RuntimeError
    where its workers were asked to stop.
    """
    noted = failure(place)
    if noted is not None:
        raise ValueError(noted)
    run = open_run(place)
    told = 0

    def tell() -> None:
        """Reports the best validation so far, where there is a new one."""
        nonlocal told
        validations = [event for event in events_of(run) if event["event"] == "validation"]
        best = best_validation(run, objectives)
        if len(validations) > told and best is not None:
            told = len(validations)
            share = WHOLE * validations[-1]["step"] // total_steps(run)
            report(min(WHOLE - 1, share), values_at(best, objectives))

    def watch(event: Event) -> None:
        if isinstance(event, Validation):
            tell()

    try:
        if has_ended(run):
            return
        if train_run is None:
            train_here(run, device, watch=watch)
        else:
            train_run(run, tell)
        if has_ended(run) and best_validation(run, objectives) is None:
            names = ", ".join(each.name for each in objectives)
            raise ValueError(f"{names}: undefined on the validation rows in every validation of this trial")
    except Exception as error:
        note_failure(place, error)
        raise
    check_ended(run)  # a trial that a lost node cut short has not failed: a restart goes on with it


def result_of(plan: Plan, folder: Path, number: int, error: str | None = None) -> dict[str, Any]:
    """A trial's result from the files of its run: finished, stopped (by ASHA) or failed (`error`: if nothing is noted)."""
    place = folder_of(folder, number)
    found: dict[str, Any] = {"number": number, "values": json.loads((place / TRIAL).read_text())["values"]}
    why = failure(place) or error
    empty: dict[str, Any] = {"objectives": {}, "metric": None, "best_step": None, "steps": None, "total_steps": None}
    found |= {"state": "failed", "error": why, **empty, "seconds": None, "curve": []}
    if not (place / "run.json").is_file():
        return found
    run = open_run(place)
    events = list(events_of(run))
    best = best_validation(run, plan.objectives)
    curve = [
        [event["step"], *(each.value(event) for each in plan.objectives)] for event in events if event["event"] == "validation"
    ]
    found |= {
        "steps": events[-1].get("step") if events else None,
        "total_steps": total_steps(run),
        "seconds": events[-1]["time"] - events[0]["time"] if len(events) > 1 else None,
        "curve": curve,
    }
    if why is None and best is not None:
        found |= {
            "state": "finished" if has_ended(run) else "stopped",
            "objectives": {each.name: each.value(best) for each in plan.objectives},
            "metric": best["metric"],
            "best_step": best["step"],
        }
    return found


def write_result(plan: Plan, folder: Path, number: int, error: str | None = None) -> dict[str, Any]:
    """result.json of a trial that is over."""
    found = result_of(plan, folder, number, error)
    write_atomically(folder_of(folder, number) / RESULT, json.dumps(found, indent=1))
    return found


def drop_checkpoints(folder: Path, keep: Collection[int]) -> None:
    """Of all trials that are over but `keep`, which keep their best one."""
    for number in drawn(folder):
        place = folder_of(folder, number)
        best = open_run(place).best().folder.name if number in keep else None
        for path in (place / "checkpoints").glob("step-*"):
            if read_result(folder, number) is not None and path.name != best:
                shutil.rmtree(path)
