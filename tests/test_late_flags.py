"""Flags that are read one step late, as on a GPU: the same training as with flags that are read at once."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logs import HUGE, experiment_tree, write_log, write_poisoned_log
from runs import small_run, train_on

import mtrec.train
from mtrec import parallel
from mtrec.batch import Batch
from mtrec.checkpoint import find, folder_of, read
from mtrec.events import Ended, NotFiniteError, Step
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.run import Run
from mtrec.sources import open_source
from mtrec.step import TrainState, build_state, train_step
from mtrec.train import Progress, make_reader, train

CPU = torch.device("cpu")
RARE = ("training.log_every=5", "training.checkpoint_every=100", "data.shuffle=false", "data.num_streams=1")
REPLICATED = ("features.tags.sharding=data_parallel",)


def late_state(*arguments: Any, **options: Any) -> TrainState:
    state = build_state(*arguments, **options)
    state.flags.late = True
    return state


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it: runs read their flags late from then on."""
    return lambda: monkeypatch.setattr(mtrec.train, "build_state", late_state)


def told(run: Run) -> list[dict[str, Any]]:
    """What a run says of its logged steps, without how long they took."""
    found = [dataclasses.asdict(event) for event in train(run, device=CPU) if isinstance(event, Step)]
    return [{key: value for key, value in each.items() if key not in ("rows_per_second", "data_wait")} for each in found]


def saved(run: Run) -> dict[str, torch.Tensor]:
    return read(find(run.checkpoints)[0].folder)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], but: str = "nothing") -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first if not key.endswith(but))


@pytest.mark.parametrize("poisoned", [(), (4, 7, 8)], ids=["finite", "poisoned"])
@pytest.mark.parametrize("dense", ["adamw", "adam", "sgd"])
def test_the_same_weights_and_log_as_at_once(
    tmp_path: Path, late: Callable[[], None], dense: str, poisoned: tuple[int, ...]
) -> None:
    tree = write_poisoned_log(tmp_path, poisoned)
    options = (*RARE, *REPLICATED, f"optimizer.dense.kind={dense}", "balancing.weights={dwell: 0.3}")
    first, second = (small_run(tmp_path, *options, tree=tree) for _ in range(2))
    at_once = told(first)
    late()
    assert told(second) == at_once
    assert [event["nonfinite_steps"] for event in at_once] == [sum(bad <= step for bad in poisoned) for step in (5, 10, 13)]
    # the number of steps that torch's Adagrad keeps for tables on every rank (and does not use) counts all steps
    assert same(saved(first), saved(second), but="tables_state.tags.step" if poisoned else "nothing")


@pytest.mark.parametrize("balancing", ["static", "gradnorm"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path: Path, balancing: str) -> None:
    every = () if balancing == "static" else ("balancing.every=1",)
    run = small_run(tmp_path, *REPLICATED, f"balancing.kind={balancing}", *every, "optimizer.dense.kind=adam")
    with parallel.process_group(CPU):
        model = MultiTaskModel(run.experiment, run.encoder, run.labels, CPU)
        state = late_state(run.experiment, model, run.labels, batch_size=128, total_steps=50, device=CPU)
        before: dict[str, torch.Tensor] = {}
        for step, batch in zip(range(1, 5), batches(run, model), strict=False):
            weight_B = torch.full((batch.num_rows,), HUGE if step == 3 else 1.0)
            train_step(state, dataclasses.replace(batch, sample_weight_B=weight_B))
            assert (state.known_step, state.finite) == (step - 1, step != 4)
            after = flat(state)
            moved = [key for key, value in after.items() if not torch.equal(value, before.get(key, value))]
            if step == 3:
                assert moved == []
            elif step > 1:
                assert {"tables.user_id", "tables.tags", "dense.heads.head_click.weight"} <= set(moved)
            before = after
        assert (state.nonfinite_in_a_row, state.nonfinite_steps) == (1, 1)
        state.read_flags(wait=True)
        assert (state.known_step, state.nonfinite_in_a_row, state.nonfinite_steps) == (4, 0, 1)
        assert {float(values["step"]) for values in state.dense_optimizer.state.values()} == {3.0}


def batches(run: Run, model: MultiTaskModel) -> Iterator[Batch]:
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    for _, batch in feed(make_reader(run, data, Progress()), run.encoder, labels_of(run.experiment, model.specs)):
        yield batch


def flat(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of everything that a checkpoint holds, without the number of steps that Adagrad keeps."""
    found = {}
    for key, value in state.tensors().items():
        if not key.endswith("tags.step") and not key.startswith("balancer."):
            shards = value.local_shards() if hasattr(value, "local_shards") else []
            found[key] = torch.stack([each.tensor for each in shards]).clone() if shards else value.clone()  # type: ignore[attr-defined]
    return found


def test_too_many_in_a_row_end_the_run_one_step_later_and_name_the_file(tmp_path: Path, late: Callable[[], None]) -> None:
    tree = write_poisoned_log(tmp_path, (5, 6, 7))
    folder = tmp_path / "train"
    whole = pq.read_table(folder / "part-0.parquet")
    pq.write_table(whole.slice(0, 7 * 128), folder / "part-0.parquet")
    pq.write_table(whole.slice(7 * 128), folder / "part-1.parquet")  # the rows of step 8, when it is known
    never = ("training.log_every=100", "training.max_nonfinite_steps=3")
    run = small_run(tmp_path, *RARE, *never, tree=tree)
    late()
    with pytest.raises(NotFiniteError, match=r"3 steps in a row .*\(up to step 7\).*part-0.parquet:"):
        list(train(run, device=CPU))


@pytest.mark.parametrize("log_gradients", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_the_log_says_which_tasks_constant_weights_stood_for(
    tmp_path: Path, late: Callable[[], None], at_once: bool, log_gradients: bool
) -> None:
    present = [False, False, True, True, False, True, False, False, True, False, True, True, False]  # dwell, by step
    whole = pa.concat_tables([pq.read_table(path) for path in sorted(write_log(tmp_path / "clean", 1_600).glob("*"))])
    dwell = [value if present[row // 128] else None for row, value in enumerate(whole["dwell_seconds"].to_pylist())]
    field, place = whole.schema.field("dwell_seconds"), whole.schema.get_field_index("dwell_seconds")
    (tmp_path / "train").mkdir()
    pq.write_table(whole.set_column(place, field, pa.array(dwell, field.type)), tmp_path / "train" / "part-0.parquet")
    options = ("training.log_every=1", "balancing.weights={dwell: 0.3}", f"balancing.log_gradients={log_gradients}")
    run = small_run(tmp_path, *RARE, *options, "balancing.every=4", tree=experiment_tree(tmp_path / "train"))
    if not at_once:
        late()
    logged = told(run)
    assert [event["balancing"]["weighed/dwell"] for event in logged] == present
    assert {event["balancing"]["weighed/click"] for event in logged} == {1.0}
    assert {event["balancing"]["weight/dwell"] for event in logged} == {0.3}
    assert len({event["weights"]["dwell"] for event in logged}) == 1


def test_a_last_step_that_is_not_finite_counts(tmp_path: Path, late: Callable[[], None]) -> None:
    tree = write_poisoned_log(tmp_path, (13,))
    late()
    run = small_run(tmp_path, *RARE, "training.log_every=100", "training.max_nonfinite_steps=1", tree=tree)
    with pytest.raises(NotFiniteError, match=r"1 steps in a row .*\(up to step 13\)"):
        list(train(run, device=CPU))


def test_a_request_to_stop_is_followed_one_step_later_and_costs_nothing(tmp_path: Path, late: Callable[[], None]) -> None:
    options = ("training.log_every=100", "training.checkpoint_every=100", "training.keep_last=9")
    stopped, whole = small_run(tmp_path, *options), small_run(tmp_path, *options)
    late()
    stops = iter([False] * 14 + [True] * 99)
    ended = list(train(stopped, device=CPU, stop_requested=lambda: next(stops)))[-1]
    assert isinstance(ended, Ended)
    assert (ended.reason, ended.step) == ("stopped", 16)  # asked in step 15
    assert [found.step for found in find(stopped.checkpoints)] == [16]
    list(train(stopped, device=CPU, resume_from=find(stopped.checkpoints)[0]))
    list(train(whole, device=CPU))
    assert same(read(folder_of(stopped.checkpoints, 32)), read(folder_of(whole.checkpoints, 32)))


def trained_late(folder: str) -> dict[str, Any]:
    mtrec.train.build_state = late_state
    return {"logged": told(Run(Path(folder)))}


def test_two_ranks_agree_on_what_they_read_late(tmp_path: Path) -> None:
    from ranks import run_ranks

    tree = write_poisoned_log(tmp_path, (4, 7, 8))
    options = (*RARE, "data.num_streams=2")
    first, second = (small_run(tmp_path, *options, tree=tree) for _ in range(2))
    train_on(2, first)
    one, other = run_ranks(2, trained_late, str(second.folder), folder=tmp_path / "ranks")
    assert [event["nonfinite_steps"] for event in one["logged"]] == [event["nonfinite_steps"] for event in other["logged"]]
    assert one["logged"][-1]["nonfinite_steps"] > 0
    assert same(saved(first), saved(second))
