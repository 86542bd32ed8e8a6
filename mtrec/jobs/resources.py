"""What the Ray cluster of this process has, and what of it is free."""

import time
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

from mtrec.jobs.connection import cluster_address, connect
from mtrec.kinds import counted

Kind = Literal["CPU", "GPU"]
LAG_SECONDS = 2.0


class Resources(NamedTuple):
    """Of all living nodes, or of what is free of them; memory in bytes."""

    cpus: int
    gpus: int
    memory: int

    @property
    def kind(self) -> Kind:
        """What a worker gets one of: a GPU where the cluster has any."""
        return "GPU" if self.gpus else "CPU"

    def of(self, kind: Kind) -> int:
        """How many of them.

        >>> Resources(16, 2, 0).of("GPU")
        2
        """
        return self.gpus if kind == "GPU" else self.cpus


def whole_cluster() -> Resources:
    """What the cluster has, free or not; connects to it, or starts an embedded one."""
    connect()
    import ray

    return _resources(ray.cluster_resources())


def tell_wait(needed: Mapping[Kind, int], say: Callable[[str], None]) -> None:
    """Says a line for what fewer of are free than `needed`, so that the user knows what this command waits for.

    Ray knows a moment late what has become free, so it is asked again for `LAG_SECONDS` first. An embedded Ray is this
    command's alone: nothing is waited for.
    """
    if cluster_address() is None:
        return
    import ray

    until = time.monotonic() + LAG_SECONDS
    while short := {kind: n for kind, n in needed.items() if _resources(ray.available_resources()).of(kind) < n}:
        if time.monotonic() > until:
            break
        time.sleep(0.1)
    for kind, n in short.items():
        there, free = whole_cluster().of(kind), _resources(ray.available_resources()).of(kind)
        say(
            f"{free} of the Ray cluster's {counted(there, kind)} {'is' if free == 1 else 'are'} free: waiting until "
            f"{n} {'is' if n == 1 else 'are'} (`ray status` tells more)"
        )


def _resources(found: dict[str, float]) -> Resources:
    return Resources(*(int(found.get(name, 0)) for name in ("CPU", "GPU", "memory")))
