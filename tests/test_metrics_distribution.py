"""Distributions in little memory against numpy, and how far one has drifted from another."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import TIGHT

from mtrec.metrics import DistributionSummary, population_stability_index


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.floats(-1e100, 1e100), st.sampled_from([0.0, 1e-13, -1e-300, 1.0, -2.5])), min_size=1, max_size=60
    ),
    shares=st.lists(st.integers(0, 20).map(lambda twentieth: twentieth / 20), min_size=1, max_size=5),
)
def test_quantiles_are_within_one_percent(values, shares):
    summary = DistributionSummary()
    summary.update(values)
    wanted = np.quantile(values, shares, method="inverted_cdf")
    assert summary.quantiles(shares) == pytest.approx(wanted, rel=0.0100001, abs=1e-12)


def test_summary_agrees_with_numpy_and_merges_exactly():
    rng = np.random.default_rng(17)
    values = np.concatenate([rng.lognormal(0, 2, 30_000), -rng.exponential(1, 5_000), np.zeros(1_000), [1e8 + 1]])
    whole, merged = DistributionSummary(), DistributionSummary()
    whole.update(values)
    for part in np.array_split(rng.permutation(values), 4):
        other = DistributionSummary()
        other.update(part)
        state = json.loads(json.dumps({name: array.tolist() for name, array in other.arrays().items()}))
        merged.merge(DistributionSummary.from_arrays(state))
    several = DistributionSummary()
    for part in (values, values[:100], np.zeros(0)):
        several.update(part)
    for each, count in ((whole, 36_001), (merged, 36_001), (several, 36_101)):
        assert (each.minimum, each.maximum, each.count) == (values.min(), values.max(), count)
    assert whole.mean == pytest.approx(values.mean(), **TIGHT)
    assert whole.sd == pytest.approx(values.std(), **TIGHT)
    assert merged.mean == pytest.approx(whole.mean, **TIGHT)
    assert merged.sd == pytest.approx(whole.sd, **TIGHT)
    shares = np.linspace(0, 1, 21)
    assert merged.quantiles(shares) == whole.quantiles(shares)
    assert whole.stability_index(merged) == 0
    with pytest.raises(ValueError, match=r"`value` should be finite\. Found inf in row 1\."):
        whole.update([1.0, np.inf])
    empty = DistributionSummary()
    assert math.isnan(empty.mean)
    assert math.isnan(whole.stability_index(empty))


def test_stability_index_is_that_of_the_formula():
    expected, actual = np.array([10.0, 30.0, 60.0]), np.array([2.0, 3.0, 5.0])
    e, a = expected / 100, actual / 10
    wanted = np.sum(a * np.log(a / e)) + np.sum(e * np.log(e / a))  # Kullback-Leibler both ways
    assert population_stability_index(expected, actual) == pytest.approx(wanted, **TIGHT)
    assert population_stability_index(actual, expected) == pytest.approx(wanted, **TIGHT)
    emptied = population_stability_index([50, 50], [100, 0])
    assert emptied == pytest.approx((1 - 0.5) * math.log(2) + (1e-4 - 0.5) * math.log(1e-4 / 0.5), **TIGHT)
    assert math.isnan(population_stability_index([0, 0], [1, 1]))
    with pytest.raises(ValueError, match="same bins"):
        population_stability_index([1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match=r"`actual_counts` should be finite and not negative\. Found -1\.0 in row 0\."):
        population_stability_index([1, 2], [-1, 2])


def test_stability_index_of_samples():
    rng = np.random.default_rng(18)

    def summary(values):
        made = DistributionSummary()
        made.update(values)
        return made

    training = summary(rng.normal(size=50_000))
    chance = np.mean([training.stability_index(summary(rng.normal(size=2_000))) for _ in range(40)])
    assert chance == pytest.approx(9 * (1 / 50_000 + 1 / 2_000), rel=0.35)
    # PSI of N(0, 1) and N(m, 1) without binning is m^2; ten bins lose some of it
    assert training.stability_index(summary(rng.normal(0.5, 1, 50_000))) == pytest.approx(0.25, rel=0.15)
    constant = summary(np.full(100, 0.3))
    assert constant.stability_index(summary(np.full(7, 0.3))) == 0
    for moved in (0.2, 0.4):
        assert constant.stability_index(summary(np.full(100, moved))) > 1
