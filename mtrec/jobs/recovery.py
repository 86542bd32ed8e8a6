"""What happens to a training on Ray from outside: workers that die, nodes that are taken away, a request to stop.

One file of each kind lies in the run's folder while a job goes on, for it is what driver, controller and workers all see:
`stop-requested` (the driver was asked to stop), `failure.json` (the last failure, written by Ray's controller), `mistake.json`
(an error that a restart would only meet again), `workers.json` (how many there are).

Ray's controller imports this module before it starts a worker: it brings in neither torch nor the training (2 and 3 s).
"""

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
from ray.exceptions import RayActorError
from ray.train import UserCallback

from mtrec import hang
from mtrec.atomic import write_atomically
from mtrec.events import Restarted
from mtrec.jobs.backend import terminated

STOP, FAILURE, MISTAKE, WORKERS = "stop-requested", "failure.json", "mistake.json", "workers.json"
LOOK_EVERY_SECONDS = 0.5  # between two looks at the stop file: on network storage each costs a round trip
ASK_EVERY_STEPS = 20  # between two questions for preemption: each is a collective of Ray's, some milliseconds
LOST_PEER = (  # the words of gloo, of torch's store and of NCCL
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Connection was likely closed",
    "remote process exited",
)


def clear(run_folder: Path) -> None:
    """Removes what an earlier job left."""
    for name in (STOP, FAILURE, MISTAKE, WORKERS):
        (run_folder / name).unlink(missing_ok=True)


class StopRequest:
    """Whether this worker has been asked to stop; called at every step on every rank, equally often."""

    def __init__(self, run_folder: Path, rank: int) -> None:
        self._file = run_folder / STOP if rank == 0 else None
        self._asked, self._calls, self._looked = False, 0, 0.0

    def __call__(self) -> bool:
        self._calls += 1
        if self._calls % ASK_EVERY_STEPS == 0 and ray.train.get_preemption_info() is not None:
            self._asked = True
        if self._file is not None and time.monotonic() - self._looked > LOOK_EVERY_SECONDS:
            self._looked = time.monotonic()
            self._asked = self._asked or self._file.exists()
        return self._asked or terminated.is_set()


class FailureNotes(UserCallback):  # type: ignore[misc]
    """Runs in Ray's controller: writes down which workers failed and how, for those that go on."""

    def __init__(self, run_folder: Path) -> None:
        self._run_folder = run_folder

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray after a failure and before the restart."""
        note = {"time": time.time(), "cause": describe(worker_exceptions)}
        write_atomically(self._run_folder / FAILURE, json.dumps(note))


@contextmanager
def hangs_named(timeout_seconds: int) -> Iterator[None]:
    """Ray's own collectives (of reports and preemption) that time out raise HangError like those of torch."""
    try:
        yield
    except Exception as error:
        if any(each.__name__ == "CollectiveTimeoutError" for each in type(error).__mro__):  # not public in Ray
            raise hang.hang(timeout_seconds) from error
        raise


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another worker is gone; not a storage that was cut off, which has the same words.

    >>> is_lost_peer(RuntimeError("Connection closed by peer")), is_lost_peer(OSError("curlCode: 56, Connection reset by peer"))
    (True, False)
    """
    of_storage = isinstance(error, OSError) and not isinstance(error, ConnectionError)
    return not of_storage and any(words in str(error) for words in LOST_PEER)


def culprit(failures: Mapping[int, BaseException]) -> tuple[int, BaseException] | None:
    """The rank that failed by itself, and how: before ranks that waited for it in vain, or lost it.

    >>> culprit({0: RuntimeError("Connection closed by peer"), 1: ValueError("no such column")})
    (1, ValueError('no such column'))
    >>> culprit({0: hang.hang(5), 2: RuntimeError("out of memory")})
    (2, RuntimeError('out of memory'))
    """
    causes = {rank: root(failure) for rank, failure in failures.items()}
    return min(causes.items(), key=lambda each: (_innocence(each[1]), each[0])) if causes else None


def _innocence(cause: BaseException) -> int:
    if isinstance(cause, RayActorError) or _is_unresponsive(cause):
        return 0
    return 3 if is_lost_peer(cause) else 2 if isinstance(cause, hang.HangError) else 1


def _is_unresponsive(cause: BaseException) -> bool:
    return type(cause).__name__ == "WorkerHealthCheckTimeoutError"  # not public in Ray


def describe(failures: Mapping[int, BaseException]) -> str:
    """What happened, in a few words: workers that died before workers that only lost their peers.

    >>> describe({0: RuntimeError("Connection closed by peer"), 1: RayActorError()})
    'worker 1 died'
    >>> describe({0: RuntimeError("Connection closed by peer"), 1: ValueError("no such column")})
    'worker 1 failed (ValueError: no such column)'
    >>> describe({0: hang.hang(5)})  # doctest: +ELLIPSIS
    'worker 0 waited in vain: another worker did not answer within 5 s (training.collective_timeout_seconds): ...'
    >>> from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
    >>> describe({0: WorkerHealthCheckFailedError("A worker health check failed.", RayActorError())})
    'worker 0 died'
    >>> describe({0: RuntimeError("Connection closed by peer")})
    'a worker died (worker 0 lost the connection to it)'
    >>> describe({0: RuntimeError("out of memory\\nmore")})
    'worker 0 failed (RuntimeError: out of memory)'
    """
    died = [rank for rank, failure in sorted(failures.items()) if isinstance(root(failure), RayActorError)]
    if died:
        return f"worker{'s' if len(died) > 1 else ''} {', '.join(map(str, died))} died"
    found = culprit(failures)
    if found is None:
        return "workers failed"
    rank, cause = found
    first = next(iter(str(cause).strip().splitlines()), "")
    if is_lost_peer(cause):  # Ray asks its workers in turn: it may not know yet which one died
        return f"a worker died (worker {rank} lost the connection to it)"
    if isinstance(cause, hang.HangError):
        return f"worker {rank} waited in vain: {first}"
    if _is_unresponsive(cause):
        return f"worker {rank} did not answer any more ({first})"
    return f"worker {rank} failed ({type(cause).__name__}: {first})"


def root(error: BaseException) -> BaseException:
    """The error at the bottom of a chain of causes; Ray keeps what a health check met beside its own error."""
    while not isinstance(error, ValueError | hang.HangError):  # these say already what there is to say
        cause = error.__cause__ or getattr(error, "health_check_failure", None)
        if cause is None:
            break
        error = cause
    return error


def restarted(run_folder: Path, step: int, world_size: int) -> Restarted | None:
    """The event of a restart from the checkpoint of `step` (0: from the start), None for the first workers of a job."""
    workers, failure, before, cause = run_folder / WORKERS, run_folder / FAILURE, world_size, None
    if workers.is_file():
        before = int(json.loads(workers.read_text())["world_size"])
    write_atomically(workers, json.dumps({"world_size": world_size}))
    if failure.is_file():
        cause = str(json.loads(failure.read_text())["cause"])
        failure.unlink()
    if cause is None and before == world_size:
        return None
    return Restarted(step, world_size, before, max(0, _last_logged_step(run_folder) - step), cause)


def _last_logged_step(run_folder: Path) -> int:
    """The newest step in the log; a line that was being written when the worker died is no line."""
    last, path = 0, run_folder / "log.jsonl"
    if path.is_file():
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith('{"event": "step"') and line.endswith("}\n"):
                    last = int(json.loads(line)["step"])
    return last


def note_mistake(run_folder: Path, error: ValueError) -> None:
    """Writes down a user's mistake, so that restarted workers return at once and the driver can say it."""
    write_atomically(run_folder / MISTAKE, json.dumps({"error": str(error)}))


def mistake(run_folder: Path) -> str | None:
    """The message of `note_mistake`, if there is one."""
    path = run_folder / MISTAKE
    return str(json.loads(path.read_text())["error"]) if path.is_file() else None


__all__ = [
    "FailureNotes",
    "StopRequest",
    "clear",
    "culprit",
    "describe",
    "hangs_named",
    "is_lost_peer",
    "mistake",
    "note_mistake",
    "restarted",
    "root",
]
