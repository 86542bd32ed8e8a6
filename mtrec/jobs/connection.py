"""The connection to Ray: to the cluster of RAY_ADDRESS (`auto`: the one that runs on this machine), or to one that is embedded in
this process.

An embedded Ray takes some seconds to start, in processes of its own. `connect_beside` lets it start while the command imports
torchrec and prepares the run; `connect` then waits for what is left.
"""

import logging
import os
import signal
import socket
import sys
import threading
import warnings
from concurrent.futures import Future
from typing import NoReturn

from mtrec.allocator import kept

ANSWER_SECONDS = 5.0

_beside: "Future[None] | None" = None


def cluster_address() -> str | None:
    """RAY_ADDRESS, None where Ray is to be embedded."""
    address = os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address


def check_cluster() -> None:
    """Raises ValueError where nobody answers at a RAY_ADDRESS of the form host:port: Ray would try for a quarter of an hour."""
    address = cluster_address()
    host, colon, port = (address or "").rpartition(":")
    if address is None or not colon or not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as error:
        raise ValueError(
            f"RAY_ADDRESS is {address}, where nobody answers ({error}). Start the cluster, or unset RAY_ADDRESS to work on this "
            "machine alone."
        ) from None


def connect() -> None:
    """Connects to the cluster of RAY_ADDRESS, or starts an embedded one. Once connected it does nothing."""
    if _beside is not None:
        _beside.result()
    else:
        _connect()


def connect_beside() -> None:
    """Begins to connect, in a thread that lives as long as the process.

    The kernel ends an embedded Ray when the thread that started it ends: so this one waits for the main thread, and then shuts
    Ray down itself, also where the command has failed meanwhile.
    """
    global _beside
    if _beside is None:
        set_environment()
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:  # Ray would do the same, but not from a thread
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        _beside = Future()
        threading.Thread(target=_live, args=(_beside,), name="mtrec-ray").start()


def _live(connected: "Future[None]") -> None:
    try:
        _connect()
    except BaseException as error:
        connected.set_exception(error)  # for `connect`
        return
    connected.set_result(None)
    threading.main_thread().join()
    import ray

    ray.shutdown()


def leave(code: int) -> NoReturn:
    """Ends the process; at once where Ray is still starting: its processes then end with this one, and nothing has run on it."""
    if _beside is not None and not _beside.done():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def set_environment() -> None:
    """What Ray and its workers read from the environment, and no warnings of Ray's; before anything of it is imported."""
    warnings.filterwarnings("ignore", module="ray")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # in place of 2: how late an end or a death is noticed
    os.environ.update(kept(os.environ))


def _connect() -> None:
    set_environment()
    import ray

    if not ray.is_initialized():
        check_cluster()
        # without an address Ray would take any cluster that was once started on this machine, also one that is dead
        address = None if cluster_address() else "local"
        quiet = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
        ray.init(address=address, include_dashboard=False, **quiet)
