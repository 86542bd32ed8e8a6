"""Do the papers' claims about task correlation hold here? Makes the data, runs the comparisons, writes REPORT.md.

    python pipelines/task_correlation/correlation_study.py WORK [--draws 5] [--rows 120000] [--parallel 1]

As in Ma et al. (2018) each repetition has a truth, rows and noise of its own (a draw), and is the unit that the intervals count.
A draw has three comparisons, at p = 0.5, 0.9 and 1, on the same rows and the same first task; each is an `mtrec compare` of
compare.yaml with 2 seeds. The learning rate comes before: from the searches of compare.yaml on draws that nothing else uses.

What is finished is not repeated, so the script may be stopped and started. WORK gets a folder for each comparison (with its own
report.html), results.json, REPORT.md and error.svg. Of the data only the test rows are kept.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from correlation_report import RATE, write_report

from mtrec.atomic import write_atomically

FOLDER = Path(__file__).parent
COMPARISON = FOLDER / "compare.yaml"
CORRELATIONS = (0.5, 0.9, 1.0)
TUNING_SEEDS = (1_000, 1_001)  # of the draws that the learning rate is chosen on
TUNING_CORRELATION = 0.9
RESULTS = "results.json"
Trials = dict[str, list[dict[str, Any]]]  # {variant: [{RATE: ..., "metric": ...}]}


def made_data(folder: Path, correlation: float, rows: int, seed: int) -> None:
    """The files of prepare.py, unless they are there."""
    if not (folder / "complete").is_file():
        command = [sys.executable, str(FOLDER / "prepare.py"), str(folder), "--correlation", str(correlation)]
        subprocess.run([*command, "--rows", str(rows), "--seed", str(seed)], check=True, stdout=subprocess.DEVNULL)
        (folder / "complete").touch()


def compared(comparison: Path, folder: Path, correlation: float, seed: int, arguments: argparse.Namespace) -> None:
    """Runs `mtrec compare` in FOLDER/comparison on data in FOLDER/data, or what is missing of it."""
    output, data = folder / "comparison", folder / "data"
    if (output / RESULTS).is_file() and json.loads((output / RESULTS).read_text()).get("complete", True):
        return
    made_data(data, correlation, arguments.rows, seed)
    command = [str(Path(sys.executable).parent / "mtrec"), "compare", str(comparison), "--output", str(output)]
    command += ["--parallel", str(arguments.parallel)] if arguments.parallel else []
    command += ["--resume"] if (output / "plan.json").is_file() else []
    began = time.monotonic()
    with (folder / "output.txt").open("a", encoding="utf-8") as out:
        found = subprocess.run(command, env={**os.environ, "TASK_CORRELATION": str(data)}, stdout=out, stderr=out, check=False)
    if found.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with code {found.returncode}. {folder / 'output.txt'} tells why.")
    print(f"{folder}: {time.monotonic() - began:.0f} s", flush=True)
    for part in ("train", "validation"):
        (data / f"{part}.parquet").unlink()


def best_rate(tried: Sequence[Trials]) -> float:
    """The learning rate with the best mean over tuning draws and architectures of the logarithm of what is left unexplained.

    One rate for all: which of two rates is the better for one architecture differs from draw to draw (a run may end in a bad
    place), so that its own choice, from few trials, would be a matter of luck, and a lucky one would stay in every result.

    >>> best_rate([{"ple": [{RATE: 0.1, "metric": 1.0}, {RATE: 0.2, "metric": 1.5}]}, {"ple": [{RATE: 0.1, "metric": 1.9}]}])
    0.1
    """
    found: dict[float, list[float]] = {}
    for draw in tried:
        for trials in draw.values():
            for trial in trials:
                found.setdefault(trial[RATE], []).append(math.log(2.0 - trial["metric"]))  # the metric: the sum of two R2
    return min(found, key=lambda rate: sum(found[rate]) / len(found[rate]))


def with_rate(tree: dict[str, Any], rate: float) -> dict[str, Any]:
    """The comparison with this learning rate instead of its search."""
    kept = {key: value for key, value in tree.items() if key != "search"}
    base = str((COMPARISON.parent / tree["base"]).resolve())
    return {**kept, "base": base, "set": {**tree.get("set", {}), RATE: rate}}


def tuned(work: Path, arguments: argparse.Namespace) -> Path:
    """The comparison file with the learning rate that the tuning draws chose."""
    target = work / "compare.yaml"
    if not target.is_file():
        tried = []
        for seed in TUNING_SEEDS:
            folder = work / f"tuning-{seed}"
            compared(COMPARISON, folder, TUNING_CORRELATION, seed, arguments)
            results = yaml.safe_load((folder / "comparison" / RESULTS).read_text())
            again = results["again"]
            tried.append({name: each["search"]["tried"] for name, each in results["variants"].items() if name != again})
        tree = with_rate(yaml.safe_load(COMPARISON.read_text()), best_rate(tried))
        write_atomically(target, yaml.safe_dump(tree, sort_keys=False))
        write_atomically(work / "tuning.yaml", yaml.safe_dump(tried, sort_keys=False))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder for everything that the study makes")
    parser.add_argument("--draws", type=int, default=5, help="independent truths and data sets; at least 2")
    parser.add_argument("--rows", type=int, default=120_000, help="of a data set; 10/12 of them for training")
    parser.add_argument("--parallel", type=int, help="runs at a time; default: one a CPU")
    arguments = parser.parse_args()
    if arguments.draws < 2:
        parser.error("--draws should be at least 2: the intervals are over draws.")
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    comparison = tuned(work, arguments)
    for draw in range(arguments.draws):
        for correlation in CORRELATIONS:
            compared(comparison, work / f"draw-{draw}" / f"p-{correlation:g}", correlation, draw, arguments)
    write_report(work, arguments.draws, arguments.rows, CORRELATIONS)
    print(f"report: {work / 'REPORT.md'}")


if __name__ == "__main__":
    main()
