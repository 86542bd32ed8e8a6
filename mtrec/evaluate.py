"""Every row of a data set once: predictions, then metrics that do not depend on the number of ranks.

Legend: B rows on this rank.
"""

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mtrec import parallel
from mtrec.batch import Batch
from mtrec.dataset import Dataset
from mtrec.events import DIVERGED, NotFiniteError
from mtrec.experiment import Experiment
from mtrec.features import Encoder
from mtrec.feed import BadRows, bad_rows, feed
from mtrec.kinds import nearest
from mtrec.labels import labels_of
from mtrec.metrics import (
    METRICS,
    BinaryMetrics,
    DwellMetrics,
    MulticlassMetrics,
    RegressionMetrics,
    group_keys,
)
from mtrec.model import MultiTaskModel
from mtrec.reader import Reader
from mtrec.sources import evaluation_columns, label_columns
from mtrec.tasks import Objectives

Accumulator = BinaryMetrics | DwellMetrics | MulticlassMetrics | RegressionMetrics
LARGER_IS_BETTER = ("auc", "gauc", "xauc", "r2", "r2_log1p", "accuracy")
SMALLER_IS_BETTER = ("log_loss", "normalized_entropy", "ece", "mae", "rmse")
PIECE_ROWS, ROW_BYTES = 1_000_000, 128  # of a message between ranks: rows at most, and what a row of it costs on its way
MAIN_METRIC = {"binary": "auc", "dwell": "xauc", "regression": "r2", "multiclass": "accuracy"}


class Measures:
    """The metrics of all tasks, collected over batches and merged over ranks.

    A task's own metrics are over all rows where its label is settled: with a `given`, the joint event (p_conversion_and_click
    against click and conversion; expected dwell against dwell, 0 where there was no click). The suffix `_given` marks metrics
    of the task's own prediction on the rows where its `given` (or `also_on`) is 1.
    """

    def __init__(self, experiment: Experiment, objectives: Objectives, spill_folder: Path | None = None) -> None:
        self._experiment, self._objectives = experiment, objectives
        self.rows = 0
        evaluation = experiment.evaluation
        self._found: dict[tuple[str, str], Accumulator] = {}
        places = [(name, "") for name in objectives.names if _settled(objectives, name)]
        places += [
            (name, "_given")
            for name in objectives.names
            if objectives.specs[name].given or experiment.tasks[name].also_on
        ]
        limit = evaluation.memory_limit_mb * 1_000_000 // max(1, len(places))
        self._bounds: dict[str, Any] = {"memory_limit_bytes": limit, "spill_folder": spill_folder}
        for name, suffix in places:
            family = objectives.specs[name].task.family
            options = dict(self._bounds)
            if family == "binary":
                options["bins"] = evaluation.bins
            elif family == "multiclass":
                options["num_classes"] = len(objectives.specs[name].task.prediction_names())
            self._found[name, suffix] = METRICS[family](**options)

    def update(self, logits: Mapping[str, torch.Tensor], batch: Batch, group_B: NDArray[np.int64] | None) -> None:
        """Adds the rows of a batch; logits {task: (B, C)}."""
        objectives, labels = self._objectives, batch.labels
        self.rows += batch.num_rows
        if not batch.num_rows:
            return
        logits = {name: each.double() for name, each in logits.items()}  # a float32 sigmoid is 1 from a logit of 17 on
        columns = {name: _array(column) for name, column in objectives.predictions(logits).items()}
        log_scale = {name: _array(column) for name, column in objectives.log_predictions(logits).items()}
        weight_B = None if batch.sample_weight_B is None else _array(batch.sample_weight_B)
        for (name, suffix), accumulator in self._found.items():
            spec = objectives.specs[name]
            own = spec.task.prediction_names()
            if suffix == "" and spec.given is not None:
                chosen = objectives.expected_names(name)
                label_B = _array(objectives.joint_label(name, labels))
                log_B = None
            else:
                chosen = own
                also_on = self._experiment.tasks[name].also_on
                label_B = _array(objectives.reached_label(name, labels))
                if suffix and spec.given is None and also_on is not None:
                    label_B = np.where(_array(labels[also_on]) == 1.0, label_B, np.nan)
                log_B = log_scale.get(name)
            prediction = columns[chosen[0]] if len(chosen) == 1 else np.stack([columns[c] for c in chosen], axis=1)
            _check_finite(name, prediction, label_B)
            if isinstance(accumulator, BinaryMetrics):
                accumulator.update(prediction, label_B, group_B, weight_B)
            elif isinstance(accumulator, DwellMetrics):
                accumulator.update(prediction, label_B, log_prediction_N=log_B, weight_N=weight_B)
            else:
                accumulator.update(prediction, label_B, weight_N=weight_B)

    def merge_ranks(self) -> None:
        """Rank 0 then holds the rows of all ranks; they travel a piece at a time, so that it never holds them in memory."""
        world = parallel.world_size()
        if world == 1:
            return
        piece_rows = max(1, min(PIECE_ROWS, self._bounds["memory_limit_bytes"] // (ROW_BYTES * world)))
        mine = {key: each.pieces(piece_rows) for key, each in self._found.items() if parallel.rank()}
        rows = self.rows if parallel.rank() else 0
        more = True
        while more:
            part = {key: arrays for key, pieces in mine.items() if (arrays := next(pieces, None)) is not None}
            mine = {key: mine[key] for key in part}
            gathered = parallel.gather_objects((rows, part)) or []
            rows = 0
            for their_rows, arrays in gathered:
                self.rows += their_rows
                for key, found in arrays.items():
                    each = self._found[key]
                    each.merge(type(each).from_arrays(found, **self._bounds))  # type: ignore[arg-type]  # of one class
            more = parallel.broadcast_object(any(arrays for _, arrays in gathered))

    def compute(self) -> dict[str, Any]:
        """{"rows": n, "tasks": {"click": {"auc": ...}}}; undefined values are None."""
        tasks: dict[str, dict[str, float | int | None]] = {name: {} for name in self._objectives.names}
        for (name, suffix), accumulator in self._found.items():
            for metric, value in accumulator.compute().items():
                tasks[name][metric + suffix] = None if isinstance(value, float) and math.isnan(value) else value
        return {"rows": self.rows, "tasks": tasks}


def _check_finite(task: str, prediction: NDArray[Any], label_B: NDArray[Any]) -> None:
    """Raises NotFiniteError where an output on a row with a label is not."""
    if np.isfinite(prediction).all():
        return
    counted = prediction[~np.isnan(label_B)]
    bad = counted[~np.isfinite(counted)]
    if len(bad):
        raise NotFiniteError(
            f"The model's outputs of task '{task}' should be finite. Found {bad[0]} for {len(bad):,} of {counted.size:,} "
            f"values of a batch: {DIVERGED}"
        )


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def whole_reader(dataset: Dataset, encoder: Encoder, others: Sequence[str], batch_size: int) -> Reader:
    """Reads every row of a data set once, in contiguous parts for the ranks; all ranks get the same number of pieces.

    Columns: those of the encoder, and `others`.
    """
    world = parallel.world_size()
    return Reader(
        dataset.with_dictionaries(encoder.id_columns - {*others}),
        list(dict.fromkeys([*encoder.columns, *others])),
        batch_size=-(-batch_size // world) * world,
        num_streams=world,
        rank=parallel.rank(),
        world_size=world,
        shuffle=False,
        prefetch=2,
    )


def evaluate(
    model: MultiTaskModel,
    dataset: Dataset,
    experiment: Experiment,
    encoder: Encoder,
    *,
    device: torch.device,
    by: str | None = None,
    spill_folder: Path | None = None,
) -> dict[str, Any]:
    """Metrics of a model over a data set, the same on every rank and for every number of ranks.

    With `by`, a column: also {"by": {column: {value: {"rows": ..., "tasks": ...}}}}.
    """
    labels = labels_of(experiment, model.specs)
    group = experiment.evaluation.group_by
    extra = [*evaluation_columns(experiment), *([by] if by else [])]
    reader = whole_reader(dataset, encoder, [*label_columns(experiment), *extra], experiment.evaluation.batch_size)
    total = Measures(experiment, model.objectives, spill_folder)
    segments: dict[Any, Measures] = {}
    was_training = model.training
    model.eval()
    bf16 = experiment.training.precision == "bf16"
    with torch.no_grad():
        bad = bad_rows(experiment.data, dataset.num_rows)
        rows_needed = bool(group or by)
        fed = feed(reader, encoder, labels, experiment.data.sample_weight, keep_rows=rows_needed, bad=bad)
        for piece, cpu_batch in fed:
            batch = cpu_batch.to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                logits = model(batch)
            group_B = group_keys(piece.record_batch.column(group), group) if group else None
            total.update(logits, batch, group_B)
            if by and batch.num_rows:
                for value, index in _split(piece.record_batch.column(by)):
                    if value not in segments:
                        segments[value] = Measures(experiment, model.objectives, spill_folder)
                    chosen = torch.from_numpy(index).to(device)
                    part = _select(batch, chosen)
                    segments[value].update(
                        {name: each[chosen] for name, each in logits.items()},
                        part,
                        None if group_B is None else group_B[index],
                    )
    model.train(was_training)
    if bad is not None:
        check_bad_rows(bad, dataset.place)
    total.merge_ranks()
    metrics: dict[str, Any] = total.compute()
    if by:
        every = {value for part in parallel.gather_objects(list(segments)) or [] for value in part}
        found: dict[str, Any] = {}
        for value in parallel.broadcast_object(_in_order(every)):
            measures = segments.get(value) or Measures(experiment, model.objectives, spill_folder)
            measures.merge_ranks()
            found[segment_name(value, found)] = measures.compute()
        metrics["by"] = {by: found}
    result: dict[str, Any] = parallel.broadcast_object(metrics)
    return result


def check_bad_rows(bad: BadRows, source: str) -> None:
    """Raises ValueError on every rank where the rows that all ranks left out are too many; `source`: what they were read from."""
    every = parallel.gather_objects((bad.skipped, bad.kept)) or []
    skipped = sum((each for each, _ in every), Counter[str]())
    skipped, rows = parallel.broadcast_object((skipped, skipped.total() + sum(kept for _, kept in every)))
    bad.check(skipped, rows, f"They are rows of `{source}`.")


def _split(column: pa.Array) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """(value, row numbers) of each distinct value."""
    encoded = column.dictionary_encode()
    seen: dict[Any, list[NDArray[np.int64]]] = {}
    codes = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    for code in np.unique(codes):
        value = None if code < 0 else encoded.dictionary[int(code)].as_py()
        if isinstance(value, float) and math.isnan(value):
            value = "nan"  # a NaN equals no other one
        seen.setdefault(value, []).append(np.flatnonzero(codes == code))
    for value, rows in seen.items():
        yield value, np.concatenate(rows)


def check_one_value(data: Dataset, column: str, option: str) -> None:
    """Raises ValueError naming the option where rows cannot be told apart by a column: it holds lists or structs."""
    type_ = data.schema.field(column).type
    if pa.types.is_nested(type_):
        raise ValueError(f"{option} should name a column with one value a row. Found '{column}' of type {type_}.")


def _in_order(values: Collection[Any]) -> list[Any]:
    """The values of a column (`_split`) by size; NaN and then null last.

    >>> _in_order({10, 9, None}), _in_order({"nan", 10.5, 9.0, None})
    ([9, 10, None], [9.0, 10.5, 'nan', None])
    """
    floats = any(isinstance(value, float) for value in values)  # beside which a text stands for NaN
    return sorted(values, key=lambda value: (value is None, floats and isinstance(value, str), value))


def segment_name(value: Any, taken: Collection[str]) -> str:
    """Of a value of the column of `by`; null, which is last, stands apart from a text "null"."""
    name = "null" if value is None else str(value)
    while value is None and name in taken:
        name = f"({name})"
    return name


def _select(batch: Batch, rows: torch.Tensor) -> Batch:
    """The labels and weights of some rows (metrics need no more)."""
    weight = batch.sample_weight_B
    return Batch(
        dense_BF=batch.dense_BF[rows],
        sparse=batch.sparse,
        weighted=batch.weighted,
        labels={name: label[rows] for name, label in batch.labels.items()},
        sample_weight_B=None if weight is None else weight[rows],
        stream_rows=(len(rows),),
        single=batch.single,
    )


def check_best_metric(experiment: Experiment, objectives: Objectives) -> None:
    """Raises ValueError where `training.best_metric` names a metric that its task does not have."""
    wish = experiment.training.best_metric
    known = Measures(experiment, objectives).compute()["tasks"]
    for path in [wish] if isinstance(wish, str) else list(wish or ()):
        name, _, metric = path.rpartition("/")
        good = [each for each in known[name] if each.removesuffix("_given") in (*LARGER_IS_BETTER, *SMALLER_IS_BETTER)]
        if metric in known[name] and metric not in good:
            raise ValueError(
                f"`training.best_metric` should be a metric of which more, or less, is better ({', '.join(good)}). "
                f"Found '{path}'."
            )
        if metric not in known[name]:
            raise ValueError(
                f"`training.best_metric` should name a metric of task '{name}' ({', '.join(known[name])}). "
                f"Found '{metric}'.{nearest(metric, known[name])}"
            )


def score_metric(experiment: Experiment, objectives: Objectives, metrics: Mapping[str, Any]) -> float | None:
    """The one number that best checkpoints and early stopping go by, or None where it is undefined.

    Larger is better: errors such as log_loss count negatively.
    """
    wish = experiment.training.best_metric
    if wish is None:
        names = [name for name in objectives.names if not experiment.tasks[name].auxiliary]
        weights = {
            f"{name}/{MAIN_METRIC[objectives.specs[name].task.family]}{'' if _settled(objectives, name) else '_given'}": 1.0
            / len(names)
            for name in names
        }
    else:
        weights = {wish: 1.0} if isinstance(wish, str) else wish
    total = 0.0
    for path, weight in weights.items():
        name, _, metric = path.rpartition("/")
        value = metrics["tasks"].get(name, {}).get(metric)
        if value is None:
            return None
        total += weight * (-value if metric.removesuffix("_given") in SMALLER_IS_BETTER else value)
    return total


def _settled(objectives: Objectives, name: str) -> bool:
    """Whether the task's label is settled (0) where its `given` did not happen."""
    spec = objectives.specs[name]
    return spec.given is None or spec.task.family in ("binary", "dwell")
