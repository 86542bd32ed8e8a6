"""Profiles see drift and unseen ids; counts of workers merge."""

import math

import numpy as np
import pyarrow as pa
import pytest
from encoders import fitted

from mtrec.features import Bucketized, Categorical, Dense, Encoder, psi


def test_profiles_see_drift_and_unseen_ids() -> None:
    rng = np.random.default_rng(0)
    features = [
        Categorical("x"),
        Dense("y"),
        Bucketized("z", column="y"),
        Categorical("h", column="x", encoding="hash", num_embeddings=30),
    ]

    def data(shift: int, seed: int) -> pa.RecordBatch:
        draw = np.random.default_rng(seed)
        x = pa.array(draw.zipf(1.5, 20_000) % 500 + shift, mask=draw.random(20_000) < 0.05)
        return pa.record_batch({"x": x, "y": pa.array(draw.normal(shift, 1, 20_000))})

    encoder = Encoder.fit(features, [data(0, 1)], schema=data(0, 1).schema, embedding_dim=4)
    own, same, other = (encoder.profile([each]) for each in (data(0, 1), data(0, 2), data(1, 3)))
    for name, profile in encoder.profiles.items():
        assert np.array_equal(profile.counts_P, own[name].counts_P), name
        assert psi(profile, same[name]) < 0.02 < 0.25 < psi(profile, other[name])
        assert abs(profile.null_share - (0.0 if name in "yz" else 0.05)) < 0.01
    far = encoder.profile([pa.record_batch({"x": rng.integers(10**6, 10**7, 100), "y": np.zeros(100)})])
    assert far["x"].unseen_share == 1.0
    assert encoder.statistics["x"]["unseen_share"] == encoder.profiles["x"].unseen_share
    with pytest.raises(ValueError, match=r"should have the same bins"):
        psi(encoder.profiles["x"], encoder.profiles["y"])


def test_counts_of_workers_merge() -> None:
    encoder = fitted([Categorical("x", min_count=1), Dense("y")], {"x": pa.array([1, 2]), "y": pa.array([1.0, None])})
    a, b = encoder.counts(), encoder.counts()
    encoder.encode(pa.record_batch({"x": pa.array([1, 9, None, 2]), "y": pa.array([1.0, None, math.nan, 2.0])}), a)
    encoder.encode(pa.record_batch({"x": pa.array([9, 9, 9, 9]), "y": pa.nulls(4, pa.float64())}), b)
    a.merge(b)
    assert a.null_share() == {"x": 1 / 8, "y": 6 / 8}
    assert a.unseen_share() == {"x": 5 / 8, "y": 0.0}
    with pytest.raises(ValueError, match=r"same features"):
        a.merge(fitted([Dense("y")], {"y": pa.array([1.0])}).counts())
