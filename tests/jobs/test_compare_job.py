"""A comparison on a real local Ray: a trial that is killed, and a driver that is killed and resumed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from logs import experiment_tree, write_log
from ray_trials import children

from mtrec.compare.plan import load_plan
from mtrec.compare.runs import final_specs, matching

LIMIT_SECONDS = 300

pytestmark = pytest.mark.slow


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    for name, rows, seed in (("train", 3_000, 0), ("validation", 500, 1), ("test", 800, 2)):
        write_log(tmp_path / name, rows=rows, seed=seed)
    tree = experiment_tree(tmp_path / "train", tmp_path / "validation")
    tree["data"]["test"] = str(tmp_path / "test")  # type: ignore[index]
    tree["evaluation"] = {"group_by": "user_id"}
    tree["training"] = {"log_every": 1, "checkpoint_every": 5, "epochs": 3}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tree))
    path = tmp_path / "comparison.yaml"
    variants = {"single_task": {"set": {"model.architecture.kind": "single_task"}}}
    path.write_text(yaml.safe_dump({"base": "base.yaml", "baseline": "mmoe", "variants": variants, "seeds": 2}))
    return path


def _start(comparison: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mtrec.cli", "compare", str(comparison), "--output", str(output), "--parallel", "1", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    environment.pop("RAY_ADDRESS", None)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def _wait(condition: object, driver: subprocess.Popen[str]) -> None:
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        assert driver.poll() is None, driver.stdout and driver.stdout.read()
        assert time.monotonic() - began < LIMIT_SECONDS
        time.sleep(0.02)


def _trial_of(driver: int) -> int | None:
    """The process of the trial that a driver's Ray runs; Ray names its workers for what they do."""
    return next((pid for pid, name in children(driver).items() if name.startswith(("ray::ImplicitFunc", "ray::_trial"))), None)


def test_a_killed_trial_is_restarted_and_a_killed_driver_resumed(comparison: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    runs = output / "runs"
    driver = _start(comparison, output)
    _wait(lambda: list(runs.glob("mmoe/seed-0/checkpoints/step-*/manifest.json")), driver)
    trial = _trial_of(driver.pid)
    assert trial is not None
    os.kill(trial, signal.SIGKILL)
    _wait(lambda: (runs / "mmoe" / "seed-0" / "done.json").is_file(), driver)  # it was restarted
    _wait(lambda: list(runs.glob("single_task/seed-0/checkpoints/step-*/manifest.json")), driver)
    driver.kill()
    driver.wait()
    done = {path: path.stat().st_mtime_ns for path in runs.glob("*/seed-*/done.json")}
    assert runs / "mmoe" / "seed-0" / "done.json" in done
    plan = load_plan(comparison)
    specs = final_specs(plan, matching(plan, output)[0])
    assert len(done) < len(specs) == 6

    resumed = _start(comparison, output, "--resume")
    said, _ = resumed.communicate(timeout=LIMIT_SECONDS)
    assert resumed.returncode == 0, said
    already = re.search(r"6 runs, (\d) of them done already", said)
    assert already is not None, said
    assert len(done) <= int(already[1]) < 6  # a trial may have ended after its driver
    assert "single_task against mmoe, click: " in said
    assert {path: path.stat().st_mtime_ns for path in done} == done  # nothing that was done is done again
    assert len(list(runs.glob("*/seed-*/done.json"))) == 6
    assert (output / "report.html").is_file()
