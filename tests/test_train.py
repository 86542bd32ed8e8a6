"""What the training options do: epochs with new tables, early stopping, bf16, weights of rows, rates, clipping."""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from logs import experiment_tree, write_log
from ranks import run_ranks
from runs import small_run, trained
from torch import Tensor
from torch.testing import assert_close

import mtrec.evaluate
import mtrec.train
from mtrec import parallel
from mtrec.batch import Batch
from mtrec.checkpoint import Checkpoint, Saver, find, read
from mtrec.events import Ended, Saved, Step, Validation
from mtrec.experiment import Training
from mtrec.meter import gate_statistics
from mtrec.row_order import ROW_ORDER
from mtrec.run import Run, open_run
from mtrec.step import StepResult, TrainState, build_state, train_step
from mtrec.train import reading_threads, train

CPU = torch.device("cpu")


def events(run: Run) -> list[Any]:
    return list(train(run, device=CPU))


def test_reset_tables_starts_the_tables_anew_and_keeps_the_dense_part(tmp_path: Path) -> None:
    frozen = (
        "optimizer.tables.learning_rate=1e-30",
        "training.epochs=2",
        "training.keep_last=5",
        "features.tags.sharding=data_parallel",
    )
    run = small_run(tmp_path, *frozen, "training.reset_tables=every_epoch")
    events(run)
    second, first = (read(found.folder) for found in find(run.checkpoints))
    for table in ("tables.user_id", "tables.item_id", "tables.tags"):
        assert not torch.equal(first[table], second[table])
        assert first[table].std() == pytest.approx(0.01, rel=0.2)
        assert second[table].std() == pytest.approx(0.01, rel=0.2)
    plain = small_run(tmp_path, *frozen)
    events(plain)
    assert_close(read(find(plain.checkpoints)[0].folder)["tables.user_id"], first["tables.user_id"])


def test_reading_threads_change_nothing_but_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, kind, threads in ((16, "cpu", 1), (16, "cuda", 4), (3, "cuda", 2), (1, "cuda", 1)):
        monkeypatch.setattr("os.sched_getaffinity", lambda process, cores=cores: set(range(cores)))
        assert reading_threads(Training(), torch.device(kind)) == threads
    monkeypatch.undo()
    seen: list[set[str]] = []
    weights = []
    for threads in (1, 3):
        run = small_run(tmp_path, f"training.reading_threads={threads}", "data.shuffle_window=64")
        seen.append(set())
        for _ in train(run, device=CPU):
            seen[-1] |= {each.name for each in threading.enumerate() if each.name.startswith("mtrec-reader")}
        weights.append(read(find(run.checkpoints)[0].folder))
    assert len(seen[0]) == 1 < len(seen[1]) <= 3
    assert_close(weights[0], weights[1], rtol=0, atol=0)


@pytest.mark.parametrize("reset", ["never", "every_epoch"])
def test_adam_of_the_tables_counts_steps_and_not_look_ups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reset: str) -> None:
    states: list[TrainState] = []

    def with_adam(*arguments: Any, **options: Any) -> TrainState:
        states.append(build_state(*arguments, **options))
        states[-1].tables_use_adam = True  # as far as the count goes: fbgemm has no Adam on a CPU
        return states[-1]

    def counts(resume_from: Checkpoint | None = None) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}

        def counted_step(state: TrainState, *arguments: Any, **options: Any) -> StepResult:
            result = train_step(state, *arguments, **options)
            lookups = [lookup for _, module in state.tables._modules() for lookup in module._lookups]
            found[state.step] = {int(each.emb_module.iter_cpu) for lookup in lookups for each in lookup._emb_modules}
            return result

        monkeypatch.setattr(mtrec.train, "train_step", counted_step)
        for _ in train(run, device=CPU, resume_from=resume_from):
            pass
        return found

    monkeypatch.setattr(mtrec.train, "build_state", with_adam)
    options = ("training.log_every=1", "training.validate_every=3", "training.keep_last=20", "training.epochs=2")
    run = small_run(tmp_path, *options, f"training.reset_tables={reset}")
    whole = counts()
    epoch = len(whole) // 2
    again = reset == "every_epoch"
    assert whole == {step: {step - epoch if again and step > epoch else step} for step in range(1, 2 * epoch + 1)}
    late = next(found for found in find(run.checkpoints) if epoch < found.step < 2 * epoch)
    resumed = counts(late)
    assert resumed == {step: whole[step] for step in range(late.step + 1, 2 * epoch + 1)}


def test_an_epoch_that_was_shuffled_in_another_way_is_not_gone_on_with(tmp_path: Path) -> None:
    stops = ("training.max_steps=7", "training.checkpoint_every=3", "training.keep_last=9")
    run = small_run(tmp_path, "data.validation=null", *stops)
    events(run)

    def of_before(checkpoint: Checkpoint, **position: int) -> Checkpoint:
        progress = {name: value for name, value in checkpoint.state["progress"].items() if name != "row_order"} | position
        return replace(checkpoint, state={**checkpoint.state, "progress": progress})

    ended, *_, early = find(run.checkpoints)
    assert (early.step, early.state["progress"]["next_batch"]) == (3, 3)
    with pytest.raises(ValueError, match=r"step-0*3 stands within an epoch whose rows .* in another way .* --warm-start"):
        list(train(run, device=CPU, resume_from=of_before(early)))
    for fine in (early, of_before(early, epoch=0, next_batch=0), of_before(ended)):  # as now, between epochs, at the end
        *_, last = train(run, device=CPU, resume_from=fine)
        assert last.step == 7
        assert all(each.state["progress"]["row_order"] == ROW_ORDER for each in find(run.checkpoints))
    as_they_lie = small_run(tmp_path, "data.validation=null", "data.shuffle=false", *stops)
    events(as_they_lie)
    *_, early = find(as_they_lie.checkpoints)
    *_, last = train(as_they_lie, device=CPU, resume_from=of_before(early))
    assert last.step == 7


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path) -> None:
    run = small_run(
        tmp_path,
        "training.epochs=30",
        "training.early_stopping={patience: 2}",
        "training.best_metric=click/auc",
        "training.keep_last=1",
    )
    seen = events(run)
    ended = seen[-1]
    assert isinstance(ended, Ended)
    assert ended.reason == "early_stopping"
    metrics = {event.step: event.metrics["tasks"]["click"]["auc"] for event in seen if isinstance(event, Validation)}
    assert len(metrics) < 30
    assert ended.best_step == max(metrics, key=lambda step: metrics[step])
    assert run.best().step == ended.best_step
    assert len(list(metrics)) == len([e for e in seen if isinstance(e, Saved)])
    assert {found.step for found in find(run.checkpoints)} == {ended.best_step, ended.step}  # keep_best 1 and keep_last 1


@pytest.mark.parametrize("metric", ["null", "like/share/auc"])
def test_a_task_may_have_a_slash_in_its_name(tmp_path: Path, metric: str) -> None:
    tree: dict[str, Any] = experiment_tree(write_log(tmp_path / "t", rows=600), write_log(tmp_path / "v", rows=300, seed=1))
    tree["tasks"] = {"like/share": {"kind": "binary", "label": "click"}, "click": {"kind": "binary"}}
    seen = events(small_run(tmp_path, "training.epochs=2", f"training.best_metric={metric}", tree=tree))
    found = [event.metrics["tasks"]["like/share"]["auc"] for event in seen if isinstance(event, Validation)]
    assert all(value is not None for value in found)
    assert seen[-1].best_step is not None


def test_the_best_step_is_kept_wherever_checkpoints_fall(tmp_path: Path) -> None:
    run = small_run(tmp_path, "training.epochs=3", "training.checkpoint_every=20", "training.best_metric=click/log_loss")
    seen = events(run)
    losses = {event.step: event.metrics["tasks"]["click"]["log_loss"] for event in seen if isinstance(event, Validation)}
    assert list(losses) == [32, 64, 96]
    best = min(losses, key=lambda step: losses[step])  # of an error, the smallest
    assert isinstance(seen[-1], Ended)
    assert seen[-1].best_step == best
    assert run.best().step == best


def test_a_run_that_stopped_early_has_ended(tmp_path: Path) -> None:
    run = small_run(tmp_path, "training.epochs=30", "training.early_stopping={patience: 1}", "training.best_metric=click/auc")
    ended = events(run)[-1]
    assert ended.reason == "early_stopping"
    again = list(train(run, device=CPU, resume_from=find(run.checkpoints)[0]))
    assert again == [ended]


@pytest.mark.parametrize(
    "end",
    [lambda training: training.throw(KeyboardInterrupt), lambda training: training.close()],
    ids=["Ctrl-C", "a caller that goes away"],
)
def test_a_save_under_way_is_finished_whatever_ends_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[Any], None]
) -> None:
    hashed = Saver._hashed

    def slow(saver: Saver, folder: Path) -> dict[str, Any]:
        time.sleep(0.5)
        return hashed(saver, folder)

    monkeypatch.setattr(Saver, "_hashed", slow)
    run = small_run(tmp_path, "training.checkpoint_every=2", "data.validation=null")
    training = train(run, device=CPU)
    assert next(event for event in training if isinstance(event, Saved)).step == 2
    assert not find(run.checkpoints)
    with contextlib.suppress(KeyboardInterrupt):
        end(training)
    assert [each.step for each in find(run.checkpoints)] == [2]


def test_a_run_that_is_asked_to_stop_at_its_last_step_has_ended(tmp_path: Path) -> None:
    run = small_run(tmp_path, "training.max_steps=3")
    asked = iter([False, False, True])
    *_, ended = train(run, device=CPU, stop_requested=lambda: next(asked))
    assert isinstance(ended, Ended)
    assert ended.reason == "max_steps"


def test_a_module_beside_the_experiment_is_found_by_others(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    import yaml
    from logs import experiment_tree, write_log

    home = tmp_path / "sub"
    home.mkdir()
    (home / "own_net.py").write_text("from mtrec.architectures import MMoE\n\n\nclass Net(MMoE):\n    pass\n")
    log = write_log(tmp_path / "log", rows=600)
    tree = experiment_tree(log, log)
    tree["model"]["architecture"]["kind"] = "own_net:Net"  # type: ignore[index]
    (home / "own.yaml").write_text(yaml.safe_dump(tree))
    mtrec = [sys.executable, "-m", "mtrec.cli"]
    for arguments in (["train", "sub/own.yaml", "--local", "--output", "run"], ["evaluate", "run", "--data", str(log)]):
        where = tmp_path if arguments[0] == "train" else home.parent
        done = subprocess.run(
            [*mtrec, *arguments], cwd=where, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
        )
        assert done.returncode == 0, done.stderr


def test_bf16_stays_close_to_fp32(tmp_path: Path) -> None:
    exact, rough = (trained(str(small_run(tmp_path, f"training.precision={p}").folder)) for p in ("fp32", "bf16"))
    assert not torch.equal(exact["losses"], rough["losses"])
    assert_close(rough["losses"], exact["losses"], rtol=0.02, atol=0.01)


def _with_weight(run_folder: Path, source: Path, weights: np.ndarray) -> Path:
    folder = run_folder / "weighted"
    folder.mkdir()
    table = pa.concat_tables([pq.read_table(path) for path in sorted(source.iterdir())])
    pq.write_table(table.append_column("weight", pa.array(weights[: len(table)])), folder / "all.parquet", row_group_size=500)
    return folder


def test_rows_of_weight_zero_do_not_count(tmp_path: Path) -> None:
    source = small_run(tmp_path).experiment.data.train.path
    weights = np.where(np.arange(4_000) % 3 == 0, 0.0, 2.5)
    folder = _with_weight(tmp_path, Path(str(source)), weights)
    common = (f"data.train={folder}", "training.max_steps=1", "model.interaction=none")
    weighted = trained(str(small_run(tmp_path, *common, "data.sample_weight=weight", "data.validation=null").folder))
    where = f"data.train={{path: {folder}, where: weight > 0}}"
    filtered = trained(str(small_run(tmp_path, *common[1:], where, "data.validation=null").folder))
    # output biases, too, are those of the rows that count
    assert_close(weighted["losses"], filtered["losses"], rtol=1e-4, atol=0.0)
    nothing = _with_weight(tmp_path / "run-0", Path(str(source)), np.zeros(4_000))
    none = trained(
        str(
            small_run(
                tmp_path, f"data.train={nothing}", "data.sample_weight=weight", "data.validation=null", "training.max_steps=2"
            ).folder
        )
    )
    assert none["losses"].abs().sum() == 0.0


def test_expected_denominator_is_the_rate_of_the_fit(tmp_path: Path) -> None:
    run = small_run(tmp_path, "tasks.dwell.denominator=expected", "training.max_steps=1")
    exact = small_run(tmp_path, "training.max_steps=1")
    first, second = trained(str(run.folder)), trained(str(exact.folder))
    rate = run.labels["dwell"].trained / run.labels["dwell"].rows
    assert 0.3 < rate < 0.6
    ratio = float(first["losses"][0, 2] / second["losses"][0, 2])  # clicked rows in this batch / expected ones
    clicked = ratio * rate * 128
    assert clicked == pytest.approx(round(clicked), abs=1e-3)
    assert_close(first["losses"][0, :2], second["losses"][0, :2])


def test_expected_denominator_counts_rows_by_their_weights(tmp_path: Path) -> None:
    source = Path(str(small_run(tmp_path).experiment.data.train.path))
    folder = _with_weight(tmp_path, source, np.full(4_000, 2.5))
    common = (f"data.train={folder}", "tasks.dwell.denominator=expected", "training.max_steps=1", "data.validation=null")
    weighted, plain = (trained(str(small_run(tmp_path, *common, *own).folder)) for own in (["data.sample_weight=weight"], []))
    assert float(plain["losses"][0, 2]) > 0.1
    assert_close(weighted["losses"], plain["losses"], rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_table_gradients_are_clipped_by_value(tmp_path: Path, sharding: str) -> None:
    sgd = ("optimizer.tables.kind=sgd", "optimizer.tables.learning_rate=1.0", f"features.item_id.sharding={sharding}")
    free = small_run(tmp_path, *sgd, "training.max_steps=1", "data.validation=null")
    tight = small_run(tmp_path, *sgd, "optimizer.tables.clip_value=1e-6", "training.max_steps=1", "data.validation=null")
    start = small_run(tmp_path, *sgd, "optimizer.tables.learning_rate=1e-30", "training.max_steps=1", "data.validation=null")
    moved = {}
    for name, run in (("free", free), ("tight", tight), ("start", start)):
        events(run)
        moved[name] = read(find(run.checkpoints)[0].folder, "tables.item_id")["tables.item_id"]
    assert (moved["free"] - moved["start"]).abs().max() > 1e-4
    assert 0 < (moved["tight"] - moved["start"]).abs().max() <= 128e-6  # at most 128 rows of +-1e-6 each


def stopped_by_one(folder: str) -> tuple[int, str, list[int]]:
    """Rank 1 alone asks to stop, at its third step."""
    steps: list[int] = []

    def asked() -> bool:
        steps.append(len(steps) + 1)
        return parallel.rank() == 1 and steps[-1] == 3

    found = list(train(open_run(folder), device=CPU, stop_requested=asked))
    ended = found[-1]
    assert isinstance(ended, Ended)
    return ended.step, ended.reason, [each.step for each in found if isinstance(each, Saved)]


def test_one_rank_that_is_asked_to_stop_stops_all(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    assert run_ranks(2, stopped_by_one, str(run.folder), folder=tmp_path / "ranks") == [(3, "stopped", [3])] * 2


def test_log_and_gates(tmp_path: Path) -> None:
    run = small_run(tmp_path, "training.log_every=8")
    steps = [event for event in events(run) if isinstance(event, Step)]
    assert [event.step for event in steps] == [8, 16, 24, 32]
    for event in steps:
        for task in ("click", "conversion", "dwell"):
            assert sum(event.gates[f"{task}/expert{e}"] for e in range(3)) == pytest.approx(1.0, abs=1e-5)
            assert 0.0 < event.gates[f"{task}/entropy"] <= np.log(3) + 1e-6
        assert event.rows_per_second > 0
        assert 0.0 <= event.data_wait <= 1.0


def test_logged_weights_are_those_of_the_tasks_times_the_balancers(tmp_path: Path) -> None:
    given = {"click": 2.5, "conversion": 0.5, "dwell": 0.25}
    weights = [f"tasks.{name}.weight={weight}" for name, weight in given.items()]
    run = small_run(tmp_path, *weights, "training.max_steps=2", "training.log_every=1")
    assert [each.weights for each in events(run) if isinstance(each, Step)] == [pytest.approx(given)] * 2


def test_gates_are_told_of_the_rows_of_the_logged_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On x_BD as the step had it, in evaluation: the shares of a step whose weights did not change are those of its batch."""
    expected: dict[int, Tensor] = {}

    def noted(state: TrainState, batch: Batch, **options: Any) -> StepResult:
        with torch.no_grad():
            x_BD = state.model.embeddings(batch)
            state.model.eval()
            expected[state.step + 1] = state.model.dense.gates(x_BD)["dwell"].mean(0)
            state.model.train()
        result = train_step(state, batch, **options)
        assert (result.x_BD is not None) == options["keep_x"] == (state.step in (4, 8, 9))
        assert result.x_BD is None or torch.equal(result.x_BD, x_BD)
        assert gate_statistics(state, x_BD[:0]) == {}  # no rank has a row
        return result

    monkeypatch.setattr(mtrec.train, "train_step", noted)
    still = ("optimizer.dense.learning_rate=1e-30", "model.architecture.gate_dropout=0.5")
    run = small_run(tmp_path, "training.log_every=4", "training.max_steps=9", *still)
    steps = [event for event in events(run) if isinstance(event, Step)]
    assert [event.step for event in steps] == [4, 8, 9]
    for event in steps:
        for index, share in enumerate(expected[event.step].tolist()):
            assert event.gates[f"dwell/expert{index}"] == pytest.approx(share, abs=1e-6)


def logged_gates(folder: str) -> dict[str, float]:
    (step,) = [event for event in train(open_run(folder), device=CPU) if isinstance(event, Step)]
    return step.gates


def test_gates_are_told_of_the_rows_of_all_ranks(tmp_path: Path) -> None:
    found = []
    for ranks in (1, 2):
        run = small_run(tmp_path / str(ranks), "training.log_every=3", "training.max_steps=3")
        found += run_ranks(ranks, logged_gates, str(run.folder), folder=tmp_path / "ranks")
    alone, *both = found
    assert both == [pytest.approx(alone, abs=1e-6)] * 2


@pytest.mark.parametrize("sharding", ["table_wise", "data_parallel"])
def test_a_table_may_have_any_name(tmp_path: Path, sharding: str) -> None:
    names = ("user.id", "items", "50%_forward")  # a module of torch is named none of these
    tables = [f"features.{feature}.table={name}" for feature, name in zip(("user_id", "item_id", "tags"), names, strict=True)]
    both = ("training.checkpoint_every=10", "training.keep_last=9", *tables, f"features.tags.sharding={sharding}")
    stopped, run = small_run(tmp_path, *both), small_run(tmp_path, *both)
    stops = iter([False] * 15 + [True] * 99)
    list(train(stopped, device=CPU, stop_requested=lambda: next(stops)))
    trained(str(run.folder))
    trained(str(stopped.folder), resume=True)
    first, whole = read(find(run.checkpoints)[-1].folder), read(find(run.checkpoints)[0].folder)
    resumed = read(find(stopped.checkpoints)[0].folder)
    assert resumed.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(resumed[key], value), key
    for name in names:
        assert not torch.equal(first[f"tables.{name}"], whole[f"tables.{name}"]), name
        assert any(key.startswith(f"tables_state.{name}.") for key in whole), name
