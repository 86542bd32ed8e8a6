"""Ray starts beside the command: whoever needs it waits for it, and it ends with the command, however that ends."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BEFORE = "from mtrec.jobs.connection import connect, connect_beside, leave\n"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BEFORE + code], capture_output=True, text=True, timeout=120)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie, which nobody here reaps, does not)."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_ray_that_started_beside_is_there_when_it_is_needed_and_ends_with_the_process() -> None:
    said = run(
        "connect_beside(); connect(); connect()\n"
        "import ray\n"
        "from ray._private.worker import _global_node as node\n"
        "processes = [each.process.pid for several in node.all_processes.values() for each in several]\n"
        "print(ray.get(ray.remote(lambda: 41 + 1).remote()), *processes)"
    )
    assert (said.returncode, said.stderr) == (0, "")
    found, *processes = map(int, said.stdout.split())
    assert found == 42
    assert len(processes) >= 2
    assert not any(alive(pid) for pid in processes)


def test_what_went_wrong_is_told_to_whoever_needs_it() -> None:
    said = run(
        "import ray\n"
        "def broken(**options): raise RuntimeError('no room')\n"
        "ray.init = broken; connect_beside()\n"
        "try: connect()\n"
        "except RuntimeError as error: print(error)"
    )
    assert (said.returncode, said.stdout, said.stderr) == (0, "no room\n", "")


def test_a_command_that_fails_meanwhile_does_not_wait_for_ray() -> None:
    said = run(
        "import ray, time\n"
        "ray.init = lambda **options: time.sleep(100); connect_beside()\n"
        "print('error', flush=False); leave(3)"
    )
    assert (said.returncode, said.stdout) == (3, "error\n")
