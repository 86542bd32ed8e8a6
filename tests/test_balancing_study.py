"""The statistics and the bookkeeping of pipelines/balancing."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

FOLDER = Path(__file__).parents[1] / "pipelines" / "balancing"
sys.path.insert(0, str(FOLDER))

import study  # noqa: E402
import study_report  # noqa: E402


def run(variant: str, seed: int, score: float, dataset: str = "synthetic") -> dict[str, Any]:
    metrics = {"click": score, "conversion": score - 0.1, "dwell": score - 0.2}
    cosines = {"cosine_at_parameters/click/dwell": {"mean": -0.25, "sd": 0.1}}
    cosines |= {f"gradient_norm_at_parameters/{task}": {"mean": 2.0, "sd": 0.1} for task in ("click", "dwell")}
    return {
        "dataset": dataset,
        "seed": seed,
        "variant": variant,
        "rows": 1_000,
        "metrics": metrics,
        "score": score - 0.1,
        "weights": dict.fromkeys(metrics, 1.0),
        "cosines": cosines if variant == "static" else {},
        "seconds": 2.0,
    }


def test_the_difference_is_the_paired_one_of_scipy() -> None:
    rng = np.random.default_rng(0)
    base, own = rng.normal(0.7, 0.01, 5), rng.normal(0.71, 0.01, 5)
    runs = [{seed: run("x", seed, score) for seed, score in enumerate(scores)} for scores in (own, base)]
    found = study_report.paired(*runs)
    assert found is not None
    expected = stats.ttest_rel(own, base)
    interval = expected.confidence_interval(0.95)
    assert found == pytest.approx((np.mean(own - base), (interval.high - interval.low) / 2, expected.pvalue), rel=1e-9)
    assert study_report.paired({1: run("x", 1, 0.5)}, {1: run("y", 1, 0.4)}) is None


def test_holm_equals_the_step_down_by_hand() -> None:
    assert study_report.holm([0.02, 0.001, 0.5, 0.03]) == pytest.approx([0.06, 0.004, 0.5, 0.06])


def test_the_report_finds_the_method_that_helps_and_says_what_is_missing() -> None:
    noise = np.random.default_rng(1).normal(0, 1e-4, (3, 5))
    runs = [run("tuned static", seed, 0.80 + 0.01 * seed) for seed in range(1, 6)]
    for row, (name, gain) in enumerate((("static", 0.0), ("upgrad", 0.01), ("mgda", -0.02))):
        runs += [run(name, seed, 0.80 + 0.01 * seed + gain + noise[row, seed - 1]) for seed in range(1, 6)]
    runs += [run("only click", seed, 0.80 + 0.01 * seed + 0.005) for seed in range(1, 6)]
    text = study_report.markdown(runs, 40, {"processes": 2, "versions": {"torch": "2.13.0"}}, 3.0)
    assert "25 of 40 planned runs" in text
    assert "Better than tuned static (p < 0.05): upgrad. Worse: mgda. For the other 1 no difference" in text
    assert "| `parameters` | -0.250 (sd 0.100) | 1 : 1 |" in text
    assert "| click | 0.8350 ± 0.0158 | +0.00" in text
    begun = study_report.markdown([run("trial 0", 0, 0.5)], 40, {"processes": 2, "versions": {}}, 0.1)
    assert "1 of 40 planned runs" in begun
    assert "Only trials of the search for static weights so far." in begun


def test_a_run_is_known_by_what_was_asked_of_it(tmp_path: Path) -> None:
    job = study.Job("synthetic", 1, "mgda", ("balancing.kind=mgda",), "anywhere", 1_000)
    results = study.Results(tmp_path / "results.json", {})
    results.add({"key": job.key}, 1.0)
    again = study.Results(tmp_path / "results.json", {})
    assert again.find(job) == {"key": job.key}
    assert again.find(study.Job("synthetic", 1, "mgda", ("balancing.kind=mgda",), "anywhere", 2_000)) is None
    assert again.find(study.Job("synthetic", 1, "mgda", ("balancing.kind=upgrad",), "anywhere", 1_000)) is None
    again.save(2.0)
    assert json.loads((tmp_path / "results.json").read_text())["minutes"] == 3.0


def test_the_search_has_sum_three_and_starts_with_ones() -> None:
    found = study.trials(5)
    assert found["trial 0"][1] == "balancing.weights={click: 1, conversion: 1, dwell: 1}"
    for overrides in found.values():
        values = [float(part.split(":")[1]) for part in overrides[1].split("{")[1].rstrip("}").split(",")]
        assert sum(values) == pytest.approx(3.0, rel=1e-4)
    assert len({tuple(each) for each in found.values()}) == 5
