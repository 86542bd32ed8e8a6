"""A whole search: make what is missing, compute, write. Where the trials are trained is the caller's business."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtrec.atomic import write_atomically
from mtrec.compare.runs import prepared
from mtrec.config import parse_experiment, to_yaml
from mtrec.events import Failed
from mtrec.locking import locked
from mtrec.run import versions
from mtrec.tune import results
from mtrec.tune.page import search_report
from mtrec.tune.plan import Plan, SearchFile, plan_of
from mtrec.tune.trials import AS_WRITTEN, drawn, drop_checkpoints, read_result

PLAN, REPORT, LOCK = "tune.json", "tune.html", "tune.lock"


def tune(
    plan: Plan,
    folder: Path,
    *,
    resume: bool,
    search: Callable[[Plan, Path], None],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes the trials that are missing; writes best.yaml, results.json, trials.csv and tune.html; returns the results.

    The best trial and those of the Pareto set keep their best checkpoint: `mtrec evaluate` and `score` take them as runs.

    Args:
        folder: of this search; with `resume` one that is there already. More trials than before may be asked for.
        search: when it returns, every trial of the plan has a result.

    Raises ValueError where the folder holds a search and `resume` is not given, or one of another experiment or space;
    LockedError where another process makes it.
    """
    with locked(folder / LOCK, f"The search {folder}"):
        return _tune(plan, folder, resume, search, say)


def _tune(
    plan: Plan, folder: Path, resume: bool, search: Callable[[Plan, Path], None], say: Callable[[str], None]
) -> dict[str, Any]:
    tree = {
        "experiment": plan.experiment.model_dump(mode="json"),
        "search": plan.search.model_dump(mode="json", exclude_none=True),
    }
    made = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    if (folder / PLAN).exists():
        if not resume:
            raise ValueError(
                f"{folder} holds a search already. Add --resume to go on with it, or choose another folder (--output)."
            )
        before = json.loads((folder / PLAN).read_text())
        for key, where in (("experiment", "the experiment"), ("search", "the space")):
            if before[key] != tree[key]:
                raise ValueError(
                    f"--resume: {where} differs from that of {folder}. Only --trials may change; search in a new folder."
                )
        made = before["made"]
    source = prepared(folder, plan.experiment)
    facts = {
        "made": made,
        "versions": versions(),
        "train": source.info["train"],
        "base": to_yaml(plan.experiment),
        "trials": plan.trials,
        **tree,
    }
    write_atomically(folder / PLAN, json.dumps(facts, indent=1))
    done = [number for number in drawn(folder) if read_result(folder, number) is not None]
    drawn_trials = len([number for number in done if number != AS_WRITTEN])
    say(f"{plan.trials} trials and the experiment as written; {drawn_trials} trials are done already")
    search(plan, folder)
    missing = [number for number in range(plan.trials + 1) if read_result(folder, number) is None]
    if missing:
        count = f"{len(missing)} of {plan.trials + 1} trials have no result (first: {missing[0]})"
        raise Failed(f"{count}. --resume makes only these.")
    found = write_all(plan, folder, facts)
    drop_checkpoints(folder, {found["best"], *found["front"]})
    return found


def write_all(plan: Plan, folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Results, files and page from the trials' folders."""
    found = results.compute(plan, folder, facts)
    results.write(plan, found, folder)
    write_atomically(folder / REPORT, search_report(found))
    return found


def read_plan(facts: dict[str, Any]) -> Plan:
    """The plan that a search's tune.json was written from; the data need not be there any more."""
    return plan_of(parse_experiment(facts["experiment"]), SearchFile.model_validate(facts["search"]), facts["trials"])
