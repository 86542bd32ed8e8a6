"""One rank against two and three: the same losses and metrics; a seed repeats itself; tables move, however they are cut."""

from pathlib import Path

import pytest
import torch
from runs import small_run, train_on
from torch.testing import assert_close

from mtrec.checkpoint import find, read

SGD = (
    "optimizer.tables.kind=sgd",
    "optimizer.tables.learning_rate=100",  # with 1 a table whose gradient was never summed over the ranks changed no loss by 1e-5
    "optimizer.dense.kind=sgd",
    "optimizer.dense.learning_rate=0.1",
)
DROPOUT = ("model.dropout=0.2", "model.architecture.dropout=0.3", "model.architecture.gate_dropout=0.2")
# shares a table between ranks by columns, and keeps another one on every rank
SHARDINGS = (
    "features.user_id.sharding=column_wise",
    "features.user_id.num_column_shards=2",
    "features.item_id.sharding=table_wise",
    "features.tags.sharding=data_parallel",
)


@pytest.mark.parametrize("optimizer", [(), SGD], ids=["adagrad_adamw", "sgd"])
def test_one_two_and_three_ranks_agree(tmp_path: Path, optimizer: tuple[str, ...]) -> None:
    overrides = (*optimizer, *DROPOUT, *SHARDINGS)
    one = train_on(1, small_run(tmp_path, *overrides))
    assert len(one["losses"]) == 32
    for world_size in (2, 3):
        several = train_on(world_size, small_run(tmp_path, *overrides))
        assert_close(several["losses"][:20], one["losses"][:20], rtol=1e-5, atol=0)
        for task, metrics in one["metrics"]["tasks"].items():
            for name, value in metrics.items():
                if value is not None:
                    assert several["metrics"]["tasks"][task][name] == pytest.approx(value, abs=1e-3, rel=1e-3), (
                        task,
                        name,
                    )


def test_the_same_seed_twice_gives_identical_losses(tmp_path: Path) -> None:
    first = train_on(2, small_run(tmp_path, *DROPOUT))
    second = train_on(2, small_run(tmp_path, *DROPOUT))
    assert torch.equal(first["losses"], second["losses"])
    other = train_on(2, small_run(tmp_path, *DROPOUT, "seed=6"))
    assert not torch.equal(first["losses"], other["losses"])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["rowwise_adagrad", "adagrad", "sgd"])
def test_every_table_moves_under_every_sharding(tmp_path: Path, world_size: int, kind: str) -> None:
    run = small_run(tmp_path, *SHARDINGS, f"optimizer.tables.kind={kind}", "training.max_steps=1")
    train_on(world_size, run)
    after = read(find(run.checkpoints)[0].folder, "tables.")
    still = small_run(tmp_path, *SHARDINGS, "training.max_steps=1", "optimizer.tables.learning_rate=1e-30")
    train_on(1, still)
    before = read(find(still.checkpoints)[0].folder, "tables.")
    assert after.keys() == before.keys() == {"tables.user_id", "tables.item_id", "tables.tags"}
    for name, table in after.items():
        moved = (table != before[name]).any(1).sum()
        assert 10 <= moved <= 140, f"{name}: {moved} rows moved in one step of 128 rows"
