"""What a fit counts in bounded memory: pruned counts of ids, a sample, moments."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoders import FAST
from hypothesis import given
from hypothesis import strategies as st

from mtrec.features import Categorical, Encoder
from mtrec.features.counting import KeyCounter, Moments, Sample


@given(st.lists(st.lists(st.integers(0, 200), max_size=60), max_size=8), st.booleans(), st.integers(4, 60))
@FAST
def test_pruned_counts_keep_their_promise(batches: list[list[int]], text: bool, limit: int) -> None:
    counter = KeyCounter(text=text, limit=limit)
    truth: Counter[Any] = Counter()
    for batch in batches:
        keys = [f"{value}".encode() for value in batch] if text else batch
        truth.update(keys)
        counter.update(pa.array(keys, pa.large_binary()) if text else np.array(keys, np.int64))
        counter._merge()  # prune after each batch, not only after a million values
        assert len(counter._counts_U) <= limit
    keys, counts = counter.result()
    found = dict(zip(keys.to_pylist() if text else keys.tolist(), counts.tolist(), strict=True))
    assert all(truth[key] - counter.error <= count <= truth[key] for key, count in found.items())
    assert all(key in found for key, count in truth.items() if count > counter.error)
    if len(truth) <= limit:
        assert (found, counter.error) == (dict(truth), 0)


def test_a_fit_with_few_candidates_keeps_the_frequent_ids() -> None:
    rng = np.random.default_rng(0)
    ids = np.concatenate([rng.integers(2**40, 2**62, 20_000), np.repeat(np.arange(50), 200)])
    rng.shuffle(ids)
    batches = [pa.record_batch({"x": part}) for part in np.array_split(ids, 30)]
    encoder = Encoder.fit([Categorical("x")], batches, schema=batches[0].schema, embedding_dim=4, max_candidates=1000)
    assert sorted(encoder.encode(pa.record_batch({"x": np.arange(50)})).values.tolist()) == list(range(2, 52))
    assert 0 < encoder.statistics["x"]["count_error"] < 50


def test_sample_and_moments_against_numpy() -> None:
    values = np.random.default_rng(0).normal(5, 3, 300_000)
    sample, other, moments = Sample(), Sample(), Moments(2)
    known = np.random.default_rng(1).random((len(values), 2)) < 0.7
    for start in range(0, len(values), 7_001):
        part = values[start : start + 7_001]
        sample.update(part, start)
        both = np.stack([part, 100.0 + part], axis=1)
        moments.update(both, known[start : start + 7_001])
    other.update(values, 0)
    assert np.array_equal(sample.values(), other.values())
    assert len(sample.values()) == 65_536
    assert abs(np.searchsorted(np.sort(values), np.median(sample.values())) / len(values) - 0.5) < 0.01
    for column in range(2):
        wanted = (100.0 * column + values)[known[:, column]]
        np.testing.assert_allclose(moments.mean_W[column], wanted.mean(), rtol=1e-12)
        np.testing.assert_allclose(moments.sd_W[column], wanted.std(), rtol=1e-11)
        found = (moments.low_W[column], moments.high_W[column], moments.count_W[column])
        assert found == (wanted.min(), wanted.max(), len(wanted))


def test_moments_of_columns_that_come_later_or_never() -> None:
    moments = Moments(3)
    moments.update(np.zeros((0, 3)))
    moments.update(np.array([[1.0, 7.0, 9.0], [3.0, 0.0, 0.0]]), np.array([[True, False, False], [True, False, False]]))
    moments.update(np.array([[5.0, 4.0, 9.0]]), np.array([[True, True, False]]))
    assert moments.count_W.tolist() == [3, 1, 0]
    assert moments.mean_W.tolist() == [3.0, 4.0, 0.0]
    np.testing.assert_allclose(moments.sd_W, [np.std([1, 3, 5]), 0.0, 0.0])
    assert (moments.low_W.tolist(), moments.high_W.tolist()) == ([1.0, 4.0, np.inf], [5.0, 4.0, -np.inf])


@pytest.mark.parametrize("width", [1, 5])
def test_the_mean_of_a_constant_is_exact_however_many_and_whichever_are_known(width: int) -> None:
    values = np.full((1 << 17, width), 1.96)
    for known in (None, np.random.default_rng(0).random(values.shape) < 0.5):
        moments = Moments(width)
        for _ in range(2):
            moments.update(values, known)
        assert moments.mean_W.tolist() == [1.96] * width
        assert moments.sd_W.tolist() == [0.0] * width


def test_a_sample_of_rows_keeps_the_rows_that_a_sample_of_each_column_keeps() -> None:
    rows = np.random.default_rng(0).normal(size=(5_000, 3))
    whole, columns = Sample(100, 3), [Sample(100) for _ in range(3)]
    for start in range(0, len(rows), 999):
        whole.update(rows[start : start + 999], start)
        for column, sample in enumerate(columns):
            sample.update(rows[start : start + 999, column], start)
    assert np.array_equal(whole.values(), np.stack([sample.values() for sample in columns], axis=1))
