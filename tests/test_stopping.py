"""SIGTERM to `mtrec train --local`: a checkpoint, exit code 75, and a resumed run that ends as if nobody had asked."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from logs import experiment_tree, write_log
from runs import small_run, trained

from mtrec.checkpoint import find, read
from mtrec.run import Run

ROWS = 12_000
OVERRIDES = ("training.log_every=1", "training.validate_every=1000", "training.epochs=2")


def test_sigterm_stops_with_a_checkpoint_and_resume_ends_alike(tmp_path: Path) -> None:
    log, run = tmp_path / f"log-{ROWS}", tmp_path / "run"
    write_log(log / "train", rows=ROWS)
    write_log(log / "validation", rows=500, seed=1)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment_tree(log / "train", log / "validation"), sort_keys=False))
    sets = [part for each in OVERRIDES for part in ("--set", each)]
    command = [sys.executable, "-m", "mtrec.cli", "train", str(tmp_path / "small.yaml"), *sets, "--local", "--output", str(run)]

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 60
        while not (run / "log.jsonl").exists() or len((run / "log.jsonl").read_text().splitlines()) < 10:
            assert time.monotonic() < until, "no steps"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGTERM)
        said = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 75, said
    assert f"--output {run} --resume goes on" in said
    stopped = find(Run(run).checkpoints)[0]
    assert 10 <= stopped.step < 188

    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0, again.stderr
    assert f"continues from step {stopped.step}" in again.stdout
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, 189))
    assert [event["reason"] for event in events if event["event"] == "ended"] == ["stopped", "finished"]

    whole = small_run(tmp_path, *OVERRIDES, rows=ROWS)
    trained(str(whole.folder))
    expected, found = read(find(whole.checkpoints)[0].folder), read(find(Run(run).checkpoints)[0].folder)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
