"""What finished runs of a comparison predicted, as the statistics want it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from mtrec.compare.runs import LABEL, LOG, PREDICTIONS, SEGMENT, USER, WEIGHT, folder_of
from mtrec.compare.sample import METRIC_NAMES, Floats, Scores
from mtrec.experiment import Experiment
from mtrec.model import task_specs
from mtrec.tasks import Objectives

SHOWN: dict[str, tuple[str, ...]] = {
    "binary": ("auc", "gauc", "log_loss", "normalized_entropy", "calibration"),
    "dwell": ("xauc", "mae", "rmse", "r2_log1p", "sum_ratio"),
    "regression": ("r2", "xauc", "mae", "rmse"),
    "multiclass": ("accuracy", "log_loss"),
}


class Measured:
    """What finished runs predicted, as the statistics want it.

    Args:
        folder: of the comparison.
        runs: {variant: {seed: name of its run}}, finished ones.
        experiment: of the baseline.

    Raises ValueError where two runs did not predict the same rows.
    """

    def __init__(self, folder: Path, runs: Mapping[str, Mapping[int, str]], experiment: Experiment) -> None:
        self.experiment, self.objectives = experiment, Objectives(task_specs(experiment))
        self.tables: dict[str, dict[int, pa.Table]] = {}
        first: pa.Table | None = None
        for variant, by_seed in runs.items():
            self.tables[variant] = {}
            for seed, name in by_seed.items():
                table = pq.read_table(folder_of(folder, name) / PREDICTIONS)
                first = table if first is None else first
                for column in first.column_names:
                    shared = column in (USER, SEGMENT, WEIGHT) or column.startswith(LABEL)
                    if shared and (column not in table.column_names or not table[column].equals(first[column])):
                        raise ValueError(
                            f"{folder_of(folder, name)}: column '{column}' of {PREDICTIONS} should be that of the other runs, "
                            "row by row. The test files changed between runs: compare in a new folder."
                        )
                self.tables[variant][seed] = table
        if first is None:
            raise ValueError(f"{folder} holds no finished run yet.")
        self.rows = first.num_rows
        self.user = first[USER].to_numpy() if USER in first.column_names else None
        self.weight = first[WEIGHT].to_numpy() if WEIGHT in first.column_names else None
        self.segment = first[SEGMENT].to_pylist() if SEGMENT in first.column_names else None
        self._labels = {
            name: torch.from_numpy(first[LABEL + name].to_numpy(zero_copy_only=False).astype(np.float64))
            for name in self.objectives.names
        }

    def label(self, task: str, given: bool) -> Floats:
        """(N,) labels of a task's metrics, NaN where they do not count; `given`: those of the suffix `_given`."""
        spec, also_on = self.objectives.specs[task], self.experiment.tasks[task].also_on
        if spec.given is not None and not given:
            return self.objectives.joint_label(task, self._labels).numpy()
        label_N: Floats = self.objectives.reached_label(task, self._labels).numpy()
        if given and spec.given is None and also_on is not None:
            return np.where(self._labels[also_on].numpy() == 1.0, label_N, np.nan)
        return label_N

    def scores(self, variant: str, task: str, metric: str, keep_N: NDArray[np.bool_] | None = None) -> Scores:
        """The runs of a variant for a metric of a task, on all rows or those of `keep_N`."""
        spec, given = self.objectives.specs[task], metric.endswith("_given")
        joint = spec.given is not None and not given
        columns = self.objectives.expected_names(task) if joint else spec.task.prediction_names()
        if metric.removesuffix("_given") == "r2_log1p":
            columns = (LOG + task,)
        keep_N = np.ones(self.rows, bool) if keep_N is None else keep_N
        prediction = {}
        for seed, table in self.tables[variant].items():
            found = [table[column].to_numpy()[keep_N].astype(np.float64) for column in columns]
            prediction[seed] = found[0] if len(found) == 1 else np.stack(found, axis=1)
        user = None if self.user is None else self.user[keep_N]
        weight = None if self.weight is None else self.weight[keep_N]
        return Scores(prediction, self.label(task, given)[keep_N], user, weight)

    def metrics(self, task: str) -> list[str]:
        """The metrics that are reported of a task."""
        spec = self.objectives.specs[task]
        names = [name for name in SHOWN[spec.task.family] if name in METRIC_NAMES]
        if self.user is None:
            names = [name for name in names if name != "gauc"]
        tables = [table for by_seed in self.tables.values() for table in by_seed.values()]
        if not all(f"{LOG}{task}" in table.column_names for table in tables):
            names = [name for name in names if name != "r2_log1p"]
        suffixes = [""] if spec.given is None or spec.task.family in ("binary", "dwell") else []
        if spec.given is not None or self.experiment.tasks[task].also_on is not None:
            suffixes.append("_given")
        # of the expected value over all rows there is no log scale
        return [n + s for s in suffixes for n in names if not (n == "r2_log1p" and spec.given is not None and s == "")]
