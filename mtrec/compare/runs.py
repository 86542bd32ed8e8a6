"""The runs of a comparison: their folders, and one run from its preparation to its saved predictions.

    FOLDER/plan.json              what was compared: diffs, matching, chosen search trials, versions, fingerprints
    FOLDER/prepared/<key>/        encoder and label statistics, fitted once for equal data, features and tasks
    FOLDER/runs/<variant>/seed-3/ a run as `mtrec train` makes it, and beside it:
        compare.json              what is to be done with it
        predictions.parquet       the test rows, in the order of the files: user, labels, segment, prediction columns
        done.json                 its cost; written last, so that a folder with it is a finished run

The files are the truth: a run without done.json is done again, from its newest checkpoint.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mtrec import checkpoint, parallel
from mtrec.atomic import write_atomically
from mtrec.batch import make_batch
from mtrec.checkpoint import Checkpoint
from mtrec.compare.plan import Budget, Plan, dense_size, matched, search_draws, varied
from mtrec.compare.space import active, at_edge
from mtrec.config import parse_experiment, to_yaml
from mtrec.embeddings import Embeddings
from mtrec.evaluate import check_bad_rows, whole_reader
from mtrec.events import Event, Step
from mtrec.experiment import Experiment, Source
from mtrec.feed import bad_row, bad_rows, check_encodes, feed, refused_rows
from mtrec.labels import labels_of
from mtrec.metrics import group_keys
from mtrec.model import task_specs
from mtrec.predictions import load_model, uses_bf16
from mtrec.prepare import prepare
from mtrec.recorder import Recorder
from mtrec.run import Run, open_run
from mtrec.sources import evaluation_columns, label_columns, open_source, resolve_auto
from mtrec.train import train
from mtrec.written import as_written
from mtrec.yaml_tree import read_yaml

PREDICTIONS, DONE, SPEC = "predictions.parquet", "done.json", "compare.json"
USER, SEGMENT, WEIGHT, LABEL, LOG = "user", "segment", "weight", "label/", "log/"
FOR_EVER = 10**9  # steps; a budget of seconds ends sooner
SEEN_IN = ("experiment.yaml", "run.json")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One run: its name within the comparison ("ple/seed-3"), its experiment, and whether it is tested or only validated."""

    name: str
    variant: str
    seed: int
    experiment: Experiment
    tested: bool = True


def folder_of(folder: Path, name: str) -> Path:
    """Where the run of this name lies."""
    return folder / "runs" / name.replace(" ", "_")


def is_done(folder: Path, name: str) -> bool:
    """Whether the run of this name was trained and measured."""
    return (folder_of(folder, name) / DONE).is_file()


def fit_key(experiment: Experiment) -> str:
    """Equal for experiments that share encoder and label statistics."""
    tree = experiment.model_dump(mode="json")
    data = {key: tree["data"][key] for key in ("train", "sample_weight")}
    tasks = {name: {key: value for key, value in task.items() if key != "weight"} for name, task in tree["tasks"].items()}
    kept = {"data": data, "features": tree["features"], "tasks": tasks, "dim": tree["model"]["embedding_dim"]}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def prepared(folder: Path, experiment: Experiment) -> Run:
    """The prepared run whose encoder this experiment shares; fitted where it is not there yet."""
    place = folder / "prepared" / fit_key(experiment)
    if not (place / "run.json").is_file():
        prepare(experiment, place)
    run = open_run(place)
    data = open_source(experiment, experiment.data.train, "data.train")
    if data.fingerprint != run.info["train"]["fingerprint"]:
        raise ValueError(f"data.train is not what {place} was fitted from: files changed since. Compare in a new folder.")
    return run


def check_test(run: Run, experiment: Experiment) -> NDArray[np.int64]:
    """Reads the test rows once, as they will be predicted on; `run` holds the fit. The numbers of those that will be skipped.

    Raises ValueError naming file and row, or column, where they could not be: that is better known before everything is trained.
    """
    data = open_source(experiment, experiment.data.test, "data.test")  # type: ignore[arg-type]  # a plan has one
    check_encodes(run.encoder, data)
    columns = list(dict.fromkeys([*run.encoder.columns, *label_columns(experiment)]))
    labels = labels_of(experiment, task_specs(experiment))

    def look(batch: pa.RecordBatch) -> None:
        make_batch(batch, run.encoder, labels, experiment.data.sample_weight)

    if experiment.data.on_bad_rows == "error":
        problem = bad_row(data, columns, look)
        if problem is not None:
            raise ValueError(f"`data.test`: {problem}")
        return np.zeros(0, np.int64)
    (refused, good), limit = refused_rows(data, columns, look), experiment.data.max_bad_fraction
    if len(refused) > limit * (len(refused) + good):
        raise ValueError(f"`data.max_bad_fraction` ({limit:g}) is exceeded in `data.test`: {len(refused):,} bad rows.")
    return refused


def with_budget(experiment: Experiment, rows: int, budget: Budget | None, curve_points: int) -> Experiment:
    """The experiment with its steps set by the budget, and so many validations as a learning curve needs.

    `rows`: of training, before `where`, as those of a budget are: both say how many batches there are, not how full they are.

    `checkpoint_storage` is that of the experiment's own run, not of these: they would take each other's checkpoints away there.
    """
    experiment = resolve_auto(experiment, rows)
    batch_size = experiment.data.batch_size
    assert isinstance(batch_size, int)
    training = experiment.training
    steps_an_epoch = -(-rows // batch_size)
    steps = min(steps_an_epoch * training.epochs, training.max_steps or FOR_EVER)
    changes: dict[str, Any] = {"checkpoint_storage": None}
    if budget is not None and budget.seconds is None:
        steps = budget.steps or max(1, (budget.rows or 0) // batch_size)
        changes |= {"max_steps": steps, "epochs": -(-steps // steps_an_epoch)}
    if training.validate_every is None and experiment.data.validation is not None:
        changes["validate_every"] = max(1, -(-steps // curve_points))
    return experiment.model_copy(update={"training": training.model_copy(update=changes)})


def matching(plan: Plan, folder: Path) -> tuple[dict[str, Experiment], dict[str, dict[str, Any]]]:
    """({variant: experiment with scaled widths}, {variant: size and what was done to reach the base's})."""
    what = plan.comparison.match
    sizes: dict[str, dict[str, Any]] = {}
    experiments: dict[str, Experiment] = {}
    target = 0
    for name, experiment in plan.experiments.items():
        run = prepared(folder, experiment)
        experiment = resolve_auto(experiment, run.info["train"]["rows"])
        input_dim = Embeddings(run.encoder.tables, run.encoder.num_dense, torch.device("meta")).output_dim
        sizes[name] = {**dense_size(experiment, input_dim), "matched": None}
        if what != "none" and name == plan.baseline:
            target = sizes[name][what]
        elif what != "none" and sizes[name][what] != target:
            experiment, done = matched(experiment, input_dim, what, target)
            sizes[name] = {**dense_size(experiment, input_dim), "matched": done}
        experiments[name] = experiment
    return experiments, sizes


def search_specs(plan: Plan, experiments: dict[str, Experiment]) -> list[Spec]:
    """The trials of the search, the same draws for every variant; validated only, and with one seed, the first."""
    if plan.comparison.search is None:
        return []
    found, space = [], plan.comparison.search.space
    for name, experiment in experiments.items():
        for index, overrides in enumerate(search_draws(plan.comparison.search)):
            changed = varied(experiment, {**active(space, overrides), "seed": plan.seeds[0]}, "search.space")
            found.append(Spec(f"{name}/trial-{index}", name, plan.seeds[0], changed, tested=False))
    return found


def chosen(
    plan: Plan, folder: Path, experiments: dict[str, Experiment]
) -> tuple[dict[str, Experiment], dict[str, dict[str, Any]]]:
    """({variant: experiment with the values of its best trial}, {variant: trials, what was chosen, what lies at an edge})."""
    search = plan.comparison.search
    if search is None:
        return experiments, {name: {"trials": 0} for name in experiments}
    draws = search_draws(search)
    found, facts = {}, {}
    for name, experiment in experiments.items():
        metrics = [read_done(folder, f"{name}/trial-{index}")["metric"] for index in range(search.trials)]
        if all(metric is None for metric in metrics):
            raise ValueError(f"`search`: no trial of '{name}' has a defined `training.best_metric` on the validation rows.")
        best = max(range(len(draws)), key=lambda index: -np.inf if metrics[index] is None else metrics[index])
        values = active(search.space, draws[best])
        found[name] = varied(experiment, values, "search.space")
        facts[name] = {
            "trials": search.trials,
            "chosen": values,
            "metric": metrics[best],
            "at_edge": at_edge(search.space, values),
            "tried": [{**draw, "metric": metric} for draw, metric in zip(draws, metrics, strict=True)],
        }
    return found, facts


def final_specs(plan: Plan, experiments: dict[str, Experiment]) -> list[Spec]:
    """Every variant with every seed, and the A/A row; seed by seed, so that what is there at any time can be compared."""
    found = []
    for seed, again in zip(plan.seeds, plan.again_seeds, strict=True):
        for name, experiment in experiments.items():
            found.append(Spec(f"{name}/seed-{seed}", name, seed, experiment.model_copy(update={"seed": seed})))
        base = experiments[plan.baseline].model_copy(update={"seed": again})
        found.append(Spec(f"{plan.again}/seed-{again}", plan.again, again, base))
    return found


def make_folders(plan: Plan, folder: Path, specs: Sequence[Spec]) -> list[str]:
    """Prepares the folders of runs that have none; returns the names of those that are not done.

    Raises ValueError where a run that is there was made from another experiment, budget of seconds or segment.
    """
    missing = []
    for spec in specs:
        place = folder_of(folder, spec.name)
        source = prepared(folder, spec.experiment)
        comparison, budget = plan.comparison, plan.comparison.budget
        experiment = with_budget(spec.experiment, source.info["train"]["rows"], budget, comparison.curve_points)
        what = {"tested": spec.tested, "seconds": budget.seconds if budget else None, "segment": comparison.segment}
        if (place / "run.json").is_file():
            if open_run(place).experiment != parse_experiment(read_yaml(to_yaml(experiment), spec.name)):
                raise ValueError(
                    f"--resume: {place} was made from another experiment than the comparison now describes for "
                    f"'{spec.variant}'. Compare in a new folder, or give the variant another name."
                )
            _check_same_use(place, what)
        else:
            if place.exists():
                shutil.rmtree(place)  # cut short before its run.json, which is written last
            copy_prepared(source, experiment, place)
        write_atomically(place / SPEC, json.dumps(what, indent=1))
        if not is_done(folder, spec.name):
            missing.append(spec.name)
    return missing


def _check_same_use(place: Path, what: Mapping[str, Any]) -> None:
    """What the experiment of a run does not say: how long it is trained, and what is kept of its predictions."""
    before = json.loads((place / SPEC).read_text()) if (place / SPEC).is_file() else what
    for key, shown in {"seconds": "budget.seconds", "segment": "segment"}.items():
        if before.get(key) != what[key] and (what["tested"] or key == "seconds"):
            found, now = (json.dumps(each.get(key)) for each in (before, what))
            raise ValueError(
                f"--resume: `{shown}` should be {found}, as {place} was made with. Found {now}. Set it back, or compare in a new "
                "folder."
            )


def copy_prepared(source: Run, experiment: Experiment, place: Path) -> None:
    """A run's folder for this experiment with the encoder and label statistics of `source`."""
    place.mkdir(parents=True)
    for path in sorted(source.folder.iterdir()):
        if path.name in (*SEEN_IN, "checkpoints"):
            continue
        if path.is_dir():
            shutil.copytree(path, place / path.name, copy_function=_link)
        else:
            _link(path, place / path.name)
    (place / "checkpoints").mkdir()
    write_atomically(place / "experiment.yaml", to_yaml(experiment))
    write_atomically(place / "run.json", json.dumps(source.info, indent=1))


def _link(source: str | Path, target: str | Path) -> None:
    """A hard link where the file system has them (the files are never changed in place), else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_done(folder: Path, name: str) -> dict[str, Any]:
    """What done.json of a finished run says."""
    found: dict[str, Any] = json.loads((folder_of(folder, name) / DONE).read_text())
    return found


def train_here(
    run: Run, device: torch.device, seconds: float | None = None, watch: Callable[[Event], None] = lambda event: None
) -> None:
    """Trains a run in this process, from its newest checkpoint; `watch` gets every event once it is in the log.

    Within `seconds`, if given. Such a budget cannot be continued (the seconds of the lost part are unknown): it begins anew.

    Raises CheckpointError where it is to be continued and none of its checkpoints can be trusted.
    """
    if seconds is not None:
        shutil.rmtree(run.checkpoints)
        run.checkpoints.mkdir()
        (run.folder / "log.jsonl").unlink(missing_ok=True)
    until = time.monotonic() + (seconds or float("inf"))
    recorder = Recorder(run.folder)
    try:
        resume_from = checkpoint.to_resume(run.checkpoints)
        recorder.catch_up(checkpoint.newest_validation(resume_from))
        asked = train(run, device=device, resume_from=resume_from, stop_requested=lambda: time.monotonic() > until)
        with contextlib.closing(asked) as events:  # ends it here also where `watch` raises
            for event in events:
                recorder(event)
                watch(event)
    finally:
        recorder.close()


def conduct(place: Path, device: torch.device, train_run: Callable[[Run], None] | None = None) -> None:
    """One run from its prepared folder to its done.json: train (or go on), predict the test rows once, note the cost.

    `train_run`: trains it elsewhere (on several workers); by default in this process.
    """
    if (place / DONE).is_file():
        return
    run = open_run(place)
    what = json.loads((place / SPEC).read_text())
    started = time.monotonic()
    _reset_peak_memory(device)
    timed = what["seconds"] is not None
    if not has_ended(run, timed):
        if train_run is None:
            train_here(run, device, what["seconds"])
        else:
            train_run(run)
        check_ended(run, timed)
    found = run.best()
    done: dict[str, Any] = {"step": found.step, "metric": found.metric, **_training_facts(run), **_model_facts(run)}
    if what["tested"]:
        done |= predict_test(run, found, what["segment"], device)
    done |= {"peak_memory_bytes": _peak_memory(device), "wall_seconds": time.monotonic() - started}
    for path in run.checkpoints.glob("step-*"):  # the tested one stays; others were for a restart
        if path != found.folder:
            shutil.rmtree(path)
    write_atomically(place / DONE, json.dumps(done, indent=1))


def events_of(run: Run) -> Iterator[dict[str, Any]]:
    """The events of a run's log; a line cut short by a kill is left out."""
    path = run.folder / "log.jsonl"
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            with as_written(f"{path}, line {number},", "JSON"):
                event: dict[str, Any] = json.loads(line)
            yield event


def gate_shares(events: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """{gate: {"steps": [...], "shares": [[mean weight of each expert] a step]}} of a run's events; {} without gates."""
    found: dict[str, dict[int, list[float]]] = {}
    for event in events:
        shares: dict[str, dict[int, float]] = {}
        for key, value in event.get("gates", {}).items():
            gate, _, what = key.rpartition("/")
            if what.startswith("expert"):
                shares.setdefault(gate, {})[int(what.removeprefix("expert"))] = value
        for gate, each in shares.items():
            found.setdefault(gate, {})[event["step"]] = [each[index] for index in sorted(each)]
    return {gate: {"steps": sorted(by), "shares": [by[step] for step in sorted(by)]} for gate, by in found.items()}


def has_ended(run: Run, timed: bool = False) -> bool:
    """Whether training ended; then only the predictions are missing. A resumed run's log may hold an older part.

    A run that was asked to stop (SIGTERM, a node taken away) is to go on; `timed`: it has a budget of seconds, which ends so.
    """
    events = list(events_of(run))
    ended = bool(events) and events[-1]["event"] == "ended" and (timed or events[-1]["reason"] != "stopped")
    return ended and checkpoint.newest(run.checkpoints) is not None


def check_ended(run: Run, timed: bool = False) -> None:
    """Raises RuntimeError where a training that has returned was asked to stop before its end; see `has_ended`."""
    if not has_ended(run, timed):
        raise RuntimeError(f"{run.folder}: the training was asked to stop before its end. It goes on from its checkpoint.")


def _training_facts(run: Run) -> dict[str, Any]:
    events = list(events_of(run))
    speeds = [event["rows_per_second"] for event in events if event["event"] == Step.__name__.lower()]
    ended = next((event for event in reversed(events) if event["event"] == "ended"), None)
    batch_size = run.experiment.data.batch_size
    assert isinstance(batch_size, int)
    steps = ended["step"] if ended else None
    return {
        "steps": steps,
        "reason": ended["reason"] if ended else None,
        # the first entry holds what happens once: allocation, compilation, first reads
        "train_rows_per_second": float(np.median(speeds[1:] or speeds)) if speeds else None,
        "train_seconds": _seconds(events),
    }


def _seconds(events: list[dict[str, Any]]) -> float | None:
    """From the first logged event to the last, pauses between a kill and its restart left out."""
    total, last = 0.0, None
    for event in events:
        if last is not None and event["event"] != "restarted" and event.get("step", 0) >= last.get("step", 0):
            total += event["time"] - last["time"]
        last = event
    return total if len(events) > 1 else None


def _model_facts(run: Run) -> dict[str, Any]:
    input_dim = Embeddings(run.encoder.tables, run.encoder.num_dense, torch.device("meta")).output_dim
    size = dense_size(run.experiment, input_dim)
    tables = sum(table.num_embeddings * table.dim for table in run.encoder.tables)
    return {"dense_parameters": size["parameters"], "table_parameters": tables, "flops_per_row": size["flops"]}


def predict_test(
    run: Run, found: Checkpoint, segment: str | None, device: torch.device, source: Source | None = None
) -> dict[str, Any]:
    """Reads the test rows (of `source`, by default `data.test`) once and writes predictions.parquet.

    Returns {"test_rows", "score_rows_per_second", "fingerprint"}. Columns: user (the int64 key of `evaluation.group_by`),
    segment, weight, label/<task> in natural units (null where unobserved), the columns of `Objectives.predictions`,
    log/<task> for heads with a log-scale output.
    """
    experiment = run.experiment
    source = source or experiment.data.test
    assert source is not None
    torch.set_num_threads(experiment.training.threads_per_worker)
    extra = [*evaluation_columns(experiment), *([segment] if segment else [])]
    data = open_source(experiment, source, "data.test", extra)
    tables, scoring = [], 0.0
    with parallel.process_group(device), torch.no_grad():
        model = load_model(run, found, device)
        reader = whole_reader(data, run.encoder, [*label_columns(experiment), *extra], experiment.evaluation.batch_size)
        labels = labels_of(experiment, model.specs)
        group = experiment.evaluation.group_by
        rows_needed = bool(group or segment)
        bad = bad_rows(experiment.data, data.num_rows)
        for piece, batch in feed(reader, run.encoder, labels, experiment.data.sample_weight, keep_rows=rows_needed, bad=bad):
            if not batch.num_rows:
                continue
            began = time.perf_counter()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(experiment)):
                logits = model(batch.to(device))
            logits = {name: each.double().cpu() for name, each in logits.items()}
            scoring += time.perf_counter() - began
            made: dict[str, Any] = {}
            if group:
                made[USER] = group_keys(piece.record_batch.column(group), "evaluation.group_by")
            if segment:
                made[SEGMENT] = piece.record_batch.column(segment).cast(pa.string())
            if batch.sample_weight_B is not None:
                made[WEIGHT] = batch.sample_weight_B.double().numpy()
            for name, label_B in batch.labels.items():
                made[LABEL + name] = pa.array(label_B.double().numpy(), from_pandas=True)  # NaN becomes null
            made |= {name: each.numpy() for name, each in model.objectives.predictions(logits).items()}
            made |= {LOG + name: each.numpy() for name, each in model.objectives.log_predictions(logits).items()}
            tables.append(pa.table(made))
        if bad is not None:
            check_bad_rows(bad, data.place)
    if not tables:
        raise ValueError("`data.test` should hold rows. Found none.")
    whole = pa.concat_tables(tables)
    part = run.folder / f"{PREDICTIONS}.part"
    pq.write_table(whole, part, compression="zstd")
    part.replace(run.folder / PREDICTIONS)
    return {
        "test_rows": whole.num_rows,
        "score_rows_per_second": whole.num_rows / max(scoring, 1e-9),
        "test_fingerprint": data.fingerprint,
    }


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # so that a process that makes several runs measures each
    except OSError:
        return  # no Linux, or not allowed: the peak is that of the process so far


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's memory on a GPU, else of this process (several workers: of the process that predicts)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")]
    return found[0] if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
