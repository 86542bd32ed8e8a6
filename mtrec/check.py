"""`mtrec check`: an experiment and its data, looked at in seconds and without a worker.

Everything that `prepare` would refuse is refused here, from footers and a sample; besides, facts that no error can tell:
sizes, rates, drift from training to validation, and features that give a label away.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mtrec.batch import Label, label_values
from mtrec.config import Experiment
from mtrec.dataset import Dataset
from mtrec.evaluate import check_best_metric
from mtrec.features import BadRowsError, Encoder, psi
from mtrec.feed import bad_row, bad_rows, check_encodes, usable_rows, without_bad_rows
from mtrec.formula import ranking_formula
from mtrec.gradients import check_place
from mtrec.labels import LabelFit, LabelStatistics, labels_of
from mtrec.metrics import auc
from mtrec.model import MultiTaskModel, loss_weights, task_specs
from mtrec.run import (
    check_device,
    check_footers,
    evaluation_columns,
    feature_list,
    label_columns,
    open_source,
    resolve_auto,
    slow_precision,
)
from mtrec.tasks import Objectives, TaskSpec

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
    specs = task_specs(experiment)
    objectives = Objectives(specs)
    ranking_formula(experiment)
    check_place(experiment)
    check_best_metric(experiment, objectives)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(experiment, device)
    train = open_source(experiment, experiment.data.train, "data.train")
    experiment = resolve_auto(experiment, train.num_rows)
    validation = None
    if experiment.data.validation is not None:
        validation = open_source(experiment, experiment.data.validation, "data.validation", evaluation_columns(experiment))
    sources = [train, *([validation] if validation else [])]
    if experiment.data.test is not None:
        sources.append(open_source(experiment, experiment.data.test, "data.test", evaluation_columns(experiment)))
    skip = experiment.data.on_bad_rows == "skip"
    for source in sources if not skip else []:
        check_footers(source, specs, experiment)
    features = feature_list(experiment)
    columns = list(
        dict.fromkeys([*(c for f in features for c in f.columns if c in train.schema.names), *label_columns(experiment)])
    )
    sample = train.sample(sample_rows, columns)
    labels = labels_of(experiment, specs)
    fit = LabelFit(labels, objectives)
    if skip:
        bad = bad_rows(experiment.data, sample.num_rows)
        sample = pa.Table.from_batches(without_bad_rows(_batches(sample), labels, features, bad), sample.schema)
    for batch in _checked(sample, labels, train):
        fit.add(batch)
    assert isinstance(experiment.model.embedding_dim, int)
    encoder = Encoder.fit(features, _batches(sample), schema=train.schema, embedding_dim=experiment.model.embedding_dim)
    for source in sources[1:]:
        check_encodes(encoder, source)
    if skip:
        sample = usable_rows(sample, encoder)
    if validation is not None and not skip:
        for _ in _checked(validation.sample(sample_rows, label_columns(experiment)), labels, validation):
            pass
    statistics = fit.statistics()
    model = MultiTaskModel(experiment, encoder, statistics, torch.device("meta"))
    weights = loss_weights(experiment, objectives, statistics)
    warnings: list[str] = list(train.notes)
    note = slow_precision(experiment, device)
    warnings += [] if note is None else [note]
    drift = _drift(encoder, validation, columns, sample_rows, warnings)
    leaks = _leaks(sample, encoder, labels, objectives, warnings)
    partial = sample.num_rows < train.num_rows
    tables = {
        "features": _feature_rows(experiment, train, encoder, drift, leaks),
        f"tables{' (from the sample: a full fit finds more ids)' if partial else ''}": _table_rows(experiment, encoder),
        "tasks": _task_rows(experiment, specs, statistics, weights),
    }
    for name, each in statistics.items():
        if each.broken_given:
            warnings.append(
                f"`tasks.{name}.given`: {each.broken_given:,} of {each.rows:,} sampled rows have a label above 0 in column "
                f"'{experiment.label_column(name)}' although {specs[name].given} is 0. With `given`, these labels are left out."
            )
        if not each.trained:
            given = f" where {specs[name].given} is 1" if specs[name].given else ""
            raise ValueError(
                f"`tasks.{name}.label`: column '{experiment.label_column(name)}' should hold labels{given}. Found none in "
                f"{each.rows:,} sampled rows."
            )
    dense = sum(parameter.numel() for parameter in model.dense.parameters())
    size = experiment.data.batch_size
    assert isinstance(size, int)
    facts = [
        f"{train.num_rows:,} training rows in {len(train.files)} files ({sample.num_rows:,} sampled)"
        + (f", {validation.num_rows:,} validation rows" if validation else ", no validation rows"),
        f"batches of {size:,} rows: {math.ceil(train.num_rows / size):,} steps an epoch",
        f"dense part: {dense:,} parameters, {model.dense.flops_per_row() / 1e6:.3f} MFLOP a row to score, "
        f"{3 * model.dense.flops_per_row() / 1e6:.3f} to train; shared representation of {model.embeddings.output_dim} columns",
    ]
    return {"tables": tables, "facts": facts, "warnings": warnings}


def _feature_rows(
    experiment: Experiment,
    train: Dataset,
    encoder: Encoder,
    drift: Mapping[str, tuple[float, float]],
    leaks: Mapping[str, float],
) -> list[dict[str, Any]]:
    return [
        {
            "feature": feature.name,
            "kind": experiment.features[feature.name].kind,
            "column": feature.columns[0],
            "type": str(train.schema.field(feature.columns[0]).type) if feature.columns[0] in train.schema.names else "missing",
            "null": encoder.profiles[feature.name].null_share,
            "AUC alone": leaks.get(feature.name),
            **({"PSI": drift[feature.name][0], "unseen": drift[feature.name][1]} if drift else {}),
        }
        for feature in encoder.features
    ]


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


def _checked(sample: pa.Table, labels: Mapping[str, Label], dataset: Dataset) -> Iterator[pa.RecordBatch]:
    """The sample's batches, every label within its range."""
    for batch in _batches(sample):
        for name, label in labels.items():
            try:
                label_values(batch, label)
            except BadRowsError as error:
                found = bad_row(dataset, [label.column], functools.partial(label_values, label=label)) or error
                raise ValueError(f"`tasks.{name}.label`, `{dataset.place}`: {found}") from error
        yield batch


def _drift(
    encoder: Encoder, validation: Dataset | None, columns: Sequence[str], rows: int, warnings: list[str]
) -> dict[str, tuple[float, float]]:
    """{feature: (population stability index, unseen share)} from training to validation."""
    if validation is None:
        return {}
    sample = validation.sample(rows, [column for column in columns if column in validation.schema.names])
    found = {}
    for name, profile in encoder.profile(_batches(sample)).items():
        before = encoder.profiles[name]
        index = psi(before, profile)
        found[name] = (index, profile.unseen_share)
        if index > DRIFT_PSI:
            warnings.append(
                f"`features.{name}` drifts: population stability index {index:.2f} from training to validation (above "
                f"{DRIFT_PSI} is a shift). A feature that stands for time cannot generalise."
            )
        if profile.unseen_share > max(UNSEEN_SHARE, 2 * before.unseen_share):
            warnings.append(
                f"`features.{name}`: {profile.unseen_share:.0%} of its validation values are not in the training sample."
            )
    return found


def _leaks(
    sample: pa.Table, encoder: Encoder, labels: Mapping[str, Label], objectives: Objectives, warnings: list[str]
) -> dict[str, float]:
    """{feature: largest AUC over the tasks of that feature alone}, estimated on the odd rows from rates on the even ones."""
    batches = list(_batches(sample))
    targets: dict[str, NDArray[np.float64]] = {}
    for name, label in labels.items():
        values = np.concatenate([label_values(batch, label) for batch in batches]).astype(np.float64)
        family = objectives.specs[name].task.family
        if family != "binary":  # a continuous label: is it above its median?
            known = values[~np.isnan(values)]
            values = np.where(np.isnan(values), np.nan, values > np.median(known)) if len(known) else values
        targets[name] = values
    found: dict[str, float] = {}
    for feature, codes in _codes(batches, encoder).items():
        for task, target in targets.items():
            value = _auc_alone(codes, target)
            if value is None:
                continue
            if value > LEAK_AUC:
                warnings.append(
                    f"`features.{feature}` gives the label of task '{task}' away: alone it reaches an AUC of {value:.3f}. "
                    "Is it known before the impression?"
                )
            found[feature] = max(found.get(feature, 0.0), value)
    return found


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
