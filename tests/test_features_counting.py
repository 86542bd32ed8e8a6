"""What a fit counts in bounded memory: pruned counts of ids, a sample, moments."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
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
    sample, other, moments = Sample(), Sample(), Moments()
    for start in range(0, len(values), 7_001):
        part = values[start : start + 7_001]
        sample.update(part, start)
        moments.update(part)
    other.update(values, 0)
    assert np.array_equal(sample.values(), other.values())
    assert len(sample.values()) == 65_536
    assert abs(np.searchsorted(np.sort(values), np.median(sample.values())) / len(values) - 0.5) < 0.01
    np.testing.assert_allclose([moments.mean, moments.sd], [values.mean(), values.std()], rtol=1e-12)
    assert (moments.low, moments.high, moments.count) == (values.min(), values.max(), len(values))
