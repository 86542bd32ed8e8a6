"""Ray's torch backend, for workers that listen for SIGTERM and for a controller that starts them before it imports torch.

What Ray's controller and its workers unpickle first must not import torch (2 to 3 s each, one after the other): here Ray's own
backend is imported when the workers stand, while these import torch, torchrec and the training.
"""

import dataclasses
import threading
from typing import Any

from ray.train.backend import Backend, BackendConfig

from mtrec.stopping import listen

terminated = threading.Event()  # SIGTERM to this worker process


def _import_training() -> None:
    """All that a worker needs, beside what the controller does meanwhile."""
    import ray.train.torch  # noqa: F401

    import mtrec.train  # noqa: F401


def _listen_in_worker() -> None:
    terminated.clear()
    listen(terminated.set)


class ListeningBackend(Backend):  # type: ignore[misc]
    """Ray's torch backend; the main thread of each worker also listens for SIGTERM (training runs in another thread)."""

    share_cuda_visible_devices = True  # as Ray's own

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Has the workers import the training and, while they do, imports Ray's own backend here; then starts that."""
        worker_group.execute_async(_import_training)
        config = backend_config.rays_own()
        config.backend_cls().on_start(worker_group, config)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """As Ray's own; then each worker listens for SIGTERM, which sets `terminated` there."""
        config = backend_config.rays_own()
        config.backend_cls().on_training_start(worker_group, config)
        worker_group.execute(_listen_in_worker)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """As Ray's own: the workers leave their process group."""
        config = backend_config.rays_own()
        config.backend_cls().on_shutdown(worker_group, config)


@dataclasses.dataclass
class ListeningTorchConfig(BackendConfig):  # type: ignore[misc]
    """Ray's TorchConfig, all that it says, for workers that end with a checkpoint when they get SIGTERM.

    Args:
        backend: gloo or nccl.
        timeout_s: of an operation of the process group, in seconds.
    """

    backend: str
    timeout_s: int
    init_method: str = "env"

    @property
    def backend_cls(self) -> type[Backend]:
        """The class of which Ray makes the backend."""
        return ListeningBackend

    @property
    def train_func_context(self) -> Any:
        """Sets the worker's GPU; asked for by the driver."""
        return self.rays_own().train_func_context

    @property
    def framework(self) -> Any:
        """For Ray's record of its runs, where that is switched on."""
        return self.rays_own().framework

    def to_dict(self) -> dict[str, Any]:
        """{field: value}, for Ray's record of its runs, where that is switched on."""
        return dataclasses.asdict(self)

    def rays_own(self) -> Any:
        """Ray's configuration of the same values; imports torch."""
        from ray.train.torch import TorchConfig

        return TorchConfig(**dataclasses.asdict(self))


__all__ = ["ListeningBackend", "ListeningTorchConfig", "terminated"]
