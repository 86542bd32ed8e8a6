"""From saved predictions to results.json and results.csv: metrics, paired differences, verdicts, cost.

Nothing here trains or predicts: whoever has the folder of a comparison can compute its numbers again, with this or with
scikit-learn.

Legend: N test rows.
"""

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mtrec.atomic import write_atomically
from mtrec.compare.balance import balancing_series
from mtrec.compare.interval import Interval, metric_interval
from mtrec.compare.measured import Measured
from mtrec.compare.plan import Plan
from mtrec.compare.runs import (
    events_of,
    folder_of,
    gate_shares,
    is_done,
    read_done,
)
from mtrec.compare.statistics import (
    Difference,
    Scores,
    holm,
    paired_difference,
    smallest_detectable,
    undefined_difference,
    what_sharpens,
)
from mtrec.compare.verdict import delta_m, direction, outcome, pareto_front, seesaw, verdict
from mtrec.evaluate import segment_name
from mtrec.run import open_run

Floats = NDArray[np.float64]
T = TypeVar("T")

RESULTS = "results.json"
MAX_SEGMENTS = 10  # the largest; the others are left out
CALIBRATION_BINS = 12
POWER = 0.8
FEW_SEEDS = 4  # fewer than that: a note says what they are worth
BATCHES = ("train", "batch_size", "num_streams", "shuffle", "shuffle_window")  # keys of `data` that batches depend on


def finished_runs(plan: Plan, folder: Path) -> dict[str, dict[int, str]]:
    """{variant: {seed: name}} of the runs that are done, the A/A row last."""
    found = {}
    for variant in [*plan.experiments, plan.again]:
        seeds = plan.again_seeds if variant == plan.again else plan.seeds
        found[variant] = {seed: f"{variant}/seed-{seed}" for seed in seeds if is_done(folder, f"{variant}/seed-{seed}")}
    return found


def can_compute(plan: Plan, folder: Path) -> bool:
    """Whether the baseline and a variant (the A/A row, at least) have the two finished runs that a comparison needs."""
    short = _short(finished_runs(plan, folder))
    return plan.baseline not in short and len(short) < len(plan.experiments)


def _short(runs: Mapping[str, Mapping[int, str]]) -> list[str]:
    return [name for name, by_seed in runs.items() if len(by_seed) < 2]


def compute(plan: Plan, folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is known of a comparison from the files of its runs, as plain values.

    `facts`: what the job knows beside them: sizes and matching, the search, versions (plan.json).
    Raises ValueError where the baseline or all variants have fewer than two finished runs.
    """
    if not can_compute(plan, folder):
        raise ValueError(
            f"{folder} holds too few finished runs: the baseline and a variant need two seeds each. `--resume` goes on."
        )
    runs = finished_runs(plan, folder)
    short = _short(runs)
    notes = [f"{name} has {len(runs[name])} finished runs and is left out; it needs two." for name in short]
    notes += [
        f"{name}: {len(by_seed)} of {len(plan.seeds)} seeds are finished."
        for name, by_seed in runs.items()
        if name not in short and len(by_seed) < len(plan.seeds)
    ]
    complete = not notes
    runs = {name: by_seed for name, by_seed in runs.items() if name not in short}
    fewest = min(len(by_seed) for by_seed in runs.values())
    if fewest < FEW_SEEDS:
        notes.append(f"{fewest} seeds say little about how much re-runs differ, and make the intervals wide: run five or more.")
    _check_one_test(folder, runs)
    measured = Measured(folder, runs, plan.experiments[plan.baseline])
    metrics = {
        task: list(dict.fromkeys([plan.primary.get(task, ""), *measured.metrics(task)])) for task in measured.objectives.names
    }
    metrics = {task: [name for name in names if name] for task, names in metrics.items()}
    attempt = _Attempt(notes)
    rows, primaries = _differences(plan, measured, runs, metrics, attempt)
    variants = {name: _variant(plan, folder, facts, measured, metrics, name, by_seed, attempt) for name, by_seed in runs.items()}
    segments = _segments(plan, measured, runs, attempt)
    found = {
        "name": plan.comparison.name,
        "baseline": plan.baseline,
        "again": plan.again,
        "primary": plan.primary,
        "seeds": list(plan.seeds),
        "again_seeds": list(plan.again_seeds),
        "sweeps": {name: {point: each for point, each in sweep.items() if point in runs} for name, sweep in plan.sweeps.items()},
        "budget": plan.comparison.budget.model_dump(exclude_none=True) if plan.comparison.budget else None,
        "match": plan.comparison.match,
        "test_rows": measured.rows,
        "test_users": None if measured.user is None else len(np.unique(measured.user)),
        "user_column": measured.experiment.evaluation.group_by,
        "segment_column": plan.comparison.segment,
        "complete": complete,
        "batches_differ_in": _batches_differ_in(folder, runs),
        "notes": list(dict.fromkeys(notes)),
        "variants": variants,
        "differences": rows,
        "across": _across(plan, variants, rows, primaries),
        "segments": segments,
        "facts": dict(facts),
    }
    plain: dict[str, Any] = _plain(found)
    return plain


class _Attempt:
    """Computes what may fail: one metric must not keep back the others, but a note says so."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes

    def __call__(self, what: str, compute: Callable[[], T], undefined: Callable[[str], T]) -> T:
        """What `compute` returns; where it raises, what `undefined` makes of the reason."""
        try:
            return compute()
        except (ArithmeticError, RuntimeError, ValueError) as error:
            why = f"not computed: {type(error).__name__}: {error}"
            self._notes.append(f"{what} is undefined, {why}")
            return undefined(why)


def _check_one_test(folder: Path, runs: Mapping[str, Mapping[int, str]]) -> None:
    """Raises ValueError naming the runs that predicted other test files than the first one: features count there, too."""
    found: dict[Any, list[str]] = {}
    for by_seed in runs.values():
        for name in by_seed.values():
            found.setdefault(read_done(folder, name).get("test_fingerprint"), []).append(name)
    if len(found) > 1:
        told = "; ".join(f"{fingerprint}: {', '.join(names)}" for fingerprint, names in found.items())
        raise ValueError(
            f"{folder}: all runs should have predicted the same test files. Found {len(found)} fingerprints of `data.test` "
            f"({told}). Files changed between runs: compare in a new folder, or remove done.json of the runs that predicted "
            "others than those that are there now, and --resume predicts these again."
        )


def _batches_differ_in(folder: Path, runs: Mapping[str, Mapping[int, str]]) -> list[str]:
    """The keys in which variants differ so that, with the same seed, they do not see the same batches."""
    data = [open_run(folder_of(folder, next(iter(by_seed.values())))).experiment.data for by_seed in runs.values()]
    return [f"data.{key}" for key in BATCHES if any(getattr(each, key) != getattr(data[0], key) for each in data)]


def _size(size: Mapping[str, Any], done: Mapping[str, Any]) -> dict[str, Any]:
    """The size that was planned for a variant, with the numbers of the model that was trained."""
    found = {**size, "parameters": done["dense_parameters"], "flops": done["flops_per_row"]}
    if size["matched"] is not None:
        found["matched"] = {**size["matched"], "size": found[size["matched"]["what"]]}
    return found


def _variant(
    plan: Plan,
    folder: Path,
    facts: Mapping[str, Any],
    measured: Measured,
    metrics: Mapping[str, Sequence[str]],
    name: str,
    by_seed: Mapping[int, str],
    attempt: _Attempt,
) -> dict[str, Any]:
    """What is known of one variant (the A/A row is the baseline's)."""
    runs = {str(seed): open_run(folder_of(folder, each)) for seed, each in by_seed.items()}
    done = {str(seed): read_done(folder, each) for seed, each in by_seed.items()}
    first = next(iter(done))
    return {
        "diff": plan.diffs.get(name, {}),
        "baseline": name == plan.baseline,
        "again": name == plan.again,
        "size": _size(facts["sizes"].get(name, facts["sizes"][plan.baseline]), done[first]),
        "validated": runs[first].experiment.data.validation is not None,
        "search": facts["search"].get(name, facts["search"][plan.baseline]),
        "cost": _cost(list(done.values())),
        "runs": done,
        "metrics": {
            task: {metric: _interval(measured, name, task, metric, attempt) for metric in names}
            for task, names in metrics.items()
        },
        "curves": _curves(folder, by_seed, plan.primary),
        "gates": _gates(folder, by_seed),
        "balancing": {seed: balancing_series(events_of(run)) for seed, run in runs.items()},
        "calibration": {task: _calibration(measured, name, task) for task in measured.objectives.names},
    }


def _differences(
    plan: Plan, measured: Measured, runs: Mapping[str, Any], metrics: Mapping[str, Sequence[str]], attempt: _Attempt
) -> tuple[list[dict[str, Any]], dict[tuple[str, str], Difference]]:
    """One entry a variant, task and metric, and the differences of the primary metrics.

    Holm over variants x primary metrics; the A/A row stands apart, it is a check.
    """
    found: list[tuple[str, str, str, bool, Difference]] = []
    for variant in runs:
        if variant == plan.baseline:
            continue
        for task, names in metrics.items():
            for metric in names:
                base = measured.scores(plan.baseline, task, metric)
                difference = _paired(measured, base, variant, task, metric, attempt)
                found.append((variant, task, metric, plan.primary.get(task) == metric, difference))
    counted = [index for index, (variant, _, _, primary, _) in enumerate(found) if primary and variant != plan.again]
    adjusted = dict(zip(counted, holm([found[index][4].p_value for index in counted]).tolist(), strict=True))
    rows, primaries = [], {}
    for index, (variant, task, metric, primary, difference) in enumerate(found):
        p_value = adjusted.get(index, difference.p_value)
        numbers = dataclasses.asdict(difference)
        values = {"baseline_value": numbers.pop("baseline"), "variant_value": numbers.pop("variant")}
        row = {"variant": variant, "task": task, **numbers, **values, "metric": metric, "primary": primary}
        row |= {"adjusted_p": p_value if primary else None, "undefined": math.isnan(difference.p_value)}
        if primary:
            comparisons = max(1, len(counted)) if variant != plan.again else 1
            row |= {
                "outcome": outcome(difference, p_value),
                **_judged(variant, plan.baseline, task, difference, p_value, comparisons, attempt),
            }
            primaries[variant, task] = difference
        rows.append(row)
    return rows, primaries


def _paired(
    measured: Measured,
    base: Scores,
    variant: str,
    task: str,
    metric: str,
    attempt: _Attempt,
    keep_N: NDArray[np.bool_] | None = None,
    **options: Any,
) -> Difference:
    """The difference of a variant to the baseline, whose scores are `base`, on all rows or those of `keep_N`."""
    other = measured.scores(variant, task, metric, keep_N)

    def compute() -> Difference:
        return paired_difference(metric, base, other, **options)

    def undefined(why: str) -> Difference:
        seeds = min(len(each.prediction) for each in (base, other))
        return undefined_difference(metric, seeds, None, len(base.label), why)

    return attempt(f"{variant}, {task}: the difference in {metric}", compute, undefined)


def _judged(
    variant: str, baseline: str, task: str, difference: Difference, p_value: float, comparisons: int, attempt: _Attempt
) -> dict[str, Any]:
    """What is made of a difference in a primary metric: the verdict, the smallest detectable one, what would sharpen it."""
    return attempt(
        f"{variant}, {task}: the smallest detectable difference in {difference.metric}",
        lambda: {
            "verdict": verdict(variant, baseline, task, difference, p_value, comparisons),
            "detectable": smallest_detectable(difference, POWER, comparisons),
            "sharpen": what_sharpens(difference),
        },
        lambda why: {
            "verdict": f"{variant} against {baseline}, {task}: {outcome(difference, p_value)}",
            "detectable": None,
            "sharpen": "",
        },
    )


def _across(
    plan: Plan, variants: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], primaries: Mapping[tuple[str, str], Difference]
) -> dict[str, Any]:
    """{variant: MTL gain, seesaw, on the Pareto front}; over the primary metrics.

    The A/A row is no variant that could be chosen: it is not on the front and keeps none off it.
    """
    single = plan.single_task if plan.single_task in variants else None
    values = {
        name: {task: each["metrics"][task][metric]["value"] for task, metric in plan.primary.items()}
        for name, each in variants.items()
    }
    ordered = {task: metric for task, metric in plan.primary.items() if direction(metric)}  # of a ratio, more is not better
    larger = [direction(metric) > 0 for metric in ordered.values()]
    real = [name for name in values if name != plan.again]
    points = np.array([[values[name][task] for task in ordered] for name in real], dtype=np.float64)
    front = dict(zip(real, pareto_front(points, larger).tolist(), strict=True)) if ordered and np.isfinite(points).all() else {}
    found = {}
    for name in variants:
        adjusted = {row["task"]: row["adjusted_p"] for row in rows if row["variant"] == name and row["primary"]}
        differences = {task: difference for (variant, task), difference in primaries.items() if variant == name}
        found[name] = {
            "delta_m": delta_m(ordered, values[name], values[single]) if single and ordered else None,
            "delta_m_against": single,
            "seesaw": bool(differences) and seesaw(differences, adjusted),
            "pareto": front.get(name),
        }
    return found


def _interval(measured: Measured, variant: str, task: str, metric: str, attempt: _Attempt) -> dict[str, Any]:
    unknown = Interval(math.nan, math.nan, math.nan, dict.fromkeys(measured.tables[variant], math.nan))
    found = attempt(
        f"{variant}, {task}: {metric}",
        lambda: metric_interval(metric, measured.scores(variant, task, metric)),
        lambda why: unknown,
    )
    return {"value": found.value, "low": found.low, "high": found.high, "by_seed": {str(s): v for s, v in found.by_seed.items()}}


def _cost(done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over seeds: a machine has moments of its own."""
    names = (
        "dense_parameters",
        "table_parameters",
        "flops_per_row",
        "train_rows_per_second",
        "score_rows_per_second",
        "peak_memory_bytes",
        "wall_seconds",
        "steps",
    )
    found: dict[str, Any] = {}
    for name in names:
        values = [each[name] for each in done if each.get(name) is not None]
        found[name] = float(np.median(values)) if values else None
    return found


def _curves(folder: Path, by_seed: Mapping[int, str], primary: Mapping[str, str]) -> dict[str, Any]:
    """{task: {"metric", "steps", "by_seed": {seed: values}, "best_step"}} of the validations, and the training losses."""
    found: dict[str, Any] = {}
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for seed, name in by_seed.items():
        validations: dict[int, Any] = {}
        for event in events_of(open_run(folder_of(folder, name))):
            if event["event"] == "validation":
                validations[event["step"]] = event["metrics"]["tasks"]  # a repeated step of a resumed run: the last holds
            elif event["event"] == "step":
                for task, value in event["losses"].items():
                    losses.setdefault(task, {}).setdefault(str(seed), {})[event["step"]] = value
        for task, metric in primary.items():
            entry = found.setdefault(task, {"metric": metric, "by_seed": {}})
            entry["by_seed"][str(seed)] = [[step, values[task].get(metric)] for step, values in sorted(validations.items())]
    for task, entry in found.items():
        steps = sorted({step for points in entry["by_seed"].values() for step, _ in points})
        means = []
        for step in steps:
            values = [v for points in entry["by_seed"].values() for s, v in points if s == step and v is not None]
            means.append([step, float(np.mean(values)), float(np.std(values)), len(values)] if values else [step, None, None, 0])
        entry["mean"] = means
        known = [(step, mean) for step, mean, _, _ in means if mean is not None]
        entry["best_step"] = max(known, key=lambda each: _goodness(primary[task], each[1]))[0] if known else None
    return {"validation": found, "losses": {t: {s: sorted(v.items()) for s, v in by.items()} for t, by in losses.items()}}


def _goodness(metric: str, value: float) -> float:
    """Larger is better."""
    return direction(metric) * value if direction(metric) else -abs(value - 1)


def _gates(folder: Path, by_seed: Mapping[int, str]) -> dict[str, Any]:
    """{gate: {seed: {"steps", "shares"}}} from the logs; {} without gates. Experts have no order that seeds share."""
    found: dict[str, Any] = {}
    for seed, name in by_seed.items():
        for gate, each in gate_shares(events_of(open_run(folder_of(folder, name)))).items():
            found.setdefault(gate, {})[str(seed)] = each
    return found


def _calibration(measured: Measured, variant: str, task: str) -> dict[str, Any] | None:
    """Mean prediction and mean label in bins of equal rows, over all seeds; of one number a row."""
    spec = measured.objectives.specs[task]
    if spec.task.family == "multiclass":
        return None
    metric = "auc" if spec.given is None or spec.task.family in ("binary", "dwell") else "auc_given"
    scores = measured.scores(variant, task, metric)
    keep_N = ~np.isnan(scores.label)
    predictions = np.concatenate([each[keep_N] for each in scores.prediction.values()])
    labels = np.tile(scores.label[keep_N], len(scores.prediction))
    order = np.argsort(predictions, kind="stable")
    parts = [part for part in np.array_split(order, CALIBRATION_BINS) if len(part)]
    return {
        "prediction": [float(np.mean(predictions[part])) for part in parts],
        "label": [float(np.mean(labels[part])) for part in parts],
        "rows": [len(part) // len(scores.prediction) for part in parts],
    }


def _segments(plan: Plan, measured: Measured, runs: Mapping[str, Any], attempt: _Attempt) -> list[dict[str, Any]]:
    """The primary metrics on the rows of each value of the segment column (the largest ones); all of it exploratory."""
    if measured.segment is None:
        return []
    null = segment_name(None, set(measured.segment) - {None})
    values = np.array([null if each is None else each for each in measured.segment])
    names, counts = np.unique(values, return_counts=True)
    order = np.argsort(-counts)[:MAX_SEGMENTS]
    found = []
    for index in order:
        keep_N = values == names[index]
        for task, metric in plan.primary.items():
            base = measured.scores(plan.baseline, task, metric, keep_N)
            if len(np.unique(base.label[~np.isnan(base.label)])) < 2:
                continue  # nothing to order
            for variant in runs:
                if variant == plan.baseline:
                    continue
                difference = _paired(measured, base, variant, task, metric, attempt, keep_N, bootstrap_draws=200)
                entry = {
                    "segment": str(names[index]),
                    "rows": int(counts[index]),
                    "task": task,
                    "metric": metric,
                    "variant": variant,
                }
                entry |= {key: getattr(difference, key) for key in ("value", "low", "high", "baseline", "p_value")}
                found.append({**entry, "variant_value": difference.variant})
    return found


def _plain(value: Any) -> Any:
    """Values that JSON has; NaN and infinities become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(results: Mapping[str, Any], folder: Path) -> None:
    """results.json (everything) and results.csv (one line a variant, task and metric)."""
    write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    rows = {(row["variant"], row["task"], row["metric"]): row for row in results["differences"]}
    names = ("value", "low", "high", "standard_error", "variance_users", "variance_seeds", "p_value", "adjusted_p", "detectable")
    part = folder / "results.csv.part"
    with part.open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        head = ["variant", "task", "metric", "primary", "metric_value", "metric_low", "metric_high", "seeds"]
        writer.writerow(
            [*head, *(f"difference_{name}" if name in ("value", "low", "high") else name for name in names), "outcome"]
        )
        for variant, each in results["variants"].items():
            for task, metrics in each["metrics"].items():
                for metric, found in metrics.items():
                    row = rows.get((variant, task, metric), {})
                    primary = results["primary"].get(task) == metric
                    line = [variant, task, metric, primary, found["value"], found["low"], found["high"], len(found["by_seed"])]
                    writer.writerow([*line, *(row.get(name) for name in names), row.get("outcome", "")])
    part.replace(folder / "results.csv")
