"""Runs a function on gloo ranks, each a process, and returns what each of them returned.

The ranks are forked from a server that has imported torch and mtrec once: a rank starts in milliseconds, not in seconds.
"""

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _rank(rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...], out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    torch.save(function(*arguments), Path(out) / f"{rank}.pt")


def _start(world_size: int, function: Callable[..., Any], arguments: tuple[Any, ...], out: Path) -> mp.ProcessContext:
    out.mkdir(parents=True)
    multiprocessing.set_forkserver_preload(["torch", "torchrec", "mtrec.train", "runs"])
    context = mp.start_processes(
        _rank,
        (world_size, _free_port(), function, arguments, str(out)),
        nprocs=world_size,
        join=False,
        start_method="forkserver",
    )
    assert context is not None
    return context


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """What `function(*arguments)` returned on each of `world_size` processes that can form a process group."""
    out = folder / f"ranks-{_free_port()}"
    context = _start(world_size, function, arguments, out)
    while not context.join():
        pass
    return [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def run_dying_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, folder: Path) -> list[int | None]:
    """The exit codes of ranks of which at least one is expected to fail; -9 is SIGKILL. The others are ended, too."""
    context = _start(world_size, function, arguments, folder / f"ranks-{_free_port()}")
    with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
        while not context.join():
            pass
    return [process.exitcode for process in context.processes]
