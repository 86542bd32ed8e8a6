"""From the trials of a search to its results: the best, the Pareto set, results.json, trials.csv and the experiments' YAML."""

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtrec.atomic import write_atomically
from mtrec.compare.plan import varied
from mtrec.compare.space import at_edge
from mtrec.compare.verdict import pareto_front
from mtrec.config import to_yaml
from mtrec.evaluate import MAIN_METRIC
from mtrec.model import task_specs
from mtrec.run import open_run
from mtrec.tune.plan import BEST_METRIC, Plan, value_at
from mtrec.tune.trials import AS_WRITTEN, drawn, folder_of, read_result

RESULTS, TRIALS, BEST, PARETO = "results.json", "trials.csv", "best.yaml", "pareto"
AS_IN_TRIAL = ("validate_every", "epochs", "max_steps")  # keys of `training` that a search sets itself


def compute(plan: Plan, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known of a search, as plain values; `facts`: made, versions and the like (tune.json).

    The best trial is the one of the best objective; of several, the one on the Pareto front with the best
    training.best_metric. Raises ValueError where no trial has a result.
    """
    trials = [found for number in drawn(folder) if (found := read_result(folder, number)) is not None]
    usable = [each for each in trials if each["state"] == "finished"]  # ASHA stopped the others because they were not
    if not usable:
        first = next((each["error"] for each in trials if each["error"]), "none has ended yet")
        raise ValueError(f"{folder}: no trial went to its end. The first one: {first}")
    larger = [each.larger for each in plan.objectives]
    names = [each.name for each in plan.objectives]
    points = np.array([[each["objectives"][name] for name in names] for each in usable], dtype=np.float64)
    front = [each["number"] for each, on in zip(usable, pareto_front(points, larger).tolist(), strict=True) if on]
    best = max((each for each in usable if each["number"] in front), key=lambda each: each["metric"])
    written = next((each for each in usable if each["number"] == AS_WRITTEN), None)
    return {
        "name": plan.experiment.name,
        "objectives": [{"name": each.name, "larger": each.larger, "says": describe(plan, each.name)} for each in plan.objectives],
        "space": {path: each.model_dump(exclude_none=True) for path, each in plan.search.parameters.items()},
        "as_written": {path: value_at(plan.experiment, path) for path in plan.search.parameters},
        "written": None if written is None else written["objectives"],
        "trials": trials,
        "asked": plan.trials,
        "best": best["number"],
        "front": front,
        "at_edge": at_edge(plan.search.parameters, best["values"]),
        "asha": None if plan.asha is None else plan.asha.model_dump(),
        "budget": plan.search.budget.model_dump(exclude_none=True) if plan.search.budget else None,
        "search_seed": plan.search.seed,
        "seed": plan.experiment.seed,
        "facts": dict(facts),
    }


def describe(plan: Plan, objective: str) -> str:
    """What an objective is, in words: training.best_metric is whatever the experiment says.

    Its default is the mean of every task's main metric.
    """
    if objective != BEST_METRIC:
        return objective
    wish = plan.experiment.training.best_metric
    if wish is None:
        specs = task_specs(plan.experiment)
        main = [f"{name} {MAIN_METRIC[specs[name].task.family]}" for name, t in plan.experiment.tasks.items() if not t.auxiliary]
        return f"mean of {', '.join(main)}" if len(main) > 1 else main[0]
    return wish if isinstance(wish, str) else " + ".join(f"{weight:g} x {name}" for name, weight in wish.items())


def write(plan: Plan, results: Mapping[str, Any], folder: Path) -> None:
    """results.json (everything), trials.csv (a line a trial), best.yaml, and pareto/ with the front of several objectives."""
    write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    names = [each["name"] for each in results["objectives"]]
    part = folder / f"{TRIALS}.part"
    with part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        kept = ("best_step", "steps", "total_steps", "seconds", "error")
        writer.writerow(["trial", "state", *names, *results["space"], "on_front", *kept])
        for trial in results["trials"]:
            values = [trial["values"].get(path, "") for path in results["space"]]
            if trial["number"] == AS_WRITTEN:
                values = list(results["as_written"].values())
            objectives = [trial["objectives"].get(name) for name in names]
            on_front = trial["number"] in results["front"]
            writer.writerow([trial["number"], trial["state"], *objectives, *values, on_front, *(trial[name] for name in kept)])
    part.replace(folder / TRIALS)
    by_number = {trial["number"]: trial for trial in results["trials"]}
    write_atomically(folder / BEST, experiment_yaml(plan, folder, by_number[results["best"]]))
    shutil.rmtree(folder / PARETO, ignore_errors=True)
    if len(names) > 1:
        (folder / PARETO).mkdir()
        for number in results["front"]:
            write_atomically(folder / PARETO / f"{number:03d}.yaml", experiment_yaml(plan, folder, by_number[number]))


def experiment_yaml(plan: Plan, folder: Path, trial: Mapping[str, Any]) -> str:
    """The experiment with a trial's values, every default written out, as long and as often validated as the trial.

    So its training gives the figures in its head again: they are those of the best validation, which another length or other
    validations would change.
    """
    values = ", ".join(f"{path} = {value}" for path, value in trial["values"].items()) or "the experiment as written"
    metrics = ", ".join(f"{name} {value:.5f}" for name, value in trial["objectives"].items())
    made = varied(plan.experiment, trial["values"], f"trial {trial['number']}")
    trained = open_run(folder_of(folder, trial["number"])).experiment.training
    before, changes = made.training, {key: getattr(trained, key) for key in AS_IN_TRIAL}
    made = made.model_copy(update={"training": before.model_copy(update=changes)})
    other = {key: value for key, value in changes.items() if value != getattr(before, key)}
    lines = [
        f"mtrec tune, trial {trial['number']}: {values}",
        f"{metrics} on the validation rows, the best of the trial's validations (step {trial['best_step']}); training this file "
        "on as many workers gives it again",
    ]
    if other:
        set_, was = (", ".join(f"{key}: {_yaml(each[key])}" for key in other) for each in (changes, before.model_dump()))
        lines.append(f"training has the trial's {set_}; the experiment has {was}")
    return "".join(f"# {line}\n" for line in lines) + to_yaml(made)


def _yaml(value: int | None) -> str:
    return "null" if value is None else str(value)
