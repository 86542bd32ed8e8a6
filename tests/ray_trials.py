"""Trials of `mtrec train` on Ray: something dies or joins while it trains, and what it did is held against a run that lived.

The command is the real one, in a process of its own, on Ray's own processes: embedded, or a cluster of two nodes on this machine.
Its workers carry a witness (witness.py), which an experiment brings along as a feature's kind.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from logs import experiment_tree, write_log
from ranks import run_ranks
from trials import COMPARED_STEPS, ROWS, STEPS_PER_EPOCH, copy_of, metric_differences, wrong_rows, wrongly_restored
from witness import batches, watch

import mtrec.events
import mtrec.train
from mtrec.checkpoint import find, folder_of, newest, read
from mtrec.config import apply_overrides, parse_experiment
from mtrec.prepare import prepare
from mtrec.run import Run

OVERRIDES = (
    "training.epochs=4",
    "training.checkpoint_every=5",
    "training.validate_every=1000",
    "training.keep_last=50",
    "training.log_every=1",
    "balancing.kind=gradnorm",
    "balancing.every=3",
    "model.dropout=0.2",
    "features.user_id.sharding=column_wise",
    "features.user_id.num_column_shards=2",
)
AT_STEP = 12  # from here on, something happens
SECONDS_PER_STEP = {"1": 0.05, "2": 0.05}  # by number of workers: slow enough to be hit at a step


@dataclasses.dataclass(frozen=True)
class RayOutcome:
    """What a trial found; `failures` is empty where everything holds that should. `said`: the lines that the user got.

    `world_sizes` of all attempts; `died_at_steps` of all but the last, `resumed_steps` of all but the first.
    """

    said: str
    died_at_steps: tuple[int, ...]
    resumed_steps: tuple[int, ...]
    world_sizes: tuple[int, ...]
    loss_difference: float
    metric_difference: float
    bit_equal: bool
    failures: tuple[str, ...]


def experiment(folder: Path) -> Path:
    """The experiment file of all trials, and its data, in `folder` (written on first use)."""
    log, path = folder / f"log-{ROWS}", folder / "small.yaml"
    if not path.exists():
        write_log(log / "train", rows=ROWS)
        write_log(log / "validation", rows=1_000, seed=1)
        tree: dict[str, Any] = experiment_tree(log / "train", log / "validation")
        tree["features"]["row"] = {"kind": "witness:RowId", "column": "row_id", "encoding": "hash", "num_embeddings": 50}
        path.write_text(yaml.safe_dump(apply_overrides({"name": "small", **tree}, OVERRIDES), sort_keys=False))
    return path


def command(folder: Path, workers: str, *more: str) -> list[str]:
    """`mtrec train` of the experiment into `folder`/run."""
    mtrec = [sys.executable, "-m", "mtrec.cli", "train", str(experiment(folder.parent)), "--workers", workers]
    return [*mtrec, "--output", str(folder / "run"), *more]


def environment(folder: Path, seconds_per_step: dict[str, float]) -> dict[str, str]:
    (folder / "witness").mkdir(parents=True, exist_ok=True)
    return {"WITNESS_FOLDER": str(folder / "witness"), "WITNESS_SECONDS_PER_STEP": json.dumps(seconds_per_step)}


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in the run's log; a line that is being written is left out."""
    log = run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [event for line in lines if line.endswith("\n") and (event := json.loads(line))["event"] == kind]


def step_of(run: Path) -> int:
    return max((event["step"] for event in events(run, "step")), default=0)


def wait_for(what: Callable[[], Any], driver: "subprocess.Popen[str]", seconds: float = 150) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)
    return found


def children(process: int) -> dict[int, str]:
    """{pid: command line} of a process's descendants."""
    parents, commands = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            commands[int(path.name)] = (path / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it has ended meanwhile
    found: dict[int, str] = {}
    new = {process}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found |= {child: commands.get(child, "") for child in new}
    return found


def train_workers(driver: int) -> list[int]:
    return sorted(pid for pid, command in children(driver).items() if "RayTrainWorker" in command)


HEEDING_CTRL_C = ("env", "--default-signal=INT")
"""Before a command that is sent SIGINT: it would ignore it where the tests themselves were started in the background."""


@contextlib.contextmanager
def started(
    arguments: list[str], env: dict[str, str] | None = None, group: int | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A process that is killed in the end; `group=0`: with a process group of its own, as a terminal's command has."""
    environ = {**os.environ, **(env or {})}
    driver = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environ,
        process_group=group,
    )
    try:
        yield driver
    finally:
        driver.kill()
        driver.wait()


@contextlib.contextmanager
def cluster(nodes: int, env: dict[str, str]) -> Iterator[Any]:
    """A Ray cluster of nodes with one CPU each, whose workers inherit `env`."""
    from ray.cluster_utils import Cluster

    before = {name: os.environ.get(name) for name in env}
    os.environ.update(env)
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            found.add_node(num_cpus=1)
        yield found
    finally:
        found.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def worker_killed(folder: Path) -> str:
    """A worker process gets SIGKILL: Ray starts the workers again, and they go on."""
    with started(command(folder, "2"), environment(folder, SECONDS_PER_STEP)) as driver:
        wait_for(lambda: step_of(folder / "run") >= AT_STEP, driver)
        os.kill(train_workers(driver.pid)[-1], signal.SIGKILL)
        return ended_well(driver)


def driver_killed(folder: Path) -> str:
    """The command gets SIGKILL, and is given again with --resume."""
    env = environment(folder, SECONDS_PER_STEP)
    with started(command(folder, "2"), env) as driver:
        wait_for(lambda: step_of(folder / "run") >= AT_STEP, driver)
        os.kill(driver.pid, signal.SIGKILL)
    with started(command(folder, "2", "--resume"), env) as driver:
        return ended_well(driver)


def worker_and_driver_killed(folder: Path) -> str:
    """A worker process gets SIGKILL; once Ray's new ones are under way, the command does, and is given again with --resume."""
    env, run = environment(folder, SECONDS_PER_STEP), folder / "run"
    with started(command(folder, "2"), env) as driver:
        wait_for(lambda: step_of(run) >= AT_STEP, driver)
        os.kill(train_workers(driver.pid)[-1], signal.SIGKILL)
        wait_for(lambda: step_of(run) >= AT_STEP + 25, driver)  # so many that the command has told of the first ones
        os.kill(driver.pid, signal.SIGKILL)
        said = driver.communicate()[0]
    with started(command(folder, "2", "--resume"), env) as driver:
        return str(said) + ended_well(driver)


def node_removed(folder: Path) -> str:
    """One of two nodes goes, without notice: the training goes on with the worker of the other."""
    env = environment(folder, SECONDS_PER_STEP)
    with cluster(2, env) as nodes, started(command(folder, "1:2"), {**env, "RAY_ADDRESS": nodes.address}) as driver:
        wait_for(lambda: step_of(folder / "run") >= AT_STEP, driver)
        nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
        return ended_well(driver)


def node_added(folder: Path) -> str:
    """A second node joins: the training grows to two workers (Ray looks once a minute)."""
    env = environment(folder, {**SECONDS_PER_STEP, "1": 1.5})
    with cluster(1, env) as nodes, started(command(folder, "1:2"), {**env, "RAY_ADDRESS": nodes.address}) as driver:
        wait_for(lambda: step_of(folder / "run") >= AT_STEP, driver)
        nodes.add_node(num_cpus=1)
        return ended_well(driver)


def worker_stopped(folder: Path) -> str:
    """A worker process hangs (SIGSTOP): the other one gives up waiting for it, and Ray starts both again."""
    more = ("--set", "training.collective_timeout_seconds=10")
    with started(command(folder, "2", *more), environment(folder, SECONDS_PER_STEP)) as driver:
        wait_for(lambda: step_of(folder / "run") >= AT_STEP, driver)
        os.kill(train_workers(driver.pid)[-1], signal.SIGSTOP)
        return ended_well(driver)


def node_drained(folder: Path) -> str:
    """A node is announced to be taken away: the command ends with a checkpoint and exit code 75, and is given again later."""
    env = environment(folder, {"2": 0.2})
    with cluster(2, env) as nodes:
        env["RAY_ADDRESS"] = nodes.address
        leaving = next(iter(nodes.worker_nodes))
        drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", nodes.address]
        drain += ["--node-id", leaving.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a trial"]
        with started(command(folder, "2"), env) as driver:
            wait_for(lambda: step_of(folder / "run") >= AT_STEP, driver)
            subprocess.run([*drain, "--deadline-remaining-seconds", "100"], check=True, capture_output=True)
            said = driver.communicate(timeout=100)[0]
            assert driver.returncode == 75, said
        nodes.remove_node(leaving)
        nodes.add_node(num_cpus=1)
        with started(command(folder, "2", "--resume"), env) as driver:
            return str(said) + ended_well(driver)


def ended_well(driver: "subprocess.Popen[str]") -> str:
    said = driver.communicate(timeout=400)[0]
    assert driver.returncode == 0, said
    return str(said)


@dataclasses.dataclass(frozen=True)
class RayTrial:
    """`happens` in a folder; the numbers of workers before and after; what the user's lines about it should hold."""

    happens: Callable[[Path], str]
    world_sizes: tuple[int, ...]
    lines: tuple[str, ...]


WORKER_DIED, CONTINUES = "died: went on with 2 workers from the checkpoint of step", "continues from step"
# the first two of TRIALS in one, for the tests: each of Ray's starts takes half a minute
BOTH_KILLED = RayTrial(worker_and_driver_killed, (2, 2, 2), (WORKER_DIED, CONTINUES))
TRIALS = {
    "worker killed": RayTrial(worker_killed, (2, 2), (WORKER_DIED,)),
    "driver killed, command repeated": RayTrial(driver_killed, (2, 2), (CONTINUES,)),
    "node removed": RayTrial(node_removed, (2, 1), ("died: went on with 1 worker instead of 2 from the checkpoint of step",)),
    "node added": RayTrial(node_added, (1, 2), ("grew from 1 to 2 workers: went on from the checkpoint of step",)),
    "node drained, command repeated": RayTrial(node_drained, (2, 2), ("asked to stop: the checkpoint is written.",)),
    "worker stopped (SIGSTOP)": RayTrial(
        worker_stopped,
        (2, 2),
        ("waited in vain: another worker did not answer within 10 s (training.collective_timeout_seconds)",),
    ),
}


def rank_that_lives(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    run, losses, metrics = Run(Path(folder)), {}, None
    watch(run.folder, "whole", {})
    for event in mtrec.train.train(run, device=torch.device("cpu")):
        if isinstance(event, mtrec.events.Step):
            losses[event.step] = event.losses
        elif isinstance(event, mtrec.events.Validation):
            metrics = event.metrics
    return {"losses": losses, "metrics": metrics}


@cache
def whole(folder: Path, world_size: int) -> tuple[dict[str, Any], dict[int, list[int]], dict[str, torch.Tensor]]:
    """The run that nothing happened to, on ranks of this machine: (losses and metrics, batches, final state)."""
    path = folder / "base"
    base = Run(path) if path.exists() else prepare(parse_experiment(yaml.safe_load(experiment(folder).read_text())), path)
    run = copy_of(base, folder / f"whole-{world_size}")
    found = run_ranks(world_size, rank_that_lives, str(run.folder), folder=run.folder)[0]
    return found, batches(run.folder, "whole", STEPS_PER_EPOCH), read(find(run.checkpoints)[0].folder)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One group of workers: its batches, and the state from which it started."""

    began: float
    world_size: int
    batches: dict[int, list[int]]
    restored: Path

    @property
    def after_step(self) -> int:
        return min(self.batches) - 1


def attempts(folder: Path) -> list[Attempt]:
    found = []
    for path in folder.glob("restored-*"):
        name = path.name.removeprefix("restored-")
        ranks = list(folder.glob(f"rows-{name}-*.jsonl"))
        began = min(json.loads(rank.read_text().splitlines()[0])["time"] for rank in ranks)
        found.append(Attempt(began, len(ranks), batches(folder, name, STEPS_PER_EPOCH), path))
    return sorted(found, key=lambda attempt: attempt.began)


def conduct(trial: RayTrial, folder: Path) -> RayOutcome:
    """Runs a trial in a new folder beside the experiment's, and compares."""
    folder.mkdir()
    said = trial.happens(folder)
    expected, expected_batches, expected_state = whole(folder.parent, trial.world_sizes[0])
    run = Run(folder / "run")
    tried = attempts(folder / "witness")
    sizes = tuple(each.world_size for each in tried)
    assert len(sizes) == len(trial.world_sizes), f"{len(sizes)} groups of workers, not {len(trial.world_sizes)}: {said}"
    same = len(set(trial.world_sizes)) == 1
    at = tuple(each.after_step for each in tried[1:])
    logged = events(run.folder, "step")
    died_at = tuple(
        max(event["step"] for event in logged if before.began <= event["time"] < after.began)
        for before, after in itertools.pairwise(tried)
    )

    read_lines = [[each for each in said.splitlines() if line in each] for line in trial.lines]
    failures = [
        f"the user should read '{line}' once, and read it {len(found)} times"
        for line, found in zip(trial.lines, read_lines, strict=True)
        if len(found) != 1
    ]
    if sizes != trial.world_sizes:
        failures.append(" workers and then ".join(map(str, sizes)))
    failures += [f"went on from step {i} after step {j}" for i, j in zip(at, died_at, strict=True) if not 0 < i <= j]
    lived: dict[int, list[int]] = {}
    for attempt in tried:
        lived = {**{step: rows for step, rows in lived.items() if step <= attempt.after_step}, **attempt.batches}
    for attempt in tried[1:]:
        restored = newest(attempt.restored)
        saved = read(folder_of(run.checkpoints, attempt.after_step))
        failures += wrongly_restored(saved, read(restored.folder) if restored else {})
    failures += wrong_rows(lived, expected_batches)

    losses = {event["step"]: event["losses"] for event in logged}  # the later attempt counts
    if sorted(losses) != sorted(expected["losses"]):
        failures.append(f"logged the steps {min(losses)} to {max(losses)}, {len(losses)} of them")
    by_attempt = [
        {event["step"]: event["losses"] for event in logged if first.began <= event["time"] < then}
        for first, then in zip(tried, [*(each.began for each in tried[1:]), float("inf")], strict=True)
    ]
    whole_losses = expected["losses"]
    before = max(abs(value - whole_losses[step][task]) for step, each in by_attempt[0].items() for task, value in each.items())
    loss_difference = max(
        abs(value - whole_losses[step][task]) / max(1e-12, abs(whole_losses[step][task]))
        for i, attempt in zip(at, by_attempt[1:], strict=True)
        for step, each in attempt.items()
        if step <= i + COMPARED_STEPS
        for task, value in each.items()
    )
    if before > 0 or loss_difference > (0.0 if same else 1e-5):
        failures.append(f"losses differ by {before:.1e} before and by {loss_difference:.1e} of their value after it")
    metric_difference = max(metric_differences(expected["metrics"], json.loads((run.folder / "metrics.json").read_text())))
    if metric_difference > 1e-3:
        failures.append(f"final metrics differ by {metric_difference:.1e}")
    state = read(find(run.checkpoints)[0].folder)
    bit_equal = state.keys() == expected_state.keys() and all(torch.equal(state[key], expected_state[key]) for key in state)
    if same and not bit_equal:
        failures.append("the same number of workers should end bit for bit like the run that lived")
    told = "; ".join(" ".join(found[0].split()) for found in read_lines if found) or "nothing"
    return RayOutcome(told, died_at, at, sizes, loss_difference, metric_difference, bit_equal, tuple(failures))
