"""What correlation_study.py found: the error of every run, the papers' claims with their intervals, REPORT.md and error.svg.

The measure is the *missed share*: mean squared error against the label without noise / variance of that label, so 0 is perfect
and 1 is what a constant reaches; the mean over both tasks and over the seeds of a draw. Draws differ much in difficulty, so
everything is compared within a draw, as a ratio: the mean over draws of its logarithm, Student's t over draws.
"""

import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import yaml
from correlation_figure import error_svg
from scipy import stats

from mtrec.atomic import write_atomically
from mtrec.compare.statistics import holm

RATE = "optimizer.dense.learning_rate"
MARGIN = 1.25  # "equal" and "flat": the whole interval of a ratio lies within 1 / MARGIN to MARGIN
AGAIN = "mmoe again"  # the A/A row: the same model with other seeds
LEVEL = 0.05
STUCK = 3.0  # a run with more than so many times the median missed share of its draw is called stuck
VARIANTS = ("shared_bottom", "omoe", "mmoe", "ple")
PAIRS = (("omoe", "mmoe"), ("shared_bottom", "mmoe"), ("ple", "mmoe"), ("ple", "omoe"), ("ple", "shared_bottom"))
Missed = Mapping[tuple[int, float, str], float]  # {(draw, p, variant): missed share}


@dataclass(frozen=True)
class Ratio:
    """A ratio of missed shares: geometric mean over draws, its 95 % interval, and its p-value (of being 1), not corrected."""

    name: str
    value: float
    low: float
    high: float
    p_value: float

    @property
    def text(self) -> str:
        return f"{self.name}: {self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def ratio(name: str, logarithms: Sequence[float]) -> Ratio:
    """Of the logarithm of the ratio in each draw.

    >>> found = ratio("halved", [math.log(0.5), math.log(0.45), math.log(0.55)])
    >>> round(found.value, 2), found.low < 0.5 < found.high < 1
    (0.5, True)
    """
    mean, error = statistics.fmean(logarithms), statistics.stdev(logarithms) / math.sqrt(len(logarithms))
    half = error * float(stats.t.ppf(1 - LEVEL / 2, len(logarithms) - 1))
    p_value = 2 * float(stats.t.sf(abs(mean) / error, len(logarithms) - 1)) if error else float(mean == 0)
    return Ratio(name, math.exp(mean), math.exp(mean - half), math.exp(mean + half), p_value)


def ratios(missed: Missed) -> dict[str, Ratio]:
    """Everything that the claims ask for, and the A/A ratios beside it."""
    draws = sorted({draw for draw, _, _ in missed})
    correlations = sorted({p for _, p, _ in missed})
    low, high = correlations[0], correlations[-1]
    cells = [(draw, name) for draw in draws for name in VARIANTS]
    change = {(draw, name): math.log(missed[draw, high, name] / missed[draw, low, name]) for draw, name in cells}
    found = [ratio(f"{name}: p = {high:g} / p = {low:g}", [change[draw, name] for draw in draws]) for name in VARIANTS]
    for name in ("shared_bottom", "omoe"):
        more = [change[draw, name] - change[draw, "mmoe"] for draw in draws]
        found.append(ratio(f"{name}'s change / mmoe's change", more))
    for p in correlations:
        for left, right in [*PAIRS, *([(AGAIN, "mmoe")] if (draws[0], p, AGAIN) in missed else [])]:
            logarithms = [math.log(missed[draw, p, left] / missed[draw, p, right]) for draw in draws]
            found.append(ratio(f"{left} / {right} at p = {p:g}", logarithms))
    return {each.name: each for each in found}


def judged(one: Ratio, what: Literal["less", "more", "equal"], adjusted_p: float) -> str:
    """Whether a ratio is below 1, above 1, or 1 within MARGIN: "holds", "the opposite" or "not shown"."""
    if what == "equal":
        inside, outside = one.low > 1 / MARGIN and one.high < MARGIN, one.high < 1 / MARGIN or one.low > MARGIN
        return "holds" if inside else "the opposite" if outside else "not shown"
    if adjusted_p >= LEVEL:
        return "not shown"
    return "holds" if (one.value < 1) == (what == "less") else "the opposite"


def claims(found: Mapping[str, Ratio], correlations: Sequence[float]) -> list[dict[str, Any]]:
    """[{"claim", "verdict", "parts": [[what is asked, verdict, ratio in words]]}]; a claim holds where all its parts do.

    Each claim is a question of its own: p-values are Holm-corrected over its parts.
    """
    low, high = min(correlations), max(correlations)
    change = f"p = {high:g} / p = {low:g}"
    asked: dict[str, list[tuple[str, Literal["less", "more", "equal"], str]]] = {
        f"(a) shared-bottom gets better as p rises from {low:g} to {high:g}": [
            ("its error falls", "less", f"shared_bottom: {change}"),
        ],
        f"(b) MMoE is nearly flat from p = {low:g} to {high:g}": [
            (f"its error changes by less than a factor of {MARGIN}", "equal", f"mmoe: {change}"),
            ("shared-bottom gains more from it", "less", "shared_bottom's change / mmoe's change"),
            ("OMoE gains more from it", "less", "omoe's change / mmoe's change"),
        ],
        f"(c) OMoE equals MMoE at p = {high:g} and falls behind at {low:g}": [
            (f"equal within a factor of {MARGIN} at {high:g}", "equal", f"omoe / mmoe at p = {high:g}"),
            (f"OMoE has more error at {low:g}", "more", f"omoe / mmoe at p = {low:g}"),
        ],
        "(d) PLE is the best": [
            (f"less error than {other} at {p:g}", "less", f"ple / {other} at p = {p:g}")
            for p in correlations
            for other in ("mmoe", "omoe", "shared_bottom")
        ],
    }
    made = []
    for claim, parts in asked.items():
        tested = [name for _, what, name in parts if what != "equal"]
        adjusted = dict(zip(tested, holm([found[name].p_value for name in tested]).tolist(), strict=True))
        told = []
        for text, what, name in parts:
            p_value = adjusted.get(name, math.nan)
            tail = "" if what == "equal" else f", p = {p_value:.3f}"
            told.append([text, judged(found[name], what, p_value), found[name].text + tail])
        verdicts = [verdict for _, verdict, _ in told]
        whole = verdicts[0] if len(set(verdicts)) == 1 else f"holds in {verdicts.count('holds')} of {len(verdicts)} parts"
        made.append({"claim": claim, "verdict": whole, "parts": told})
    return made


def measured(folder: Path) -> dict[str, Any]:
    """A finished comparison: what each run missed, and what `mtrec compare` said.

    Raises ValueError where the predictions are not those of the test rows beside them.
    """
    results = json.loads((folder / "comparison" / "results.json").read_text())
    test = pq.read_table(folder / "data" / "test.parquet")
    tasks = list(results["primary"])
    variants: dict[str, Any] = {}
    for name, each in results["variants"].items():
        missed: dict[str, dict[str, dict[str, float]]] = {}
        for seed in each["runs"]:
            place = folder / "comparison" / "runs" / name.replace(" ", "_") / f"seed-{seed}" / "predictions.parquet"
            predicted = pq.read_table(place)
            missed[seed] = {}
            for task in tasks:
                label, truth = test[task].to_numpy(), test[f"{task}_truth"].to_numpy().astype(np.float64)
                if not np.allclose(predicted[f"label/{task}"].to_numpy(), label, rtol=0, atol=1e-6):
                    raise ValueError(f"{place}: `label/{task}` should hold the labels of {folder / 'data'}, row by row.")
                error = float(np.square(predicted[task].to_numpy() - truth).mean())
                missed[seed][task] = {"missed": error / float(truth.var()), "mse": error, "truth_variance": float(truth.var())}
        done = list(each["runs"].values())
        variants[name] = {
            "missed": missed,
            "parameters": each["size"]["parameters"],
            "expert_layers": each["size"]["matched"]["to"] if each["size"]["matched"] else None,
            "wall_seconds": [run["wall_seconds"] for run in done],
        }
    keys = ("variant", "task", "metric", "value", "low", "high", "adjusted_p", "outcome", "verdict")
    differences = [{key: row[key] for key in keys} for row in results["differences"] if row["primary"]]
    facts = {"test_rows": results["test_rows"], "versions": results["facts"]["versions"]}
    return {"variants": variants, "differences": differences, **facts}


def shares(variant: Mapping[str, Any]) -> list[float]:
    """The missed share of each run, mean over the tasks."""
    return [statistics.fmean(task["missed"] for task in tasks.values()) for tasks in variant["missed"].values()]


def write_report(work: Path, draws: int, rows: int, correlations: Sequence[float]) -> dict[str, Any]:
    """Writes results.json, REPORT.md and error.svg into WORK from its comparisons; returns the results."""
    cells = {(draw, p): measured(work / f"draw-{draw}" / f"p-{p:g}") for draw in range(draws) for p in correlations}
    missed = {
        (draw, p, name): statistics.fmean(shares(each))
        for (draw, p), cell in cells.items()
        for name, each in cell["variants"].items()
    }
    found = ratios(missed)
    results = {
        "draws": draws,
        "rows": rows,
        "correlations": list(correlations),
        "margin": MARGIN,
        "tuning": yaml.safe_load((work / "tuning.yaml").read_text()),
        "learning_rate": yaml.safe_load((work / "compare.yaml").read_text())["set"][RATE],
        "comparisons": [{"draw": draw, "p": p, **cell} for (draw, p), cell in cells.items()],
        "ratios": [asdict(each) for each in found.values()],
        "claims": claims(found, correlations),
    }
    write_atomically(work / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(work / "error.svg", error_svg(missed, correlations))
    write_atomically(work / "REPORT.md", markdown(results, missed, found))
    return results


def markdown(results: Mapping[str, Any], missed: Missed, found: Mapping[str, Ratio]) -> str:
    """The report."""
    comparisons, draws, correlations = results["comparisons"], results["draws"], results["correlations"]
    runs = [seconds for cell in comparisons for each in cell["variants"].values() for seconds in each["wall_seconds"]]
    seeds = len(next(iter(comparisons[0]["variants"].values()))["missed"])
    parts = [(each["claim"][:3], *part) for each in results["claims"] for part in each["parts"]]
    lines = [
        "# Do the papers' claims about task correlation hold here?",
        "",
        f"{draws} draws of truth, rows and noise x p in {_listed(correlations)} x 4 architectures x {seeds} seeds, and the A/A "
        f"row of each comparison: {len(runs)} runs, together {sum(runs) / 60:.0f} minutes of one core, the tuning apart. "
        f"{results['rows']:,} rows a data set, 10/12 of them for training, two epochs; "
        f"torch {comparisons[0]['versions'].get('torch')}. correlation_study.py made this page; results.json has every run.",
        "",
        "| claim | here |",
        "|---|---|",
        *(f"| {each['claim']} | **{each['verdict']}** |" for each in results["claims"]),
        "",
        "The missed share is the mean squared error against the label *without* noise, over that label's variance (0 is perfect, "
        "1 a constant); a ratio is taken within a draw and averaged on the log scale, with the 95 % interval of Student's t over "
        f"the {draws} draws; p is Holm's over the parts of a claim, the interval is for its ratio alone. \"Holds\": p < .05 "
        f"in the claim's direction; for \"flat\" and \"equal\", that the whole interval lies within 1 / {MARGIN} to {MARGIN}. "
        "\"The opposite\": the same on the other side. \"Not shown\": neither was seen.",
        "",
        "![missed share relative to MMoE at the lowest p, by p](error.svg)",
        "",
        "## The claims, part by part",
        "",
        "| claim | part | verdict | ratio of missed shares |",
        "|---|---|---|---|",
        *(f"| {' | '.join(part)} |" for part in parts),
        "",
        *_errors(results, missed),
        *_stuck(comparisons),
        *_by_comparison(comparisons),
        *_tuning(results),
        "## All ratios",
        "",
        *(f"- {each.text}" for each in found.values()),
        "",
    ]
    return "\n".join(lines)


def _errors(results: Mapping[str, Any], missed: Missed) -> list[str]:
    """How well the models learned: the missed share of every cell, draw by draw."""
    draws, correlations = results["draws"], results["correlations"]
    names = sorted({name for _, _, name in missed}, key=lambda name: (name.endswith(" again"), name))
    cells = {(cell["draw"], cell["p"]): cell for cell in results["comparisons"]}
    first = [next(iter(next(iter(cells[d, correlations[0]]["variants"].values()))["missed"].values())) for d in range(draws)]
    variance = [first[draw]["task_1"]["truth_variance"] for draw in range(draws)]
    lines = [
        "## How much of what can be explained is missed",
        "",
        "In percent, by draw (in brackets: the variance of its label without noise; that of the noise is 0.01), and the "
        "geometric mean. Task 1 is the same at every p of a draw.",
        "",
        "| p | variant | parameters | " + " | ".join(f"draw {d} ({variance[d]:.2f})" for d in range(draws)) + " | all |",
        "|---|---|---|" + "---|" * (draws + 1),
    ]
    for p in correlations:
        for name in names:
            row = [missed[draw, p, name] for draw in range(draws)]
            mean = math.exp(statistics.fmean(math.log(each) for each in row))
            size = cells[0, p]["variants"][name]["parameters"]
            lines.append(" | ".join([f"| {p:g}", name, f"{size:,}", *(f"{100 * each:.2f}" for each in (*row, mean))]) + " |")
    return [*lines, ""]


def _stuck(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """Runs that ended in a bad place: a mean over few of them is easily theirs."""
    count: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for draw in sorted({cell["draw"] for cell in comparisons}):
        own = [cell for cell in comparisons if cell["draw"] == draw]
        median = statistics.median(share for cell in own for each in cell["variants"].values() for share in shares(each))
        for cell in own:
            for name, each in cell["variants"].items():
                total[name] += len(shares(each))
                count[name] += sum(share > STUCK * median for share in shares(each))
    listed = ", ".join(f"{name} {count[name]} of {total[name]}" for name in total)
    return [f"Runs that missed more than {STUCK:g} times the median of their draw: {listed}.", ""]


def _by_comparison(comparisons: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `mtrec compare` itself concluded, draw by draw: on one data set, over seeds and test rows."""
    lines = [
        "## What each comparison said by itself",
        "",
        "Against MMoE, RMSE of the labels, both tasks of each draw; Holm-corrected within a comparison. With 2 seeds a "
        "comparison sees large differences only, and says so.",
        "",
        "| p | variant | better | worse | no difference |",
        "|---|---|---|---|---|",
    ]
    for p in sorted({cell["p"] for cell in comparisons}):
        rows = [row for cell in comparisons if cell["p"] == p for row in cell["differences"]]
        for name in dict.fromkeys(row["variant"] for row in rows):
            count = Counter(row["outcome"] for row in rows if row["variant"] == name)
            lines.append(f"| {p:g} | {name} | {count['better']} | {count['worse']} | {count['no difference']} |")
    return [*lines, ""]


def _tuning(results: Mapping[str, Any]) -> list[str]:
    """The learning rate: what was tried, on draws of their own."""
    tuning, draws = results["tuning"], len(results["tuning"])
    rates = sorted({trial[RATE] for each in tuning for trials in each.values() for trial in trials})
    lines = [
        "## Learning rate",
        "",
        "The mean of both tasks' R2 on validation rows, labels with noise, one run a cell, on draws that are used for nothing "
        f"else, at p = 0.9. All architectures got {results['learning_rate']:g}: the best mean over both of the logarithm "
        "of what is left unexplained.",
        "",
        "| draw | variant | " + " | ".join(f"{rate:g}" for rate in rates) + " |",
        "|---|---|" + "---|" * len(rates),
    ]
    for draw in range(draws):
        for name, trials in tuning[draw].items():
            by_rate = {trial[RATE]: trial["metric"] / 2 for trial in trials}
            lines.append(f"| tuning {draw} | {name} | " + " | ".join(f"{by_rate[rate]:.4f}" for rate in rates) + " |")
    return [*lines, ""]


def _listed(values: Sequence[float]) -> str:
    return "{" + ", ".join(f"{value:g}" for value in values) + "}"
