"""Being asked to stop: by Ctrl-C; by SIGTERM, which a scheduler, a cluster or a pod's end sends before it takes the machine."""

import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: not done, run the command again (with --resume)
CTRL_C = "Ctrl-C: the training ends with a checkpoint, after the step or validation under way; once more ends it without waiting"
TWICE_SECONDS = 0.5  # a second Ctrl-C that comes sooner is the first one, which a terminal and a wrapper both have sent


def listen(action: Callable[[], None]) -> Any:
    """Runs `action` on the first SIGTERM; the second ends the process as usual. Returns the handler that was there before.

    Only in the main thread of a process (Python's rule).
    """
    heard = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard
        if heard:
            sys.exit(128 + number)
        heard = True
        action()

    return signal.signal(signal.SIGTERM, handle)


@contextmanager
def listening(
    action: Callable[[], None],
    say: Callable[[str], None] = lambda line: None,
    has_begun: Callable[[], bool] = lambda: True,
) -> Iterator[None]:
    """`listen` within a block, and the same for Ctrl-C; nothing where this is not the main thread, which alone may do so.

    Args:
        action: asks for the stop.
        say: is told of Ctrl-C, in a thread of its own: what was interrupted may be writing to the terminal itself.
        has_begun: whether there is something to stop; Ctrl-C before that is KeyboardInterrupt, as a second one is.

    Ctrl-C stays without effect where it was, as in what a script has put into the background.

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
    heard_at: float | None = None
    lines = queue.SimpleQueue[str | None]()  # put() may be called in a signal's handler

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal heard_at
        if heard_at is not None and time.monotonic() - heard_at < TWICE_SECONDS:
            return
        if heard_at is not None or not has_begun():
            raise KeyboardInterrupt
        heard_at = time.monotonic()
        lines.put(CTRL_C)
        action()

    before = {signal.SIGTERM: listen(action)}
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, handle)
    speaker = threading.Thread(target=_say_all, args=(lines, say), daemon=True)
    speaker.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        lines.put(None)
        speaker.join()


def _say_all(lines: "queue.SimpleQueue[str | None]", say: Callable[[str], None]) -> None:
    while (line := lines.get()) is not None:
        say(line)
