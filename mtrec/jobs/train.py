"""Training on Ray Train: workers that iterate `train()`, restarts, and the result, on a laptop's embedded Ray or a cluster."""

import logging
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mtrec import parallel
from mtrec.checkpoint import newest
from mtrec.run import open_run
from mtrec.stopping import listening


def cluster_gpus() -> int:
    """GPUs of the cluster this process is connected to (starts an embedded Ray if there is none)."""
    connect()
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def connect() -> None:
    """Connects to the cluster of RAY_ADDRESS, or starts an embedded one."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    if ray.is_initialized():
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False, configure_logging=True)


def train_on_ray(
    run_folder: Path,
    workers: int | tuple[int, int],
    use_gpu: bool,
    max_failures: int,
    watch: Callable[[], None],
) -> None:
    """Trains a prepared run on Ray workers; returns when it has ended.

    Args:
        run_folder: on storage that every worker sees.
        workers: how many, or (least, most): goes on with what the cluster has.
        max_failures: how often dead workers are restarted, from the newest valid checkpoint.
        watch: called about ten times a second meanwhile (shows progress).

    SIGTERM to this process, to a worker, or a node that is about to be taken away: all workers end with a checkpoint, and
    the log's last event says `stopped`. Raises ValueError for a user's mistake that only showed in a worker, RuntimeError with
    the first cause, not Ray's stack, where workers failed more than `max_failures` times.
    """
    connect()
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from mtrec.jobs import recovery

    for name in ("ray.train", "ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    gpus = int(ray.cluster_resources().get("GPU", 0))
    least = workers if isinstance(workers, int) else workers[0]
    if least > (gpus if use_gpu else cpus):
        raise ValueError(
            f"--workers {least} needs {least} {'GPUs' if use_gpu else 'CPUs'}. The Ray cluster has {cpus} CPUs and {gpus} GPUs."
        )
    experiment = open_run(run_folder).experiment
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": str(run_folder)},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"GPU": 1} if use_gpu else {"CPU": 1},
        ),
        torch_config=recovery.ListeningTorchConfig(
            backend="nccl" if use_gpu else "gloo", timeout_s=experiment.training.collective_timeout_seconds
        ),
        run_config=RunConfig(
            name=run_folder.name,
            storage_path=str(run_folder / "ray"),
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[recovery.FailureNotes(run_folder)],
        ),
    )
    recovery.clear(run_folder)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(watch, ended), daemon=True)
    watcher.start()
    try:
        with warnings.catch_warnings(), listening((run_folder / recovery.STOP).touch):
            warnings.simplefilter("ignore")
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        noted = recovery.mistake(run_folder)
        raise (_first_cause(error) if noted is None else ValueError(noted)) from None
    finally:
        ended.set()
        watcher.join()
        watch()
    found = recovery.mistake(run_folder)
    if found is not None:
        raise ValueError(found)


def _watch(watch: Callable[[], None], ended: threading.Event) -> None:
    while not ended.wait(0.1):
        watch()


def _first_cause(error: BaseException) -> Exception:
    """The error of the worker that failed first, as one sentence; a user's mistake stays a ValueError."""
    from mtrec.jobs.recovery import root

    failures: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    for rank, failure in sorted(failures.items()):
        cause = root(failure)
        text = str(cause).strip()
        if isinstance(cause, ValueError):
            return ValueError(text)
        return RuntimeError(f"Worker {rank} failed: {type(cause).__name__}: {text}")
    return RuntimeError(f"Training failed: {error}")


def _worker(config: dict[str, Any]) -> None:
    """What each Ray worker runs: `train()` to its end, events reported to Ray and written by rank 0."""
    import ray.train
    import ray.train.torch

    from mtrec.jobs import recovery
    from mtrec.jobs.gauges import Gauges
    from mtrec.train import Recorder, Validation, train

    for name in ("torchrec.distributed.planner", "torch.fx", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run = open_run(config["run"])
    if recovery.mistake(run.folder) is not None:
        return  # a restart would only meet it again
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    # the newest folder with a valid manifest, not Ray's own record, which lags; one rank looks, so that all take the same
    resume_from = parallel.broadcast_object(newest(run.checkpoints) if rank == 0 else None)
    recorder = Recorder(run.folder) if rank == 0 else None
    gauges = Gauges(run.folder.name) if rank == 0 else None
    try:
        if recorder is not None:
            again = recovery.restarted(run.folder, resume_from.step if resume_from else 0, world_size)
            if again is not None:
                recorder(again)
        stop_requested = recovery.StopRequest(run.folder, rank)
        device = ray.train.torch.get_device()
        for event in train(run, device=device, resume_from=resume_from, stop_requested=stop_requested):
            if recorder is not None and gauges is not None:
                recorder(event)
                gauges(event)
            if isinstance(event, Validation):
                ray.train.report({"step": event.step, "metric": event.metric})
    except ValueError as error:
        recovery.note_mistake(run.folder, error)
        raise
    finally:
        if recorder is not None:
            recorder.close()
