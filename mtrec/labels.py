"""What the training labels are like: base rates for output biases and `weight: auto`, read with the vocabularies.

Rates and means are those of the weighted rows, as losses are: of `data.sample_weight`, where there is one.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec.batch import Label, label_values, sample_weights
from mtrec.experiment import Experiment
from mtrec.tasks import Objectives, TaskSpec
from mtrec.written import as_written

SAMPLE_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class LabelStatistics:
    """A task's labels over the training rows, natural units.

    Attributes:
        rows: rows read; `observed`: those with a label; `trained`: those that count for the task's loss.
        mean: mean of the labels that the head models (where `given` is 1); `target_mean`: of those that the loss sees
            (they differ in space entire only, where the loss sees the joint event on all rows).
        broken_given: rows whose label is above 0 although their `given` is 0.
        sample: up to 65,536 of the labels behind `mean`, evenly spread, float32; of twice the weight twice as often.
        trained_share: of all rows' weight that of `trained`; None in runs of an earlier version, which had no weights here.
    """

    rows: int
    observed: int
    trained: int
    mean: float
    target_mean: float
    broken_given: int
    sample: NDArray[np.float32]
    trained_share: float | None = None

    @property
    def density(self) -> float:
        """The share of the rows (of their weight) that counts for the task's loss."""
        return self.trained / max(1, self.rows) if self.trained_share is None else self.trained_share

    def sample_tensor(self) -> Tensor:
        """`sample` as a tensor."""
        return torch.from_numpy(self.sample)


class LabelFit:
    """Gathers label statistics while record batches pass by.

    Args:
        labels: each task's column; objectives: which rows count.
        sample_weight: column with a weight a row, or None.

    `for batch in fit.watch(batches): ...`, then `fit.statistics()`.
    """

    def __init__(self, labels: Mapping[str, Label], objectives: Objectives, sample_weight: str | None) -> None:
        self._labels, self._objectives, self._sample_weight = labels, objectives, sample_weight
        self._rows, self._weight = 0, 0.0
        self._counts = {name: np.zeros(4, dtype=np.int64) for name in labels}  # observed, trained, head, broken_given
        self._sums = {name: np.zeros((2, 2)) for name in labels}  # weight and weighted labels, of the head and of the loss
        self._kept: dict[str, list[NDArray[np.float32]]] = {name: [] for name in labels}  # (2, n): labels, their weights
        self._stride = dict.fromkeys(labels, 1)

    def watch(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Passes the batches on, and counts."""
        for batch in batches:
            self.add(batch)
            yield batch

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts a batch. Raises as `label_values` and `sample_weights` do."""
        values = {name: torch.from_numpy(label_values(batch, label)) for name, label in self._labels.items()}
        column = self._sample_weight
        weight_B = torch.ones(batch.num_rows) if column is None else torch.from_numpy(sample_weights(batch, column))
        self._rows += batch.num_rows
        self._weight += float(weight_B.double().sum())
        for name, value in values.items():
            reached, target = self._objectives.reached(name, values), self._objectives.target(name, values)
            in_head, in_loss = (reached == 1.0) & ~value.isnan(), ~target.isnan()
            broken = int(((reached == 0.0) & (value > 0)).sum())
            self._counts[name] += (int((~value.isnan()).sum()), int(in_loss.sum()), int(in_head.sum()), broken)
            self._sums[name] += (_sums(value[in_head], weight_B[in_head]), _sums(target[in_loss], weight_B[in_loss]))
            self._keep(name, torch.stack([value[in_head], weight_B[in_head]]).numpy())

    def _keep(self, name: str, head: NDArray[np.float32]) -> None:
        """A systematic sample: every stride-th label; the stride doubles when the sample is full."""
        kept, before = self._kept[name], int(self._counts[name][2]) - head.shape[1]
        kept.append(head[:, -before % self._stride[name] :: self._stride[name]].copy())
        while sum(each.shape[1] for each in kept) > SAMPLE_ROWS:
            kept[:] = [np.concatenate(kept, axis=1)[:, ::2]]
            self._stride[name] *= 2

    def statistics(self) -> dict[str, LabelStatistics]:
        """{task: what its labels are like}."""
        found = {}
        for name in self._labels:
            observed, trained, _, broken = (int(count) for count in self._counts[name])
            (head_weight, head_sum), (loss_weight, loss_sum) = self._sums[name].tolist()
            found[name] = LabelStatistics(
                rows=self._rows,
                observed=observed,
                trained=trained,
                mean=head_sum / head_weight if head_weight else 0.0,
                target_mean=loss_sum / loss_weight if loss_weight else 0.0,
                broken_given=broken,
                sample=_by_weight(*np.concatenate([np.empty((2, 0), np.float32), *self._kept[name]], axis=1)),
                trained_share=loss_weight / self._weight if self._weight else 0.0,
            )
        return found


def _sums(values: Tensor, weights: Tensor) -> tuple[float, float]:
    """(sum of the weights, sum of the weighted values), in float64."""
    exact = weights.double()
    return float(exact.sum()), float(exact @ values.double())


def _by_weight(values: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """As many of the values, each as often as its weight says (systematic resampling); themselves where all weigh the same.

    >>> _by_weight(np.array([5, 6, 7, 8], np.float32), np.array([0, 3, 1, 0], np.float32)).tolist()
    [6.0, 6.0, 6.0, 7.0]
    """
    if not weights.any() or (weights == weights[0]).all():
        return values
    order = np.argsort(values)  # so that they are the quantiles, to within a place
    ends = np.cumsum(weights[order], dtype=np.float64)
    chosen = np.searchsorted(ends, (np.arange(len(values)) + 0.5) / len(values) * ends[-1])
    return np.asarray(values[order[chosen]])


def labels_of(experiment: Experiment, specs: Mapping[str, TaskSpec]) -> dict[str, Label]:
    """Each task's column, unit and range, for `make_batch`."""
    labels = {}
    for name, spec in specs.items():
        low, high, integer = spec.task.label_range
        labels[name] = Label(experiment.label_column(name), spec.task.label_scale, low, high, integer)
    return labels


def save(statistics: Mapping[str, LabelStatistics], folder: Path) -> None:
    """Writes labels.json (counts, means) and labels.npz (samples)."""
    plain = {name: {**dataclasses.asdict(each), "sample": None} for name, each in statistics.items()}
    (folder / "labels.json").write_text(json.dumps(plain, indent=1))
    with (folder / "labels.npz").open("wb") as file:
        np.savez(file, **{name: each.sample for name, each in statistics.items()})  # type: ignore[arg-type]


def load(folder: Path) -> dict[str, LabelStatistics]:
    """Reads what `save` wrote into a run's folder."""
    counts, samples = folder / "labels.json", folder / "labels.npz"
    with as_written(counts, "JSON"):
        plain = json.loads(counts.read_text())
    with as_written(samples, "NumPy's npz with an array for each task"), np.load(samples) as arrays:
        read = {name: arrays[name] for name in plain}
    with as_written(counts, "label statistics"):
        return {name: LabelStatistics(**{**values, "sample": read[name]}) for name, values in plain.items()}


def check_trained(statistics: Mapping[str, LabelStatistics], experiment: Experiment, which: str) -> None:
    """Every task should have a row to learn from. Raises ValueError naming the one that has none; `which` rows were looked at."""
    for name, each in statistics.items():
        given = experiment.tasks[name].given
        if each.trained:
            continue
        if given and not statistics[given].mean:  # a binary task: none of its labels is 1
            raise ValueError(
                f"`tasks.{name}.given`: {given} should be 1 in some rows, or nothing can be learned of {name}. Found column "
                f"'{experiment.label_column(given)}' 1 in none of the {each.rows:,} {which} rows."
            )
        raise ValueError(
            f"`tasks.{name}.label`: column '{experiment.label_column(name)}' should hold labels"
            f"{f' where {given} is 1' if given else ''}. Found none in the {each.rows:,} {which} rows."
        )
