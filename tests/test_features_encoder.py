"""The encoder after its fit: other columns than it knows, none, no rows; saved and loaded."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from encoders import every_kind, fitted

from mtrec.features import FIRST_ROW, NULL_ROW, UNSEEN_ROW, Bucketized, Categorical, Dense, EncodedRows, Encoder, join, psi


def test_a_column_of_another_type_is_refused_when_encoding() -> None:
    encoder = fitted([Categorical("x", min_count=1), Dense("y")], {"x": pa.array([1]), "y": pa.array([1.0])})
    with pytest.raises(ValueError, match=r"`features.x.column` should hold integers, as in the training data"):
        encoder.encode(pa.record_batch({"x": pa.array(["a"]), "y": pa.array([1.0])}))
    with pytest.raises(ValueError, match=r"`features.y.column` should hold one number"):
        encoder.encode(pa.record_batch({"x": pa.array([1]), "y": pa.array([[1.0]])}))
    with pytest.raises(ValueError, match=r"`features.y.column` should name a column of the data. Found 'y'"):
        encoder.encode(pa.record_batch({"x": pa.array([1])}))
    with pytest.raises(ValueError, match=r"`features.x.column` should hold ids") as caught:
        encoder.check_schema(pa.schema({"x": pa.float32(), "y": pa.string()}))
    assert "`features.y.column` should hold numbers" in str(caught.value)


def test_optional_columns_may_be_missing() -> None:
    features = [Categorical("x", optional=True, min_count=1), Dense("y", optional=True), Bucketized("z", optional=True)]
    data = {"x": pa.array([1, 2]), "y": pa.array([1.0, 3.0]), "z": pa.array([1.0, 3.0])}
    encoder = fitted(features, data)
    encoded = encoder.encode(pa.record_batch({"other": pa.array([1, 2, 3])}))
    assert encoded.values.tolist() == [NULL_ROW] * 6
    assert encoded.dense_BF.tolist() == [[0.0]] * 3
    nothing = Encoder.fit(
        features, [pa.record_batch({"q": pa.array([1])})], schema=pa.schema({"q": pa.int64()}), embedding_dim=4
    )
    assert nothing.statistics["x"]["null_share"] == 1.0


def test_no_rows() -> None:
    schema = pa.schema(
        {
            "x": pa.int64(),
            "s": pa.string(),
            "l": pa.list_(pa.int32()),
            "w": pa.list_(pa.float32()),
            "y": pa.float64(),
            "v": pa.list_(pa.float32(), 3),
        }
    )
    features = [
        Categorical("x"),
        Categorical("s"),
        Categorical("l", weights="w"),
        Dense("y", scale="quantile"),
        Dense("v"),
        Bucketized("b", column="y"),
    ]
    empty = pa.RecordBatch.from_pylist([], schema=schema)
    encoder = Encoder.fit(features, [empty, empty], schema=schema, embedding_dim=4)
    encoded = encoder.encode(empty)
    assert (encoded.dense_BF.shape, encoded.lengths_KB.shape, encoded.weighted_lengths_KB.shape) == (
        (0, 4),
        (3, 0),
        (1, 0),
    )
    assert len(encoded.values) == len(encoded.weighted_values) == len(encoded.weights) == 0
    one = encoder.encode(
        pa.RecordBatch.from_pylist([{"x": 1, "s": "a", "l": [1], "w": [2.0], "y": 1.0, "v": [1, 2, 3]}], schema=schema)
    )
    assert one.values.tolist() == [UNSEEN_ROW, UNSEEN_ROW, FIRST_ROW]
    assert math.isnan(psi(encoder.profiles["x"], encoder.profiles["x"]))


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    features, batch = every_kind()
    encoder = Encoder.fit(features, [batch.slice(0, 200), batch.slice(200)], schema=batch.schema, embedding_dim=4)
    encoder.save(tmp_path / "encoder")
    loaded = Encoder.load(tmp_path / "encoder")
    assert loaded.fingerprint() == encoder.fingerprint()
    assert (loaded.tables, loaded.sparse_keys, loaded.weighted_keys, loaded.columns, loaded.dense_names) == (
        encoder.tables,
        encoder.sparse_keys,
        encoder.weighted_keys,
        encoder.columns,
        encoder.dense_names,
    )
    assert loaded.weighted_keys == ("tags",)
    a, b = encoder.encode(batch), loaded.encode(batch)
    for name in ("dense_BF", "values", "lengths_KB", "weighted_values", "weighted_lengths_KB", "weights"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert not (a.values == UNSEEN_ROW).any()
    profile = loaded.profile([batch])
    assert all(psi(profile[name], encoder.profiles[name]) < 0.01 for name in profile)
    grown = Encoder.fit(features, [batch], schema=batch.schema, embedding_dim=4, previous=loaded)
    assert np.array_equal(grown.encode(batch).values, a.values)
    state = json.loads((tmp_path / "encoder" / "encoder.json").read_text())
    state["version"] = 99
    (tmp_path / "encoder" / "encoder.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"should have version 1. Found 99"):
        Encoder.load(tmp_path / "encoder")


def arrays_of(rows: EncodedRows) -> list[np.ndarray]:
    found = [rows.dense_BF]
    for ids in (rows.ids, rows.weighted):
        found += [ids.rows_SB, *([] if ids.weights_SB is None else [ids.weights_SB])]
        for bags in ids.bags:
            found += [bags.values, bags.offsets, bags.lengths_B, *([] if bags.weights is None else [bags.weights])]
    return found


@pytest.mark.parametrize("with_vectors", [True, False])  # numbers alone stay columns
def test_parts_of_a_batch_are_as_if_each_was_encoded_alone_and_hold_no_other_rows(with_vectors: bool) -> None:
    features, batch = every_kind()
    features = [feature for feature in features if with_vectors or feature.name != "vector"]
    encoder = Encoder.fit(features, [batch], schema=batch.schema, embedding_dim=4)
    order = np.random.default_rng(0).permutation(200) + 120
    parts = encoder.encode_rows(batch, [slice(0, 120), order, slice(320, 500)])
    alone = [batch.slice(0, 120), batch.take(pa.array(order)), batch.slice(320)]
    for part, rows in zip(parts, alone, strict=True):
        found, expected = join([(part, 0, part.num_rows)]), encoder.encode(rows)
        assert found.single == expected.single
        for name in ("dense_BF", "values", "lengths_KB", "weighted_values", "weighted_lengths_KB", "weights"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
        for array in arrays_of(part):
            held = array if array.base is None else array.base
            assert held.size <= max(array.size, 600), array.shape  # 500 rows of one column, as those of a group without bags
