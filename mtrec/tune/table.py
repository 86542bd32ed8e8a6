"""The table of a search in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtrec.terminal import say
from mtrec.tune.trials import AS_WRITTEN

SHOWN = 10


def show_results(results: Mapping[str, Any], to: Console) -> None:
    """The best trials with their values, the experiment as written among them; what failed; which is the best."""
    objectives = results["objectives"]
    trials = ranked(results)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("trial", no_wrap=True)
    for each in objectives:
        table.add_column(each["name"].replace("/", "/\n"), justify="right", no_wrap=True)
    labels = short_paths(list(results["space"]))
    for label in labels.values():
        table.add_column(label.replace(".", ".\n"), justify="right", overflow="fold")
    table.add_column("")
    shown = trials[:SHOWN]
    shown += [each for each in trials[SHOWN:] if each["number"] == AS_WRITTEN or each["number"] in results["front"]]
    for trial in shown:
        written = trial["number"] == AS_WRITTEN
        values = results["as_written"] if written else trial["values"]
        state = f"stopped at {trial['steps']} of {trial['total_steps']}" if trial["state"] == "stopped" else ""
        if len(objectives) > 1 and trial["number"] in results["front"]:
            state = "Pareto set"
        name = "as written" if written else str(trial["number"])
        table.add_row(
            Text(name, "bold" if trial["number"] == results["best"] else ""),
            *(f"{trial['objectives'][each['name']]:.5f}" for each in objectives),
            *(short_value(values.get(path)) for path in labels),
            state,
        )
    to.print(table)
    if len(shown) < len(trials):
        say(to, f"and {len(trials) - len(shown)} more")
    for trial in results["trials"]:
        if trial["state"] == "failed":
            say(to, f"trial {trial['number']} failed: {trial['error']}")
    say(to, verdict(results))


def ranked(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The trials with a result: by the one objective, or the Pareto set first and by the experiment's best metric."""
    trials = [each for each in results["trials"] if each["state"] != "failed"]
    several = len(results["objectives"]) > 1
    return sorted(trials, key=lambda each: (several and each["number"] in results["front"], each["metric"]), reverse=True)


def verdict(results: Mapping[str, Any]) -> str:
    """Which trial is the best, against the experiment as written, and what to do next."""
    trials = {each["number"]: each for each in results["trials"]}
    best, written = trials[results["best"]], results["written"]
    failed = sum(each["state"] == "failed" for each in results["trials"])
    values = ", ".join(f"{name} {value:.5f}" for name, value in best["objectives"].items())
    others = ""
    if written is not None:
        others = "; as written: " + ", ".join(f"{name} {value:.5f}" for name, value in written.items())
    if best["number"] == AS_WRITTEN:
        text = f"No trial was better than the experiment as written ({values})."
    elif len(best["objectives"]) > 1:
        text = f"{len(results['front'])} trials are on the Pareto front; best by training.best_metric is trial {best['number']}: "
        text += f"{values}{others}."
    else:
        text = f"The best is trial {best['number']}: {values}{others}."
    if results["at_edge"]:
        text += f" At the edge of its range, which may be too narrow: {', '.join(results['at_edge'])}."
    return text + (f" {failed} failed." if failed else "")


def short_value(value: Any) -> str:
    """A value for a table: four digits of a number, - for one that the trial's kind does not have."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def short_paths(paths: Sequence[str]) -> dict[str, str]:
    """{path: its last parts, as few as tell it from the others}.

    >>> short_paths(["optimizer.dense.learning_rate", "optimizer.tables.learning_rate", "model.architecture.kind"])
    {'optimizer.dense.learning_rate': 'dense.learning_rate', 'optimizer.tables.learning_rate': 'tables.learning_rate', \
'model.architecture.kind': 'architecture.kind'}
    """
    found = {}
    for path in paths:
        parts = path.split(".")
        for length in range(1, len(parts) + 1):
            end = ".".join(parts[-length:])
            alone = not any(other != path and (other == end or other.endswith(f".{end}")) for other in paths)
            if alone and (end != "kind" or length == len(parts)):
                break
        found[path] = end
    return found
