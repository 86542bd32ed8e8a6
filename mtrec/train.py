"""The training loop, top to bottom: a generator of events, run by every rank alike.

    for event in train(run): ...        # Step, Validation, Saved, ..., Ended

What happens to an event (printed, logged, reported to Ray) is the caller's business (`events.py`, `recorder.py`).
"""

import dataclasses
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch

from mtrec import checkpoint, hang, parallel
from mtrec.ahead import copy_ahead
from mtrec.allocator import keep_freed_memory
from mtrec.batch import Batch
from mtrec.checkpoint import WHOLE_VALIDATION, Checkpoint, Saver
from mtrec.dataset import Dataset
from mtrec.evaluate import check_bad_rows, evaluate, score_metric
from mtrec.events import DIVERGED, Ended, Event, NotFiniteError, Saved, Validation, WarmStarted
from mtrec.experiment import EarlyStopping, Training
from mtrec.feed import Fed, bad_rows, feed
from mtrec.kinds import counted
from mtrec.labels import labels_of
from mtrec.meter import Meter
from mtrec.model import MultiTaskModel
from mtrec.predictions import TrainingSample
from mtrec.reader import Piece, Reader
from mtrec.row_order import ROW_ORDER
from mtrec.run import Run, open_run
from mtrec.sources import evaluation_columns, label_columns, open_source
from mtrec.step import TrainState, build_state, reset_tables, train_step
from mtrec.warm import warm_start

MOST_READING_THREADS = 4  # by default: Python runs one of them at a time, beside the one that trains


@dataclasses.dataclass
class Progress:
    """Where the training stands; with `TrainState.tensors()` all that a checkpoint holds."""

    epoch: int = 0
    next_batch: int = 0
    best_step: int | None = None
    best_metric: float | None = None
    validations_since_best: int = 0
    metric: float | None = None  # of the newest validation, if it was at this step
    to_validate: bool = False  # a validation of this step is due and not done
    row_order: int = ROW_ORDER  # of the epoch's batches


def train(
    run: Run,
    *,
    device: torch.device,
    resume_from: Checkpoint | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Generator[Event, None, None]:
    """Trains a prepared run; every rank iterates it to its end.

    Args:
        run: a folder made by `prepare`, on storage that all ranks see.
        device: of this rank.
        resume_from: continue exactly there, on any number of ranks. Without it a run that was prepared with a warm start
            begins from the other run's weights.
        stop_requested: asked at every step; once it is true on one rank, all save a checkpoint and end.
    """
    experiment = run.experiment
    config = experiment.training
    assert isinstance(experiment.data.batch_size, int)
    torch.set_num_threads(config.threads_per_worker)
    keep_freed_memory()
    if device.type == "cpu" and config.deterministic:
        be_deterministic()
    elif device.type != "cpu":
        torch.use_deterministic_algorithms(False)  # which a training on the CPU before it, in this process, may have left
    seconds = config.collective_timeout_seconds
    with hang.hangs_named(seconds), parallel.process_group(device, seconds, share_memory=config.exchange == "auto"):
        _check_world(experiment.data.num_streams)
        data, validation = _sources(run)
        steps_per_epoch = make_reader(run, data, Progress()).num_batches
        total_steps = steps_per_epoch * config.epochs
        total_steps = min(total_steps, config.max_steps or total_steps)
        model = MultiTaskModel(experiment, run.encoder, run.labels, device)
        state = build_state(
            experiment, model, run.labels, batch_size=experiment.data.batch_size, total_steps=total_steps, device=device
        )
        saver = Saver(run.checkpoints, config.keep_last, config.keep_best, config.checkpoint_async, seconds, run.mirror())
        progress = Progress()
        if resume_from is not None:
            checkpoint.load(resume_from.folder, state.tensors())
            state.tables.forget_cached_rows()
            state.step = resume_from.step
            progress = _reached(resume_from, run, total_steps)
        elif run.info["warm_start"] is not None:
            started = warm_start(state, run, open_run(run.info["warm_start"]))
            yield WarmStarted(0, str(started.folder), started.notes)
        try:
            yield from _loop(run, data, validation, state, saver, progress, total_steps, stop_requested)
        except BaseException as error:  # Ctrl-C, and a caller that goes away, too
            if not (isinstance(error, Exception) and hang.timed_out(error)):
                saver.finish()  # what is being saved counts, although a validation, say, cannot be done
            raise


def be_deterministic() -> None:
    """Algorithms that give the same bits at every run. Memory that is about to be written is not filled with NaN before."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _sources(run: Run) -> tuple[Dataset, Dataset | None]:
    """The training and the validation rows; ValueError where they are not those that the run was prepared from."""
    experiment = run.experiment
    train = open_source(experiment, experiment.data.train, "data.train")
    _check_unchanged(run, train, run.info["train"])
    source = experiment.data.validation
    if source is None:
        return train, None
    validation = open_source(experiment, source, "data.validation", evaluation_columns(experiment))
    noted = run.info.get("validation")  # runs of an earlier mtrec have none
    if noted is not None and noted["source"] == source.model_dump(mode="json"):  # a comparison's runs share one run.json
        _check_unchanged(run, validation, noted)
    return train, validation


def _reached(resumed: Checkpoint, run: Run, total_steps: int) -> Progress:
    """Where a checkpoint stands. ValueError where it is to be gone on within an epoch that was shuffled in another way."""
    progress = Progress(**{"row_order": 1, **resumed.state["progress"]})  # order 1 was not noted
    within = progress.next_batch > 0 and resumed.step < total_steps
    if progress.row_order != ROW_ORDER and within and run.experiment.data.shuffle:
        raise ValueError(
            f"{resumed.folder} stands within an epoch whose rows its mtrec shuffled in another way than this one does: some "
            "would come twice, others not at all. Resume it with that mtrec (run.json names its versions), or start a new run "
            "(with --warm-start to keep the weights)."
        )
    progress.row_order = ROW_ORDER
    return progress


def _check_unchanged(run: Run, data: Dataset, noted: Mapping[str, Any]) -> None:
    if data.fingerprint != noted["fingerprint"]:
        raise ValueError(
            f"{data.place} is not what {run.folder} was prepared from: files were added, removed or replaced since. "
            "Start a new run (with --warm-start to keep the weights)."
        )


def _check_world(num_streams: int) -> None:
    if parallel.world_size() > num_streams:
        raise ValueError(
            f"`data.num_streams` ({num_streams}) should be at least the number of workers. Found {parallel.world_size()} workers."
        )


def reading_threads(config: Training, device: torch.device) -> int:
    """Where a GPU trains the host has cores to spare: streams are then decoded and encoded beside each other."""
    if config.reading_threads != "auto":
        return config.reading_threads
    if device.type != "cuda":
        return 1
    spare = len(os.sched_getaffinity(0)) // parallel.local_world_size() - config.threads_per_worker
    return max(1, min(MOST_READING_THREADS, spare))


def make_reader(run: Run, data: Dataset, progress: Progress, num_threads: int = 1) -> Reader:
    """The reader of one epoch, from the position in `progress` on."""
    config = run.experiment.data
    assert isinstance(config.batch_size, int)
    columns = list(dict.fromkeys([*run.encoder.columns, *label_columns(run.experiment)]))
    return Reader(
        data.with_dictionaries(run.encoder.id_columns),
        columns,
        batch_size=config.batch_size,
        num_streams=config.num_streams,
        rank=parallel.rank(),
        world_size=parallel.world_size(),
        seed=run.experiment.seed,
        shuffle=config.shuffle,
        shuffle_window=config.shuffle_window,
        epoch=progress.epoch,
        start_batch=progress.next_batch,
        prefetch=config.prefetch,
        num_threads=num_threads,
    )


def _loop(
    run: Run,
    data: Dataset,
    validation: Dataset | None,
    state: TrainState,
    saver: Saver,
    progress: Progress,
    total_steps: int,
    stop_requested: Callable[[], bool],
) -> Iterator[Event]:
    experiment, config = run.experiment, run.experiment.training
    labels = labels_of(experiment, state.model.specs)
    sample = TrainingSample(run)
    reason, meter, skipped = "finished", Meter(config.log_every), Counter[str]()
    if validation is not None and progress.to_validate:  # the run ended before it had validated its last checkpoint
        yield _validate(run, state, validation, progress, saver)
    if _stops_early(progress, config.early_stopping):
        reason = "early_stopping"  # it had ended; a larger patience lets it go on
    while reason == "finished" and progress.epoch < config.epochs and state.step < total_steps:
        if config.reset_tables == "every_epoch":
            state.tables_since = state.step - progress.next_batch
            if progress.epoch > 0 and progress.next_batch == 0:
                reset_tables(state, generation=progress.epoch)
        reader = make_reader(run, data, progress, reading_threads(config, state.device))
        steps_per_epoch = reader.num_batches
        pin = state.device.type == "cuda"
        pieces = deque[Piece](maxlen=2 if state.flags.late else 1)  # of the newest steps
        bad = bad_rows(experiment.data, data.num_rows)
        with closing(feed(reader, run.encoder, labels, experiment.data.sample_weight, pin=pin, bad=bad)) as fed:
            for piece, batch, upcoming in _with_upcoming(meter.waiting(fed), state.device):
                to_log = (state.step + 1) % config.log_every == 0 or state.step + 1 == total_steps
                meter.add(  # no name holds the result: x_BD of a logged step would stay until the next step's is there
                    train_step(state, batch, stop=stop_requested(), upcoming=upcoming, keep_x=to_log), batch.num_rows
                )
                progress.next_batch += 1
                progress.metric = None
                if progress.next_batch == steps_per_epoch:
                    progress.epoch, progress.next_batch = progress.epoch + 1, 0
                pieces.append(piece)
                epoch_ended = progress.next_batch == 0
                ended = state.step >= total_steps
                to_validate = validation is not None and (_due(config.validate_every, state.step, epoch_ended) or ended)
                every = config.checkpoint_every or config.validate_every
                to_save = _due(every, state.step, epoch_ended) or to_validate or ended
                if to_log or to_save or epoch_ended or state.stop:
                    state.read_flags(wait=True)  # most of these wait for the device anyway
                if to_log:
                    yield meter.event(state, progress.epoch, total_steps)
                if state.nonfinite_in_a_row >= config.max_nonfinite_steps:
                    bad_piece = pieces[state.known_step - state.step - 1]
                    raise _not_finite(state, run, [path for path, _ in reader.sources(bad_piece)])
                progress.to_validate = to_validate
                if bad is not None and epoch_ended and reader.start_batch == 0:  # of a part of an epoch the share says little
                    check_bad_rows(bad, "data.train")  # before the epoch counts as done
                # saved before it is validated: a validation that fails, or is killed, costs no training
                if to_save or state.stop:
                    folder = saver.save(state.tensors(), _state(run, state, progress), sample.files(state.model, state.device))
                    yield Saved(state.step, str(folder))
                    meter.restart()
                if validation is not None and progress.to_validate and (ended or not state.stop):
                    yield _validate(run, state, validation, progress, saver)
                    meter.restart()
                if state.stop and not ended:  # at the last step there is nothing left to go on with
                    reason = "stopped"
                elif _stops_early(progress, config.early_stopping):
                    reason = "early_stopping"
                elif config.max_steps and state.step >= config.max_steps:
                    reason = "max_steps"
                if reason != "finished" or ended:
                    break
        skipped.update(bad.skipped if bad is not None else {})
        if reason != "finished":
            break
    saver.settle()
    if validation is None and reason != "stopped":
        _check_outputs(run, state, sample)
    parallel.barrier()
    everywhere = sum(parallel.gather_objects(skipped) or [], Counter[str]())
    yield Ended(state.step, reason, progress.best_step, progress.best_metric, dict(everywhere))


def _with_upcoming(fed: Iterator[Fed], device: torch.device) -> Iterator[tuple[Piece, Batch, Batch | None]]:
    """The batches, on the device, each with the one that follows it (None after the last)."""
    here: tuple[Piece, Batch] | None = None
    for piece, batch in fed:
        upcoming = copy_ahead(batch, device)
        if here is not None:
            yield *here, upcoming
        here = piece, upcoming
    if here is not None:
        yield *here, None


def _due(every: int | None, step: int, epoch_ended: bool) -> bool:
    return epoch_ended if every is None else step % every == 0


def _state(run: Run, state: TrainState, progress: Progress) -> dict[str, Any]:
    """What `state.json` of a checkpoint says: the reader's position is epoch and next batch of every stream."""
    return {
        "step": state.step,
        "metric": None,  # validation.json has it, once there is one
        "progress": dataclasses.asdict(progress),
        "world_size": parallel.world_size(),
        "experiment": run.experiment.model_dump(mode="json"),
        "versions": run.info["versions"],
    }


def _validate(run: Run, state: TrainState, dataset: Dataset, progress: Progress, saver: Saver) -> Validation:
    """Validates the newest checkpoint, which lies written or is being written, and notes in it what was found."""
    started = time.perf_counter()
    try:
        metrics = evaluate(state.model, dataset, run.experiment, run.encoder, device=state.device)
    except NotFiniteError as error:
        raise _diverged(state, str(error)) from error
    metric = score_metric(run.experiment, state.model.objectives, metrics)
    progress.metric, progress.to_validate = metric, False
    early_stopping = run.experiment.training.early_stopping
    min_gain = early_stopping.min_gain if early_stopping else 0.0
    if metric is not None and (progress.best_metric is None or metric > progress.best_metric + min_gain):
        progress.best_metric, progress.best_step, progress.validations_since_best = metric, state.step, 0
    else:
        progress.validations_since_best += 1
    found = Validation(state.step, progress.epoch, metrics, metric, time.perf_counter() - started)
    noted = {"metric": metric, "progress": dataclasses.asdict(progress), WHOLE_VALIDATION: dataclasses.asdict(found)}
    saver.add_validation(state.step, noted)
    return found


def _stops_early(progress: Progress, early_stopping: EarlyStopping | None) -> bool:
    return early_stopping is not None and progress.validations_since_best >= early_stopping.patience


def _check_outputs(run: Run, state: TrainState, sample: TrainingSample) -> None:
    """Where nothing is validated: a model that has diverged is no result, though the run ended before too many steps in a row."""
    table = sample.predict(state.model, state.device)  # on rank 0

    def check() -> None:
        for name, column in zip(table.column_names, table.columns, strict=True) if table is not None else ():
            bad = ~np.isfinite(column.to_numpy())
            if bad.any():
                what = f"Found {bad.sum():,} of {len(bad):,} values of {name} that are not, on a sample of the training rows"
                raise _diverged(state, f"The model's outputs should be finite. {what}: {DIVERGED}")

    parallel.by_rank_zero(check, run.experiment.training.collective_timeout_seconds)


def _diverged(state: TrainState, what: str) -> NotFiniteError:
    skipped = f", {counted(state.nonfinite_steps, 'step')} before it not finite and skipped" if state.nonfinite_steps else ""
    return NotFiniteError(f"Step {state.step}{skipped}: {what}")


def _not_finite(state: TrainState, run: Run, paths: Sequence[str]) -> NotFiniteError:
    files = list(dict.fromkeys(paths))
    more = f" and {len(files) - 3} more" if len(files) > 3 else ""
    return NotFiniteError(
        f"{state.nonfinite_in_a_row} steps in a row had a loss or gradient that is not finite (up to step {state.known_step}); "
        f"they changed nothing. This worker's rows of the last one come from {', '.join(files[:3])}{more}: look at labels, "
        f"weights and dense features there, or lower the learning rates. Checkpoints: {run.checkpoints}."
    )
