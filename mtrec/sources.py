"""What an experiment reads: its features, the columns that they and the labels need, and the files with them, opened."""

from collections.abc import Sequence

import pyarrow as pa

from mtrec import dataset
from mtrec.dataset import Dataset
from mtrec.experiment import Experiment, Source
from mtrec.features import FEATURES, Feature, check_schema
from mtrec.features.arrays import is_number
from mtrec.kinds import check_options, resolve
from mtrec.metrics import group_keys

SMALL_ROWS = 1_000_000  # below, `auto` means batches of 512 and tables of SMALL_DIM columns
SMALL_DIM, LARGE_DIM = 8, 16


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
