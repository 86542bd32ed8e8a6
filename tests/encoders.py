"""Columns for the tests of features, one of every kind of feature, and encoders fitted to them."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from mtrec.features import Bucketized, Categorical, Dense, Encoder

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NUMBERS = st.lists(st.one_of(st.none(), st.floats(width=32), st.sampled_from([-1.0, 0.0, 3.0])), max_size=40)


def sliced(values: list[Any], type_: pa.DataType, lead: int, dictionary: bool) -> pa.Array:
    """An array with an offset of `lead` rows, which are not to be seen."""
    array = pa.array([*values[:1] * lead, *values, *values[-1:]], type_)
    if dictionary and not (pa.types.is_nested(type_) or type_ in (pa.string_view(),)):
        array = array.dictionary_encode()
    return array.slice(lead, len(values)) if values else array.slice(len(array), 0)


def fitted(features: list[Any], data: dict[str, pa.Array], previous: Encoder | None = None, **more: Any) -> Encoder:
    """Fitted to one batch of these columns."""
    batch = pa.record_batch(data)
    return Encoder.fit(features, [batch], schema=batch.schema, embedding_dim=4, previous=previous, **more)


def every_kind() -> tuple[list[Any], pa.RecordBatch]:
    """Features of every kind and encoding, and 500 rows of their columns."""
    rng = np.random.default_rng(3)
    rows = 500
    names = pa.array([f"näme {value}" for value in rng.integers(0, 40, rows)])
    batch = pa.record_batch(
        {
            "user": pa.array(rng.integers(2**62, 2**62 + 50, rows), mask=rng.random(rows) < 0.1),
            "big": pa.array(rng.integers(2**64 - 30, 2**64 - 1, rows, dtype=np.uint64)),
            "name": names,
            "day": pa.array(rng.integers(0, 7, rows).astype(np.int8)),
            "tags": pa.array([[f"t{tag}" for tag in rng.integers(0, 9, size)] for size in rng.integers(0, 4, rows)]),
            "tag_weights": pa.array([[1.0] * 0] * rows),
            "price": pa.array(rng.lognormal(size=rows), mask=rng.random(rows) < 0.1),
            "flag": pa.array(rng.random(rows) < 0.5),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=rows * 3).astype(np.float32)), 3),
        }
    )
    lengths = pc.list_value_length(batch["tags"]).to_pylist()
    weights = pa.array([rng.random(size).tolist() for size in lengths], pa.list_(pa.float64()))
    batch = batch.set_column(5, "tag_weights", weights)
    features = [
        Categorical("user"),
        Categorical("big"),
        Categorical("na/me", column="name", table="the names"),
        Categorical("day", encoding="identity", num_embeddings=9),
        Categorical("tags", weights="tag_weights", max_length=2),
        Categorical("name_hash", column="name", encoding="hash", num_embeddings=20),
        Dense("price", transform="log1p", clip=(0.1, 50.0)),
        Dense("price_rank", column="price", scale="quantile", missing_indicator=False),
        Dense("flag", scale="minmax", missing_indicator=True),
        Dense("vector", clip_sd=None),
        Bucketized("price_bucket", column="price", num_buckets=7),
    ]
    return features, batch
