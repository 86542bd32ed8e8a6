"""The whole model against plain torch with the same weights: logits, the dense gradient, and the gradient of every table row."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from runs import small_run
from torch import Tensor
from torch.testing import assert_close

from mtrec import parallel
from mtrec.batch import Batch
from mtrec.checkpoint import staged
from mtrec.embeddings import table_name
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.run import Run
from mtrec.sources import open_source
from mtrec.step import TrainState, build_state, reset_tables, train_step
from mtrec.train import Progress, make_reader

CPU = torch.device("cpu")
OPTIONS = (
    "optimizer.tables.kind=sgd",
    "optimizer.tables.learning_rate=1.0",
    "optimizer.dense.clip_norm=null",
    "features.tags.sharding=data_parallel",
    "features.user_id.sharding=column_wise",
)


def state_and_batch(run: Run) -> tuple[TrainState, Batch]:
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    reader = make_reader(run, data, Progress())
    model = MultiTaskModel(run.experiment, run.encoder, run.labels, CPU)
    state = build_state(run.experiment, model, run.labels, batch_size=128, total_steps=1, device=CPU)
    batch = next(feed(reader, run.encoder, labels_of(run.experiment, model.specs))).batch
    return state, batch


def whole_tables(state: TrainState) -> dict[str, Tensor]:
    """Every table put together from its shards, as a leaf that wants a gradient."""
    tables = {}
    for name, sharded in state.tables.weights().items():
        whole = torch.zeros(sharded.size())
        for shard in sharded.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            whole[row : row + rows, column : column + columns] = shard.tensor.detach()
        tables[name] = whole.requires_grad_()
    for name, bag in state.model.embeddings.replicated_tables.embedding_bags.items():
        tables[table_name(name)] = bag.weight.detach().clone().requires_grad_()
    return tables


def plain_forward(batch: Batch, tables: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DCN-v2, MMoE, towers and heads in plain torch, an expert and a tower at a time."""
    parts = [batch.dense_BF]
    jagged = batch.sparse.to_dict()
    for name in ("user_id", "item_id", "tags"):
        feature = jagged[name]
        parts.append(F.embedding_bag(feature.values(), tables[name], feature.offsets()[:-1], mode="mean"))
    x_BD = torch.cat(parts, dim=1)
    crossed = F.linear(F.linear(x_BD, weights["interaction.down.0.weight"]), weights["interaction.up.0.weight"])
    x_BD = x_BD * (crossed + weights["interaction.up.0.bias"]) + x_BD
    experts = []
    for e in range(3):
        h = x_BD
        for layer in (0, 1):
            name = f"architecture.experts.linears.{layer}"
            h = F.relu(F.linear(h, weights[f"{name}.weight"][e], weights[f"{name}.bias"][e].flatten()))
        experts.append(h)
    experts_BEH = torch.stack(experts, dim=1)
    logits = {}
    gates = next(value for name, value in weights.items() if name.startswith("architecture.task_gates"))
    for k, task in enumerate(("click", "conversion", "dwell")):
        gate_BE = torch.softmax(F.linear(x_BD, gates.reshape(3, 3, -1)[k]), dim=1)
        mixed_BH = (gate_BE[:, :, None] * experts_BEH).sum(1)
        tower = F.relu(
            F.linear(mixed_BH, weights["towers.mlps.0.linears.0.weight"][k], weights["towers.mlps.0.linears.0.bias"][k].flatten())
        )
        logits[task] = F.linear(tower, weights[f"heads.head_{task}.weight"], weights[f"heads.head_{task}.bias"])
    return logits


def test_logits_and_gradients_equal_plain_torch(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OPTIONS)
    with parallel.process_group(CPU):
        state, batch = state_and_batch(run)
        tables = whole_tables(state)
        weights = {name: p.detach().clone().requires_grad_() for name, p in state.model.dense.named_parameters()}
        expected = plain_forward(batch, tables, weights)
        found = state.model(batch)
        for task, logits in expected.items():
            assert_close(found[task], logits, rtol=1e-5, atol=1e-6)

        # the losses, by their definition: entire space for conversion, masked for dwell
        click, conversion = batch.labels["click"], batch.labels["conversion"]
        p_click, p_conversion = expected["click"][:, 0].sigmoid(), expected["conversion"][:, 0].sigmoid()
        losses = [
            F.binary_cross_entropy(p_click, click),
            F.binary_cross_entropy(p_click * p_conversion, conversion * click),
            state.model.specs["dwell"].task.loss(expected["dwell"][click == 1], batch.labels["dwell"][click == 1]).mean(),
        ]
        (torch.stack(losses) * state.task_weights_K).sum().backward()

        before = {name: table.detach().clone() for name, table in whole_tables(state).items()}
        result = train_step(state, batch)
        assert_close(result.losses_K, torch.stack(losses).detach(), rtol=1e-5, atol=1e-6)
        for name, parameter in state.model.dense.named_parameters():
            assert parameter.grad is not None
            assert_close(parameter.grad, weights[name].grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        after = whole_tables(state)
        for name, table in tables.items():  # SGD with rate 1: what a row moved is its gradient
            assert table.grad is not None
            assert table.grad.abs().sum() > 0
            assert_close(before[name] - after[name], table.grad, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("clip_norm", [1e-3, 1e3])
def test_the_dense_part_moves_by_its_clipped_gradient_times_the_rate_of_the_step(tmp_path: Path, clip_norm: float) -> None:
    plain = ("kind=sgd", "learning_rate=1.0", "weight_decay=0", "schedule=linear", "warmup_steps=0", f"clip_norm={clip_norm}")
    run = small_run(tmp_path, *OPTIONS, *(f"optimizer.dense.{option}" for option in plain))
    with parallel.process_group(CPU):
        state, batch = state_and_batch(run)
        state.schedules.total_steps = 4
        for rate in (1.0, 0.75):
            before = torch.cat([parameter.detach().flatten() for parameter in state.dense_gradients.parameters])
            train_step(state, batch)
            after = torch.cat([parameter.detach().flatten() for parameter in state.dense_gradients.parameters])
            gradient = state.dense_gradients.buffer
            assert_close(before - after, rate * gradient, rtol=1e-3, atol=1e-6)
            if clip_norm < 1:
                assert_close(gradient.norm(), torch.tensor(clip_norm), rtol=1e-2, atol=0.0)
            else:
                assert 0.01 < gradient.norm() < 100


def test_every_table_moves_by_the_rate_of_the_step(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OPTIONS, "optimizer.tables.schedule=linear", "optimizer.tables.warmup_steps=0")
    moved = []
    with parallel.process_group(CPU):
        for step in (0, 3):
            state, batch = state_and_batch(run)
            state.schedules.total_steps, state.step = 4, step
            before = {name: table.detach().clone() for name, table in whole_tables(state).items()}
            train_step(state, batch)
            moved.append({name: table.detach() - before[name] for name, table in whole_tables(state).items()})
    for name, first in moved[0].items():
        assert first.abs().max() > 1e-4
        assert_close(moved[1][name], first / 4, rtol=1e-3, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_tables_that_are_reset_start_with_the_optimizer_state_of_new_ones(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OPTIONS, "optimizer.tables.kind=rowwise_adagrad")
    with parallel.process_group(CPU):
        state, batch = state_and_batch(run)
        kept = {key: local(value) for key, value in state.tensors().items() if key.startswith("tables_state.")}
        assert {key.split(".")[1] for key in kept} == {"user_id", "item_id", "tags"}
        train_step(state, batch)
        assert all(part.any() for parts in kept.values() for part in parts)
        reset_tables(state, generation=1)
        assert not [key for key, parts in kept.items() if any(part.any() for part in parts)]


def test_a_rank_without_rows_can_step(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OPTIONS, "data.train.where=age < 18")
    with parallel.process_group(CPU):
        state, batch = state_and_batch(run)
        sizes = {batch.num_rows}
        reader = make_reader(run, open_source(run.experiment, run.experiment.data.train, "data.train"), Progress())
        for _, empty in feed(reader, run.encoder, labels_of(run.experiment, state.model.specs)):
            sizes.add(empty.num_rows)
            train_step(state, empty)
            assert state.finite
        assert 0 in sizes


def test_what_is_saved_in_the_background_is_a_copy_of_the_shards_and_of_no_more(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OPTIONS)
    with parallel.process_group(CPU):
        state, batch = state_and_batch(run)
        live = {key: local(value) for key, value in state.tensors().items()}
        before = {key: [part.clone() for part in parts] for key, parts in live.items()}
        copies = {key: local(value) for key, value in staged(state.tensors()).items()}
        train_step(state, batch)
    assert any(key.startswith("tables.") and len(parts) == 2 for key, parts in live.items()), "a table is cut by columns"
    for key, parts in copies.items():
        for part, was in zip(parts, before[key], strict=True):
            assert torch.equal(part, was), key
            assert part.untyped_storage().nbytes() == part.nbytes, f"{key}: the whole buffer was copied with it"
    moved = [key for key, parts in live.items() if any(not torch.equal(a, b) for a, b in zip(parts, copies[key], strict=True))]
    assert {f"tables.{name}" for name in ("user_id", "item_id", "tags")} <= set(moved)


def local(value: Any) -> list[Tensor]:
    """The tensors of this rank: of a table its shards."""
    return [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
