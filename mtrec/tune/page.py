"""tune.html: one self-contained page of a search."""

import itertools
import json
from collections.abc import Mapping
from typing import Any

import yaml

from mtrec.compare.page import Page
from mtrec.kinds import counted
from mtrec.tune import figures
from mtrec.tune.table import ranked, short_paths, short_value, verdict
from mtrec.tune.trials import AS_WRITTEN

Results = Mapping[str, Any]
LEGEND = {
    "finished": figures.PLAIN,
    "stopped by ASHA (ring)": figures.STOPPED,
    "best": figures.GOOD,
    "as written (diamond)": figures.WRITTEN,
}


def search_report(results: Results) -> str:
    """The page, from what `results.compute` returned (or results.json holds)."""
    page = Page(f"{results['name']}: search")
    _head(page, results)
    _best(page, results)
    _figures(page, results)
    _trials(page, results)
    _provenance(page, results)
    return page.text()


def _head(page: Page, results: Results) -> None:
    drawn = [each for each in results["trials"] if each["number"] != AS_WRITTEN]
    states = {state: sum(each["state"] == state for each in drawn) for state in ("finished", "stopped", "failed")}
    told = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    budget = results["budget"]
    length = ", ".join(f"{value:,} {name}" for name, value in budget.items()) if budget else "the epochs of the experiment"
    asha = results["asha"]
    halving = (
        f"ASHA (from {asha['grace']:.0%} of a trial's training on, the best 1 in {asha['reduction_factor']} go on)"
        if asha
        else "every trial goes to its end"
    )
    objectives = "; ".join(f"{each['says']}, {'more' if each['larger'] else 'less'} is better" for each in results["objectives"])
    page.paragraph(
        f"{len(drawn)} of {counted(results['asked'], 'trial')} ({told}) and the experiment as written. Objective"
        f"{'s' if len(results['objectives']) > 1 else ''}: {objectives}; on the validation rows. "
        f"Drawn by Optuna's TPE (seed {results['search_seed']}), {halving}. Length of a trial: {length}. "
        f"All trials have seed {results['seed']}."
    )
    page.paragraph(verdict(results))
    page.paragraph(
        "Part of the best trial's lead is luck: it is the largest of many values measured on the same validation rows with one "
        "seed. Whether it is better than the experiment as written is told by a comparison with several seeds on test rows: "
        "mtrec compare, with best.yaml's values as a variant.",
        "note",
    )


def _best(page: Page, results: Results) -> None:
    trials = {each["number"]: each for each in results["trials"]}
    several = len(results["objectives"]) > 1
    names = [each["name"] for each in results["objectives"]]
    page.heading("The Pareto set" if several else "The best values")
    paths = list(results["space"])
    if not several:
        best = trials[results["best"]]
        values = results["as_written"] if best["number"] == AS_WRITTEN else best["values"]
        rows = [
            [path, short_value(results["as_written"][path]), short_value(values.get(path)), _range(results["space"][path])]
            for path in paths
        ]
        page.table(["parameter", "as written", "best", "searched"], rows, numbers=(1, 2))
        page.paragraph(
            "best.yaml is the whole experiment with these values, as long and as often validated as the trial: its training "
            "gives the best value again. A - stands for what the kind does not have.",
            "soft",
        )
        return
    rows = []
    for number in sorted(results["front"], key=lambda each: -trials[each]["objectives"][names[0]]):
        trial = trials[number]
        values = results["as_written"] if number == AS_WRITTEN else trial["values"]
        name = "as written" if number == AS_WRITTEN else str(number)
        objectives = [f"{trial['objectives'][each]:.5f}" for each in names]
        rows.append([name, *objectives, *(short_value(values.get(path)) for path in paths)])
    page.table(["trial", *names, *short_paths(paths).values()], rows, numbers=range(1, 1 + len(names) + len(paths)))
    page.paragraph(
        "No other trial is at least as good at every objective and better at one. pareto/ holds an experiment for each; "
        f"best.yaml is that of trial {results['best']}, which is the best of them by training.best_metric.",
        "soft",
    )


def _range(form: Mapping[str, Any]) -> str:
    (name, value), *_ = form.items()
    if name == "choice":
        return ", ".join(short_value(each) for each in value)
    scale = ", log scale" if name.startswith("log") else ""
    return f"{short_value(value[0])} to {short_value(value[1])}{scale}"


def _figures(page: Page, results: Results) -> None:
    objectives = results["objectives"]
    if any(each["state"] != "failed" and each["number"] != AS_WRITTEN for each in results["trials"]):
        page.heading("All parameters at once")
        page.figures((figures.parallel_coordinates(results, objectives[0]),), wide=True)
    if len(objectives) > 1:
        page.heading("Objectives against each other")
        page.paragraph("Dotted: the Pareto set, over all objectives.", "soft")
        page.figures(figures.pareto(results, first, second) for first, second in list(itertools.combinations(objectives, 2))[:6])
    page.heading("Over trials")
    page.legend(LEGEND if results["asha"] else {k: v for k, v in LEGEND.items() if not k.startswith("stopped")})
    page.figures([figures.over_trials(results, each) for each in objectives])
    page.heading("One parameter at a time")
    page.paragraph(
        "The other parameters vary too: a trend is a hint. The value as written is shown where it lies in the range.", "soft"
    )
    page.figures(figures.against_parameter(results, path, each) for path in results["space"] for each in objectives)
    page.heading("Learning curves")
    page.figures(figures.curves(results, index) for index in range(len(objectives)))


def _trials(page: Page, results: Results) -> None:
    names, paths = [each["name"] for each in results["objectives"]], list(results["space"])
    rows = []
    for trial in ranked(results):
        values = results["as_written"] if trial["number"] == AS_WRITTEN else trial["values"]
        name = "as written" if trial["number"] == AS_WRITTEN else str(trial["number"])
        seconds = "-" if trial["seconds"] is None else f"{trial['seconds']:,.1f}"
        steps = f"{trial['steps']:,} of {trial['total_steps']:,}"
        objectives = [f"{trial['objectives'][each]:.5f}" for each in names]
        rows.append([name, trial["state"], *objectives, *(short_value(values.get(path)) for path in paths), steps, seconds])
    head = ["trial", "state", *names, *short_paths(paths).values(), "steps", "seconds"]
    page.heading("Trials")
    page.table(head, rows, numbers=range(2, len(head)), fold=f"All trials with a result ({len(rows)})")
    failed = [each for each in results["trials"] if each["state"] == "failed"]
    if failed:
        page.paragraph("Failed:")
        page.bullets(f"trial {each['number']} ({json.dumps(each['values'])}): {each['error']}" for each in failed)


def _provenance(page: Page, results: Results) -> None:
    facts = results["facts"]
    train = facts["train"]
    page.heading("What was searched")
    page.table(
        ["", ""],
        [
            ["made", facts["made"]],
            ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())],
            ["training data", f"{train['rows']:,} rows in {counted(train['files'], 'file')}, fingerprint {train['fingerprint']}"],
        ],
    )
    page.code(yaml.safe_dump(facts["search"], sort_keys=False), "The space")
    page.code(facts["base"], "The experiment as written, every default written out")
