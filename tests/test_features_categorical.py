"""Ids against a slow encoder in plain Python, on random columns: vocabularies, hashes, lists, their weights."""

import datetime
import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoders import FAST, fitted, sliced
from hypothesis import given
from hypothesis import strategies as st

from mtrec.features import FIRST_ROW, NULL_ROW, UNSEEN_ROW, BadRowsError, Categorical, Encoder
from mtrec.features.hashing import hash_strings

EPOCH = datetime.date(1970, 1, 1)


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    near = [value for value in (low, low + 1, -1, 0, 1, 2, 2**53, 2**53 + 1, high - 1, high) if low <= value <= high]
    return st.one_of(st.sampled_from(near), st.integers(low, high))


# Arrow type -> strategy of Python values
ELEMENTS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.int8(): integers(-128, 127),
    pa.uint8(): integers(0, 255),
    pa.int16(): integers(-(2**15), 2**15 - 1),
    pa.uint16(): integers(0, 2**16 - 1),
    pa.int32(): integers(-(2**31), 2**31 - 1),
    pa.uint32(): integers(0, 2**32 - 1),
    pa.int64(): integers(-(2**63), 2**63 - 1),
    pa.uint64(): integers(0, 2**64 - 1),
    pa.bool_(): st.booleans(),
    pa.date32(): st.dates(),
    pa.date64(): st.dates(),
    pa.string(): st.text(max_size=20),
    pa.large_string(): st.text(alphabet="abé", max_size=3),
    pa.string_view(): st.text(alphabet="xyz", max_size=20),
    pa.binary(): st.binary(max_size=12),
}


def key_of(value: Any) -> Any:
    """What a value counts as in a vocabulary."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, datetime.date):
        return (value - EPOCH).days
    return int(value) if isinstance(value, bool) else value


def signed(key: Any) -> Any:
    return key - 2**64 if isinstance(key, int) and key >= 2**63 else key


@st.composite
def columns(draw: st.DrawFn) -> dict[str, Any]:
    type_ = draw(st.sampled_from(list(ELEMENTS)))
    element = st.one_of(
        st.none(), st.sampled_from(draw(st.lists(ELEMENTS[type_], min_size=1, max_size=6))), ELEMENTS[type_]
    )
    shape = draw(st.sampled_from(["scalar", "list", "large_list", "fixed"]))
    if shape == "scalar":
        value, arrow = element, type_
    elif shape == "fixed":
        value, arrow = st.one_of(st.none(), st.lists(element, min_size=2, max_size=2)), pa.list_(type_, 2)
    else:
        value = st.one_of(st.none(), st.lists(element, max_size=5))
        arrow = pa.list_(type_) if shape == "list" else pa.large_list(type_)
    return {
        "type": arrow,
        "train": draw(st.lists(st.lists(value, max_size=12), min_size=1, max_size=3)),
        "test": draw(st.lists(value, max_size=12)),
        "lead": draw(st.integers(0, 9)),
        "dictionary": draw(st.booleans()),
        "max_length": None if shape == "scalar" else draw(st.sampled_from([None, 1, 3])),
        "min_count": draw(st.integers(1, 2)),
    }


def bags(values: list[Any], max_length: int | None) -> list[list[Any]]:
    """One list a row; None stands for null."""
    cut = slice(-max_length if max_length else None, None)
    return [value[cut] if isinstance(value, list) else [value] for value in values]


@given(columns())
@FAST
def test_vocabulary_encoding_agrees_with_plain_python(column: dict[str, Any]) -> None:
    batches = [
        pa.record_batch({"x": sliced(part, column["type"], column["lead"], column["dictionary"])})
        for part in column["train"]
    ]
    feature = Categorical("x", min_count=column["min_count"], max_length=column["max_length"])
    encoder = Encoder.fit([feature], batches, schema=pa.schema({"x": column["type"]}), embedding_dim=4)

    flat = [
        key_of(v) for part in column["train"] for bag in bags(part, column["max_length"]) for v in bag if v is not None
    ]
    kept = [(count, key) for key, count in Counter(flat).items() if count >= column["min_count"]]
    words = [key for _, key in sorted(kept, key=lambda pair: (-pair[0], signed(pair[1])))]
    row_of = {key: FIRST_ROW + place for place, key in enumerate(words)}

    everything = [*column["test"], *column["train"][0]]
    expected = [
        [NULL_ROW if v is None else row_of.get(key_of(v), UNSEEN_ROW) for v in bag]
        for bag in bags(everything, column["max_length"])
    ]
    counts = encoder.counts()
    encoded = encoder.encode(
        pa.record_batch({"x": sliced(everything, column["type"], column["lead"], column["dictionary"])}), counts
    )
    assert encoded.values.tolist() == [row for bag in expected for row in bag]
    assert encoded.lengths_KB.tolist() == [[len(bag) for bag in expected]]
    assert (encoded.values.dtype, encoded.lengths_KB.dtype, encoded.dense_BF.shape) == (
        np.int32,
        np.int32,
        (len(everything), 0),
    )
    table = encoder.tables[0]
    assert (table.vocabulary_size, table.num_embeddings) == (len(words), math.ceil(1.2 * (2 + len(words))))
    found = [int(row) for row in counts.counts_F4[0]]
    rows = [row for bag in expected for row in bag]
    assert found == [len(everything), sum(v is None for v in everything), len(rows), rows.count(UNSEEN_ROW)]


@given(columns(), st.integers(3, 50))
@FAST
def test_hash_encoding_is_the_row_of_each_value_alone(column: dict[str, Any], num_embeddings: int) -> None:
    feature = Categorical("x", encoding="hash", num_embeddings=num_embeddings, max_length=column["max_length"])
    schema = pa.schema({"x": column["type"]})
    encoder = Encoder.fit([feature], [], schema=schema, embedding_dim=4)
    values = column["test"]
    encoded = encoder.encode(
        pa.record_batch({"x": sliced(values, column["type"], column["lead"], column["dictionary"])})
    )
    expected = []
    for bag in bags(values, column["max_length"]):
        for value in bag:
            key = None if value is None else key_of(value)
            if key is None:
                expected.append(NULL_ROW)
            elif isinstance(key, bytes):
                h = int(hash_strings(np.array([0, len(key)]), np.frombuffer(key, np.uint8))[0])
                expected.append(FIRST_ROW + h % (num_embeddings - 2))
            else:
                expected.append(FIRST_ROW + splitmix64(key % 2**64) % (num_embeddings - 2))
    assert encoded.values.tolist() == expected


def splitmix64(state: int) -> int:
    """The published generator's first output, in Python's integers."""
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_types_may_differ_between_files() -> None:
    ids = [3, 2**40, None, 5]
    encoder = fitted([Categorical("x", min_count=1)], {"x": pa.array(ids)})
    small = [3, None, 5, 7]
    expected = encoder.encode(pa.record_batch({"x": pa.array(small, pa.int64())})).values.tolist()
    for type_ in (pa.int8(), pa.uint8(), pa.int32(), pa.uint64()):
        assert encoder.encode(pa.record_batch({"x": pa.array(small, type_)})).values.tolist() == expected
    assert encoder.encode(pa.record_batch({"x": pa.array(small).dictionary_encode()})).values.tolist() == expected
    assert encoder.encode(pa.record_batch({"x": pa.nulls(2)})).values.tolist() == [NULL_ROW, NULL_ROW]
    # a uint64 beyond 2^63 has the bits of -5, and is not it
    negative = fitted([Categorical("x", min_count=1)], {"x": pa.array([-5, -5])})
    assert negative.encode(pa.record_batch({"x": pa.array([2**64 - 5], pa.uint64())})).values.tolist() == [UNSEEN_ROW]

    names = fitted([Categorical("x", min_count=1)], {"x": pa.array(["b", "a", None])})
    for array in (
        pa.array(["a", "zz", None, "b"], pa.large_string()),
        pa.array(["a", "zz", None, "b"]).dictionary_encode(),
        pa.array([b"a", b"zz", None, b"b"]),
        pa.DictionaryArray.from_arrays(pa.array([2, 1, None, 0]), pa.array(["b", "zz", "a"])),
        pa.DictionaryArray.from_arrays(pa.array([2, 1, 3, 0]), pa.array(["b", "zz", "a", None])),
    ):
        assert names.encode(pa.record_batch({"x": array})).values.tolist() == [2, UNSEEN_ROW, NULL_ROW, 3]
    table = pa.table(
        {"x": pa.chunked_array([pa.array(["b"]).dictionary_encode(), pa.array(["a", "b"]).dictionary_encode()])}
    )
    assert names.encode(table).values.tolist() == [3, 2, 3]


def test_null_lists_that_cover_elements_are_one_null() -> None:
    encoder = fitted([Categorical("x", min_count=1)], {"x": pa.array([[1, 2, 3]])})
    hidden = pa.ListArray.from_arrays(pa.array([0, 1, 3, 3]), pa.array([1, 2, 3]), mask=pa.array([False, True, False]))
    encoded = encoder.encode(pa.record_batch({"x": hidden}))
    assert (encoded.values.tolist(), encoded.lengths_KB.tolist()) == ([2, NULL_ROW], [[1, 1, 0]])


def test_the_cut_keeps_the_last_values() -> None:
    encoder = fitted([Categorical("x", min_count=1, max_length=2)], {"x": pa.array([[9, 1, 1, 2]])})
    assert encoder.tables[0].vocabulary_size == 2  # 9 is never used
    encoded = encoder.encode(pa.record_batch({"x": pa.array([[2, 2, 1], [1, 2], [2]])}))
    assert encoded.lengths_KB.tolist() == [[2, 2, 1]]
    row = dict(zip([1, 2], encoder.encode(pa.record_batch({"x": pa.array([[1], [2]])})).values.tolist(), strict=True))
    assert encoded.values.tolist() == [row[value] for value in (2, 1, 1, 2, 2)]


def test_weights_are_normalized_for_mean_and_kept_for_sum() -> None:
    ids = pa.array([[1, 2, 3], None, [], [1], [2, 1]])
    weights = pa.array([[1.0, 2.0, 6.0], [5.0], [], [0.0], [None, 3.0]])
    data = {"x": ids, "w": weights, "y": pa.array([[1]] * 5)}
    mean = fitted([Categorical("x", weights="w", max_length=2, min_count=1), Categorical("y", table="x")], data)
    assert (mean.tables[0].pooling, mean.tables[0].weighted, mean.weighted_keys) == ("sum", True, ("x", "y"))
    encoded = mean.encode(pa.record_batch(data))
    assert encoded.weighted_lengths_KB.tolist() == [[2, 1, 0, 1, 2], [1] * 5]
    np.testing.assert_allclose(encoded.weights, [0.25, 0.75, 1.0, 0.0, 0.25, 0.75, *[1.0] * 5])
    total = fitted([Categorical("x", weights="w", pooling="sum", min_count=1)], data)
    np.testing.assert_allclose(total.encode(pa.record_batch(data)).weights, [1, 2, 6, 1, 0, 1, 3])
    scalar = {"x": pa.array([4, None]), "w": pa.array([0.5, 2.0])}
    encoder = fitted([Categorical("x", weights="w", pooling="sum", min_count=1)], scalar)
    assert encoder.encode(pa.record_batch(scalar)).weights.tolist() == [0.5, 2.0]


@pytest.mark.parametrize(
    ("weights", "bad"),
    [([[1.0], [1.0], [1.0]], [0]), ([[1.0, -1.0], [math.nan], [math.inf]], [0, 2])],
)
def test_bad_weights_name_their_rows(weights: list[list[float]], bad: list[int]) -> None:
    data = {"x": pa.array([[1, 2], [1], [2]]), "w": pa.array(weights)}
    encoder = fitted([Categorical("x", weights="w", min_count=1)], data)
    with pytest.raises(BadRowsError, match=r"`features.x.weights`") as caught:
        encoder.encode(pa.record_batch(data))
    assert (caught.value.column, caught.value.rows.tolist()) == ("w", bad)


@given(st.lists(ELEMENTS[pa.int64()], min_size=1, max_size=30), st.sampled_from(["vocabulary", "hash", "identity"]), st.data())
@FAST
def test_ids_without_nulls_have_the_rows_of_those_with(values: list[int], encoding: Any, data: st.DataObject) -> None:
    sizes = {"vocabulary": None, "hash": 11, "identity": 9}
    by_words = encoding == "vocabulary"
    feature = Categorical("x", encoding=encoding, num_embeddings=sizes[encoding], min_count=1 if by_words else None)
    trained = data.draw(st.lists(st.sampled_from(values), min_size=1)) if by_words else [1, 2]
    encoder = fitted([feature], {"x": pa.array(trained, pa.int64())})
    plain = encoder.encode(pa.record_batch({"x": pa.array(values, pa.int64())})).values
    with_null = encoder.encode(pa.record_batch({"x": pa.array([*values, None], pa.int64())})).values
    assert plain.tolist() == with_null[:-1].tolist()
    assert with_null[-1] == NULL_ROW


@pytest.mark.parametrize(("rows", "expected"), [(2**31 - 1, np.int32), (2**31 + 2, np.int64)])
def test_rows_are_int64_only_where_a_table_has_so_many(rows: int, expected: type) -> None:
    feature = Categorical("x", encoding="identity", num_embeddings=rows)
    encoder = fitted([feature], {"x": pa.array([1, 2])})
    encoded = encoder.encode(pa.record_batch({"x": pa.array([rows - 3, 0])}))
    assert encoded.values.dtype == expected
    assert encoded.values.tolist() == [rows - 1, 2]


def test_statistics_of_lists_count_a_null_list_as_one_null() -> None:
    lists = [[1, 1, None, None], None, [], [2, 7]] * 3  # of 21 values 9 are nulls, 6 a known id, and 2 and 7 come too seldom
    encoder = fitted([Categorical("x", min_count=4)], {"x": pa.array(lists, pa.list_(pa.int64()))})
    statistics = encoder.statistics["x"]
    assert (statistics["rows"], statistics["distinct"], statistics["mean_length"]) == (12, 3, 1.75)
    assert statistics["null_share"] == 3 / 12  # of rows, as `FeatureCounts` has it
    assert statistics["unseen_share"] == encoder.profiles["x"].unseen_share == 6 / 21
    assert encoder.profiles["x"].null_share == 9 / 21


def test_a_null_inside_of_a_dictionary_is_counted() -> None:
    encoder = fitted([Categorical("x", min_count=1)], {"x": pa.array(["a", "b"])})
    column = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1]), pa.array(["a", None]))
    counts = encoder.counts()
    assert encoder.encode(pa.record_batch({"x": column}), counts).values.tolist() == [2, 0, 0]
    assert counts.counts_F4[0, 1] == 2


def test_a_signed_number_is_not_the_unsigned_one_of_the_same_bits() -> None:
    encoder = fitted([Categorical("x", min_count=1)], {"x": pa.array([2**64 - 1, 5], pa.uint64())})
    assert encoder.encode(pa.record_batch({"x": pa.array([-1, 5, 6])})).values.tolist() == [1, 3, 1]


def test_weights_are_counted_before_a_list_is_cut() -> None:
    lists = {"x": pa.array([[1, 2, 3]]), "w": pa.array([[1.0, 1.0, 1.0]])}
    encoder = fitted([Categorical("x", weights="w", max_length=2, min_count=1)], lists)
    with pytest.raises(BadRowsError, match="2 weights for 3 values"):
        encoder.encode(pa.record_batch({**lists, "w": pa.array([[1.0, 1.0]])}))


def test_a_null_list_of_weights_is_one_for_each_value_and_a_row_with_two_bad_ones_is_one_row() -> None:
    lists = {"x": pa.array([[1, 2], [2]]), "w": pa.array([None, [0.5]], pa.list_(pa.float64()))}
    encoder = fitted([Categorical("x", weights="w", pooling="sum", min_count=1)], lists)
    assert encoder.encode(pa.record_batch(lists)).weights.tolist() == [1.0, 1.0, 0.5]
    with pytest.raises(BadRowsError) as caught:
        encoder.encode(pa.record_batch({**lists, "w": pa.array([[-1.0, -2.0], [0.5]])}))
    assert caught.value.rows.tolist() == [0]


def test_the_mean_of_one_value_a_row_is_the_value_whatever_its_weight() -> None:
    plain = {"x": pa.array([1, 2, 1]), "w": pa.array([3.0, 0.0, None])}
    encoder = fitted([Categorical("x", weights="w", min_count=1)], plain)
    assert encoder.encode(pa.record_batch(plain)).weights.tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("weights", [pa.array([1e39, 1.0]), pa.array([[1e39], [1.0]]), pa.array([[1e308], [1.0]])])
def test_a_weight_that_no_float32_holds_is_a_bad_row(weights: pa.Array) -> None:
    ids = pa.array([1, 2]) if pa.types.is_floating(weights.type) else pa.array([[1], [2]])
    ones = pa.array([1.0, 1.0]) if pa.types.is_floating(weights.type) else pa.array([[1.0], [1.0]])
    encoder = fitted([Categorical("x", weights="w", min_count=1)], {"x": ids, "w": ones})
    with pytest.raises(BadRowsError, match="column 'w' should hold finite weights") as caught:
        encoder.encode(pa.record_batch({"x": ids, "w": weights}))
    assert caught.value.rows.tolist() == [0]
