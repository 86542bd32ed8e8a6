"""What the differences mean: better or worse, in a sentence, over tasks and over variants.

Legend: V variants, K objectives.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mtrec.compare.statistics import METRIC_NAMES, Difference, smallest_detectable

MOST = {"auc": 0.5, "gauc": 0.5, "xauc": 0.5, "accuracy": 1.0}  # differences from chance to perfect, or from 0
# 1: more is better; -1: less is; 0: 1 is best, so that a difference is neither better nor worse by itself.
DIRECTION: dict[str, int] = {
    "accuracy": 1,
    "auc": 1,
    "calibration": 0,
    "gauc": 1,
    "log_loss": -1,
    "mae": -1,
    "normalized_entropy": -1,
    "r2": 1,
    "r2_log1p": 1,
    "rmse": -1,
    "sum_ratio": 0,
    "xauc": 1,
}


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where 1 is best (a ratio). Raises ValueError for another metric.

    >>> direction("auc"), direction("log_loss_given"), direction("sum_ratio")
    (1, -1, 0)
    """
    kind = metric.removesuffix("_given")
    if kind not in DIRECTION:
        raise ValueError(f"`metric` should be one of {', '.join(METRIC_NAMES)}. Found '{metric}'.")
    return DIRECTION[kind]


def outcome(difference: Difference, adjusted_p: float | None = None) -> str:
    """One of "better", "worse" and "no difference"; "higher" or "lower" for a ratio whose best value is 1; "undefined" (NaN).

    By `adjusted_p` (of `holm`) against 1 - confidence; without it by the difference's own p-value.
    """
    p = difference.p_value if adjusted_p is None else adjusted_p
    if math.isnan(p):
        return "undefined"
    if p >= 1 - difference.confidence or difference.value == 0:
        return "no difference"
    sense = direction(difference.metric)
    if sense == 0:
        return "higher" if difference.value > 0 else "lower"
    return "better" if sense * difference.value > 0 else "worse"


def verdict(name: str, baseline_name: str, task: str, difference: Difference, adjusted_p: float, comparisons: int = 1) -> str:
    """One sentence on one task: what was found, its interval, on how much, and what else would have been seen.

    `comparisons`: those that `adjusted_p` is corrected for; the smallest difference that would have been seen (with 80 %
    power) allows for them. The interval is that of this comparison alone.

    >>> from mtrec.compare.statistics import Difference
    >>> d = Difference("auc", 0.0004, -0.0008, 0.0016, 0.0006, 2e-7, 1.6e-7, 5, 12951, 0.5, "", 0.95, 9, 0.7, 0.7, 1e4, 4.0)
    >>> verdict("PLE", "MMoE", "click", d, 1.0)
    'PLE against MMoE, click: no difference found (AUC +.0004, -.0008 to +.0016; 5 seeds, 12,951 users); .0019 would be seen'
    """
    found = outcome(difference, adjusted_p)
    start = f"{name} against {baseline_name}, {task}:"
    metric = _NAMES.get(difference.metric, difference.metric)
    rows = f"{difference.num_rows:,} rows, taken as independent"
    base = f"{difference.num_seeds} seeds, {rows if difference.num_users is None else f'{difference.num_users:,} users'}"
    if found == "undefined":
        if math.isfinite(difference.baseline) and math.isfinite(difference.variant):
            few = "users, or nearly all rows are of one" if difference.num_users is not None else "rows"
            return f"{start} no interval for {metric}: too few {few} ({base})"
        return f"{start} {metric} is not defined on these test rows ({base})"
    decimals = _decimals(difference)
    value, low, high = (_number(each, decimals, "+") for each in (difference.value, difference.low, difference.high))
    interval = f"{metric} {value}, {low} to {high}"
    if found == "no difference":
        size = smallest_detectable(difference, comparisons=comparisons)
        told = none_seen(difference.metric, size) or f"{_number(size, decimals)} would be seen"
        excluded = difference.low > 0 or difference.high < 0
        why = f" once corrected for {comparisons} comparisons" if excluded and comparisons > 1 else ""
        return f"{start} no difference found{why} ({interval}; {base}); {told}"
    p = "p < .001" if adjusted_p < 0.001 else f"p = {_number(adjusted_p, 3)}"
    return f"{start} {found} ({interval}; {base}; {p})"


def none_seen(metric: str, detectable: float) -> str:
    """What to say where the smallest detectable difference is larger than any that there can be; "" where it is not.

    >>> none_seen("auc_given", 0.62), none_seen("auc", 0.01), none_seen("mae", 12.0)
    ('not even .5 would be seen: too few seeds or rows', '', '')
    """
    most = MOST.get(metric.removesuffix("_given"), math.inf)
    if detectable <= most and detectable < math.inf:
        return ""
    return f"{f'not even {_number(most, 1)}' if most < math.inf else 'no difference'} would be seen: too few seeds or rows"


_NAMES = {"auc": "AUC", "gauc": "GAUC", "xauc": "XAUC", "mae": "MAE", "rmse": "RMSE", "log_loss": "log loss", "r2": "R2"}


def _decimals(difference: Difference) -> int:
    """So that half of the interval's width has two digits."""
    half = (difference.high - difference.low) / 2 or abs(difference.value)
    return max(0, 1 - math.floor(math.log10(half))) if half > 0 else 4


def _number(value: float, decimals: int, sign: str = "") -> str:
    """Without the zero before the point: .0004, -.0008.

    >>> _number(0.00041, 4, "+"), _number(-1.5, 1), _number(0.0, 2, "+")
    ('+.0004', '-1.5', '.00')
    """
    text = f"{value:{sign}.{decimals}f}"
    if decimals and float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("0.", ".", 1) if text.lstrip("+-").startswith("0.") else text


def shown(value: float) -> str:
    """A size with two digits: .0017, .028, 1.5.

    >>> shown(0.00174), shown(0.0278), shown(1.52)
    ('.0017', '.028', '1.5')
    """
    return _number(value, max(0, 1 - math.floor(math.log10(value))) if value > 0 else 0)


def delta_m(metrics: Mapping[str, str], variant: Mapping[str, float], single_task: Mapping[str, float]) -> float:
    """MTL gain: the mean over tasks of the relative change against single-task models, positive where it is for the better.

    Maninis et al., 2019 (Attentive single-tasking of multiple tasks), as a fraction (.01 is 1 %).

    Args:
        metrics: {task: the metric that counts}, e.g. {"click": "auc", "dwell": "mae"}.
        variant, single_task: {task: its value}.

    Raises ValueError for a metric without a better direction, or a single-task value of 0.

    >>> round(delta_m({"click": "auc", "dwell": "mae"}, {"click": 0.84, "dwell": 9.0}, {"click": 0.80, "dwell": 10.0}), 3)
    0.075
    """
    gains = []
    for task, metric in metrics.items():
        sense = direction(metric)
        if sense == 0:
            raise ValueError(f"`metrics.{task}` should be a metric where more or less is better. Found '{metric}'.")
        if single_task[task] == 0:
            raise ValueError(f"`single_task.{task}` should not be 0: the gain is relative to it. Found 0.")
        gains.append(sense * (variant[task] - single_task[task]) / abs(single_task[task]))
    return float(np.mean(gains)) if gains else math.nan


def seesaw(differences: Mapping[str, Difference], adjusted_p: Mapping[str, float] | None = None) -> bool:
    """Whether one task gains and another loses (both beyond chance); {task: difference}, {task: p-value of `holm`}."""
    found = {outcome(each, None if adjusted_p is None else adjusted_p[task]) for task, each in differences.items()}
    return {"better", "worse"} <= found


def pareto_front(points: NDArray[np.float64], maximise: bool | Sequence[bool] = True) -> NDArray[np.bool_]:
    """(V, K) values -> (V,): whether no other variant is at least as good in all objectives and better in one.

    `maximise`: for all objectives, or for each. A variant with a NaN is not on the front and beats none.

    >>> pareto_front(np.array([[0.7, 0.6], [0.6, 0.7], [0.6, 0.6], [0.7, np.nan]]))
    array([ True,  True, False, False])
    """
    points = np.asarray(points, np.float64)
    gain_VK = np.where(np.broadcast_to(np.asarray(maximise, bool), points.shape), points, -points)
    # [i, j]: variant j beats variant i; comparisons with NaN are False
    beats = np.all(gain_VK[None] >= gain_VK[:, None], axis=2) & np.any(gain_VK[None] > gain_VK[:, None], axis=2)
    return np.asarray(~np.any(beats, axis=1) & ~np.any(np.isnan(gain_VK), axis=1))
