"""Scoring on a real local Ray cluster: several actors write what one process writes, and dead ones are replaced."""

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from runs import small_run, train_on

import mtrec.jobs.score
import mtrec.jobs.train
from mtrec.checkpoint import CheckpointError
from mtrec.dataset import Source
from mtrec.display_scoring import ScoreDisplay
from mtrec.events import Failed
from mtrec.jobs import resources
from mtrec.jobs.score import score_on_ray, scoring_workers
from mtrec.jobs.train import train_on_ray
from mtrec.jobs.trials import slot_on_ray
from mtrec.launch import score_run
from mtrec.run import Run, open_run
from mtrec.scored_files import Asked, score_files


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = small_run(tmp_path_factory.mktemp("score-job"))
    train_on(1, run)
    return open_run(run.folder)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def asked(run: Run, out: Path, **options: Any) -> Asked:
    return Asked(str(run.folder), Source(str(run.folder.parent / "log-4000")), str(out), batch_rows=100, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


def test_two_actors_write_what_one_process_writes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = score_run(asked(run, tmp_path / "here"), "auto", local=True)
    monkeypatch.chdir(tmp_path)
    there = score_run(asked(run, Path("there")), "2", local=False)  # relative: actors have another current folder
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert len(there["files"]) == 6
    assert there["session"]["rows"] == 5_000
    for each in (here, there):
        del each["session"]
    assert here == there


def test_a_dead_actor_is_replaced(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(mtrec.jobs.score._Actor):
        def score(self, index: int, piece: Any) -> Iterator[Any]:
            if index == 3:
                marker = tmp_path / "died"
                if not marker.exists():
                    marker.touch()
                    os._exit(1)
            yield from super().score(index, piece)

    monkeypatch.setattr(mtrec.jobs.score, "_Actor", Dying)
    manifest = score_files(asked(run, tmp_path / "out"), score_on_ray(2), workers=2)
    assert (tmp_path / "died").exists()
    assert manifest["complete"]
    assert manifest["rows"] == 5_000
    assert pq.read_table(tmp_path / "out").num_rows == 5_000


def test_actors_that_always_die_end_the_job(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(mtrec.jobs.score._Actor):
        def open(self) -> Any:
            os._exit(1)

    monkeypatch.setattr(mtrec.jobs.score, "_Actor", Dying)
    monkeypatch.setattr(mtrec.jobs.score, "MAX_DEATHS", 1)
    with pytest.raises(Failed, match=r"2 scoring processes died at loading the model, .* take fewer --workers"):
        score_files(asked(run, tmp_path / "out"), score_on_ray(2), workers=2)


def test_deaths_are_counted_for_each_piece(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(mtrec.jobs.score._Actor):
        def score(self, index: int, piece: Any) -> Iterator[Any]:
            marker = tmp_path / f"died-{index}"
            if index < 3 and not marker.exists():
                marker.touch()
                os._exit(1)
            if index == 5 and (tmp_path / "at-5").exists():
                os._exit(1)
            yield from super().score(index, piece)

    monkeypatch.setattr(mtrec.jobs.score, "_Actor", Dying)
    monkeypatch.setattr(mtrec.jobs.score, "MAX_DEATHS", 1)
    # three deaths, each at another piece
    assert score_files(asked(run, tmp_path / "out"), score_on_ray(2), workers=2)["complete"]
    (tmp_path / "at-5").touch()
    with pytest.raises(Failed, match=r"2 scoring processes died at '.*\.parquet', most likely for want of memory"):
        score_files(asked(run, tmp_path / "again"), score_on_ray(2), workers=2)
    assert ray.exceptions.OutOfMemoryError in mtrec.jobs.score._gone()  # what Ray's memory monitor kills


def test_what_an_actor_refuses_is_the_error_itself(run: Run, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(run.folder, changed)
    sample = pq.read_table(changed / "sample.parquet")
    backwards = sample.column(0).take(list(range(sample.num_rows))[::-1])
    pq.write_table(sample.set_column(0, sample.column_names[0], backwards), changed / "sample.parquet")
    with pytest.raises(CheckpointError, match="of a golden row differs"):
        score_files(dataclasses.replace(asked(run, tmp_path / "out"), run=str(changed)), score_on_ray(1))


def test_more_workers_than_the_cluster_has(run: Run) -> None:
    assert scoring_workers(None) == 2
    with pytest.raises(ValueError, match=r"--workers 3 needs 3 CPUs\. The Ray cluster has 2"):
        scoring_workers(3)


class Holder:
    """Another job's actor."""

    def begun(self) -> bool:
        return True


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An actor of another job that holds both CPUs of a cluster that this process has not started."""
    monkeypatch.setattr(resources, "LAG_SECONDS", 0.3)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    actor = ray.remote(Holder).options(num_cpus=2).remote()
    assert ray.get(actor.begun.remote())
    wait_for(lambda: ray.available_resources().get("CPU", 0) == 0)
    yield actor
    ray.kill(actor)
    wait_for(lambda: ray.available_resources().get("CPU", 0) == 2)


def line(needed: str) -> str:
    return f"0 of the Ray cluster's 2 CPUs are free: waiting until {needed} (`ray status` tells more)"


def test_scoring_says_what_it_waits_for(run: Run, tmp_path: Path, holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def say(display: ScoreDisplay, text: str) -> None:
        said.append(text)
        ray.kill(holder)

    monkeypatch.setattr(ScoreDisplay, "say", say)
    at_last = threading.Timer(60, ray.kill, [holder])  # where nothing is said: it would wait for ever
    at_last.start()
    assert score_run(asked(run, tmp_path / "out"), "2", local=False)["complete"]
    at_last.cancel()
    assert said == [line("1 is")]


def test_training_and_trials_say_what_they_wait_for(run: Run, holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    slot_on_ray(1, None, said.append)
    slot_on_ray(2, None, said.append)
    ended = SimpleNamespace(fit=lambda: None)
    monkeypatch.setattr(mtrec.jobs.train, "_trainer", lambda *arguments: ended)
    train_on_ray(run.folder, (2, 2), use_gpu=False, max_failures=0, say=said.append)
    assert said == [line("1 is"), line("2 are"), line("2 are")]


def test_who_has_the_cluster_alone_waits_for_nothing(holder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    said: list[str] = []
    resources.tell_wait({"CPU": 1}, said.append)
    assert not said


def test_what_becomes_free_a_moment_later_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    answers = iter([{"CPU": 1.5, "GPU": 1.0}, {"CPU": 2.0}, {"CPU": 2.0, "GPU": 1.0}])
    monkeypatch.setattr(ray, "available_resources", lambda: next(answers))
    said: list[str] = []
    resources.tell_wait({"CPU": 2}, said.append)
    resources.tell_wait({"GPU": 1}, said.append)
    assert not said
    assert next(answers, None) is None


def test_a_trial_on_a_gpu_waits_for_a_cpu_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "LAG_SECONDS", 0.0)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 2.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.5, "GPU": 1.0})
    said: list[str] = []
    slot_on_ray(1, None, said.append)
    slot_on_ray(2, None, said.append)
    assert [text.partition(" (")[0] for text in said] == [
        "0 of the Ray cluster's 4 CPUs are free: waiting until 1 is",
        "1 of the Ray cluster's 2 GPUs is free: waiting until 2 are",
    ]


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)
