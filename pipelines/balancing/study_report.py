"""The report of study.py: tables in Markdown from the finished runs."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy import stats

Runs = Sequence[dict[str, Any]]
BASELINE = "tuned static"
TITLES = {
    "synthetic": "Synthetic log with a planted conflict (`conflict: 1`)",
    "kuairand": "KuaiRand-Pure",
}
NOT_COMPARED = ("only ", "static, seen", "trial ")


def markdown(runs: Runs, expected: int, settings: dict[str, Any], minutes: float) -> str:
    """The whole report. `expected`: how many runs the full study has; `minutes`: of the clock, over all sittings."""
    seconds = [run["seconds"] for run in runs]
    lines = [
        "# What the balancing methods do for the metrics",
        "",
        f"{len(runs)} of {expected} planned runs, {minutes:.0f} minutes with {settings['processes']} processes, "
        f"{max(seconds, default=0):.1f} s the longest run; torch {settings['versions'].get('torch')}. One epoch each, MMoE "
        "(4 experts of [64, 32]) behind DCN-v2, tables of 8 columns, `every: 10`, gradients at `parameters` unless the name "
        "says otherwise. Each method runs with its defaults on top of `weight: auto`. `tuned static`: the best of as many "
        "random constant weights as there are methods, found on rows that no run below is evaluated on.",
        "",
        "Differences are paired by seed, with a 95 % interval of Student's t over the seeds (which vary the initial weights, "
        "the order of the rows and, on the synthetic log, the log itself). p is Holm's, over all methods of a table.",
        "",
    ]
    for dataset, title in TITLES.items():
        own = [run for run in runs if run["dataset"] == dataset]
        if own:
            lines += [f"## {title}", "", *_of_dataset(own), ""]
    return "\n".join(lines)


def _of_dataset(runs: Runs) -> list[str]:
    tasks = list(runs[0]["metrics"])
    reported = [run for run in runs if not run["variant"].startswith("trial ")]
    if not reported:
        return ["Only trials of the search for static weights so far."]
    rows = sorted({run["rows"] for run in reported})
    seeds = sorted({run["seed"] for run in reported})
    lines = [f"{' to '.join(f'{n:,}' for n in {rows[0]: 0, rows[-1]: 0})} training rows, seeds {', '.join(map(str, seeds))}.", ""]
    return [*lines, *_comparison(reported, tasks), *_tuning(runs, tasks), *_alone(reported, tasks), *_places(reported)]


def by_variant(runs: Runs) -> dict[str, dict[int, dict[str, Any]]]:
    """{variant: {seed: run}}, in the order of first appearance."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        found.setdefault(run["variant"], {})[run["seed"]] = run
    return found


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def paired(runs: dict[int, dict[str, Any]], base: dict[int, dict[str, Any]]) -> tuple[float, float, float] | None:
    """(mean difference of the score, half width of its 95 % interval, p); None with fewer than two common seeds."""
    gains = [runs[seed]["score"] - base[seed]["score"] for seed in runs if seed in base]
    if len(gains) < 2:
        return None
    error = statistics.stdev(gains) / len(gains) ** 0.5
    if error == 0.0:
        return gains[0], 0.0, 1.0 if gains[0] == 0.0 else 0.0
    half = float(stats.t.ppf(0.975, len(gains) - 1)) * error
    return statistics.fmean(gains), half, float(stats.ttest_1samp(gains, 0.0).pvalue)


def _comparison(runs: Runs, tasks: Sequence[str]) -> list[str]:
    variants = {name: each for name, each in by_variant(runs).items() if not name.startswith(NOT_COMPARED)}
    base = variants.get(BASELINE, {})
    tests = {name: paired(each, base) for name, each in variants.items() if name != BASELINE}
    known = {name: found for name, found in tests.items() if found is not None}
    adjusted = dict(zip(known, holm([found[2] for found in known.values()]), strict=True))
    head = ["method", "seeds", *tasks, "score (mean)", f"score - {BASELINE}", "p", "weights at the end", "s a run"]
    table = []
    for name, each in sorted(variants.items(), key=lambda item: -_mean(run["score"] for run in item[1].values())):
        own = list(each.values())
        found = tests.get(name)
        table.append(
            [
                f"**{name}**" if name == BASELINE else name,
                str(len(own)),
                *(_spread([run["metrics"][task] for run in own]) for task in tasks),
                f"{_mean(run['score'] for run in own):.4f}",
                "" if found is None else f"{found[0]:+.4f} ± {found[1]:.4f}",
                f"{adjusted[name]:.3f}" if name in adjusted else "",
                " : ".join(f"{_mean(run['weights'][task] for run in own):.2g}" for task in tasks),
                f"{_mean(run['seconds'] for run in own):.1f}",
            ]
        )
    better = [name for name in known if adjusted[name] < 0.05 and known[name][0] > 0]
    worse = [name for name in known if adjusted[name] < 0.05 and known[name][0] < 0]
    return [
        *_table(head, table),
        "",
        f"Better than {BASELINE} (p < 0.05): {', '.join(better) or 'none'}. Worse: {', '.join(worse) or 'none'}. For the "
        f"other {len(known) - len(better) - len(worse)} no difference was found with so many seeds.",
        "",
    ]


def _tuning(runs: Runs, tasks: Sequence[str]) -> list[str]:
    searched = sorted((run for run in runs if run["variant"].startswith("trial ")), key=lambda run: -run["score"])
    if not searched:
        return []
    first = next((run for run in searched if run["variant"] == "trial 0"), searched[-1])
    weights = " : ".join(f"{searched[0]['weights'][task]:.2g}" for task in tasks)
    return [
        f"Search for static weights: {len(searched)} trials, scores {searched[-1]['score']:.4f} to {searched[0]['score']:.4f}, "
        f"{first['score']:.4f} with all ones; best {' : '.join(tasks)} = {weights} (times `weight: auto`).",
        "",
    ]


def _alone(runs: Runs, tasks: Sequence[str]) -> list[str]:
    """Each task alone against all together: what sharing costs or brings."""
    variants = by_variant(runs)
    static = variants.get("static", {})
    table = []
    for task in tasks:
        alone = variants.get(f"only {task}", {})
        gains = [run["metrics"][task] - static[seed]["metrics"][task] for seed, run in alone.items() if seed in static]
        if gains:
            table.append([task, _spread([run["metrics"][task] for run in alone.values()]), f"{_mean(gains):+.4f}"])
    if not table:
        return []
    text = (
        "Each task alone (the others' losses times 1e-4) against all of them with `static`. Where training alone gains "
        "nothing, there is no cost of sharing that a balancer could take away, however much the gradients disagree."
    )
    return [text, "", *_table(["task", "alone", "alone - together"], table), ""]


def _places(runs: Runs) -> list[str]:
    """Cosines and norms in the runs with static weights, at each place."""
    found: dict[str, list[dict[str, float]]] = {}
    for run in runs:
        if run["variant"].startswith("static"):
            for name, each in run["cosines"].items():
                found.setdefault(name, []).append(each)
    if not found:
        return []
    places = [p for p in ("parameters", "batch_sum", "representation") if any(f"_at_{p}/" in name for name in found)]
    pairs = sorted({name.split("/", 1)[1] for name in found if name.startswith("cosine")})
    owners = sorted({name.split("/", 1)[1] for name in found if name.startswith("gradient_norm")})
    table = []
    for place in places:
        cosines = [found[f"cosine_at_{place}/{pair}"] for pair in pairs]
        norms = [_mean(each["mean"] for each in found[f"gradient_norm_at_{place}/{owner}"]) for owner in owners]
        cells = [f"{_mean(e['mean'] for e in each):+.3f} (sd {_mean(e['sd'] for e in each):.3f})" for each in cosines]
        table.append([f"`{place}`", *cells, " : ".join(f"{norm / norms[0]:.2g}" for norm in norms)])
    heads = ["place", *(f"cosine {pair.replace('/', ', ')}" for pair in pairs), f"norms {' : '.join(owners)}"]
    text = (
        "Gradients of the losses (times `weight: auto`) while `static` trains: mean over the steps, and the standard "
        "deviation from step to step."
    )
    return [text, "", *_table(heads, table), ""]


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
