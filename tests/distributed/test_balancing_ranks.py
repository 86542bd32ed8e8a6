"""Every balancing method on 1, 2 and 4 ranks: the same weights, the same model, one update of every table a step."""

from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from runs import small_run
from torch import Tensor
from torch.testing import assert_close

from mtrec import parallel
from mtrec.balancing import BALANCERS
from mtrec.batch import Batch
from mtrec.config import apply_overrides, parse_experiment
from mtrec.embeddings import module_name
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.run import Run
from mtrec.sources import open_source
from mtrec.step import TrainState, build_state, train_step
from mtrec.train import Progress, make_reader

STEPS = 20
WITHOUT_CLICKS = 7  # a step in which no row of the global batch is clicked or has a conversion label
RATE = 0.5
OVERRIDES = (
    # plain gradient steps: an adaptive optimizer would hide a wrong scale, and make noise near 0 as large as the rest
    "optimizer.tables.kind=sgd",
    f"optimizer.tables.learning_rate={RATE}",
    "optimizer.dense.kind=sgd",
    "optimizer.dense.learning_rate=0.05",
    "features.user_id.sharding=column_wise",
    "features.user_id.num_column_shards=2",
    "features.tags.sharding=data_parallel",
    "tasks.conversion.space=observed",
    "tasks.conversion.given=null",
    "model.dropout=0.1",
    "seed=1",  # the gradients of click and conversion then have a cosine of -0.7
)
# what a method must do within a run of 20 steps to be tested at all
OPTIONS = {
    "dwa": ["balancing.window=3"],
    "gradnorm": ["balancing.warmup_steps=4", "balancing.every=1"],
    "dualproj": ["balancing.preference={click: 5}"],
    "stch": ["balancing.warmup_steps=4"],
    "scheduled": ["balancing.ratio={dwell: 0.5}", "balancing.period=10"],
}
OTHERS = {
    "mgda batch_sum": ["balancing.kind=mgda", "balancing.at=batch_sum"],
    "upgrad representation": ["balancing.kind=upgrad", "balancing.at=representation"],
    "cagrad rows": ["balancing.kind=cagrad", "balancing.rows=0.25"],
    "gradvac ema": ["balancing.kind=gradvac", "balancing.ema=0.5"],
    "upgrad primary": ["balancing.kind=upgrad", "balancing.primary=dwell", "balancing.guard=0.9"],
    "static logged": ["balancing.kind=static", "balancing.log_gradients=true"],
}


def variants() -> dict[str, list[str]]:
    methods = {kind: [f"balancing.kind={kind}", *OPTIONS.get(kind, [])] for kind in BALANCERS}
    return {name: ["balancing.every=3", *overrides] for name, overrides in (methods | OTHERS).items()}


def batches_of(run: Run) -> list[Batch]:
    """This rank's part of the first global batches; the last two of the 8 streams are never clicked.

    `conversion` becomes the opposite of the click, known in every other stream: these two tasks conflict.
    """
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    labels = labels_of(run.experiment, MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta")).specs)
    reader = make_reader(run, data, Progress())
    found = [batch for _, batch in feed(reader, run.encoder, labels, None)][:STEPS]
    streams = [v for v in range(8) if v * parallel.world_size() // 8 == parallel.rank()]
    for step, batch in enumerate(found):
        stream_B = torch.tensor(streams).repeat_interleave(torch.tensor(batch.stream_rows))
        quiet_B = (stream_B >= 6) | (step == WITHOUT_CLICKS)
        labels = batch.labels
        labels["click"][quiet_B], labels["dwell"][quiet_B] = 0.0, float("nan")
        unknown_B = (stream_B % 2 == 1) | (step == WITHOUT_CLICKS)
        labels["conversion"] = torch.where(unknown_B, float("nan"), 1.0 - labels["click"])
    return found


def state_of(run: Run, overrides: list[str]) -> TrainState:
    experiment = parse_experiment(apply_overrides(run.experiment.model_dump(mode="json"), overrides))
    model = MultiTaskModel(experiment, run.encoder, run.labels, torch.device("cpu"))
    return build_state(experiment, model, run.labels, batch_size=128, total_steps=100, device=torch.device("cpu"))


def column_sums(state: TrainState) -> Tensor:
    """The sums over the rows of each table, side by side; this rank's share of them."""
    found = []
    sharded, replicated = state.tables.weights(), state.model.embeddings.replicated_tables.embedding_bags
    for name, spec in sorted(state.model.embeddings.specs.items()):
        total = torch.zeros(spec.dim, dtype=torch.float64)
        for shard in sharded[name].local_shards() if name in sharded else ():
            start, width = shard.metadata.shard_offsets[1], shard.metadata.shard_sizes[1]
            total[start : start + width] += shard.tensor.double().sum(0)
        if module_name(name) in replicated:
            total += replicated[module_name(name)].weight.detach().double().sum(0) / parallel.world_size()
        found.append(total)
    return torch.cat(found)


def expected_changes(state: TrainState, batch: Batch, gradient_BD: Tensor) -> Tensor:
    """What one SGD step adds to the column sums: a bag hands its gradient on whole, unless it is empty. This rank's share."""
    embeddings, found = state.model.embeddings, {}
    parts = gradient_BD.split([embeddings.num_dense, *embeddings.feature_dims], dim=1)[1:]
    for name, part_BD in zip(embeddings.feature_names, parts, strict=True):
        filled_B = batch.sparse[name].lengths() > 0
        found[name] = -RATE * (part_BD.double() * filled_B[:, None]).sum(0)
    return torch.cat([found[name] for name in sorted(found)])


def trained(run: Run, batches: list[Batch], overrides: list[str]) -> dict[str, Any]:
    """Weights of all steps, the model after them, and how often and how far the tables were moved."""
    torch.manual_seed(parallel.rank())  # nothing may depend on the global generator
    state = state_of(run, overrides)
    gradients: list[Tensor] = []  # that reached x_BD, and with it the fused tables

    def watch(module: torch.nn.Module, inputs: Any, x_BD: Tensor) -> None:
        x_BD.register_hook(gradients.append)

    state.model.embeddings.register_forward_hook(watch)
    weights, sums, changes = [], [column_sums(state)], []
    for step, batch in enumerate(batches):
        result = train_step(state, batch)
        assert state.finite
        assert len(gradients) == step + 1, "the tables were updated more than once, or not at all"
        weights.append(result.weights_K.double() / state.task_weights_K.double())
        sums.append(column_sums(state))
        changes.append(expected_changes(state, batch, gradients[-1]))
    moved, expected = parallel.all_reduce_sum(torch.stack([torch.stack(sums).diff(dim=0), torch.stack(changes)]))
    off = float(((moved - expected).abs().max(1).values / expected.abs().max(1).values).max())
    dense = torch.cat([p.detach().flatten() for p in state.model.dense.parameters()])
    rows = {name: parallel.gather_objects(_rows(sharded)) for name, sharded in state.tables.weights().items()}
    return {"weights": torch.stack(weights), "dense": dense, "tables": _whole(rows), "off": off}


def _rows(sharded: Any) -> list[tuple[int, int, Tensor]]:
    return [(*shard.metadata.shard_offsets, shard.tensor.detach().clone()) for shard in sharded.local_shards()]


def _whole(rows: dict[str, Any]) -> dict[str, Tensor]:
    """{table: all its rows}, on rank 0."""
    found = {}
    for name, parts in rows.items():
        if parts is not None:
            shards = sorted((shard for part in parts for shard in part), key=lambda shard: shard[1])
            found[name] = torch.cat([tensor for _, _, tensor in shards], dim=1)
    return found


def all_methods(folder: str) -> dict[str, dict[str, Any]]:
    with parallel.process_group(torch.device("cpu")):
        run = Run(Path(folder))
        batches = batches_of(run)
        clicks = [float(batch.labels["click"].sum()) for batch in batches]
        return {"clicks": clicks, **{name: trained(run, batches, overrides) for name, overrides in variants().items()}}


def test_every_method_agrees_on_one_two_and_four_ranks(tmp_path: Path) -> None:
    run = small_run(tmp_path, *OVERRIDES, rows=2_600)
    one = run_ranks(1, all_methods, str(run.folder), folder=tmp_path)[0]
    for name in variants():
        weights = one[name]["weights"]
        if name.split()[0] not in ("static", "scheduled"):
            assert (weights - weights[0]).abs().max() > 1e-4, f"{name} does nothing in this test"
        assert one[name]["off"] < 1e-3, f"{name}: tables did not move by one step of SGD"
    for world_size in (2, 4):
        several = run_ranks(world_size, all_methods, str(run.folder), folder=tmp_path)
        clicks = torch.tensor([rank["clicks"] for rank in several])
        assert (clicks.max(0).values - clicks.min(0).values).mean() > 5, "ranks should have unequal numbers of clicks"
        for name in variants():
            for rank in several:
                place = f"{name} on {world_size} ranks: {{}}".format
                assert_close(rank[name]["weights"], one[name]["weights"], rtol=1e-6, atol=1e-6, msg=place)
                assert_close(rank[name]["dense"], one[name]["dense"], rtol=0, atol=1e-5, msg=place)
                assert rank[name]["off"] < 1e-3, f"{name} on {world_size} ranks: tables did not move by one step of SGD"
            for table, rows in one[name]["tables"].items():
                assert_close(several[0][name]["tables"][table], rows, rtol=0, atol=1e-5, msg=f"{name}, {table}")
