"""The encoder against a slow one in plain Python, on random columns; vocabularies, tables, hashes, profiles."""

import datetime
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtrec.features import (
    FEATURES,
    FIRST_ROW,
    NULL_ROW,
    UNSEEN_ROW,
    BadRowsError,
    Bucketized,
    Categorical,
    Dense,
    Encoder,
    psi,
)
from mtrec.features import vocabulary as vocabulary_module
from mtrec.features.counting import KeyCounter, Moments, Sample
from mtrec.features.hashing import hash_strings, mix64
from mtrec.features.vocabulary import IntegerIndex, TextIndex, Vocabulary
from mtrec.kinds import check_options

EPOCH = datetime.date(1970, 1, 1)
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


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


def sliced(values: list[Any], type_: pa.DataType, lead: int, dictionary: bool) -> pa.Array:
    """An array with an offset of `lead` rows, which are not to be seen."""
    array = pa.array([*values[:1] * lead, *values, *values[-1:]], type_)
    if dictionary and not (pa.types.is_nested(type_) or type_ in (pa.string_view(),)):
        array = array.dictionary_encode()
    return array.slice(lead, len(values)) if values else array.slice(len(array), 0)


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
        np.int64,
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


@given(st.lists(st.binary(max_size=700), max_size=20), st.integers(0, 3))
@FAST
def test_string_hash_depends_on_the_string_alone(words: list[bytes], lead: int) -> None:
    array = pa.array([b"lead"] * lead + words, pa.large_binary()).slice(lead)
    together = vocabulary_module.hash_array(array)
    alone = [int(vocabulary_module.hash_array(pa.array([word], pa.large_binary()))[0]) for word in words]
    assert together.tolist() == alone
    assert len(set(alone)) == len(set(words))


def test_hashes_are_the_same_in_another_process_and_forever() -> None:
    code = (
        "import numpy as np, pyarrow as pa\n"
        "from mtrec.features.vocabulary import hash_array\n"
        "from mtrec.features.hashing import mix64\n"
        "array = pa.array([b'', b'a', b'user_12345678901', b'x' * 300], pa.large_binary())\n"
        "print(hash_array(array).tolist(), mix64(np.array([-1])).tolist())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    array = pa.array([b"", b"a", b"user_12345678901", b"x" * 300], pa.large_binary())
    here = f"{vocabulary_module.hash_array(array).tolist()} {mix64(np.array([-1])).tolist()}"
    assert out.stdout.strip() == here == PINNED


PINNED = "[16294208416658607535, 1246298476426086058, 15732907485307307097, 1764979364160849074] [16490336266968443936]"


def test_hash_spreads_evenly() -> None:
    for hashes in (
        mix64(np.arange(100_000) << 40),
        vocabulary_module.hash_array(pa.array(range(100_000)).cast(pa.string()).cast(pa.large_binary())),
    ):
        counts = np.bincount((hashes % np.uint64(100)).astype(np.int64), minlength=100)
        chi_square = float(((counts - 1000) ** 2 / 1000).sum())
        assert 50 < chi_square < 170  # 99 degrees of freedom: these bounds are passed with probability 1e-5


@pytest.mark.parametrize(
    "words",
    [
        np.arange(1000) - 500,
        np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 5000),
        np.arange(3000) << 44,
        np.array([-(2**63), 2**63 - 1]),
        np.array([2**63 - 1]),
        np.zeros(0, np.int64),
        np.arange(1, 9) * 2**60,
        np.array([0, 2**62, -(2**62), 2**53, 2**53 + 1]),
    ],
)
def test_integer_index_finds_every_word_and_nothing_else(words: np.ndarray) -> None:
    words = np.unique(words)
    np.random.default_rng(1).shuffle(words)
    index = IntegerIndex(words)
    assert index.rows(words).tolist() == list(range(FIRST_ROW, FIRST_ROW + len(words)))
    queries = np.concatenate(
        [words + 1, words - 1, np.random.default_rng(2).integers(-(2**63), 2**63 - 1, 2000), [0, -1]]
    )
    known = {int(word): FIRST_ROW + place for place, word in enumerate(words)}
    assert index.rows(queries).tolist() == [known.get(int(query), UNSEEN_ROW) for query in queries]


def test_strings_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "hash_strings", lambda offsets, data: np.diff(offsets).astype(np.uint64))
    words = pa.array([b"aa", b"b", b"cc", b"dd"], pa.large_binary())
    index = TextIndex(words)
    queries = pa.array([b"dd", b"cc", b"b", b"aa", b"zz", b"", b"c"], pa.large_binary())
    assert index.rows(queries).tolist() == [5, 4, 3, 2, 1, 1, 1]


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


def fitted(features: list[Any], data: dict[str, pa.Array], previous: Encoder | None = None, **more: Any) -> Encoder:
    batch = pa.record_batch(data)
    return Encoder.fit(features, [batch], schema=batch.schema, embedding_dim=4, previous=previous, **more)


def test_the_cut_keeps_the_last_values() -> None:
    encoder = fitted([Categorical("x", min_count=1, max_length=2)], {"x": pa.array([[9, 1, 1, 2]])})
    assert encoder.tables[0].vocabulary_size == 2  # 9 is never used
    encoded = encoder.encode(pa.record_batch({"x": pa.array([[2, 2, 1], [1, 2], [2]])}))
    assert encoded.lengths_KB.tolist() == [[2, 2, 1]]
    row = dict(zip([1, 2], encoder.encode(pa.record_batch({"x": pa.array([[1], [2]])})).values.tolist(), strict=True))
    assert encoded.values.tolist() == [row[value] for value in (2, 1, 1, 2, 2)]


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


def test_construction_errors_name_the_place() -> None:
    with pytest.raises(ValueError, match=r"`features.x.clip` should be \[least, largest\]"):
        Dense("x", clip=(2.0, 1.0))
    with pytest.raises(ValueError, match=r"`features.x.boundaries` should be finite"):
        Bucketized("x", boundaries=(1.0, 1.0))


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


def every_kind() -> tuple[list[Any], pa.RecordBatch]:
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


def test_a_fit_does_not_depend_on_how_the_data_are_cut() -> None:
    features, batch = every_kind()
    whole = Encoder.fit(features, [batch], schema=batch.schema, embedding_dim=4)
    pieces = [batch.slice(start, 37) for start in range(0, batch.num_rows, 37)]
    cut = Encoder.fit(features, pieces, schema=batch.schema, embedding_dim=4)
    a, b = whole.encode(batch), cut.encode(batch)
    assert np.array_equal(a.values, b.values)
    np.testing.assert_allclose(a.dense_BF, b.dense_BF, rtol=1e-5, atol=1e-6)


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


NUMBERS = st.lists(st.one_of(st.none(), st.floats(width=32), st.sampled_from([-1.0, 0.0, 3.0])), max_size=40)


@given(
    NUMBERS, st.sampled_from(["none", "log1p"]), st.sampled_from(["none", "standardize", "minmax"]), st.integers(0, 5)
)
@FAST
def test_dense_scaling_agrees_with_plain_python(
    values: list[float | None], transform: Any, scale: Any, lead: int
) -> None:
    feature = Dense("x", transform=transform, scale=scale, clip=(-1e6, 1e6), missing_values=(-1.0,), clip_sd=2.0)
    array = sliced(values, pa.float32(), lead, dictionary=False)
    encoder = fitted([feature], {"x": array})
    known = [None if v is None or not math.isfinite(v) or v == -1.0 else min(max(v, -1e6), 1e6) for v in values]
    if transform == "log1p":
        known = [None if v is None else math.copysign(math.log1p(abs(v)), v) for v in known]
    there = [v for v in known if v is not None]
    mean = math.fsum(there) / len(there) if there else 0.0
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in there) / len(there)) if there else 0.0
    low, span = (min(there), max(there) - min(there)) if there else (0.0, 0.0)
    if scale == "standardize":
        constant = sd <= 1e-12 * max(abs(mean), 1e-300)
        expected = [0.0 if v is None else min(max((v - mean) / (1 if constant else sd), -2), 2) for v in known]
    elif scale == "minmax":
        expected = [((mean if v is None else v) - low) / span if span > 0 else 0.0 for v in known]
    else:
        expected = [mean if v is None else v for v in known]
    encoded = encoder.encode(pa.record_batch({"x": array}))
    missing = [v is None for v in known]
    assert encoder.dense_names == (("x", "x_missing") if any(missing) else ("x",))
    np.testing.assert_allclose(encoded.dense_BF[:, 0], np.array(expected, np.float32), rtol=1e-4, atol=1e-5)
    if any(missing):
        assert encoded.dense_BF[:, 1].tolist() == [float(each) for each in missing]
    counts = encoder.counts()
    encoder.encode(pa.record_batch({"x": array}), counts)
    assert counts.counts_F4[0].tolist() == [len(values), sum(missing), len(values), 0]


TYPED = {pa.float16(): 16, pa.float32(): 32, pa.float64(): 64}


@given(
    st.sampled_from(list(TYPED)).flatmap(
        lambda type_: st.tuples(
            st.just(type_), *[st.lists(st.floats(width=TYPED[type_]) | st.just(1.0), max_size=20) for _ in range(2)]
        )
    ),
    st.sampled_from(["standardize", "minmax"]),
    st.sampled_from([None, 0.3, 2.0]),
    st.integers(0, 3),
)
@FAST
def test_dense_columns_without_fault_are_scaled_as_others_are(column: Any, scale: Any, clip_sd: float | None, lead: int) -> None:
    type_, known, values = column
    feature = Dense("x", scale=scale, clip_sd=clip_sd)
    encoding = fitted([feature], {"x": pa.array(known, type_)})._dense[0][1]
    array = pa.array([7.0] * lead + values, type_).slice(lead)
    quick, slow = np.empty((2, len(encoding.names), len(values)), np.float32)
    taken = encoding._encode_plain(array, quick[0])
    with np.errstate(over="ignore", invalid="ignore"):  # beyond what a float32, or a double, holds
        scaled = (array.to_numpy().astype(np.float64) - encoding._shift_W) * encoding._factor_W
        assert taken == (len(values) > 0 and bool((np.abs(scaled) <= np.finfo(np.float32).max).all()))
        missing = encoding.encode(array, quick.T)
        encoding._plain = False
        assert encoding.encode(array, slow.T) == missing
    np.testing.assert_array_equal(quick, slow)  # but for the sign of 0, which a bound of 0 may take away


def test_quantile_scale_is_the_rank() -> None:
    values = np.random.default_rng(0).lognormal(size=5000)
    encoder = fitted([Dense("x", scale="quantile")], {"x": pa.array(values)})
    queries = np.sort(values)[[0, 1250, 2500, 4999]]
    found = encoder.encode(pa.record_batch({"x": pa.array([*queries, -5.0, 1e9, None])})).dense_BF[:, 0]
    np.testing.assert_allclose(found, [0.0, 0.25, 0.5, 1.0, 0.0, 1.0, 0.5], atol=1e-3)
    ties = fitted([Dense("x", scale="quantile")], {"x": pa.array([0.0] * 90 + [1.0] * 10)})
    np.testing.assert_allclose(ties.encode(pa.record_batch({"x": [0.0]})).dense_BF[:, 0], [0.45], atol=0.01)


def test_vectors_of_a_fixed_size() -> None:
    type_ = pa.list_(pa.float32(), 2)
    array = pa.array([[9, 9], [1, 2], None, [3, None], [5, 6]], type_).slice(1)
    for column, width in ((array, None), (array.cast(pa.list_(pa.float32())), 2)):
        encoder = fitted([Dense("v", scale="none", width=width)], {"v": column})
        assert encoder.dense_names == ("v_0", "v_1", "v_missing")
        expected = [[1, 2, 0], [3, 4, 1], [3, 4, 1], [5, 6, 0]]
        assert encoder.encode(pa.record_batch({"v": column})).dense_BF.tolist() == expected
    with pytest.raises(
        BadRowsError, match=r"`features.v.column`: column 'v' should hold 2 numbers a row. Found 1 numbers in row 1"
    ):
        encoder.encode(pa.record_batch({"v": pa.array([[1.0, 2.0], [1.0]])}))


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


def test_options_come_through_yaml_types() -> None:
    options = check_options(Dense, {"clip": [0, 5], "missing_values": [-1], "missing_indicator": "auto"}, "features.x")
    assert Dense("x", **options).clip == (0.0, 5.0)
    options = check_options(Categorical, {"num_embeddings": "auto", "sharding": "row_wise"}, "features.x")
    assert Categorical("x", **options).num_embeddings == "auto"
    with pytest.raises(ValueError, match=r"features.x.num_embeddings"):
        check_options(Categorical, {"num_embeddings": 0}, "features.x")
    assert set(FEATURES) == {"categorical", "dense", "bucketized"}


class Double:
    """A kind from outside: twice the number."""

    family = "dense"
    fitted_by = ("times",)

    def __init__(self, name: str, *, times: int = 2) -> None:
        self.name, self.times, self.optional = name, times, False

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.name,)

    def check_type(self, type_: pa.DataType) -> None:
        if not pa.types.is_floating(type_):
            raise ValueError(f"`features.{self.name}.column` should hold floats. Found {type_}.")

    def start(self, type_: pa.DataType) -> Any:
        return Dense(self.name, scale="none", missing_indicator=False).start(type_)

    def restore(self, state: dict[str, Any]) -> Any:
        encoding = Dense(self.name, scale="none").restore(state)
        plain, times = encoding.encode, self.times

        def encode(array: pa.Array, out_BW: np.ndarray) -> int:
            missing = plain(array, out_BW)
            out_BW *= times
            return missing

        encoding.encode = encode
        return encoding


def test_a_kind_from_outside_the_package() -> None:
    encoder = fitted([Double("y", times=3), Dense("z", scale="none")], {"y": pa.array([1.0]), "z": pa.array([1])})
    assert encoder.encode(pa.record_batch({"y": pa.array([2.0]), "z": pa.array([2.0])})).dense_BF.tolist() == [
        [6.0, 2.0]
    ]


def test_a_vocabulary_file_can_be_read_by_others(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    Vocabulary("string", pa.array([b"b", b"a"], pa.large_binary()), np.array([3, 1])).save(tmp_path / "v.parquet")
    assert pq.read_table(tmp_path / "v.parquet").to_pydict() == {"id": ["b", "a"], "count": [3, 1]}
    Vocabulary("string", pa.array([b"\xff"], pa.large_binary()), np.array([3])).save(tmp_path / "v.parquet")
    assert pq.read_table(tmp_path / "v.parquet")["id"].to_pylist() == [b"\xff"]
    Vocabulary("uint64", np.array([-1]), np.array([3])).save(tmp_path / "v.parquet")
    assert pq.read_table(tmp_path / "v.parquet")["id"].to_pylist() == [2**64 - 1]


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=30),
    st.sampled_from(["standardize", "minmax"]),
    st.sampled_from([None, 0.5, 5.0]),
)
@FAST
def test_numbers_without_nulls_are_scaled_as_those_with(values: list[float], scale: Any, clip_sd: float | None) -> None:
    known = [value for value in values if math.isfinite(value)]
    feature = Dense("x", scale=scale, clip_sd=clip_sd, missing_indicator=True)
    encoder = fitted([feature], {"x": pa.array([*known, 0.0, 1.0], pa.float32())})
    plain = encoder.encode(pa.record_batch({"x": pa.array(values, pa.float32())})).dense_BF
    with_null = encoder.encode(pa.record_batch({"x": pa.array([*values, None], pa.float32())})).dense_BF
    assert plain.tobytes() == with_null[:-1].tobytes()


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


@pytest.mark.filterwarnings("error")
def test_an_infinity_in_a_constant_column_is_missing_without_a_warning() -> None:
    encoder = fitted([Dense("x", scale="minmax")], {"x": pa.array([2.0, 2.0], pa.float32())})
    assert encoder.encode(pa.record_batch({"x": pa.array([2.0, math.inf], pa.float32())})).dense_BF[:, 0].tolist() == [0.0, 0.0]
