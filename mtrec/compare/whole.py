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
from mtrec.compare.runs import Spec, check_test, chosen, final_specs, fit_key, make_folders, matching, prepared, search_specs
from mtrec.config import parse_experiment, to_yaml
from mtrec.locking import locked
from mtrec.run import versions
from mtrec.yaml_tree import naming

PLAN, REPORT, LOCK = "plan.json", "report.html", "compare.lock"


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

    Where a run fails, what the others say is written all the same. Raises ValueError where the folder holds a comparison and
    `resume` is not given, or where test rows cannot be used, before any run starts; LockedError where another process makes
    it; the first error of the runs.
    """
    with locked(folder / LOCK, f"The comparison {folder}"):
        return _compare(plan, folder, resume, conduct_all, say)


def _compare(
    plan: Plan, folder: Path, resume: bool, conduct_all: Callable[[Path, Sequence[str]], None], say: Callable[[str], None]
) -> dict[str, Any]:
    if (folder / PLAN).exists() and not resume:
        raise ValueError(
            f"{folder} holds a comparison already. Add --resume to go on with it, or choose another folder (--output)."
        )
    for experiment in plan.experiments.values():
        prepared(folder, experiment)
    if not (folder / PLAN).exists():
        _check_test_rows(plan, folder)
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

    def missing_of(specs: Sequence[Spec], what: str) -> list[str]:
        missing = make_folders(plan, folder, specs)  # raises where the folder's runs are of another comparison
        write_atomically(folder / PLAN, json.dumps(facts, indent=1))
        say(f"{len(specs)} {what}, {len(specs) - len(missing)} of them done already")
        return missing

    trials = search_specs(plan, experiments)
    if trials and (missing := missing_of(trials, "search trials")):
        conduct_all(folder, missing)
    experiments, facts["search"] = chosen(plan, folder, experiments)
    missing = missing_of(final_specs(plan, experiments), "runs")
    try:
        if missing:
            conduct_all(folder, missing)
    except (ValueError, RuntimeError):
        if results.can_compute(plan, folder):  # one run that cannot be made does not keep back what the others say
            _write(results.compute(plan, folder, facts), folder)
            say(f"what the finished runs say: {folder / REPORT}")
        raise
    found = results.compute(plan, folder, facts)
    _write(found, folder)
    return found


def _check_test_rows(plan: Plan, folder: Path) -> None:
    """Raises ValueError naming the variant that cannot predict on the test rows, or would skip others of them than the base."""
    known: dict[tuple[object, ...], list[int]] = {}
    for name, experiment in plan.experiments.items():
        what = (fit_key(experiment), experiment.data.on_bad_rows, experiment.data.max_bad_fraction)
        with naming(f"Variant '{name}'"):
            if what not in known:
                known[what] = check_test(prepared(folder, experiment), experiment).tolist()
            base = next(iter(known.values()))
            if known[what] != base:
                raise ValueError(
                    "`data.on_bad_rows`: all variants should be measured on the same test rows. Found "
                    f"{len(known[what])} skipped for this one and {len(base)} for the base, not the same: mend these rows."
                )


def _write(found: dict[str, Any], folder: Path) -> None:
    results.write(found, folder)
    write_atomically(folder / REPORT, comparison_report(found))


def plan_of(facts: dict[str, Any]) -> Plan:
    """The plan that a comparison's plan.json was written from."""
    experiments = {name: parse_experiment(tree) for name, tree in facts["experiments"].items()}
    comparison = Comparison.model_validate(facts["comparison"])
    return Plan(comparison, experiments, facts["diffs"], facts["primary"], tuple(facts["seeds"]), facts.get("sweeps", {}))
