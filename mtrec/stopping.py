"""Being asked to stop: SIGTERM, which a scheduler, a cluster or a pod's end sends before it takes the machine away."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, run the command again (with --resume)


def listen(action: Callable[[], None]) -> Any:
    """Runs `action` on the first SIGTERM; the second ends the process as usual. Returns the handler that was there before.

    Only in the main thread of a process (Python's rule).
    """
    heard = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if heard.is_set():
            sys.exit(128 + number)
        heard.set()
        action()

    return signal.signal(signal.SIGTERM, handle)


@contextmanager
def listening(action: Callable[[], None]) -> Iterator[None]:
    """`listen` within a block; nothing where this is not the main thread, which alone may do so.

    >>> import os
    >>> asked = threading.Event()
    >>> with listening(asked.set):
    ...     os.kill(os.getpid(), signal.SIGTERM)
    >>> asked.is_set()
    True
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = listen(action)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
