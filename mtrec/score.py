"""The scorer: record batch -> record batch of prediction columns, and what is checked before it may be trusted.

    with open_scorer(request) as scorer: predictions = scorer(record_batch)

Legend: B rows of a batch, F features.
"""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from mtrec import parallel
from mtrec.allocator import keep_freed_memory
from mtrec.batch import Batch, Label, label_values, make_batch
from mtrec.checkpoint import Checkpoint, CheckpointError
from mtrec.experiment import Experiment
from mtrec.features import Encoder, FeatureCounts
from mtrec.formula import SCORE, Formula, prediction_columns
from mtrec.labels import labels_of
from mtrec.metrics import BinaryMetrics, DistributionSummary
from mtrec.model import MultiTaskModel, task_specs
from mtrec.predictions import (
    Floats,
    TrainingSample,
    golden_rows,
    largest_difference,
    load_model,
    predict,
    training_predictions,
    uses_bf16,
)
from mtrec.run import Run
from mtrec.tasks import Objectives

TOLERANCE = 1e-5  # of a golden row
BF16_TOLERANCE = 5e-2  # another machine multiplies bfloat16 (8 bits) in another order: a gross error is still seen
MAX_NULL_JUMP = 0.1
AUC_BINS = 4_096


class NonFiniteError(ValueError):
    """A prediction that is NaN or infinite; `row` is its number in the batch."""

    def __init__(self, column: str, row: int, value: float) -> None:
        super().__init__(f"column '{column}' should be finite. Found {value}")
        self.column, self.row, self.value = column, row, value


class Scorer:
    """A loaded model and all that turns rows into columns. Use inside `parallel.process_group`.

    Args:
        model: of `load_model`, on `device`.
        encoder, experiment: of its run.
        formula: of `ranking_formula`.

    Attributes:
        columns: names of the columns that it makes, `score` last; each float32 (the logits are).
    """

    def __init__(
        self, model: MultiTaskModel, encoder: Encoder, experiment: Experiment, formula: Formula, device: torch.device
    ) -> None:
        self.model, self.encoder, self.experiment, self.formula, self.device = model, encoder, experiment, formula, device
        self.columns = (*prediction_columns(experiment, model.objectives), SCORE)
        self.schema = pa.schema([pa.field(name, pa.float32(), nullable=False) for name in self.columns])
        self._bf16 = uses_bf16(experiment)

    def __call__(self, rows: pa.RecordBatch, counts: FeatureCounts | None = None) -> pa.RecordBatch:
        """(B) rows with the features' columns, in any order and among others -> (B) predictions; labels are not read.

        Raises ValueError naming a feature that is missing or of another type, BadRowsError for rows that cannot be encoded,
        NonFiniteError for a prediction that is no number.
        """
        return self.to_arrow(self.predict(self.encode(rows, counts)))

    def encode(self, rows: pa.RecordBatch, counts: FeatureCounts | None = None) -> Batch:
        """The batch on the CPU; may run in another thread. Adds nulls and unseen ids to `counts`."""
        return make_batch(rows, self.encoder, {}, None, counts=counts)

    def predict(self, batch: Batch) -> dict[str, Floats]:
        """{column: (B,) float64}, of every column of `self.columns`."""
        if not batch.num_rows:
            return {name: np.zeros(0) for name in self.columns}
        found = predict(self.model, batch, self.device, self._bf16)
        found[SCORE] = np.broadcast_to(self.formula(found), (batch.num_rows,))
        return {name: found[name] for name in self.columns}

    def to_arrow(self, columns: Mapping[str, Floats]) -> pa.RecordBatch:
        """The columns as they are written. Raises NonFiniteError."""
        arrays = []
        for name in self.columns:
            with np.errstate(over="ignore"):
                values_B = columns[name].astype(np.float32)  # may become infinite here, from 3.4e38 on
            bad = np.flatnonzero(~np.isfinite(values_B))
            if len(bad):
                raise NonFiniteError(name, int(bad[0]), float(columns[name][bad[0]]))
            arrays.append(pa.array(values_B))
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


@contextlib.contextmanager
def open_scorer(run: Run, found: Checkpoint, formula: Formula, device: torch.device) -> Iterator[Scorer]:
    """A scorer in this process, for as long as the context lasts; one thread a process, as in training."""
    torch.set_num_threads(run.experiment.training.threads_per_worker)
    keep_freed_memory()
    with parallel.process_group(device):
        model = load_model(run, found, device)
        yield Scorer(model, run.encoder, run.experiment, formula, device)


def check_golden(scorer: Scorer, run: Run, found: Checkpoint) -> float:
    """The largest difference of the golden rows' predictions from those that the training made with this checkpoint.

    Absolute below 1, relative above. Raises CheckpointError beyond 1e-5 (bf16: 0.05): the model is not the one trained.
    """
    sample, expected = TrainingSample(run), training_predictions(found)
    rows = golden_rows(sample.rows)
    chosen = sample.rows.take(pa.array(rows))
    predicted = predict(scorer.model, scorer.encode(chosen), scorer.device, uses_bf16(run.experiment))
    unknown = sorted(expected.keys() ^ predicted.keys())
    if unknown or any(len(values) != sample.rows.num_rows for values in expected.values()):
        raise CheckpointError(
            f"{found.folder} should hold the predictions of the {sample.rows.num_rows} sample rows of {run.folder} for "
            f"{', '.join(predicted)}. Found others: the run and the checkpoint do not belong together."
        )
    column, difference = largest_difference(predicted, {name: values[rows] for name, values in expected.items()})
    limit = BF16_TOLERANCE if uses_bf16(run.experiment) else TOLERANCE
    if not difference <= limit:
        raise CheckpointError(
            f"{found.folder} predicts other numbers here than where it was trained: '{column}' of a golden row differs by "
            f"{difference:.2g}, more than {limit:g}. Something of the run was changed (vocabulary, statistics, weights), or "
            "this mtrec computes otherwise; do not use these scores."
        )
    return difference


def checkpoint_digest(found: Checkpoint) -> str:
    """SHA-256 of the checkpoint's manifest, which holds those of all its files."""
    return hashlib.sha256((found.folder / "manifest.json").read_bytes()).hexdigest()


def training_summaries(run: Run, found: Checkpoint, formula: Formula) -> dict[str, DistributionSummary]:
    """{column: distribution of its predictions over the sample of training rows}, `score` by this formula included."""
    columns = training_predictions(found)
    columns[SCORE] = formula(columns)
    names = (*prediction_columns(run.experiment, Objectives(task_specs(run.experiment))), SCORE)
    summaries = {}
    for name in names:
        summaries[name] = DistributionSummary()
        values = np.asarray(columns[name])
        summaries[name].update(values[np.isfinite(values)])
    return summaries


def null_jumps(encoder: Encoder, counts: FeatureCounts) -> dict[str, tuple[float, float]]:
    """{feature: (null share in training, now)} of the features whose share of nulls grew by more than 10 points."""
    jumps = {}
    for name, share in counts.null_share().items():
        before = float(encoder.statistics[name]["null_share"])
        if share - before > MAX_NULL_JUMP:
            jumps[name] = (before, share)
    return jumps


def check_memory(encoder: Encoder, available_bytes: int, where: str, scorers: int = 1) -> None:
    """Raises ValueError where `scorers` processes, each with all tables, do not fit into the memory there."""
    sizes = {table.name: table.num_embeddings * table.dim * 4 for table in encoder.tables}
    needed = sum(sizes.values()) * scorers
    if needed > available_bytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise ValueError(
            f"The tables take {sum(sizes.values()) / 1e9:,.1f} GB ({', '.join(f'{n} {sizes[n] / 1e9:,.1f}' for n in largest)}) "
            f"in each of {scorers} scoring processes; {where} has {available_bytes / 1e9:,.1f} GB free. Every process holds all "
            "tables: that is the limit of scoring. Take fewer --workers, a larger machine, or a smaller `dim` or num_embeddings."
        )


@dataclasses.dataclass
class Tally:
    """What is learned while rows are scored; merges over files and goes through JSON.

    Attributes:
        rows: rows scored.
        counts: nulls and unseen ids of each feature.
        summaries: distribution of each column.
        labelled: predictions against labels, of the tasks whose labels are in the file.
        seconds: spent `reading` (decoding and encoding), `scoring`, `writing`.
        notes: what a user should know of a file.
    """

    counts: FeatureCounts
    summaries: dict[str, DistributionSummary]
    labelled: "LabelledSums"
    rows: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"reading": 0.0, "scoring": 0.0, "writing": 0.0})
    notes: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def empty(cls, encoder: Encoder, experiment: Experiment) -> Self:
        """Of no rows yet."""
        objectives = Objectives(task_specs(experiment))
        columns = (*prediction_columns(experiment, objectives), SCORE)
        return cls(
            encoder.counts(),
            {name: DistributionSummary() for name in columns},
            LabelledSums(experiment, objectives),
        )

    def merge(self, other: Self) -> None:
        """Adds the rows of another part."""
        self.rows += other.rows
        self.counts.merge(other.counts)
        for name, summary in self.summaries.items():
            summary.merge(other.summaries[name])
        self.labelled.merge(other.labelled)
        for name, seconds in other.seconds.items():
            self.seconds[name] += seconds
        self.notes += [note for note in other.notes if note not in self.notes]

    def state(self) -> dict[str, Any]:
        """Plain values for JSON."""
        summaries = {
            name: {key: array.tolist() for key, array in summary.arrays().items()}
            for name, summary in self.summaries.items()
            if summary.count
        }
        return {
            "rows": self.rows,
            "counts": self.counts.counts_F4.tolist(),
            "summaries": summaries,
            "labelled": self.labelled.state(),
            "seconds": self.seconds,
            "notes": self.notes,
        }

    def restore(self, state: Mapping[str, Any]) -> Self:
        """Fills an empty tally with what `state` gave, but for the seconds."""
        self.rows, self.notes = int(state["rows"]), list(state["notes"])
        self.counts.counts_F4 += np.array(state["counts"], np.int64).reshape(self.counts.counts_F4.shape)
        for name, arrays in state["summaries"].items():
            self.summaries[name] = DistributionSummary.from_arrays(arrays)
        self.labelled.restore(state["labelled"])
        return self


class LabelledSums:
    """Predictions over all rows against the labels that a file happens to have: AUC (in bins) and calibration.

    Only sums are kept, so that memory does not grow with the rows; `mtrec evaluate` gives exact metrics. Of a task with a
    `given`, the joint event is compared, as `evaluate` does.
    """

    def __init__(self, experiment: Experiment, objectives: Objectives) -> None:
        self._objectives = objectives
        self.labels: dict[str, Label] = labels_of(experiment, objectives.specs)
        self._binary: dict[str, BinaryMetrics] = {}
        self._sums: dict[str, NDArray[np.float64]] = {}  # rows, sum of predictions, sum of labels
        for name, spec in objectives.specs.items():
            if spec.task.family == "binary" and not experiment.tasks[name].auxiliary:
                self._binary[name] = BinaryMetrics(bins=AUC_BINS)
            elif spec.task.family != "multiclass" and not experiment.tasks[name].auxiliary:
                self._sums[name] = np.zeros(3)

    def known(self, columns: Sequence[str]) -> tuple[str, ...]:
        """The tasks whose labels, and those of all that they are given, are among the columns."""
        return tuple(
            name
            for name in (*self._binary, *self._sums)
            if all(self.labels[each].column in columns for each in (name, *self._objectives.chains[name]))
        )

    def columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The columns with the labels of these tasks and of what they are given."""
        every = dict.fromkeys(each for name in names for each in (*self._objectives.chains[name], name))
        return tuple(dict.fromkeys(self.labels[each].column for each in every))

    def update(self, names: Sequence[str], rows: pa.RecordBatch, predictions: Mapping[str, Floats]) -> None:
        """Adds (B) rows for the tasks `names`. Raises ValueError for labels out of their range."""
        every = dict.fromkeys(each for name in names for each in (*self._objectives.chains[name], name))
        labels = {each: torch.from_numpy(label_values(rows, self.labels[each])) for each in every}
        for name in names:
            spec = self._objectives.specs[name]
            given = spec.given is not None and spec.task.family in ("binary", "dwell")
            column = (self._objectives.expected_names(name) if given else spec.task.prediction_names())[0]
            label = self._objectives.joint_label(name, labels) if given else self._objectives.reached_label(name, labels)
            label_B, prediction_B = label.double().numpy(), predictions[column]
            if name in self._binary:
                self._binary[name].update(prediction_B, label_B)
            else:
                known_B = ~np.isnan(label_B)
                self._sums[name] += (known_B.sum(), prediction_B[known_B].sum(), label_B[known_B].sum())

    def merge(self, other: Self) -> None:
        """Adds the rows of another part."""
        for name, metrics in self._binary.items():
            metrics.merge(other._binary[name])
        for name, sums in self._sums.items():
            sums += other._sums[name]

    def state(self) -> dict[str, Any]:
        """Plain values for JSON; of the bins only those with rows."""
        found: dict[str, Any] = {name: sums.tolist() for name, sums in self._sums.items()}
        for name, metrics in self._binary.items():
            arrays = metrics.arrays()
            used = np.flatnonzero(arrays["histogram"].any(axis=0))
            found[name] = {
                "bins": used.tolist(),
                "histogram": arrays["histogram"][:, used].tolist(),
                "sums": arrays["sums"].tolist(),
            }
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state` gave."""
        for name in self._sums:
            self._sums[name] = np.array(state[name], np.float64)
        for name, metrics in self._binary.items():
            arrays = metrics.arrays()
            if state[name]["bins"]:
                arrays["histogram"][:, state[name]["bins"]] = np.array(state[name]["histogram"], np.float64)
            arrays["sums"] = np.array(state[name]["sums"], np.float64)
            self._binary[name] = BinaryMetrics.from_arrays(arrays)

    def compute(self) -> dict[str, dict[str, float | int | None]]:
        """{task: {rows, calibration, auc}} of the tasks with labels; None where one is undefined."""
        found: dict[str, dict[str, float | int | None]] = {}
        for name, metrics in self._binary.items():
            values = metrics.compute()
            if values["rows"]:
                chosen = {key: values[key] for key in ("rows", "auc", "auc_error_bound", "calibration")}
                found[name] = {key: None if math.isnan(value) else value for key, value in chosen.items()}
        for name, (rows, predicted, observed) in self._sums.items():
            if rows:
                found[name] = {"rows": int(rows), "calibration": float(predicted / observed) if observed else None}
        return found


def free_memory(device: torch.device) -> int:
    """Bytes that are free on this machine (or its GPU)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else 2**62  # not Linux: no limit is known
