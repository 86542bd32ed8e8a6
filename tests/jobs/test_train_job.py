"""Training on a real local Ray cluster: workers that die, a driver that is asked to stop."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from logs import experiment_tree, write_log
from runs import small_run, train_on

from mtrec.checkpoint import find, read
from mtrec.run import Run

ROWS = 16_000  # 125 steps: long enough to be killed at
OVERRIDES = ("training.checkpoint_every=10", "training.validate_every=1000", "training.log_every=1")

pytestmark = pytest.mark.slow


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """The events of a kind in the run's log; a line that is being written is left out."""
    log = run / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [event for line in lines if line.endswith("\n") and (event := json.loads(line))["event"] == kind]


def step_of(run: Path) -> int:
    return max((event["step"] for event in events(run, "step")), default=0)


def wait_for(what: Callable[[], Any], seconds: float = 90) -> Any:
    until = time.monotonic() + seconds
    while not (found := what()):
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


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`mtrec train` of a small experiment on two Ray workers, into tmp_path/run."""
    write_log(tmp_path / "log-16000" / "train", rows=ROWS)
    write_log(tmp_path / "log-16000" / "validation", rows=1_000, seed=1)
    tree = experiment_tree(tmp_path / "log-16000" / "train", tmp_path / "log-16000" / "validation")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"name": "small", **tree}, sort_keys=False))
    sets = [part for each in OVERRIDES for part in ("--set", each)]
    mtrec = [sys.executable, "-m", "mtrec.cli", "train", str(tmp_path / "small.yaml"), *sets]
    return [*mtrec, "--workers", "2", "--output", str(tmp_path / "run")]


def test_a_killed_worker_is_replaced_and_nothing_changes(tmp_path: Path, command: list[str]) -> None:
    run = tmp_path / "run"
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: step_of(run) >= 25)
        os.kill(train_workers(driver.pid)[-1], signal.SIGKILL)
        said = driver.communicate(timeout=150)[0]
    finally:
        driver.kill()
    assert driver.returncode == 0, said
    (again,) = events(run, "restarted")
    assert again["step"] % 10 == 0
    assert again["step"] >= 10
    assert again["world_size"] == 2
    line = next(line for line in said.splitlines() if "went on with 2 workers from the checkpoint of step" in line)
    assert "died" in line
    assert f"{again['repeated_steps']} logged steps are repeated" in line

    whole = small_run(tmp_path, *OVERRIDES, rows=ROWS)
    train_on(2, whole)
    expected, found = read(find(whole.checkpoints)[0].folder), read(find(Run(run).checkpoints)[0].folder)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def stopped_by_sigterm(command: list[str], run: Path, choose: Callable[[int], int]) -> int:
    """Runs the command, sends SIGTERM to a process of it after 15 more steps; the step of the checkpoint it left."""
    begun = step_of(run)
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(lambda: step_of(run) >= begun + 15 or driver.poll() is not None)
        os.kill(choose(driver.pid), signal.SIGTERM)
        said = driver.communicate(timeout=60)[0]
    finally:
        driver.kill()
    assert driver.returncode == 75, said
    ended = events(run, "ended")[-1]
    assert ended["reason"] == "stopped"
    assert find(Run(run).checkpoints)[0].step == ended["step"] >= begun + 15
    return int(ended["step"])


def test_sigterm_ends_with_a_checkpoint_and_exit_code_75_and_resume_goes_on(tmp_path: Path, command: list[str]) -> None:
    run = tmp_path / "run"
    stopped_by_sigterm(command, run, lambda driver: train_workers(driver)[-1])
    step = stopped_by_sigterm([*command, "--resume"], run, lambda driver: driver)
    assert step < ROWS / 128
    here = [*command[: command.index("--workers")], "--local", "--output", str(run), "--resume"]
    last = subprocess.run(here, capture_output=True, text=True, timeout=150, check=False)
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"continues from step {step}" in last.stdout
    assert [event["step"] for event in events(run, "step")] == list(range(1, 126))
