"""What a run loses when something goes wrong beside the training: nothing that was saved, and of the validation only itself."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from logs import experiment_tree, write_log
from ranks import run_dying_ranks
from runs import small_run, trained
from typer.testing import CliRunner

import mtrec.events
import mtrec.launch
import mtrec.train
from mtrec.checkpoint import VALIDATION, CheckpointError, Saver, check, find, folder_of, newest, newest_validation, read
from mtrec.cli import app
from mtrec.config import parse_experiment
from mtrec.display import TrainDisplay
from mtrec.events import Ended, Event, Saved, Step, Validation
from mtrec.locking import LockedError, locked
from mtrec.recorder import Recorder
from mtrec.run import Run
from mtrec.train import train

CPU = torch.device("cpu")
OVERRIDES = ("training.validate_every=10", "training.checkpoint_every=1000", "training.keep_last=10")


def same_weights(first: Run, second: Run) -> bool:
    expected, found = (read(find(run.checkpoints)[0].folder) for run in (first, second))
    return expected.keys() == found.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


def failing_at(call: int, error: Exception) -> Callable[..., Any]:
    """`evaluate`, but for the call-th time."""
    evaluate, calls = mtrec.train.evaluate, 0

    def sometimes(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return evaluate(*arguments, **options)

    return sometimes


def test_a_validation_that_fails_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, run = small_run(tmp_path, *OVERRIDES), small_run(tmp_path, *OVERRIDES)
    expected = list(train(whole, device=CPU))
    with monkeypatch.context() as patched:
        patched.setattr(mtrec.train, "evaluate", failing_at(2, RuntimeError("no memory")))
        with pytest.raises(RuntimeError, match="no memory"):
            list(train(run, device=CPU))
    found = newest(run.checkpoints)
    assert found is not None
    assert (found.step, found.metric) == (20, None)
    assert [each.step for each in find(run.checkpoints) if each.metric is not None] == [10]

    again = list(train(run, device=CPU, resume_from=found))
    assert isinstance(again[0], Validation)
    assert again[0].step == 20
    assert [event.step for event in again if isinstance(event, Step)] == list(range(21, 33))
    assert again[-1] == expected[-1]  # best step and best metric, too
    assert same_weights(whole, run)
    assert {each.step: each.metric for each in find(run.checkpoints)} == {
        each.step: each.metric for each in find(whole.checkpoints)
    }


def test_a_stop_where_a_validation_is_due_leaves_it_to_the_resumed_run(tmp_path: Path) -> None:
    whole, run = small_run(tmp_path, *OVERRIDES), small_run(tmp_path, *OVERRIDES)
    expected, steps = list(train(whole, device=CPU)), iter(range(1, 11))
    stopped = list(train(run, device=CPU, stop_requested=lambda: next(steps) == 10))
    assert isinstance(stopped[-1], Ended)
    assert (stopped[-1].reason, stopped[-1].step) == ("stopped", 10)
    again = list(train(run, device=CPU, resume_from=newest(run.checkpoints)))
    validated = [event.step for event in stopped + again if isinstance(event, Validation)]
    assert validated == [event.step for event in expected if isinstance(event, Validation)] == [10, 20, 30, 32]
    assert again[-1] == expected[-1]


def test_what_the_save_under_way_met_is_told_where_the_log_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    def refused(recorder: Recorder, event: Event) -> None:
        if isinstance(event, Saved):
            raise ValueError("The log cannot be written any more")

    run = small_run(tmp_path, *OVERRIDES)
    monkeypatch.setattr(Saver, "_commit", full)
    monkeypatch.setattr(Recorder, "__call__", refused)
    with pytest.raises(CheckpointError, match=r"step-00000010 could not be written: .*No space left"):
        mtrec.launch._train_here(run, None, TrainDisplay(run.folder))


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_run_that_is_moved_away_is_not_gone_on_with_in_half_a_folder(tmp_path: Path, background: str) -> None:
    run = small_run(tmp_path, *OVERRIDES, f"training.checkpoint_async={background}")
    events = train(run, device=CPU)
    assert next(event for event in events if isinstance(event, Validation)).step == 10
    while not any(each.metric is not None for each in find(run.checkpoints)):
        time.sleep(0.01)  # until it is written
    run.folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"step-00000020 could not be written: .*No such file"):
        list(events)
    assert not run.folder.exists()


def logged(run: Run, event: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run.folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


@pytest.mark.parametrize("step", [20, 32])
@pytest.mark.parametrize("background", ["true", "false"])
def test_a_validation_whose_line_was_lost_is_written_by_the_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, background: str
) -> None:
    record = Recorder.__call__

    def killed(recorder: Recorder, event: Event) -> None:
        if isinstance(event, Validation) and event.step == step:
            raise KeyboardInterrupt
        record(recorder, event)

    run = small_run(tmp_path, *OVERRIDES, f"training.checkpoint_async={background}")
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "__call__", killed)
        with pytest.raises(KeyboardInterrupt):
            mtrec.launch._train_here(run, None, TrainDisplay(run.folder))
    assert [each["step"] for each in logged(run, "validation")][-1] < step
    for _ in range(2):  # the second has nothing to add
        mtrec.launch._train_here(run, newest(run.checkpoints), TrainDisplay(run.folder))
        validations = {each["step"]: each["metrics"] for each in logged(run, "validation")}
        assert list(validations) == [each["step"] for each in logged(run, "validation")] == [10, 20, 30, 32]
        assert json.loads((run.folder / "metrics.json").read_text()) == validations[32]
    best = logged(run, "ended")[-1]
    metrics = {each["step"]: each["metric"] for each in logged(run, "validation")}
    assert metrics[best["best_step"]] == best["best_metric"] == max(metrics.values())


def test_the_metrics_of_a_checkpoint_are_those_of_the_run_that_goes_on_from_it(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OVERRIDES)
    mtrec.launch._train_here(run, None, TrainDisplay(run.folder))
    older = find(run.checkpoints)[1]
    assert older.step == 30
    recorder = Recorder(run.folder)
    recorder.catch_up(newest_validation(older))  # that of step 32 is damaged, say
    recorder.close()
    assert json.loads((run.folder / "metrics.json").read_text()) == logged(run, "validation")[2]["metrics"]
    assert len(logged(run, "validation")) == 4


def test_a_finished_run_of_which_only_the_copy_is_left_gives_its_metrics(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", rows=1_000)
    tree = experiment_tree(log, write_log(tmp_path / "validation", rows=300, seed=1))
    tree["training"] = {"checkpoint_storage": (tmp_path / "far").as_uri(), "validate_every": 5, "checkpoint_every": 3}
    experiment, found = parse_experiment(tree), []
    for resume in (False, True):
        path = tmp_path / f"{resume}.json"
        run = mtrec.launch.launch(experiment, output=tmp_path / "run", local=True, resume=resume, json_file=path)
        found.append((json.loads(path.read_text()), json.loads((run.folder / "metrics.json").read_text())))
        assert logged(run, "validation")[-1]["step"] == 8
        shutil.rmtree(run.folder)
    assert found[0] == found[1]


def rank_whose_validation_fails(folder: str) -> None:
    if os.environ["RANK"] == "1":
        mtrec.train.evaluate = failing_at(2, ValueError("a bad validation file"))  # type: ignore[assignment]
    trained(folder)


def test_a_validation_that_fails_on_one_rank_alone_costs_no_training(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OVERRIDES)
    assert all(run_dying_ranks(2, rank_whose_validation_fails, str(run.folder), folder=tmp_path))
    found = newest(run.checkpoints)
    assert found is not None
    assert found.step == 20


def test_a_run_killed_between_the_two_files_of_a_validation_keeps_its_checkpoint(tmp_path: Path) -> None:
    run = small_run(tmp_path, "training.max_steps=5", "data.validation=null")
    list(train(run, device=CPU))
    folder = folder_of(run.checkpoints, 5)
    (folder / VALIDATION).write_text('{"metric": 0.9')  # the manifest does not name it yet
    assert check(folder) is None
    (found,) = find(run.checkpoints)
    assert found.metric is None


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 32 steps with a checkpoint every 8."""
    run = small_run(tmp_path_factory.mktemp("whole"), "training.checkpoint_every=8", "training.keep_last=10")
    list(train(run, device=CPU))
    return run


@pytest.mark.parametrize("damage", [truncated, flipped, Path.unlink], ids=["truncated", "flipped byte", "deleted file"])
def test_with_a_damaged_checkpoint_the_one_before_is_resumed_and_ends_alike(
    whole: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    shutil.copytree(whole.folder, tmp_path / "run")
    run = Run(tmp_path / "run")
    shutil.rmtree(folder_of(run.checkpoints, 32))
    path = max(folder_of(run.checkpoints, 24).glob("*.distcp"), key=lambda file: file.stat().st_size)
    damage(path)
    with caplog.at_level(logging.WARNING, "mtrec"):
        found = newest(run.checkpoints)
    assert found is not None
    assert found.step == 16
    assert path.name in caplog.text
    again = list(train(run, device=CPU, resume_from=found))
    assert [event.step for event in again if isinstance(event, Step)] == list(range(17, 33))
    assert same_weights(whole, run)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs rights that this user does not have")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_costs_only_what_came_after_the_last_checkpoint(whole: Run, disk: Path) -> None:
    run = small_run(disk, "training.checkpoint_every=8", "training.checkpoint_async=false")

    def fill(event: Any) -> None:
        if isinstance(event, Saved) and event.step == 16:  # somebody else fills the disk up
            (disk / "else").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 8_192)))

    with pytest.raises(CheckpointError, match=r"No space left on device.*The last good one is step-00000016"):
        list(map(fill, train(run, device=CPU)))
    last = newest(run.checkpoints)
    assert last is not None
    assert last.step == 16
    (disk / "else").unlink()
    again = list(train(run, device=CPU, resume_from=last))
    assert isinstance(again[-1], Ended)
    assert [event.step for event in again if isinstance(event, Step)] == list(range(17, 33))
    assert same_weights(whole, run)


def test_workers_that_fail_too_often_end_the_command_with_one_line(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise mtrec.events.TrainingFailed("worker 1 died. The workers had been restarted 3 times")

    monkeypatch.setattr("mtrec.launch.launch", fails)
    result = CliRunner().invoke(app, command)
    assert isinstance(result.exception, mtrec.events.Failed)  # which `main` prints as one line, as test_cli.py shows
    assert str(result.exception) == "worker 1 died. The workers had been restarted 3 times"


HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom mtrec.locking import locked\n"
    "with locked(Path(sys.argv[1]), 'it'):\n    print('held', flush=True)\n    time.sleep(600)"
)


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """Arguments of `mtrec train` of a small experiment into tmp_path/run."""
    log = write_log(tmp_path / "log", rows=600)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment_tree(log)))
    return ["train", str(tmp_path / "small.yaml"), "--local", "--output", str(tmp_path / "run")]


def test_one_command_at_a_time_writes_a_run_and_a_killed_one_leaves_no_lock(tmp_path: Path, command: list[str]) -> None:
    lock = tmp_path / "run" / "train.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        result = CliRunner().invoke(app, [*command, "--resume"])
        assert isinstance(result.exception, LockedError)
        assert f"The run {tmp_path / 'run'} is being written by process {holder.pid} of host " in str(result.exception)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    result = CliRunner().invoke(app, [*command, "--resume"])
    assert result.exit_code == 0, result.output
    with locked(lock, "it", wait_seconds=0):
        pass


def test_a_lock_leaves_no_folder_behind_where_nothing_was_made(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "lock", "it"):
        assert json.loads((tmp_path / "new" / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "new").exists()


def test_resume_beside_warm_start_is_said_or_refused(tmp_path: Path, command: list[str]) -> None:
    first, second = tmp_path / "run", tmp_path / "second"
    runner = CliRunner()
    assert runner.invoke(app, command).exit_code == 0
    begin = [*command[:-1], str(second), "--resume", "--warm-start", str(first)]
    result = runner.invoke(app, begin)  # the same command makes a new run, and takes it up again
    assert result.exit_code == 0, result.output
    assert "starts from the weights of" in result.output
    again = runner.invoke(app, begin)
    assert again.exit_code == 0, again.output
    assert f"--warm-start {first} has been done: the run began from it" in again.output
    assert "starts from the weights of" not in again.output
    other = runner.invoke(app, [*command, "--resume", "--warm-start", str(second)])
    assert isinstance(other.exception, ValueError)
    assert f"--resume with --warm-start {second}: the run {first} exists and began from new weights" in str(other.exception)
