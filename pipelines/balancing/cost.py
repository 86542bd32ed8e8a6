"""What each balancing method costs: time a training step relative to static weights, on this machine.

python pipelines/balancing/cost.py OUTPUT [--rounds 5] [--batch-size 2048] [--threads 1] [--methods static,uncertainty,...]

Three tasks, the reference workload of the benchmark (pipelines/benchmark/reference.yaml: MMoE, 4 x [256, 128], 445 inputs), fp32,
one process. Every variant trains a model of its own on the same batches, already in memory. A round has 10 steps of each variant
in turn (so that `every: 10` takes one Gramian in them), and after each of these steps one with static weights on the same batch:
what disturbs the machine longer than a step disturbs both. The ratio of a round is that of the two sums of 10; the table shows
the median over rounds. Time is CPU time of the process (user and system). Writes OUTPUT/cost.json and OUTPUT/cost.md; variants
that are there and not measured again stay as they are.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from mtrec import parallel
from mtrec.balancing import BALANCERS
from mtrec.batch import Batch
from mtrec.config import apply_overrides, parse_experiment
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.prepare import prepare
from mtrec.run import Run, versions
from mtrec.sources import open_source
from mtrec.step import TrainState, build_state, train_step
from mtrec.synthetic import write_reference
from mtrec.train import Progress, make_reader
from mtrec.yaml_tree import read_yaml

EXPERIMENT = Path(__file__).parents[1] / "benchmark" / "reference.yaml"
STEPS = 10  # of one timing
PLACES = ("balancing.at=batch_sum", "balancing.at=representation", "balancing.rows=0.25")


def variants(methods: list[str]) -> dict[str, list[str]]:
    """{name in the table: overrides}."""
    found: dict[str, list[str]] = {}
    for kind in methods:
        chosen = [f"balancing.kind={kind}"]
        if not getattr(BALANCERS[kind], "needs_gramian"):  # noqa: B009 - a class attribute of every method
            found[kind] = chosen
            continue
        for every in (1, 10):
            found[f"{kind}, every: {every}"] = [*chosen, f"balancing.every={every}"]
    if "upgrad" in methods:
        for place in PLACES:
            name = place.removeprefix("balancing.").replace("=", ": ")
            for every in (1, 10):
                found[f"upgrad, {name}, every: {every}"] = ["balancing.kind=upgrad", f"balancing.every={every}", place]
    return found


def prepared(folder: Path, batch_size: int) -> tuple[Run, list[Batch]]:
    """A run on the synthetic log, and its first batches."""
    write_reference(folder / "log", rows=STEPS * batch_size, seed=3, files=1)
    tree = read_yaml(EXPERIMENT.read_text(encoding="utf-8"), str(EXPERIMENT))
    overrides = [
        f"data.train={folder / 'log' / 'train'}",
        "data.validation=null",
        f"data.batch_size={batch_size}",
    ]
    run = prepare(parse_experiment(apply_overrides(tree, overrides)), folder / "run")
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    labels = labels_of(run.experiment, MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta")).specs)
    return run, [batch for _, batch in feed(make_reader(run, data, Progress()), run.encoder, labels, None)]


def state_of(run: Run, overrides: list[str]) -> TrainState:
    """A fresh model with its optimizers and balancer."""
    experiment = parse_experiment(apply_overrides(run.experiment.model_dump(mode="json"), overrides))
    assert isinstance(experiment.data.batch_size, int)
    device = torch.device("cpu")
    model = MultiTaskModel(experiment, run.encoder, run.labels, device)
    return build_state(experiment, model, run.labels, batch_size=experiment.data.batch_size, total_steps=100_000, device=device)


def timed(state: TrainState, batch: Batch) -> float:
    """CPU seconds of a step."""
    started = time.process_time()
    train_step(state, batch)
    return time.process_time() - started


def measure(run: Run, batches: list[Batch], chosen: dict[str, list[str]], rounds: int) -> dict[str, dict[str, float]]:
    """{variant: {CPU milliseconds a step, ratio to static}}, medians over rounds."""
    static = state_of(run, ["balancing.kind=static"])
    found = {}
    for name, overrides in chosen.items():
        state = state_of(run, overrides)
        for each in (static, state):  # first steps allocate
            for batch in batches[:2]:
                timed(each, batch)
        state.step = STEPS  # a multiple of every `every`
        seconds, ratios = [], []
        for _ in range(rounds):
            pairs = [(timed(state, batch), timed(static, batch)) for batch in batches]
            own, beside = (sum(column) for column in zip(*pairs, strict=True))
            seconds.append(own / len(batches))
            ratios.append(own / beside)
        found[name] = {
            "ms": 1e3 * statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
            "rounds": rounds,
        }
        print(f"{name}: {found[name]['ratio']:.3f}", flush=True)
    return found


def markdown(found: dict[str, dict[str, float]], about: str) -> str:
    """The table."""
    lines = ["| method | CPU ms a step | relative to static | lowest and highest round | rounds |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | {each['ms']:.1f} | {each['ratio']:.3f} | {each['ratio_low']:.3f} to {each['ratio_high']:.3f} "
        f"| {each['rounds']} |"
        for name, each in found.items()
    ]
    return f"{about}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Reads the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=2_048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default=",".join(BALANCERS), help="comma-separated kinds")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, parallel.process_group(torch.device("cpu")):
        run, batches = prepared(Path(folder), arguments.batch_size)
        found = measure(run, batches, variants(arguments.methods.split(",")), arguments.rounds)
    about = (
        f"Batches of {arguments.batch_size:,} rows, {arguments.threads} thread(s), {platform.machine()}, torch "
        f"{versions()['torch']}; medians over rounds of {STEPS} steps."
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    file = arguments.output / "cost.json"
    before = json.loads(file.read_text()) if file.exists() else {"about": about, "variants": {}}
    if before["about"] == about:  # measured with the same sizes and versions
        found = {**before["variants"], **found}
    file.write_text(json.dumps({"about": about, "variants": found}, indent=1) + "\n")
    (arguments.output / "cost.md").write_text(markdown(found, about))
    print(markdown(found, about))


if __name__ == "__main__":
    main()
