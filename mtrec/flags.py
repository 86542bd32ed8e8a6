"""What the host has to know of each step: whether it was finite, and whether to stop. Read at once, or one step late.

Reading at once waits for the device. Read late, the flags travel to page-locked memory while the device goes on, and the
host reads those of the step before. All ranks have the same flags and read them after the same step, so they decide alike.
"""

import dataclasses
from collections import deque

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Known:
    """The flags of a step.

    Attributes:
        step: its number; the first is 1.
        finite: whether all ranks' losses and gradients were finite.
        stop: whether a rank asked to stop.
        active: of each task, whether its batch had labels of it.
    """

    step: int
    finite: bool
    stop: bool
    active: tuple[bool, ...]


class Flags:
    """The flags of the steps that were done, from the device to the host.

    Args:
        late: `read` leaves the newest where they are.

    >>> flags, true = Flags(late=True), torch.tensor(True)
    >>> for step in (1, 2):
    ...     flags.put(step, true, ~true, true[None])
    ...     print([known.step for known in flags.read()])
    []
    [1]
    >>> [known.step for known in flags.read(wait=True)]
    [2]
    """

    def __init__(self, late: bool) -> None:
        self.late = late
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def put(self, step: int, finite: Tensor, stop: Tensor, active_K: Tensor) -> None:
        """Sends the flags of a step (bool, on the device) on their way."""
        flags = sent = torch.cat([torch.stack([finite, stop]), active_K])
        arrived = None
        if sent.is_cuda:
            flags = torch.empty_like(sent, device="cpu", pin_memory=True)
            flags.copy_(sent, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(torch.cuda.current_stream(sent.device))
        self._sent.append((step, flags, arrived))

    def read(self, *, wait: bool = False) -> list[Known]:
        """Those that were not read yet, the oldest first; if late, without the newest, unless `wait`."""
        found = []
        left = 1 if self.late and not wait else 0
        while len(self._sent) > left:
            step, flags, arrived = self._sent.popleft()
            if arrived is not None:
                arrived.synchronize()
            finite, stop, *active = flags.tolist()
            found.append(Known(step, finite, stop, tuple(active)))
        return found
