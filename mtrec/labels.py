"""What the training labels are like: base rates for output biases and `weight: auto`, read with the vocabularies."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtrec.batch import Label, label_values
from mtrec.config import Experiment
from mtrec.tasks import Objectives, TaskSpec

SAMPLE_ROWS = 65_536


@dataclasses.dataclass(frozen=True)
class LabelStatistics:
    """A task's labels over the training rows, natural units.

    Attributes:
        rows: rows read; `observed`: those with a label; `trained`: those that count for the task's loss.
        mean: mean of the labels that the head models (where `given` is 1); `target_mean`: of those that the loss sees
            (they differ in space entire only, where the loss sees the joint event on all rows).
        broken_given: rows whose label is above 0 although their `given` is 0.
        sample: up to 65,536 of the labels behind `mean`, evenly spread, float32.
    """

    rows: int
    observed: int
    trained: int
    mean: float
    target_mean: float
    broken_given: int
    sample: NDArray[np.float32]

    def sample_tensor(self) -> Tensor:
        """`sample` as a tensor."""
        return torch.from_numpy(self.sample)


class LabelFit:
    """Gathers label statistics while record batches pass by.

    Args:
        labels: each task's column; objectives: which rows count.

    `for batch in fit.watch(batches): ...`, then `fit.statistics()`.
    """

    def __init__(self, labels: Mapping[str, Label], objectives: Objectives) -> None:
        self._labels, self._objectives = labels, objectives
        self._rows = 0
        self._counts = {name: np.zeros(4, dtype=np.int64) for name in labels}  # observed, trained, head, broken_given
        self._sums = {name: np.zeros(2) for name in labels}  # of the head's labels, of the loss's
        self._kept: dict[str, list[NDArray[np.float32]]] = {name: [] for name in labels}
        self._stride = dict.fromkeys(labels, 1)

    def watch(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Passes the batches on, and counts."""
        for batch in batches:
            self.add(batch)
            yield batch

    def add(self, batch: pa.RecordBatch) -> None:
        """Counts a batch. Raises as `label_values` does."""
        values = {name: torch.from_numpy(label_values(batch, label)) for name, label in self._labels.items()}
        self._rows += batch.num_rows
        for name, value in values.items():
            reached = self._objectives.reached(name, values)
            head = value[(reached == 1.0) & ~value.isnan()].numpy()
            target = self._objectives.target(name, values)
            target = target[~target.isnan()]
            broken = int(((reached == 0.0) & (value > 0)).sum())
            self._counts[name] += (int((~value.isnan()).sum()), len(target), len(head), broken)
            self._sums[name] += (head.sum(dtype=np.float64), float(target.double().sum()))
            self._keep(name, head)

    def _keep(self, name: str, head: NDArray[np.float32]) -> None:
        """A systematic sample: every stride-th label; the stride doubles when the sample is full."""
        kept, before = self._kept[name], int(self._counts[name][2]) - len(head)
        kept.append(head[-before % self._stride[name] :: self._stride[name]].copy())
        while sum(map(len, kept)) > SAMPLE_ROWS:
            kept[:] = [np.concatenate(kept)[::2]]
            self._stride[name] *= 2

    def statistics(self) -> dict[str, LabelStatistics]:
        """{task: what its labels are like}."""
        found = {}
        for name in self._labels:
            observed, trained, head, broken = (int(count) for count in self._counts[name])
            found[name] = LabelStatistics(
                rows=self._rows,
                observed=observed,
                trained=trained,
                mean=float(self._sums[name][0]) / max(1, head),
                target_mean=float(self._sums[name][1]) / max(1, trained),
                broken_given=broken,
                sample=np.concatenate(self._kept[name]) if self._kept[name] else np.empty(0, dtype=np.float32),
            )
        return found


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
    plain = json.loads((folder / "labels.json").read_text())
    with np.load(folder / "labels.npz") as samples:
        return {name: LabelStatistics(**{**values, "sample": samples[name]}) for name, values in plain.items()}


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
