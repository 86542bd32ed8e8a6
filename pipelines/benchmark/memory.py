"""Peak memory of each thing that reads rows, on so many rows and on ten times as many: bounded by the configuration?

    python pipelines/benchmark/memory.py [--work runs/benchmark-memory] [--rows 200000] [--launches 3]

Fitting the features (`prepare`), training (`train`, one epoch), evaluating (`evaluate_run`) and scoring (`score_files`), each in
a process of its own. Taken are the peak of resident memory (VmHWM, Linux; it counts mapped files, too) and what the process held
before it began (torch, torchrec and their libraries). The experiment is that of pipelines/quickstart with one batch size (`auto`
takes larger ones for more rows), and with a shuffle window and a limit of the metrics' memory that the smaller set of rows fills,
too: otherwise the larger one would take more because it may. A launch that is done is kept in WORK, so that the script can be
stopped and started again.

Prints a table and writes pipelines/benchmark/results/memory-cpu.json; exit code 1 where a peak grows by 10 % or more.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mtrec.allocator import kept
from mtrec.config import apply_overrides, parse_experiment
from mtrec.dataset import Source
from mtrec.experiment import Experiment
from mtrec.launch import evaluate_run
from mtrec.prepare import prepare
from mtrec.run import Run, open_run, versions
from mtrec.scored_files import Asked, score_files
from mtrec.synthetic import write_log
from mtrec.train import train
from mtrec.yaml_tree import read_yaml

EXPERIMENT = Path(__file__).parents[1] / "quickstart" / "experiment.yaml"
RESULT = Path(__file__).parent / "results" / "memory-cpu.json"
TIMES, WANTED = 10, 0.10
SETTINGS = ("data.batch_size=2048", "data.shuffle_window=4096", "evaluation.memory_limit_mb=64", "training.log_every=100")
ROW_GROUP_ROWS = 8_192


def experiment_for(data: Path) -> Experiment:
    """The quickstart's, over other files."""
    tree = read_yaml(EXPERIMENT.read_text(encoding="utf-8"), str(EXPERIMENT))
    return parse_experiment(apply_overrides(tree, [f"data.train={data}", "data.validation=null", *SETTINGS]))


def fit(work: Path, data: Path) -> int:
    """Fits the features; the rows of which it was done."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        return int(prepare(experiment_for(data), Path(folder) / "run").info["train"]["kept"])


def train_epoch(work: Path, data: Path) -> int:
    """Trains one epoch of a copy of the prepared run."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        copy = Run(shutil.copytree(work / f"prepared-{data.name}", Path(folder) / "run"))
        for _ in train(copy, device=torch.device("cpu")):
            pass
        return int(copy.info["train"]["kept"])


def evaluate(work: Path, data: Path) -> int:
    """Evaluates the trained run."""
    return int(evaluate_run(work / "run", str(data))["rows"])


def score(work: Path, data: Path) -> int:
    """Scores the files with the trained run."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        manifest = score_files(Asked(str(work / "run"), Source(str(data)), str(Path(folder) / "scores")))
        return sum(int(each["rows"]) for each in manifest["files"])


STAGES: dict[str, Callable[[Path, Path], int]] = {"fit": fit, "train": train_epoch, "evaluate": evaluate, "score": score}


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def run_launch(stage: str, work: Path, data: Path) -> None:
    """What a launched process does; its last line is what it measured."""
    held = status("VmRSS")
    rows = STAGES[stage](work, data)
    print("\n" + json.dumps({"rows": rows, "held_bytes": held, "peak_bytes": status("VmHWM")}))


def launch_process(stage: str, work: Path, data: Path) -> dict[str, Any]:
    """Measurements of a fresh process."""
    command = [sys.executable, __file__, "--stage", stage, "--work", str(work), "--data", str(data)]
    environment = {**os.environ, **kept(os.environ), "OMP_NUM_THREADS": "1"}  # as Ray's workers have it
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def make_inputs(work: Path, rows: int) -> dict[int, Path]:
    """{1: files of `rows` rows, 10: of ten times as many}, a prepared run over each, and one that was trained on the fewer."""
    data = {}
    for times in (1, TIMES):
        folder = work / f"rows-{rows}-x{times}"
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=work) as half:
                write_log(Path(half), rows=rows * times, seed=7, files=1, validation_rows=0, row_group_rows=ROW_GROUP_ROWS)
                Path(half, "train").rename(folder)
        data[times] = folder
        if not (work / f"prepared-{folder.name}" / "run.json").exists():
            prepare(experiment_for(folder), work / f"prepared-{folder.name}")
    if not (work / "run").exists():
        with tempfile.TemporaryDirectory(dir=work) as half:
            copy = Run(shutil.copytree(work / f"prepared-{data[1].name}", Path(half) / "run"))
            for _ in train(copy, device=torch.device("cpu")):
                pass
            copy.folder.rename(work / "run")
    open_run(work / "run").best()
    return data


def measure(work: Path, rows: int, launches: int) -> int:
    """Makes the launches that are missing, then the table and the file; the exit code."""
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    data, kept = make_inputs(work, rows), work / "launches.json"
    done: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    for number in range(launches):
        for stage in STAGES:
            for times in (1, TIMES):
                key = f"{stage} {rows} x{times} {number}"
                if key not in done:
                    done[key] = launch_process(stage, work, data[times])
                    kept.write_text(json.dumps(done, indent=1))
                    print(f"{key}: {done[key]['peak_bytes'] / 1e6:,.0f} MB", flush=True)
    found: dict[str, Any] = {}
    for stage in STAGES:
        made = {times: [done[f"{stage} {rows} x{times} {number}"] for number in range(launches)] for times in (1, TIMES)}
        peak = {times: statistics.median(each["peak_bytes"] for each in made[times]) for times in (1, TIMES)}
        held = statistics.median(each["held_bytes"] for each in made[1])
        found[stage] = {
            "rows": {f"x{times}": made[times][0]["rows"] for times in (1, TIMES)},
            "peak_bytes": {f"x{times}": [each["peak_bytes"] for each in made[times]] for times in (1, TIMES)},
            "held_before_bytes": held,
            "growth": peak[TIMES] / peak[1] - 1,
            "growth_without_what_was_held": (peak[TIMES] - peak[1]) / (peak[1] - held),
        }
    print(f"{'':10}{'held before':>13}{'x1':>10}{f'x{TIMES}':>10}{'growth':>9}{'of what it added':>18}")
    for stage, each in found.items():
        cells = [each["held_before_bytes"], *(statistics.median(each["peak_bytes"][f"x{times}"]) for times in (1, TIMES))]
        growths = f"{each['growth']:>+9.1%}{each['growth_without_what_was_held']:>+18.1%}"
        print(f"{stage:10}{cells[0] / 1e6:>10,.0f} MB{cells[1] / 1e6:>7,.0f} MB{cells[2] / 1e6:>7,.0f} MB{growths}")
    reached = {stage: each["growth"] < WANTED for stage, each in found.items()}
    facts = {
        "experiment": "pipelines/quickstart/experiment.yaml",
        "settings": list(SETTINGS),
        "row_group_rows": ROW_GROUP_ROWS,
        "launches": launches,
        "versions": versions(),
        "wanted_growth": WANTED,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({**facts, "stages": found, "reached": reached}, indent=1) + "\n")
    return 0 if all(reached.values()) else 1


def main() -> None:
    """Parses the arguments; a launched process has `--stage`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-memory"))
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--stage", choices=list(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.stage:
        run_launch(given.stage, given.work, given.data)
    else:
        sys.exit(measure(given.work, given.rows, given.launches))


if __name__ == "__main__":
    main()
