"""How fast the project's scoring path is beside a bare loop that reads, forwards and writes; and whether its memory is bounded.

python pipelines/benchmark/score.py [--work runs/benchmark-score] [--launches 5] [--rows 200000] [--minutes 60]

A run is trained for some steps on the synthetic log (`pipelines/quickstart/experiment.yaml`), then a file of `--rows` rows is
scored:

- *project*: `score_files` with `score_here`, what `mtrec score --local` does: read ahead, encode, forward, formula, checks for
  numbers that are not finite, counts of nulls and unseen ids, distributions of predictions, metrics against the labels in the
  file, Parquet written in a thread, checksum, record.
- *bare*: `pyarrow.parquet.ParquetFile.iter_batches`, `make_batch`, the model, its predictions, `pyarrow.parquet.ParquetWriter`.
  The same model, rows a batch, columns, compression and rows a row group; none of the rest, one thing after the other.

Both are timed from the loaded model to the closed file, by the clock on the wall and by the CPU time of all threads of the
process, which other processes on the machine disturb less. Every launch is a process of its own; launches of the two alternate,
which of them comes first alternates too. There are two settings: one core, where the work that the project does besides cannot
hide behind another core, and all cores. Peak memory is that of a process (VmHWM, Linux) that scores the file, and one of ten
times the rows.

A launch that is done is kept in WORK, so that the script can be stopped and started again; `--minutes` stops it between two
launches (exit code 3). It prints a table and writes pipelines/benchmark/results/score-cpu.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mtrec.batch import make_batch
from mtrec.bench.launches import processor, spread
from mtrec.config import apply_overrides, parse_experiment
from mtrec.dataset import Source
from mtrec.formula import ranking_formula
from mtrec.launch import launch
from mtrec.run import open_run, versions
from mtrec.score import SCORE, open_scorer
from mtrec.scored_files import Asked, Piece, score_files, score_here
from mtrec.scored_files.inputs import UNIT_ROWS
from mtrec.scored_files.job import Event, Progress, Work
from mtrec.scored_files.output import repeating_paths
from mtrec.synthetic import write_log
from mtrec.yaml_tree import read_yaml

EXPERIMENT = Path(__file__).parents[1] / "quickstart" / "experiment.yaml"
RESULT = Path(__file__).parent / "results" / "score-cpu.json"
TRAINING_ROWS = 100_000
TIMES = 10  # the rows of the larger file, in those of the smaller
FILES = {1: "rows-x1.parquet", TIMES: f"rows-x{TIMES}.parquet"}
CLOCKS = ("wall", "cpu")
RATIO_WANTED, MEMORY_WANTED = 0.85, 1.10
LATER = 3  # exit code

Clocks = tuple[float, float]  # seconds: on the wall, of CPU time


def clocks() -> Clocks:
    """Now."""
    return time.perf_counter(), time.process_time()


def _since(start: Clocks, end: Clocks) -> Clocks:
    return end[0] - start[0], end[1] - start[1]


def make_inputs(work: Path, rows: int) -> None:
    """The run, and the files to score: the log's rows once, and ten times over."""
    if not (work / "log").exists():
        write_log(work / "log", rows=rows, seed=11, files=1, validation_rows=TRAINING_ROWS, overwrite=True)
    source = work / "log" / "train" / "part-000.parquet"
    for times, name in FILES.items():
        target = work / name
        if not target.exists():
            _repeat(source, target, times)
    if not (work / "run" / "run.json").exists():
        tree = read_yaml(EXPERIMENT.read_text(encoding="utf-8"), str(EXPERIMENT))
        data = work / "log" / "validation"
        changes = [f"data.train={data}", "data.validation=null", "evaluation.group_by=null", "training.max_steps=100"]
        launch(parse_experiment(apply_overrides(tree, changes)), output=work / "run", local=True)


def _repeat(source: Path, target: Path, times: int) -> None:
    unfinished = target.with_suffix(".unfinished")
    with pq.ParquetFile(source) as parquet, pq.ParquetWriter(unfinished, parquet.schema_arrow, compression="zstd") as writer:
        for _ in range(times):
            for group in range(parquet.num_row_groups):
                writer.write_table(parquet.read_row_group(group))
    unfinished.rename(target)


def score_with_project(run: Path, data: Path, output: Path) -> Clocks:
    """(wall, CPU) seconds from the loaded model to the closed file."""
    marks: list[Clocks] = []

    def timed(work: Work, pieces: Sequence[Piece]) -> Iterator[Event]:
        for event in score_here(work, pieces):
            if isinstance(event, Progress) and event.golden is not None:
                marks.append(clocks())
            yield event
        marks.append(clocks())

    manifest = score_files(Asked(str(run), Source(str(data)), str(output)), timed)
    if not manifest["complete"]:
        raise RuntimeError(f"Not all was scored: {manifest['failed']}")
    return _since(marks[0], marks[-1])


def score_with_bare_loop(run_folder: Path, data: Path, output: Path) -> Clocks:
    """(wall, CPU) seconds from the loaded model to the closed file. The columns are those that the project writes."""
    run = open_run(run_folder)
    asked = Asked(str(run_folder), Source(str(data)), str(output))
    formula = ranking_formula(run.experiment, None)
    output.mkdir(parents=True)
    with open_scorer(run, run.best(), formula, torch.device("cpu")) as scorer:
        started = clocks()
        outcomes = {"click", "conversion", "dwell_seconds"}
        with pq.ParquetFile(data) as parquet:
            kept = [name for name in parquet.schema_arrow.names if name not in outcomes]
            schema = pa.schema([*(parquet.schema_arrow.field(name) for name in kept), *scorer.schema])
            writer = pq.ParquetWriter(
                output / data.name,
                schema,
                compression="zstd",
                compression_level=1,
                use_dictionary=repeating_paths(schema, parquet.metadata),
            )
            held: list[pa.RecordBatch] = []
            for rows in parquet.iter_batches(asked.batch_rows, columns=kept):
                batch = make_batch(rows, run.encoder, {}, None)
                with torch.no_grad():
                    logits = {name: each.double() for name, each in scorer.model(batch).items()}
                    found = {name: each.numpy() for name, each in scorer.model.objectives.predictions(logits).items()}
                found[SCORE] = formula(found)
                made = [pa.array(found[name].astype("float32")) for name in scorer.columns]
                held.append(pa.RecordBatch.from_arrays([*rows.columns, *made], schema=schema))
                if sum(each.num_rows for each in held) >= UNIT_ROWS:
                    writer.write_table(pa.Table.from_batches(held), row_group_size=2 * UNIT_ROWS)
                    held = []
            if held:
                writer.write_table(pa.Table.from_batches(held), row_group_size=2 * UNIT_ROWS)
            writer.close()
        return _since(started, clocks())


WAYS: dict[str, Callable[[Path, Path, Path], Clocks]] = {"project": score_with_project, "bare": score_with_bare_loop}


def run_launch(way: str, cores: int, run: Path, data: Path) -> None:
    """What a launched process does; its last line is what it measured."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = WAYS[way](run, data, Path(folder) / "output")
        written = pq.read_metadata(next((Path(folder) / "output").glob("*.parquet"))).num_rows
    rows = pq.read_metadata(data).num_rows
    if written != rows:
        raise RuntimeError(f"{way} wrote {written} rows of {rows}.")
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    measured = {
        "rows": rows,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
    }
    print(json.dumps(measured))


def launch_process(way: str, cores: int, run: Path, data: Path) -> dict[str, Any]:
    """Measurements of a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--cores", str(cores), "--run", str(run), "--data", str(data)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def launches_of(count: int, cores: Sequence[int]) -> list[tuple[str, str, int, int, int]]:
    """(purpose, way, cores, times the rows, number) of every launch, in order."""
    found = [("memory", way, cores[-1], TIMES, 0) for way in WAYS]
    for number in range(count):
        for each in cores:
            ways = list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]
            found += [("speed", way, each, 1, number) for way in ways]
    return found


def summary_of(launches: dict[str, dict[str, Any]], count: int, cores: Sequence[int]) -> dict[str, Any]:
    """Medians and ranges, ratios of neighbours, memory."""
    found: dict[str, Any] = {"settings": {}}
    for each in cores:
        setting = found["settings"][f"{each} core{'s' if each > 1 else ''}"] = {}
        for clock in CLOCKS:
            speeds: dict[str, list[float]] = {}
            for way in WAYS:
                made = [launches[f"speed {way} {each} 1 {number}"] for number in range(count)]
                speeds[way] = [one["rows"] / one[f"{clock}_seconds"] for one in made]
            pairs = [project / bare for project, bare in zip(speeds["project"], speeds["bare"], strict=True)]
            setting[f"by_{clock}"] = {
                **{f"{way}_rows_per_second": spread(values) for way, values in speeds.items()},
                "ratio_of_neighbours": spread(pairs),
                "ratio_of_medians": statistics.median(speeds["project"]) / statistics.median(speeds["bare"]),
            }
    peaks = {
        way: {
            "x1": [launches[f"speed {way} {cores[-1]} 1 {number}"]["peak_bytes"] for number in range(count)],
            f"x{TIMES}": launches[f"memory {way} {cores[-1]} {TIMES} 0"]["peak_bytes"],
        }
        for way in WAYS
    }
    found["peak_memory_bytes"] = {
        way: {
            "x1": spread(peak["x1"]),
            f"x{TIMES}": peak[f"x{TIMES}"],
            "growth": peak[f"x{TIMES}"] / statistics.median(peak["x1"]),
        }
        for way, peak in peaks.items()
    }
    ratios = {clock: min(each[f"by_{clock}"]["ratio_of_medians"] for each in found["settings"].values()) for clock in CLOCKS}
    growth = found["peak_memory_bytes"]["project"]["growth"]
    found["smallest_ratio"], found["wanted"] = ratios, {"ratio": RATIO_WANTED, "growth": MEMORY_WANTED}
    found["reached"] = {**{clock: ratio >= RATIO_WANTED for clock, ratio in ratios.items()}, "memory": growth <= MEMORY_WANTED}
    return found


def hardware() -> dict[str, Any]:
    """What the numbers were measured on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **processor(),
        "memory_bytes": memory,
        "system": platform.system(),
    }


def show(found: dict[str, Any]) -> None:
    """Prints the table."""
    print(f"{'':16}{'bare rows/s':>30}{'project rows/s':>30}{'ratio':>8}{'of neighbours':>23}")
    for name, setting in found["settings"].items():
        for clock in CLOCKS:
            each = setting[f"by_{clock}"]
            cells = [each[f"{way}_rows_per_second"] for way in ("bare", "project")]
            speeds = [f"{cell['median']:,.0f} ({cell['low']:,.0f} to {cell['high']:,.0f})" for cell in cells]
            pairs = each["ratio_of_neighbours"]
            print(
                f"{f'{name}, {clock}':16}{speeds[0]:>30}{speeds[1]:>30}{each['ratio_of_medians']:>8.3f}"
                f"{pairs['median']:>9.3f} ({pairs['low']:.3f}-{pairs['high']:.3f})"
            )
    for way, peak in found["peak_memory_bytes"].items():
        print(
            f"peak memory, {way}: {peak['x1']['median'] / 1e6:,.0f} MB, {TIMES} times the rows: "
            f"{peak[f'x{TIMES}'] / 1e6:,.0f} MB ({peak['growth']:.3f})"
        )
    print(f"reached: {found['reached']}")


def measure(work: Path, count: int, rows: int, minutes: float) -> int:
    """Makes the launches that are missing, then the table and the file; the exit code."""
    began = time.monotonic()
    make_inputs(work, rows)
    kept = work / "launches.json"
    launches: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
    cores = sorted({1, len(os.sched_getaffinity(0))})
    for launched in launches_of(count, cores):
        key = " ".join(map(str, launched))
        if key in launches:
            continue
        if time.monotonic() - began > 60 * minutes:
            print(f"{len(launches)} launches are done; run it again for the rest")
            return LATER
        _, way, with_cores, times, _ = launched
        launches[key] = launch_process(way, with_cores, work / "run", work / FILES[times])
        kept.write_text(json.dumps(launches, indent=1))
        print(f"{key}: {launches[key]['rows'] / launches[key]['wall_seconds']:,.0f} rows/s", flush=True)
    found = summary_of(launches, count, cores)
    show(found)
    setting = {
        "experiment": "pipelines/quickstart/experiment.yaml",
        "rows": launches[f"speed project {cores[0]} 1 0"]["rows"],
        "batch_rows": Asked("", Source(""), "").batch_rows,
        "threads": 1,
        "launches": count,
    }
    facts = {"hardware": hardware(), "versions": {**versions(), "numpy": metadata.version("numpy")}, "setting": setting}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps({**facts, **found}, indent=1) + "\n")
    return 0 if all(found["reached"].values()) else 1


def main() -> None:
    """Parses the arguments; a launched process has `--way`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-score"))
    parser.add_argument("--launches", type=int, default=5)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        run_launch(given.way, given.cores, given.run, given.data)
    else:
        sys.exit(measure(given.work, given.launches, given.rows, given.minutes))


if __name__ == "__main__":
    main()
