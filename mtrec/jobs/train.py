"""Training on Ray Train: workers that iterate `train()`, restarts, and the result, on a laptop's embedded Ray or a cluster."""

import logging
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from mtrec import hang, parallel
from mtrec.checkpoint import newest_validation, to_resume
from mtrec.events import TrainingFailed
from mtrec.jobs.connection import set_environment
from mtrec.jobs.resources import Kind, tell_wait, whole_cluster
from mtrec.locking import LockedError, locked
from mtrec.run import Run, open_run
from mtrec.stopping import listening

WRITER = "writer.lock"  # held by rank 0: workers of a command that was killed live a moment longer than it
WRITER_WAIT_SECONDS = 60.0
LEAST_HEALTH_CHECK_SECONDS = 60  # a worker that computes may leave Ray's question for its health unanswered for a while


def cluster_gpus() -> int:
    """GPUs of the cluster this process is connected to (starts an embedded Ray if there is none)."""
    set_environment()
    import ray.train.torch  # noqa: F401  (takes a second or more, while Ray may still be starting)

    return whole_cluster().gpus


def train_on_ray(
    run_folder: Path,
    workers: int | tuple[int, int],
    use_gpu: bool,
    max_failures: int,
    watch: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Trains a prepared run on Ray workers; returns when it has ended.

    Args:
        run_folder: on storage that every worker sees.
        workers: how many, or (least, most): goes on with what the cluster has.
        max_failures: how often dead workers are restarted, from the newest valid checkpoint.
        watch: called about ten times a second meanwhile (shows progress).
        say: gets a line where the workers have to wait until something is free, and at Ctrl-C.

    Ctrl-C once the workers train, SIGTERM to this process or to a worker, or a node that is about to be taken away: all workers
    end with a checkpoint, and the log's last event says `stopped`. Raises ValueError for a user's mistake that only showed in a
    worker, TrainingFailed with the first cause, not Ray's stack, where workers failed more than `max_failures` times. Workers
    that die with a node which Ray knows to have been taken away do not count, unless `max_failures` is 0.
    """
    there = whole_cluster()
    import ray

    from mtrec.jobs import recovery

    for name in ("ray.train", "ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)
    least = workers if isinstance(workers, int) else workers[0]
    kind: Kind = "GPU" if use_gpu else "CPU"
    if least > there.of(kind):
        raise ValueError(
            f"--workers {least} needs {least} {kind}s. The Ray cluster has {there.cpus} CPUs and {there.gpus} GPUs."
        )
    tell_wait({kind: least}, say)
    _start_coordinator()
    trainer = _trainer(run_folder, workers, use_gpu, max_failures)
    recovery.clear(run_folder)
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(watch, ended), daemon=True)
    watcher.start()
    stop, begun = (run_folder / recovery.STOP).touch, (run_folder / recovery.WORKERS).exists
    try:
        with warnings.catch_warnings(), listening(stop, say, begun):
            warnings.simplefilter("ignore")
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        noted = recovery.mistake(run_folder)
        raise (_first_cause(error, max_failures) if noted is None else ValueError(noted)) from None
    finally:
        ended.set()
        watcher.join()
        watch()
    found = recovery.mistake(run_folder)
    if found is not None:
        raise ValueError(found)


def _start_coordinator() -> None:
    """Starts the actor that shares a cluster's resources out, for which Ray's controller would wait (2 s) once it stands itself.

    It is not public in Ray: whatever goes wrong here, in another version say, the controller starts it, as without this.
    """
    try:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import get_or_create_autoscaling_coordinator

        get_or_create_autoscaling_coordinator()
    except Exception:
        logging.getLogger(__name__).debug("Ray's controller will start its coordinator itself", exc_info=True)


def _trainer(run_folder: Path, workers: int | tuple[int, int], use_gpu: bool, max_failures: int) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from mtrec.jobs import recovery
    from mtrec.jobs.backend import ListeningTorchConfig

    timeout = open_run(run_folder).experiment.training.collective_timeout_seconds
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(timeout)  # Ray hands both on to its controller and workers
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(max(timeout, LEAST_HEALTH_CHECK_SECONDS))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"run": str(run_folder)},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=use_gpu,
            resources_per_worker={"GPU": 1} if use_gpu else {"CPU": 1},
        ),
        torch_config=ListeningTorchConfig(backend="nccl" if use_gpu else "gloo", timeout_s=timeout),
        run_config=RunConfig(
            name=run_folder.name,
            storage_path=str(run_folder / "ray"),
            failure_config=FailureConfig(max_failures=max_failures, max_preemption_failures=-1 if max_failures else 0),
            callbacks=[recovery.FailureNotes(run_folder)],
        ),
    )
    trainer._register_sigint_handler = lambda controller: None  # Ray's would end the workers without a checkpoint, at Ctrl-C
    return trainer


def _watch(watch: Callable[[], None], ended: threading.Event) -> None:
    while not ended.wait(0.1):
        watch()


def _first_cause(error: BaseException, max_failures: int) -> Exception:
    """What the worker that failed by itself met, as one sentence; a user's mistake stays a ValueError.

    >>> from ray.train import WorkerGroupError
    >>> lost, oom = RuntimeError("Connection closed by peer"), MemoryError("no 2 GB left")
    >>> _first_cause(WorkerGroupError("both failed", {0: lost, 1: oom}), 3)  # doctest: +ELLIPSIS
    TrainingFailed('worker 1 failed (MemoryError: no 2 GB left). The workers had been restarted 3 times ...
    >>> _first_cause(WorkerGroupError("both failed", {0: lost, 1: ValueError("no column 'age'")}), 3)
    ValueError("no column 'age'")
    """
    from mtrec.jobs.recovery import culprit, describe

    failures: dict[int, BaseException] = getattr(error, "worker_failures", {}) or {}
    found = culprit(failures)
    if found is None:
        return TrainingFailed(f"Training failed: {error}")
    if isinstance(found[1], ValueError):
        return ValueError(str(found[1]).strip())
    return TrainingFailed(
        f"{describe(failures)}. The workers had been restarted {max_failures} times (training.max_failures); "
        "--resume goes on from the newest checkpoint."
    )


def _worker(config: dict[str, Any]) -> None:
    """What each Ray worker runs: `train()` to its end, events reported to Ray and written by rank 0."""
    import ray.train

    from mtrec.jobs import recovery

    for name in ("torchrec.distributed.planner", "torch.fx", "torchrec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    run = open_run(config["run"])
    if recovery.mistake(run.folder) is not None:
        return  # a restart would only meet it again
    rank = ray.train.get_context().get_world_rank()
    timeout = run.experiment.training.collective_timeout_seconds
    try:
        with ExitStack() as held, recovery.hangs_named(timeout), hang.hangs_named(timeout):
            if rank == 0:
                held.enter_context(locked(run.folder / WRITER, f"The run {run.folder}", WRITER_WAIT_SECONDS))
            _train(run, rank)
    except ValueError as error:
        if not recovery.is_lost_peer(error) and not isinstance(error, LockedError):  # these may go away
            recovery.note_mistake(run.folder, error)
        raise


def _train(run: Run, rank: int) -> None:
    import ray.train
    import ray.train.torch

    from mtrec.events import Validation
    from mtrec.jobs import recovery
    from mtrec.jobs.gauges import Gauges
    from mtrec.recorder import Recorder
    from mtrec.train import train

    # the newest folder with a valid manifest, not Ray's own record, which lags; one rank looks, so that all take the same
    timeout = run.experiment.training.collective_timeout_seconds
    resume_from = parallel.by_rank_zero(lambda: to_resume(run.checkpoints), timeout)
    recorder = Recorder(run.folder) if rank == 0 else None
    gauges = Gauges(run.folder.name) if rank == 0 else None
    try:
        if recorder is not None:
            world_size = ray.train.get_context().get_world_size()
            again = recovery.restarted(run.folder, resume_from.step if resume_from else 0, world_size)
            if again is not None:
                recorder(again)
            recorder.catch_up(newest_validation(resume_from))
        stop_requested = recovery.StopRequest(run.folder, rank)
        device = ray.train.torch.get_device()
        with closing(train(run, device=device, resume_from=resume_from, stop_requested=stop_requested)) as events:
            for event in events:
                if recorder is not None and gauges is not None:
                    recorder(event)
                    gauges(event)
                if isinstance(event, Validation):
                    ray.train.report({"step": event.step, "metric": event.metric})
    finally:
        if recorder is not None:
            recorder.close()
