"""Searches: spaces and what is refused before anything runs; results from trials that were trained in this process."""

import contextlib
import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from logs import experiment_tree, write_log

from mtrec.checkpoint import CheckpointError
from mtrec.compare.runs import prepared, train_here
from mtrec.compare.space import Parameter, active, place_of
from mtrec.config import apply_overrides, load_experiment, parse_experiment, with_absolute_paths
from mtrec.events import Failed
from mtrec.experiment import Experiment
from mtrec.locking import LockedError, locked
from mtrec.prepare import prepare
from mtrec.recorder import Recorder
from mtrec.run import Run, open_run
from mtrec.train import train
from mtrec.tune import figures
from mtrec.tune.plan import Plan, checked, load_plan
from mtrec.tune.trials import (
    AS_WRITTEN,
    best_validation,
    folder_of,
    make_trial,
    read_result,
    total_steps,
    train_trial,
    values_at,
    write_result,
)
from mtrec.tune.whole import read_plan, tune

RATE = {"optimizer.dense.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
KINDS = {"model.architecture.kind": {"choice": ["mmoe", "shared_bottom"]}, "model.architecture.num_experts": {"int": [2, 4]}}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("tune")
    write_log(folder / "train", rows=1_000)
    write_log(folder / "validation", rows=500, seed=1)
    return with_absolute_paths(parse_experiment(experiment_tree(folder / "train", folder / "validation")))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, r"`parameters` is missing"),
        ({"parameters": {}}, r"`parameters` should hold at least one entry"),
        ({"parameter": RATE}, r"`parameter` is not a known key\. Did you mean 'parameters'\?"),
        (
            {"parameters": {"optimizer.dense.learning_rat": {"uniform": [0.1, 1]}}},
            r"`parameters\.optimizer\.dense\.learning_rat`: .*is not a known key\. Did you mean 'learning_rate'\?",
        ),
        ({"parameters": {"model.dropout": {"log_unifrom": [0.1, 0.2]}}}, r"log_unifrom` is not a known key.*'log_uniform'"),
        ({"parameters": {"model.dropout": {}}}, r"`parameters\.model\.dropout`: should be one of uniform, .*Found none"),
        (
            {"parameters": {"model.dropout": {"uniform": [0, 1], "choice": [0, 1]}}},
            r"`parameters\.model\.dropout`: should be one of .*Found uniform, choice",
        ),
        ({"parameters": {"model.dropout": {"uniform": [0.2, 0.2]}}}, r"low < high\. Found \[0\.2, 0\.2\]"),
        ({"parameters": {"model.dropout": {"uniform": [0.3, 0.2]}}}, r"low < high"),
        ({"parameters": {"model.dropout": {"uniform": [0.3, True]}}}, r"`parameters\.model\.dropout\.uniform\.1` should be"),
        ({"parameters": {"training.epochs": {"int": [1, 2.5]}}}, r"`parameters\.training\.epochs\.int\.1` should be"),
        ({"parameters": {"model.dropout": {"log_uniform": [0, 0.2]}}}, r"should begin above 0"),
        ({"parameters": {"model.dropout": {"choice": [0.2]}}}, r"choice should be at least 2 different values"),
        ({"parameters": {"model.dropout": [0.2, 0.2]}}, r"choice should be at least 2 different values"),
        ({"parameters": {"model.dropout": {"uniform": [0, 1.5]}}}, r"`parameters\.model\.dropout`: .*Found 1\.5"),
        ({"parameters": {"model.architecture.kind": ["mmoe", "pel"]}}, r"model\.architecture\.kind`.*Did you mean 'ple'\?"),
        (
            {"parameters": {"model.architecture.kind": ["mmoe", "ple"], "model.architecture.experts": {"int": [2, 4]}}},
            r"`model\.architecture\.experts` is not a known key",
        ),
        ({"parameters": {"data.batch_size": {"int": [64, 129]}}}, r"`data\.batch_size` should be a multiple"),
        ({"parameters": {"model.embedding_dim": [8, 10]}}, r"`model\.embedding_dim` should be a multiple of 4.*Found 10"),
        ({"parameters": {"seed": {"int": [0, 3]}}}, r"`parameters\.seed`: `seed` stays as it is"),
        ({"parameters": {"training.best_metric": ["click/auc", "dwell/xauc"]}}, r"stays as it is"),
        ({"parameters": {"data": [{"train": "a"}, {"train": "b"}]}}, r"stays as it is"),
        (
            {"parameters": {"model.architecture": ["mmoe", "ple"], "model.architecture.num_experts": {"int": [2, 4]}}},
            r"`parameters\.model\.architecture\.num_experts` lies inside of `parameters\.model\.architecture`",
        ),
        ({"parameters": RATE, "objectives": ["click/auk"]}, r"`objectives\.0` .*Found 'auk'.* Did you mean 'auc'\?"),
        ({"parameters": RATE, "objectives": ["klick/auc"]}, r"`objectives\.0` .*Did you mean 'click'\?"),
        ({"parameters": RATE, "objectives": ["click"]}, r"`objectives\.0` should be a task .*Found 'click'\.$"),
        ({"parameters": RATE, "objectives": ["klick"]}, r"Found 'klick'\. Did you mean 'click'\?"),
        ({"parameters": RATE, "objectives": ["dwell/sum_ratio"]}, r"which has no better direction"),
        ({"parameters": RATE, "objectives": ["click/auc", "click/auc"]}, r"`objectives\.1` .*twice"),
        ({"parameters": RATE, "objectives": []}, r"`objectives` should"),
        ({"parameters": RATE, "budget": {"seconds": 5}}, r"`budget` of a search should be steps or rows"),
        ({"parameters": {"training.epochs": {"int": [1, 3]}}, "budget": {"steps": 5}}, r"both say how long a trial is"),
        ({"parameters": {"data.train.where": {"choice": ["age > 1", "age > 2"]}}, "budget": {"rows": 500}}, "counts rows before"),
        (
            {"parameters": RATE, "objectives": ["click/auc", "dwell/xauc"], "asha": {"grace": 0.5}},
            r"`asha` should be left out with several `objectives`",
        ),
        ({"parameters": RATE, "asha": {"grace": 1.5}}, r"`asha.*grace` should be"),
        ({"parameters": RATE, "seed": -1}, r"`seed` should be"),
    ],
)
def test_mistakes_are_told_before_anything_runs(experiment: Experiment, space: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(experiment, space, 4)


def test_a_search_needs_validation_rows_a_file_and_trials(experiment: Experiment, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--space: there is no file"):
        load_plan(experiment, tmp_path / "none.yaml", 4)
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({"parameters": RATE}))
    with pytest.raises(ValueError, match=r"--trials should be at least 1"):
        load_plan(experiment, tmp_path / "space.yaml", 0)
    data = experiment.data.model_copy(update={"validation": None})
    with pytest.raises(ValueError, match=r"the experiment has no `data\.validation`"):
        load_plan(experiment.model_copy(update={"data": data}), tmp_path / "space.yaml", 4)


def test_a_mistake_is_told_of_the_file_that_holds_it(experiment: Experiment, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"parameters": {"model.dropuot": [0.0, 0.1]}}))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(space))}: `parameters\.model\.dropuot`"):
        load_plan(experiment, space, 4)
    space.write_text(yaml.safe_dump([RATE]))
    with pytest.raises(ValueError, match=r"should be a YAML mapping with keys such as parameters, .*Found list\."):
        load_plan(experiment, space, 4)
    space.write_text(yaml.safe_dump({"parameters": RATE}))
    tree = experiment.model_dump(mode="json")
    for change, message in (
        ("training.best_metric=click/foo", r"^`training\.best_metric` should"),
        ("scoring.formula=p_klick", r"^`scoring\.formula` should"),
        (f"data.train.path={tmp_path}/none", r"^`data\.train\.path` should name a file or folder that exists"),
        (f"data.validation.path={tmp_path}/none", r"^`data\.validation\.path` should name a file or folder that exists"),
    ):
        with pytest.raises(ValueError, match=message):
            load_plan(parse_experiment(apply_overrides(tree, [change])), space, 4)


def test_a_trial_whose_checkpoints_are_damaged_is_told_before_any_trial(experiment: Experiment, tmp_path: Path) -> None:
    from mtrec.jobs.tune import search_on_ray

    plan = checked(experiment, {"parameters": RATE}, 2)
    prepared(tmp_path, plan.experiment)
    place = make_trial(plan, tmp_path, 1, {"optimizer.dense.learning_rate": 0.5})
    damaged = place / "checkpoints" / "step-00000010"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text('{"files": {"__0_0.distcp": {"bytes": 1, "sha256": ""}}, "format": 1}')
    with pytest.raises(CheckpointError, match=r"can be trusted: step-00000010: .* once this run's folder is removed"):
        search_on_ray(plan, tmp_path)
    assert read_result(tmp_path, 1) is None


def test_values_that_are_refused_only_together_are_found(experiment: Experiment) -> None:
    both = {"data.batch_size": {"choice": [96, 128]}, "data.num_streams": {"choice": [8, 64]}}  # 96 is no multiple of 64
    with pytest.raises(ValueError, match=r"`data\.batch_size` should be a multiple.*That is the draw data\.batch_size = 96"):
        checked(experiment, {"parameters": both}, 4)


def test_one_objective_chooses_the_checkpoint_and_asha_is_for_one(experiment: Experiment) -> None:
    one = checked(experiment, {"parameters": RATE, "objectives": "click/log_loss"}, 4)
    assert one.experiment.training.best_metric == "click/log_loss"
    assert [each.larger for each in one.objectives] == [False]
    assert one.asha is not None
    several = checked(experiment, {"parameters": RATE, "objectives": ["click/auc", "dwell/xauc"]}, 4)
    assert several.experiment == experiment
    assert several.asha is None
    assert checked(experiment, {"parameters": RATE, "asha": False}, 4).asha is None


def test_the_name_of_an_objective_s_task_may_hold_a_slash(experiment: Experiment) -> None:
    tree = experiment.model_dump(mode="json")
    tree["tasks"]["like/share"] = {**tree["tasks"].pop("click"), "label": "click"}
    tree["tasks"] = {name: {**task, "given": task["given"] and "like/share"} for name, task in tree["tasks"].items()}
    plan = checked(parse_experiment(tree), {"parameters": RATE, "objectives": ["like/share/auc", "dwell/xauc"]}, 4)
    event = {"metrics": {"tasks": {"like/share": {"auc": 0.7}, "dwell": {"xauc": 0.6}}}}
    assert [each.value(event) for each in plan.objectives] == [0.7, 0.6]


def test_an_option_is_drawn_only_for_the_kinds_that_have_it(experiment: Experiment) -> None:
    plan = checked(experiment, {"parameters": KINDS}, 4)
    values = {"model.architecture.num_experts": 3, "model.architecture.kind": "shared_bottom"}
    assert active(plan.search.parameters, values) == {"model.architecture.kind": "shared_bottom"}
    kinds_first = active(plan.search.parameters, {**values, "model.architecture.kind": "mmoe"})
    assert list(kinds_first) == ["model.architecture.kind", "model.architecture.num_experts"]


@given(st.floats(0, 1, exclude_max=True), st.integers(1, 50), st.integers(1, 500))
def test_a_share_lies_in_its_range(share: float, low: int, width: int) -> None:
    high = low + width
    for form in ("int", "log_int"):
        parameter = Parameter.model_validate({form: [low, high]})
        value = parameter.at(share)
        assert isinstance(value, int)
        assert low <= value <= high
    for form in ("uniform", "log_uniform"):
        parameter = Parameter.model_validate({form: [float(low), float(high)]})
        assert low <= parameter.at(share) <= high
        assert place_of(parameter, parameter.at(share)) == pytest.approx(share, abs=1e-6)


def _search(shares: list[dict[str, float]]) -> Any:
    """A search of given draws in this process, in place of Ray's."""

    def search(plan: Plan, folder: Path) -> None:
        for number, each in enumerate([{}, *shares]):
            if read_result(folder, number) is None:
                place = make_trial(plan, folder, number, each)
                with contextlib.suppress(ValueError):  # it is noted in the folder
                    train_trial(place, plan.objectives, torch.device("cpu"), lambda share, values: None)
                write_result(plan, folder, number)

    return search


@pytest.fixture(scope="module")
def searched(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Plan]:
    folder = tmp_path_factory.mktemp("searched")
    space = {"parameters": {**RATE, **KINDS}, "objectives": ["click/auc", "dwell/mae"]}
    plan = checked(experiment, space, 3)
    rate, kind, experts = space["parameters"]
    shares = [{rate: 0.99, kind: 0.0, experts: 0.99}, {rate: 0.0, kind: 0.7, experts: 0.0}, {rate: 0.6, kind: 0.7, experts: 0.0}]
    return folder, tune(plan, folder, resume=False, search=_search(shares)), plan


def test_results_hold_every_trial_and_the_best_is_a_whole_experiment(searched: tuple[Path, dict[str, Any], Plan]) -> None:
    folder, results, plan = searched
    assert [each["state"] for each in results["trials"]] == ["finished"] * 4
    assert results["trials"][1]["values"] == {
        "model.architecture.kind": "mmoe",
        "optimizer.dense.learning_rate": pytest.approx(9.55e-3, rel=1e-3),
        "model.architecture.num_experts": 4,
    }
    assert "model.architecture.num_experts" not in results["trials"][2]["values"]
    for trial in results["trials"]:  # the metrics of the run's best checkpoint, as its folder says
        found = json.loads((folder_of(folder, trial["number"]) / "log.jsonl").read_text().splitlines()[-1])
        assert found["best_step"] == trial["best_step"]
    points = {each["number"]: (each["objectives"]["click/auc"], -each["objectives"]["dwell/mae"]) for each in results["trials"]}
    front = [a for a, p in points.items() if not any(all(q[i] >= p[i] for i in (0, 1)) and q != p for q in points.values())]
    assert results["front"] == front
    best = load_experiment(folder / "best.yaml")
    values = {each["number"]: each["values"] for each in results["trials"]}[results["best"]]
    assert best.model.architecture.kind == values.get("model.architecture.kind", "mmoe")
    assert best.training == plan.experiment.training.model_copy(update={"validate_every": 1})  # 8 steps, curve_points 8
    assert sorted(path.name for path in (folder / "pareto").iterdir()) == [f"{number:03d}.yaml" for number in front]
    kept = {number for number in range(4) if list((folder_of(folder, number) / "checkpoints").glob("step-*"))}
    assert kept == set(front)
    assert open_run(folder_of(folder, results["best"])).best().metric == max(results["trials"][n]["metric"] for n in front)
    rows = list(csv.DictReader((folder / "trials.csv").open()))
    assert [float(row["click/auc"]) for row in rows] == [each["objectives"]["click/auc"] for each in results["trials"]]
    assert rows[2]["model.architecture.num_experts"] == ""


@pytest.mark.parametrize("budget", [None, {"steps": 26}])
def test_training_the_best_experiment_gives_the_figure_in_its_head(
    experiment: Experiment, tmp_path: Path, budget: dict[str, int] | None
) -> None:
    rate = {"optimizer.dense.learning_rate": {"log_uniform": [0.02, 0.1]}}  # so high that the best step is not the last
    space = {"parameters": rate, "objectives": ["click/auc"], "curve_points": 8, "budget": budget}
    training = experiment.training.model_copy(update={"epochs": 4})
    plan = checked(experiment.model_copy(update={"training": training}), space, 1)
    shares = [{"optimizer.dense.learning_rate": 0.2}]
    results = tune(plan, tmp_path / "out", resume=False, search=_search(shares))
    best = next(each for each in results["trials"] if each["number"] == results["best"])
    text = (tmp_path / "out" / "best.yaml").read_text()
    assert f"# click/auc {best['objectives']['click/auc']:.5f} on the validation rows" in text
    assert ("max_steps: 26" in text.split("\n")[2]) == (budget is not None)
    run = prepare(load_experiment(tmp_path / "out" / "best.yaml"), tmp_path / "again")
    train_here(run, torch.device("cpu"))
    found = best_validation(run, plan.objectives)
    assert found is not None
    assert values_at(found, plan.objectives) == [best["objectives"]["click/auc"]]
    assert (found["step"], total_steps(run)) == (best["best_step"], best["total_steps"])


def test_the_page_is_whole_and_made_again_from_the_files(
    searched: tuple[Path, dict[str, Any], Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from mtrec.cli import app

    folder, results, plan = searched
    page = (folder / "tune.html").read_text()
    assert '"type": "parcoords"' in page
    assert "<h2>The Pareto set</h2>" in page
    assert "<script src" not in page
    assert "<link rel=\"stylesheet" not in page
    before = (folder / "results.json").read_text()
    monkeypatch.chdir(folder.parent)
    made = CliRunner().invoke(app, ["report", folder.name, "--output", str(tmp_path / "page.html")])
    assert made.exit_code == 0, made.output
    assert (folder / "results.json").read_text() == before
    assert (tmp_path / "page.html").read_text() == page
    assert open_run(folder_of(folder, results["best"])).best()
    assert read_plan(json.loads((folder / "tune.json").read_text())) == plan


def test_long_choices_are_all_on_their_axis_in_short() -> None:
    choices = [f"my_own_module_of_towers:ArchitectureNumber{index}" for index in range(8)]
    trial = {"state": "finished", "objectives": {"click/auc": 0.7}}
    results = {
        "space": {"model.architecture.kind": {"choice": choices}},
        "as_written": {"model.architecture.kind": "mmoe"},
        "trials": [{**trial, "number": 1 + i, "values": {"model.architecture.kind": each}} for i, each in enumerate(choices)],
        "objectives": [{"name": "click/auc", "larger": True}],
        "best": 1,
    }
    drawn = figures.against_parameter(results, "model.architecture.kind", results["objectives"][0])
    axis = drawn["layout"]["xaxis"]
    assert axis["tickvals"] == [each["x"][0] for each in drawn["data"]] == choices
    assert len(set(axis["ticktext"])) == 8
    assert max(map(len, axis["ticktext"])) == 24
    assert (axis["tickangle"], drawn["layout"]["height"]) == (90, 290 + 180)
    drawn = figures.parallel_coordinates(results, results["objectives"][0])
    assert drawn["data"][0]["dimensions"][0]["ticktext"] == axis["ticktext"]


def test_a_search_is_taken_up_and_not_mixed_up(searched: tuple[Path, dict[str, Any], Plan], experiment: Experiment) -> None:
    folder, results, plan = searched
    again = tune(plan, folder, resume=True, search=lambda plan, folder: None)
    assert again == results
    with pytest.raises(ValueError, match=r"holds a search already\. Add --resume"):
        tune(plan, folder, resume=False, search=lambda plan, folder: None)
    other = checked(experiment, {"parameters": RATE}, 3)
    with pytest.raises(ValueError, match=r"--resume: the space differs"):
        tune(other, folder, resume=True, search=lambda plan, folder: None)


def test_a_trial_whose_workers_were_asked_to_stop_goes_on(experiment: Experiment, tmp_path: Path) -> None:
    plan = checked(experiment, {"parameters": RATE}, 1)
    (tmp_path / "prepared").mkdir()
    place = make_trial(plan, tmp_path, 1, {"optimizer.dense.learning_rate": 0.5})

    def asked_to_stop(run: Run, tell: Callable[[], None]) -> None:
        recorder = Recorder(run.folder)
        for event in train(run, device=torch.device("cpu"), stop_requested=lambda: True):
            recorder(event)
        recorder.close()

    def report(share: int, values: list[float]) -> None:
        assert share < 100

    with pytest.raises(RuntimeError, match="asked to stop before its end"):
        train_trial(place, plan.objectives, torch.device("cpu"), report, asked_to_stop)
    train_trial(place, plan.objectives, torch.device("cpu"), report)
    assert write_result(plan, tmp_path, 1)["state"] == "finished"


def test_a_search_that_was_cut_off_is_no_result(experiment: Experiment, tmp_path: Path) -> None:
    plan = checked(experiment, {"parameters": RATE}, 1)
    with pytest.raises(Failed, match=r"2 of 2 trials have no result \(first: 0\)\. --resume makes only these\."):
        tune(plan, tmp_path / "out", resume=False, search=lambda plan, folder: None)
    assert not (tmp_path / "out" / "best.yaml").exists()


def test_one_process_at_a_time_makes_a_search(experiment: Experiment, tmp_path: Path) -> None:
    plan = checked(experiment, {"parameters": RATE}, 1)
    with locked(tmp_path / "out" / "tune.lock", "it"), pytest.raises(LockedError, match=r"The search .*out is being written"):
        tune(plan, tmp_path / "out", resume=True, search=lambda plan, folder: None)


def test_a_failed_trial_is_told_and_does_not_end_the_search(experiment: Experiment, tmp_path: Path) -> None:
    space = {"parameters": {"optimizer.tables.learning_rate": {"log_uniform": [1e-3, 1e38]}}, "asha": False}
    training = experiment.training.model_copy(update={"max_nonfinite_steps": 2})
    plan = checked(experiment.model_copy(update={"training": training}), space, 2)
    shares = [{"optimizer.tables.learning_rate": 0.0}, {"optimizer.tables.learning_rate": 0.9999}]
    results = tune(plan, tmp_path / "out", resume=False, search=_search(shares))
    states = {each["number"]: each["state"] for each in results["trials"]}
    assert states == {AS_WRITTEN: "finished", 1: "finished", 2: "failed"}
    assert "should be finite" in results["trials"][2]["error"]
    assert "trial 2" in (tmp_path / "out" / "tune.html").read_text()
    alone = tune(checked(plan.experiment, space, 1), tmp_path / "alone", resume=False, search=_search(shares[1:]))
    assert (alone["best"], alone["trials"][1]["state"]) == (AS_WRITTEN, "failed")
    assert "No trial was better than the experiment as written" in (tmp_path / "alone" / "tune.html").read_text()
