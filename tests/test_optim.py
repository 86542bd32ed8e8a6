"""Optimizers and their rates: schedules, options, state."""

from pathlib import Path
from typing import Any

import pytest
import torch
from logs import experiment_tree
from runs import small_run
from torch.testing import assert_close

from mtrec import parallel
from mtrec.config import apply_overrides, parse_experiment
from mtrec.experiment import DenseOptimizer, TableOptimizer
from mtrec.model import MultiTaskModel
from mtrec.optim import Schedules, dense_optimizer, schedule, table_optimizer
from mtrec.step import build_state

CPU = torch.device("cpu")


def test_schedules() -> None:
    assert [schedule("linear", step, 10, 0) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert schedule("constant", 999, 10, 4) == 1.0
    assert schedule("cosine", 0, 100, 10) == pytest.approx(0.1)


def test_the_dense_part_and_the_tables_have_learning_rates_of_their_own() -> None:
    def rates(total_steps: int, *options: str) -> Schedules:
        return Schedules(parse_experiment(apply_overrides(experiment_tree(Path("log")), options)), 2_048, total_steps)

    dense = ("optimizer.dense.schedule=linear", "optimizer.dense.warmup_steps=4", "optimizer.dense.learning_rate=auto")
    tables = ("optimizer.tables.schedule=cosine", "optimizer.tables.warmup_steps=2", "optimizer.tables.learning_rate=0.2")
    own = rates(100, *dense, *tables)
    for step in (0, 1, 3, 50, 99):
        assert own.dense_learning_rate(step) == pytest.approx(0.002 * schedule("linear", step, 100, 4))  # four times the batch
        assert own.table_learning_rate(step) == pytest.approx(0.2 * schedule("cosine", step, 100, 2))
    for total_steps, warmup_steps in ((400, 20), (1_000_000, 500)):
        auto = rates(total_steps, "optimizer.dense.learning_rate=0.5", "optimizer.dense.warmup_steps=auto")
        assert auto.dense_learning_rate(0) == pytest.approx(0.5 / warmup_steps)


@pytest.mark.parametrize(("kind", "plain"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)])
def test_the_dense_optimizer_is_torchs_with_all_options(kind: str, plain: type[torch.optim.Optimizer]) -> None:
    options: dict[str, Any] = {"weight_decay": 0.3, "betas": (0.5, 0.7), "eps": 0.1}
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    made = dense_optimizer(DenseOptimizer(kind=kind, **options), [ours], 0.1)  # type: ignore[arg-type]
    known = {"weight_decay": 0.3} if kind == "sgd" else options
    for optimizer, parameter in ((made, ours), (plain([theirs], lr=0.1, **known), theirs)):
        for gradient in ([1.0, 0.5], [-3.0, 0.25]):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
    assert_close(ours, theirs)


def test_making_the_dense_optimizers_state_changes_no_weight(tmp_path: Path) -> None:
    """Not even by its weight decay, which needs no gradient."""
    run = small_run(tmp_path, "optimizer.dense.weight_decay=0.5", "optimizer.dense.learning_rate=0.5")
    with parallel.process_group(CPU):
        model = MultiTaskModel(run.experiment, run.encoder, run.labels, CPU)
        before = {name: value.detach().clone() for name, value in model.dense.named_parameters()}
        state = build_state(run.experiment, model, run.labels, batch_size=128, total_steps=50, device=CPU)
    for name, value in model.dense.named_parameters():
        assert torch.equal(value, before[name]), name
        made = state.dense_optimizer.state[value]
        assert made
        assert not any(each.any() for each in made.values())


def test_the_tables_optimizer_has_its_options() -> None:
    for kind, made in (("rowwise_adagrad", {"lr": 0.2, "eps": 0.5}), ("adagrad", {"lr": 0.2, "eps": 0.5}), ("sgd", {"lr": 0.2})):
        assert table_optimizer(TableOptimizer(kind=kind, learning_rate=0.2, eps=0.5))[1] == made  # type: ignore[arg-type]
