"""The experiment file: what is accepted, and what each mistake is told."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mtrec.balancing import Balancer, make_balancer
from mtrec.config import KNOWN, apply_overrides, json_schema, load_experiment, parse_experiment, to_yaml
from mtrec.kinds import option_descriptions, option_types
from mtrec.tasks import DWELL_LOSSES
from mtrec.yaml_tree import read_yaml

BASE = {
    "data": {"train": "train.parquet", "validation": {"path": "val.parquet", "where": "tab == 1"}},
    "features": {"user_id": {"kind": "categorical"}, "age": {"kind": "dense"}},
    "tasks": {
        "click": {"kind": "binary"},
        "conversion": {"kind": "binary", "given": "click", "space": "entire"},
        "dwell": {"kind": "dwell", "label": "dwell_ms", "unit": "milliseconds", "loss": "log_mse"},
    },
}


def with_overrides(*overrides: str) -> dict[str, object]:
    return apply_overrides(BASE, overrides)


def test_short_forms_and_defaults() -> None:
    experiment = parse_experiment(with_overrides("model.architecture=shared_bottom"))
    assert experiment.data.train.path == "train.parquet"
    assert experiment.data.validation is not None
    assert experiment.data.validation.where == "tab == 1"
    assert experiment.model.architecture.kind == "shared_bottom"
    assert experiment.label_column("click") == "click"
    assert experiment.label_column("dwell") == "dwell_ms"
    assert experiment.optimizer.tables.learning_rate == 0.1


def test_what_is_stored_is_read_back_the_same() -> None:
    experiment = parse_experiment(with_overrides("model.architecture.kind=ple", "balancing=famo", "seed=3"))
    assert parse_experiment(read_yaml(to_yaml(experiment), "stored")) == experiment


def test_another_kind_keeps_the_options_that_it_has_too() -> None:
    tree = with_overrides("model.architecture.num_experts=8", "model.architecture.expert_layers=[32]")
    changed = parse_experiment(apply_overrides(tree, ["model.architecture.kind=shared_bottom"]))
    assert changed.model.architecture.options == {"expert_layers": [32]}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle.dropout=0.1"], "`modle` is not a known key. Did you mean 'model'?"),
        (["model.droput=0.1"], "`model.droput` is not a known key. Did you mean 'dropout'?"),
        (["training.epochs=two"], "`training.epochs` should be a valid integer"),
        (["training.epochs=0"], "`training.epochs` should be greater than or equal to 1. Found 0."),
        (["model.architecture.num_expert=3"], "Did you mean 'num_experts'?"),
        (
            ["model.architecture.num_experts=-3"],
            "`model.architecture.num_experts` should be greater than or equal to 1. Found -3.",
        ),
        (["model.architecture.kind=mmoo"], "`model.architecture.kind` should be one of"),
        (["model.architecture.kind=nowhere:Net"], "there is no module 'nowhere'"),
        (["features.user_id.num_embeddings=0"], "`features.user_id.num_embeddings"),
        (["features.user_id.encodng=hash"], "`features.user_id.encodng` is not a known key. Did you mean 'encoding'?"),
        (["tasks.click.gven=x"], "`tasks.click.gven` is not a known key. Did you mean 'given'?"),
        (["tasks.dwell.unit=hours"], "`tasks.dwell.unit` should be"),
        (["data.train=null"], "`data.train`"),
        (
            ["data.batch_size=500", "data.num_streams=8"],
            "`data.batch_size` should be a multiple of data.num_streams (8). Found 500.",
        ),
        (["balancing.kind=unknown"], "`balancing.kind` should be one of"),
        (["balancing.evry=3"], "`balancing.evry` is not a known key. Did you mean 'every'?"),
        (["data.train=''"], "`data.train.path`: should name files or a folder. Found an empty path: is a variable in it"),
        (["data.validation=[a.parquet, ' ']"], "`data.validation.path`: should name files or a folder. Found an empty path"),
        (["data.train=${NOT_SET_ANYWHERE}/x"], "the environment variable NOT_SET_ANYWHERE is not set"),
        (["training.best_metric=7"], "`training.best_metric"),
        (["seed"], "--set should be key.path=value"),
        (["seed.x=1"], "--set seed.x=1: `seed` holds 1, not a mapping"),
        (["name=mine", "name.x=1"], "--set name.x=1: `name` holds 'mine', not a mapping"),
        (["model.tower_layers=[8]", "model.tower_layers.0=4"], "`tower_layers` holds [8], not a mapping"),
        (["name=''"], "`name` should hold at least 1 character. Found ''."),
        (["evaluation.bins=1"], "`evaluation.bins` should be greater than or equal to 2. Found 1."),
        (["model.dropout=1.0"], "`model.dropout` should be less than 1. Found 1.0."),
        (["balancing.nope=1"], "Known here: at, auxiliary_gate, ema, every, guard, kind, log_gradients, "),
        (["balancing.log_gradient=true"], "Did you mean 'log_gradients'?"),
        (["model.architecture=yaml:YAMLError"], "`model.architecture.kind` should name a class with forward, gates, "),
        (["model.interaction=yaml:YAMLError"], "Found 'yaml:YAMLError' without forward, flops_per_row."),
        (["balancing=torch.nn:Identity"], "Found 'torch.nn:Identity' without needs_gramian."),
        (["features.age=yaml:YAMLError"], "`features.age.kind` should name a class with family, check_type."),
        (["tasks.click.kind=yaml:YAMLError"], "`tasks.click.kind` should name a class with loss, predict, "),
    ],
)
def test_mistakes_name_the_path(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse_experiment(apply_overrides({**BASE, "seed": 1}, overrides))
    assert message in str(caught.value)


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ValueError, match=r"features\.age\.clp") as caught:
        parse_experiment(with_overrides("features.age.clp=3", "model.architecture.kind=mmoo"))
    assert "mmoo" in str(caught.value)


def test_mistakes_name_the_file_and_what_changed_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} with --set: `training\.epochs` should .* Found -1\.$"):
        load_experiment(path, ["training.epochs=-1"])
    path.write_text(yaml.safe_dump({**BASE, "seed": "a", "sed": 1}))
    with pytest.raises(ValueError, match=r"`seed` should") as caught:
        load_experiment(path, ["training.epochs=2"])  # which is innocent
    assert str(caught.value).splitlines()[0] == f"{path}:"
    assert len(str(caught.value).splitlines()) == 3
    path.write_text(yaml.safe_dump({**BASE, "data": {"batch_size": 64}}))  # a template: --set names the files
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} with --set: `seed` should .* Found 'a'\.$"):
        load_experiment(path, ["data.train=x", "seed=a"])


def test_keys_are_text_whatever_yaml_takes_them_for(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    tasks = "tasks: {on: {kind: binary}, 1: {kind: dwell, loss: {kind: huber, on: seconds}}}"
    path.write_text(f"data: {{train: x}}\nfeatures: {{no: {{kind: dense}}}}\n{tasks}\n")
    experiment = load_experiment(path, ["tasks.1.loss={kind: huber, on: seconds}"])
    assert (list(experiment.features), list(experiment.tasks)) == (["no"], ["on", "1"])
    assert experiment.tasks["1"].options["loss"] == {"kind": "huber", "on": "seconds"}


def test_a_feature_named_twice_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("data: {train: x}\nfeatures:\n  user: {kind: categorical}\n  user: {kind: dense}\ntasks: {}\n")
    with pytest.raises(ValueError, match="Line 4: the key `user` stands twice"):
        load_experiment(path)


def test_relative_paths_are_of_the_current_folder_and_hold_on_every_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "relative.yaml").write_text(yaml.safe_dump(BASE))
    monkeypatch.chdir(tmp_path)
    data = load_experiment("relative.yaml", ["data.test=s3://bucket/part-*.parquet"]).data
    assert data.train.path == str(tmp_path / "train.parquet")
    assert data.validation is not None
    assert data.validation.path == str(tmp_path / "val.parquet")
    assert data.test is not None
    assert data.test.path == "s3://bucket/part-*.parquet"


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no experiment file"):
        load_experiment(tmp_path / "none.yaml")


def test_the_schema_accepts_the_recipes_and_refuses_a_typo() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in Path(__file__).parents[1].glob("pipelines/*/*.yaml"):
        tree = yaml.safe_load(path.read_text())
        if "features" in tree:
            jsonschema.validate(tree, schema)
    wrong = json.loads(json.dumps(BASE))
    wrong["features"]["age"]["transfrom"] = "log1p"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("features.user_id", "categorical"),
        ("features.user_id", {"kind": "my_features:Mine", "anything": 1}),
        ("model", {"architecture": {"num_experts": 2}}),  # of the default kind
        ("model", {"architecture": "my_architectures:OneLayer"}),
        ("balancing", {"every": 5}),
        ("tasks.dwell.loss", "tweedie"),
        ("tasks.dwell.loss", {"kind": "tweedie", "power": 1.4}),
        ("tasks.dwell.loss", "my_losses:Mine"),
    ],
)
def test_the_schema_accepts_what_parsing_would(path: str, value: object) -> None:
    assert list(jsonschema.Draft202012Validator(json_schema()).iter_errors(_dwell_tree(path, value))) == []


@pytest.mark.parametrize("module", ["config", "compare.plan", "tune.plan"])
def test_what_a_schema_refers_to_is_in_it(module: str) -> None:
    schema = importlib.import_module(f"mtrec.{module}").json_schema()
    named = set(re.findall(r'"\$ref": "#/\$defs/(\w+)"', json.dumps(schema)))
    assert named
    assert named <= schema["$defs"].keys()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("tasks.dwell.loss", "tweedy"),
        ("tasks.dwell.loss", {"power": 1.4}),
        ("tasks.dwell.loss", {"kind": "tweedie", "power": 2.5}),
        ("tasks.dwell.loss", {"kind": "tweedie", "delta": 1.0}),
        ("features.user_id", {"kind": "categorical", "encoding": "hashed"}),
        ("tasks.click", {"kind": "multiclass", "num_classes": 1}),
        ("model", {"dropout": 1.0}),
        ("evaluation", {"bins": 1}),
        ("training", {"epochs": 0}),
        ("balancing", {"kind": "gradvac", "beta": 2.0}),
    ],
)
def test_the_schema_refuses_what_parsing_would(path: str, value: object) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_dwell_tree(path, value), json_schema())


def _dwell_tree(path: str, value: object) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(json.dumps(BASE))
    node, (*above, last) = tree, path.split(".")
    for key in above:
        node = node[key]
    node[last] = value
    return tree


def test_the_schema_describes_every_option_of_every_kind() -> None:
    known = [*KNOWN.values(), {"balancer": Balancer}, DWELL_LOSSES]
    bare = [
        f"{cls.__name__}.{name}"
        for cls in (cls for kinds in known for cls in kinds.values())
        for name in option_types(cls)
        if len(option_descriptions(cls).get(name, "")) < 10
    ]
    assert bare == []


@pytest.mark.parametrize("module", ["config", "compare.plan", "tune.plan"])
def test_a_schema_speaks_to_who_writes_yaml(module: str) -> None:
    schema = importlib.import_module(f"mtrec.{module}").json_schema()
    said = re.findall(r'"description": "((?:[^"\\]|\\.)*)"', json.dumps(schema))
    assert len(said) > 5
    assert [text for text in said if re.search(r"\bValueError\b|\bNone\b|>>>", text)] == []


def test_a_seed_of_balancing_is_the_experiment_s_where_it_is_null() -> None:
    nodes = json_schema()["$defs"]["kind_of_balancing"]["anyOf"]
    kinds = {each["title"]: each["properties"] for each in nodes if "title" in each}
    assert [kinds[name]["seed"]["default"] for name in ("rlw", "pcgrad", "gradvac")] == [None] * 3
    for options, seed in (({}, 7), ({"seed": None}, 7), ({"seed": 0}, 0), ({"seed": 3}, 3)):
        assert make_balancer("rlw", options, ["click", "dwell"], seed=7).method.seed == seed


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_gives_a_config_or_a_readable_error(text: str) -> None:
    try:
        parse_experiment(read_yaml(text, "fuzz.yaml"))
    except ValueError as error:
        assert len(str(error)) > 10  # noqa: PT017


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
trees = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))
KEYS = [
    "data",
    "features",
    "tasks",
    "model",
    "balancing",
    "training",
    "data.train",
    "model.architecture",
    "tasks.click",
    "features.age",
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KEYS), trees)
def test_any_value_at_any_key_gives_a_config_or_a_readable_error(key: str, value: object) -> None:
    tree = json.loads(json.dumps(BASE))
    node = tree
    *path, last = key.split(".")
    for part in path:
        node = node.setdefault(part, {})
    node[last] = value
    try:
        parse_experiment(tree)
    except ValueError as error:
        assert len(str(error)) > 10  # noqa: PT017


def test_a_template_that_was_not_rendered_is_named(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("data:\n  train: {{ ds }}\n")
    with pytest.raises(ValueError, match=r"job\.yaml: Line 2: a key should be a word\. Found a mapping: a template such as"):
        load_experiment(path)


def test_a_loss_in_its_short_form_can_be_added_to() -> None:
    made = parse_experiment(with_overrides("tasks.dwell.loss=tweedie", "tasks.dwell.loss.power=1.4"))
    assert made.tasks["dwell"].options["loss"] == {"kind": "tweedie", "power": 1.4}


def test_a_feature_in_its_short_form_can_be_added_to() -> None:
    tree = {**BASE, "features": {**BASE["features"], "user_id": "categorical"}}
    made = parse_experiment(apply_overrides(tree, ["features.user_id.max_length=8"]))
    assert (made.features["user_id"].kind, made.features["user_id"].options) == ("categorical", {"max_length": 8})


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("training.epochs=yes", "True"),
        ("optimizer.dense.learning_rate=true", "True"),
        ("optimizer.dense.learning_rate=.inf", "inf"),
        ("tasks.click.weight=.inf", "inf"),
        ("training.max_steps=.nan", "nan"),
    ],
)
def test_what_is_no_number_is_refused(override: str, found: str) -> None:
    with pytest.raises(ValueError, match=rf"`{override.partition('=')[0]}` should be .*Found {found}\."):
        parse_experiment(apply_overrides(BASE, [override]))


@pytest.mark.parametrize("kind", [":Mine", "..mine:Mine", "mine:", "my module:Mine"])
def test_an_import_path_that_is_none_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"architecture\.kind` should name a class as module:Class"):
        parse_experiment(apply_overrides(BASE, [f"model.architecture.kind='{kind}'"]))
