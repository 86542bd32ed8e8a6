"""SIGTERM and Ctrl-C to `mtrec train --local`: a checkpoint, exit code 75, and a resumed run that ends as if nobody had asked."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from logs import experiment_tree, write_log
from ray_trials import HEEDING_CTRL_C, started, wait_for
from runs import small_run, trained

from mtrec import stopping
from mtrec.checkpoint import find, read
from mtrec.run import Run
from mtrec.stopping import CTRL_C, listening

ROWS = 12_000
OVERRIDES = ("training.log_every=1", "training.validate_every=1000", "training.epochs=2")


def stopped(tmp_path: Path, number: signal.Signals) -> tuple[list[str], Path, str]:
    """Sends the signal to `mtrec train --local` after ten steps; the command, its run and what it printed."""
    log, run = tmp_path / f"log-{ROWS}", tmp_path / "run"
    write_log(log / "train", rows=ROWS)
    write_log(log / "validation", rows=500, seed=1)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment_tree(log / "train", log / "validation"), sort_keys=False))
    sets = [part for each in OVERRIDES for part in ("--set", each)]
    command = [sys.executable, "-m", "mtrec.cli", "train", str(tmp_path / "small.yaml"), *sets, "--local", "--output", str(run)]
    with started([*HEEDING_CTRL_C, *command]) as process:
        wait_for(lambda: (run / "log.jsonl").exists() and len((run / "log.jsonl").read_text().splitlines()) >= 10, process)
        os.kill(process.pid, number)
        said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said
    assert f"--output {run} --resume goes on" in said
    assert 10 <= find(Run(run).checkpoints)[0].step < 188
    return command, run, said


def test_ctrl_c_stops_with_a_checkpoint_and_says_so(tmp_path: Path) -> None:
    _, _, said = stopped(tmp_path, signal.SIGINT)
    assert CTRL_C in said


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_a_second_ctrl_c_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = list[bool](), queue.SimpleQueue[str]()
    with listening(lambda: asked.append(True), said.put):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the same one, sent twice
        assert asked == [True]
        assert said.get(timeout=10) == CTRL_C
        monkeypatch.setattr(stopping, "TWICE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert asked == [True]
    assert said.empty()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_before_anything_has_begun_ends_at_once() -> None:
    asked = threading.Event()
    with listening(asked.set, has_begun=lambda: False), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert not asked.is_set()


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_ctrl_c_that_was_ignored_stays_so() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asked = threading.Event()
    with listening(asked.set):
        signal.raise_signal(signal.SIGINT)
    assert not asked.is_set()


def test_sigterm_stops_with_a_checkpoint_and_resume_ends_alike(tmp_path: Path) -> None:
    command, run, _ = stopped(tmp_path, signal.SIGTERM)
    step = find(Run(run).checkpoints)[0].step
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    assert f"continues from step {step}" in again.stdout
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 189))
    assert [event["reason"] for event in events if event["event"] == "ended"] == ["stopped", "finished"]

    whole = small_run(tmp_path, *OVERRIDES, rows=ROWS)
    trained(str(whole.folder))
    expected, found = read(find(whole.checkpoints)[0].folder), read(find(Run(run).checkpoints)[0].folder)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
