"""Everything that is owed on a GPU, in one call: correctness against the CPU first, then speed at batches of 4 k to 128 k rows.

python pipelines/benchmark/gpu.py OUTPUT.json [--device cuda] [--work runs/gpu] [--rows 2000000] [--batch-sizes 65536,...]

Correctness, fp32 without TF32, same seed on both devices: predictions of a batch (1e-4), weights after three steps (1e-4), if
every table moved, the metrics of one short run (1e-4; calibration errors 1e-3: a row may change its bin), of the same resumed
half-way (1e-4), and what its last checkpoint predicts for the golden rows. On a GPU also: the same with half of the memory that
the tables need, so that some lie in the host's memory behind a cache (UVM); and that a step makes the host wait nowhere: it
returns while the device is still held up, and no line of mtrec synchronises (those of torchrec, if any, on a stream of their own,
are listed). Neither is done with `--device cpu`.

Then probes, of what could not be decided without a GPU: rows/s of 1, 2, 4 and 8 reading threads; products of the experts'
first layer at the model's width and at the next multiple of 8; mixing experts by products and by sums. Then `mtrec bench` with
stages compute and train for each batch size, one worker, beside the yardstick on the same device.

Prints a table and writes OUTPUT.json (hardware, versions, numbers) after each part. No batch size is begun where `--seconds` are
over, or would be before it is measured. Exit code 1 where a check failed. `--device cpu` compares the CPU with itself: for a
look at this script where there is no GPU.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtrec
from mtrec import parallel
from mtrec.ahead import copy_ahead
from mtrec.atomic import write_atomically
from mtrec.batch import Batch
from mtrec.bench.floor import timed
from mtrec.bench.launches import Asked, about, bench
from mtrec.checkpoint import Checkpoint, find
from mtrec.config import apply_overrides, parse_experiment
from mtrec.events import Validation
from mtrec.experiment import Source
from mtrec.feed import feed
from mtrec.formula import ranking_formula
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.parallel import Memory
from mtrec.prepare import prepare
from mtrec.run import Run
from mtrec.score import check_golden, open_scorer
from mtrec.sources import open_source
from mtrec.step import TrainState, build_state, train_step
from mtrec.synthetic import write_reference
from mtrec.train import Progress, make_reader, train
from mtrec.yaml_tree import read_yaml

REFERENCE = Path(__file__).parent / "reference.yaml"
CHECKED_ROWS, CHECKED_BATCH, TOLERANCE, ECE_TOLERANCE = 65_536, 2_048, 1e-4, 1e-3
THREADS = (1, 2, 4, 8)
Keep = Callable[[str, str, Any], None]  # part, name, what was found
HELD_CYCLES = 2_000_000_000  # of the device's clock: about a second


def checked_run(work: Path, name: str, log: Path) -> Run:
    """The reference experiment on a short log that holds validation rows too, fp32."""
    tree = read_yaml(REFERENCE.read_text(encoding="utf-8"), str(REFERENCE))
    changes = [f"data.train={log / 'train'}", f"data.validation={log / 'validation'}", f"data.batch_size={CHECKED_BATCH}"]
    changes += [f"training.checkpoint_every={CHECKED_ROWS // CHECKED_BATCH // 2}"]
    return prepare(parse_experiment(apply_overrides(tree, changes)), work / name)


def batches_of(run: Run, source: Source, num_threads: int = 1) -> Iterator[Batch]:
    """An epoch of them."""
    specs = MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta")).specs
    reader = make_reader(run, open_source(run.experiment, source, "data.train"), Progress(), num_threads)
    return (batch for _, batch in feed(reader, run.encoder, labels_of(run.experiment, specs), None))


def first_batches(run: Run) -> list[Batch]:
    return list(itertools.islice(batches_of(run, run.experiment.data.train), 3))


def rows_of(state: TrainState) -> dict[str, Tensor]:
    """{table: its rows}, on the CPU."""
    return {
        name: sharded.local_shards()[0].tensor.detach().cpu().clone() for name, sharded in state.tables.weights().items()
    }


@dataclasses.dataclass(frozen=True)
class Stepped:
    """On the CPU: predictions of the first batch; dense weights and tables after three steps.

    `still`: tables that did not move; `cached`: those in the host's memory; `again`: the largest difference between what is
    looked up first, and once the initial rows were written again.
    """

    logits: dict[str, Tensor]
    dense: dict[str, Tensor]
    rows: dict[str, Tensor]
    still: list[str]
    cached: list[str]
    again: float


def fresh_state(run: Run, device: torch.device, memory: Memory | None = None) -> TrainState:
    model = MultiTaskModel(run.experiment, run.encoder, run.labels, device)
    options: dict[str, Any] = {"batch_size": CHECKED_BATCH, "total_steps": 100, "device": device, "memory": memory}
    return build_state(run.experiment, model, run.labels, **options)


def stepped(run: Run, device: torch.device, memory: Memory | None = None) -> Stepped:
    """Three steps; `memory` for the tables, None: what there is."""
    with parallel.process_group(device):
        state = fresh_state(run, device, memory)
        model = state.model
        batches = [batch.to(device, non_blocking=False) for batch in first_batches(run)]
        with torch.no_grad():
            logits = {name: each.cpu() for name, each in model(batches[0]).items()}
            x_BD = model.embeddings(batches[0])
        before = rows_of(state)
        for batch in batches:
            train_step(state, batch)
        state.read_flags(wait=True)
        assert state.nonfinite_steps == 0, state.nonfinite_steps
        after = rows_of(state)
        dense = {name: each.detach().cpu().clone() for name, each in model.dense.named_parameters()}
        state.tables.initialise(run.experiment.seed)
        with torch.no_grad():
            again = float((model.embeddings(batches[0]) - x_BD).abs().max())
        still = [name for name, table in after.items() if torch.equal(table, before[name])]
        return Stepped(logits, dense, after, still, state.tables.cached(), again)


def difference(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> float:
    """The largest, of all tensors."""
    return max(float((here[name] - there[name]).abs().max()) for name in here)


def compared(here: Stepped, there: Stepped) -> dict[str, Any]:
    found: dict[str, Any] = {
        "predictions": difference(here.logits, there.logits),
        "dense_weights_after_3_steps": difference(here.dense, there.dense),
        "tables_after_3_steps": difference(here.rows, there.rows),
        "lookups_after_initial_rows_again": there.again,
    }
    passed = all(number <= TOLERANCE for number in found.values())
    still = sorted({*here.still, *there.still})
    return found | {"tables_that_did_not_move": still, "passed": passed and not still}


def host_memory_check(run: Run, here: Stepped, device: torch.device) -> dict[str, Any]:
    """As many megabytes of the GPU as hold half of the tables: some have to lie in the host's memory."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    size = sum(rows.numel() * rows.element_size() for rows in here.rows.values())
    there = stepped(run, device, Memory(size // 2, 4 * size))
    found = compared(here, there) | {"tables_bytes": size, "tables_in_host_memory": there.cached}
    return found | {"passed": found["passed"] and bool(there.cached)}


def waiting_check(run: Run, device: torch.device) -> dict[str, Any]:
    """Where the host waits in a step: {file:line: times in four steps}; and whether it does for what the device computes."""
    if device.type != "cuda":
        return {"skipped": "needs a GPU"}
    with parallel.process_group(device):
        state = fresh_state(run, device)
        pinned = [batch.pin_memory() for batch in first_batches(run)]
        ahead = itertools.pairwise(copy_ahead(batch, device) for batch in itertools.cycle(pinned))

        def steps(count: int) -> None:
            for batch, upcoming in itertools.islice(ahead, count):
                train_step(state, batch, upcoming=upcoming)

        steps(5)
        torch.cuda.synchronize(device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            steps(4)
            torch.cuda.set_sync_debug_mode("default")
        said = [each for each in caught if "synchronizing CUDA operation" in str(each.message)]
        places = Counter(f"{each.filename}:{each.lineno}" for each in said)
        torch.cuda.synchronize(device)
        released = torch.cuda.Event()
        torch.cuda._sleep(HELD_CYCLES)
        released.record()
        steps(1)
        returned = not released.query()  # the step was handed over while the device had not begun it
        torch.cuda.synchronize(device)
    ours = [place for place in places if place.startswith(str(Path(mtrec.__file__).parent))]
    found = {"places": dict(places), "places_in_mtrec": ours, "step_returns_while_the_device_is_held_up": returned}
    return found | {"passed": returned and not ours}


def metrics_of(run: Run, device: torch.device, resume_from: Checkpoint | None = None) -> dict[str, float]:
    """The last validation's numbers, flat."""
    last: dict[str, Any] = {}
    for event in train(run, device=device, resume_from=resume_from):
        if isinstance(event, Validation):
            last = event.metrics
    tasks = last["tasks"]
    return {
        f"{task}/{name}": value for task, each in tasks.items() for name, value in each.items() if isinstance(value, float)
    }


def apart(here: Mapping[str, float], there: Mapping[str, float], calibration: bool) -> float:
    """The largest relative difference of metrics: of calibration errors, or of the others."""
    chosen = [name for name in here if ("ece" in name) == calibration]
    return max((abs(here[name] - there[name]) / max(1.0, abs(here[name])) for name in chosen), default=0.0)


def trained_check(cpu: Run, there: Run, device: torch.device) -> dict[str, Any]:
    """Metrics of a run on both devices and of one resumed half-way; the golden rows of its last checkpoint."""
    metrics, metrics_there = metrics_of(cpu, torch.device("cpu")), metrics_of(there, device)
    steps = CHECKED_ROWS // CHECKED_BATCH
    checkpoints = {found.step: found for found in find(there.checkpoints)}
    with open_scorer(there, checkpoints[steps], ranking_formula(there.experiment, None), device) as scorer:
        golden = check_golden(scorer, there, checkpoints[steps])
    resumed = metrics_of(there, device, checkpoints[steps // 2])
    found = {
        "metrics": apart(metrics, metrics_there, calibration=False),
        "calibration": apart(metrics, metrics_there, calibration=True),
        "resumed": apart(metrics_there, resumed, calibration=False),
        "golden": golden,  # beyond its own bound it has raised an error
    }
    passed = max(found["metrics"], found["resumed"]) <= TOLERANCE and found["calibration"] <= ECE_TOLERANCE
    return found | {"passed": passed}


def check(work: Path, device: torch.device, keep: Keep) -> bool:
    """Holds `device` against the CPU; tells `keep` of each part, also of one that raised an error. Whether all passed."""
    log = work / "log-checked"
    if not log.exists():
        write_reference(log, rows=CHECKED_ROWS, seed=5, files=2, validation_rows=CHECKED_ROWS // 8)
    torch.backends.cuda.matmul.allow_tf32 = False
    run = checked_run(work, "run-checked-cpu", log)
    on_cpu = stepped(run, torch.device("cpu"))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "stepped": lambda: compared(on_cpu, stepped(run, device)),
        "trained": lambda: trained_check(run, checked_run(work, "run-checked-device", log), device),
        "host_memory": lambda: host_memory_check(run, on_cpu, device),
        "waiting": lambda: waiting_check(run, device),
    }
    passed = True
    for name, part in parts.items():
        try:
            found = part()
        except Exception as error:  # the other parts are to be seen as well
            traceback.print_exc()
            found = {"passed": False, "error": repr(error)}
        keep("correctness", name, found)
        print(name, json.dumps(found, indent=1), flush=True)
        passed &= found.get("passed", True)
    return passed


def reading_probe(run: Run, log: Path) -> dict[str, float]:
    """{threads: rows/s of reading and encoding a log}; the first pass, which is not counted, warms the cache."""
    found = {}
    for threads in (1, *THREADS):
        started = time.perf_counter()
        rows = sum(batch.num_rows for batch in batches_of(run, Source(path=str(log / "train")), threads))
        found[str(threads)] = rows / (time.perf_counter() - started)
    return found


def product_probe(run: Run, device: torch.device, rows: int) -> dict[str, float]:
    """Milliseconds, forward and backward, in bf16: experts' first layers at two widths, mixing of experts in two ways."""

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    width = MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta")).embeddings.output_dim
    found: dict[str, float] = {}
    for columns in (width, -(-width // 8) * 8):
        x_BD, weight, ones = some(rows, columns), some(1024, columns), some(rows, 1024).detach()
        both = functools.partial(forward_and_backward, lambda x, w: x @ w.T, x_BD, weight, ones)
        found[f"first layer, {columns} columns"] = 1e3 * timed(both, device)
    experts_BEH, gates_BGE, ones = some(rows, 4, 128), some(rows, 3, 4), some(rows, 3, 128).detach()
    ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "products": lambda gates, experts: gates @ experts,
        "sums": lambda gates, experts: (gates[..., None] * experts[:, None]).sum(2),
    }
    for name, way in ways.items():
        both = functools.partial(forward_and_backward, way, gates_BGE, experts_BEH, ones)
        found[f"mixing by {name}"] = 1e3 * timed(both, device)
    return found


def forward_and_backward(way: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(way(a, b), [a, b], gradient)


FIRST_SIZE_SECONDS = 120.0  # a guess of two fits and six processes: none is begun that a call's limit would cut short


def speeds(asked: Asked, sizes: list[int], most_steps: int, end: float, keep: Callable[[str, Any], None]) -> None:
    """Measures one batch size after the other; none is begun where the last one's time is not left before `end`."""
    took = FIRST_SIZE_SECONDS
    for size in sizes:
        left = end - time.monotonic()
        if left < took:
            print(f"{size:>8} left out: {max(0.0, left):.0f} s are left, the last size took {took:.0f}", flush=True)
            continue
        started = time.monotonic()
        warmup = min(20, most_steps)
        steps = -(-min(most_steps, max(60, 10_000_000 // size)) // warmup) * warmup  # a logged step at its end
        each = dataclasses.replace(asked, steps=steps, warmup=warmup, overrides=(f"data.batch_size={size}",))
        found = bench(each, lambda line: None)
        keep(str(size), found)
        for name, stage in found["stages"].items():
            print(f"{size:>8} {name:28} {stage['rows_per_second']['median']:>14,.0f} rows/s", flush=True)
        took = time.monotonic() - started


def main() -> None:
    """Reads the arguments, checks, probes, measures; what is found is written after each part, whatever comes next."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch-sizes", default="65536,4096,16384,131072")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=400, help="timed at most, fewer of large batches")
    parser.add_argument("--seconds", type=float, default=540.0, help="no batch size is begun that would end later")
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device(arguments.device)
    asked = Asked(REFERENCE, work, ("compute", "train"), 1, arguments.device, arguments.rounds, rows=arguments.rows)
    result: dict[str, Any] = {"about": about(asked), "correctness": {}, "probes": {}, "speed": {}}

    def keep(part: str, name: str, found: Any) -> None:
        result[part][name] = found
        write_atomically(arguments.output, json.dumps(result, indent=1) + "\n")

    passed = check(work, device, keep)
    run, log = Run(work / "run-checked-cpu"), work / f"log-{arguments.rows}"
    keep("probes", "milliseconds", product_probe(run, device, 65_536 if device.type == "cuda" else 512))
    if not log.exists():
        write_reference(log, rows=arguments.rows, seed=7)
    keep("probes", "rows_per_second_of_reading_threads", reading_probe(run, log))
    print("probes", json.dumps(result["probes"], indent=1), flush=True)
    sizes = [int(size) for size in arguments.batch_sizes.split(",")]
    speeds(asked, sizes, arguments.steps, started + arguments.seconds, functools.partial(keep, "speed"))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
