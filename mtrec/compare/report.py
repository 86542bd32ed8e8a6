"""report.html: of a comparison (`comparison_report`) and of one run (`run_report`)."""

import json
from collections.abc import Mapping
from typing import Any

import yaml

from mtrec.checkpoint import damaged, find, told
from mtrec.compare import figures
from mtrec.compare.balance import balancing_series, is_told, section
from mtrec.compare.page import Page, badge, stacked
from mtrec.compare.runs import events_of, gate_shares
from mtrec.compare.table import signed, summary
from mtrec.compare.verdict import none_seen
from mtrec.evaluate import MAIN_METRIC
from mtrec.kinds import counted
from mtrec.model import task_specs
from mtrec.run import Run

Results = Mapping[str, Any]


def comparison_report(results: Results) -> str:
    """The page of a comparison, from what `results.compute` returned (or results.json holds)."""
    page = Page(results["name"])
    _verdicts(page, results)
    _metrics(page, results)
    _differences(page, results)
    _fairness(page, results)
    _training(page, results)
    _objectives(page, results)
    _balancing(page, results)
    _gates(page, results)
    _segments(page, results)
    _cost(page, results)
    _provenance(page, results)
    return page.text()


def _primary_rows(results: Results) -> dict[tuple[str, str], Mapping[str, Any]]:
    return {(row["variant"], row["task"]): row for row in results["differences"] if row["primary"]}


def _verdicts(page: Page, results: Results) -> None:
    users = (
        f"{results['test_users']:,} users ({results['user_column']})"
        if results["test_users"]
        else "no user column: rows are taken as independent, which makes intervals too narrow where a user has several rows"
    )
    others = [name for name in results["variants"] if name not in (results["baseline"], results["again"])]
    page.paragraph(
        f"{counted(len(others), 'variant')} against {results['baseline']}, {len(results['seeds'])} seeds each; "
        f"{results['test_rows']:,} test rows, {users}. Budget: {_budget(results)}. Widths: "
        f"{'as in the experiments' if results['match'] == 'none' else 'matched by ' + results['match']}."
    )
    remark = results["facts"]["comparison"].get("note")
    for note in [*([remark] if remark else []), *results["notes"]]:
        page.paragraph(note, "note")
    rows, table = _primary_rows(results), []
    for name, variant in results["variants"].items():
        cells = [
            stacked(name, "A/A: other seeds") if variant["again"] else stacked(name, "baseline") if variant["baseline"] else name
        ]
        for task, metric in results["primary"].items():
            row = rows.get((name, task))
            if row is None:
                cells.append(stacked(_number(variant["metrics"][task][metric]["value"], 4), "as measured"))
            elif row["value"] is None:
                cells.append(badge("undefined"))
            else:
                interval = f"{signed(row['low'])} to {signed(row['high'])}"
                cells.append(stacked(badge(row["outcome"]), signed(row["value"]), interval))
        across = results["across"][name]
        gain = across["delta_m"]
        cells += [
            "-" if gain is None else f"{100 * gain:+.2f} %",
            "yes" if across["seesaw"] else "no" if not variant["baseline"] else "-",
            "-" if across["pareto"] is None else "yes" if across["pareto"] else "no",
        ]
        table.append(cells)
    tasks = [f"{task}: {metric}" for task, metric in results["primary"].items()]
    page.table(["variant", *tasks, "MTL gain", "seesaw", "Pareto front"], table, numbers=(len(tasks) + 1,))
    page.bullets(summary(results))
    verdicts = [row["verdict"] for row in results["differences"] if row["primary"] and row["variant"] != results["again"]]
    page.code("\n".join(verdicts), f"All verdicts in words ({len(verdicts)})")
    against = next(iter(results["across"].values()))["delta_m_against"]
    page.paragraph(
        "Differences are the variant's metric minus the baseline's, averaged over seeds, with 95 % intervals that count both the "
        "seeds and the users who happen to be in the test rows. Better and worse are decided at 5 %, Holm-corrected over all "
        "variants and their primary metrics; the A/A row is the baseline again with other seeds, where any difference is chance. "
        + (f"MTL gain: mean relative change of the primary metrics against {against}. " if against else "")
        + "Seesaw: one objective is better and another worse.",
        "soft",
    )


def _budget(results: Results) -> str:
    budget = results["budget"]
    return "the epochs of the experiment" if not budget else ", ".join(f"{value:,} {name}" for name, value in budget.items())


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _metrics(page: Page, results: Results) -> None:
    page.heading("Metrics with their intervals")
    page.paragraph(
        "Dot: mean over seeds with its 95 % interval; strokes: the seeds. Two intervals may "
        "overlap although the paired difference is clear, since both share the test users.",
        "soft",
    )
    page.figures(figures.metric_intervals(results, task, metric) for task, metric in results["primary"].items())
    rows = []
    for task in next(iter(results["variants"].values()))["metrics"]:
        for name, variant in results["variants"].items():
            for metric, found in variant["metrics"][task].items():
                rows.append([task, metric, name, _number(found["value"], 5), _number(found["low"], 5), _number(found["high"], 5)])
    rows.sort(key=lambda row: (row[0], row[1]))
    page.table(
        ["task", "metric", "variant", "value", "low", "high"], rows, numbers=(3, 4, 5), fold=f"All metrics ({len(rows)} lines)"
    )


def _differences(page: Page, results: Results) -> None:
    page.heading("Paired differences")
    page.figures(figures.differences(results, task, metric) for task, metric in results["primary"].items())
    rows = [
        [
            row["task"],
            row["metric"],
            row["variant"],
            "-" if row["value"] is None else f"{row['value']:+.5f}",
            "-" if row["low"] is None else f"{row['low']:+.5f} to {row['high']:+.5f}",
            "-" if row["p_value"] is None else f"{row['p_value']:.3f}",
            "primary" if row["primary"] else "exploratory",
            row["method"],
        ]
        for row in results["differences"]
    ]
    head = ["task", "metric", "variant", "difference", "95 % interval", "p, not corrected", "", "method"]
    page.table(head, rows, numbers=(3, 4, 5), fold=f"All differences, exploratory ones included ({len(rows)} lines)")
    page.heading("Where the variance comes from")
    page.paragraph(
        "Variance of each difference from the users in the test rows and from the seeds; and "
        "the smallest true difference that this comparison would have found with 80 % power "
        "after correction.",
        "soft",
    )
    page.figures(figures.variance_sources(results, task, metric) for task, metric in results["primary"].items())
    page.table(
        ["task", "variant", "would be seen", "what would sharpen it"],
        ([r["task"], r["variant"], _detectable(r), r["sharpen"]] for r in results["differences"] if r["primary"]),
        numbers=(2,),
        fold="Smallest detectable differences",
    )


def _detectable(row: Mapping[str, Any]) -> str:
    size = row["detectable"]
    return "-" if size is None else none_seen(row["metric"], size) or _number(size, 5)


def _fairness(page: Page, results: Results) -> None:
    page.heading("Did every variant have a fair chance?")
    rows = []
    for name, variant in results["variants"].items():
        search, size = variant["search"], variant["size"]["matched"]
        runs = variant["runs"].values()
        tried = "none: the experiment's own values"
        if search["trials"]:
            edge = f"; at the edge of its range: {', '.join(search['at_edge'])}" if search["at_edge"] else ""
            tried = (
                f"{search['trials']} trials, chose {', '.join(f'{k} = {_short(v)}' for k, v in search['chosen'].items())}{edge}"
            )
        steps = sorted({run["steps"] for run in runs if run["steps"] is not None})
        tested = sorted({run["step"] for run in runs})
        done = "as written" if size is None else f"{size['from']} to {size['to']}"
        if size is not None and abs(size["size"] - size["target"]) > 0.02 * size["target"]:
            done += f" ({size['size'] / size['target'] - 1:+.1%} {size['what']})"
        rows.append(
            [
                name,
                tried,
                done,
                f"{variant['size']['parameters']:,}",
                _several(steps),
                _several(tested),
                str(len(variant["runs"])),
            ]
        )
    head = ["variant", "search", "expert_layers", "dense parameters", "steps trained", "step tested", "seeds"]
    page.table(head, rows, numbers=(3, 6))
    page.paragraph(f"{_batches(results)} {_tested(results)}; the test rows are read once, after that.", "soft")


def _batches(results: Results) -> str:
    other = results["batches_differ_in"]
    if other:
        return f"Variants differ in {', '.join(other)}: they do not see the same batches."
    return "All variants see the same batches in the same order for a seed."


def _tested(results: Results) -> str:
    last = [name for name, variant in results["variants"].items() if not variant["validated"]]
    if len(last) == len(results["variants"]):
        return "There are no validation rows, so the checkpoint that is tested is the last"
    rest = f" (of {', '.join(last)}, without such rows, the last)" if last else ""
    return f"The checkpoint that is tested is the best on the validation rows{rest}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _several(values: list[int]) -> str:
    return "-" if not values else f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"


def _training(page: Page, results: Results) -> None:
    variants = results["variants"]
    if not any(each[1] is not None for v in variants.values() for c in v["curves"]["validation"].values() for each in c["mean"]):
        return
    page.heading("Learning curves")
    page.paragraph("Mean over seeds on the validation rows, with a band of one standard deviation.", "soft")
    page.legend(figures.legend(results))
    page.figures(figures.learning_curves(results, task) for task in results["primary"])
    rows = [
        [name, *(_number(variant["curves"]["validation"][task]["best_step"], 0) for task in results["primary"])]
        for name, variant in variants.items()
    ]
    page.table(["best step of", *results["primary"]], rows, numbers=range(1, 1 + len(results["primary"])))


def _objectives(page: Page, results: Results) -> None:
    tasks = list(results["primary"])
    variants = results["variants"]
    preferences = [each for sweep in results.get("sweeps", {}).values() for each in sweep.values()]
    if len(tasks) > 1:
        page.heading("Objectives against each other")
        page.paragraph(
            "A ring: on the Pareto front over all objectives. Mind the intervals above: neighbours may differ by chance."
            + (f" Joined: one method with several preferences, given as {':'.join(preferences[0])}." if preferences else ""),
            "soft",
        )
        page.legend(figures.legend(results, again=True))
        pairs = [(a, b) for index, a in enumerate(tasks) for b in tasks[index + 1 :]]
        page.figures(figures.pareto(results, first, second) for first, second in pairs[:6])
    calibrated = [
        task for task in next(iter(variants.values()))["calibration"] if next(iter(variants.values()))["calibration"][task]
    ]
    if calibrated:
        page.heading("Calibration")
        page.paragraph("Bins of equal numbers of test rows, all seeds together; in natural units.", "soft")
        page.legend(figures.legend(results))
        page.figures(figures.calibration(results, task) for task in calibrated)


def _balancing(page: Page, results: Results) -> None:
    runs = {name: each.get("balancing", {}) for name, each in results["variants"].items() if not each["again"]}
    if any(is_told(series) for seeds in runs.values() for series in seeds.values()):
        against = next(iter(results["across"].values()))["delta_m_against"]
        rest = {point for sweep in results["sweeps"].values() for point in list(sweep)[1:]}
        section(page, runs, against, rest)


def _gates(page: Page, results: Results) -> None:
    gated = {name: each["gates"] for name, each in results["variants"].items() if each["gates"] and not each["again"]}
    if not gated:
        return
    page.heading("Gates")
    page.paragraph(
        "Mean weight that each gate gives to each expert, of the first seed. In cgc and ple "
        "a gate sees its task's own experts first, then the shared ones; elsewhere experts "
        "are numbered as they lie in the model.",
        "soft",
    )
    page.figures(figures.gate_heat(gates, name) for name, gates in gated.items())
    page.figures(figures.expert_use(gates, name) for name, gates in gated.items())


def _segments(page: Page, results: Results) -> None:
    if not results["segments"]:
        return
    page.heading(f"By segment: {results['segment_column']}")
    page.paragraph(
        "Exploratory and not corrected: a dot marks an interval that leaves out 0, and some "
        "will by chance. Test rows of each segment in brackets; segments without both labels "
        "are left out.",
        "soft",
    )
    tasks = list(dict.fromkeys(row["task"] for row in results["segments"]))
    variants = len({row["variant"] for row in results["segments"]} - {results["again"]})
    page.figures((figures.segments(results, task) for task in tasks), wide=variants > figures.MANY)


def _cost(page: Page, results: Results) -> None:
    page.heading("Cost against quality")
    variants = results["variants"]
    page.legend(figures.legend(results))
    page.figures(figures.cost_against_quality(results, task, cost) for cost in figures.COSTS for task in results["primary"])
    rows = [
        [
            name,
            f"{cost['dense_parameters']:,.0f}",
            f"{cost['table_parameters']:,.0f}",
            f"{cost['flops_per_row']:,.0f}",
            _number(cost["train_rows_per_second"], 0),
            _number(cost["score_rows_per_second"], 0),
            f"{cost['peak_memory_bytes'] / 1e6:,.0f}",
            _number(cost["wall_seconds"], 1),
        ]
        for name, cost in ((name, each["cost"]) for name, each in variants.items())
    ]
    head = [
        "variant",
        "dense parameters",
        "table parameters",
        "FLOPs a row",
        "rows/s, training",
        "rows/s, scoring",
        "peak memory, MB",
        "wall time, s",
    ]
    page.table(head, rows, numbers=range(1, 8))
    page.paragraph(
        "Medians over seeds, of one process; FLOPs are those of a forward pass of the dense "
        "part (training takes three times that). Speeds depend on what else the machine did.",
        "soft",
    )


def _provenance(page: Page, results: Results) -> None:
    page.heading("What was compared")
    rows = [
        [name, json.dumps(each["diff"]) if each["diff"] else "-"]
        for name, each in results["variants"].items()
        if not each["again"]
    ]
    page.table(["variant", "difference to the base"], rows)
    facts = results["facts"]
    train = facts["train"]
    tested = next(iter(next(iter(results["variants"].values()))["runs"].values()))
    page.table(
        ["", ""],
        [
            ["made", facts["made"]],
            ["versions", ", ".join(f"{name} {version}" for name, version in facts["versions"].items())],
            ["seeds", f"{', '.join(map(str, results['seeds']))}; A/A {', '.join(map(str, results['again_seeds']))}"],
            [
                "training data",
                f"{train['rows']:,} rows (before `where`) in {counted(train['files'], 'file')}, "
                f"fingerprint {train['fingerprint']}",
            ],
            ["test data", f"{results['test_rows']:,} rows, fingerprint {tested['test_fingerprint']}"],
        ],
    )
    page.code(facts["base"], "The base experiment, every default written out")
    page.code(yaml.safe_dump(facts["comparison"], sort_keys=False), "The comparison file")


def run_report(run: Run) -> str:
    """The page of one run: its metrics, learning curves, gates, cost and configuration."""
    events = list(events_of(run))
    page = Page(run.experiment.name)
    last = next((event for event in reversed(events) if event["event"] == "validation"), None)
    ended = next((event for event in reversed(events) if event["event"] == "ended"), None)
    bad = damaged(run.checkpoints)
    found = next((each for each in find(run.checkpoints, verify=False) if each.folder.name not in bad), None)
    state = "training has not ended" if ended is None else f"ended at step {ended['step']:,} ({ended['reason']})"
    page.paragraph(
        f"{run.experiment.model.architecture.kind}, tasks {', '.join(run.experiment.tasks)}; "
        f"{run.info['train']['rows']:,} training rows; {state}; "
        + (f"newest checkpoint at step {found.step:,}." if found else f"no checkpoint{' that can be trusted' if bad else ''}.")
    )
    if bad:
        page.paragraph(f"Damaged checkpoints: {told(bad)}")
    if last is not None:
        page.heading("Metrics on the validation rows")
        tasks = last["metrics"]["tasks"]
        rows = [
            [task, name, _number(value, 0 if isinstance(value, int) else 5)]
            for task, found_ in tasks.items()
            for name, value in found_.items()
        ]
        page.table(["task", "metric", "value"], rows, numbers=(2,))
    page.heading("Learning curves")
    specs, curves = task_specs(run.experiment), [figures.losses(events)]
    if last is not None:
        for task, spec in specs.items():
            metric = MAIN_METRIC[spec.task.family]
            known = last["metrics"]["tasks"][task]
            curves.append(figures.validations(events, task, metric if metric in known else f"{metric}_given"))
    page.figures(curves)
    section(page, {"": {"": balancing_series(events)}}, None)
    gates = {gate: {"": shares} for gate, shares in gate_shares(events).items()}
    if gates:
        page.heading("Gates")
        page.figures(
            [
                figures.gate_heat(gates, run.experiment.model.architecture.kind),
                figures.expert_use(gates, run.experiment.model.architecture.kind),
            ]
        )
    page.heading("What it was made from")
    info = run.info
    page.table(
        ["", ""],
        [
            ["made", info["made"]],
            ["versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())],
            ["seed", str(run.experiment.seed)],
            [
                "training data",
                f"{info['train']['rows']:,} rows in {counted(info['train']['files'], 'file')}, "
                f"fingerprint {info['train']['fingerprint']}",
            ],
            ["warm start", info["warm_start"] or "none"],
        ],
    )
    page.code((run.folder / "experiment.yaml").read_text(encoding="utf-8"), "The experiment, every default written out")
    return page.text()
