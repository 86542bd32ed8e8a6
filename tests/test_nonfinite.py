"""Batches whose loss or gradient is not finite change nothing, on any number of ranks; too many in a row end the run."""

from pathlib import Path

import pytest
import torch
from logs import write_poisoned_log
from runs import small_run, train_on

from mtrec.checkpoint import folder_of, read
from mtrec.events import Step
from mtrec.train import train

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
