"""What the commands do: prepare a run and train it here or on Ray, evaluate one, look into one."""

import json
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from mtrec import checkpoint, parallel
from mtrec.atomic import check_file, check_folder, write_atomically
from mtrec.display import TrainDisplay
from mtrec.display_scoring import ScoreDisplay
from mtrec.evaluate import check_best_metric, check_one_value, evaluate
from mtrec.experiment import Experiment, Source
from mtrec.locking import locked
from mtrec.model import task_specs
from mtrec.predictions import load_model
from mtrec.prepare import check_device, prepare, slow_precision
from mtrec.recorder import METRICS, Recorder
from mtrec.run import Run, check_mirror, check_resumable, copy_to_mirror, default_folder, fetch_from_mirror, open_run
from mtrec.scored_files import Asked, score_files
from mtrec.sources import evaluation_columns, open_source
from mtrec.stopping import listening
from mtrec.tasks import Objectives
from mtrec.train import train

LOCK = "train.lock"  # held by the command that trains the run


class Stopped(Exception):
    """The training was asked to stop (Ctrl-C, SIGTERM, a node about to be taken away) and did, with a checkpoint."""


def launch(
    experiment: Experiment,
    *,
    output: Path | None = None,
    workers: str = "auto",
    resume: bool = False,
    warm_start: Path | None = None,
    local: bool = False,
    json_file: Path | None = None,
) -> Run:
    """Prepares a run (or takes one up again), trains it, shows progress and the last metrics; returns the run.

    Raises ValueError for a mistake in experiment, data or arguments, before any worker starts; Stopped after Ctrl-C or SIGTERM.
    """
    from mtrec.jobs.connection import cluster_address

    check_file(json_file, "--json")
    check_folder(warm_start, "--warm-start")
    if output is None and experiment.output is not None:
        check_folder(Path(experiment.output), "output")
    check_folder(output, "--output")
    count = _workers(workers, experiment, local)
    here = local or cluster_address() is None
    if here:  # a remote cluster may have what this machine lacks
        check_device(experiment, local_device().type)
    check_best_metric(experiment, Objectives(task_specs(experiment)))
    folder = (output or default_folder(experiment, resume)).absolute()
    display = TrainDisplay(folder)
    with locked(folder / LOCK, f"The run {folder}"), display:
        run = _open_or_prepare(experiment, folder, resume, warm_start, display)
        copy_to_mirror(run)
        found = checkpoint.to_resume(run.checkpoints)
        display.start(run, found)
        note = slow_precision(run.experiment, local_device().type)
        if note is not None and here:
            display.say(note)
        if local:
            _train_here(run, found, display)
        else:
            from mtrec.jobs.train import cluster_gpus, train_on_ray

            gpus = cluster_gpus()
            most = run.experiment.data.num_streams
            if count is None and gpus > most:
                display.say(f"{most} of {gpus} GPUs are used: no more workers than data.num_streams can share the data")
            train_on_ray(
                run.folder,
                count if count is not None else min(max(1, gpus), most),
                use_gpu=gpus > 0,
                max_failures=experiment.training.max_failures,
                watch=display.poll,
                say=display.say,
            )
        display.close()
    metrics_file = run.folder / METRICS
    if json_file is not None and metrics_file.is_file():
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(metrics_file.read_text())
    elif json_file is not None:
        why = "nothing was validated yet" if run.experiment.data.validation else "there is no `data.validation`"
        display.say(f"--json {json_file} is not written: there are no metrics ({why})")
    if display.ended == "stopped":
        raise Stopped(f"asked to stop: the checkpoint is written. The same command with --output {run.folder} --resume goes on.")
    return run


def _open_or_prepare(
    experiment: Experiment, folder: Path, resume: bool, warm_start: Path | None, display: TrainDisplay
) -> Run:
    fetched = fetch_from_mirror(folder, experiment) if resume else []
    if fetched:
        display.say(f"fetched from {experiment.training.checkpoint_storage}: {', '.join(fetched)}")
    if not resume or not (folder / "run.json").is_file():
        if (folder / "run.json").exists():
            raise ValueError(f"--output {folder} holds a run already. Add --resume to continue it, or choose another folder.")
        check_mirror(experiment, folder)
        if resume:
            display.say(f"there is no run in {folder} yet; a new one begins")
        with display.preparing():
            return prepare(experiment, folder, open_run(warm_start) if warm_start else None)
    run = open_run(folder)
    check_resumable(run, experiment)
    if warm_start is not None:
        began = run.info["warm_start"]
        if began is None or Path(began).resolve() != warm_start.resolve():
            raise ValueError(
                f"--resume with --warm-start {warm_start}: the run {folder} exists and began "
                + (f"from the weights of {began}" if began else "from new weights")
                + ". Leave --warm-start out to continue it, or --resume (with another --output) to begin a new run."
            )
        display.say(f"--warm-start {warm_start} has been done: the run began from it, and continues from its own checkpoints")
    write_atomically(folder / "experiment.yaml", _resumed_yaml(run, experiment))
    return open_run(folder)


def _resumed_yaml(run: Run, experiment: Experiment) -> str:
    """The run's experiment with the keys that a resume may change taken from the one given."""
    from mtrec.config import to_yaml

    changeable = {"training": experiment.training, "evaluation": experiment.evaluation, "scoring": experiment.scoring}
    return to_yaml(run.experiment.model_copy(update=changeable))


def _workers(text: str, experiment: Experiment, local: bool) -> int | tuple[int, int] | None:
    if text == "auto":
        return None
    parts = text.split(":")
    if not all(part.isdigit() and int(part) > 0 for part in parts) or len(parts) > 2:
        raise ValueError(f"--workers should be a positive number, or least:most such as 1:4. Found '{text}'.")
    counts = [int(part) for part in parts]
    if max(counts) > experiment.data.num_streams:
        raise ValueError(
            f"--workers {text}: at most data.num_streams ({experiment.data.num_streams}) workers can share the data. "
            "Set data.num_streams higher."
        )
    if local and counts != [1]:
        raise ValueError(f"--local trains in this one process; --workers {text} needs Ray. Leave one of them out.")
    if len(counts) == 2 and counts[0] > counts[1]:
        raise ValueError(f"--workers {text}: the least number comes first.")
    return counts[0] if len(counts) == 1 else (counts[0], counts[1])


def local_device() -> torch.device:
    """The first GPU, else the CPU: what commands with `--local` use."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def _train_here(run: Run, resume_from: checkpoint.Checkpoint | None, display: TrainDisplay) -> None:
    asked = threading.Event()
    recorder = Recorder(run.folder)
    try:
        recorder.catch_up(checkpoint.newest_validation(resume_from))
        with listening(asked.set, display.say):
            training = train(run, device=local_device(), resume_from=resume_from, stop_requested=asked.is_set)
            with closing(training) as events:  # ends it here where an event cannot be written: its own error says more
                for event in events:
                    recorder(event)
                    display.poll()
    finally:
        recorder.close()


def evaluate_run(folder: Path, data: str, *, where: str | None = None, by: str | None = None) -> dict[str, Any]:
    """Metrics of a run's best checkpoint over labelled Parquet files."""
    check_folder(folder, "RUN")
    run = open_run(folder)
    experiment = run.experiment
    device = local_device()
    extra = [*evaluation_columns(experiment), *([by] if by else [])]
    dataset = open_source(experiment, Source(path=data, where=where), "--data", extra)
    if by is not None:
        check_one_value(dataset, by, "--by")
    with parallel.process_group(device):
        model = load_model(run, run.best(), device)
        return evaluate(model, dataset, experiment, run.encoder, device=device, by=by)


def score_run(asked: Asked, workers: str, local: bool) -> dict[str, Any]:
    """Scores files with a run's best checkpoint, here or on Ray actors, and shows how far it is; returns `score_files`' manifest.

    Raises ValueError for a mistake in run, input, formula or arguments, before any file is scored.
    """
    check_folder(Path(asked.run), "RUN")
    if workers != "auto" and not (workers.isdigit() and int(workers) > 0):
        raise ValueError(f"--workers should be a positive number. Found '{workers}'.")
    if local and workers not in ("auto", "1"):
        raise ValueError(f"--local scores in this one process; --workers {workers} needs Ray. Leave one of them out.")
    with ScoreDisplay() as display:
        if local:
            return score_files(asked, on_start=display.start, on_rows=display.advance)
        from mtrec.jobs.score import score_on_ray, scoring_workers

        count = scoring_workers(None if workers == "auto" else int(workers), display.say)
        return score_files(
            asked, score_on_ray(count), workers=count, on_start=display.start, on_rows=display.advance
        )


def inspect_run(folder: Path) -> dict[str, Any]:
    """What a run holds, every checkpoint verified."""
    check_folder(folder, "RUN")
    run = open_run(folder)
    found = []
    for path in sorted(run.checkpoints.glob("step-*")):
        problem = checkpoint.check(path)
        entry: dict[str, Any] = {"folder": path.name, "problem": problem}
        if problem is None:
            state = checkpoint.state_of(path)
            files = json.loads((path / "manifest.json").read_text())["files"]
            entry |= {
                "step": state["step"],
                "metric": state["metric"],
                "bytes": sum(f["bytes"] for f in files.values()),
            }
        found.append(entry)
    valid = [run.checkpoints / entry["folder"] for entry in found if entry["problem"] is None]
    touched: dict[str, int] = {}
    if valid:
        states = checkpoint.read(valid[-1], "tables_state.")
        for table in run.encoder.tables:
            moments = [value for key, value in states.items() if key.startswith(f"tables_state.{table.name}.")]
            if moments:
                rows = moments[0].reshape(table.num_embeddings, -1)
                touched[table.name] = int((rows != 0).any(1).sum())
    tables = [
        {
            "table": table.name,
            "encoding": table.encoding,
            "rows": table.num_embeddings,
            "used": table.vocabulary_size,
            "touched": touched.get(table.name),
            "dim": table.dim,
            "sharding": table.sharding,
            "bytes": table.num_embeddings * table.dim * 4,
        }
        for table in run.encoder.tables
    ]
    return {"run": str(folder), "info": run.info, "checkpoints": found, "tables": tables}
