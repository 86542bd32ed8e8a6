"""What the Ray cluster of this process has, and what of it other jobs leave free."""

from typing import Literal, NamedTuple

from mtrec.jobs.connection import cluster_address, connect
from mtrec.kinds import counted

Kind = Literal["CPU", "GPU"]


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


def wait_note(needed: int, kind: Kind) -> str | None:
    """A line for the user where other jobs leave fewer than `needed` free, for which this one waits; None where they do not.

    An embedded Ray has no other jobs.
    """
    if cluster_address() is None:
        return None
    import ray

    there, free = whole_cluster().of(kind), _resources(ray.available_resources()).of(kind)
    if free >= needed:
        return None
    return (
        f"other jobs hold {there - free} of the Ray cluster's {counted(there, kind)}: this one waits until "
        f"{needed} {'is' if needed == 1 else 'are'} free (`ray status` tells more)"
    )


def _resources(found: dict[str, float]) -> Resources:
    return Resources(*(int(found.get(name, 0)) for name in ("CPU", "GPU", "memory")))
