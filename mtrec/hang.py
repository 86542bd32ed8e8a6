"""A collective that does not end: recognised by what gloo, torch and NCCL say, and named so that a user knows what to change."""

from collections.abc import Iterator
from contextlib import contextmanager


class HangError(RuntimeError):
    """A collective that did not end in time: another rank hangs, is stopped, or cannot be reached."""


@contextmanager
def hangs_named(timeout_seconds: int) -> Iterator[None]:
    """Within the block a collective that times out raises HangError, which names the key that says how long one waits.

    >>> with hangs_named(5):  # doctest: +ELLIPSIS
    ...     raise RuntimeError("[gloo] Timed out waiting 5000ms for recv operation to complete")
    Traceback (most recent call last):
    ...
    mtrec.hang.HangError: another worker did not answer within 5 s (training.collective_timeout_seconds): it hangs, ...
    """
    try:
        yield
    except RuntimeError as error:
        if not timed_out(error):
            raise
        raise hang(timeout_seconds) from error


def timed_out(error: BaseException) -> bool:
    """Whether gloo, torch's store or NCCL say that they waited in vain."""
    first = next(iter(str(error).strip().splitlines()), "").lower()
    words = "timed out" in first or "timeout" in first
    return words and isinstance(error, RuntimeError) and not isinstance(error, HangError)


def hang(timeout_seconds: int) -> HangError:
    """The error of a collective that ended by its timeout."""
    return HangError(
        f"another worker did not answer within {timeout_seconds} s (training.collective_timeout_seconds): it hangs, is "
        "stopped or overloaded, or the network between them fails"
    )
