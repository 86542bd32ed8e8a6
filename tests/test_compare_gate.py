"""The gate: a candidate that is worse by the margin hardly ever passes, one that is as good does, and users are what is drawn."""

import numpy as np
import pytest
from numpy.typing import NDArray

from mtrec.compare.gate import non_inferiority
from mtrec.compare.sample import Scores, sample_metric
from mtrec.metrics import auc

Floats = NDArray[np.float64]
USERS, ROWS_A_USER = 150, 4


def day(rng: np.random.Generator) -> tuple[Floats, NDArray[np.int64], Floats]:
    """(labels, users, what both models see of the rows): a user's rows share a part of it, and of what they do."""
    user = np.repeat(np.arange(USERS), ROWS_A_USER)
    taste = rng.normal(0, 1, USERS)[user]
    seen = taste + rng.normal(0, 1, len(user))
    label = (seen + 0.7 * rng.normal(0, 1, USERS)[user] + rng.normal(0, 1, len(user)) > 0).astype(float)
    return label, user, seen


def passed(rng: np.random.Generator, noise: float, margin: float, metric: str = "auc") -> bool:
    label, user, seen = day(rng)
    better = seen + rng.normal(0, 0.5, len(seen))
    worse = seen + rng.normal(0, noise, len(seen))
    low, high = (1 / (1 + np.exp(-each)) for each in (worse, better))
    return non_inferiority(metric, Scores({0: high}, label, user), Scores({0: low}, label, user), margin).passed


def true_loss(noise: float) -> float:
    """What the noise takes from the AUC, over many rows."""
    rng = np.random.default_rng(1)
    days = [day(rng) for _ in range(400)]
    label, seen = (np.concatenate([each[part] for each in days]) for part in (0, 2))
    first, second = (seen + rng.normal(0, each, len(seen)) for each in (0.5, noise))
    return auc(first, label) - auc(second, label)


def test_worse_by_the_margin_passes_once_in_forty_and_as_good_passes() -> None:
    rng = np.random.default_rng(0)
    margin = true_loss(1.0)
    assert 0.02 < margin < 0.1
    worse = sum(passed(rng, 1.0, margin) for _ in range(600))
    assert 3 <= worse <= 30  # 15 expected; a test of the level alone would be met by a gate that lets nothing pass
    assert sum(passed(rng, 0.5, margin) for _ in range(200)) > 150


def test_the_interval_is_that_of_the_paired_users() -> None:
    rng = np.random.default_rng(2)
    label, user, seen = day(rng)
    old, new = Scores({0: seen}, label, user), Scores({7: seen + rng.normal(0, 0.3, len(seen))}, label, user)
    found = non_inferiority("auc", old, new, 0.02)
    sample = sample_metric("auc", [(old, [0]), (new, [7])], 100, 0)
    half = (found.high - found.low) / 2
    assert found.value == pytest.approx(sample.value[1] - sample.value[0])
    assert half == pytest.approx(1.98 * np.sqrt(sample.variance(np.array([-1.0, 1.0]))), rel=0.01)
    alone = np.sqrt(sample.variance(np.array([1.0, 0.0])) + sample.variance(np.array([0.0, 1.0])))
    assert half < 1.98 * alone / 2, "models on the same rows are paired"
    by_row = non_inferiority("auc", *(Scores(each.prediction, label, None) for each in (old, new)), margin=0.02)
    assert by_row.num_users is None
    assert "no user column" in by_row.method


def test_less_is_better_for_errors_and_an_undefined_metric_does_not_pass() -> None:
    rng = np.random.default_rng(3)
    label, user, seen = day(rng)
    good, bad = (Scores({0: 1 / (1 + np.exp(-scale * seen))}, label, user) for scale in (1.0, -1.0))
    assert non_inferiority("log_loss", bad, good, 0.01).passed
    assert not non_inferiority("log_loss", good, bad, 0.01).passed
    assert not non_inferiority("auc", *(Scores(each.prediction, np.ones(len(label)), user) for each in (good, good)), 0.01).passed
    assert non_inferiority("auc", good, good, 0.01).passed, "the very same model"


@pytest.mark.parametrize(
    ("metric", "margin", "seeds", "message"),
    [
        ("calibration", 0.01, 1, "`metric` should be one of which more, or less, is better. Found 'calibration'"),
        ("auc", 0.0, 1, "`margin` should be above 0"),
        ("auc", 0.01, 2, "one run each. Found 2 and 1"),
    ],
)
def test_mistakes_are_named(metric: str, margin: float, seeds: int, message: str) -> None:
    label, user = np.array([0.0, 1.0, 1.0, 0.0]), np.array([0, 0, 1, 1])
    first = Scores({seed: np.full(4, 0.5) for seed in range(seeds)}, label, user)
    with pytest.raises(ValueError, match=message):
        non_inferiority(metric, first, Scores({0: np.full(4, 0.5)}, label, user), margin)
