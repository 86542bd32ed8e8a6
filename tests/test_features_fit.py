"""What a fit decides: tables and who shares them, what it refuses, and what it keeps of the fit before it."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoders import FAST, every_kind, fitted
from hypothesis import given
from hypothesis import strategies as st

from mtrec.features import FIRST_ROW, UNSEEN_ROW, Bucketized, Categorical, Dense, Encoder


def test_shared_tables_count_together_and_keys_follow_tables() -> None:
    features = [
        Categorical("item", dim=8),
        Categorical("user"),
        Categorical("history", table="item", pooling="sum", max_length=3),
    ]
    data = {"item": pa.array([5, 6, 7]), "user": pa.array([1, 1, 2]), "history": pa.array([[6], [7, 7], []])}
    encoder = fitted(features, data)
    assert encoder.sparse_keys == ("item", "history", "user")
    item, user = encoder.tables
    assert (item.features, item.dim, item.pooling, item.vocabulary_size) == (
        ("item", "history"),
        8,
        "sum",
        2,
    )  # 7: 3, 6: 2
    assert (user.features, user.dim, user.vocabulary_size) == (("user",), 4, 1)
    encoded = encoder.encode(pa.record_batch(data))
    assert encoded.values.tolist() == [1, 3, 2, 3, 2, 2, 2, 2, 1]
    assert encoded.lengths_KB.tolist() == [[1, 1, 1], [1, 2, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            [Categorical("a", dim=8), Categorical("b", column="a", table="a", dim=16)],
            "`features.a.dim` and `features.b.dim` should agree",
        ),
        ([Categorical("a", encoding="hash")], "`features.a.num_embeddings` should be a number of rows"),
        ([Categorical("a", num_embeddings=2)], "`features.a.num_embeddings` should be at least 3"),
        (
            [Categorical("a", encoding="identity", num_embeddings=9, min_count=3)],
            "`features.a.min_count` should be left out",
        ),
        ([Categorical("a", num_column_shards=2)], "`features.a.num_column_shards` should stand beside"),
        (
            [Categorical("a", sharding="column_wise", num_column_shards=3)],
            "`features.a.num_column_shards` should divide",
        ),
        ([Categorical("a", dim=6)], "`features.a.dim` should be a multiple of 4"),
        ([Categorical("a"), Categorical("a")], "`features` should have one feature of a name"),
        (
            [Bucketized("b", column="a"), Categorical("a", table="b")],
            "`features.a.table` should name a table of categorical",
        ),
        (
            [Categorical("a", column="aa")],
            "`features.a.column` should name a column of the data. Found 'aa'. Did you mean 'a'?",
        ),
        ([Categorical("f")], "floats merge ids above 2^53"),
        ([Dense("s")], "`features.s.column` should hold numbers"),
        ([Dense("l")], "`features.l.column` should hold one number a row"),
        ([Bucketized("s")], "`features.s.column` should hold one number a row"),
        ([Categorical("a"), Categorical("s", table="a")], "one column holds strings, the other integers"),
        ([Categorical("s", encoding="identity", num_embeddings=9)], "should be vocabulary or hash"),
        ([Categorical("a", encoding="identity", num_embeddings=9)], "Found 7 in column 'a'"),
        ([Categorical("a", max_length=2)], "`features.a.max_length` should stand on a list column"),
        ([Categorical("l", weights="s")], "`features.l.weights` should hold numbers"),
        ([Dense("a", width=3)], "`features.a.width` should stand on a list"),
    ],
)
def test_errors_name_the_place(features: list[Any], message: str) -> None:
    data = {"a": pa.array([1, 7]), "f": pa.array([1.0, 2.0]), "s": pa.array(["x", "y"]), "l": pa.array([[1], [2, 3]])}
    with pytest.raises(ValueError, match=r".*") as caught:
        fitted(features, data)
    assert message in str(caught.value)


@given(
    st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 5), max_size=30), min_size=2, max_size=3),
    st.booleans(),
)
@FAST
def test_vocabularies_only_grow(days: list[list[int]], text: bool) -> None:
    def array(values: list[int]) -> pa.Array:
        return pa.array([f"id{value}" for value in values], pa.string()) if text else pa.array(values, pa.int64())

    encoder: Encoder | None = None
    seen: list[int] = []
    for day in days:
        before, encoder = encoder, fitted([Categorical("x", min_count=1)], {"x": array(day)}, previous=encoder)
        seen = list(dict.fromkeys(seen + day))
        rows = encoder.encode(pa.record_batch({"x": array(seen)})).values
        assert sorted(rows.tolist()) == list(range(FIRST_ROW, FIRST_ROW + len(seen)))
        if before is not None:
            old = before.encode(pa.record_batch({"x": array(seen)})).values
            assert (rows[old != UNSEEN_ROW] == old[old != UNSEEN_ROW]).all()
            assert encoder.tables[0].num_embeddings >= before.tables[0].num_embeddings


def test_growing_uses_spare_rows_first() -> None:
    first = fitted([Categorical("x", min_count=1)], {"x": pa.array(range(98))})
    assert first.tables[0].num_embeddings == 120
    second = fitted([Categorical("x", min_count=1)], {"x": pa.array(range(200, 215))}, first)
    assert (second.tables[0].num_embeddings, second.tables[0].vocabulary_size) == (120, 113)
    third = fitted([Categorical("x", min_count=1)], {"x": pa.array(range(300, 330))}, second)
    assert third.tables[0].num_embeddings == math.ceil(1.2 * 145)
    assert "table x: 30 new ids beside 113" in third.changes
    assert "table x: 120 rows become 174" in third.changes
    limited = fitted([Categorical("x", min_count=1, num_embeddings=4)], {"x": pa.array([7, 8, 8, 9, 9, 9])})
    assert limited.encode(pa.record_batch({"x": pa.array([9, 8, 7])})).values.tolist() == [2, 3, UNSEEN_ROW]


def test_scales_stay_from_one_day_to_the_next() -> None:
    features = [Dense("y"), Bucketized("b", column="y", num_buckets=4)]
    first = fitted(features, {"y": pa.array([0.0, 1.0, 2.0, 3.0])})
    second = fitted(features, {"y": pa.array([100.0, None])}, first)
    batch = pa.record_batch({"y": pa.array([2.5, 0.0])})
    assert (first.encode(batch).dense_BF == second.encode(batch).dense_BF).all()
    assert (first.encode(batch).values == second.encode(batch).values).all()
    assert second.statistics["y"]["null_share"] == 0.5
    anew = fitted([Dense("y", scale="none"), features[1]], {"y": pa.array([100.0, 1.0])}, first)
    assert anew.encode(batch).dense_BF.ravel().tolist() == [2.5, 0.0]
    assert any("features.y" in change for change in anew.changes)
    gone = fitted([features[0]], {"y": pa.array([1.0])}, first)
    assert gone.changes == ("features.b: removed",)


@pytest.mark.parametrize(
    ("feature", "data", "message"),
    [
        (Categorical("x", dim=8), pa.array([1]), "`features.x.dim` should be 4"),
        (
            Categorical("x", encoding="hash", num_embeddings=9),
            pa.array([1]),
            "`features.x.encoding` should be vocabulary",
        ),
        (Categorical("x", num_embeddings=3), pa.array([1]), "`features.x.num_embeddings` should be at least"),
        (Categorical("x"), pa.array(["a"]), "`features.x.column` should hold integers, as in the run"),
    ],
)
def test_a_previous_fit_must_fit(feature: Categorical, data: pa.Array, message: str) -> None:
    first = fitted([Categorical("x", min_count=1)], {"x": pa.array([1, 2])})
    with pytest.raises(ValueError, match=message):
        fitted([feature], {"x": data}, first)


def test_a_fit_does_not_depend_on_how_the_data_are_cut() -> None:
    features, batch = every_kind()
    whole = Encoder.fit(features, [batch], schema=batch.schema, embedding_dim=4)
    pieces = [batch.slice(start, 37) for start in range(0, batch.num_rows, 37)]
    cut = Encoder.fit(features, pieces, schema=batch.schema, embedding_dim=4)
    a, b = whole.encode(batch), cut.encode(batch)
    assert np.array_equal(a.values, b.values)
    np.testing.assert_allclose(a.dense_BF, b.dense_BF, rtol=1e-5, atol=1e-6)
