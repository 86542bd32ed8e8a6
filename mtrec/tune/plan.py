"""What a search is: an experiment, a space file, a number of trials; all checked before anything runs.

    parameters:
      optimizer.dense.learning_rate: {log_uniform: [1e-4, 1e-2]}
      model.architecture.kind: {choice: [mmoe, ple]}
    objectives: [click/auc]      # default: what training.best_metric says; several: the Pareto set is looked for
    budget: {rows: 200_000}      # of a trial; default: the epochs of the experiment

`load_plan(experiment, path, trials)` returns a `Plan`; every mistake is found here, by the path of the key that holds it.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import BeforeValidator, Field

from mtrec.compare.plan import COUNTS, Budget, varied
from mtrec.compare.space import Parameter, Space, active
from mtrec.config import DIALECT, KNOWN
from mtrec.evaluate import LARGER_IS_BETTER, SMALLER_IS_BETTER, Measures, check_best_metric
from mtrec.experiment import Experiment, Section
from mtrec.formula import ranking_formula
from mtrec.gradients import check_place
from mtrec.kinds import NonNegativeInt, PositiveInt, explain, nearest, option_types, resolve
from mtrec.model import task_specs
from mtrec.prepare import check_device
from mtrec.sources import evaluation_columns, open_source
from mtrec.tasks import Objectives
from mtrec.yaml_tree import naming, read_yaml

BEST_METRIC = "training.best_metric"
KEPT = ("seed", "name", "output", "data.validation", "data.test", "evaluation", BEST_METRIC)
LENGTHS = ("training.epochs", "training.max_steps")
RANDOM_DRAWS = 64  # that are checked beforehand, beside the ends of every range


class Asha(Section):
    """Asynchronous successive halving (Li et al. 2020): a trial that is not among the best at a rung is stopped there.

    Rungs lie at the share `grace` of a trial's training and at each `reduction_factor` times the one before; the best
    1 / reduction_factor of those that came so far go on.
    """

    grace: float = Field(0.25, gt=0.0, lt=1.0)
    reduction_factor: int = Field(2, ge=2)


class SearchFile(Section):
    """A space file."""

    parameters: Space
    objectives: Annotated[
        list[str] | None,
        BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value, json_schema_input_type=str | list[str] | None
        ),
    ] = Field(None, min_length=1, description="task/metric; default: training.best_metric of the experiment")
    budget: Budget | None = None
    asha: Asha | Literal[False] | None = Field(None, description="default: on with one objective, off with several")
    curve_points: PositiveInt = Field(8, description="validations a trial where the experiment sets no validate_every")
    seed: NonNegativeInt = Field(0, description="of the search; trials have the experiment's")


@dataclasses.dataclass(frozen=True)
class Objective:
    """`name`: task/metric, or training.best_metric; `larger`: whether more is better."""

    name: str
    larger: bool

    def value(self, event: Mapping[str, Any]) -> float | None:
        """Its value in a validation's event (a line of log.jsonl)."""
        if self.name == BEST_METRIC:
            found = event["metric"]
        else:
            task, _, metric = self.name.rpartition("/")
            found = event["metrics"]["tasks"][task].get(metric)
        return None if found is None else float(found)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked search.

    Attributes:
        search: the space file.
        experiment: as written, but with the single objective as its best metric.
        objectives: at least one.
        trials: how many are drawn; the experiment as it is written is made beside them, as number 0.
    """

    search: SearchFile
    experiment: Experiment
    objectives: tuple[Objective, ...]
    trials: int

    @property
    def asha(self) -> Asha | None:
        """None: every trial goes to its end. With several objectives a trial poor at the first may be on the Pareto front."""
        if self.search.asha is False or len(self.objectives) > 1:
            return None
        return self.search.asha or Asha()


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a space file."""
    return {**SearchFile.model_json_schema(), "$schema": DIALECT}


def load_plan(experiment: Experiment, path: str | Path, trials: int) -> Plan:
    """Reads and checks a space file against an experiment.

    Raises ValueError naming the file and the path of the key: a misspelt one, a range of one point, a value that the
    experiment refuses, an objective that no task has, a missing source.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--space: there is no file '{path}' (looked in {Path.cwd()}).")
    if trials < 1:
        raise ValueError(f"--trials should be at least 1. Found {trials}.")
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path), ("parameters", "objectives", "budget"))
    if experiment.data.validation is None:
        raise ValueError("A search chooses on validation rows, and the experiment has no `data.validation`.")
    check_best_metric(experiment, Objectives(task_specs(experiment)))
    _check_whole(experiment)
    with naming(str(path)):
        plan = checked(experiment, tree, trials)
    open_source(experiment, experiment.data.train, "data.train")
    open_source(experiment, experiment.data.validation, "data.validation", evaluation_columns(experiment))
    return plan


def checked(experiment: Experiment, tree: Mapping[str, Any], trials: int) -> Plan:
    """The plan of a space file's tree, for an experiment that is sound and has validation rows; sources are not looked at."""
    try:
        search = SearchFile.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError(explain(error, "", SearchFile)) from None
    if search.budget is not None and search.budget.seconds is not None:
        raise ValueError("`budget` of a search should be steps or rows: trials are compared at equal shares of their training.")
    plan = plan_of(experiment, search, trials)
    if len(plan.objectives) > 1 and search.asha:
        raise ValueError(
            "`asha` should be left out with several `objectives`: a trial that is poor at one may be the best at another."
        )
    _check_paths(search)
    _check_values(search.parameters, plan.experiment)
    check_best_metric(plan.experiment, Objectives(task_specs(experiment)))
    return plan


def plan_of(experiment: Experiment, search: SearchFile, trials: int) -> Plan:
    """The plan of a space file that was checked before; a single objective is what checkpoints are chosen by."""
    objectives = _objectives(search, experiment)
    if len(objectives) == 1 and objectives[0].name != BEST_METRIC:
        training = experiment.training.model_copy(update={"best_metric": objectives[0].name})
        experiment = experiment.model_copy(update={"training": training})
    return Plan(search, experiment, objectives, trials)


def _objectives(search: SearchFile, experiment: Experiment) -> tuple[Objective, ...]:
    if search.objectives is None:
        return (Objective(BEST_METRIC, True),)
    known = Measures(experiment, Objectives(task_specs(experiment))).compute()["tasks"]
    found = []
    for index, name in enumerate(search.objectives):
        place, (task, slash, metric) = f"objectives.{index}", name.rpartition("/")
        if task not in known or not slash:
            raise ValueError(
                f"`{place}` should be a task ({', '.join(known)}) and one of its metrics, such as {next(iter(known))}/auc. "
                f"Found '{name}'.{nearest(task or name, known)}"
            )
        names = [each for each in known[task] if each not in COUNTS]
        good = [each for each in names if each.removesuffix("_given") in (*LARGER_IS_BETTER, *SMALLER_IS_BETTER)]
        if metric not in good:
            why = "has no better direction" if metric in names else "is not a metric of the task"
            raise ValueError(
                f"`{place}` should be a metric of '{task}' of which more, or less, is better ({', '.join(good)}). "
                f"Found '{metric}', which {why}.{nearest(metric, good)}"
            )
        if name in search.objectives[:index]:
            raise ValueError(f"`{place}` should be named once. Found '{name}' twice.")
        found.append(Objective(name, metric.removesuffix("_given") in LARGER_IS_BETTER))
    return tuple(found)


def _check_paths(search: SearchFile) -> None:
    paths = list(search.parameters)
    for path in paths:
        place = f"parameters.{path}"
        kept = next((each for each in KEPT if f"{path}.".startswith(f"{each}.") or f"{each}.".startswith(f"{path}.")), None)
        if kept is not None:
            raise ValueError(f"`{place}`: `{kept}` stays as it is, or the trials could not be compared.")
        if search.budget is not None and path in LENGTHS:
            raise ValueError(f"`{place}` and `budget` both say how long a trial is. Leave out one of them.")
        if search.budget is not None and search.budget.rows is not None and f"{path}.".startswith("data.train."):
            raise ValueError(
                f"`{place}`: `budget.rows` counts rows before `where` and `window`, so that trials would be trained on different "
                "numbers of them. Use `budget.steps`, or leave one of them out."
            )
        inside = next((other for other in paths if other != path and path.startswith(f"{other}.")), None)
        if inside is not None:
            raise ValueError(f"`{place}` lies inside of `parameters.{inside}`: one of them would undo the other.")


def _check_values(space: Mapping[str, Parameter], experiment: Experiment) -> None:
    """Every end of a range and every choice by itself, or with the others in the middle; then draws of all together."""
    middle = {path: parameter.at(0.5) for path, parameter in space.items()}
    for path, parameter in space.items():
        for value in parameter.extremes:
            for kind in [{}] if path.endswith(".kind") else _kinds_beside(space, path, value):
                alone = {**kind, path: value}
                refused = _refusal(experiment, active(space, alone), f"parameters.{path}")
                if refused and _refusal(experiment, active(space, {**middle, **alone}), f"parameters.{path}"):
                    raise refused
    rng = np.random.default_rng(0)
    for _ in range(RANDOM_DRAWS):
        draw = active(space, {path: parameter.at(float(rng.random())) for path, parameter in space.items()})
        refused = _refusal(experiment, draw, "parameters")
        if refused:
            together = ", ".join(f"{path} = {value}" for path, value in draw.items())
            raise ValueError(f"{refused} That is the draw {together}.")


def _kinds_beside(space: Mapping[str, Parameter], path: str, value: Any) -> list[dict[str, Any]]:
    """The kinds among which a parameter's own node chooses, where it applies to them; [{}] where its kind is fixed."""
    kind = f"{path.rpartition('.')[0]}.kind"
    choices = space[kind].choice or [] if kind in space else []
    found = [{kind: each} for each in choices if path in active(space, {kind: each, path: value})]
    return found or [{}]


def _check_whole(experiment: Experiment) -> None:
    """Raises ValueError where parts of an experiment that are sound by themselves do not go together."""
    check_place(experiment)
    ranking_formula(experiment)
    check_device(experiment, "cuda" if torch.cuda.is_available() else "cpu")
    task_specs(experiment)


def _refusal(experiment: Experiment, values: Mapping[str, Any], place: str) -> ValueError | None:
    """Why the experiment cannot have these values; None where it can."""
    try:
        made = varied(experiment, values, place)
    except ValueError as error:
        return error
    try:
        _check_whole(made)
    except ValueError as error:
        return ValueError(f"`{place}`: {error}")
    return None


def value_at(experiment: Experiment, path: str) -> Any:
    """The value of an experiment at a path, with the default of a kind's option that is not written; None where there is none.

    >>> from mtrec.config import parse_experiment
    >>> made = parse_experiment({"data": {"train": "x"}, "features": {"a": "dense"}, "tasks": {"click": {"kind": "binary"}}})
    >>> value_at(made, "model.architecture.kind"), value_at(made, "model.architecture.num_experts")
    ('mmoe', 4)
    """
    here: Any = experiment.model_dump(mode="json")
    parts = path.split(".")
    for index, part in enumerate(parts):
        if isinstance(here, dict) and part in here:
            here = here[part]
        elif isinstance(here, dict) and "kind" in here and index == len(parts) - 1:
            place = parts[0] if parts[0] in ("features", "tasks") else parts[-2]
            default = option_types(resolve(here["kind"], KNOWN.get(place, {}), path)).get(part, (None, None))[1]
            return None if default is ... else default
        else:
            return None
    return here
