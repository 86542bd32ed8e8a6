"""The comparison: one base experiment, named variants as differences over it, seeds, budget; all checked before anything runs.

    base: mmoe.yaml                                  # beside the comparison file
    baseline: mmoe                                   # the base's name in tables
    variants: {ple: {set: {model.architecture: ple}}}
    seeds: 5

`load_plan(path)` returns a `Plan`; every mistake is found here, by the path of the key that holds it.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic
import torch
from pydantic import Field

from mtrec.architectures import ARCHITECTURES
from mtrec.compare.sample import METRIC_NAMES
from mtrec.compare.space import Space, active
from mtrec.compare.sweep import points
from mtrec.config import DIALECT, apply_overrides, load_experiment, parse_experiment, with_absolute_paths
from mtrec.dataset import Dataset, common_files
from mtrec.evaluate import MAIN_METRIC, Measures, check_best_metric, check_one_value
from mtrec.experiment import Experiment, FolderName, Section, Source
from mtrec.formula import ranking_formula
from mtrec.gradients import check_place
from mtrec.kinds import PositiveFloat, PositiveInt, check_options, explain, nearest, resolve
from mtrec.model import ANY_WIDTH, DensePart, check_buffers, task_specs
from mtrec.prepare import check_device, check_footers
from mtrec.sources import evaluation_columns, open_source
from mtrec.tasks import Objectives, TaskSpec
from mtrec.yaml_tree import naming, read_yaml

AGAIN = " again"  # the A/A row: the baseline with other seeds
AGAIN_SEEDS = 1_000  # what is added to the seeds for it
COUNTS = ("rows", "positives", "rows_given", "positives_given", "auc_error_bound", "gauc_coverage", "gauc_coverage_given")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
KEPT = ("seed", "output", "name", "data.test", "data.sample_weight", "evaluation.group_by")  # what a variant may not change
MATCHED = "model.architecture.expert_layers"  # what `match` scales
WIDTHS = ("dim", "width", "missing_indicator", "table")  # options of features that change the input of the dense part


class Budget(Section):
    """What every run may spend: one of the three. Without a budget each run makes the epochs of its experiment."""

    steps: PositiveInt | None = None
    seconds: PositiveFloat | None = Field(None, description="of training, the same for all; slower variants see fewer rows")
    rows: PositiveInt | None = Field(None, description="training rows before `where`, counted over epochs")

    @pydantic.model_validator(mode="after")
    def _one(self) -> "Budget":
        given = [name for name in ("steps", "seconds", "rows") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"`budget` should be one of steps, seconds or rows. Found {', '.join(given) or 'none'}.")
        return self


class Search(Section):
    """The same number of trials for every variant; the best on validation goes on to the seeds."""

    trials: PositiveInt
    space: Space = Field(description="{path: {log_uniform: [low, high]}}; also uniform, int, log_int, choice or a list of values")
    seed: int = 0


class Variant(Section):
    """What one variant changes of the experiment: keys, a search space for them, or preferences of its balancing."""

    set: dict[str, Any] = Field(default_factory=dict, description="{path of the experiment: value}")
    preference: list[dict[str, PositiveFloat]] | None = Field(
        None, min_length=2, description="a variant for each of these {task: preference} of its balancing method"
    )


class Comparison(Section):
    """A comparison file."""

    name: FolderName = "comparison"
    base: str = Field(description="the experiment file, relative to the comparison file")
    note: str | None = Field(None, description="a remark for the head of the report")
    set: dict[str, Any] = Field(default_factory=dict, description="changes of the base itself, for all variants")
    baseline: str = Field("base", description="the base's name in tables")
    variants: dict[str, Variant] = Field(min_length=1)
    seeds: PositiveInt | list[int] = 5
    budget: Budget | None = None
    match: Literal["none", "parameters", "flops"] = Field(
        "none", description="scale expert widths until the dense part has the base's"
    )
    primary: dict[str, str] | None = Field(None, description="{task: metric}; default: AUC, XAUC, R2 or accuracy of each task")
    segment: str | None = Field(None, description="column whose values are reported apart")
    single_task: str | None = Field(None, description="the variant that the MTL gain is measured against")
    curve_points: PositiveInt = Field(8, description="validations a run where the base sets no validate_every")
    search: Search | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked comparison.

    Attributes:
        comparison: the file.
        experiments: {variant: experiment}, baseline first, the A/A row not among them.
        diffs: {variant: {path: value}}.
        primary: {task: metric}.
        seeds: of every variant; `again_seeds`: of the A/A row.
        sweeps: {name: {variant: {task: preference}}} of the preference sweeps.
    """

    comparison: Comparison
    experiments: dict[str, Experiment]
    diffs: dict[str, dict[str, Any]]
    primary: dict[str, str]
    seeds: tuple[int, ...]
    sweeps: dict[str, dict[str, dict[str, float]]] = dataclasses.field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The variant that the others are compared with."""
        return self.comparison.baseline

    @property
    def again(self) -> str:
        """The name of the baseline's runs with other seeds."""
        return self.baseline + AGAIN

    @property
    def again_seeds(self) -> tuple[int, ...]:
        """The seeds of these runs, none of which is another's."""
        return tuple(seed + AGAIN_SEEDS for seed in self.seeds)

    @property
    def single_task(self) -> str | None:
        """The variant that the MTL gain is measured against: as named, else the one with that architecture."""
        named = self.comparison.single_task
        found = [name for name, each in self.experiments.items() if each.model.architecture.kind == "single_task"]
        return named or (found[0] if found else None)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a comparison file."""
    return {**Comparison.model_json_schema(), "$schema": DIALECT}


def load_plan(path: str | Path) -> Plan:
    """Reads and checks a comparison file, its base experiment and every variant, and the columns of the test files.

    Raises ValueError naming the file and the path of the key: a misspelt one in a variant's diff, a variant that equals the
    base or another one, fewer than two seeds, a metric that its task does not have, a test source that is missing.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no comparison file '{path}' (looked in {Path.cwd()}).")
    text = path.read_text(encoding="utf-8")
    tree = {"name": path.stem, **read_yaml(text, str(path), ("base", "baseline", "variants", "seeds"))}
    with naming(str(path)):
        comparison, seeds = _comparison(tree)
    base_file = path.parent / comparison.base
    load_experiment(base_file)  # its own mistakes, told in its own terms
    base_tree = {"name": base_file.stem, **read_yaml(base_file.read_text(encoding="utf-8"), str(base_file))}
    with naming(str(path)):
        base_tree = _changed(base_tree, comparison.set, "set")
        base = _parsed(base_tree, "set")
        _check_name(comparison.baseline, "baseline", ())
        experiments, diffs, sweeps = _variants(comparison, base_tree, base)
        plan = Plan(comparison, experiments, diffs, _primary(comparison, base), seeds, sweeps)
        _check(plan)
    return plan


def _comparison(tree: Mapping[str, Any]) -> tuple[Comparison, tuple[int, ...]]:
    """The comparison and its seeds."""
    try:
        comparison = Comparison.model_validate(tree)
    except pydantic.ValidationError as error:
        raise ValueError(explain(error, "", Comparison)) from None
    seeds = tuple(range(comparison.seeds)) if isinstance(comparison.seeds, int) else tuple(comparison.seeds)
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds) or min(seeds) < 0 or max(seeds) >= AGAIN_SEEDS:
        raise ValueError(
            f"`seeds` should be at least 2 different numbers from 0 to {AGAIN_SEEDS - 1}: with one, chance cannot be told from "
            f"a difference. Found {comparison.seeds!r}."
        )
    return comparison, seeds


def _variants(
    comparison: Comparison, base_tree: Mapping[str, Any], base: Experiment
) -> tuple[dict[str, Experiment], dict[str, dict[str, Any]], dict[str, dict[str, dict[str, float]]]]:
    """(experiments, diffs, sweeps) of a plan; a swept variant is one for each of its preferences."""
    experiments: dict[str, Experiment] = {comparison.baseline: base}
    diffs: dict[str, dict[str, Any]] = {comparison.baseline: {}}
    sweeps: dict[str, dict[str, dict[str, float]]] = {}
    for name, variant in comparison.variants.items():
        place = f"variants.{name}.set"
        _check_name(name, f"variants.{name}", experiments)
        _check_kept(variant.set, place)
        changes = {name: dict(variant.set)}
        if variant.preference is not None:
            place = f"variants.{name}.preference"
            whole = _parsed(_changed(base_tree, variant.set, f"variants.{name}.set"), f"variants.{name}.set")
            made = points(name, variant.preference, variant.set, whole, place)
            changes = {point: change for point, (change, _) in made.items()}
            sweeps[name] = {point: preference for point, (_, preference) in made.items()}
        for point, change in changes.items():
            _check_name(point, f"variants.{name}", experiments)
            experiment = _parsed(_changed(base_tree, change, place), place)
            twin = next((other for other, each in experiments.items() if each == experiment), None)
            if twin is not None:
                what = "the base" if twin == comparison.baseline else f"the variant '{twin}'"
                raise ValueError(
                    f"`{place}` should change something. Found a variant equal to {what}; A/A is in every comparison anyway."
                )
            experiments[point], diffs[point] = experiment, change
    return experiments, diffs, sweeps


def _check_name(name: str, place: str, taken: Mapping[str, Any] | tuple[()]) -> None:
    if not NAME.fullmatch(name) or name in taken:
        raise ValueError(
            f"`{place}` should be a name of its own of letters, digits, _ . + - (it names a folder). Found '{name}'."
        )


def _check_kept(changes: Mapping[str, Any], place: str) -> None:
    for key in changes:
        kept = next((each for each in KEPT if key == each or key.startswith(each + ".") or each.startswith(key + ".")), None)
        if kept is not None:
            raise ValueError(f"`{place}` should leave `{kept}` as it is: all variants share it, or they could not be compared.")


def _changed(tree: Mapping[str, Any], changes: Mapping[str, Any], place: str) -> dict[str, Any]:
    try:
        return apply_overrides(tree, [f"{key}={json.dumps(value)}" for key, value in changes.items()])
    except ValueError as error:
        raise ValueError(f"`{place}`: {str(error).removeprefix('--set ')}") from None


def _parsed(tree: Mapping[str, Any], place: str) -> Experiment:
    try:
        return with_absolute_paths(parse_experiment(tree))
    except ValueError as error:
        raise ValueError(f"`{place}`: {error}") from None


def primary_metrics(experiment: Experiment) -> dict[str, str]:
    """{task: the metric that it is compared by}: AUC, XAUC, R2 or accuracy, over all rows where that is defined."""
    objectives = Objectives(task_specs(experiment))
    known = Measures(experiment, objectives).compute()["tasks"]
    metrics = {
        name: MAIN_METRIC[spec.task.family] for name, spec in objectives.specs.items() if not experiment.tasks[name].auxiliary
    }
    return {name: metric if metric in known[name] else f"{metric}_given" for name, metric in metrics.items()}


def _primary(comparison: Comparison, base: Experiment) -> dict[str, str]:
    """{task: metric}, checked against the metrics that the task has."""
    specs = task_specs(base)
    known = Measures(base, Objectives(specs)).compute()["tasks"]
    if comparison.primary is None:
        return primary_metrics(base)
    for task, metric in comparison.primary.items():
        if task not in known:
            raise ValueError(f"`primary` should name tasks ({', '.join(known)}). Found '{task}'.{nearest(task, known)}")
        if metric == "r2_log1p" and specs[task].given is not None:
            raise ValueError(
                f"`primary.{task}` should be r2_log1p_given: expected values over all rows, which `given` makes of the task's "
                "predictions, have no log scale. Found 'r2_log1p'."
            )
        names = [name for name in known[task] if name.removesuffix("_given") in METRIC_NAMES]
        if base.evaluation.group_by is None:
            names = [name for name in names if not name.startswith("gauc")]
        if metric not in names:
            raise ValueError(
                f"`primary.{task}` should be a metric of the task ({', '.join(names)}). Found '{metric}'.{nearest(metric, names)}"
            )
    if not comparison.primary:
        raise ValueError("`primary` should name one metric for at least one task. Found none.")
    return dict(comparison.primary)


def _check(plan: Plan) -> None:
    comparison = plan.comparison
    base = plan.experiments[plan.baseline]
    if base.data.test is None:
        raise ValueError(
            "`data.test` of the base should name the files that the variants are compared on. "
            "Set it here: `set: {data.test: ...}`."
        )
    if comparison.single_task is not None and comparison.single_task not in plan.experiments:
        raise ValueError(
            f"`single_task` should name a variant ({', '.join(plan.experiments)}). "
            f"Found '{comparison.single_task}'.{nearest(comparison.single_task, plan.experiments)}"
        )
    if comparison.search is not None:
        _check_search(plan, comparison.search, base)
    segment = [comparison.segment] if comparison.segment else []
    with naming("The base"):
        test = open_source(base, base.data.test, "data.test", [*evaluation_columns(base), *segment])
        if comparison.segment:
            check_one_value(test, comparison.segment, "`segment`")
        if base.data.on_bad_rows == "error":
            check_footers(test, task_specs(base), base)
    for name, experiment in plan.experiments.items():
        with naming(f"Variant '{name}'" + (" (the base)" if experiment is base else "")):
            check_best_metric(experiment, Objectives(task_specs(experiment)))
            check_place(experiment)
            check_buffers(experiment)
            ranking_formula(experiment)
            check_device(experiment, "cuda" if torch.cuda.is_available() else "cpu")
            _check_comparable(experiment, base, plan.primary)
            _check_budget(experiment, base, comparison.budget)
            train = open_source(experiment, experiment.data.train, "data.train")
            _check_unseen(train, experiment.data.train, test, base.data.test)
            source = experiment.data.validation
            if source is not None and (experiment is base or source != base.data.validation):
                rows = open_source(experiment, source, "data.validation", evaluation_columns(experiment))
                _check_unseen(rows, source, test, base.data.test)


def _check_search(plan: Plan, search: Search, base: Experiment) -> None:
    """What is drawn for any variant should leave it comparable, and as large and trained on as many rows as was agreed."""
    if base.data.validation is None:
        raise ValueError("`search` chooses on validation rows, and the base has no `data.validation`.")
    _check_kept(dict.fromkeys(search.space), "search.space")
    for name, experiment in plan.experiments.items():
        for overrides in search_draws(search):
            values = active(search.space, overrides)
            drawn = varied(experiment, values, f"search.space (variant {name})")
            with naming(f"`search.space` (variant {name})"):
                _check_comparable(drawn, base, plan.primary)
                _check_budget(drawn, base, plan.comparison.budget)
                if plan.comparison.match != "none":
                    _check_size(experiment, drawn, values, plan.comparison.match)


def _check_size(experiment: Experiment, drawn: Experiment, values: Mapping[str, Any], what: str) -> None:
    """Raises ValueError naming the paths of `values` that undo what `match` does, which is before the search."""
    paths = [path for path in values if f"{MATCHED}.".startswith(f"{path}.")]
    parts = [(each.features, each.tasks, each.model) for each in (experiment, drawn)]
    size = _size(drawn, what) if parts[0] != parts[1] else None  # building it takes as long as all other checks

    def needed(path: str) -> bool:
        try:
            return _size(varied(experiment, {key: value for key, value in values.items() if key != path}, path), what) != size
        except ValueError:
            return True  # without this kind, the options beside it do not stand

    if size is not None and size != _size(experiment, what):
        paths = [path for path in values if path in paths or needed(path)]
    if paths:
        raise ValueError(
            f"`match: {what}` makes variants equally large before the search, which should then leave their size as it is. Found "
            f"{', '.join(paths)}, which changes it. Leave this out of `search.space`, or set `match: none`."
        )


def _size(experiment: Experiment, what: str) -> tuple[object, ...]:
    """What the size of the dense part follows from: the width of its input, as far as it is written, and its own modules."""
    features = {name: (kind.kind, *map(kind.options.get, WIDTHS)) for name, kind in experiment.features.items()}
    return features, experiment.model.embedding_dim, dense_size(experiment, ANY_WIDTH)[what]


def _check_budget(experiment: Experiment, base: Experiment, budget: Budget | None) -> None:
    """Of a budget of rows, which counts those before `where`, equal shares should be left to all variants."""
    if budget is None or budget.rows is None:
        return
    ours, theirs = experiment.data.train, base.data.train
    for key, found, wanted in zip(("where", "window", "window_column"), ours.limits, theirs.limits, strict=True):
        _check_same_rows(key, found, wanted)
    if ours.limits != (None, None, None):  # of other files, conditions leave other shares
        _check_same_rows("path", ours.path, theirs.path)


def _check_same_rows(key: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise ValueError(
            f"`data.train.{key}` should be the base's ({wanted}) where `budget.rows` is set: it counts rows before `where` and "
            f"`window`, so that variants would be trained on different numbers of them. Found {found}. Use `budget.steps` or "
            "`budget.seconds`, or leave the budget out."
        )


def _check_unseen(data: Dataset, source: Source, test: Dataset, test_source: Source) -> None:
    """Raises ValueError where both read rows of one file, and the same of them."""
    last = " With `data.validation: null` the last checkpoint is tested." if data.place == "data.validation" else ""
    shared = common_files(test, data)
    if shared and source.limits == test_source.limits:
        raise ValueError(
            f"`data.test` should name other rows than `{data.place}`. Found '{shared[0]}' in both: models would be tested on "
            f"rows that they were trained or chosen on. Name other files, or tell the rows of one file apart by `where`.{last}"
        )


def _check_comparable(experiment: Experiment, base: Experiment, primary: Mapping[str, str]) -> None:
    """What a task is measured on should be the base's: its label, where it counts, the columns that are predicted for it."""
    if experiment.tasks.keys() != base.tasks.keys():
        raise ValueError(f"`tasks` should be those of the base ({', '.join(base.tasks)}).")
    objectives = Objectives(task_specs(experiment))
    for column in {"user", "segment", "weight"}.intersection(objectives.prediction_names()):
        raise ValueError(f"`tasks.{column}` should have another name: predictions are kept beside a column '{column}'.")
    for name, wanted in task_specs(base).items():
        found = objectives.specs[name]
        for key, theirs, ours in (
            ("label", base.label_column(name), experiment.label_column(name)),
            ("given", wanted.given, found.given),
            ("kind", ", ".join(wanted.task.prediction_names()), ", ".join(found.task.prediction_names())),
            ("unit", wanted.task.label_scale, found.task.label_scale),
        ):
            if ours != theirs:
                what = {"kind": "predict the columns", "unit": "scale its label"}.get(key, "be")
                raise ValueError(
                    f"`tasks.{name}.{key}` should {what} as the base's ({theirs}): all variants are measured on the same rows "
                    f"and labels. Found {ours}."
                )
        if primary.get(name, "").startswith("r2_log1p") and found.task.log_prediction(_no_logits(found)) is None:
            raise ValueError(
                f"`primary.{name}`: r2_log1p is of losses with a log-scale output, which `tasks.{name}.loss` is not."
            )


def _no_logits(spec: TaskSpec) -> torch.Tensor:
    return torch.zeros(0, spec.task.num_logits)


def varied(experiment: Experiment, overrides: Mapping[str, Any], place: str) -> Experiment:
    """The experiment with some paths changed; its mistakes are told with `place`."""
    return _parsed(_changed(experiment.model_dump(mode="json"), overrides, place), place)


def search_draws(search: Search) -> list[dict[str, Any]]:
    """The trials of a search, the same for every variant: latin hypercube draws, so that few trials cover each range.

    >>> draws = search_draws(Search(trials=3, space={"optimizer.dense.learning_rate": {"log_uniform": (1e-4, 1e-2)}}))
    >>> sorted(int(np.log10(each["optimizer.dense.learning_rate"]) // (2 / 3)) for each in draws)
    [-6, -5, -4]
    """
    rng = np.random.default_rng(search.seed)
    draws: list[dict[str, Any]] = [{} for _ in range(search.trials)]
    for path, space in search.space.items():
        at = (rng.permutation(search.trials) + rng.random(search.trials)) / search.trials
        for draw, share in zip(draws, at, strict=True):
            draw[path] = space.at(share)
    return draws


def dense_size(experiment: Experiment, input_dim: int) -> dict[str, int]:
    """{"parameters": ..., "flops": ...} of everything above the tables, without making it. `input_dim`: width of x_BD."""
    with torch.device("meta"):
        part = DensePart(input_dim, experiment, task_specs(experiment))
    return {"parameters": sum(each.numel() for each in part.parameters()), "flops": part.flops_per_row()}


def matched(experiment: Experiment, input_dim: int, what: str, target: int) -> tuple[Experiment, dict[str, Any]]:
    """The experiment with its expert widths scaled by one factor, so that `what` of the dense part comes nearest to `target`.

    Returns it and what was done: {"from", "to": widths, "size": what it has now}. Raises ValueError for an architecture that
    has no `expert_layers`.
    """
    kind = experiment.model.architecture
    options = check_options(resolve(kind.kind, ARCHITECTURES, "model.architecture.kind"), kind.options, "model.architecture")
    if "expert_layers" not in options:
        raise ValueError(f"`match: {what}` scales `expert_layers`, which the architecture {kind.kind} does not have.")
    widths = [int(width) for width in options["expert_layers"]]

    def at(factor: float) -> tuple[Experiment, list[int], int]:
        scaled = [max(1, round(width * factor)) for width in widths]
        architecture = kind.model_copy(update={"expert_layers": scaled})
        made = experiment.model_copy(update={"model": experiment.model.model_copy(update={"architecture": architecture})})
        return made, scaled, dense_size(made, input_dim)[what]

    low, high = 1e-3, 1.0
    while at(high)[2] < target and high < 1e4:
        high *= 2.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if at(middle)[2] < target else (low, middle)
        if high / low < 1 + 1e-4:
            break
    made, scaled, size = min((at(low), at(high), at(1.0)), key=lambda each: abs(each[2] - target))
    return made, {"from": widths, "to": scaled, "size": size, "target": target, "what": what}
