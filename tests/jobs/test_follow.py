"""Watching a job from outside: its log through lost connections, its end, the first cause of a failure. The client is a fake."""

import types
from collections.abc import AsyncIterator, Iterator
from itertools import chain, repeat
from typing import Any

import pytest

from mtrec.jobs import follow as module
from mtrec.jobs.follow import RECONNECTS, Log, first_cause, follow

JOB, ADDRESS = "job-1", "http://127.0.0.1:1"


class Client:
    """Of a cluster: each stream of the log gives the text so far, then breaks off or, the last one, ends with the job."""

    def __init__(self, streams: Iterator[str | None], *, breaks: int) -> None:
        self._streams, self._breaks, self.status = streams, breaks, "RUNNING"
        self.failures = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        assert job == JOB
        text = next(self._streams)
        if text is not None:
            yield text
        self.failures += 1
        if self.failures <= self._breaks:
            raise ConnectionError("lost")
        self.status = "SUCCEEDED"

    def get_job_info(self, job: str) -> Any:
        assert job == JOB
        return types.SimpleNamespace(status=self.status, driver_exit_code=0, message=None)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long was waited before each new try; no time passes."""
    found: list[float] = []

    async def sleep(seconds: float) -> None:
        found.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    return found


def test_a_job_that_runs_for_days_may_lose_the_connection_often(waits: list[float]) -> None:
    said: list[str] = []
    texts = ["".join(f"step {k}\n" for k in range(n)) for n in range(1, 4 * RECONNECTS)]
    client = Client(chain.from_iterable((text, None) for text in texts), breaks=2 * len(texts) - 1)
    assert follow(client, JOB, ADDRESS, said.append, None) == 0
    assert said == [f"step {k}" for k in range(len(texts))]
    assert set(waits) == {module.RECONNECT_SECONDS}


def test_a_job_that_a_signal_ended_has_a_shell_s_exit_code(waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client(iter(["step 0\n"]), breaks=0)
    answers = iter([OSError("503"), types.SimpleNamespace(status="FAILED", driver_exit_code=-9, message=None)])

    def get_job_info(job: str) -> Any:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(client, "get_job_info", get_job_info)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    said: list[str] = []
    assert module._ended(client, JOB, ADDRESS, "", said.append) == 137
    assert "failed (exit code 137)" in said[0]


@pytest.mark.parametrize("again", [None, "step 0\n"], ids=["nothing comes", "the same comes"])
def test_a_cluster_that_does_not_come_back_is_given_up(again: str | None, waits: list[float]) -> None:
    said: list[str] = []
    client = Client(chain(["step 0\n"], repeat(again)), breaks=10**6)
    with pytest.raises(ValueError, match=r"was lost: lost\. The job runs on; see mtrec jobs status job-1"):
        follow(client, JOB, ADDRESS, said.append, None)
    assert len(waits) == RECONNECTS
    assert said == ["step 0"]


def test_a_quiet_job_whose_stream_the_cluster_ends_now_and_then_is_watched_on(waits: list[float]) -> None:
    streams = [*["lost", "ended"] * RECONNECTS, "lost", "ended"]  # no new line in any of them

    class Quiet(Client):
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            yield "step 0\n"
            if streams.pop(0) == "lost":
                raise ConnectionError("lost")
            self.status = "RUNNING" if streams else "SUCCEEDED"

    said: list[str] = []
    assert follow(Quiet(repeat(None), breaks=0), JOB, ADDRESS, said.append, None) == 0
    assert said == ["step 0"]
    assert waits.count(module.RECONNECT_SECONDS) == RECONNECTS + 1


def test_a_log_that_always_breaks_off_ends_with_the_job(waits: list[float]) -> None:
    said: list[str] = []
    client = Client(repeat("step 0\nstep 1"), breaks=10**6)
    client.status = "SUCCEEDED"
    assert follow(client, JOB, ADDRESS, said.append, None) == 0
    assert said == ["step 0", "step 1"]


@pytest.mark.parametrize(
    ("log", "code", "message", "cause"),
    [
        ("x\nerror: `a.b` should be 1. Found 2.\n", 1, None, "`a.b` should be 1. Found 2."),
        ("error: only this\n", 1, None, "only this"),
        ("/usr/bin/python: No module named mtrec\n", 1, None, "mtrec is not installed on the cluster"),
        ("ModuleNotFoundError: No module named 'mtrec'\n", 1, None, "send it along with --with-code"),
        ("sh: 1: python: not found\n", 127, None, "find no `python`"),
        (
            "a\nTraceback (most recent call last):\n  x\nRuntimeError: Worker 1 failed: OSError: disk\n",
            1,
            None,
            "RuntimeError: Worker 1",
        ),
        ("step 5/24\n", -9, None, "killed from outside"),
        ("", None, "one\nruntime_env failed: no space", "runtime_env failed: no space"),
        ("", None, None, "gives no reason"),
    ],
)
def test_the_first_cause_of_a_failure(log: str, code: int | None, message: str | None, cause: str) -> None:
    assert cause in first_cause(types.SimpleNamespace(driver_exit_code=code, message=message), log)


def test_a_log_that_begins_anew_is_printed_once() -> None:
    said: list[str] = []
    log = Log(said.append)
    log.add("Running entrypoint for job x: y\none\ntw")
    log.restart()
    log.add("Running entrypoint for job x: y\none\ntwo\nthree")
    log.finish()
    assert said == ["one", "two", "three"]
