"""Trains a model a day, judges it on the day after, and puts it into service where it is not worse than the one there.

    python pipelines/daily/daily.py OUTPUT --days 5 [--bad-day 3]                    # a synthetic log whose ids drift
    python pipelines/daily/daily.py OUTPUT --logs s3://bucket/logs --experiment my.yaml   # your own, in folders dt=2026-11-01

Each candidate starts from the weights, optimizer state and ids of the model in service (`--warm-start`) and trains once on the
days since (`data.train: {path, window}`). When the next day's labels are there, both predict its rows, and the candidate is
promoted if, for the main metric of every task, the 95 % interval of the difference (clustered by `evaluation.group_by`) lies
above - margin. A candidate that fails is kept out, and its newest day out of later windows. A day on which the model in service
falls by more than `--max-drop` decides nothing (broken labels cannot tell good from bad, and two bad models are alike), unless
the candidate is clearly better there (then the world has changed); such a day is next tried alone.

Of the experiment `data.train.where` holds for what is trained on and judged on. Its other sources, and what needs a validation
(`training.best_metric`, `early_stopping`, `validate_every`), are left out: each day is judged by the next one. Checkpoints are
copied to a folder a day below `training.checkpoint_storage`.

OUTPUT/days.json holds what was decided, day by day; the same command goes on after it (once a day, by cron). OUTPUT/runs/DAY is
the day's run, OUTPUT/in_service.json names the one to serve, RESULTS.md is the table.
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml

from mtrec.atomic import write_atomically
from mtrec.compare.gate import NonInferiority, non_inferiority
from mtrec.compare.interval import metric_interval
from mtrec.compare.measured import Measured
from mtrec.compare.plan import primary_metrics
from mtrec.compare.runs import folder_of, predict_test
from mtrec.config import load_experiment
from mtrec.experiment import Experiment, Source
from mtrec.files import find_files
from mtrec.launch import launch, local_device
from mtrec.run import Run, open_run
from mtrec.synthetic import write_log
from mtrec.yaml_tree import read_yaml

HERE = Path(__file__).resolve().parent
PROMOTED, KEPT_OUT, UNDECIDED = "promoted", "kept out", "undecided"
LABELS = ("click", "conversion", "dwell_seconds")


@dataclasses.dataclass(frozen=True)
class Day:
    """What a day's model was made of, and what became of it.

    Attributes:
        window: first and last day that it trained on, but for `left_out`.
        rows: that it trained on; `judged_rows`: of the day after, `judged_on`.
        new_ids: {table: ids that the model it started from did not know}.
        started_from: the day of the model in service; None for the first.
        metrics: {"click/auc": value} of this model on the day after.
        gates: {"click/auc": the comparison with the model in service}; empty for the first.
        decision: promoted, kept out or undecided; `why` in words.
    """

    day: str
    window: tuple[str, str]
    left_out: tuple[str, ...]
    rows: int
    new_ids: dict[str, int]
    started_from: str | None
    judged_on: str
    judged_rows: int
    metrics: dict[str, float]
    gates: dict[str, NonInferiority]
    decision: str
    why: str
    seconds: float


def read_days(output: Path) -> list[Day]:
    """What was decided so far."""
    path = output / "days.json"
    found = json.loads(path.read_text()) if path.is_file() else []
    for each in found:
        each["gates"] = {name: NonInferiority(**gate) for name, gate in each["gates"].items()}
        each["window"], each["left_out"] = tuple(each["window"]), tuple(each["left_out"])
    return [Day(**each) for each in found]


def days_of(logs: str) -> list[str]:
    """The values of the partition dt, ascending."""
    return sorted({value for file in find_files(logs, "logs")[0] for key, value in file.keys if key == "dt" and value})


def in_service(days: Sequence[Day]) -> Day | None:
    """The day whose model is in service."""
    return next((each for each in reversed(days) if each.decision == PROMOTED), None)


def train_day(output: Path, logs: str, day: str, experiment: Experiment, before: Sequence[Day], workers: str | None) -> Run:
    """The day's candidate: from the model in service, on the days since that one's newest, but for those left out."""
    service = in_service(before)
    first = day
    if service is not None and before[-1].decision != UNDECIDED:  # else the day looks broken, and is tried alone
        first = str(datetime.date.fromisoformat(service.day) + datetime.timedelta(days=1))
    bad = [each.day for each in before if each.decision == KEPT_OUT and first <= each.day < day]
    source = Source(path=logs, window=(first, day), where=both(experiment.data.train.where, *(f"dt != {each}" for each in bad)))
    return launch(
        of_day(experiment, day, source),
        output=folder_of(output, day),
        warm_start=folder_of(output, service.day) if service else None,
        resume=True,  # where an earlier try was cut short
        local=workers is None,
        workers=workers or "auto",
    )


def both(*conditions: str | None) -> str | None:
    """The condition that all of those given hold.

    >>> both("tab in [0, 1] or vip", None, "dt != 2026-11-01"), both(None)
    ('(tab in [0, 1] or vip) and (dt != 2026-11-01)', None)
    """
    given = [each for each in conditions if each is not None]
    return " and ".join(f"({each})" for each in given) if len(given) > 1 else next(iter(given), None)


def of_day(experiment: Experiment, day: str, source: Source) -> Experiment:
    """The experiment of a day's candidate."""
    training, uri = experiment.training, experiment.training.checkpoint_storage
    changes: dict[str, Any] = dict.fromkeys(("best_metric", "early_stopping", "validate_every"))
    if uri is not None:
        address, mark, options = uri.partition("?")
        changes["checkpoint_storage"] = f"{address.rstrip('/')}/{day}{mark}{options}"
    data = experiment.data.model_copy(update={"train": source, "validation": None, "test": None})
    return experiment.model_copy(update={"name": day, "data": data, "training": training.model_copy(update=changes)})


def judge(output: Path, days: dict[str, str], source: Source, margin: float) -> tuple[dict[str, float], dict[str, Any], int]:
    """Metrics of the candidate on the source's rows, its gates against the one in service, and the rows.

    `days`: {"candidate": day of its run, "in service": ...}, the latter only if there is one.
    """
    for day in days.values():
        run = open_run(folder_of(output, day))
        predict_test(run, run.best(), None, local_device(), source)
    experiment = open_run(folder_of(output, days["candidate"])).experiment
    measured = Measured(output, {name: {0: day} for name, day in days.items()}, experiment)
    metrics, gates = {}, {}
    for task, metric in primary_metrics(experiment).items():
        scores = {name: measured.scores(name, task, metric) for name in days}
        metrics[f"{task}/{metric}"] = metric_interval(metric, scores["candidate"]).value
        if "in service" in days:
            gates[f"{task}/{metric}"] = non_inferiority(metric, scores["in service"], scores["candidate"], margin)
    return metrics, gates, measured.rows


def decide(gates: dict[str, NonInferiority], usual: dict[str, float], max_drop: float) -> tuple[str, str]:
    """(decision, why); `usual`: what the model in service reached on the day that brought it there."""
    for name, gate in gates.items():
        if usual[name] - gate.in_service > max_drop and not gate.low > 0:
            fall = f"{name} {usual[name]:.4f} to {gate.in_service:.4f}"
            return UNDECIDED, f"the model in service fell from {fall}: are that day's labels right?"
    failed = [name for name, gate in gates.items() if not gate.passed]
    if failed:
        return KEPT_OUT, f"may be worse by the margin: {', '.join(failed)}"
    return PROMOTED, "not worse by the margin in any task" if gates else "the first"


def one_day(
    output: Path,
    logs: str,
    day: str,
    following: str,
    experiment: Experiment,
    *,
    margin: float,
    max_drop: float,
    workers: str | None = None,
) -> Day:
    """Trains the candidate of `day`, judges it on the day `following`, decides, and writes that down."""
    began, before = time.monotonic(), read_days(output)
    service = in_service(before)
    run = train_day(output, logs, day, experiment, before, workers)
    old_tables = open_run(folder_of(output, service.day)).encoder.tables if service else ()
    known = {table.name: table.vocabulary_size for table in old_tables}
    train = run.experiment.data.train
    assert train.window is not None
    compared = {"candidate": day, **({"in service": service.day} if service else {})}
    judged = Source(path=logs, window=(following, following), where=experiment.data.train.where)
    metrics, gates, judged_rows = judge(output, compared, judged, margin)
    decision, why = decide(gates, service.metrics if service else {}, max_drop)
    made = Day(
        day=day,
        window=train.window,
        left_out=tuple(each.day for each in before if each.decision == KEPT_OUT and train.window[0] <= each.day < day),
        rows=run.info["train"]["kept"],
        new_ids={
            table.name: table.vocabulary_size - known.get(table.name, 0)
            for table in run.encoder.tables
            if table.encoding == "vocabulary" and table.vocabulary_size > known.get(table.name, 0)
        },
        started_from=service.day if service else None,
        judged_on=following,
        judged_rows=judged_rows,
        metrics=metrics,
        gates=gates,
        decision=decision,
        why=why,
        seconds=time.monotonic() - began,
    )
    write_atomically(output / "days.json", json.dumps([dataclasses.asdict(each) for each in [*before, made]], indent=1))
    if decision == PROMOTED:
        write_atomically(output / "in_service.json", json.dumps({"run": str(run.folder), "day": day}))
    return made


def break_labels(folder: Path, seed: int = 0) -> None:
    """Gives every row of the files the labels of another row, as a join does that has lost its key."""
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path)
        order = np.random.default_rng(seed).permutation(table.num_rows)
        for name in LABELS:
            table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), table[name].take(order))
        pq.write_table(table, path)


def results(days: Sequence[Day], margin: float, bad_day: str | None) -> str:
    """The table of RESULTS.md."""
    names = list(days[0].metrics)
    lines = ["# A model a day", "", "Made by `daily.py`.", ""]
    lines += [f"The labels of {bad_day} were broken on purpose: every row has those of another row.", ""] if bad_day else []
    lines += [
        "| day | trained on | rows | new ids: user, item | from | judged on, rows | metric | candidate | in service "
        "| difference, 95 % interval | decision |",
        "|" + "---|" * 11,
    ]
    for each in days:
        ids = ", ".join(f"{each.new_ids.get(name, 0):,}" for name in ("user_id", "item_id"))
        out = f" without {', '.join(each.left_out)}" if each.left_out else ""
        window = each.window[0] if each.window[0] == each.window[1] else f"{each.window[0]} to {each.window[1]}"
        for number, name in enumerate(names):
            start = (
                f"| {each.day} | {window}{out} | {each.rows:,} | {ids} | {each.started_from or ''} | {each.judged_on}, "
                f"{each.judged_rows:,} |"
                if number == 0
                else "| | | | | | |"
            )
            gate = each.gates.get(name)
            versus = " | |"
            if gate is not None:
                versus = f" {gate.in_service:.4f} | {gate.value:+.4f} ({gate.low:+.4f} to {gate.high:+.4f}) |"
            lines.append(f"{start} {name} | {each.metrics[name]:.4f} |{versus} {each.decision if number == 0 else ''} |")
    lines += [
        "",
        f"Promoted where the whole interval lies above -{margin:g} for every task. Not promoted:",
        "",
        *(f"- {each.day}: {each.decision}, {each.why}" for each in days if each.decision != PROMOTED),
        "",
        f"{len(days)} days, {sum(each.seconds for each in days):.0f} s of training and judging.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Goes through the days that are there and not yet decided."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("output", type=Path, help="folder of the runs and of what was decided")
    parser.add_argument("--logs", help="files in folders dt=2026-11-01; default: a synthetic log, written to OUTPUT/logs")
    parser.add_argument("--experiment", type=Path, default=HERE / "experiment.yaml")
    parser.add_argument("--set", action="append", default=[], help="key.path=value of the experiment")
    parser.add_argument("--margin", type=float, default=0.01, help="in the units of each task's main metric")
    parser.add_argument(
        "--max-drop", type=float, default=0.05, help="a day on which the model in service falls by more decides nothing"
    )
    parser.add_argument("--days", type=int, default=5, help="synthetic: models; one more day judges the last")
    parser.add_argument("--rows", type=int, default=40_000, help="synthetic: rows a day")
    parser.add_argument("--drift", type=float, default=0.05, help="synthetic: share of users and items replaced a day")
    parser.add_argument("--bad-day", type=int, help="synthetic: break the labels of this day (1 is the first)")
    parser.add_argument("--workers", help="train on so many Ray workers; default: in this process")
    parser.add_argument("--results", type=Path, help="default: OUTPUT/RESULTS.md")
    given = parser.parse_args(arguments)
    logs = given.logs or str(given.output / "logs")
    bad_day = None
    if given.logs is None and not (given.output / "logs").exists():
        days = given.days + 1
        write_log(given.output / "logs", rows=given.rows * days, seed=7, files=days, days=days, drift=given.drift)
        if given.bad_day:
            break_labels(given.output / "logs" / f"dt={days_of(logs)[given.bad_day - 1]}")
    names = days_of(logs)
    if given.logs is None and given.bad_day:
        bad_day = names[given.bad_day - 1]
    read = read_yaml(given.experiment.read_text(encoding="utf-8"), str(given.experiment)).get("data", {}).get("train")
    key = "data.train.path" if isinstance(read, dict) else "data.train"
    experiment = load_experiment(given.experiment, [f"{key}={yaml.safe_dump(logs).splitlines()[0]}", *given.set])
    done = [each.day for each in read_days(given.output)]
    for day, following in itertools.pairwise(names):
        if day in done or (done and day < done[-1]):
            continue
        made = one_day(
            given.output,
            logs,
            day,
            following,
            experiment,
            margin=given.margin,
            max_drop=given.max_drop,
            workers=given.workers,
        )
        print(f"{day}: {made.decision}: {made.why}", flush=True)
    found = read_days(given.output)
    if found:
        text = results(found, given.margin, bad_day)
        (given.results or given.output / "RESULTS.md").write_text(text)
        print(text)


if __name__ == "__main__":
    sys.exit(main())
