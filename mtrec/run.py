"""A run: the folder with everything that a trained model is, and how one is prepared before any worker starts.

experiment.yaml   the experiment, every default and every `auto` written out
run.json          versions, data fingerprints, when and how it was made
encoder/          vocabularies and statistics;  labels.json, labels.npz: base rates;  sample.parquet: some training rows
checkpoints/      step-00000300/ ...;  log.jsonl, tensorboard/: what happened;  metrics.json: the last validation
"""

import dataclasses
import datetime
import functools
import importlib.util
import json
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mtrec import checkpoint, dataset
from mtrec import labels as label_fit
from mtrec.architectures.products import emulates_bf16
from mtrec.atomic import is_unfinished, write_atomically
from mtrec.batch import Label
from mtrec.checkpoint import Checkpoint
from mtrec.config import Experiment, Source, Task, parse_experiment, to_yaml
from mtrec.dataset import Dataset
from mtrec.features import FEATURES, BadRowsError, Encoder, Feature, check_schema, id_columns
from mtrec.features.arrays import is_number
from mtrec.features.tables import plan_tables
from mtrec.feed import bad_row, bad_rows, check_encodes, label_looks, usable_rows, without_bad_rows
from mtrec.formula import ranking_formula
from mtrec.gradients import check_place
from mtrec.kinds import check_options, own_modules, resolve
from mtrec.labels import LabelFit, LabelStatistics, check_trained, labels_of
from mtrec.metrics import group_keys
from mtrec.mirror import Mirror
from mtrec.model import check_buffers, task_specs
from mtrec.tasks import Objectives, TaskSpec
from mtrec.written import as_written
from mtrec.yaml_tree import naming, read_yaml

SMALL_ROWS = 1_000_000  # below, `auto` means batches of 512 and tables of SMALL_DIM columns
SMALL_DIM, LARGE_DIM = 8, 16
FIT_ROWS = 65_536
SAMPLE_ROWS, SAMPLE_FILE = 4_096, "sample.parquet"  # training rows kept in the run; see mtrec/predictions.py
RUN_FILES = ("experiment.yaml", "encoder/encoder.json", "labels.json", "labels.npz", SAMPLE_FILE)
STREAMED = ("torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "pyarrow", "ray", "mtrec")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run's folder. What is read from it is read once."""

    folder: Path

    @functools.cached_property
    def experiment(self) -> Experiment:
        """As it was prepared. Modules that lie beside it can be imported from now on."""
        for folder in [str(self.folder / "code"), *self.info.get("module_folders", [])]:
            if folder not in sys.path:  # so that `kind: my_module:MyClass` is found by workers, and when the run is scored
                sys.path.append(folder)
        path = self.folder / "experiment.yaml"
        tree = read_yaml(path.read_text(encoding="utf-8"), str(path))
        with naming(str(path)):
            return parse_experiment(tree)

    @functools.cached_property
    def info(self) -> dict[str, Any]:
        """run.json: what was prepared from what, and by which versions."""
        path = self.folder / "run.json"
        with as_written(path, "JSON"):
            found: dict[str, Any] = json.loads(path.read_text())
        return found

    @functools.cached_property
    def encoder(self) -> Encoder:
        """The fitted features."""
        return Encoder.load(self.folder / "encoder")

    @functools.cached_property
    def labels(self) -> dict[str, LabelStatistics]:
        """{task: what its labels are like in the training data}."""
        return label_fit.load(self.folder)

    @property
    def checkpoints(self) -> Path:
        """The folder of its checkpoints."""
        return self.folder / "checkpoints"

    def mirror(self) -> Mirror | None:
        """The copies of this run on `training.checkpoint_storage`, if it is set."""
        uri = self.experiment.training.checkpoint_storage
        return None if uri is None else Mirror(uri, self.folder)

    def best(self) -> Checkpoint:
        """The valid checkpoint with the best metric. Raises ValueError where the run has none."""
        found = checkpoint.best(checkpoint.find(self.checkpoints))
        if found is None:
            why = checkpoint.told(checkpoint.damaged(self.checkpoints)) or "the run ended before its first one."
            raise ValueError(f"{self.folder} holds no valid checkpoint: {why}")
        return found


def open_run(folder: str | Path) -> Run:
    """A prepared run. Raises ValueError where the folder is none."""
    run = Run(Path(folder).absolute())
    if not (run.folder / "run.json").is_file():
        raise ValueError(f"{folder} is not a run: it has no run.json. `mtrec train` makes runs; it prints where.")
    missing = [name for name in RUN_FILES if not (run.folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} is no whole run any more: {', '.join(missing)} is missing. Put it back from a copy.")
    return run


def check_mirror(experiment: Experiment, folder: Path) -> None:
    """Raises ValueError where `training.checkpoint_storage` holds another run than this folder."""
    uri, own = experiment.training.checkpoint_storage, folder / "run.json"
    far = None if uri is None else Mirror(uri, folder).read("run.json")
    if far is not None and not (own.exists() and far == own.read_bytes()):
        raise ValueError(
            f"`training.checkpoint_storage` {uri} holds another run, made {json.loads(far)['made']}. "
            "Each run needs a URI of its own; to continue that run, use --resume with an --output that does not exist yet."
        )


def copy_to_mirror(run: Run) -> None:
    """Copies to `training.checkpoint_storage` what a resume needs, and checkpoints whose copy was cut short."""
    mirror = run.mirror()
    if mirror is None:
        return
    check_mirror(run.experiment, run.folder)
    apart = {"checkpoints", "tensorboard", "ray", "run.json"}
    there = [path for path in sorted(run.folder.rglob("*")) if path.is_file() and not is_unfinished(path.name)]
    files = [path.relative_to(run.folder) for path in there]
    names = [str(path) for path in files if path.parts[0] not in apart and path.suffix not in (".lock", ".jsonl")]
    mirror.put(*names, "run.json")
    checkpoint.copy_missing(run.checkpoints, mirror)


def fetch_from_mirror(folder: Path, experiment: Experiment) -> list[str]:
    """Brings a run, or those of its checkpoints that lack, from `training.checkpoint_storage`; what was brought."""
    uri = experiment.training.checkpoint_storage
    if uri is None:
        return []
    mirror, fetched = Mirror(uri, folder), []
    if not (folder / "run.json").exists():
        if mirror.read("run.json") is None:
            return []
        for name in mirror.names(""):
            if name not in ("checkpoints", "run.json"):
                mirror.get(name, folder / name)
        mirror.get("run.json", folder / "run.json")  # last: a folder with it is a whole run
        fetched.append("run.json")
    elif mirror.read("run.json") != (folder / "run.json").read_bytes():
        return []  # `check_mirror` says what is wrong, if something is
    (folder / "checkpoints").mkdir(exist_ok=True)
    return [*fetched, *checkpoint.fetch(folder / "checkpoints", mirror)]


def feature_list(experiment: Experiment) -> list[Feature]:
    """The features, built from their kinds."""
    features = []
    for name, kind in experiment.features.items():
        feature_class = resolve(kind.kind, FEATURES, f"features.{name}.kind")
        features.append(feature_class(name, **check_options(feature_class, kind.options, f"features.{name}")))
    return features


def feature_columns(features: Sequence[Feature]) -> tuple[list[str], list[str]]:
    """(all input columns, those of them that a file may lack)."""
    required = {column for feature in features if not feature.optional for column in feature.columns}
    every = dict.fromkeys(column for feature in features for column in feature.columns)
    return list(every), [column for column in every if column not in required]


def label_columns(experiment: Experiment) -> list[str]:
    """Columns that training reads beside the features': labels and the sample weight."""
    columns = [experiment.label_column(name) for name in experiment.tasks]
    weight = experiment.data.sample_weight
    return list(dict.fromkeys([*columns, *([weight] if weight else [])]))


def evaluation_columns(experiment: Experiment) -> list[str]:
    """Columns that an evaluation reads beside features and labels."""
    return [experiment.evaluation.group_by] if experiment.evaluation.group_by else []


def open_source(experiment: Experiment, source: Source, place: str, extra: Sequence[str] = ()) -> Dataset:
    """The Parquet files of a source with the columns that the experiment reads; every file's footer is checked."""
    features = feature_list(experiment)
    columns, optional = feature_columns(features)
    columns = list(dict.fromkeys([*columns, *label_columns(experiment), *extra]))
    files = dataset.Source(source.path, source.where, source.window, source.window_column)
    opened = dataset.open_dataset(files, columns, optional, place=place, asked_by=_asked_by(experiment, features))
    check_schema(features, opened.schema)
    _check_label_types(experiment, opened)
    return opened


def _asked_by(experiment: Experiment, features: Sequence[Feature]) -> dict[str, list[str]]:
    """{column: the keys of the experiment that ask for it}."""
    keys = [(column, f"features.{feature.name}") for feature in features for column in feature.columns]
    keys += [(experiment.label_column(name), f"tasks.{name}.label") for name in experiment.tasks]
    keys += [(column, "evaluation.group_by") for column in evaluation_columns(experiment)]
    if experiment.data.sample_weight:
        keys.append((experiment.data.sample_weight, "data.sample_weight"))
    found: dict[str, list[str]] = {}
    for column, key in keys:
        found.setdefault(column, []).append(key)
    return found


def _check_label_types(experiment: Experiment, data: Dataset) -> None:
    """Labels and the sample weight should be numbers (or booleans), one a row."""
    places = {f"tasks.{name}.label": experiment.label_column(name) for name in experiment.tasks}
    if experiment.data.sample_weight:
        places["data.sample_weight"] = experiment.data.sample_weight
    for place, column in places.items():
        found = data.schema.field(column).type
        if not is_number(found):
            raise ValueError(f"`{place}` should name a column of numbers. Found column '{column}' of type {found}.")
    group = experiment.evaluation.group_by
    if group in data.schema.names:
        group_keys(pa.array([], data.schema.field(group).type), "evaluation.group_by")  # raises where it cannot group


def resolve_auto(experiment: Experiment, rows: int) -> Experiment:
    """The experiment with `batch_size` and `embedding_dim` decided by the number of training rows."""
    small = rows < SMALL_ROWS
    data, model = experiment.data, experiment.model
    if data.batch_size == "auto":
        size = 512 if small else 4_096
        data = data.model_copy(update={"batch_size": -(-size // data.num_streams) * data.num_streams})
    if model.embedding_dim == "auto":
        model = model.model_copy(update={"embedding_dim": SMALL_DIM if small else LARGE_DIM})
    return experiment.model_copy(update={"data": data, "model": model})


def versions() -> dict[str, str]:
    """What this run was made with."""
    found = {"python": platform.python_version()}
    for name in STREAMED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # the run is made without it
    return found


def prepare(experiment: Experiment, folder: Path, previous: Run | None = None) -> Run:
    """Makes a run's folder: checks the data, fits encoder and label statistics in one streaming pass, writes them.

    `previous` (warm start) is the run whose vocabularies are grown. Raises ValueError naming the YAML path, the file or the
    column before anything is written.
    """
    train = open_source(experiment, experiment.data.train, "data.train")
    if previous is not None:
        previous.best()  # raises where there is nothing to start from
        if experiment.model.embedding_dim == "auto":  # more rows than yesterday must not mean another dimension
            model = experiment.model.model_copy(update={"embedding_dim": previous.experiment.model.embedding_dim})
            experiment = experiment.model_copy(update={"model": model})
    experiment = resolve_auto(experiment, train.num_rows)
    sources, validation = [train], experiment.data.validation
    if validation is not None:
        sources.append(open_source(experiment, validation, "data.validation", evaluation_columns(experiment)))
    specs = task_specs(experiment)
    objectives = Objectives(specs)
    ranking_formula(experiment)
    check_place(experiment)
    check_buffers(experiment)
    if experiment.data.on_bad_rows == "error":
        for source in sources:
            check_footers(source, specs, experiment)
    encoder, statistics = _fitted(experiment, train, objectives, previous)
    for source in sources[1:]:
        check_encodes(encoder, source)
    check_trained(statistics, experiment, "training")
    folder.mkdir(parents=True, exist_ok=True)
    encoder.save(folder / "encoder")
    label_fit.save(statistics, folder)
    sample = train.sample(SAMPLE_ROWS, feature_columns(feature_list(experiment))[0])
    pq.write_table(usable_rows(sample, encoder) if experiment.data.on_bad_rows == "skip" else sample, folder / SAMPLE_FILE)
    (folder / "checkpoints").mkdir(exist_ok=True)
    write_atomically(folder / "experiment.yaml", to_yaml(experiment))
    info = {
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "train": {
            "rows": train.num_rows,
            "kept": max(each.rows for each in statistics.values()),
            "files": len(train.files),
            "fingerprint": train.fingerprint,
        },
        "validation": None if validation is None else {
            "source": validation.model_dump(mode="json"),
            "rows": sources[1].num_rows,
            "files": len(sources[1].files),
            "fingerprint": sources[1].fingerprint,
        },
        "notes": [note for source in sources for note in source.notes],
        "warm_start": str(previous.folder) if previous else None,
        "warm_start_encoder": previous.encoder.fingerprint() if previous else None,
        "module_folders": module_folders(experiment),
    }
    write_atomically(folder / "run.json", json.dumps(info, indent=1))  # last: a folder with it is a whole run
    return Run(folder.absolute())


def _fitted(
    experiment: Experiment, train: Dataset, objectives: Objectives, previous: Run | None
) -> tuple[Encoder, dict[str, LabelStatistics]]:
    """The encoder and the statistics of the labels, from one pass over the training rows."""
    features, labels = feature_list(experiment), labels_of(experiment, objectives.specs)
    weight = experiment.data.sample_weight
    fit = LabelFit(labels, objectives, weight)
    read = list(dict.fromkeys([*feature_columns(features)[0], *label_columns(experiment)]))
    bad = bad_rows(experiment.data, train.num_rows)
    batches = train.with_dictionaries(id_columns(features)).batches(read, train.rows_at_once(FIT_ROWS))
    assert isinstance(experiment.model.embedding_dim, int)
    try:
        encoder = Encoder.fit(
            features,
            fit.watch(without_bad_rows(batches, labels, weight, features, bad)),
            schema=train.schema,
            embedding_dim=experiment.model.embedding_dim,
            previous=previous.encoder if previous else None,
        )
    except BadRowsError as error:
        raise ValueError(row_not_fitted(experiment, train, features, labels) or str(error)) from error
    if bad is not None:
        bad.check(bad.skipped, bad.skipped.total() + bad.kept, "They are rows of `data.train`.")
    return encoder, fit.statistics()


def row_not_fitted(
    experiment: Experiment, data: Dataset, features: Sequence[Feature], labels: Mapping[str, Label]
) -> str | None:
    """The place of the first row that cannot be fitted, looked for only once one was met."""
    looks = label_looks(labels, experiment.data.sample_weight).values()
    needed = [*feature_columns(features)[0], *label_columns(experiment)]
    columns = [column for column in dict.fromkeys(needed) if column in data.schema.names]
    dim = experiment.model.embedding_dim
    assert isinstance(dim, int)

    def look(batch: pa.RecordBatch) -> None:
        for each in looks:
            each(batch)
        Encoder.fit(features, [batch], schema=data.schema, embedding_dim=dim)

    return bad_row(data, columns, look)


def module_folders(experiment: Experiment) -> list[str]:
    """The folders of the user's own modules that kinds name by import path; installed ones need none."""
    found = set()
    for name in own_modules(experiment.model_dump(mode="json")):
        spec = importlib.util.find_spec(name)
        places = [] if spec is None else [*(spec.submodule_search_locations or []), *([spec.origin] if spec.origin else [])]
        if places and "site-packages" not in places[0]:
            found.add(str(Path(places[0]).parent))
    return sorted(found)


def slow_precision(experiment: Experiment, device: str) -> str | None:
    """A line for the user where fp32 would be faster than the precision asked for; else None."""
    if experiment.training.precision == "bf16" and device == "cpu" and emulates_bf16():
        return "`training.precision: bf16`: this machine's CPU has no instructions for bf16; fp32 is faster on it"
    return None


def check_device(experiment: Experiment, device: str) -> None:
    """What the device lacks: some dimensions of tables, and on the CPU sharding by rows and fused Adam.

    Raises ValueError naming the path, also where features do not agree on their tables.
    """
    dim = experiment.model.embedding_dim
    plan_tables(feature_list(experiment), SMALL_DIM if dim == "auto" else dim)
    for name, kind in experiment.features.items():
        sharding = kind.options.get("sharding")
        if sharding == "row_wise" and device == "cpu":
            raise ValueError(
                f"`features.{name}.sharding` should be table_wise, column_wise or data_parallel on the CPU: gloo cannot exchange "
                "rows of row-wise tables. Found row_wise."
            )
    if experiment.optimizer.tables.kind == "adam" and device == "cpu":
        raise ValueError(
            "`optimizer.tables.kind` should be rowwise_adagrad, adagrad or sgd on the CPU: "
            "fbgemm has no fused Adam there. Found adam."
        )


def check_footers(data: Dataset, specs: Mapping[str, TaskSpec], experiment: Experiment) -> None:
    """Labels outside their range, found from the minimum and maximum in the files' footers where there are any."""
    for name, spec in specs.items():
        column = experiment.label_column(name)
        low, high, integer = spec.task.label_range
        found = data.minmax(column)
        if found is None:
            continue
        least, most = (float(end) * spec.task.label_scale for end in found)
        if (low is not None and least < low) or (high is not None and most > high):
            wish = (
                "0 or 1" if (low, high, integer) == (0, 1, True) else f"at least {low}" if high is None else f"in [{low}, {high}]"
            )
            bad = least if low is not None and least < low else most
            raise ValueError(
                f"`tasks.{name}.label`: column '{column}' should be {wish}. Found {bad:g} in the footers of the "
                f"files of `{data.place}`. Null means unobserved."
            )


def check_resumable(run: Run, experiment: Experiment) -> None:
    """Raises ValueError naming the first key in which an experiment differs from the run's beyond what a resume may change."""
    if experiment.model.embedding_dim == "auto":
        model = experiment.model.model_copy(update={"embedding_dim": run.experiment.model.embedding_dim})
        experiment = experiment.model_copy(update={"model": model})
    given = resolve_auto(experiment, run.info["train"]["rows"])
    first, second = (yaml.safe_load(to_yaml(each)) for each in (run.experiment, given))
    for tree in (first, second):
        for key in ("name", "output", "training", "evaluation", "scoring"):
            tree.pop(key, None)
    path = _difference(first, second, "")
    if path:
        raise ValueError(
            f"--resume: `{path}` differs from that of {run.folder}. A resumed run keeps its experiment (training.* may change); "
            "for another experiment start a new run, with --warm-start to begin from this one's weights."
        )
    _check_compared_alike(run, experiment)


def _check_compared_alike(run: Run, given: Experiment) -> None:
    """The best checkpoint is chosen, and training stops early, by values of one metric, measured in one way."""
    before = run.experiment
    wish = before.training.best_metric
    metrics = {path.rpartition("/")[2].removesuffix("_given") for path in ([wish] if isinstance(wish, str) else wish or ["/auc"])}
    keys: dict[str, tuple[object, object]] = {"training.best_metric": (wish, given.training.best_metric)}
    if "gauc" in metrics:
        keys["evaluation.group_by"] = before.evaluation.group_by, given.evaluation.group_by
    if metrics & {"auc", "ece"}:
        keys["evaluation.bins"] = before.evaluation.bins, given.evaluation.bins
    for key, (old, new) in keys.items():
        if old != new and before.data.validation is not None:
            raise ValueError(
                f"`{key}` should stay what it was, {_value(old)}: the checkpoints of {run.folder} are compared by it. "
                f"Found {_value(new)}. Set it back, or start a new run, with --warm-start to keep the weights."
            )


def _value(value: object) -> str:
    return "the default" if value is None else str(value)


def _difference(first: Any, second: Any, place: str) -> str | None:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            path = _difference(first.get(key), second.get(key), f"{place}.{key}" if place else str(key))
            if path:
                return path
        return None
    return place if first != second else None


def default_folder(experiment: Experiment, resume: bool) -> Path:
    """runs/<name>-<time>; to resume, the newest of these."""
    if experiment.output is not None:
        return Path(experiment.output)
    return dated_folder(experiment.name, "run.json", "run", resume)


def dated_folder(name: str, file: str, what: str, resume: bool) -> Path:
    """runs/NAME-20261129-120000, of now; to resume, the newest of those that hold `file`. ValueError where there is none.

    Only the name with a time counts: `mmoe-long-20261129-120000` is not one of `mmoe`.
    """
    if not resume:
        return Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    dated = re.compile(re.escape(name) + r"-\d{8}-\d{6}")
    found = sorted(path.parent for path in Path("runs").glob(f"*/{file}") if dated.fullmatch(path.parent.name))
    if not found:
        raise ValueError(f"--resume: there is no {what} runs/{name}-DATE-TIME. Name its folder with --output.")
    return found[-1]


__all__ = [
    "Run",
    "Task",
    "check_resumable",
    "default_folder",
    "feature_columns",
    "feature_list",
    "open_run",
    "open_source",
    "prepare",
]
