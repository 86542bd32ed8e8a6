"""Buckets of numbers: with given boundaries, and with those that fill them evenly."""

import math

import numpy as np
import pyarrow as pa
import pytest
from encoders import FAST, NUMBERS, fitted
from hypothesis import given
from hypothesis import strategies as st

from mtrec.features import FIRST_ROW, NULL_ROW, Bucketized, Encoder


@given(NUMBERS, st.lists(st.floats(-100, 100), min_size=1, max_size=5, unique=True).map(sorted))
@FAST
def test_given_boundaries_agree_with_counting(values: list[float | None], boundaries: list[float]) -> None:
    encoder = fitted([Bucketized("x", boundaries=tuple(boundaries))], {"x": pa.array(values, pa.float64())})
    expected = [
        NULL_ROW if v is None or math.isnan(v) else FIRST_ROW + sum(edge <= v for edge in boundaries) for v in values
    ]
    assert encoder.encode(pa.record_batch({"x": pa.array(values, pa.float64())})).values.tolist() == expected
    assert encoder.tables[0].num_embeddings == FIRST_ROW + len(boundaries) + 1


def test_quantile_boundaries_fill_the_buckets_evenly() -> None:
    values = np.random.default_rng(0).lognormal(size=200_000)
    batches = [pa.record_batch({"x": part}) for part in np.split(values, 20)]
    encoder = Encoder.fit([Bucketized("x", num_buckets=10)], batches, schema=batches[0].schema, embedding_dim=4)
    counts = np.bincount(encoder.encode(pa.record_batch({"x": values})).values, minlength=12)
    assert encoder.tables[0].num_embeddings == 12
    assert counts[:2].tolist() == [0, 0]
    assert np.abs(counts[2:] / len(values) - 0.1).max() < 0.008  # four standard errors of a sample of 65,536


def test_numbers_beyond_a_double_s_squares_are_named() -> None:
    batch = pa.record_batch({"x": [1.0, 2.0, 1.7e308]})
    with pytest.raises(ValueError, match=r"`features\.x\.column` should hold numbers whose squares .* Found 1\.0 to 1\.7e\+308"):
        Encoder.fit([Bucketized("x", num_buckets=2)], [batch], schema=batch.schema, embedding_dim=4)
