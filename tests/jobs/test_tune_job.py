"""A search on a real local Ray: its driver is killed and the search resumed, with a trial that fails among the others."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from logs import experiment_tree, write_log

from mtrec.config import load_experiment

LIMIT_SECONDS = 300

pytestmark = pytest.mark.slow


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    write_log(tmp_path / "train", rows=2_000)
    write_log(tmp_path / "validation", rows=500, seed=1)
    tree = experiment_tree(tmp_path / "train", tmp_path / "validation")
    tree["training"] = {"log_every": 1, "epochs": 2, "max_nonfinite_steps": 2}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    space = {
        # the last one drives a table beyond what float32 holds
        "parameters": {"optimizer.dense.learning_rate": [1e-3, 1e-2], "optimizer.tables.learning_rate": [0.1, 1e38]},
        "objectives": ["click/auc"],
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    return tmp_path / "base.yaml", tmp_path / "space.yaml"


def _start(files: tuple[Path, Path], output: Path, trials: int, *more: str) -> subprocess.Popen[str]:
    experiment, space = map(str, files)
    command = [sys.executable, "-m", "mtrec.cli", "tune", experiment, "--space", space, "--trials", str(trials)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    arguments = [*command, "--output", str(output), "--parallel", "1", *more]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_a_search_is_killed_resumed_and_made_longer(files: tuple[Path, Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    driver = _start(files, output, 4)
    began = time.monotonic()
    while len(list(output.glob("trials/*/result.json"))) < 2:
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        assert time.monotonic() - began < LIMIT_SECONDS
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = {path: path.read_text() for path in output.glob("trials/*/result.json")}
    values = {path: path.read_text() for path in output.glob("trials/*/trial.json")}
    assert 2 <= len(done) < 5
    resumed = _start(files, output, 6, "--resume")
    said, _ = resumed.communicate(timeout=LIMIT_SECONDS)
    assert resumed.returncode == 0, said
    assert {path: path.read_text() for path in done} == done  # nothing that was done is done again
    assert {path: path.read_text() for path in values} == values  # what was drawn is not drawn again
    trials = [json.loads(path.read_text()) for path in sorted(output.glob("trials/*/result.json"))]
    assert [each["number"] for each in trials] == list(range(7))
    for trial in trials:
        assert (trial["state"] == "failed") == (trial["values"].get("optimizer.tables.learning_rate") == 1e38), trial
    finished = [each for each in trials if each["state"] == "finished"]
    best = max(finished, key=lambda each: each["objectives"]["click/auc"])
    results = json.loads((output / "results.json").read_text())
    assert results["best"] == best["number"]
    assert f"The best is trial {best['number']}" in said or best["number"] == 0
    rate = load_experiment(output / "best.yaml").optimizer.dense.learning_rate
    assert rate == best["values"].get("optimizer.dense.learning_rate", "auto")
    assert "parcoords" in (output / "tune.html").read_text()
