"""The experiment file: one YAML file with `--set key=value` overrides -> an `Experiment`; errors give the YAML path.

`load_experiment(path, overrides)` reads and checks it. Relative paths are relative to the current folder, `${NAME}` is replaced
by the environment variable.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from mtrec.architectures import ARCHITECTURES
from mtrec.balancing import BALANCERS, Balancer, make_balancer
from mtrec.experiment import Balancing, Experiment, Kind, Source, Task
from mtrec.features import FEATURES
from mtrec.interactions import INTERACTIONS
from mtrec.kinds import check_options, explain, kind_schema, nearest, option_types, options_model, resolve
from mtrec.tasks import TASKS
from mtrec.yaml_tree import expand, naming, read_yaml

KNOWN = {
    "features": FEATURES,
    "tasks": TASKS,
    "architecture": ARCHITECTURES,
    "interaction": INTERACTIONS,
    "balancing": BALANCERS,
}


DIALECT = "https://json-schema.org/draft/2020-12/schema"
DEFAULT_KINDS = {"architecture": "mmoe", "interaction": "dcn_v2", "balancing": "static"}


def load_experiment(path: str | Path, overrides: Sequence[str] = (), *, absolute: bool = True) -> Experiment:
    """Reads and checks an experiment file; `overrides` are `key.path=value` with YAML values.

    `absolute`: relative data paths are those of the current folder; False leaves them as they are written.

    Raises ValueError that names the file, the YAML path, what was found, and the nearest right key of a misspelt one.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no experiment file '{path}' (looked in {Path.cwd()}).")
    for folder in (str(Path.cwd()), str(path.resolve().parent)):
        if folder not in sys.path:
            sys.path.append(folder)  # so that `kind: my_module:MyClass` finds a module beside the experiment
    tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
    changed = apply_overrides(tree, overrides)
    try:
        experiment = parse_experiment(changed, default_name=path.stem)
    except ValueError as error:
        with naming(str(path) if str(error) == _mistakes(tree, path.stem) else f"{path} with --set"):
            raise
    return with_absolute_paths(experiment) if absolute else experiment


def _mistakes(tree: Mapping[str, Any], default_name: str) -> str:
    """What `parse_experiment` says of a tree; "" where that is sound."""
    try:
        parse_experiment(tree, default_name)
    except ValueError as error:
        return str(error)
    return ""


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """The experiment with local paths that do not depend on the current folder: workers stand elsewhere."""

    def absolute(source: Source | None) -> Source | None:
        if source is None:
            return None
        paths = [source.path] if isinstance(source.path, str) else source.path
        whole = [path if "://" in path else os.path.abspath(os.path.expanduser(path)) for path in paths]
        return source.model_copy(update={"path": whole[0] if isinstance(source.path, str) else whole})

    data = experiment.data
    update = {name: absolute(getattr(data, name)) for name in ("train", "validation", "test")}
    return experiment.model_copy(update={"data": data.model_copy(update=update)})


def parse_experiment(tree: Mapping[str, Any], default_name: str = "experiment") -> Experiment:
    """Checks a tree of plain values (as YAML gives it), kinds and their options included."""
    values = {"name": default_name, **expand(dict(tree), "")}
    try:
        experiment = Experiment.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError(explain(error, "", Experiment)) from None
    findings = []
    for place, kind, known in _kinds_of(experiment):
        try:
            if isinstance(kind, Balancing):
                auxiliary = [name for name, task in experiment.tasks.items() if task.auxiliary]
                make_balancer(
                    kind.kind, kind.options, list(experiment.tasks), auxiliary, experiment.seed, also_known=Balancing.model_fields
                )
            else:
                others = Task.model_fields if isinstance(kind, Task) else ()
                check_options(resolve(kind.kind, known, f"{place}.kind"), kind.options, place, also_known=others)
        except ValueError as error:
            findings.append(str(error))
    findings += _wrong_names(experiment)
    if findings:
        raise ValueError("\n".join(findings))
    if isinstance(experiment.data.batch_size, int) and experiment.data.batch_size % experiment.data.num_streams:
        raise ValueError(
            f"`data.batch_size` should be a multiple of data.num_streams ({experiment.data.num_streams}). "
            f"Found {experiment.data.batch_size}."
        )
    return experiment


def _wrong_names(experiment: Experiment) -> list[str]:
    """What names a task that is not there."""
    findings, tasks = [], experiment.tasks
    for name, task in tasks.items():
        if task.also_on is not None and task.also_on not in tasks:
            findings.append(
                f"`tasks.{name}.also_on` should name a task ({', '.join(tasks)}). "
                f"Found '{task.also_on}'.{nearest(task.also_on, tasks)}"
            )
        elif task.also_on == name:
            findings.append(f"`tasks.{name}.also_on` should name another task. Found '{name}'.")
        elif task.also_on is not None and getattr(TASKS.get(tasks[task.also_on].kind), "family", "binary") != "binary":
            findings.append(f"`tasks.{name}.also_on` should name a binary task. Found '{task.also_on}'.")
        elif task.also_on is not None and task.given is not None:
            findings.append(f"`tasks.{name}.also_on` should be left out: metrics are given where `given` is 1 anyway.")
    wish = experiment.training.best_metric
    if experiment.data.validation is None:
        needy = ("early_stopping", "best_metric", "validate_every")
        findings += [
            f"`training.{key}` needs `data.validation`. Found none."
            for key in needy
            if getattr(experiment.training, key) is not None
        ]
    for path in [wish] if isinstance(wish, str) else list(wish or ()):
        task_name, slash, metric = path.rpartition("/")  # a task may have one in its name, a metric has none
        if task_name not in tasks or not slash or not metric:
            findings.append(
                f"`training.best_metric` should be a task and one of its metrics, such as {next(iter(tasks))}/auc. "
                f"Found '{path}'.{nearest(task_name, tasks)}"
            )
    return findings


def _kinds_of(experiment: Experiment) -> list[tuple[str, Kind | Task, Mapping[str, type]]]:
    places: list[tuple[str, Kind | Task, Mapping[str, type]]] = []
    places += [(f"features.{name}", kind, FEATURES) for name, kind in experiment.features.items()]
    places += [(f"tasks.{name}", kind, TASKS) for name, kind in experiment.tasks.items()]
    places.append(("model.interaction", experiment.model.interaction, INTERACTIONS))
    places.append(("model.architecture", experiment.model.architecture, ARCHITECTURES))
    places.append(("balancing", experiment.balancing, BALANCERS))
    return places


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the tree with `a.b.c=value` set; the value is read as YAML.

    >>> apply_overrides({"a": {"b": 1}}, ["a.b=[2, 3]", "a.c=x"])
    {'a': {'b': [2, 3], 'c': 'x'}}
    """
    changed = dict(tree)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip(".") or not all(key.split(".")):
            raise ValueError(f"--set should be key.path=value, such as --set training.epochs=2. Found '{override}'.")
        value = read_yaml(f"value: {text}", f"--set {override}")["value"]
        changed = _with(changed, key.split("."), value, override)
    return changed


def _with(tree: Mapping[str, Any], keys: list[str], value: Any, override: str, above: str = "") -> dict[str, Any]:
    changed = dict(tree)
    if len(keys) == 1:
        changed[keys[0]] = value
        if keys[0] == "kind":
            changed = _fitting(changed, tree.get("kind", DEFAULT_KINDS.get(above)), above)
        return changed
    below = changed.get(keys[0], {})
    kind = keys[0] in KNOWN or above == "features" or (above, keys[0]) == ("tasks", "loss")
    if isinstance(below, str) and kind:  # `architecture: mmoe` and `train: path` are short for a mapping
        below = {"kind": below}
    elif isinstance(below, str | list) and above == "data":
        below = {"path": below}
    elif below is None:
        below = {}
    if not isinstance(below, dict):
        raise ValueError(f"--set {override}: `{keys[0]}` holds {below!r}, not a mapping.")
    changed[keys[0]] = _with(below, keys[1:], value, override, above if above in ("features", "tasks") else keys[0])
    return changed


def _fitting(node: dict[str, Any], old: Any, place: str) -> dict[str, Any]:
    """The node, its kind just changed, without those options of the old kind that the new one does not have."""
    known: Mapping[str, type] = KNOWN.get(place, {})
    new = node["kind"]
    if old == new or old not in known or not isinstance(new, str) or (new not in known and ":" not in new):
        return node  # what is wrong is told, with its whole path, when the whole is checked
    try:
        kept = option_types(resolve(new, known, f"{place}.kind")).keys()
    except ValueError:
        return node
    dropped = option_types(known[old]).keys() - kept
    return {key: value for key, value in node.items() if key not in dropped}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of an experiment file, every kind with its options, for editors that complete and check."""
    schema = Experiment.model_json_schema()
    task_fields = schema["$defs"].pop("Task")["properties"]
    balancing_fields = (
        schema["$defs"].pop("Balancing")["properties"] | options_model(Balancer).model_json_schema()["properties"]
    )
    house = {"tasks": task_fields, "balancing": balancing_fields}
    for place, known in KNOWN.items():
        default = DEFAULT_KINDS.get(place)
        schema["$defs"][f"kind_of_{place}"] = kind_schema(known, house.get(place), default=default, short=place != "tasks")
    top, model = schema["properties"], schema["$defs"]["Model"]["properties"]
    for place in ("features", "tasks"):
        top[place]["additionalProperties"] = {"$ref": f"#/$defs/kind_of_{place}"}
    top["balancing"] = {"$ref": "#/$defs/kind_of_balancing"}
    for place in ("architecture", "interaction"):
        model[place] = {"$ref": f"#/$defs/kind_of_{place}"}
    return {**schema, "$schema": DIALECT}


def to_yaml(experiment: Experiment) -> str:
    """The experiment with every default written out, as it is stored in a run."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
