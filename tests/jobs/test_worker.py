"""What a worker of Ray does with what Ray tells it, in this process: a drained node, a collective of Ray's that hangs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import ray.train.torch
import torch
from runs import small_run

from mtrec.checkpoint import CheckpointError, newest
from mtrec.hang import HangError
from mtrec.jobs import recovery
from mtrec.jobs.train import _worker
from mtrec.locking import LockedError, locked
from mtrec.run import Run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of 32 steps, in a process that believes to be the only worker of Ray Train."""
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1))
    monkeypatch.setattr(ray.train, "report", lambda metrics: None)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    return small_run(tmp_path, "training.validate_every=1000", "training.collective_timeout_seconds=7")


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for line in (run.folder / "log.jsonl").read_text().splitlines() if (event := json.loads(line))["event"] == kind]


def test_a_drained_node_ends_the_training_with_a_checkpoint_and_resume_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = SimpleNamespace(deadline_ms=None, preempted_node_to_ranks={"node": [0]})
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: info)
    _worker({"run": str(run.folder)})
    (ended,) = events(run, "ended")
    assert (ended["reason"], ended["step"]) == ("stopped", recovery.ASK_EVERY_STEPS)
    found = newest(run.checkpoints)
    assert found is not None
    assert found.step == recovery.ASK_EVERY_STEPS

    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: None)
    recovery.clear(run.folder)  # as the next command does
    _worker({"run": str(run.folder)})
    assert events(run, "ended")[-1]["reason"] == "finished"
    assert [event["step"] for event in events(run, "step")] == list(range(1, 33))


def test_a_collective_of_rays_that_hangs_names_the_timeout_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.exceptions import BroadcastCollectiveTimeoutError

    def hangs() -> None:
        raise BroadcastCollectiveTimeoutError(time_elapsed=7.0, missing_ranks=[1], timeout_s=7.0)

    monkeypatch.setattr(ray.train, "get_preemption_info", hangs)
    with pytest.raises(HangError, match=r"within 7 s \(training.collective_timeout_seconds\)"):
        _worker({"run": str(run.folder)})
    assert recovery.mistake(run.folder) is None  # it is to be restarted


def test_workers_of_a_killed_command_that_still_live_are_not_written_beside(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtrec.jobs.train.WRITER_WAIT_SECONDS", 0.5)
    with locked(run.folder / "writer.lock", "it"), pytest.raises(LockedError, match="is being written by process"):
        _worker({"run": str(run.folder)})
    assert not (run.folder / "log.jsonl").exists()


def test_workers_that_come_again_do_not_begin_anew_where_the_checkpoints_are_damaged(run: Run) -> None:
    _worker({"run": str(run.folder)})
    steps = len(events(run, "step"))
    for folder in run.checkpoints.glob("step-*"):
        next(folder.glob("__0_*")).unlink()
    with pytest.raises(CheckpointError, match="can be trusted: step-"):
        _worker({"run": str(run.folder)})
    assert len(events(run, "step")) == steps
    assert "can be trusted" in (recovery.mistake(run.folder) or "")  # no restart would help


def test_a_change_of_the_number_of_workers_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 14}\n')
    assert recovery.restarted(tmp_path, 0, 1) is None  # the first workers of a job
    grown = recovery.restarted(tmp_path, 10, 2)
    assert grown is not None
    assert (grown.world_size_before, grown.world_size, grown.step, grown.repeated_steps, grown.cause) == (1, 2, 10, 4, None)
    assert recovery.restarted(tmp_path, 10, 2) is None
