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
from ray_trials import BOTH_KILLED, HEEDING_CTRL_C, conduct, events, started, step_of, train_workers, wait_for

from mtrec.checkpoint import find
from mtrec.run import Run
from mtrec.stopping import CTRL_C

ROWS = 38_400  # 300 steps: long enough to be stopped three times, each of which takes up to 1.5 s to be heard
OVERRIDES = ("training.checkpoint_every=10", "training.validate_every=1000", "training.log_every=1")

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`mtrec train` of a small experiment on two Ray workers, into tmp_path/run."""
    write_log(tmp_path / f"log-{ROWS}" / "train", rows=ROWS)
    write_log(tmp_path / f"log-{ROWS}" / "validation", rows=1_000, seed=1)
    tree = experiment_tree(tmp_path / f"log-{ROWS}" / "train", tmp_path / f"log-{ROWS}" / "validation")
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({"name": "small", **tree}, sort_keys=False))
    sets = [part for each in OVERRIDES for part in ("--set", each)]
    mtrec = [sys.executable, "-m", "mtrec.cli", "train", str(tmp_path / "small.yaml"), *sets]
    return [*mtrec, "--workers", "2", "--output", str(tmp_path / "run")]


def test_what_dies_is_replaced_and_nothing_changes(tmp_path: Path) -> None:
    outcome = conduct(BOTH_KILLED, tmp_path / "trial")
    assert not outcome.failures, outcome
    assert len(outcome.resumed_steps) == 2
    assert outcome.bit_equal


def stopped(command: list[str], run: Path, stop: Callable[[int], None], *, tells: bool = False) -> int:
    """Runs the command, and `stop` with its process after 15 more steps; the step of the checkpoint it left."""
    begun = step_of(run)
    with started([*HEEDING_CTRL_C, *command], group=0) as driver:
        wait_for(lambda: step_of(run) >= begun + 15, driver)
        stop(driver.pid)
        said = driver.communicate(timeout=120)[0]
    assert driver.returncode == 75, said
    assert (CTRL_C in said) == tells
    ended = events(run, "ended")[-1]
    assert ended["reason"] == "stopped"
    assert find(Run(run).checkpoints)[0].step == ended["step"] >= begun + 15
    return int(ended["step"])


def test_a_stop_ends_with_a_checkpoint_and_exit_code_75_and_resume_goes_on(tmp_path: Path, command: list[str]) -> None:
    run = tmp_path / "run"
    stopped(command, run, lambda driver: os.kill(train_workers(driver)[-1], signal.SIGTERM))
    stopped([*command, "--resume"], run, lambda driver: os.kill(driver, signal.SIGTERM))
    step = stopped([*command, "--resume"], run, lambda driver: os.killpg(driver, signal.SIGINT), tells=True)  # Ctrl-C
    assert step < ROWS // 128
    here = [*command[: command.index("--workers")], "--local", "--output", str(run), "--resume"]
    last = subprocess.run(here, capture_output=True, text=True, timeout=300, check=False)
    assert last.returncode == 0, last.stdout + last.stderr
    assert f"continues from step {step}" in last.stdout
    assert [event["step"] for event in events(run, "step")] == list(range(1, ROWS // 128 + 1))
