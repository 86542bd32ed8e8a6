"""Comparisons of balancing: preference sweeps, and what a report says of weights and gradients."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from logs import experiment_tree, write_log

from mtrec.compare.balance import balancing_series, disagreements, mean_cosines
from mtrec.compare.figures import legend, pareto, styles
from mtrec.compare.plan import load_plan
from mtrec.compare.report import comparison_report, run_report
from mtrec.compare.runs import conduct, folder_of
from mtrec.compare.whole import compare, plan_of
from mtrec.run import open_run

PREFERENCES = [{"click": 3, "dwell": 1}, {"click": 1, "dwell": 3}]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balance")
    for name, rows, seed in (("train", 1_500, 0), ("validation", 400, 1), ("test", 600, 2)):
        write_log(folder / name, rows=rows, seed=seed)
    return folder


def _file(log: Path, folder: Path, variants: dict[str, Any], **base: Any) -> Path:
    tree: dict[str, Any] = experiment_tree(log / "train", log / "validation") | base
    tree["data"]["test"] = str(log / "test")
    del tree["tasks"]["conversion"]
    (folder / "base.yaml").write_text(yaml.safe_dump(tree))
    comparison = {"base": "base.yaml", "baseline": "mmoe", "variants": variants, "seeds": 2}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    return folder / "comparison.yaml"


def test_a_preference_is_a_variant_of_its_own(log: Path, tmp_path: Path) -> None:
    variants = {
        "static": {"preference": PREFERENCES},
        "cagrad": {"set": {"balancing": {"kind": "cagrad", "every": 5}}, "preference": PREFERENCES},
    }
    plan = load_plan(_file(log, tmp_path, variants))
    assert list(plan.experiments) == ["mmoe", "static-3-1", "static-1-3", "cagrad-3-1", "cagrad-1-3"]
    assert plan.sweeps["cagrad"] == {"cagrad-3-1": {"click": 3.0, "dwell": 1.0}, "cagrad-1-3": {"click": 1.0, "dwell": 3.0}}
    static, cagrad = (plan.experiments[name].balancing for name in ("static-1-3", "cagrad-1-3"))
    assert static.options == {"weights": {"click": 1.0, "dwell": 3.0}, "normalize": True}
    assert (cagrad.kind, cagrad.options) == ("cagrad", {"every": 5, "preference": {"click": 1.0, "dwell": 3.0}})


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (
            {"set": {"balancing.kind": "pcgrad"}, "preference": PREFERENCES},
            r"`variants\.v\.preference`: the balancing method pcgrad has no preference\. Methods that have one: static, .*cagrad",
        ),
        (
            {"preference": [{"click": 1}, {"dwel": 2}]},
            r"`variants\.v\.preference\.1\.dwel` should name a task \(click, dwell\)\. Found 'dwel'\. Did you mean 'dwell'\?",
        ),
        ({"preference": [{"click": 1}, {"dwell": 1}]}, r"`variants\.v\.preference\.1` should differ from the others"),
        ({"preference": [{"click": 1}]}, r"`variants\.v\.preference` should"),
        ({"preference": [{"click": 1}, {"dwell": 0}]}, r"`variants\.v\.preference\.1\.dwell` should be greater than 0"),
        (
            {"set": {"balancing": {"kind": "static", "weights": {"click": 2}}}, "preference": PREFERENCES},
            r"`variants\.v\.preference` sets `balancing\.weights`, which the variant has already",
        ),
        ({"preferences": PREFERENCES}, r"`variants\.v\.preferences` is not a known key\. Did you mean 'preference'\?"),
    ],
)
def test_a_wrong_preference_is_told_first(log: Path, tmp_path: Path, variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_plan(_file(log, tmp_path, {"v": variant}))


def test_the_report_joins_a_sweep_and_shows_gradients(log: Path, tmp_path: Path) -> None:
    balancing = {"kind": "static", "log_gradients": True, "every": 4}
    variants = {"cagrad": {"set": {"balancing": {"kind": "cagrad", "every": 4}}, "preference": PREFERENCES}}
    plan = load_plan(_file(log, tmp_path, variants, balancing=balancing))

    def here(folder: Path, names: Any) -> None:
        for name in names:
            conduct(folder_of(folder, name), torch.device("cpu"))

    folder = tmp_path / "out"
    results = compare(plan, folder, resume=False, conduct_all=here)
    assert plan_of(results["facts"]).sweeps == plan.sweeps
    drawn = pareto(results, "click", "dwell")["data"]
    line = drawn[0]
    at = {name: [each["metrics"][task][metric]["value"] for task, metric in plan.primary.items()]
          for name, each in results["variants"].items()}  # fmt: skip
    # from the preference for dwell to that for click
    assert [line["x"], line["y"]] == [list(each) for each in zip(at["cagrad-1-3"], at["cagrad-3-1"], strict=True)]
    assert [mark["text"] for mark in drawn if "text" in mark] == [["3:1"], ["1:3"]]
    looks = styles(results)
    assert looks["cagrad-1-3"] == looks["cagrad-3-1"] != looks["mmoe"]
    assert "cagrad (2 preferences)" in legend(results)
    series = results["variants"]["cagrad-1-3"]["balancing"]["0"]
    run = open_run(folder_of(folder, "cagrad-1-3/seed-0"))
    lines = (run.folder / "log.jsonl").read_text().splitlines()
    logged = [line for line in lines if '"cosine_at_parameters/click/dwell"' in line]
    assert series["at"] == "parameters"
    assert series["cosines"].keys() == {"click/dwell"}
    assert len(series["cosines"]["click/dwell"]) == len(logged) > 3
    for page in (comparison_report(results), run_report(run)):
        assert "<h2>Balancing</h2>" in page
        shown = json.loads(re.search(r"const FIGURES = (.*);\n", page)[1])  # type: ignore[index]
        titles = {each["layout"]["title"]["text"].rpartition(": ")[2]: each["layout"]["xaxis"]["title"]["text"] for each in shown}
        assert titles["mean cosine"] == "at the shared dense parameters"
        assert titles["gradient norms"] == titles["cosines"] == "step; at the shared dense parameters"


def test_gradients_disagree_where_most_steps_say_so_and_the_place_is_named() -> None:
    def step(number: int, near: float, far: float) -> dict[str, Any]:
        scalars = {
            "weight/a": 1.0,
            "gradient_norm_at_batch_sum/a": 2.0,
            "cosine_at_batch_sum/a/b": near,
            "cosine_at_batch_sum/a/c": far,
        }
        return {"event": "step", "step": number, "balancing": scalars}

    # the last step is logged again after a restart
    events = [step(1, 0.5, -0.4), step(2, -0.1, -0.2), step(3, 0.9, 0.3), step(3, 0.3, -0.3), {"event": "ended", "step": 3}]
    series = balancing_series(events)
    assert series["cosines"]["a/b"] == [[1, 0.5], [2, -0.1], [3, 0.3]]
    assert mean_cosines({"0": series})["a/c"] == (pytest.approx(-0.3), 1.0)
    assert disagreements("cagrad", {"0": series}) == [
        "cagrad: the gradients of a and c disagree: cosine below 0 in 100% of the logged steps, -0.30 on average, "
        "at the experts' input, summed over the rows of the batch."
    ]
