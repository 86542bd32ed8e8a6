"""Comparisons: what is refused before anything runs; a small one from end to end, its numbers computed again from outside."""

import csv
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from logs import experiment_tree, write_log
from rich.console import Console
from scipy import stats
from sklearn.metrics import log_loss, mean_absolute_error, roc_auc_score
from typer.testing import CliRunner

from mtrec.cli import app
from mtrec.compare import figures
from mtrec.compare import results as compare_results
from mtrec.compare.measured import Measured
from mtrec.compare.plan import Budget, Comparison, Plan, Search, dense_size, load_plan, matched, search_draws
from mtrec.compare.report import comparison_report
from mtrec.compare.results import compute, finished_runs
from mtrec.compare.runs import Spec, chosen, conduct, folder_of, gate_shares, has_ended, make_folders, read_done, with_budget
from mtrec.compare.table import show_results
from mtrec.compare.whole import compare
from mtrec.locking import LockedError, locked
from mtrec.recorder import Recorder
from mtrec.run import Run
from mtrec.train import train

CPU = torch.device("cpu")


def _tree(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = experiment_tree(folder / "train", folder / "validation")
    tree["data"]["test"] = str(folder / "test")
    tree["evaluation"] = {"group_by": "user_id"}
    tree["optimizer"] = {"dense": {"learning_rate": 0.01}}
    return tree


def _file(folder: Path, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A comparison file beside its base experiment."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base or _tree(folder)))
    comparison: dict[str, Any] = {
        "base": "base.yaml",
        "baseline": "mmoe",
        "variants": {
            "shared_bottom": {"set": {"model.architecture.kind": "shared_bottom"}},
            "single_task": {"set": {"model.architecture.kind": "single_task"}},
        },
        "seeds": 2,
        "match": "parameters",
        "segment": "click",
        **changes,
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(comparison))
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    write_log(folder / "train", rows=2_000)
    write_log(folder / "validation", rows=500, seed=1)
    write_log(folder / "test", rows=800, seed=2)
    return folder


def test_the_comparison_in_the_readme_makes_a_plan(log: Path, tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(block for block in re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL) if "variants:" in block)
    base = _tree(log)
    del base["data"]["test"]
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(base))
    path = tmp_path / "compare.yaml"
    path.write_text(block.replace("logs/test", str(log / "test")))
    plan = load_plan(path)
    assert list(plan.experiments) == ["mmoe", "ple", "narrow"]
    assert len(plan.seeds) * len(plan.experiments) + len(plan.again_seeds) == 20
    assert (plan.seeds[-1], plan.again_seeds[-1]) == (4, 1004)


def _conduct_here(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        conduct(folder_of(folder, name), CPU)


@pytest.fixture(scope="module")
def whole(log: Path) -> tuple[Plan, Path, dict[str, Any]]:
    """A finished comparison: plan, folder, results."""
    plan = load_plan(_file(log))
    folder = log / "out"
    return plan, folder, compare(plan, folder, resume=False, conduct_all=_conduct_here)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"variants": {"ple": {"set": {"model.architecture.num_expert": 3}}}},
            r"`variants\.ple\.set`: `model\.architecture\.num_expert` is not a known key\. Did you mean 'num_experts'\?",
        ),
        (
            {"variants": {"ple": {"set": {"model.architecture.kind": "pel"}}}},
            r"`variants\.ple\.set`: `model\.architecture\.kind` should be one of .* Did you mean 'ple'\?",
        ),
        (
            {"variants": {"same": {"set": {"model.architecture.num_experts": 3}}}},
            r"`variants\.same\.set` should change something\. Found a variant equal to the base",
        ),
        ({"variants": {"same": {}}}, r"`variants\.same\.set` should change something"),
        (
            {"variants": {"a": {"set": {"model.tower_layers": [4]}}, "b": {"set": {"model.tower_layers": [4]}}}},
            r"`variants\.b\.set` .* equal to the variant 'a'",
        ),
        ({"variants": {"a": {"set": {"seed": 4}}}}, r"`variants\.a\.set` should leave `seed` as it is"),
        ({"variants": {"a": {"set": {"data": {"train": "x"}}}}}, r"`variants\.a\.set` should leave `data\.test` as it is"),
        ({"variants": {"a": {"set": {"data.sample_weight": "age"}}}}, r"`variants\.a\.set` should leave `data\.sample_weight`"),
        (
            {"variants": {"a": {"set": {"tasks.conversion": {"kind": "binary"}}}}},
            r"Variant 'a': `tasks\.conversion\.given` should be as the base's \(click\): .* Found None\.",
        ),
        (
            {"variants": {"a": {"set": {"tasks.dwell.unit": "minutes"}}}},
            r"Variant 'a': `tasks\.dwell\.unit` should scale its label as the base's \(1\.0\)",
        ),
        (
            {"variants": {"a": {"set": {"tasks.dwell": {"kind": "regression", "label": "dwell_seconds", "given": "click"}}}}},
            r"`tasks\.dwell\.kind` should predict the columns as the base's \(dwell_seconds\): .* Found dwell\.",
        ),
        (
            {"variants": {"a": {"set": {"tasks.dwell.loss": "tweedie"}}}, "primary": {"dwell": "r2_log1p_given"}},
            r"Variant 'a': `primary\.dwell`: r2_log1p is of losses with a log-scale output, which `tasks\.dwell\.loss` is",
        ),
        ({"variants": {"mmoe": {"set": {"model.tower_layers": [4]}}}}, r"`variants\.mmoe` should be a name of its own"),
        ({"variants": {"a/b": {"set": {"model.tower_layers": [4]}}}}, r"`variants\.a/b` should be a name"),
        ({"seeds": 1}, r"`seeds` should be at least 2 different numbers .* Found 1\."),
        ({"seeds": [3]}, r"`seeds` should be at least 2"),
        ({"seeds": [3, 3]}, r"`seeds` should be at least 2 different"),
        ({"primary": {"click": "auk"}}, r"`primary\.click` should be a metric of the task \(auc, .*Did you mean 'auc'\?"),
        ({"primary": {"clicks": "auc"}}, r"`primary` should name tasks \(click, .*Did you mean 'click'\?"),
        ({"segment": "nowhere"}, r"data\.test.*'nowhere'"),
        ({"variant": {}}, r"`variant` is not a known key\. Did you mean 'variants'\?"),
        ({"budget": {"steps": 5, "rows": 3}}, r"`budget` should be one of steps, seconds or rows\. Found steps, rows\."),
        ({"single_task": "shared_botom"}, r"`single_task` should name a variant .*Did you mean 'shared_bottom'\?"),
        ({"primary": {"click": "ece"}}, r"`primary\.click` should be a metric of the task \(auc, .*Found 'ece'\."),
        (
            {"primary": {"click": "gauc"}, "set": {"evaluation.group_by": None}},
            r"`primary\.click` should be a metric of the task \(auc, (?!gauc).*Found 'gauc'\.",
        ),
        ({"primary": {"dwell": "r2_log1p"}}, r"`primary\.dwell` should be r2_log1p_given: .* no log scale\. Found 'r2_log1p'\."),
        ({"segment": "tags"}, r"`segment` should name a column with one value a row\. Found 'tags' of type list<.*int64>\."),
        ({"name": "a/b"}, r"`name`: should be usable as the name of a folder, without '/'\. Found 'a/b'\."),
        (
            {"variants": {"young": {"set": {"data.train": {"path": "x", "where": "age < 40"}}}}, "budget": {"rows": 1_300}},
            r"Variant 'young': `data\.train\.where` should be the base's \(None\) where `budget\.rows` is set: .*"
            r"Found age < 40\. Use `budget\.steps` or `budget\.seconds`, or leave the budget out\.",
        ),
        (
            {"search": {"trials": 2, "space": {"data.train.where": ["age < 40", "age < 50"]}}, "budget": {"rows": 1_300}},
            r"`search\.space` \(variant mmoe\): `data\.train\.where` should be the base's \(None\)",
        ),
        ({"search": {"trials": 2, "space": {"seed": [1, 2]}}}, r"`search\.space` should leave `seed` as it is"),
        (
            {
                "search": {
                    "trials": 1,
                    "space": {"optimizer.dense.learning_rate": [1e-3, 1e-2], "model.architecture.expert_layers": [[16, 8], [4]]},
                }
            },
            r"`search\.space` \(variant mmoe\): `match: parameters` makes variants equally large before the search, .* Found "
            r"model\.architecture\.expert_layers, which changes it\. .* set `match: none`",
        ),
        (
            {"search": {"trials": 2, "space": {"model.dropout": [0.0, 0.1], "model.tower_layers": [[2], [3]]}}, "match": "flops"},
            r"`match: flops` .* Found model\.tower_layers, which changes it",
        ),
        (
            {"search": {"trials": 2, "space": {"model.interaction.rank": [2, 3], "model.architecture.kind": ["ple", "cgc"]}}},
            r"Found model\.architecture\.kind, model\.interaction\.rank, which changes it",
        ),
        ({"search": {"trials": 2, "space": {"model.embedding_dim": [2, 4]}}}, r"Found model\.embedding_dim, which changes it"),
        ({"search": {"trials": 2, "space": {"features.item_id.dim": [2, 4]}}}, r"Found features\.item_id\.dim, which changes it"),
        ({"set": {"data.test": None}}, r"`data\.test` of the base should name the files"),
        ({"set": {"data.test": "nowhere.parquet"}}, r"nowhere\.parquet"),
        (
            {"search": {"trials": 2, "space": {"optimizer.dense.lr": [1e-3, 1e-2]}}},
            r"`search\.space \(variant mmoe\)`: `optimizer\.dense\.lr` is not a known key",
        ),
    ],
)
def test_mistakes_are_told_before_anything_runs(log: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    before = sorted(tmp_path.iterdir())
    base = _tree(log)
    with pytest.raises(ValueError, match=message) as caught:
        load_plan(_file(tmp_path, base, **changes))
    assert str(caught.value).startswith(f"{tmp_path / 'comparison.yaml'}:")
    assert sorted(path.name for path in tmp_path.iterdir() if path not in before) == ["base.yaml", "comparison.yaml"]


def test_what_leaves_the_size_alone_is_searched_beside_matching(log: Path, tmp_path: Path) -> None:
    space = {"optimizer.dense.learning_rate": [1e-3, 1e-2], "data.batch_size": [64, 128], "model.dropout": [0.0, 0.1]}
    search = {"trials": 3, "space": {**space, "features.item_id.min_count": [1, 2]}}
    assert load_plan(_file(tmp_path, _tree(log), search=search)).comparison.match == "parameters"


def test_a_budget_of_rows_is_for_other_files_but_not_for_other_shares_of_them(log: Path, tmp_path: Path) -> None:
    few = {"few": {"set": {"data.train.path": str(log / "train" / "part-0.parquet")}}}
    load_plan(_file(tmp_path, _tree(log), variants=few, budget={"rows": 1_300}))
    base = _tree(log)
    base["data"]["train"] = {"path": str(log / "train"), "where": "age < 40"}
    with pytest.raises(ValueError, match=r"Variant 'few': `data\.train\.path` should be the base's .*Found .*part-0\.parquet\."):
        load_plan(_file(tmp_path, base, variants=few, budget={"rows": 1_300}))
    load_plan(_file(tmp_path, base, variants=few, budget={"steps": 10}))


def test_test_rows_are_not_those_of_training_or_validation(log: Path, tmp_path: Path) -> None:
    def source(name: str, where: str | None = None) -> dict[str, Any]:
        return {"path": str(log / name), "where": where}

    (tmp_path / "link").symlink_to(log / "test")
    one_of_them = rf"`data\.test` should name other rows than `data\.train`\. Found '{log}/train/part-0\.parquet' in both: .*by"
    with pytest.raises(ValueError, match=rf"Variant 'mmoe' \(the base\): {one_of_them} `where`\.$"):
        load_plan(_file(tmp_path, _tree(log), set={"data.test": source("train/part-0.parquet")}))
    with pytest.raises(ValueError, match=r"`data\.validation`\. Found .* With `data\.validation: null` the last checkpoint is"):
        load_plan(_file(tmp_path, _tree(log), set={"data.test": source("validation")}))
    load_plan(_file(tmp_path, _tree(log), set={"data.test": source("validation"), "data.validation": None}))
    mine = {"mine": {"set": {"data.train": [str(log / "train"), str(tmp_path / "link" / "part-1.parquet")]}}}
    with pytest.raises(ValueError, match=rf"Variant 'mine': .* Found '{log}/test/part-1\.parquet' in both"):
        load_plan(_file(tmp_path, _tree(log), variants=mine))
    apart = {"data.train": source("train", "age < 40"), "data.test": source("train", "age >= 40")}
    load_plan(_file(tmp_path, _tree(log), set=apart))
    with pytest.raises(ValueError, match=r"`data\.test` should name other rows than `data\.train`"):
        load_plan(_file(tmp_path, _tree(log), set={**apart, "data.test": source("train", "age < 40")}))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["compare", str(tmp_path / "nothing.yaml")])
    assert isinstance(found.exception, ValueError)
    assert "There is no comparison file" in str(found.exception)


def test_a_file_that_is_a_list_is_told_the_keys_of_a_comparison(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[base, variants]")
    with pytest.raises(ValueError, match=r"list\.yaml: should be a YAML mapping with keys such as base, .*Found list\.$"):
        load_plan(tmp_path / "list.yaml")


def test_every_run_is_there_and_widths_are_matched(whole: tuple[Plan, Path, dict[str, Any]]) -> None:
    plan, folder, results = whole
    assert plan.primary == {"click": "auc", "conversion": "auc", "dwell": "xauc"}
    assert {name: sorted(runs) for name, runs in finished_runs(plan, folder).items()} == {
        "mmoe": [0, 1],
        "shared_bottom": [0, 1],
        "single_task": [0, 1],
        "mmoe again": [1000, 1001],
    }
    sizes = {name: each["size"]["parameters"] for name, each in results["variants"].items()}
    assert max(sizes.values()) / min(sizes.values()) < 1.05
    assert results["variants"]["shared_bottom"]["size"]["matched"]["from"] == [16, 8]
    assert results["variants"]["mmoe"]["size"]["matched"] is None
    done = read_done(folder, "shared_bottom/seed-1")
    assert done["dense_parameters"] == sizes["shared_bottom"]
    assert done["steps"] == 16  # 2,000 rows in batches of 128
    assert done["test_rows"] == 800
    assert done["peak_memory_bytes"] > 1e7
    assert {"auc", "gauc", "log_loss"} <= set(results["variants"]["mmoe"]["metrics"]["click"])
    assert len(results["variants"]["mmoe"]["curves"]["validation"]["click"]["mean"]) == 8
    assert list(results["variants"]["mmoe"]["gates"]) == ["click", "conversion", "dwell"]
    assert results["variants"]["shared_bottom"]["gates"] == {}


def test_numbers_are_those_of_scikit_learn_on_the_saved_predictions(whole: tuple[Plan, Path, dict[str, Any]]) -> None:
    _, folder, results = whole
    tables = {seed: pq.read_table(folder / "runs" / "single_task" / f"seed-{seed}" / "predictions.parquet") for seed in (0, 1)}
    metrics = results["variants"]["single_task"]["metrics"]
    for seed, table in tables.items():
        click, conversion, dwell = (table[f"label/{task}"].to_numpy() for task in ("click", "conversion", "dwell"))
        joint = click * conversion  # a conversion given the click; every label is observed in this log, but dwell
        found = {task: {name: each["by_seed"][str(seed)] for name, each in by.items()} for task, by in metrics.items()}
        p_click, p_joint = (table[name].to_numpy().astype(np.float64) for name in ("p_click", "p_conversion_and_click"))
        assert found["click"]["auc"] == pytest.approx(roc_auc_score(click, p_click), abs=1e-12)
        assert found["click"]["log_loss"] == pytest.approx(log_loss(click, p_click), abs=1e-12)
        assert found["conversion"]["auc"] == pytest.approx(roc_auc_score(joint, p_joint), abs=1e-12)
        clicked = click == 1
        conditional = roc_auc_score(conversion[clicked], table["p_conversion"].to_numpy()[clicked])
        assert found["conversion"]["auc_given"] == pytest.approx(conditional, abs=1e-12)
        seconds = np.where(clicked, dwell, 0.0)
        expected = table["dwell_seconds_expected"].to_numpy().astype(np.float64)
        assert found["dwell"]["mae"] == pytest.approx(mean_absolute_error(seconds, expected), abs=1e-9)
        # XAUC is Kendall's tau with ties in the labels left out: concordant pairs among those with different labels
        pairs = np.sign(seconds[:, None] - seconds[None, :])
        order = np.sign(expected[:, None] - expected[None, :])
        share = ((pairs * order > 0).sum() + 0.5 * ((pairs != 0) & (order == 0)).sum()) / (pairs != 0).sum()
        assert found["dwell"]["xauc"] == pytest.approx(share, abs=1e-12)
    rows = {(r["variant"], r["task"], r["metric"]): r for r in results["differences"]}
    row = rows["single_task", "click", "auc"]
    base = [
        roc_auc_score(t["label/click"], t["p_click"])
        for t in (pq.read_table(folder / "runs" / "mmoe" / f"seed-{s}" / "predictions.parquet") for s in (0, 1))
    ]
    mine = [roc_auc_score(t["label/click"], t["p_click"]) for t in tables.values()]
    assert row["value"] == pytest.approx(np.mean(mine) - np.mean(base), abs=1e-12)
    assert row["variance_seeds"] == pytest.approx(np.var(np.subtract(mine, base), ddof=1) / 2, abs=1e-12)
    assert row["degrees_seeds"] == 1
    squared = sum(stats.t.ppf(0.975, row[f"degrees_{of}"]) ** 2 * row[f"variance_{of}"] for of in ("users", "seeds"))
    assert row["high"] - row["value"] == pytest.approx(np.sqrt(squared), rel=1e-9)
    assert row["num_users"] == len(np.unique(tables[0]["user"]))


def test_holm_is_over_variants_and_primary_metrics_without_the_again_row(whole: tuple[Plan, Path, dict[str, Any]]) -> None:
    _, _, results = whole
    primary = [row for row in results["differences"] if row["primary"]]
    assert len(primary) == 3 * 3
    counted = sorted((row["p_value"], row["adjusted_p"]) for row in primary if row["variant"] != "mmoe again")
    expected = np.minimum(np.maximum.accumulate([p * (6 - index) for index, (p, _) in enumerate(counted)]), 1.0)
    assert [adjusted for _, adjusted in counted] == pytest.approx(expected)
    assert all(row["adjusted_p"] == row["p_value"] for row in primary if row["variant"] == "mmoe again")
    assert all(row["adjusted_p"] is None for row in results["differences"] if not row["primary"])
    assert all(re.match(rf"{row['variant']} against mmoe, {row['task']}: ", row["verdict"]) for row in primary)


def test_segments_are_the_rows_of_their_value(whole: tuple[Plan, Path, dict[str, Any]]) -> None:
    plan, folder, results = whole
    table = pq.read_table(folder / "runs" / "mmoe" / "seed-0" / "predictions.parquet")
    counts = {row["segment"]: row["rows"] for row in results["segments"]}
    assert counts == {"1": int(np.sum(table["label/click"].to_numpy() == 1))}  # without a click there is nothing to order
    measured = Measured(folder, finished_runs(plan, folder), plan.experiments["mmoe"])
    keep = np.array([each == "1" for each in measured.segment or []])
    label = measured.label("conversion", given=False)[keep]
    values = [roc_auc_score(label, each["p_conversion_and_click"].to_numpy()[keep]) for each in measured.tables["mmoe"].values()]
    row = next(row for row in results["segments"] if (row["segment"], row["task"]) == ("1", "conversion"))
    assert row["baseline"] == pytest.approx(np.mean(values), abs=1e-12)
    assert not [row for row in results["segments"] if row["task"] == "click"]  # one label only in each segment


def _copied(whole: tuple[Plan, Path, dict[str, Any]], folder: Path) -> tuple[Plan, Path, dict[str, Any]]:
    """A finished comparison whose files may be changed: plan, folder, facts."""
    shutil.copytree(whole[1], folder)
    return whole[0], folder, json.loads((folder / "plan.json").read_text())


def test_null_is_no_segment_of_a_text_null(whole: tuple[Plan, Path, dict[str, Any]], tmp_path: Path) -> None:
    plan, folder, facts = _copied(whole, tmp_path / "copy")
    segments = pa.array([(None, "null", "null", "DE", "DE", "DE")[row % 6] for row in range(800)])
    for path in folder.glob("runs/*/seed-*/predictions.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.set_column(table.column_names.index("segment"), "segment", segments), path)
    found = {row["segment"]: row["rows"] for row in compute(plan, folder, facts)["segments"]}
    assert found == {"DE": 399, "null": 267, "(null)": 134}


def test_runs_on_other_test_files_are_not_compared(whole: tuple[Plan, Path, dict[str, Any]], tmp_path: Path) -> None:
    plan, folder, facts = _copied(whole, tmp_path / "copy")
    path = folder_of(folder, "shared_bottom/seed-1") / "done.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "test_fingerprint": "abc"}))
    with pytest.raises(ValueError, match=r"Found 2 fingerprints of `data\.test` \(.*; abc: shared_bottom/seed-1\)\. Files"):
        compute(plan, folder, facts)
    path.unlink()
    assert compare(plan, folder, resume=True, conduct_all=_conduct_here)["complete"]


def test_the_page_says_what_was_trained(whole: tuple[Plan, Path, dict[str, Any]], tmp_path: Path) -> None:
    plan, folder, facts = _copied(whole, tmp_path / "copy")
    page = comparison_report(compute(plan, folder, facts))
    assert "All variants see the same batches in the same order for a seed. The checkpoint that is tested is the best on" in page
    for seed in (0, 1):
        place = folder_of(folder, f"shared_bottom/seed-{seed}")
        tree = yaml.safe_load((place / "experiment.yaml").read_text())
        tree["data"] |= {"batch_size": 64, "validation": None}
        tree["training"]["validate_every"] = None
        (place / "experiment.yaml").write_text(yaml.safe_dump(tree))
        done = json.loads((place / "done.json").read_text())
        (place / "done.json").write_text(json.dumps({**done, "dense_parameters": 123_456, "flops_per_row": 7}))
    results = compute(plan, folder, facts)
    size = results["variants"]["shared_bottom"]["size"]
    assert (size["parameters"], size["flops"], size["matched"]["size"]) == (123_456, 7, 123_456)
    assert size["matched"]["target"] == facts["sizes"]["mmoe"]["parameters"]
    page = comparison_report(results)
    assert "Variants differ in data.batch_size: they do not see the same batches. The checkpoint that is tested is the" in page
    assert "(of shared_bottom, without such rows, the last)" in page
    table = page[page.index("<th>expert_layers</th>") :]
    assert "123,456" in table[: table.index("</table>")]
    for variant in results["variants"].values():
        variant["validated"] = False
    assert "There are no validation rows, so the checkpoint that is tested is the last; the test" in comparison_report(results)


def test_a_metric_that_fails_does_not_keep_back_the_others(
    whole: tuple[Plan, Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plan, folder, _ = whole
    facts = json.loads((folder / "plan.json").read_text())
    paired, interval = compare_results.paired_difference, compare_results.metric_interval

    def fails(function: Any) -> Any:
        def call(metric: str, *rest: Any, **options: Any) -> Any:
            if metric == "xauc":
                raise RuntimeError("Failed to converge")
            return function(metric, *rest, **options)

        return call

    monkeypatch.setattr(compare_results, "paired_difference", fails(paired))
    monkeypatch.setattr(compare_results, "metric_interval", fails(interval))
    found, before = compute(plan, folder, facts), whole[2]
    others = [[row for row in each["differences"] if not row["primary"] and row["metric"] != "xauc"] for each in (found, before)]
    assert others[0] == others[1]
    assert {row["outcome"] for row in found["differences"] if row["metric"] == "xauc" and row["primary"]} == {"undefined"}
    note = "single_task, dwell: the difference in xauc is undefined, not computed: RuntimeError: Failed to converge"
    assert found["notes"].count(note) == 1
    assert "mmoe, dwell: xauc is undefined, not computed: RuntimeError: Failed to converge" in found["notes"]
    assert f'<p class="note">{note}</p>' in comparison_report(found)
    assert found["complete"]


def test_the_baseline_again_keeps_no_variant_off_the_front(whole: tuple[Plan, Path, dict[str, Any]]) -> None:
    plan, _, results = whole
    values = {"mmoe": (0.7, 0.6, 0.6), "shared_bottom": (0.6, 0.5, 0.6), "single_task": (0.5, 0.7, 0.5), "mmoe again": [0.9] * 3}
    variants: dict[str, Any] = {name: {"metrics": {}} for name in values}
    for name, each in values.items():
        for (task, metric), value in zip(plan.primary.items(), each, strict=True):
            variants[name]["metrics"][task] = {metric: {"value": value}}
    across = compare_results._across(plan, variants, [], {})
    front = {"mmoe": True, "shared_bottom": False, "single_task": True, "mmoe again": None}
    assert {name: each["pareto"] for name, each in across.items()} == front
    page = comparison_report({**results, "across": across})
    table = page[page.index("<th>Pareto front</th>") : page.index("</table>")]
    assert re.findall(r"<td>([^<]*)</td></tr>", table) == ["yes", "no", "yes", "-"]


def test_files_hold_the_results_and_the_page_needs_no_network(whole: tuple[Plan, Path, dict[str, Any]]) -> None:
    _, folder, results = whole
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    with (folder / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    row = next(r for r in rows if (r["variant"], r["task"], r["metric"]) == ("single_task", "click", "auc"))
    assert float(row["metric_value"]) == results["variants"]["single_task"]["metrics"]["click"]["auc"]["value"]
    page = (folder / "report.html").read_text()
    assert page.count("plotly.js v") == 1
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", outside)
    assert not re.findall(r"@import|url\(", outside)
    for heading in ("Paired differences", "Where the variance comes from", "Gates", "Calibration", "Cost against quality"):
        assert f"<h2>{heading}</h2>" in outside
    assert "no difference" in outside


def test_few_seeds_are_told_on_the_page_and_in_the_terminal(whole: tuple[Plan, Path, dict[str, Any]]) -> None:
    _, folder, results = whole
    said = "2 seeds say little about how much re-runs differ, and make the intervals wide: run five or more."
    assert results["notes"] == [said]
    assert f'<p class="note">{said}</p>' in (folder / "report.html").read_text()
    console = Console(record=True, width=200)
    show_results(results, console)
    assert f"note: {said}" in console.export_text()


def test_resume_makes_only_what_is_missing(whole: tuple[Plan, Path, dict[str, Any]], log: Path) -> None:
    plan, folder, results = whole
    with pytest.raises(ValueError, match=r"holds a comparison already\. Add --resume"):
        compare(plan, folder, resume=False, conduct_all=_conduct_here)
    lost = folder / "runs" / "shared_bottom" / "seed-1"
    (lost / "done.json").unlink()
    (lost / "predictions.parquet").unlink()
    asked: list[str] = []

    def note(folder: Path, names: Sequence[str]) -> None:
        asked.extend(names)
        _conduct_here(folder, names)

    again = compare(plan, folder, resume=True, conduct_all=note)
    assert asked == ["shared_bottom/seed-1"]
    assert again["differences"] == results["differences"]  # it was trained; only the predictions were made again
    other = load_plan(
        _file(log, variants={"shared_bottom": {"set": {"model.architecture": {"kind": "shared_bottom", "dropout": 0.1}}}})
    )
    with pytest.raises(ValueError, match=r"made from another experiment than the comparison now describes for 'shared_bottom'"):
        compare(other, folder, resume=True, conduct_all=note)
    assert asked == ["shared_bottom/seed-1"]


def test_the_report_is_made_again_from_the_files_and_for_one_run(
    whole: tuple[Plan, Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, folder, _ = whole
    before = (folder / "results.json").read_text()
    assert CliRunner().invoke(app, ["report", str(folder)]).exit_code == 0
    assert (folder / "results.json").read_text() == before
    page = tmp_path / "run.html"
    assert CliRunner().invoke(app, ["report", str(folder / "runs" / "mmoe" / "seed-0"), "--output", str(page)]).exit_code == 0
    assert "<h2>Metrics on the validation rows</h2>" in page.read_text()


def test_budget_and_search(log: Path, tmp_path: Path) -> None:
    search = {"trials": 2, "space": {"optimizer.dense.learning_rate": {"log_uniform": [1e-5, 1e-2]}}}
    variants = {"single_task": {"set": {"model.architecture.kind": "single_task"}}}
    plan = load_plan(
        _file(tmp_path, _tree(log), variants=variants, budget={"rows": 1_300}, search=search, match="none", segment=None)
    )
    results = compare(plan, tmp_path / "out", resume=False, conduct_all=_conduct_here)
    for name in ("mmoe", "single_task"):
        fair = results["variants"][name]["search"]
        assert fair["chosen"]["optimizer.dense.learning_rate"] > 1e-4  # after ten steps, the larger rate is better
        assert [each["metric"] is not None for each in fair["tried"]] == [True, True]
        assert {run["steps"] for run in results["variants"][name]["runs"].values()} == {10}
        done = yaml.safe_load((tmp_path / "out" / "runs" / name / "seed-1" / "experiment.yaml").read_text())
        assert done["optimizer"]["dense"]["learning_rate"] == fair["chosen"]["optimizer.dense.learning_rate"]
        assert not (
            tmp_path / "out" / "runs" / name / "trial-0" / "predictions.parquet"
        ).exists()  # the test is read once, at the end


def test_a_run_that_fails_does_not_keep_back_what_the_others_say(log: Path, tmp_path: Path) -> None:
    base = _tree(log)
    base["training"]["checkpoint_storage"] = (tmp_path / "store").as_uri()  # of the experiment's own run
    variants = {"tweedie": {"set": {"tasks.dwell.loss": "tweedie"}}, "narrow": {"set": {"model.tower_layers": [4]}}}
    plan = load_plan(_file(tmp_path, base, variants=variants, budget={"steps": 3}, match="none", segment=None))

    def all_but_one(folder: Path, names: Sequence[str]) -> None:
        _conduct_here(folder, [name for name in names if name != "narrow/seed-1"])
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
    assert compare(plan, tmp_path / "out", resume=True, conduct_all=_conduct_here)["notes"] == results["notes"][-1:]
    assert not (tmp_path / "store").exists()

    failing = load_plan(_file(tmp_path, base, variants=variants, budget={"steps": 3}, match="none", segment=None))
    with pytest.raises(RuntimeError, match="nothing was made"):
        compare(failing, tmp_path / "none", resume=False, conduct_all=_fails)
    assert not (tmp_path / "none" / "report.html").exists()


def _fails(folder: Path, names: Sequence[str]) -> None:
    raise RuntimeError("nothing was made")


def test_one_process_at_a_time_makes_a_comparison(log: Path, tmp_path: Path) -> None:
    plan = load_plan(_file(tmp_path, _tree(log)))
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
    base = _tree(log)
    base["data"]["test"] = str(tmp_path / "test")
    plan = load_plan(_file(tmp_path, base, budget={"steps": 2}))
    with pytest.raises(ValueError, match=r"`data\.test`: '.*a\.parquet', row group 0, row 7: .*'click' should be 0, 1 or null"):
        compare(plan, tmp_path / "out", resume=False, conduct_all=_fails)
    pq.write_table(bad, tmp_path / "test" / "a.parquet")  # now the footer tells it
    with pytest.raises(ValueError, match=r"`tasks\.click\.label`: column 'click' should be 0 or 1\. Found 2"):
        load_plan(_file(tmp_path, base))
    texts = table.set_column(table.column_names.index("user_id"), "user_id", table["user_id"].cast(pa.string()))
    pq.write_table(texts, tmp_path / "test" / "a.parquet")
    with pytest.raises(ValueError, match=r"`data\.test`: `features\.user_id\.column` should hold integers"):
        compare(load_plan(_file(tmp_path, base)), tmp_path / "other", resume=False, conduct_all=_fails)

    pq.write_table(bad, tmp_path / "test" / "a.parquet")
    base["data"]["on_bad_rows"] = "skip"
    plan = load_plan(_file(tmp_path, base, budget={"steps": 2}, match="none", segment=None))
    assert compare(plan, tmp_path / "skipped", resume=False, conduct_all=_conduct_here)["test_rows"] == 798

    # a variant whose own feature refuses another row would be measured on other rows than the base
    prices = table["price"].to_numpy().copy()
    prices[9] = -1.0
    bad = bad.set_column(table.column_names.index("price"), "price", pa.array(prices))
    pq.write_table(bad, tmp_path / "test" / "a.parquet")
    weighted = {"weighted": {"set": {"features.user_id.weights": "price"}}}
    plan = load_plan(_file(tmp_path, base, variants=weighted, match="none", segment=None))
    with pytest.raises(ValueError, match=r"Variant 'weighted': `data\.on_bad_rows`: .* Found 3 skipped for this one and 2 for"):
        compare(plan, tmp_path / "unlike", resume=False, conduct_all=_fails)
    base["data"]["max_bad_fraction"] = 0.001
    with pytest.raises(ValueError, match=r"`data\.max_bad_fraction` \(0\.001\) is exceeded in `data\.test`: 2 bad rows"):
        compare(load_plan(_file(tmp_path, base)), tmp_path / "many", resume=False, conduct_all=_fails)


def test_a_run_that_was_asked_to_stop_is_to_go_on(log: Path, tmp_path: Path) -> None:
    plan = load_plan(_file(tmp_path, _tree(log), budget={"steps": 6}))
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
    plan = load_plan(_file(tmp_path, _tree(log), budget={"steps": 40}))
    training = with_budget(plan.experiments["mmoe"], 2_000, plan.comparison.budget, 8).training
    assert (training.max_steps, training.epochs, training.validate_every) == (40, 3, 5)


def test_matching_reaches_the_target(log: Path, tmp_path: Path) -> None:
    plan = load_plan(_file(tmp_path, _tree(log)))
    for what, target in (("parameters", 20_000), ("flops", 60_000)):
        made, done = matched(plan.experiments["single_task"], 26, what, target)
        assert done["size"] == dense_size(made, 26)[what]
        assert abs(done["size"] - target) < 0.05 * target


def test_draws_cover_a_list_and_a_range() -> None:
    search = Search.model_validate({"trials": 4, "space": {"a": [1, 2, 3, 4], "b": {"uniform": [0, 1]}}})
    draws = search_draws(search)
    assert sorted(each["a"] for each in draws) == [1, 2, 3, 4]
    assert sorted(int(4 * each["b"]) for each in draws) == [0, 1, 2, 3]
    assert search_draws(search) == draws


def test_a_run_cut_short_while_its_folder_was_made_is_made_again(log: Path, tmp_path: Path) -> None:
    plan = load_plan(_file(tmp_path, _tree(log)))
    spec = Spec("mmoe/seed-0", "mmoe", 0, plan.experiments["mmoe"])
    place = folder_of(tmp_path / "out", spec.name)
    (place / "encoder").mkdir(parents=True)
    assert make_folders(plan, tmp_path / "out", [spec]) == ["mmoe/seed-0"]
    assert (place / "run.json").is_file()


def _drawn(names: Sequence[str], segments: Sequence[str] = ()) -> dict[str, Any]:
    """What the figures of a comparison of these variants are drawn from; the first is the baseline, the last the A/A row."""
    row = {"task": "click", "metric": "auc", "value": 0.1, "low": -0.1, "high": 0.3}
    found = {"value": 0.7, "low": 0.6, "high": 0.8, "by_seed": {"0": 0.7}}
    curve = {"click": {"metric": "auc", "mean": [[1, 0.6, 0.1], [2, 0.7, 0.1]]}}
    return {
        "variants": {
            name: {"metrics": {"click": {"auc": found}}, "curves": {"validation": curve}, "again": name == names[-1]}
            for name in names
        },
        "baseline": names[0],
        "again": names[-1],
        "primary": {"click": "auc"},
        "differences": [{**row, "variant": name} for name in names[1:]],
        "segments": [{**row, "variant": name, "segment": each, "rows": 1_000} for name in names[1:-1] for each in segments],
    }


def test_no_two_of_many_variants_look_alike_and_none_like_the_baseline() -> None:
    results = _drawn(["base", *(f"variant-{index}" for index in range(20)), "base again"])
    looks = list(figures.styles(results).values())
    assert len(set(looks)) == 22
    assert [look.colour == looks[0].colour for look in looks] == [True] + [False] * 21
    labels = figures.legend(results)
    assert (labels["variant-0"], labels["variant-8 (square)"]) == (looks[1].colour, looks[1].colour)
    lines = [each for each in figures.learning_curves(results, "click")["data"] if each["mode"] == "lines+markers"]
    assert len({(each["line"]["color"], each["line"]["dash"], each["marker"]["symbol"]) for each in lines}) == 21


def test_long_names_are_all_on_their_axis_in_short() -> None:
    names = ["base", *(f"a-variant-whose-name-has-some-forty-letters-{index}" for index in range(12)), "base again"]
    segments = ["a<b", *(f"a segment with a very long name, number {index}" for index in range(5))]
    results = _drawn(names, segments)
    across, heat = figures.metric_intervals(results, "click", "auc"), figures.segments(results, "click")
    for axis, count in (
        (across["layout"]["yaxis"], 14),
        (figures.differences(results, "click", "auc")["layout"]["yaxis"], 13),
        (heat["layout"]["xaxis"], 12),
        (heat["layout"]["yaxis"], 6),
    ):
        assert len(set(axis["tickvals"])) == len(set(axis["ticktext"])) == count
        assert max(len(text.removesuffix(" (1,000)")) for text in axis["ticktext"]) <= 24
    assert across["data"][2]["y"] == [names[1]]  # hovering tells the whole name
    assert heat["layout"]["yaxis"]["ticktext"][0] == "a&lt;b (1,000)"
    few = figures.segments(_drawn(["base", "other", "again"], segments), "click")
    assert heat["layout"]["height"] > few["layout"]["height"] + 24 * 7
    assert (heat["layout"]["xaxis"]["tickangle"], few["layout"]["xaxis"]["tickangle"]) == (90, 0)


def test_experts_at_a_single_logged_step_can_be_seen() -> None:
    seeds = {"0": {"steps": [24], "shares": [[0.25, 0.75]]}}
    assert {each["mode"] for each in figures.expert_use({"click": seeds}, "mmoe")["data"]} == {"lines+markers"}
    many = {"0": {"steps": list(range(50)), "shares": [[0.25, 0.75]] * 50}}
    assert {each["mode"] for each in figures.expert_use({"click": many}, "mmoe")["data"]} == {"lines"}
    experts = figures.gate_heat({"click": {"0": {"steps": [24], "shares": [[0.1] * 10]}}}, "mmoe")["layout"]["xaxis"]
    assert experts["dtick"] == 1
    assert "nticks" not in experts


def test_a_value_at_the_edge_is_at_an_end_of_its_range(log: Path, tmp_path: Path) -> None:
    ranges = {
        "model.architecture.num_experts": {"int": [2, 8]},
        "optimizer.dense.learning_rate": {"log_uniform": [1e-4, 1e-2]},
        "model.dropout": {"uniform": [0.0, 0.4]},
    }
    space = {"model.architecture.kind": ["shared_bottom", "mmoe"], **ranges}
    search = {"trials": 8, "space": space}
    plan = load_plan(_file(tmp_path, _tree(log), search=search, match="none"))
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
    plan = load_plan(_file(tmp_path, _tree(log), **before))
    specs = [Spec(f"mmoe/{name}", "mmoe", 0, plan.experiments["mmoe"], name == "seed-0") for name in ("seed-0", "trial-0")]
    make_folders(plan, tmp_path / "out", specs)
    made = (folder_of(tmp_path / "out", "mmoe/seed-0") / "compare.json").read_text()
    make_folders(plan, tmp_path / "out", specs)
    other = load_plan(_file(tmp_path, _tree(log), **after))
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
    base = _tree(log)
    base["training"]["epochs"] = 1_000
    plan = load_plan(_file(tmp_path, base, budget={"seconds": 0.5}))
    assert isinstance(plan.comparison, Comparison)
    assert plan.comparison.budget == Budget(seconds=0.5)
    spec = Spec("mmoe/seed-0", "mmoe", 0, plan.experiments["mmoe"])
    make_folders(plan, tmp_path / "out", [spec])
    _conduct_here(tmp_path / "out", [spec.name])
    done = read_done(tmp_path / "out", spec.name)
    assert done["reason"] == "stopped"
    assert 1 <= done["steps"] < 16_000
    assert done["train_seconds"] < 5
