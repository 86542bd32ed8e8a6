"""A whole comparison: match, search, run what is missing, compute, write. Where the runs are made is the caller's business."""

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtrec.atomic import write_atomically
from mtrec.compare import results
from mtrec.compare.plan import Comparison, Plan
from mtrec.compare.report import comparison_report
from mtrec.compare.runs import Spec, chosen, final_specs, make_folders, matching, prepared, search_specs
from mtrec.config import parse_experiment, to_yaml
from mtrec.run import versions

PLAN, REPORT = "plan.json", "report.html"


def compare(
    plan: Plan,
    folder: Path,
    *,
    resume: bool,
    conduct_all: Callable[[Path, Sequence[str]], None],
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Makes the runs of a comparison that are missing and writes results.json, results.csv and report.html; returns the results.

    Args:
        plan: of `load_plan`.
        folder: of this comparison; with `resume` one that is there already.
        conduct_all: (folder, names of runs) -> when it returns, `runs.conduct` has been called for each.
        say: gets lines for a person.

    Raises ValueError where the folder holds a comparison and `resume` is not given.
    """
    if (folder / PLAN).exists() and not resume:
        raise ValueError(
            f"{folder} holds a comparison already. Add --resume to go on with it, or choose another folder (--output)."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for experiment in plan.experiments.values():
        prepared(folder, experiment)
    experiments, sizes = matching(plan, folder)
    for name, size in sizes.items():
        done = size["matched"]
        if done is not None:
            widths = f"expert_layers {done['from']} -> {done['to']}"
            say(f"{name}: {widths}, {done['size']:,} {done['what']} against {done['target']:,}")
    facts: dict[str, Any] = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "sizes": sizes,
        "train": prepared(folder, experiments[plan.baseline]).info["train"],
        "base": to_yaml(experiments[plan.baseline]),
        "comparison": plan.comparison.model_dump(mode="json"),
        "experiments": {name: each.model_dump(mode="json") for name, each in plan.experiments.items()},
        "diffs": plan.diffs,
        "primary": plan.primary,
        "seeds": plan.seeds,
        "sweeps": plan.sweeps,
    }
    if (folder / PLAN).exists():
        facts["made"] = json.loads((folder / PLAN).read_text())["made"]

    def conduct_missing(specs: Sequence[Spec], what: str) -> None:
        missing = make_folders(plan, folder, specs)  # raises where the folder's runs are of another comparison
        write_atomically(folder / PLAN, json.dumps(facts, indent=1))
        say(f"{len(specs)} {what}, {len(specs) - len(missing)} of them done already")
        if missing:
            conduct_all(folder, missing)

    trials = search_specs(plan, experiments)
    if trials:
        conduct_missing(trials, "search trials")
    experiments, facts["search"] = chosen(plan, folder, experiments)
    conduct_missing(final_specs(plan, experiments), "runs")
    found = results.compute(plan, folder, facts)
    results.write(found, folder)
    write_atomically(folder / REPORT, comparison_report(found))
    return found


def plan_of(facts: dict[str, Any]) -> Plan:
    """The plan that a comparison's plan.json was written from."""
    experiments = {name: parse_experiment(tree) for name, tree in facts["experiments"].items()}
    comparison = Comparison.model_validate(facts["comparison"])
    return Plan(comparison, experiments, facts["diffs"], facts["primary"], tuple(facts["seeds"]), facts.get("sweeps", {}))
