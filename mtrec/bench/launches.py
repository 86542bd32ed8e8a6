"""Interleaved launches of the stages, each in processes of its own, and what follows from them: medians, ratios, floors.

A round launches every measurement once; rounds alternate in direction. A ratio is taken within each round and the median over
rounds is what counts: a machine that is slow for a minute is slow for both sides.
"""

import dataclasses
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from mtrec.allocator import kept
from mtrec.architectures.products import emulates_bf16
from mtrec.bench.environment import PEERS, interpreter, make_environment, versions_of_peers, workload
from mtrec.bench.floor import floor_rows_per_second
from mtrec.bench.stages import SUMMED
from mtrec.config import apply_overrides, parse_experiment
from mtrec.model import MultiTaskModel
from mtrec.prepare import prepare
from mtrec.run import open_run, versions
from mtrec.synthetic import write_reference
from mtrec.yaml_tree import read_yaml

TABLE_BYTES_PER_ROW = 8_192  # read, gradient, optimizer state, written: what the floor counts for the reference workload
ARCHITECTURES = {
    "mmoe": {"kind": "mmoe", "num_experts": 4, "expert_layers": [256, 128]},
    "ple": {"kind": "ple", "levels": 2, "num_shared_experts": 1, "num_task_experts": 1, "expert_layers": [256, 128]},
    "shared_bottom": {"kind": "shared_bottom", "expert_layers": [1024, 256]},
}
STAGE_NAMES = ("read", "encode", "compute", "train", "score", "startup", "all")
RAY_STAGES = {"ray_data": "mtrec.jobs.bench", "empty_trainer": "mtrec.jobs.empty_trainer"}
STARTUP_ROWS = 20_000
BARE_STEPS = 160  # timed, of batches in memory: they are all alike


@dataclasses.dataclass(frozen=True)
class Asked:
    """What `mtrec bench` was asked for.

    Attributes:
        experiment: the reference experiment, or one's own.
        work: folder of data and prepared runs; used again by the next call.
        stages: of STAGE_NAMES.
        workers: of training, encoding and scoring, one thread each.
        device: cpu or cuda.
        rounds: launches of each measurement.
        steps, warmup: timed and untimed steps of a launch; of bare steps at most `BARE_STEPS` are timed.
        rows: of the reference log.
        overrides: of the experiment, as `mtrec train --set`.
        peers: also time torch-rechub and deepctr-torch, in an environment of their own in `work`.
        precisions: of training, fp32 and bf16; of scoring, one worker and other architectures the first of them.
    """

    experiment: Path
    work: Path
    stages: tuple[str, ...] = ("all",)
    workers: int = 2
    device: str = "cpu"
    rounds: int = 5
    steps: int = 150
    warmup: int = 20
    rows: int = 2_000_000
    architectures: bool = False
    overrides: tuple[str, ...] = ()
    peers: bool = False
    precisions: tuple[str, ...] = ("bf16", "fp32")

    @property
    def precision(self) -> str:
        """What most is measured in."""
        return self.precisions[0]

    @property
    def environment(self) -> Path:
        """Of the peers."""
        return self.work / "peers-env"


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One line of the table: a stage of a prepared run on so many workers."""

    name: str
    stage: str
    variant: str
    workers: int = 1


def counted(workers: int) -> str:
    """`1 worker`, `2 workers`."""
    return f"{workers} worker{'s' if workers > 1 else ''}"


def predictions(peer: str) -> str:
    """`torch-rechub predict`: what the same launch of a peer measures after its training."""
    return f"{peer} predict"


def from_memory(kind: str, workers: int) -> str:
    """What training of batches that lie in memory is called."""
    return f"train {kind}, {counted(workers)}, fed from memory"


def measurements(asked: Asked) -> list[Measurement]:
    """What is launched in a round, in order."""
    wanted = set(asked.stages)
    every, best = "all" in wanted, asked.precision
    many, found = asked.workers, [Measurement("ceilings", "ceilings", "fp32")]
    if every or wanted & {"compute", "train", "score"}:
        found.append(Measurement("yardstick", "yardstick", "fp32"))
    if every or "read" in wanted:
        found += [Measurement("decode", "decode", "fp32"), Measurement("read", "read", "fp32")]
        found.append(Measurement("Ray Data iter_torch_batches", "ray_data", "fp32"))
    if every or "encode" in wanted:
        if not (every or "read" in wanted):
            found.append(Measurement("decode", "decode", "fp32"))
        found.append(Measurement("encode", "encode", "fp32"))
        if many > 1:
            found.append(Measurement(f"encode, {counted(many)}", "encode", "fp32", many))
    for stage in ("compute", "train"):
        if every or stage in wanted:
            found += [Measurement(f"{stage} {kind}, {counted(many)}", stage, kind, many) for kind in asked.precisions]
            if many > 1:
                found.append(Measurement(f"{stage} {best}, 1 worker", stage, best))
            if stage == "train" and asked.device == "cpu":  # a GPU's time is short, and its batches would come from the host
                found += [Measurement(from_memory(kind, many), "train_from_memory", kind, many) for kind in asked.precisions]
    if every or "score" in wanted:
        if not every and "train" not in wanted:  # whose checkpoint is scored with
            found.append(Measurement(f"train {best}, {counted(many)}", "train", best, many))
        found.append(Measurement(f"score {best}, {counted(many)}", "score", best, many))
    if every or "startup" in wanted:
        found += [
            Measurement("mtrec --help", "help", "fp32"),
            Measurement("an empty TorchTrainer that imports torchrec", "empty_trainer", "fp32"),
            Measurement("mtrec train to its first step", "first_step", "fp32"),
            Measurement("mtrec train --local to its first step", "first_step_local", "fp32"),
        ]
    if asked.architectures:
        found += [
            Measurement(f"train {best} {kind}, {counted(many)}", "train", f"{best}-{kind}", many)
            for kind in ARCHITECTURES
            if kind != "mmoe"
        ]
    if asked.peers:
        found += [Measurement(name, "peer", "fp32") for name in PEERS]
        found += [Measurement(predictions(name), "peer_predict", "fp32") for name in PEERS]
    return found


def prepare_variants(asked: Asked, wanted: Sequence[Measurement]) -> dict[str, Path]:
    """{variant: its prepared run}; what is there already is used again if it was made from the same experiment."""
    asked.work.mkdir(parents=True, exist_ok=True)
    log = asked.work / f"log-{asked.rows}"
    if not (log / "train").exists():
        write_reference(log, rows=asked.rows, seed=7)
    tree = read_yaml(asked.experiment.read_text(encoding="utf-8"), str(asked.experiment))
    runs = {}
    for variant in dict.fromkeys(each.variant for each in wanted):
        precision, _, architecture = variant.partition("-")
        overrides = [
            f"data.train={log / 'train'}",
            "data.validation=null",
            f"training.precision={precision}",
            f"training.max_steps={asked.warmup + asked.steps}",
            f"training.epochs={asked.warmup + asked.steps}",  # however few batches one has
            f"training.log_every={asked.warmup}",
            f"training.checkpoint_every={max(1, (asked.warmup + asked.steps) // 2)}",
            *([f"model.architecture={json.dumps(ARCHITECTURES[architecture])}"] if architecture else []),
            *asked.overrides,
        ]
        experiment = parse_experiment(apply_overrides(tree, overrides), default_name="reference")
        folder = asked.work / f"run-{variant}"
        stated = yaml.safe_dump(experiment.model_dump(mode="json"))
        stamp = asked.work / f"run-{variant}.yaml"
        if not (folder.exists() and stamp.is_file() and stamp.read_text() == stated):
            shutil.rmtree(folder, ignore_errors=True)
            prepare(experiment, folder)
            stamp.write_text(stated)
        runs[variant] = folder
    return runs


def beside(asked: Asked, name: str, *overrides: str) -> Asked:
    """The same measurements with other overrides, over the same log; their runs are prepared in a folder of their own."""
    work, log = asked.work / name, f"log-{asked.rows}"
    work.mkdir(parents=True, exist_ok=True)
    if not (asked.work / log / "train").exists():
        write_reference(asked.work / log, rows=asked.rows, seed=7)
    if not (work / log).exists():
        (work / log).symlink_to(asked.work / log)
    return dataclasses.replace(asked, work=work, overrides=(*asked.overrides, *overrides))


def visible_gpus() -> list[str]:
    """The GPUs of this process, as `CUDA_VISIBLE_DEVICES` names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def launch(each: Measurement, run: Path, asked: Asked) -> dict[str, Any]:
    """Starts the processes of one measurement and returns what rank 0 found; speeds of `SUMMED` stages are added up."""
    if each.stage in COMMANDS:
        return {"seconds": COMMANDS[each.stage](asked)}
    threads = os.cpu_count() if each.stage in ("yardstick", "peer") else 1
    spec: dict[str, Any] = {
        "stage": each.stage,
        "run": str(run),
        "device": asked.device,
        "steps": min(asked.steps, BARE_STEPS) if each.stage in ("compute", "yardstick") else asked.steps,
        "warmup": asked.warmup,
        "threads": threads,
        "files": 4,
        "work": str(asked.work),
        "batch_size": 4096,
        "launched": time.time(),
    }
    command = [sys.executable, "-m", RAY_STAGES.get(each.stage, "mtrec.bench.stages")]
    # as Ray's workers have it, before anything is imported; bare loops and peers as they come (Arrow's part they inherit)
    from_start, paths = {} if each.stage in ("peer", "yardstick") else kept(os.environ), {}
    if each.stage == "peer":
        spec = workload(open_run(run), asked.warmup, asked.steps, asked.rows)
        command = [str(interpreter(asked.environment)), "-m", f"peers.{PEERS[each.name]}"]
        paths = {"PYTHONPATH": str(Path(__file__).parent)}
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        processes = []
        for rank in range(each.workers):
            environment = {**os.environ, **from_start, "OMP_NUM_THREADS": str(threads), **paths}
            if each.workers > 1 and each.stage != "score":  # a scoring process holds all tables, and knows no others
                environment |= {
                    "RANK": str(rank),
                    "WORLD_SIZE": str(each.workers),
                    "LOCAL_RANK": str(rank),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                }
            if each.stage == "score" and asked.device == "cuda":
                environment["CUDA_VISIBLE_DEVICES"] = visible_gpus()[rank]
            with Path(folder, f"said{rank}").open("w") as said:  # a file: a pipe that nobody reads stops who writes to it
                part = {} if each.stage == "peer" else {"part": rank, "parts": each.workers}
                whole = [*command, json.dumps(spec | part), f"{folder}/found"]
                processes.append(subprocess.Popen(whole, env=environment, stdout=said, stderr=subprocess.STDOUT))
        for rank, process in enumerate(processes):
            if process.wait():
                raise RuntimeError(f"The stage {each.name} failed:\n{Path(folder, f'said{rank}').read_text()}")
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("found*"))]
    first: dict[str, Any] = found[0]
    if each.stage in SUMMED:
        first["rows_per_second"] = sum(one["rows_per_second"] for one in found)
    return first


def time_help(asked: Asked) -> float:
    """Seconds that `mtrec --help` takes."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mtrec.cli", "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def time_first_step(asked: Asked, *options: str) -> float:
    """Seconds from `mtrec train` on a small log to the first step in its own log, the fit of the features included."""
    data = asked.work / f"log-{STARTUP_ROWS}"
    if not (data / "train").exists():
        write_reference(data, rows=STARTUP_ROWS, seed=7, files=1)
    folder = asked.work / "run-startup"
    shutil.rmtree(folder, ignore_errors=True)
    sets = (f"data.train={data / 'train'}", "data.validation=null", "training.log_every=1", "training.max_steps=2")
    command = [sys.executable, "-m", "mtrec.cli", "train", str(asked.experiment), "--output", str(folder), *options]
    command += [part for each in (*sets, *asked.overrides) for part in ("--set", each)]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, seconds = folder / "log.jsonl", 0.0
    while not seconds:
        time.sleep(0.02)
        if log.exists() and '"event": "step"' in log.read_text():
            seconds = time.perf_counter() - started
        elif process.poll() is not None:
            raise RuntimeError(f"`mtrec train` ended before its first step:\n{process.communicate()[0]}")
    process.communicate()
    return seconds


COMMANDS: dict[str, Callable[[Asked], float]] = {
    "help": time_help,
    "first_step": lambda asked: time_first_step(asked, "--workers", "1"),
    "first_step_local": lambda asked: time_first_step(asked, "--local"),
}


def bench(asked: Asked, say: Callable[[str], None]) -> dict[str, Any]:
    """Runs all rounds; the result is what `--json` writes."""
    wanted = measurements(asked)
    if asked.peers:
        say(f"environment of {', '.join(f'{name} {version}' for name, version in versions_of_peers().items())}")
        make_environment(asked.environment)
    runs = prepare_variants(asked, wanted)
    rounds: list[dict[str, dict[str, Any]]] = []
    launched = [each for each in wanted if each.stage != "peer_predict"]
    for number in range(asked.rounds):
        found = {}
        for each in launched if number % 2 == 0 else launched[::-1]:
            say(f"round {number + 1} of {asked.rounds}: {each.name}")
            found[each.name] = launch(each, runs[each.variant], asked)
            if each.stage == "peer":
                found[predictions(each.name)] = {"rows_per_second": found[each.name].pop("score_rows_per_second")}
        rounds.append(found)
    return summary(asked, wanted, runs, rounds)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and range of the rounds."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "values": list(values)}


def summary(
    asked: Asked, wanted: Sequence[Measurement], runs: Mapping[str, Path], rounds: Sequence[dict[str, dict[str, Any]]]
) -> dict[str, Any]:
    """Medians over rounds, ratios within rounds, floors from the measured ceilings."""
    ceilings = {key: statistics.median(r["ceilings"][key] for r in rounds) for key in rounds[0]["ceilings"]}
    stages: dict[str, Any] = {}
    startup: dict[str, Any] = {}
    idle: list[int] = []
    for each in wanted:
        if each.stage == "ceilings":
            continue
        found = [r[each.name] for r in rounds]
        if "seconds" in found[0]:
            startup[each.name] = spread([one["seconds"] for one in found])
            idle += [one["idle_bytes"] for one in found if "idle_bytes" in one]
            continue
        stages[each.name] = {
            "stage": each.stage,
            "variant": each.variant,
            "workers": each.workers,
            "rows_per_second": spread([one["rows_per_second"] for one in found]),
            **{
                key: spread([one[key] for one in found])
                for key, value in found[0].items()
                if isinstance(value, int | float) and key != "rows_per_second"
            },
        }
        if "phases" in found[0]:
            stages[each.name]["phases"] = {
                phase: statistics.median(one["phases"].get(phase, 0.0) for one in found) for phase in found[0]["phases"]
            }
        if each.stage in ("compute", "train", "train_from_memory", "score"):
            stages[each.name]["floor"] = _floor(each, runs[each.variant], ceilings, asked)
            stages[each.name]["of_floor"] = stages[each.name]["rows_per_second"]["median"] / stages[each.name]["floor"]
    ratios = {name: spread(values) for name, values in _ratios(asked, rounds).items()}
    by_name = {name: each["median"] for name, each in ratios.items()}
    return {
        "train_over_yardstick": by_name.get(f"train {asked.precision}, {counted(asked.workers)} / yardstick"),
        "precision": asked.precision,
        "about": about(asked),
        "ceilings": ceilings,
        "stages": stages,
        "ratios": ratios,
        **({"startup": startup} if startup else {}),
        **({"idle_worker_bytes": statistics.median(idle)} if idle else {}),
    }


def _ratios(asked: Asked, rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, list[float]]:
    """{what / what: the ratio of each round}."""
    many, best = asked.workers, asked.precision
    pairs = [
        *((f"train {kind}, {counted(many)}", "yardstick") for kind in asked.precisions),
        *((f"compute {kind}, {counted(many)}", "yardstick") for kind in asked.precisions),
        *((f"train {kind}, {counted(many)}", f"compute {kind}, {counted(many)}") for kind in asked.precisions),
        *((f"train {kind}, {counted(many)}", from_memory(kind, many)) for kind in asked.precisions),
        (f"train {best}, {counted(many)}", f"train {best}, 1 worker"),
        (f"compute {best}, {counted(many)}", f"compute {best}, 1 worker"),
        ("read", "decode"),
        ("encode", "decode"),
        ("encode", "Ray Data iter_torch_batches"),
        (f"encode, {counted(many)}", "Ray Data iter_torch_batches"),
        (f"score {best}, {counted(many)}", "yardstick"),
        *((f"train {kind}, {counted(many)}", peer) for peer in PEERS for kind in asked.precisions),
        *((f"score {best}, {counted(many)}", predictions(peer)) for peer in PEERS),
    ]
    return {
        f"{one} / {other}": [r[one]["rows_per_second"] / r[other]["rows_per_second"] for r in rounds]
        for one, other in pairs
        if one != other and one in rounds[0] and other in rounds[0]
    }


def _floor(each: Measurement, run_folder: Path, ceilings: Mapping[str, float], asked: Asked) -> float:
    run = open_run(run_folder)
    model = MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta"))
    times = 1 if each.stage == "score" else 3
    rate = ceilings["bf16_flops" if each.variant.startswith("bf16") else "fp32_flops"]
    moved = TABLE_BYTES_PER_ROW / (4 if each.stage == "score" else 1)
    one = floor_rows_per_second(times * model.dense.flops_per_row(), rate, moved, ceilings["gather_bytes"])
    return one * each.workers


def processor() -> dict[str, Any]:
    """What the numbers of a CPU were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return {
        "processor": ", ".join(sorted(names)) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def about(asked: Asked) -> dict[str, Any]:
    """Hardware, versions and sizes of a measurement."""
    gpu = torch.cuda.get_device_name() if asked.device == "cuda" else None
    return {
        **processor(),
        "gpu": gpu,
        "bf16_instructions": gpu is not None or not emulates_bf16(),
        "versions": {**versions(), **(versions_of_peers() if asked.peers else {})},
        "rounds": asked.rounds,
        "steps": asked.steps,
        "rows": asked.rows,
        "workers": asked.workers,
        "overrides": list(asked.overrides),
    }
