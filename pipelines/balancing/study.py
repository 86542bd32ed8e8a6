"""Which balancing method helps? All of them on a synthetic log with a planted conflict, some of them on KuaiRand.

python pipelines/balancing/study.py OUTPUT [--seeds 5] [--kuairand FOLDER] [--kuairand-seeds 3] [--processes 2] [--minutes 60]

Every method runs with its defaults, as does `static` (`weight: auto`, no more). What they are judged against is `tuned static`:
constant weights found by random search on a data split (synthetic: a log) that no reported run is evaluated on, with as many
trials as there are methods beside it: whoever picks the best of N methods has made N trials too.

Each run trains one model for one epoch in one process and is evaluated on held-out rows. A finished run is written to
OUTPUT/results.json at once and never repeated, so the script may be stopped and started; where `--minutes` end, the report says
what is missing. Seeds are gone through one after the other, so that what there is compares like with like. OUTPUT/REPORT.md is
written at the end. --rows and --steps make it tiny, for a test.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_report import markdown

from mtrec.atomic import write_atomically
from mtrec.balancing import BALANCERS
from mtrec.config import apply_overrides, parse_experiment, to_yaml
from mtrec.events import Step, Validation
from mtrec.experiment import Experiment
from mtrec.prepare import prepare
from mtrec.run import Run, versions
from mtrec.synthetic import write_log
from mtrec.train import train
from mtrec.yaml_tree import read_yaml

PIPELINES = Path(__file__).parents[1]
TASKS = ("click", "conversion", "dwell")
TUNING_SEED = 0
WEIGHT_RANGE = (0.1, 10.0)  # of the trials' weights, log-uniform, before they are scaled to the sum 3
ALONE = 1e-4  # weight of the other tasks in the runs that train one task alone
PLACES = ("parameters", "batch_sum", "representation")
METRICS = {
    "synthetic": {"click": "auc", "conversion": "auc_given", "dwell": "xauc_given"},
    "kuairand": {"click": "auc", "conversion": "auc", "dwell": "xauc"},
}
ON_KUAIRAND = ("static", "uncertainty", "famo", "gradnorm", "mgda", "pcgrad", "upgrad")
OPTIONS = {"scheduled": ["balancing.ratio={dwell: 0.5}", "balancing.period=100"]}  # without a ratio it is static


@dataclasses.dataclass(frozen=True)
class Job:
    """One training: a prepared run, a name in the report, and what differs from the data set's experiment."""

    dataset: str
    seed: int
    variant: str
    overrides: tuple[str, ...]
    prepared: str
    rows: int

    @property
    def key(self) -> str:
        """What a finished run is known by; another number of rows or other overrides make another run."""
        text = json.dumps([self.dataset, self.seed, self.overrides, self.rows])
        return f"{self.dataset}/{self.seed}/{self.variant}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def weights_override(weights: dict[str, float]) -> str:
    """`balancing.weights=` as a YAML mapping."""
    return "balancing.weights={" + ", ".join(f"{name}: {value:.6g}" for name, value in weights.items()) + "}"


def methods(dataset: str) -> dict[str, list[str]]:
    """{variant: overrides} of the methods that tuned static weights are compared with."""
    kinds = list(BALANCERS) if dataset == "synthetic" else list(ON_KUAIRAND)
    found = {kind: [f"balancing.kind={kind}", *OPTIONS.get(kind, [])] for kind in kinds}
    found["static"] = ["balancing.log_gradients=true"]  # the cosines of the report are those of this run
    return found


def others(dataset: str) -> dict[str, list[str]]:
    """{variant: overrides} of runs that explain: other places, and each task alone."""
    found = {}
    for task in TASKS:
        weights = {name: 1.0 if name == task else ALONE for name in TASKS}
        found[f"only {task}"] = ["balancing.kind=static", weights_override(weights)]
    for place in PLACES[1:]:
        found[f"static, seen at {place}"] = ["balancing.log_gradients=true", f"balancing.at={place}"]
        if dataset == "synthetic":
            for kind in ("mgda", "upgrad"):
                found[f"{kind} at {place}"] = [f"balancing.kind={kind}", f"balancing.at={place}"]
    if dataset == "synthetic":
        found["upgrad, every: 1"] = ["balancing.kind=upgrad", "balancing.every=1"]
    return found


def trials(count: int) -> dict[str, list[str]]:
    """{variant: overrides} of the random search; the first trial is all ones."""
    rng = np.random.default_rng(0)
    found = {}
    for number in range(count):
        drawn = np.ones(len(TASKS)) if number == 0 else np.exp(rng.uniform(*np.log(WEIGHT_RANGE), size=len(TASKS)))
        weights = dict(zip(TASKS, (drawn / drawn.mean()).tolist(), strict=True))
        found[f"trial {number}"] = ["balancing.kind=static", weights_override(weights)]
    return found


def prepared_run(dataset: str, seed: int, work: Path, arguments: argparse.Namespace) -> tuple[Path, int]:
    """(the prepared run of a seed, its training rows), made on first use."""
    folder = work / dataset / f"seed-{seed}-{arguments.rows}" / "prepared"
    if not (folder / "run.json").exists():
        overrides = [
            f"seed={seed}",
            "training.keep_best=0",
            "training.keep_last=1",
            "training.log_every=10",
            "training.checkpoint_async=false",
            "model.embedding_dim=8",
            "model.architecture={kind: mmoe, num_experts: 4, expert_layers: [64, 32]}",
            *(f"tasks.{task}.weight=auto" for task in TASKS),
            *([f"training.max_steps={arguments.steps}"] if arguments.steps else []),
        ]
        if dataset == "synthetic":
            path = PIPELINES / "quickstart" / "experiment.yaml"
            log = folder.parent / "log"
            write_log(
                log,
                rows=arguments.rows,
                seed=1_000 + seed,
                conflict=1.0,
                validation_rows=arguments.rows // 2,
                files=2,
                overwrite=True,
            )
            overrides += [f"data.train={log / 'train'}", f"data.validation={log / 'validation'}", "evaluation.group_by=null"]
            overrides += ["tasks.conversion.space=observed"]
        else:
            path = PIPELINES / "kuairand" / "mmoe.yaml"
            source = Path(arguments.kuairand).absolute()
            os.environ["KUAIRAND"] = str(source)
            if seed == TUNING_SEED:  # the last training days stand for the validation days
                overrides += [f"data.train={{path: {source}/train.parquet, where: 'date <= 20220501'}}"]
                overrides += [f"data.validation={{path: {source}/train.parquet, where: 'date > 20220501'}}"]
        tree = apply_overrides(read_yaml(path.read_text(encoding="utf-8"), str(path)), overrides)
        shutil.rmtree(folder, ignore_errors=True)
        prepare(parse_experiment(tree), folder)
    return folder, int(Run(folder).info["train"]["rows"])


def trained(job: Job) -> dict[str, Any]:
    """Trains one model; in a process of the pool."""
    torch.set_num_threads(1)
    source = Path(job.prepared)
    folder = source.parent / hashlib.sha256(job.key.encode()).hexdigest()[:12]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    tree = apply_overrides(Run(source).experiment.model_dump(mode="json"), job.overrides)
    experiment: Experiment = parse_experiment(tree)
    write_atomically(folder / "experiment.yaml", to_yaml(experiment))
    started, steps, metrics = time.perf_counter(), list[Step](), dict[str, Any]()
    for event in train(Run(folder), device=torch.device("cpu")):
        if isinstance(event, Step):
            steps.append(event)
        elif isinstance(event, Validation):
            metrics = event.metrics
    shutil.rmtree(folder)
    values = {task: metrics["tasks"][task][name] for task, name in METRICS[job.dataset].items()}
    late = steps[-max(1, len(steps) // 4) :]
    return {
        "key": job.key,
        "dataset": job.dataset,
        "seed": job.seed,
        "variant": job.variant,
        "overrides": list(job.overrides),
        "rows": job.rows,
        "steps": steps[-1].step,
        "metrics": values,
        "score": statistics.fmean(values.values()),
        "weights": {task: statistics.fmean(step.balancing[f"weight/{task}"] for step in late) for task in TASKS},
        "cosines": _means(steps),
        "seconds": time.perf_counter() - started,
    }


def _means(steps: list[Step]) -> dict[str, dict[str, float]]:
    """{`cosine_at_PLACE/A/B` or `gradient_norm_at_PLACE/A`: mean and standard deviation over the logged steps}."""
    found: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.balancing.items():
            if name.startswith(("cosine", "gradient_norm")):
                found.setdefault(name, []).append(value)
    return {name: {"mean": statistics.fmean(each), "sd": statistics.pstdev(each)} for name, each in found.items()}


class Results:
    """The finished runs, in a file that is whole at every moment."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path, self._settings = path, settings
        self._earlier = 0.0
        self.runs: list[dict[str, Any]] = []
        if path.exists():
            found = json.loads(path.read_text())
            self.runs, self._earlier = found["runs"], found["minutes"]

    def find(self, job: Job) -> dict[str, Any] | None:
        return next((run for run in self.runs if run["key"] == job.key), None)

    def add(self, run: dict[str, Any], minutes: float) -> None:
        self.runs.append(run)
        self.save(minutes)

    def save(self, minutes: float) -> None:
        content = {"settings": self._settings, "minutes": self._earlier + minutes, "runs": self.runs}
        write_atomically(self._path, json.dumps(content, indent=1) + "\n")


class Clock:
    """Minutes since the start, and whether they are spent."""

    def __init__(self, limit: float) -> None:
        self._started, self._limit = time.monotonic(), limit

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self._started) / 60

    @property
    def spent(self) -> bool:
        return self.minutes >= self._limit


def run_all(jobs: list[Job], results: Results, pool: ProcessPoolExecutor, width: int, clock: Clock) -> bool:
    """Runs what is not in the results yet; whether all of them are there."""
    waiting = [job for job in jobs if results.find(job) is None]
    running: set[Future[dict[str, Any]]] = set()
    while running or (waiting and not clock.spent):
        while waiting and len(running) < width and not clock.spent:
            running.add(pool.submit(trained, waiting.pop(0)))
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            run = future.result()
            results.add(run, clock.minutes)
            values = "  ".join(f"{task} {value:.4f}" for task, value in run["metrics"].items())
            print(f"{clock.minutes:5.1f} min  {run['dataset']} {run['seed']}  {run['variant']:28s} {values}", flush=True)
    return not waiting


def stages(dataset: str, seeds: int, results: Results, work: Path, arguments: argparse.Namespace) -> Iterator[list[Job]]:
    """The jobs: first the trials, then, with the best weights among them, the reported runs of one seed after another."""
    compared = methods(dataset)
    folder, rows = prepared_run(dataset, TUNING_SEED, work, arguments)
    searched = trials(arguments.trials or len(compared))
    tuning = [Job(dataset, TUNING_SEED, name, tuple(each), str(folder), rows) for name, each in searched.items()]
    yield tuning
    best = max(tuning, key=lambda job: (results.find(job) or {"score": -1.0})["score"])
    variants = compared | {"tuned static": list(best.overrides)} | others(dataset)
    for seed in range(1, seeds + 1):
        folder, rows = prepared_run(dataset, seed, work, arguments)
        yield [Job(dataset, seed, name, tuple(each), str(folder), rows) for name, each in variants.items()]


def main() -> None:
    """Reads the arguments, runs what is missing, writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, default=5, help="reported seeds on the synthetic log; 0 leaves it out")
    parser.add_argument("--kuairand", help="folder with train.parquet and val.parquet (pipelines/kuairand); without: left out")
    parser.add_argument("--kuairand-seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--minutes", type=float, default=60.0, help="start no run after so many minutes")
    parser.add_argument("--rows", type=int, default=150_000, help="training rows of the synthetic log")
    parser.add_argument("--trials", type=int, default=0, help="of the search for static weights; 0: as many as methods")
    parser.add_argument("--steps", type=int, default=0, help="end each training after so many steps; 0: one epoch")
    parser.add_argument("--work", type=Path, help="folder for logs and runs (default: OUTPUT/work)")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    work = (arguments.work or arguments.output / "work").absolute()
    settings = {name: value for name, value in vars(arguments).items() if name in ("seeds", "kuairand_seeds", "rows", "steps")}
    results = Results(arguments.output / "results.json", {**settings, "processes": arguments.processes, "versions": versions()})
    clock = Clock(arguments.minutes)
    planned = [("synthetic", arguments.seeds)] if arguments.seeds else []
    planned += [("kuairand", arguments.kuairand_seeds)] if arguments.kuairand else []
    expected = sum(
        (arguments.trials or len(methods(dataset))) + seeds * (len(methods(dataset)) + 1 + len(others(dataset)))
        for dataset, seeds in planned
    )
    keys: set[str] = set()
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for dataset, seeds in planned:
            for jobs in stages(dataset, seeds, results, work, arguments):
                keys.update(job.key for job in jobs)
                if not run_all(jobs, results, pool, arguments.processes, clock):
                    print(f"The {arguments.minutes:g} minutes are over; the same command goes on from here.")
                    break
    results.save(clock.minutes)
    content = json.loads((arguments.output / "results.json").read_text())
    reported = [run for run in content["runs"] if run["key"] in keys]
    report = markdown(reported, expected, content["settings"], content["minutes"])
    (arguments.output / "REPORT.md").write_text(report)
    print(report)


if __name__ == "__main__":
    main()
