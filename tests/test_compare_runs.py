"""The runs of a comparison: their budgets and their search, those that fail or are cut short, what a resumed one keeps."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from small_comparisons import base_tree, comparison_file, conduct_here, write_logs

from mtrec.compare.plan import Budget, Comparison, load_plan
from mtrec.compare.runs import Spec, chosen, conduct, folder_of, gate_shares, has_ended, make_folders, read_done, with_budget
from mtrec.compare.whole import compare
from mtrec.locking import LockedError, locked
from mtrec.recorder import Recorder
from mtrec.run import Run
from mtrec.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logs(tmp_path_factory.mktemp("compare"))


def test_budget_and_search(log: Path, tmp_path: Path) -> None:
    search = {"trials": 2, "space": {"optimizer.dense.learning_rate": {"log_uniform": [1e-5, 1e-2]}}}
    variants = {"single_task": {"set": {"model.architecture.kind": "single_task"}}}
    options: dict[str, Any] = {"budget": {"rows": 1_300}, "search": search, "match": "none", "segment": None}
    plan = load_plan(comparison_file(tmp_path, base_tree(log), variants=variants, **options))
    results = compare(plan, tmp_path / "out", resume=False, conduct_all=conduct_here)
    for name in ("mmoe", "single_task"):
        fair = results["variants"][name]["search"]
        worse, better = sorted(fair["tried"], key=lambda each: each["metric"])
        assert worse["metric"] < better["metric"]
        assert fair["chosen"] == {"optimizer.dense.learning_rate": better["optimizer.dense.learning_rate"]}
        assert {run["steps"] for run in results["variants"][name]["runs"].values()} == {10}
        done = yaml.safe_load((tmp_path / "out" / "runs" / name / "seed-1" / "experiment.yaml").read_text())
        assert done["optimizer"]["dense"]["learning_rate"] == fair["chosen"]["optimizer.dense.learning_rate"]
        assert not (
            tmp_path / "out" / "runs" / name / "trial-0" / "predictions.parquet"
        ).exists()  # the test is read once, at the end


def test_a_run_that_fails_does_not_keep_back_what_the_others_say(log: Path, tmp_path: Path) -> None:
    base = base_tree(log)
    base["training"]["checkpoint_storage"] = (tmp_path / "store").as_uri()  # of the experiment's own run
    variants = {"tweedie": {"set": {"tasks.dwell.loss": "tweedie"}}, "narrow": {"set": {"model.tower_layers": [4]}}}
    plan = load_plan(comparison_file(tmp_path, base, variants=variants, budget={"steps": 3}, match="none", segment=None))

    def all_but_one(folder: Path, names: Sequence[str]) -> None:
        conduct_here(folder, [name for name in names if name != "narrow/seed-1"])
        raise RuntimeError("1 run is missing")

    said: list[str] = []
    with pytest.raises(RuntimeError, match="1 run is missing"):
        compare(plan, tmp_path / "out", resume=False, conduct_all=all_but_one, say=said.append)
    assert said[-1] == f"what the finished runs say: {tmp_path / 'out' / 'report.html'}"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["notes"][0] == "narrow has 1 finished runs and is left out; it needs two."
    assert {row["variant"] for row in results["differences"]} == {"tweedie", "mmoe again"}
    assert "xauc_given" in results["variants"]["tweedie"]["metrics"]["dwell"]
    assert "r2_log1p_given" not in results["variants"]["mmoe"]["metrics"]["dwell"]  # tweedie has no log scale
    assert compare(plan, tmp_path / "out", resume=True, conduct_all=conduct_here)["notes"] == results["notes"][-1:]
    assert not (tmp_path / "store").exists()

    failing = load_plan(comparison_file(tmp_path, base, variants=variants, budget={"steps": 3}, match="none", segment=None))
    with pytest.raises(RuntimeError, match="nothing was made"):
        compare(failing, tmp_path / "none", resume=False, conduct_all=_fails)
    assert not (tmp_path / "none" / "report.html").exists()


def _fails(folder: Path, names: Sequence[str]) -> None:
    raise RuntimeError("nothing was made")


def test_one_process_at_a_time_makes_a_comparison(log: Path, tmp_path: Path) -> None:
    plan = load_plan(comparison_file(tmp_path, base_tree(log)))
    with locked(tmp_path / "out" / "compare.lock", "it"), pytest.raises(LockedError, match=r"The comparison .*out is being"):
        compare(plan, tmp_path / "out", resume=True, conduct_all=_fails)


def test_test_rows_that_cannot_be_used_are_told_before_anything_is_trained(log: Path, tmp_path: Path) -> None:
    table = pa.concat_tables([pq.read_table(path) for path in sorted((log / "test").glob("*"))])
    clicks = table["click"].to_numpy().copy()
    clicks[[7, 500]] = 2
    place = table.column_names.index("click")
    (tmp_path / "test").mkdir()
    bad = table.set_column(place, "click", pa.array(clicks))
    pq.write_table(bad, tmp_path / "test" / "a.parquet", write_statistics=False, row_group_size=400)
    base = base_tree(log)
    base["data"]["test"] = str(tmp_path / "test")
    plan = load_plan(comparison_file(tmp_path, base, budget={"steps": 2}))
    with pytest.raises(ValueError, match=r"`data\.test`: '.*a\.parquet', row group 0, row 7: .*'click' should be 0, 1 or null"):
        compare(plan, tmp_path / "out", resume=False, conduct_all=_fails)
    pq.write_table(bad, tmp_path / "test" / "a.parquet")  # now the footer tells it
    with pytest.raises(ValueError, match=r"`tasks\.click\.label`: column 'click' should be 0 or 1\. Found 2"):
        load_plan(comparison_file(tmp_path, base))
    texts = table.set_column(table.column_names.index("user_id"), "user_id", table["user_id"].cast(pa.string()))
    pq.write_table(texts, tmp_path / "test" / "a.parquet")
    with pytest.raises(ValueError, match=r"`data\.test`: `features\.user_id\.column` should hold integers"):
        compare(load_plan(comparison_file(tmp_path, base)), tmp_path / "other", resume=False, conduct_all=_fails)

    pq.write_table(bad, tmp_path / "test" / "a.parquet")
    base["data"]["on_bad_rows"] = "skip"
    plan = load_plan(comparison_file(tmp_path, base, budget={"steps": 2}, match="none", segment=None))
    assert compare(plan, tmp_path / "skipped", resume=False, conduct_all=conduct_here)["test_rows"] == 798

    # a variant whose own feature refuses another row would be measured on other rows than the base
    prices = table["price"].to_numpy().copy()
    prices[9] = -1.0
    bad = bad.set_column(table.column_names.index("price"), "price", pa.array(prices))
    pq.write_table(bad, tmp_path / "test" / "a.parquet")
    weighted = {"weighted": {"set": {"features.user_id.weights": "price"}}}
    plan = load_plan(comparison_file(tmp_path, base, variants=weighted, match="none", segment=None))
    with pytest.raises(ValueError, match=r"Variant 'weighted': `data\.on_bad_rows`: .* Found 3 skipped for this one and 2 for"):
        compare(plan, tmp_path / "unlike", resume=False, conduct_all=_fails)
    base["data"]["max_bad_fraction"] = 0.001
    with pytest.raises(ValueError, match=r"`data\.max_bad_fraction` \(0\.001\) is exceeded in `data\.test`: 2 bad rows"):
        compare(load_plan(comparison_file(tmp_path, base)), tmp_path / "many", resume=False, conduct_all=_fails)


def test_a_run_that_was_asked_to_stop_is_to_go_on(log: Path, tmp_path: Path) -> None:
    plan = load_plan(comparison_file(tmp_path, base_tree(log), budget={"steps": 6}))
    spec = Spec("mmoe/seed-0", "mmoe", 0, plan.experiments["mmoe"])
    make_folders(plan, tmp_path / "out", [spec])
    place = folder_of(tmp_path / "out", spec.name)

    def asked_to_stop(run: Run) -> None:
        recorder = Recorder(run.folder)
        for event in train(run, device=CPU, stop_requested=lambda: True):
            recorder(event)
        recorder.close()

    with pytest.raises(RuntimeError, match=r"mmoe/seed-0: the training was asked to stop before its end"):
        conduct(place, CPU, asked_to_stop)
    assert not has_ended(Run(place))
    assert not (place / "done.json").exists()
    conduct(place, CPU)
    assert read_done(tmp_path / "out", spec.name)["steps"] == 6


def test_steps_of_a_budget_are_spread_over_epochs(log: Path, tmp_path: Path) -> None:
    plan = load_plan(comparison_file(tmp_path, base_tree(log), budget={"steps": 40}))
    training = with_budget(plan.experiments["mmoe"], 2_000, plan.comparison.budget, 8).training
    assert (training.max_steps, training.epochs, training.validate_every) == (40, 3, 5)


def test_a_run_cut_short_while_its_folder_was_made_is_made_again(log: Path, tmp_path: Path) -> None:
    plan = load_plan(comparison_file(tmp_path, base_tree(log)))
    spec = Spec("mmoe/seed-0", "mmoe", 0, plan.experiments["mmoe"])
    place = folder_of(tmp_path / "out", spec.name)
    (place / "encoder").mkdir(parents=True)
    assert make_folders(plan, tmp_path / "out", [spec]) == ["mmoe/seed-0"]
    assert (place / "run.json").is_file()


def test_a_value_at_the_edge_is_at_an_end_of_its_range(log: Path, tmp_path: Path) -> None:
    ranges = {
        "model.architecture.num_experts": {"int": [2, 8]},
        "optimizer.dense.learning_rate": {"log_uniform": [1e-4, 1e-2]},
        "model.dropout": {"uniform": [0.0, 0.4]},
    }
    space = {"model.architecture.kind": ["shared_bottom", "mmoe"], **ranges}
    search = {"trials": 8, "space": space}
    plan = load_plan(comparison_file(tmp_path, base_tree(log), search=search, match="none"))
    experiments = {"mmoe": plan.experiments["mmoe"]}
    shown = []
    for best in range(8):
        for trial in range(8):
            place = folder_of(tmp_path / "out", f"mmoe/trial-{trial}")
            place.mkdir(parents=True, exist_ok=True)
            (place / "done.json").write_text(json.dumps({"metric": 1.0 if trial == best else 0.5}))
        _, facts = chosen(plan, tmp_path / "out", experiments)
        values, found = facts["mmoe"]["chosen"], []
        for path, (name, (low, high)) in ((path, next(iter(each.items()))) for path, each in ranges.items()):
            if path in values:
                share = np.log(values[path] / low) / np.log(high / low) if "log" in name else (values[path] - low) / (high - low)
                found += [path] if not 0.05 < share < 0.95 else []
        assert facts["mmoe"]["at_edge"] == found
        shown += found
    assert 0 < len(shown) < 8


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"budget": {"seconds": 5}}, {"budget": {"seconds": 50}}, r"`budget\.seconds` should be 5\.0, as .*seed-0 .* Found 5"),
        ({"budget": {"seconds": 5}}, {}, r"`budget\.seconds` should be 5\.0, .* Found null\. Set it back, or compare in a new"),
        ({"segment": None}, {"segment": "click"}, r"`segment` should be null, as .* was made with\. Found \"click\"\."),
    ],
)
def test_a_resumed_comparison_keeps_what_its_runs_were_made_for(
    log: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], message: str
) -> None:
    plan = load_plan(comparison_file(tmp_path, base_tree(log), **before))
    specs = [Spec(f"mmoe/{name}", "mmoe", 0, plan.experiments["mmoe"], name == "seed-0") for name in ("seed-0", "trial-0")]
    make_folders(plan, tmp_path / "out", specs)
    made = (folder_of(tmp_path / "out", "mmoe/seed-0") / "compare.json").read_text()
    make_folders(plan, tmp_path / "out", specs)
    other = load_plan(comparison_file(tmp_path, base_tree(log), **after))
    with pytest.raises(ValueError, match=rf"--resume: {message}"):
        make_folders(other, tmp_path / "out", specs)
    assert (folder_of(tmp_path / "out", "mmoe/seed-0") / "compare.json").read_text() == made
    if "segment" in before:  # a trial predicts nothing
        assert make_folders(other, tmp_path / "out", specs[1:]) == ["mmoe/trial-0"]


def test_gate_shares_are_read_from_the_log() -> None:
    gates = {"click/expert1": 0.3, "click/expert0": 0.7, "click/entropy": 0.6}
    events = [{"event": "step", "step": 5, "gates": gates}, {"event": "ended", "step": 5}]
    assert gate_shares(events) == {"click": {"steps": [5], "shares": [[0.7, 0.3]]}}


def test_a_budget_of_seconds_ends_in_time(log: Path, tmp_path: Path) -> None:
    base = base_tree(log)
    base["training"]["epochs"] = 1_000
    plan = load_plan(comparison_file(tmp_path, base, budget={"seconds": 0.5}))
    assert isinstance(plan.comparison, Comparison)
    assert plan.comparison.budget == Budget(seconds=0.5)
    spec = Spec("mmoe/seed-0", "mmoe", 0, plan.experiments["mmoe"])
    make_folders(plan, tmp_path / "out", [spec])
    conduct_here(tmp_path / "out", [spec.name])
    done = read_done(tmp_path / "out", spec.name)
    assert done["reason"] == "stopped"
    assert 1 <= done["steps"] < 16_000
    assert done["train_seconds"] < 5
