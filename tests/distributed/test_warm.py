"""Warm start: yesterday's weights under tomorrow's vocabularies, features and tasks, on any number of ranks."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logs import experiment_tree, write_log
from ranks import run_ranks
from runs import gathered, small_run, train_on

from mtrec import parallel, warm
from mtrec.batch import make_batch
from mtrec.checkpoint import read
from mtrec.events import Ended
from mtrec.features import FIRST_ROW, Table
from mtrec.model import MultiTaskModel
from mtrec.predictions import load_model
from mtrec.run import Run
from mtrec.step import build_state
from mtrec.train import train
from mtrec.warm import warm_start

SHARDINGS = (
    "features.user_id.sharding=column_wise",
    "features.user_id.num_column_shards=2",
    "features.tags.sharding=data_parallel",
    "balancing.kind=uncertainty",
)


def write_grown_log(folder: Path, old: Path) -> Path:
    """The old rows, and as many with a third of the users and items new: vocabularies grow by more than 30 %."""
    before = pa.concat_tables([pq.read_table(path) for path in sorted(old.glob("*.parquet"))])
    users, items = before["user_id"].to_numpy(), np.array(before["item_id"].to_pylist())
    fresh = np.unique(users)[::3]
    users = np.where(np.isin(users, fresh), users + 1_000_003, users)
    items = np.where(np.isin(items, np.unique(items)[::3]), np.char.add("new", items), items)
    after = before.set_column(1, "user_id", pa.array(users)).set_column(2, "item_id", pa.array(items.tolist()))
    folder.mkdir()
    pq.write_table(pa.concat_tables([before, after]), folder / "part-0.parquet", row_group_size=500)
    return folder


def predicted(folder: str, previous: str | None, rows: str) -> dict[str, Any]:
    """Logits of the rows and the whole state: of the run's best checkpoint, or warm from another run before its first step."""
    torch.set_num_threads(1)
    run, device = Run(Path(folder)), torch.device("cpu")
    batch = make_batch(pq.read_table(rows).combine_chunks().to_batches()[0], run.encoder, {}, None)
    with parallel.process_group(device):
        if previous is None:
            model, state, notes = load_model(run, run.best(), device), read(run.best().folder), None
        else:
            model = MultiTaskModel(run.experiment, run.encoder, run.labels, device)
            built = build_state(run.experiment, model, run.labels, batch_size=128, total_steps=10, device=device)
            notes = warm_start(built, run, Run(Path(previous))).notes
            state = gathered(built, run.folder / "gathered")
            model.eval()
        with torch.no_grad():
            return {"logits": model(batch), "state": state, "notes": notes}


def on_ranks(world_size: int, run: Run, previous: Run | None, rows: Path) -> dict[str, Any]:
    arguments = (str(run.folder), str(previous.folder) if previous else None, str(rows))
    return run_ranks(world_size, predicted, *arguments, folder=run.folder)[0]


@pytest.fixture(scope="module")
def yesterday(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    folder = tmp_path_factory.mktemp("warm")
    run = small_run(folder, *SHARDINGS)
    train_on(2, run)
    return folder, run


def test_old_ids_keep_rows_state_and_predictions_when_vocabularies_grow(yesterday: tuple[Path, Run], tmp_path: Path) -> None:
    _, before = yesterday
    old_log = Path(str(before.experiment.data.train.path))
    tree = experiment_tree(write_grown_log(tmp_path / "log", old_log))
    after = small_run(tmp_path, *SHARDINGS, tree=tree, previous=before)
    old_sizes = {table.name: table for table in before.encoder.tables}
    new_sizes = {table.name: table for table in after.encoder.tables}
    for name in ("user_id", "item_id"):
        assert new_sizes[name].vocabulary_size >= 1.3 * old_sizes[name].vocabulary_size
        assert new_sizes[name].num_embeddings > old_sizes[name].num_embeddings

    rows = old_log / "part-1.parquet"
    old = on_ranks(1, before, None, rows)
    new = on_ranks(3, after, before, rows)
    alone = on_ranks(1, small_run(tmp_path, *SHARDINGS, tree=tree, previous=before), before, rows)
    for task, logits in old["logits"].items():
        assert torch.equal(new["logits"][task], logits), task
        assert torch.equal(alone["logits"][task], logits), task
    for key, value in new["state"].items():
        assert torch.equal(value, alone["state"][key]), f"{key} depends on the number of ranks"
        if not key.startswith("tables"):
            if not key.startswith("balancer"):
                assert torch.equal(value, old["state"][key]), key
            continue
        table = old_sizes[key.split(".")[1]]
        known = FIRST_ROW + table.vocabulary_size
        if key.endswith("step"):
            assert value == old["state"][key] > 0
            continue
        # a row-wise moment of a column-wise table is kept shard after shard
        now = value.view(2, -1).T if value.dim() == 1 and "user_id" in key else value
        then = old["state"][key].view(2, -1).T if value.dim() == 1 and "user_id" in key else old["state"][key]
        assert torch.equal(now[:known], then[:known]), key
        if key.startswith("tables_state"):
            assert then[:known].count_nonzero() > known / 2
            assert now[known:].count_nonzero() == 0
        else:
            assert 0.005 < now[known:].std() < 0.015, "rows of new ids have initial values"


def test_features_and_tasks_come_and_go_by_name(yesterday: tuple[Path, Run], tmp_path: Path) -> None:
    folder, before = yesterday
    log = folder / "log-4000" / "train"
    tree: dict[str, Any] = experiment_tree(log)
    features = tree["features"]
    del features["item_id"], features["age"]
    tree["features"] = {"again": {"kind": "categorical", "column": "item_id"}, **features}  # first: all columns move
    tree["tasks"] = {
        "dwell": {"kind": "dwell", "label": "dwell_seconds"},
        "late": {"kind": "binary", "label": "conversion"},
        "click": {"kind": "binary"},
    }
    after = small_run(tmp_path, *SHARDINGS, "optimizer.tables.kind=adagrad", tree=tree, previous=before)
    rows = log / "part-1.parquet"
    old, new = on_ranks(1, before, None, rows)["state"], on_ranks(2, after, before, rows)
    state, notes = new["state"], new["notes"]
    for note in (
        "features.item_id: removed",
        "features.age: removed",
        "table item_id: dropped",
        "table again: begins anew",
        "tasks.conversion: dropped",
        "heads.head_late.weight: begins anew",
    ):
        assert note in notes
    # columns before: age, age's flag, price | user_id 8, item_id 8 (sharded), tags 8 (on every rank)
    # columns now:    price | again 8, user_id 8, tags 8
    assert before.encoder.dense_names[-1].startswith("price")
    assert len(before.encoder.dense_names) == 3
    new_places = [0, *range(9, 25)]
    old_places = [2, *range(3, 11), *range(19, 27)]
    for key in ("interaction.down.0.weight", "architecture.experts.linears.0.weight"):
        for kind in (f"dense.{key}", f"dense_state.{key}.exp_avg_sq"):
            assert torch.equal(state[kind][..., new_places], old[kind][..., old_places]), kind
        assert state[f"dense_state.{key}.exp_avg_sq"][..., 1:9].count_nonzero() == 0
    up = "dense.interaction.up.0.weight"
    assert torch.equal(state[up][new_places], old[up][old_places])
    gates = "dense.architecture.task_gates.linear.weight"  # (K, E, D): click, conversion, dwell -> dwell, late, click
    assert torch.equal(state[gates][[0, 2]][..., new_places], old[gates][[2, 0]][..., old_places])
    towers = "dense.towers.mlps.0.linears.0.weight"
    assert torch.equal(state[towers][[0, 2]], old[towers][[2, 0]])
    assert not torch.equal(state[towers][1], old[towers][1])
    for name in ("click", "dwell"):
        assert torch.equal(state[f"dense.heads.head_{name}.weight"], old[f"dense.heads.head_{name}.weight"])
    # row-wise Adagrad's number, the mean over a shard's columns, becomes every column's
    moment = old["tables_state.user_id.momentum1"].view(2, -1).T
    assert torch.equal(state["tables_state.user_id.momentum1"], moment.repeat_interleave(4, 1))
    assert torch.equal(state["tables_state.tags.sum"], old["tables_state.tags.sum"].expand(-1, 8))


def warm_from(before: Run, after: Run) -> tuple[dict[str, Any], tuple[str, ...]]:
    """State and notes of a run that starts from another one, before its first step, in this process."""
    device = torch.device("cpu")
    with parallel.process_group(device):
        model = MultiTaskModel(after.experiment, after.encoder, after.labels, device)
        built = build_state(after.experiment, model, after.labels, batch_size=128, total_steps=10, device=device)
        notes = warm_start(built, after, before).notes
        state = gathered(built, after.folder / "gathered")
    assert state is not None
    return state, notes


@pytest.mark.parametrize(
    ("override", "anew"),
    [
        ("tasks.dwell.loss=poisson", True),  # another function of the logit
        ("tasks.dwell.loss={kind: huber, on: seconds}", True),
        ("tasks.dwell.unit=milliseconds", True),  # labels a thousand times smaller
        ("tasks.dwell.cap_seconds=60", False),
        ("tasks.dwell.weight=2", False),
    ],
)
def test_a_head_whose_logits_meant_something_else_begins_anew(
    yesterday: tuple[Path, Run], override: str, anew: bool
) -> None:
    folder, before = yesterday
    _, notes = warm_from(before, small_run(folder, override, previous=before))
    assert [note for note in notes if "heads." in note] == (
        ["heads.head_dwell.weight: begins anew", "heads.head_dwell.bias: begins anew"] if anew else []
    )


def test_another_sharding_keeps_rows_and_state(yesterday: tuple[Path, Run], tmp_path: Path) -> None:
    folder, before = yesterday
    log = folder / "log-4000" / "train"
    swapped = ("features.tags.sharding=table_wise", "features.user_id.sharding=data_parallel")
    after = small_run(tmp_path, *swapped, tree=experiment_tree(log), previous=before)
    rows = log / "part-1.parquet"
    old, new = on_ranks(1, before, None, rows), on_ranks(2, after, before, rows)
    for task, logits in old["logits"].items():  # the columns of x_BD stand in another order: another order of additions
        torch.testing.assert_close(new["logits"][task], logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(new["state"]["tables_state.tags.momentum1"], old["state"]["tables_state.tags.sum"].flatten())
    mean = old["state"]["tables_state.user_id.momentum1"].view(2, -1).mean(0)
    torch.testing.assert_close(new["state"]["tables_state.user_id.sum"][:, 0], mean)


def test_tasks_in_another_order_keep_what_is_theirs(yesterday: tuple[Path, Run], tmp_path: Path) -> None:
    folder, before = yesterday
    tree: dict[str, Any] = experiment_tree(folder / "log-4000" / "train")
    tree["tasks"] = dict(reversed(tree["tasks"].items()))
    old = read(before.best().folder)
    state, notes = warm_from(before, small_run(tmp_path, *SHARDINGS, tree=tree, previous=before))
    assert not [note for note in notes if "begins anew" in note]
    for name in ("architecture.task_gates.linear.weight", "towers.mlps.0.linears.0.weight", "towers.mlps.0.linears.0.bias"):
        for key in (f"dense.{name}", f"dense_state.{name}.exp_avg_sq"):
            assert torch.equal(state[key], old[key].flip(0)), key
            assert not torch.equal(old[key], old[key].flip(0)), key


@pytest.mark.parametrize(("old", "new"), [(1, 2), (2, 1)])
def test_another_number_of_experts_a_task_begins_anew(tmp_path: Path, old: int, new: int) -> None:
    kinds = [f"model.architecture={{kind: cgc, num_task_experts: {number}, expert_layers: [8]}}" for number in (old, new)]
    before, after = (small_run(tmp_path, kind, rows=600) for kind in kinds)
    columns = len(warm.input_columns(before.encoder))
    stored = warm._shapes(before.experiment, columns, warm.task_specs(before.experiment))
    axes = warm._Axes(after, before)
    fresh = {name for name, shape in stored.items() if axes.pairs(name, tuple(shape)) is None}
    own = {"architecture.level.task_experts.linears.0.weight", "architecture.level.task_experts.linears.0.bias"}
    assert fresh == {*own, "architecture.level.task_gates.linear.weight"}


def test_state_of_another_kind_of_optimizer_begins_anew(
    yesterday: tuple[Path, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, before = yesterday
    monkeypatch.setattr(warm, "ADAGRAD", ("adagrad",))  # as if the runs' row-wise one were Adam, which a CPU does not have
    state, notes = warm_from(before, small_run(folder, previous=before))
    assert "table user_id: optimizer state 'momentum1' begins anew" in notes
    assert not any(state[key].any() for key in state if key.startswith("tables_state."))
    assert torch.equal(state["tables.user_id"], read(before.best().folder)["tables.user_id"])


BUCKETS = Table("price", 6, 2, ("price",), "sum", False, "auto", 1, 0.01, vocabulary_size=4, encoding="bucketized")
HASHED = dataclasses.replace(BUCKETS, encoding="hash")


@pytest.mark.parametrize(
    ("old", "new", "boundaries", "anew"),
    [
        (BUCKETS, BUCKETS, (1.0, 2.0, 3.0), False),
        (BUCKETS, BUCKETS, (1.0, 2.0, 3.5), True),
        (BUCKETS, dataclasses.replace(BUCKETS, num_embeddings=7, vocabulary_size=5), (1.0, 2.0, 3.0, 4.0), True),
        (HASHED, HASHED, (), False),
        (HASHED, dataclasses.replace(HASHED, num_embeddings=7, vocabulary_size=5), (), True),
        (HASHED, dataclasses.replace(HASHED, encoding="identity"), (), True),
    ],
)
def test_rows_that_now_mean_other_values_begin_anew(
    old: Table, new: Table, boundaries: tuple[float, ...], anew: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = SimpleNamespace(tables=[old], states={"price": {"boundaries": (1.0, 2.0, 3.0)}})
    now = SimpleNamespace(tables=[new], states={"price": {"boundaries": boundaries}})
    stored, weight = torch.arange(12.0).view(6, 2), torch.zeros(new.num_embeddings, 2)
    monkeypatch.setattr(warm.checkpoint, "read_keys", lambda folder, keys: dict.fromkeys(keys, stored))
    notes = warm._tables({"tables.price": weight}, now, before, tmp_path, {}, keep_state=True)  # type: ignore[arg-type]
    assert notes == (["table price: begins anew"] if anew else [])
    assert torch.equal(weight, torch.zeros_like(weight) if anew else stored)


def test_a_rank_without_a_shard_holds_no_part() -> None:
    class Sharded(torch.Tensor):  # as torchrec's sharded tensors, which are Tensors, too
        shards: list[int]

        def local_shards(self) -> list[int]:
            return self.shards

    tensor = Sharded()
    for shards in ([], [1]):
        tensor.shards = list(shards)
        assert warm._held(tensor) == bool(shards)
    assert warm._held(torch.zeros(1))


def test_another_dimension_and_a_run_without_checkpoint_are_errors(yesterday: tuple[Path, Run], tmp_path: Path) -> None:
    folder, before = yesterday
    tree = experiment_tree(folder / "log-4000" / "train")
    with pytest.raises(ValueError, match=r"`features.user_id.dim` should be 8, as in the run that this one starts from"):
        small_run(tmp_path, "model.embedding_dim=16", tree=tree, previous=before)
    follows = small_run(tmp_path, "model.embedding_dim=auto", tree=tree, previous=before)
    assert follows.experiment.model.embedding_dim == 8
    with pytest.raises(ValueError, match="holds no valid checkpoint"):
        small_run(tmp_path, tree=tree, previous=follows)


def test_a_run_that_was_made_anew_since_is_no_start(tmp_path: Path) -> None:
    before = small_run(tmp_path / "first", "training.max_steps=2", rows=600)
    train_on(1, before)
    run = small_run(tmp_path / "second", "training.max_steps=1", rows=700, previous=before)
    shutil.rmtree(before.folder)
    other = write_log(tmp_path / "other", 700, seed=4)
    again = small_run(tmp_path / "first", "training.max_steps=2", tree=experiment_tree(other))
    assert again.folder == before.folder
    train_on(1, again)
    words = rf"{before.folder} should hold the run whose vocabularies {run.folder} was prepared from"
    with pytest.raises(ValueError, match=words):
        list(train(run, device=torch.device("cpu")))
    info = {key: value for key, value in run.info.items() if key != "warm_start_encoder"}
    (run.folder / "run.json").write_text(json.dumps(info))  # as an earlier mtrec wrote it
    assert isinstance(list(train(Run(run.folder), device=torch.device("cpu")))[-1], Ended)


def test_the_command_starts_warm_and_says_what_changed(
    yesterday: tuple[Path, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mtrec.config import parse_experiment
    from mtrec.launch import launch

    _, before = yesterday
    write_log(tmp_path / "new", rows=1_000, seed=3)
    tree: dict[str, Any] = experiment_tree(tmp_path / "new")
    del tree["features"]["tags"]
    run = launch(parse_experiment(tree), output=tmp_path / "run", warm_start=before.folder, local=True)
    said = capsys.readouterr().out
    assert f"starts from the weights of {before.best().folder}" in said.replace("\n", "")
    assert "features.tags: removed" in said
    assert run.info["warm_start"] == str(before.folder)
