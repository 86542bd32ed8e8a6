"""Batches whose loss or gradient is not finite change nothing, on any number of ranks; too many in a row end the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from logs import write_poisoned_log
from ranks import run_ranks
from runs import small_run, train_on
from torch.multiprocessing import ProcessRaisedException

from mtrec import parallel
from mtrec.checkpoint import folder_of, read
from mtrec.events import NotFiniteError, Step
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.run import Run
from mtrec.sources import open_source
from mtrec.step import build_state, train_step
from mtrec.train import Progress, make_reader, train

CPU = torch.device("cpu")

BAD = (3, 4, 9)  # steps
EVERY_STEP = ("training.checkpoint_every=1", "training.keep_last=100", "data.shuffle=false", "data.num_streams=1")
KINDS = ("balancing.kind=gradnorm", "balancing.every=1", "features.tags.sharding=data_parallel", "model.dropout=0.1")


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, world_size: int) -> None:
    tree = write_poisoned_log(tmp_path, BAD)
    streams = ("data.num_streams=2",) if world_size == 2 else ()
    run = small_run(tmp_path, *EVERY_STEP, *KINDS, *streams, tree=tree)
    train_on(world_size, run)
    moved = []
    for step in range(2, 13):
        before, after = (read(folder_of(run.checkpoints, each).absolute()) for each in (step - 1, step))
        same = {key: torch.equal(before[key], after[key]) for key in before}
        assert all(torch.isfinite(value).all() for value in after.values()), step
        if all(same.values()):
            continue
        moved.append(step)
        assert not any(same[key] for key in ("tables.user_id", "tables.tags", "dense.heads.head_click.weight")), step
    if world_size == 1:  # in file order; with two streams other batches hold the bad rows
        assert moved == [step for step in range(2, 13) if step not in BAD]
    else:
        assert 0 < 11 - len(moved) <= 2 * len(BAD)


def test_they_are_counted_and_too_many_in_a_row_end_the_run(tmp_path: Path) -> None:
    tree = write_poisoned_log(tmp_path, (2, 5, 6, 7))
    run = small_run(tmp_path, *EVERY_STEP, "training.max_nonfinite_steps=3", "training.log_every=1", tree=tree)
    events = train(run, device=torch.device("cpu"))
    counted = []
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .*\(up to step 7\).*part-0.parquet"):
        counted.extend(event.nonfinite_steps for event in events if isinstance(event, Step))
    assert counted == [0, 1, 1, 1, 2, 3, 4]


@pytest.mark.parametrize("validated", [True, False])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_that_diverged_in_few_steps_is_told_as_that(tmp_path: Path, validated: bool, world_size: int) -> None:
    rates = ("optimizer.dense.learning_rate=1e20", "optimizer.tables.learning_rate=1e20", "training.max_steps=16")
    run = small_run(tmp_path, *rates, *(() if validated else ("data.validation=null",)))
    words = r"Step 16, \d+ steps before it not finite and skipped: The model's outputs .* a lower `optimizer.dense.learning_rate`"
    with pytest.raises((NotFiniteError, ProcessRaisedException), match=words) as found:
        list(train(run, device=CPU)) if world_size == 1 else train_on(world_size, run)
    assert world_size > 1 or isinstance(found.value, ValueError)  # a user's mistake: no restart of workers
    assert folder_of(run.checkpoints, 16).is_dir()  # what was trained is there to be looked at


BAD_VALUES = {"inf": [torch.inf], "nan": [torch.nan], "their sum": [3e38, 3e38]}  # an infinite one on each rank cancels below


def steps_with_a_bad_gradient(folder: str, bad: str, late: bool) -> tuple[int, list[bool]]:
    """(steps that were not finite, whether tables moved in each): in the second of four x's gradient is not, the loss is."""
    torch.set_num_threads(1)
    run, gradients_of = Run(Path(folder)), torch.autograd.grad
    with parallel.process_group(CPU):
        model = MultiTaskModel(run.experiment, run.encoder, run.labels, CPU)
        state = build_state(run.experiment, model, run.labels, batch_size=128, total_steps=9, device=CPU)
        state.flags.late = late
        data = open_source(run.experiment, run.experiment.data.train, "data.train")
        fed = feed(make_reader(run, data, Progress()), run.encoder, labels_of(run.experiment, model.specs))
        batches = [next(fed).batch for _ in range(4)]
        fed.close()
        last = parallel.rank() == parallel.world_size() - 1
        values = BAD_VALUES.get(bad, [torch.inf if last else -torch.inf])

        def spoiled(*arguments: Any, **options: Any) -> list[torch.Tensor]:
            x_gradient_BD, *others = gradients_of(*arguments, **options)
            if state.step == 1 and (last or bad == "opposite"):
                x_gradient_BD = x_gradient_BD.clone()
                x_gradient_BD.view(-1)[: len(values)] = torch.tensor(values)
            return [x_gradient_BD, *others]

        torch.autograd.grad = spoiled  # type: ignore[assignment]  # in this process, which ends with the function
        moved = []
        for batch in batches:
            before = [shard.tensor.clone() for each in state.tables.weights().values() for shard in each.local_shards()]
            train_step(state, batch)
            after = [shard.tensor for each in state.tables.weights().values() for shard in each.local_shards()]
            moved.append(any(not torch.equal(*each) for each in zip(before, after, strict=True)))
        state.read_flags(wait=True)
        return state.nonfinite_steps, moved


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("world_size", "bad"), [(1, "nan"), (1, "their sum"), (2, "inf"), (2, "opposite")])
def test_a_gradient_that_is_not_finite_counts_where_the_loss_is(
    tmp_path: Path, world_size: int, bad: str, late: bool
) -> None:
    run = small_run(tmp_path)
    for found in run_ranks(world_size, steps_with_a_bad_gradient, str(run.folder), bad, late, folder=tmp_path):
        assert found == (1, [True, False, True, True])
