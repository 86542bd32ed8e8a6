"""Training on a real local Ray cluster: two of the trials of ray_trials.py in one, and a driver that is asked to stop."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from logs import experiment_tree, write_log
from ray_trials import BOTH_KILLED, conduct, events, started, step_of, train_workers, wait_for

from mtrec.checkpoint import find
from mtrec.run import Run

ROWS = 16_000  # 125 steps: long enough to be killed at
OVERRIDES = ("training.checkpoint_every=10", "training.validate_every=1000", "training.log_every=1")

pytestmark = pytest.mark.slow


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


def test_what_dies_is_replaced_and_nothing_changes(tmp_path: Path) -> None:
    outcome = conduct(BOTH_KILLED, tmp_path / "trial")
    assert not outcome.failures, outcome
    assert len(outcome.resumed_steps) == 2
    assert outcome.bit_equal


def stopped_by_sigterm(command: list[str], run: Path, choose: Callable[[int], int]) -> int:
    """Runs the command, sends SIGTERM to a process of it after 15 more steps; the step of the checkpoint it left."""
    begun = step_of(run)
    with started(command) as driver:
        wait_for(lambda: step_of(run) >= begun + 15, driver)
        os.kill(choose(driver.pid), signal.SIGTERM)
        said = driver.communicate(timeout=120)[0]
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
    last = subprocess.run(here, capture_output=True, text=True, timeout=300, check=False)
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"continues from step {step}" in last.stdout
    assert [event["step"] for event in events(run, "step")] == list(range(1, 126))
