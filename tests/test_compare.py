"""A small comparison from end to end, its numbers computed again from outside; what its page and its files say of it."""

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
import yaml
from rich.console import Console
from scipy import stats
from sklearn.metrics import log_loss, mean_absolute_error, roc_auc_score
from small_comparisons import comparison_file, conduct_here, write_logs
from typer.testing import CliRunner

from mtrec.cli import app
from mtrec.compare import results as compare_results
from mtrec.compare.measured import Measured
from mtrec.compare.plan import Plan, load_plan
from mtrec.compare.report import comparison_report
from mtrec.compare.results import compute, finished_runs
from mtrec.compare.runs import folder_of, read_done
from mtrec.compare.table import show_results
from mtrec.compare.whole import compare


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logs(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def whole(log: Path) -> tuple[Plan, Path, dict[str, Any]]:
    """A finished comparison: plan, folder, results."""
    plan = load_plan(comparison_file(log))
    folder = log / "out"
    return plan, folder, compare(plan, folder, resume=False, conduct_all=conduct_here)


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
    assert compare(plan, folder, resume=True, conduct_all=conduct_here)["complete"]


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
        compare(plan, folder, resume=False, conduct_all=conduct_here)
    lost = folder / "runs" / "shared_bottom" / "seed-1"
    (lost / "done.json").unlink()
    (lost / "predictions.parquet").unlink()
    asked: list[str] = []

    def note(folder: Path, names: Sequence[str]) -> None:
        asked.extend(names)
        conduct_here(folder, names)

    again = compare(plan, folder, resume=True, conduct_all=note)
    assert asked == ["shared_bottom/seed-1"]
    assert again["differences"] == results["differences"]  # it was trained; only the predictions were made again
    changed = {"set": {"model.architecture": {"kind": "shared_bottom", "dropout": 0.1}}}
    other = load_plan(comparison_file(log, variants={"shared_bottom": changed}))
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
