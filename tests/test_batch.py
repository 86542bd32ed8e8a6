"""Batches: the encoder's arrays as torchrec takes them, labels with their ranges, weights."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from mtrec import batch as batch_module
from mtrec.batch import Batch, Label, label_values, make_batch
from mtrec.features import BadRowsError, Bucketized, Categorical, Dense, Encoder

DATA = pa.record_batch(
    {
        "item": pa.array([5, 6, None, 5, 9]),
        "tags": pa.array([["a", "b"], [], None, ["b", "b", "c"], ["zz"]]),
        "seen": pa.array([[5], [6, 5], [], None, [9, 6]]),
        "seen_weight": pa.array([[2.0], [1.0, 3.0], [], None, [0.5, 0.5]]),
        "price": pa.array([1.0, 2.0, None, 4.0, 5.0]),
        "click": pa.array([1, 0, None, 1, 0], pa.int8()),
        "watch_ms": pa.array([1500, None, 0, 20, 7]),
        "weight": pa.array([1.0, 0.5, None, 2.0, 0.0]),
    }
)
LABELS = {"click": Label("click", low=0, high=1, integer=True), "dwell": Label("watch_ms", scale=0.001, low=0.0)}


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    features = [
        Categorical("item", min_count=1),
        Categorical("tags", min_count=1),
        Categorical("seen", table="seen", weights="seen_weight", min_count=1, pooling="mean"),
        Dense("price"),
        Bucketized("price_bucket", column="price", boundaries=(2.0, 4.0)),
    ]
    return Encoder.fit(features, [DATA], schema=DATA.schema, embedding_dim=4)


def pooled(encoder: Encoder, batch: Batch) -> dict[str, torch.Tensor]:
    """{feature: (B, dim)} from torchrec, table row r holding the vector (r, r^2, 1, -r)."""
    found: dict[str, torch.Tensor] = {}
    for weighted, jagged in ((False, batch.sparse), (True, batch.weighted)):
        tables = [table for table in encoder.tables if table.weighted == weighted]
        configs = [
            EmbeddingBagConfig(
                name=table.name,
                num_embeddings=table.num_embeddings,
                embedding_dim=table.dim,
                feature_names=list(table.features),
                pooling=PoolingType.MEAN if table.pooling == "mean" else PoolingType.SUM,
            )
            for table in tables
        ]
        collection = EmbeddingBagCollection(tables=configs, is_weighted=weighted)
        for table in tables:
            r = torch.arange(table.num_embeddings, dtype=torch.float32)
            weight = torch.stack([r, r * r, torch.ones_like(r), -r], dim=1)
            collection.embedding_bags[table.name].weight.data.copy_(weight)
        found |= collection(jagged).to_dict()
    return {name: value.detach() for name, value in found.items()}


def test_torchrec_pools_what_was_meant(encoder: Encoder) -> None:
    batch = make_batch(DATA, encoder, LABELS, "weight", (2, 3))
    found = pooled(encoder, batch)
    # words by count, then value: item 5, 6, 9 -> 2, 3, 4; tags b, a, c, zz -> 2 to 5; seen 5, 6, 9 -> 2, 3, 4
    assert found["item"][:, 0].tolist() == [2, 3, 0, 2, 4]
    np.testing.assert_allclose(found["tags"][:, 0], [2.5, 0, 0, 8 / 3, 5], rtol=1e-6)
    assert found["tags"][:, 2].tolist() == [1, 0, 1, 1, 1]  # an empty list is no null
    np.testing.assert_allclose(found["seen"][:, 0], [2, 0.25 * 3 + 0.75 * 2, 0, 0, 3.5], rtol=1e-6)
    assert found["price_bucket"][:, 0].tolist() == [2, 3, 0, 4, 4]
    assert batch.dense_BF.shape == (5, 2)
    assert batch.dense_BF[:, 1].tolist() == [0, 0, 1, 0, 0]
    assert batch.stream_rows == (2, 3)
    assert batch.num_rows == 5
    np.testing.assert_array_equal(batch.labels["click"], [1, 0, np.nan, 1, 0])
    np.testing.assert_allclose(batch.labels["dwell"], [1.5, np.nan, 0, 0.02, 0.007])
    assert {label.dtype for label in batch.labels.values()} == {torch.float32}
    assert batch.sample_weight_B is not None
    assert batch.sample_weight_B.tolist() == [1, 0.5, 1, 2, 0]


def test_a_batch_of_pieces_is_the_pieces_batches(encoder: Encoder) -> None:
    whole = make_batch(DATA, encoder, LABELS, "weight", (5,))
    pieces = [make_batch(DATA.slice(start, 2), encoder, LABELS, "weight") for start in (0, 2, 4)]
    for name, value in pooled(encoder, whole).items():
        assert torch.equal(torch.cat([pooled(encoder, piece)[name] for piece in pieces]), value)
    assert torch.equal(torch.cat([piece.dense_BF for piece in pieces]), whole.dense_BF)


def test_zero_rows(encoder: Encoder) -> None:
    batch = make_batch(DATA.slice(0, 0), encoder, LABELS, "weight", (0, 0))
    assert batch.num_rows == 0
    assert batch.dense_BF.shape == (0, 2)
    assert batch.sparse.stride() == 0
    assert batch.labels["click"].shape == (0,)
    assert batch.sparse.keys() == ["item", "tags", "price_bucket"]
    assert batch.sparse.values().shape == batch.sparse.lengths().shape == (0,)
    assert batch.weighted is not None
    assert batch.weighted.weights().shape == (0,)


def test_to_moves_every_part(encoder: Encoder) -> None:
    batch = make_batch(DATA, encoder, LABELS, "weight").to("meta")
    assert batch.weighted is not None
    assert batch.sample_weight_B is not None
    parts = [
        batch.dense_BF,
        batch.sparse.values(),
        batch.sparse.lengths(),
        batch.weighted.values(),
        batch.weighted.weights(),
        batch.sample_weight_B,
        *batch.labels.values(),
    ]
    assert {part.device.type for part in parts} == {"meta"}
    assert batch.stream_rows == (5,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches_reach_the_gpu(encoder: Encoder) -> None:
    batch = make_batch(DATA, encoder, LABELS, "weight").pin_memory()
    assert batch.dense_BF.is_pinned()
    assert batch.sparse.values().is_pinned()
    there = batch.to("cuda")
    assert torch.equal(there.sparse.values().cpu(), batch.sparse.values())


def test_without_labels_and_weights() -> None:
    encoder = Encoder.fit([Dense("price")], [DATA], schema=DATA.schema, embedding_dim=4)
    batch = make_batch(DATA.select(["price"]), encoder, {}, None)
    assert (batch.labels, batch.sample_weight_B, batch.weighted) == ({}, None, None)
    assert batch.sparse.keys() == []


@pytest.mark.parametrize(
    ("values", "label", "rows", "message"),
    [
        (pa.array([0, 2, 1, 3]), Label("y", low=0, high=1, integer=True), [1, 3], "be 0, 1 or null. Found 2 in row 1"),
        (pa.array([0.5, 1.0]), Label("y", low=0, high=1, integer=True), [0], "be 0, 1 or null. Found 0.5"),
        (pa.array([1.0, math.nan, None]), Label("y"), [1], "hold finite numbers, or null. Found nan"),
        (pa.array([1.0, -math.inf]), Label("y"), [1], "Found -inf"),
        (pa.array([1e300]), Label("y"), [0], "hold finite numbers"),
        (pa.array(np.array([1, np.inf], np.float16)), Label("y"), [1], "hold finite numbers"),
        (pa.array([None, np.float16(-np.inf)], pa.float16()), Label("y"), [1], "hold finite numbers"),
        (pa.array(np.array([0.1], np.float16)), Label("y", low=0.1), [0], "numbers of at least 0.1"),
        (
            pa.array([-1, 5]),
            Label("y", scale=0.001, low=0.0),
            [0],
            "numbers of at least 0 (after times 0.001), or null. Found -1",
        ),
        (pa.array([7]), Label("y", low=0, high=4, integer=True), [0], "whole numbers of at least 0 and at most 4"),
    ],
)
def test_labels_out_of_range_name_column_and_rows(
    values: pa.Array, label: Label, rows: list[int], message: str
) -> None:
    with pytest.raises(BadRowsError) as caught:
        label_values(pa.record_batch({"y": values}), label)
    assert (caught.value.column, caught.value.rows.tolist()) == ("y", rows)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([9, 1, None, 0, 9], pa.uint8()).slice(1, 3),
        pa.array([True, None, False]),
        pa.array([1.0, None, 0.0], pa.float32()),
        pa.array([1, None, 0]).dictionary_encode(),
        pa.array([1, None, 0]).cast(pa.decimal128(30, 2)),
    ],
)
def test_labels_of_any_type_of_number(values: Any) -> None:
    found = label_values(pa.record_batch({"y": values}), Label("y", low=0, high=1, integer=True))
    np.testing.assert_array_equal(found, np.array([1, np.nan, 0], np.float32))
    assert np.isnan(label_values(pa.record_batch({"y": pa.nulls(3)}), Label("y", low=0))).all()


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, 1e39])
def test_sample_weights_are_finite_and_not_negative(encoder: Encoder, weight: float) -> None:
    bad = DATA.set_column(7, "weight", pa.array([1.0, weight, None, 1.0, weight]))
    with pytest.raises(
        BadRowsError, match=r"`data.sample_weight`: column 'weight' should hold finite weights"
    ) as caught:
        make_batch(bad, encoder, {}, "weight")
    assert caught.value.rows.tolist() == [1, 4]


def test_missing_columns_and_wrong_types_are_named(encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=r"column 'clik'. Found none. Did you mean 'click'\?"):
        label_values(DATA, Label("clik"))
    with pytest.raises(ValueError, match=r"column 'tags' should hold numbers. Found type list"):
        label_values(DATA, Label("tags"))
    with pytest.raises(ValueError, match="`stream_rows` should sum to the 5 rows"):
        make_batch(DATA, encoder, {}, None, (2, 2))


def test_counts_are_passed_on(encoder: Encoder) -> None:
    counts = encoder.counts()
    make_batch(DATA, encoder, {}, None, counts=counts)
    assert counts.null_share()["price"] == 0.2
    assert counts.null_share()["seen"] == 0.2


VALUES = [0.0, 1.0, -1.0, 0.5, 2.0, 3e38, 4e38, 1e308, -4e38, math.nan, math.inf, -math.inf, None]


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(st.sampled_from(VALUES), max_size=5),
    scale=st.sampled_from([1.0, 0.001, 2.0]),
    low=st.sampled_from([None, 0.0, -math.inf]),
    high=st.sampled_from([None, 1.0, math.inf]),
    integer=st.booleans(),
)
def test_labels_pass_at_a_glance_that_pass_one_by_one(
    values: list[float | None], scale: float, low: float | None, high: float | None, integer: bool
) -> None:
    rows, label = pa.record_batch({"y": pa.array(values, pa.float64())}), Label("y", scale, low, high, integer)

    def found() -> tuple[list[float], list[int]]:
        try:
            return np.nan_to_num(label_values(rows, label), nan=-7.0).tolist(), []
        except BadRowsError as error:
            return [], error.rows.tolist()

    with pytest.MonkeyPatch.context() as patch:
        glance = found()
        patch.setattr(batch_module, "_all_good", lambda *arguments: False)
        assert found() == glance


@given(
    st.sampled_from([pa.int8(), pa.float32(), pa.float64(), pa.int64()]).flatmap(
        lambda type_: st.tuples(
            st.just(type_),
            st.lists(st.integers(-3, 3) if pa.types.is_integer(type_) else st.floats(width=32), min_size=1, max_size=4),
        )
    ),
    st.builds(
        Label,
        st.just("y"),
        scale=st.sampled_from([1.0, 0.5]),
        low=st.sampled_from([None, 0.0, -math.inf]),
        high=st.sampled_from([None, 1.0, math.inf]),
        integer=st.booleans(),
    ),
)
def test_labels_without_nulls_are_judged_as_those_with(column: tuple[pa.DataType, list[Any]], label: Label) -> None:
    type_, values = column

    def judged(values: list[Any]) -> list[float] | str:
        try:
            return np.nan_to_num(label_values(pa.record_batch({"y": pa.array(values, type_)}), label), nan=-7.0).tolist()
        except BadRowsError as error:
            return str(error)

    without, with_null = judged(values), judged([*values, None])
    assert without == (with_null if isinstance(with_null, str) else with_null[:-1])
