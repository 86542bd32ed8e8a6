"""Everything that is owed on a GPU, in one call: correctness against the CPU first, then speed at batches of 4 k to 128 k rows.

python pipelines/benchmark/gpu.py OUTPUT.json [--device cuda] [--work runs/gpu] [--rows 2000000] [--batch-sizes 4096,...]

Correctness, fp32 without TF32, same seed on both devices: predictions of a batch (1e-4), weights after three steps (1e-4), if
every table moved, and the metrics of one short run (1e-4). Then `mtrec bench` with stages compute and train for each batch size,
one worker, beside the yardstick on the same device. Prints a table, writes OUTPUT.json (hardware, versions, numbers); exit code
1 where a check failed. `--device cpu` compares the CPU with itself: for a look at this script where there is no GPU.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtrec import parallel
from mtrec.batch import Batch
from mtrec.bench.launches import Asked, about, bench
from mtrec.config import apply_overrides, parse_experiment
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.run import Run, open_source, prepare
from mtrec.step import TrainState, build_state, train_step
from mtrec.synthetic import write_reference
from mtrec.train import Progress, Validation, make_reader, train
from mtrec.yaml_tree import read_yaml

REFERENCE = Path(__file__).parent / "reference.yaml"
CHECKED_ROWS, CHECKED_BATCH, TOLERANCE = 65_536, 2_048, 1e-4


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


def stepped(run: Run, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    """(predictions of the first batch, dense weights after three steps, tables that did not move), on the CPU."""
    with parallel.process_group(device):
        model = MultiTaskModel(run.experiment, run.encoder, run.labels, device)
        state = build_state(
            run.experiment, model, run.labels, batch_size=CHECKED_BATCH, total_steps=100, device=device
        )
        batches = [batch.to(device) for batch in batches_of(run)]
        with torch.no_grad():
            logits = {name: each.cpu() for name, each in model(batches[0]).items()}
        before = rows_of(state)
        for batch in batches:
            train_step(state, batch)
        after = rows_of(state)
        still = [name for name, table in after.items() if torch.equal(table, before[name])]
        dense = {name: each.detach().cpu().clone() for name, each in model.dense.named_parameters()}
    return logits, dense, still


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
    (logits, dense, still), (logits_there, dense_there, still_there) = stepped(run, here), stepped(run, there)
    found: dict[str, Any] = {
        "predictions": max(float((logits[name] - logits_there[name]).abs().max()) for name in logits),
        "dense_weights_after_3_steps": max(float((dense[name] - dense_there[name]).abs().max()) for name in dense),
        "tables_that_did_not_move": sorted({*still, *still_there}),
    }
    metrics, metrics_there = metrics_of(run, here), metrics_of(checked_run(work, "run-checked-device", log), there)
    found["metrics"] = max(abs(metrics[name] - metrics_there[name]) / max(1.0, abs(metrics[name])) for name in metrics)
    numbers = [found[name] for name in ("predictions", "dense_weights_after_3_steps", "metrics")]
    found["passed"] = all(number <= TOLERANCE for number in numbers) and not found["tables_that_did_not_move"]
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
