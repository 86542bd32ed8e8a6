"""`mtrec check`: an experiment and its data, looked at in seconds and without a worker.

Everything that `prepare` would refuse is refused here, from footers and a sample; besides, facts that no error can tell:
sizes, rates, drift from training to validation, and features that give a label away.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from mtrec.batch import Label, label_values, make_examples
from mtrec.dataset import Dataset, common_files
from mtrec.evaluate import check_best_metric
from mtrec.experiment import Experiment, Source
from mtrec.features import BadRowsError, Encoder, Feature, psi
from mtrec.feed import bad_row, bad_rows, check_encodes, label_looks, usable_rows, without_bad_rows
from mtrec.formula import ranking_formula
from mtrec.gradients import check_place
from mtrec.kinds import counted
from mtrec.labels import LabelFit, LabelStatistics, check_trained, labels_of
from mtrec.metrics import auc
from mtrec.mirror import Mirror
from mtrec.model import MultiTaskModel, check_buffers, loss_weights, task_specs
from mtrec.prepare import check_device, check_footers, row_not_fitted, slow_precision
from mtrec.sources import evaluation_columns, feature_list, label_columns, open_source, resolve_auto
from mtrec.tasks import Objectives, TaskSpec
from mtrec.windows import windows_held

BATCH_ROWS = 16_384
LEAK_AUC = 0.95  # of one feature alone
DRIFT_PSI = 0.25  # Siddiqi (2006): above it is a shift
UNSEEN_SHARE = 0.2
SMOOTHING = 5.0  # rows of the base rate that are added to each value's own rows


def check_experiment(experiment: Experiment, sample_rows: int = 100_000, device: str | None = None) -> dict[str, Any]:
    """Checks an experiment against its data, for training on `device` (cpu or cuda; default: what this machine has).

    Returns {"tables": {heading: [row, ...]}, "facts": [line, ...], "warnings": [line, ...]}. Raises ValueError naming the
    YAML path, the file or the column of what cannot be trained.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    specs = task_specs(experiment)
    objectives = Objectives(specs)
    ranking_formula(experiment)
    check_place(experiment)
    check_buffers(experiment)
    check_best_metric(experiment, objectives)
    check_device(experiment, device)
    if experiment.training.checkpoint_storage is not None:
        Mirror(experiment.training.checkpoint_storage, Path())  # raises where the URI is none
    train = open_source(experiment, experiment.data.train, "data.train")
    experiment = resolve_auto(experiment, train.num_rows)
    validation = _held_out(experiment, experiment.data.validation, "data.validation")
    test = _held_out(experiment, experiment.data.test, "data.test")
    held_out = [source for source in (validation, test) if source is not None]
    skip = experiment.data.on_bad_rows == "skip"
    for source in [] if skip else [train, *held_out]:
        check_footers(source, specs, experiment)
    features, labels = feature_list(experiment), labels_of(experiment, specs)
    sample = _training_sample(experiment, train, features, labels, sample_rows)
    looks = label_looks(labels, experiment.data.sample_weight)
    _check_labels(sample, looks, train)
    fit = LabelFit(labels, objectives, experiment.data.sample_weight)
    dim = experiment.model.embedding_dim
    assert isinstance(dim, int)
    try:
        encoder = Encoder.fit(features, fit.watch(_batches(sample)), schema=train.schema, embedding_dim=dim)
    except BadRowsError as error:
        raise ValueError(row_not_fitted(experiment, train, features, labels) or str(error)) from error
    for source in held_out:
        check_encodes(encoder, source)
    if skip:
        sample = usable_rows(sample, encoder)
    elif validation is not None:
        _check_labels(validation.sample(sample_rows, label_columns(experiment)), looks, validation)
    statistics = fit.statistics()
    model = MultiTaskModel(experiment, encoder, statistics, torch.device("meta"))
    weights = loss_weights(experiment, objectives, statistics)
    drift = {} if validation is None else _drift(encoder, validation, sample.schema.names, sample_rows)
    leaks = _leaks(sample, encoder, labels, objectives)
    check_trained(statistics, experiment, "sampled")
    partial = sample.num_rows < train.num_rows
    return {
        "tables": {
            "features": _feature_rows(experiment, train, encoder, drift, leaks),
            f"tables{' (from the sample: a full fit finds more ids)' if partial else ''}": _table_rows(experiment, encoder),
            "tasks": _task_rows(experiment, specs, statistics, weights),
        },
        "facts": [
            *_facts(experiment, train, validation, sample.num_rows, model),
            *_windows(experiment, train, sample, encoder, labels),
        ],
        "warnings": [
            *train.notes,
            *filter(None, [slow_precision(experiment, device)]),
            *_drift_warnings(drift, encoder),
            *_leak_warnings(leaks),
            *_infinite_warnings(sample, features),
            *_given_warnings(experiment, statistics),
            *_unlearned_warnings(encoder, statistics),
            *_shared_warnings(experiment, [train, *held_out]),
        ],
    }


def _held_out(experiment: Experiment, source: Source | None, place: str) -> Dataset | None:
    return None if source is None else open_source(experiment, source, place, evaluation_columns(experiment))


def _training_sample(
    experiment: Experiment, train: Dataset, features: Sequence[Feature], labels: Mapping[str, Label], rows: int
) -> pa.Table:
    """Some training rows, with the columns that there are; where bad rows are skipped, without those that cannot be fitted."""
    columns = [column for feature in features for column in feature.columns if column in train.schema.names]
    sample = train.sample(rows, list(dict.fromkeys([*columns, *label_columns(experiment)])))
    bad = bad_rows(experiment.data, sample.num_rows)
    if bad is None:
        return sample
    usable = without_bad_rows(_batches(sample), labels, experiment.data.sample_weight, features, bad)
    return pa.Table.from_batches(usable, sample.schema)


def _check_labels(sample: pa.Table, looks: Mapping[str, Callable[[pa.RecordBatch], object]], dataset: Dataset) -> None:
    """Labels and weights should be within their ranges. Raises ValueError naming the first row in which one is not."""
    for batch in _batches(sample):
        for key, look in looks.items():
            try:
                look(batch)
            except BadRowsError as error:
                found = bad_row(dataset, [error.column], look) or error
                raise ValueError(f"`{key}`, `{dataset.place}`: {found}") from error


def _facts(experiment: Experiment, train: Dataset, validation: Dataset | None, sampled: int, model: MultiTaskModel) -> list[str]:
    """Lines about the rows, the steps and the dense part."""
    size = experiment.data.batch_size
    assert isinstance(size, int)
    dense = sum(parameter.numel() for parameter in model.dense.parameters())
    return [
        f"{train.num_rows:,} training rows in {counted(len(train.files), 'file')} ({sampled:,} sampled)"
        + (f", {validation.num_rows:,} validation rows" if validation else ", no validation rows"),
        f"batches of {size:,} rows: {counted(math.ceil(train.num_rows / size), 'step')} an epoch",
        f"dense part: {dense:,} parameters, {model.dense.flops_per_row() / 1e6:.3f} MFLOP a row to score, "
        f"{3 * model.dense.flops_per_row() / 1e6:.3f} to train; shared representation of {model.embeddings.output_dim} columns",
    ]


def _windows(
    experiment: Experiment, train: Dataset, sample: pa.Table, encoder: Encoder, labels: Mapping[str, Label]
) -> Iterator[str]:
    """A line about the memory that training needs to shuffle: what its readers hold, encoded."""
    data = experiment.data
    batch = next(_batches(sample), None)
    if batch is None or not batch.num_rows:
        return
    (encoded,) = make_examples(batch, encoder, labels, data.sample_weight, [slice(0, batch.num_rows)])
    row_bytes, rows = encoded.nbytes / batch.num_rows, windows_held(train, data.num_streams, data.shuffle_window)
    yield (
        f"an encoded row takes {row_bytes:,.0f} bytes; the readers of all workers hold {rows:,} of them at most, "
        f"{rows * row_bytes / 1e6:,.1f} MB (`data.shuffle_window` {data.shuffle_window:,}, {counted(data.num_streams, 'stream')})"
    )


def _feature_rows(
    experiment: Experiment,
    train: Dataset,
    encoder: Encoder,
    drift: Mapping[str, tuple[float, float]],
    leaks: Mapping[str, Mapping[str, float]],
) -> list[dict[str, Any]]:
    return [
        {
            "feature": feature.name,
            "kind": experiment.features[feature.name].kind,
            "column": feature.columns[0],
            "type": str(train.schema.field(feature.columns[0]).type) if feature.columns[0] in train.schema.names else "missing",
            "null": encoder.profiles[feature.name].null_share,
            **_most_telling(leaks.get(feature.name, {})),
            **({"PSI": drift[feature.name][0], "unseen": drift[feature.name][1]} if drift else {}),
        }
        for feature in encoder.features
    ]


def _most_telling(leak: Mapping[str, float]) -> dict[str, Any]:
    """Of the AUCs that a feature alone reaches, the largest and its task.

    >>> _most_telling({"click": 0.7, "dwell": 0.8})
    {'AUC alone': 0.8, 'of task': 'dwell'}
    """
    task = max(leak, key=lambda name: leak[name], default=None)
    return {"AUC alone": None if task is None else leak[task], "of task": task}


def _table_rows(experiment: Experiment, encoder: Encoder) -> list[dict[str, Any]]:
    return [
        {
            "table": table.name,
            "rows": table.num_embeddings,
            "dim": table.dim,
            "MB": table.num_embeddings * table.dim * 4 / 1e6,
            "optimizer MB": _state_bytes(experiment, table.num_embeddings, table.dim, table.num_column_shards) / 1e6,
            "sharding": table.sharding,
            "features": ", ".join(table.features),
        }
        for table in encoder.tables
    ]


def _task_rows(
    experiment: Experiment,
    specs: Mapping[str, TaskSpec],
    statistics: Mapping[str, LabelStatistics],
    weights: Mapping[str, float],
) -> list[dict[str, Any]]:
    return [
        {
            "task": name,
            "kind": experiment.tasks[name].kind,
            "label": experiment.label_column(name),
            "given": spec.given,
            "observed": each.observed / max(1, each.rows),
            "mean": each.mean,
            "loss weight": weights[name],
        }
        for (name, spec), each in zip(specs.items(), statistics.values(), strict=True)
    ]


def _state_bytes(experiment: Experiment, rows: int, dim: int, shards: int) -> int:
    kind = experiment.optimizer.tables.kind
    return 4 * rows * {"rowwise_adagrad": shards, "adagrad": dim, "adam": 2 * dim, "sgd": 0}[kind]


def _batches(sample: pa.Table) -> Iterator[pa.RecordBatch]:
    yield from sample.combine_chunks().to_batches(max_chunksize=BATCH_ROWS)


def _drift(encoder: Encoder, validation: Dataset, columns: Sequence[str], rows: int) -> dict[str, tuple[float, float]]:
    """{feature: (population stability index, unseen share)} from training to validation."""
    sample = validation.sample(rows, [column for column in columns if column in validation.schema.names])
    return {
        name: (psi(encoder.profiles[name], profile), profile.unseen_share)
        for name, profile in encoder.profile(_batches(sample)).items()
    }


def _drift_warnings(drift: Mapping[str, tuple[float, float]], encoder: Encoder) -> Iterator[str]:
    for name, (index, unseen_share) in drift.items():
        if index > DRIFT_PSI:
            yield (
                f"`features.{name}` drifts: population stability index {index:.2f} from training to validation (above "
                f"{DRIFT_PSI} is a shift). A feature that stands for time cannot generalise."
            )
        if unseen_share > max(UNSEEN_SHARE, 2 * encoder.profiles[name].unseen_share):
            yield f"`features.{name}`: {unseen_share:.0%} of its validation values are not in the training sample."


def _leaks(
    sample: pa.Table, encoder: Encoder, labels: Mapping[str, Label], objectives: Objectives
) -> dict[str, dict[str, float]]:
    """{feature: {task: AUC of that feature alone}}, estimated on the odd rows from rates on the even ones."""
    batches = list(_batches(sample))
    targets: dict[str, NDArray[np.float64]] = {}
    for name, label in labels.items():
        values = np.concatenate([label_values(batch, label) for batch in batches]).astype(np.float64)
        family = objectives.specs[name].task.family
        if family != "binary":  # a continuous label: is it above its median?
            known = values[~np.isnan(values)]
            values = np.where(np.isnan(values), np.nan, values > np.median(known)) if len(known) else values
        targets[name] = values
    found: dict[str, dict[str, float]] = {}
    for feature, codes in _codes(batches, encoder).items():
        for task, target in targets.items():
            value = _auc_alone(codes, target)
            if value is not None:
                found.setdefault(feature, {})[task] = value
    return found


def _leak_warnings(leaks: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for feature, found in leaks.items():
        for task, value in found.items():
            if value > LEAK_AUC:
                yield (
                    f"`features.{feature}` gives the label of task '{task}' away: alone it reaches an AUC of {value:.3f}. "
                    "Is it known before the impression?"
                )


def _infinite_warnings(sample: pa.Table, features: Sequence[Feature]) -> Iterator[str]:
    for feature in features:
        column = feature.columns[0]
        if feature.family != "dense" or column not in sample.schema.names:
            continue
        values = pc.list_flatten(sample[column]) if pa.types.is_nested(sample[column].type) else sample[column]
        if not pa.types.is_floating(values.type):
            continue
        infinite = pc.sum(pc.is_inf(values)).as_py() or 0
        if infinite:
            yield (
                f"`features.{feature.name}`: {infinite:,} of {len(values):,} sampled values in column '{column}' are infinite "
                f"({infinite / len(values):.2%}). They count as missing."
            )


def _given_warnings(experiment: Experiment, statistics: Mapping[str, LabelStatistics]) -> Iterator[str]:
    for name, each in statistics.items():
        if each.broken_given:
            yield (
                f"`tasks.{name}.given`: {each.broken_given:,} of {each.rows:,} sampled rows have a label above 0 in column "
                f"'{experiment.label_column(name)}' although {experiment.tasks[name].given} is 0. With `given`, these labels "
                "are left out."
            )


def _unlearned_warnings(encoder: Encoder, statistics: Mapping[str, LabelStatistics]) -> Iterator[str]:
    for table in encoder.tables:
        if table.encoding == "vocabulary" and not table.vocabulary_size:
            yield f"table {table.name} ({', '.join(table.features)}): no id came `min_count` times in the sample: all are unseen."
    for name, each in statistics.items():
        if each.trained and not each.density:
            yield f"`data.sample_weight`: all sampled rows that `tasks.{name}` learns from have the weight 0."


def _shared_warnings(experiment: Experiment, sources: Sequence[Dataset]) -> Iterator[str]:
    data = {f"data.{key}": getattr(experiment.data, key) for key in ("train", "validation", "test")}
    for one, other in itertools.combinations(sources, 2):
        shared = common_files(one, other)
        if shared and data[one.place].limits == data[other.place].limits:
            yield f"`{one.place}` and `{other.place}` read the same rows, as those of '{shared[0]}': nothing is held out there."


def _codes(batches: Sequence[pa.RecordBatch], encoder: Encoder) -> dict[str, NDArray[np.int64]]:
    """{feature: one code a row}: the table's row (of a list, its last), or the bin of a number."""
    parts: dict[str, list[NDArray[Any]]] = {}
    keys = encoder.sparse_keys
    for batch in batches:
        encoded = encoder.encode(batch)
        rows, start = batch.num_rows, 0
        for index, key in enumerate(keys):
            lengths = encoded.lengths_KB.reshape(len(keys), rows)[index]
            values = encoded.values[start : start + int(lengths.sum())]
            start += int(lengths.sum())
            ends = np.cumsum(lengths) - 1
            last = np.where(lengths > 0, values[np.maximum(ends, 0)] if len(values) else -1, -1)
            parts.setdefault(key, []).append(last)
        for column, name in enumerate(encoder.dense_names):
            parts.setdefault(name, []).append(encoded.dense_BF[:, column])
    codes = {}
    for name, found in parts.items():
        values = np.concatenate(found)
        if values.dtype.kind == "f":
            edges = np.unique(np.quantile(values, np.linspace(0, 1, 65)[1:-1]))
            values = np.searchsorted(edges, values, side="right")
        codes[name] = values.astype(np.int64)
    return codes


def _auc_alone(codes: NDArray[np.int64], target: NDArray[np.float64]) -> float | None:
    """AUC on the odd rows of the smoothed rate of each code on the even ones; None where a class is missing."""
    known = np.flatnonzero(~np.isnan(target))
    fitted, judged = known[::2], known[1::2]
    if len(judged) < 2 or len(np.unique(target[judged])) < 2:
        return None
    _, code = np.unique(codes, return_inverse=True)
    base = float(target[fitted].mean())
    size = int(code.max()) + 1
    count = np.bincount(code[fitted], minlength=size)
    total = np.bincount(code[fitted], weights=target[fitted], minlength=size)
    rate = (total + SMOOTHING * base) / (count + SMOOTHING)
    return float(auc(rate[code[judged]], target[judged]))
