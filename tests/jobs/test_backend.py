"""The backend of the training's workers is Ray's own in all but when it imports torch."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator
from ray.train.torch import TorchConfig

from mtrec.jobs import backend
from mtrec.jobs.backend import ListeningBackend, ListeningTorchConfig


class Workers:
    """Records what is executed on the workers, and what is not waited for."""

    def __init__(self) -> None:
        self.executed: list[Any] = []
        self.begun: list[Any] = []

    def execute(self, function: Callable[..., Any]) -> None:
        self.executed.append(function)

    def execute_async(self, function: Callable[..., Any]) -> None:
        self.begun.append(function)


class RaysOwn:
    """Records what Ray's own backend is asked for, and with which configuration."""

    def __init__(self, asked: list[Any]) -> None:
        self._asked = asked

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda workers, config: self._asked.append((name, config))


def test_what_rays_controller_unpickles_imports_no_torch() -> None:
    code = (
        "import sys, mtrec.jobs.recovery, mtrec.jobs.backend\n"
        "config = mtrec.jobs.backend.ListeningTorchConfig(backend='gloo', timeout_s=1)\n"
        "config.backend_cls(), config.to_dict()\n"
        "print(*{'torch', 'torchrec', 'mtrec.train'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (said.returncode, said.stdout, said.stderr) == (0, "\n", "")


def test_the_configuration_says_what_rays_own_says() -> None:
    ours, rays = ListeningTorchConfig(backend="nccl", timeout_s=7), TorchConfig(backend="nccl", timeout_s=7)
    assert ours.to_dict() == rays.to_dict()
    assert ours.train_func_context is rays.train_func_context
    assert ours.framework is rays.framework
    for flag in ("share_cuda_visible_devices", "has_replica_groups"):
        assert getattr(ours.backend_cls(), flag) == getattr(rays.backend_cls(), flag)


def test_every_stage_is_rays_own_with_its_own_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Workers()
    monkeypatch.setattr(TorchConfig, "backend_cls", property(lambda config: lambda: RaysOwn(workers.executed)))
    config, rays = ListeningTorchConfig(backend="gloo", timeout_s=7), TorchConfig(backend="gloo", timeout_s=7)
    ListeningBackend().on_start(workers, config)
    assert workers.begun == [backend._import_training]
    assert workers.executed == [("on_start", rays)]
    ListeningBackend().on_training_start(workers, config)
    assert workers.executed[1:] == [("on_training_start", rays), backend._listen_in_worker]
    ListeningBackend().on_shutdown(workers, config)
    assert workers.executed[3:] == [("on_shutdown", rays)]


def test_this_ray_has_the_coordinator_where_it_is_looked_for() -> None:
    assert callable(default_autoscaling_coordinator.get_or_create_autoscaling_coordinator)
