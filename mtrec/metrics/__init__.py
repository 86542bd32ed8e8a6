"""Metrics: exact, in natural units, and the same however rows are cut into batches and ranks.

An accumulator takes rows (`update`), takes another's (`merge`), crosses from rank to rank (`pieces` or `arrays`, then
`from_arrays`) and gives a dictionary of numbers (`compute`; NaN where undefined). `METRICS` names one for each kind of
task. The functions do the same for arrays at hand.

    rows.py          rows kept in sort orders, spilled to disk beyond a memory limit
    ranking.py       auc, gauc, xauc: counting ordered pairs
    probability.py   log_loss, normalized_entropy, calibration, calibration_error
    binary.py, numbers.py, multiclass.py    the accumulators
    groups.py        group_keys: a column as int64 keys, for GAUC
    distribution.py  DistributionSummary, population_stability_index: drift
"""

from mtrec.metrics.binary import BinaryMetrics
from mtrec.metrics.distribution import DistributionSummary, population_stability_index
from mtrec.metrics.groups import NULL_GROUP, group_keys
from mtrec.metrics.multiclass import MulticlassMetrics
from mtrec.metrics.numbers import DwellMetrics, RegressionMetrics
from mtrec.metrics.probability import calibration, calibration_error, log_loss, normalized_entropy
from mtrec.metrics.ranking import auc, gauc, xauc

METRICS: dict[str, type] = {
    "binary": BinaryMetrics,
    "dwell": DwellMetrics,
    "regression": RegressionMetrics,
    "multiclass": MulticlassMetrics,
}

__all__ = [
    "METRICS",
    "NULL_GROUP",
    "BinaryMetrics",
    "DistributionSummary",
    "DwellMetrics",
    "MulticlassMetrics",
    "RegressionMetrics",
    "auc",
    "calibration",
    "calibration_error",
    "gauc",
    "group_keys",
    "log_loss",
    "normalized_entropy",
    "population_stability_index",
    "xauc",
]
