"""Ray starts beside the command: whoever needs it waits for it, and it ends with the command, however that ends."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BEFORE = "from mtrec.jobs.connection import connect, connect_beside, leave\n"


def run(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", BEFORE + code], capture_output=True, text=True, timeout=timeout)


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


def test_only_a_cluster_that_is_named_is_taken() -> None:
    told = "import os, ray\nray.init = lambda **options: print(options['address'])\nray.is_initialized = lambda: False\n"
    for address, taken in ((None, "local"), ("", "local"), ("local", "local"), ("auto", "None")):
        setting = "os.environ.pop('RAY_ADDRESS', None)" if address is None else f"os.environ['RAY_ADDRESS'] = {address!r}"
        said = run(f"{told}{setting}\nconnect()")
        assert (said.returncode, said.stdout) == (0, f"{taken}\n"), said.stderr


def test_a_cluster_that_does_not_answer_is_told_at_once() -> None:
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        setting = f"import os\nos.environ['RAY_ADDRESS'] = '{address}'\n"
        said = run(f"{setting}try: connect()\nexcept ValueError as error: print(error)")
    assert said.stdout.startswith(f"RAY_ADDRESS is {address}, where nobody answers ("), said.stderr


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
        "import ray, time\nray.init = lambda **options: time.sleep(100)\nconnect_beside(); print('error', flush=False); leave(3)",
        timeout=50,
    )
    assert (said.returncode, said.stdout) == (3, "error\n")


def test_a_half_started_ray_ends_with_the_command() -> None:
    said = run(
        "import glob, time\n"
        "connect_beside()\n"
        "children = lambda: [pid for path in glob.glob('/proc/self/task/*/children') for pid in open(path).read().split()]\n"
        "while not children(): time.sleep(0.01)\n"
        "time.sleep(0.5); print(*children()); leave(3)"
    )
    assert said.returncode == 3
    processes = [int(pid) for pid in said.stdout.split()]
    assert processes
    until = time.monotonic() + 10
    while any(alive(pid) for pid in processes):
        assert time.monotonic() < until
        time.sleep(0.1)
