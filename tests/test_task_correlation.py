"""pipelines/task_correlation: the data are what the paper describes, the recipe is sound, and the claims are judged right."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from recipes import PIPELINES, recipe

from mtrec.compare.plan import dense_size, load_plan, matched
from mtrec.compare.runs import conduct, folder_of
from mtrec.compare.whole import compare
from mtrec.config import load_experiment
from mtrec.events import Ended, Step
from mtrec.prepare import prepare as prepare_run
from mtrec.train import train

FOLDER = PIPELINES / "task_correlation"
sys.path.insert(0, str(FOLDER))

import correlation_report  # noqa: E402
import correlation_study  # noqa: E402

CPU = torch.device("cpu")
NAMES = ("mmoe", "shared_bottom", "omoe", "ple")


GENERATOR = recipe("task_correlation/prepare.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("correlation")
    assert GENERATOR.prepare(folder, 0.9, rows=2_400, seed=3) == {"train": 2_000, "validation": 200, "test": 200}
    return folder


@pytest.mark.parametrize("correlation", [-1.0, -0.3, 0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_weight_vectors_have_the_cosine_that_was_asked_for(correlation: float, seed: int) -> None:
    w1, w2 = GENERATOR.draw_truth(correlation, seed).weights_KD
    assert w1 @ w2 == pytest.approx(correlation, abs=1e-6)
    assert [np.linalg.norm(w1), np.linalg.norm(w2)] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_only_the_second_task_depends_on_the_relation_and_the_labels_follow_it() -> None:
    found = []
    for correlation in (0.0, 0.5, 0.9, 1.0):
        table = GENERATOR.draw_rows(GENERATOR.draw_truth(correlation, 0), 5_000, 0, block=0)
        again = GENERATOR.draw_rows(GENERATOR.draw_truth(correlation, 0), 5_000, 0, block=0)
        assert table.equals(again)
        found.append((table, np.corrcoef(table["task_1"], table["task_2"])[0, 1]))
    first = found[0][0]
    assert first.schema.field("x").type == pa.list_(pa.float32(), 512)
    assert all(table.select(["x", "task_1"]).equals(first.select(["x", "task_1"])) for table, _ in found)
    correlations = [each for _, each in found]
    assert correlations == sorted(correlations)
    assert abs(correlations[0]) < 0.05  # x is normal: orthogonal directions are independent
    assert correlations[-1] > 0.95
    assert not GENERATOR.draw_rows(GENERATOR.draw_truth(1.0, 1), 10, 1, block=0)["x"].equals(first["x"][:10])


def test_the_labels_are_the_papers_formula_and_a_noise_of_variance_01() -> None:
    truth = GENERATOR.draw_truth(0.5, 7)
    table = GENERATOR.draw_rows(truth, 20_000, 7, block=2)
    x_ND = table["x"].combine_chunks().flatten().to_numpy().reshape(-1, 512).astype(np.float64)
    assert (x_ND.mean(), x_ND.var()) == pytest.approx((0.0, 1.0), abs=2e-3)
    for task, w_D in zip(("task_1", "task_2"), truth.weights_KD, strict=True):
        z_N = x_ND @ w_D
        mean_N = z_N.copy()
        for alpha, beta in zip(truth.alpha_M, truth.beta_M, strict=True):
            mean_N += np.sin(alpha * z_N + beta)
        np.testing.assert_allclose(table[f"{task}_truth"], mean_N, atol=1e-5)
        assert np.var(table[task].to_numpy() - mean_N) == pytest.approx(0.01, rel=0.05)


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`--correlation` should be from -1 to 1\. Found 1\.5"):
        GENERATOR.prepare(tmp_path, 1.5, rows=2_400, seed=0)
    with pytest.raises(ValueError, match="`--rows` should be at least 120"):
        GENERATOR.prepare(tmp_path, 0.5, rows=3, seed=0)


def test_the_recipe_passes_the_plans_check_and_its_variants_are_of_one_size(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_CORRELATION", str(data))
    plan = load_plan(FOLDER / "compare.yaml")
    assert list(plan.experiments) == ["mmoe", "shared_bottom", "omoe", "ple"]
    target = dense_size(plan.experiments["mmoe"], 512)["parameters"]
    sizes = [matched(each, 512, "parameters", target)[1]["size"] for each in plan.experiments.values()]
    assert sizes == pytest.approx([target] * 4, rel=0.01)


def test_an_experiment_without_any_table_trains_and_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_CORRELATION", str(data))
    run = prepare_run(load_experiment(FOLDER / "mmoe.yaml", ["training.log_every=1", "data.batch_size=200"]), tmp_path / "run")
    assert not run.encoder.tables
    losses, stops = [], iter([False] * 4 + [True] * 2)
    for event in train(run, device=CPU, stop_requested=lambda: next(stops)):
        losses += [sum(event.losses.values())] if isinstance(event, Step) else []
    assert isinstance(event, Ended)
    assert event.reason == "stopped"
    stopped_at = event.step
    for event in train(run, device=CPU, resume_from=run.best()):
        losses += [sum(event.losses.values())] if isinstance(event, Step) else []
    assert isinstance(event, Ended)
    assert (event.reason, event.step) == ("finished", 20)
    assert len(losses) == 20
    assert stopped_at < 20
    assert np.mean(losses[-3:]) < 0.7 * losses[0]


def test_the_tuned_rate_goes_into_the_comparison(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASK_CORRELATION", str(data))
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(correlation_study.with_rate(yaml.safe_load((FOLDER / "compare.yaml").read_text()), 0.02)))
    plan = load_plan(path)
    assert plan.comparison.search is None
    assert {each.optimizer.dense.learning_rate for each in plan.experiments.values()} == {0.02}


def _missed(**logarithms: Sequence[float]) -> dict[tuple[int, float, str], float]:
    """{(draw, p, variant): share} over 6 draws that differ in difficulty; `logarithms`: at p = .5, .9 and 1."""
    rng = np.random.default_rng(0)
    return {
        (draw, p, name): math.exp(each + 3 * draw / 6 + rng.normal(0, 0.01))
        for draw in range(6)
        for name, values in logarithms.items()
        for p, each in zip((0.5, 0.9, 1.0), values, strict=True)
    }


def _verdicts(missed: dict[tuple[int, float, str], float]) -> list[str]:
    return [each["verdict"] for each in correlation_report.claims(correlation_report.ratios(missed), (0.5, 0.9, 1.0))]


def test_a_world_as_the_papers_describe_it_is_found_and_its_opposite_too() -> None:
    papers = _missed(mmoe=[0.02, 0.01, 0], shared_bottom=[1, 0.5, 0.2], omoe=[0.6, 0.3, 0], ple=[-0.5, -0.5, -0.5])
    assert _verdicts(papers) == ["holds"] * 4
    other = _missed(mmoe=[1, 0.5, 0], shared_bottom=[0, 0.2, 0.4], omoe=[-0.5, 0, 0.5], ple=[2, 2, 2])
    assert _verdicts(other) == ["the opposite"] * 4


def test_without_a_difference_or_with_too_much_chance_nothing_is_claimed() -> None:
    rng = np.random.default_rng(1)
    alike = _missed(**{name: [0, 0, 0] for name in NAMES})
    missed = {key: value * math.exp(rng.normal(0, 0.6)) for key, value in alike.items()}
    assert set(_verdicts(missed)) == {"not shown"}


@pytest.mark.slow
def test_a_small_study_is_measured_from_its_saved_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = correlation_study.with_rate(yaml.safe_load((FOLDER / "compare.yaml").read_text()), 0.01)
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(tree))
    tuning = [{name: [{correlation_study.RATE: 0.01, "metric": 1.0}] for name in NAMES}]
    (tmp_path / "tuning.yaml").write_text(yaml.safe_dump(tuning))
    for draw in range(2):
        place = tmp_path / f"draw-{draw}" / "p-0.5"
        GENERATOR.prepare(place / "data", 0.5, rows=2_400, seed=draw)
        monkeypatch.setenv("TASK_CORRELATION", str(place / "data"))

        def conduct_here(folder: Path, names: Sequence[str]) -> None:
            for name in names:
                conduct(folder_of(folder, name), CPU)

        compare(load_plan(tmp_path / "compare.yaml"), place / "comparison", resume=False, conduct_all=conduct_here)
    found = correlation_report.measured(tmp_path / "draw-1" / "p-0.5")
    assert set(found["variants"]) == {*NAMES, "mmoe again"}
    predicted = pq.read_table(tmp_path / "draw-1/p-0.5/comparison/runs/ple/seed-1/predictions.parquet")
    test = pq.read_table(tmp_path / "draw-1/p-0.5/data/test.parquet")
    error = np.mean((predicted["task_2"].to_numpy() - test["task_2_truth"].to_numpy()) ** 2)
    assert found["variants"]["ple"]["missed"]["1"]["task_2"]["mse"] == pytest.approx(error, rel=1e-5)
    pq.write_table(test.take(pa.array(np.arange(200)[::-1])), tmp_path / "draw-1/p-0.5/data/test.parquet")
    with pytest.raises(ValueError, match="should hold the labels of"):
        correlation_report.measured(tmp_path / "draw-1" / "p-0.5")
