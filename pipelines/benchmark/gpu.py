"""Everything that is owed on a GPU, in one call: correctness against the CPU first, then speed at batches of 4 k to 128 k rows.

python pipelines/benchmark/gpu.py OUTPUT.json [--device cuda] [--work runs/gpu] [--rows 2000000] [--batch-sizes 4096,...]

Correctness, fp32 without TF32, same seed on both devices: predictions of a batch (1e-4), weights after three steps (1e-4), if
every table moved, and the metrics of one short run (1e-4). On a GPU also: the same with half of the memory that the tables need,
so that some lie in the host's memory behind a cache (UVM); and that a step makes the host wait nowhere: it returns while the
device is still held up, and no line of mtrec synchronises (those of torchrec, on a stream of their own, are listed). Neither is
done with `--device cpu`. Then `mtrec bench` with stages compute and train for each batch size,
one worker, beside the yardstick on the same device. Prints a table, writes OUTPUT.json (hardware, versions, numbers); exit code
1 where a check failed. `--device cpu` compares the CPU with itself: for a look at this script where there is no GPU.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mtrec
from mtrec import parallel
from mtrec.ahead import copy_ahead
from mtrec.batch import Batch
from mtrec.bench.launches import Asked, about, bench
from mtrec.config import apply_overrides, parse_experiment
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.parallel import Memory
from mtrec.run import Run, open_source, prepare
from mtrec.step import TrainState, build_state, train_step
from mtrec.synthetic import write_reference
from mtrec.train import Progress, Validation, make_reader, train
from mtrec.yaml_tree import read_yaml

REFERENCE = Path(__file__).parent / "reference.yaml"
CHECKED_ROWS, CHECKED_BATCH, TOLERANCE = 65_536, 2_048, 1e-4
HELD_CYCLES = 2_000_000_000  # of the device's clock: about a second


def checked_run(work: Path, name: str, log: Path) -> Run:
    """The reference experiment on a short log that holds validation rows too, fp32."""
    tree = read_yaml(REFERENCE.read_text(encoding="utf-8"), str(REFERENCE))
    changes = [f"data.train={log / 'train'}", f"data.validation={log / 'validation'}", f"data.batch_size={CHECKED_BATCH}"]
    return prepare(parse_experiment(apply_overrides(tree, changes)), work / name)


def batches_of(run: Run) -> list[Batch]:
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    specs = MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta")).specs
    fed = feed(make_reader(run, data, Progress()), run.encoder, labels_of(run.experiment, specs), None)
    return [batch for _, batch in itertools.islice(fed, 3)]


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
        batches = [batch.to(device, non_blocking=False) for batch in batches_of(run)]
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
        pinned = [batch.pin_memory() for batch in batches_of(run)]
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


def metrics_of(run: Run, device: torch.device) -> dict[str, float]:
    """The last validation's numbers, flat."""
    last: dict[str, Any] = {}
    for event in train(run, device=device):
        if isinstance(event, Validation):
            last = event.metrics
    tasks = last["tasks"]
    return {
        f"{task}/{name}": value for task, each in tasks.items() for name, value in each.items() if isinstance(value, float)
    }


def check(work: Path, device: torch.device) -> dict[str, Any]:
    """The largest differences between `device` and the CPU, and whether all are small enough."""
    log = work / "log-checked"
    if not log.exists():
        write_reference(log, rows=CHECKED_ROWS, seed=5, files=2, validation_rows=CHECKED_ROWS // 8)
    torch.backends.cuda.matmul.allow_tf32 = False
    here, there = torch.device("cpu"), device
    run = checked_run(work, "run-checked-cpu", log)
    on_cpu = stepped(run, here)
    found = compared(on_cpu, stepped(run, there))
    metrics, metrics_there = metrics_of(run, here), metrics_of(checked_run(work, "run-checked-device", log), there)
    found["metrics"] = max(abs(metrics[name] - metrics_there[name]) / max(1.0, abs(metrics[name])) for name in metrics)
    found["host_memory"] = host_memory_check(run, on_cpu, there)
    found["waiting"] = waiting_check(run, there)
    parts = [found["host_memory"], found["waiting"]]
    found["passed"] &= found["metrics"] <= TOLERANCE and all(part.get("passed", True) for part in parts)
    return found


def main() -> None:
    """Reads the arguments, checks, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--batch-sizes", default="4096,16384,65536,131072")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    work = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device(arguments.device)
    result: dict[str, Any] = {"correctness": check(work, device), "speed": {}}
    print(json.dumps(result["correctness"], indent=1), flush=True)
    asked = Asked(REFERENCE, work, ("compute", "train"), 1, arguments.device, arguments.rounds, rows=arguments.rows)
    for size in map(int, arguments.batch_sizes.split(",")):
        steps = max(2, min(arguments.steps, arguments.rows // size - 4))
        warmup = max(1, min(4, arguments.rows // size - steps))
        each = dataclasses.replace(asked, steps=steps, warmup=warmup, overrides=(f"data.batch_size={size}",))
        result["speed"][str(size)] = bench(each, lambda line: None)
        for name, stage in result["speed"][str(size)]["stages"].items():
            print(f"{size:>8} {name:28} {stage['rows_per_second']['median']:>14,.0f} rows/s", flush=True)
        result["about"] = about(asked)
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")  # what is measured is kept, whatever comes next
    sys.exit(0 if result["correctness"]["passed"] else 1)


if __name__ == "__main__":
    main()
