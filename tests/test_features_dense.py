"""Numbers scaled as in plain Python, whatever is missing, constant or infinite among them."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoders import FAST, NUMBERS, fitted, sliced
from hypothesis import assume, given
from hypothesis import strategies as st

from mtrec.features import BadRowsError, Dense, Encoder, dense

MOST = sys.float_info.max


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


def test_minmax_holds_numbers_beyond_the_training_data_within_0_and_1() -> None:
    encoder = fitted([Dense("x", scale="minmax", missing_indicator=False)], {"x": pa.array([2.0, 4.0, 6.0])})
    for later in ([-5.0, 3.0, 60.0], [-5.0, 3.0, 60.0, None]):
        encoded = encoder.encode(pa.record_batch({"x": pa.array(later)}))
        assert encoded.dense_BF[:, 0].tolist() == [0.0, 0.25, 1.0, 0.5][: len(later)]


def test_the_rounding_of_a_constants_mean_is_not_blown_up() -> None:
    encoder = fitted([Dense("x")], {"x": pa.array([0.1] * 1_000)})  # whose mean is not 0.1, by 1e-17
    encoded = encoder.encode(pa.record_batch({"x": pa.array([0.1, 0.2])}))
    np.testing.assert_allclose(encoded.dense_BF[:, 0], [0.0, 0.1], atol=1e-6)


@pytest.mark.parametrize("width", [None, 2])
def test_a_fit_does_not_depend_on_how_the_rows_come(width: int | None) -> None:
    numbers = np.sort(np.random.default_rng(0).lognormal(size=(150_000, width or 1)), axis=0)
    found = []
    for rows in (150_000, 10_000):
        fit = Dense("x", scale="quantile", width=width).start(pa.float64())
        for start in range(0, len(numbers), rows):
            part = pa.array(numbers[start : start + rows].ravel())
            fit.update(part if width is None else pa.FixedSizeListArray.from_arrays(part, width))
        state, _ = fit.finish()
        profile = fit.profile(Dense("x", scale="quantile").restore(state))
        found.append((state["points"], state["deciles"], profile.counts_P.tolist()))
    assert found[0] == found[1]
    assert sum(found[0][2]) == pytest.approx(numbers.size, abs=10)


def test_a_profiles_bins_begin_at_their_edges() -> None:
    encoding = Dense("x").restore({"width": None, "indicator": False, "fill": [0.0], "deciles": [2.0, 3.0]})
    assert encoding.bins == ("null", "<2.0", "<3.0", ">=3.0")
    assert encoding.count(pa.array([1.0, 2.0, 2.5, 3.0, 9.0, 9.0, None])).counts_P.tolist() == [1, 1, 2, 3]


def test_a_vector_that_lacks_several_numbers_is_one_missing_row() -> None:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([1.0, None, 3.0, None, None, None]), 3)
    encoder = fitted([Dense("x")], {"x": vectors})
    counts = encoder.counts()
    encoder.encode(pa.record_batch({"x": vectors}), counts)
    assert counts.counts_F4[0, :2].tolist() == [2, 2]


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
    known = [value for value in known if not 1e150 < abs(value) < np.inf]  # those are refused
    feature = Dense("x", scale=scale, clip_sd=clip_sd)
    encoding = fitted([feature], {"x": pa.array(known, type_)})._dense[0][1]
    array = pa.array([7.0] * lead + values, type_).slice(lead)
    quick, slow = np.empty((2, len(encoding.names), len(values)), np.float32)
    taken = not array.null_count and encoding._encode_plain(array.to_numpy(), quick[0])
    with np.errstate(over="ignore", invalid="ignore"):  # beyond what a float32, or a double, holds
        scaled = (array.to_numpy().astype(np.float64) - encoding._shift_W) * encoding._factor_W
        assert taken == (len(values) > 0 and bool((np.abs(scaled) <= np.finfo(np.float32).max).all()))
        missing = encoding.encode(array, quick.T)
        encoding._plain = False
        assert encoding.encode(array, slow.T) == missing
    np.testing.assert_array_equal(quick, slow)  # but for the sign of 0, which a bound of 0 may take away


SCALES = ["standardize", "minmax", "quantile", "none"]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("values", [[1e200, 1.0, 2.0], [MOST, -MOST], [MOST, MOST, MOST, 0.0]])
@pytest.mark.filterwarnings("error")
def test_values_too_large_are_told_with_what_to_do(scale: Any, values: list[float], tmp_path: Path) -> None:
    column, least, most = {"x": pa.array(values)}, min(values), max(values)
    shown = re.escape(f"Found {least!r} to {most!r} in column 'x': name what stands for a missing value in `features.x.missing")
    with pytest.raises(ValueError, match=rf"`features\.x\.column` should hold numbers .* {shown}"):
        fitted([Dense("x", scale=scale)], column)
    for number, options in enumerate(({"missing_values": [least, most]}, {"clip": (-10.0, 10.0)}, {"transform": "log1p"})):
        encoder = fitted([Dense("x", scale=scale, **options)], column)  # type: ignore[arg-type]
        encoder.save(tmp_path / str(number))
        assert np.isfinite(Encoder.load(tmp_path / str(number)).encode(pa.record_batch(column)).dense_BF).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("values", [[1e200, 1e200, 1e200], [0.0, 1e-310]])
@pytest.mark.filterwarnings("error")
def test_large_values_that_are_equal_and_the_smallest_have_a_scale(scale: Any, values: list[float], tmp_path: Path) -> None:
    if scale == "none" and max(values) > 1:
        with pytest.raises(ValueError, match=r"numbers that a float32 holds \(up to 3\.4e\+38\) with `scale: none`"):
            fitted([Dense("x", scale=scale)], {"x": pa.array(values)})
        return
    encoder = fitted([Dense("x", scale=scale)], {"x": pa.array(values)})
    encoder.save(tmp_path)
    assert np.isfinite(encoder.encode(pa.record_batch({"x": pa.array(values)})).dense_BF).all()


def test_quantile_scale_is_the_rank() -> None:
    values = np.random.default_rng(0).lognormal(size=5000)
    encoder = fitted([Dense("x", scale="quantile")], {"x": pa.array(values)})
    queries = np.sort(values)[[0, 1250, 2500, 4999]]
    found = encoder.encode(pa.record_batch({"x": pa.array([*queries, -5.0, 1e9, None])})).dense_BF[:, 0]
    np.testing.assert_allclose(found, [0.0, 0.25, 0.5, 1.0, 0.0, 1.0, 0.5], atol=1e-3)
    ties = fitted([Dense("x", scale="quantile")], {"x": pa.array([0.0] * 90 + [1.0] * 10)})
    np.testing.assert_allclose(ties.encode(pa.record_batch({"x": [0.0]})).dense_BF[:, 0], [0.45], atol=0.01)


@given(
    st.integers(1, 3).flatmap(
        lambda width: st.tuples(
            st.just(width),
            st.lists(
                st.none() | st.lists(st.none() | st.floats(width=32) | st.just(1.0), min_size=width, max_size=width), max_size=25
            ),
        )
    ),
    st.sampled_from([pa.float32(), pa.float64()]),
    st.sampled_from([{"scale": scale} for scale in SCALES] + [{"transform": "log1p"}, {"missing_values": (1.0,)}]),
    st.integers(0, 3),
)
@FAST
@pytest.mark.filterwarnings("error")
def test_a_vector_is_its_numbers_each_for_itself(
    vectors: Any, type_: pa.DataType, options: dict[str, Any], lead: int
) -> None:
    width, values = vectors
    columns = [[None if each is None else each[index] for each in values] for index in range(width)]
    refused = any(value is not None and 1e30 < abs(value) < np.inf for column in columns for value in column)
    assume(not refused)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "_BLOCK", 8)  # several blocks
        lists = pa.array([[7.0] * width] * lead + values, pa.list_(type_)).slice(lead)
        for array in (lists, lists.cast(pa.list_(type_, width))):
            own = None if pa.types.is_fixed_size_list(array.type) else width
            feature = Dense("v", width=own, missing_indicator=False, **options)
            found = fitted([feature], {"v": array}).encode(pa.record_batch({"v": array})).dense_BF
            assert found.shape == (len(values), width)
            for index, column in enumerate(columns):
                alone = pa.array(column, type_)
                numbers = Dense("v", missing_indicator=False, **options)
                expected = fitted([numbers], {"v": alone}).encode(pa.record_batch({"v": alone})).dense_BF[:, 0]
                np.testing.assert_allclose(found[:, index], expected, rtol=1e-5, atol=1e-6)


def test_a_block_of_vectors_without_a_fault_is_scaled_as_one_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_BLOCK", 40)
    values = np.random.default_rng(0).normal(size=(1_000, 4)).astype(np.float32)
    faults = values.copy()
    faults[[3, 500], [1, 2]] = np.nan
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(each.ravel()), 4) for each in (values, faults)]
    features = [Dense("before"), Dense("v"), Dense("after")]
    columns = [{"before": values[:, 0], "v": array, "after": values[:, 1]} for array in arrays]
    encoder = fitted(features, columns[1])
    sound, faulty = (encoder.encode(pa.record_batch(each)).dense_BF for each in columns)
    assert encoder.dense_names == ("before", "v_0", "v_1", "v_2", "v_3", "v_missing", "after")
    for place, column in ((0, values[:, 0]), (6, values[:, 1]), (3, values[:, 2])):
        np.testing.assert_allclose(sound[:, place], (column - column.mean()) / column.std(), rtol=0.01, atol=0.01)
    assert np.flatnonzero(faulty[:, 5]).tolist() == [3, 500]
    assert not sound[:, 5].any()
    faulty[[3, 500], [2, 3]], faulty[:, 5] = sound[[3, 500], [2, 3]], 0.0
    assert np.array_equal(sound, faulty)


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


@pytest.mark.filterwarnings("error")
def test_an_infinity_in_a_constant_column_is_missing_without_a_warning() -> None:
    encoder = fitted([Dense("x", scale="minmax")], {"x": pa.array([2.0, 2.0], pa.float32())})
    assert encoder.encode(pa.record_batch({"x": pa.array([2.0, math.inf], pa.float32())})).dense_BF[:, 0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("type_", [pa.float64(), pa.float32(), pa.float16()])
def test_numbers_that_stand_for_missing_are_found_in_narrow_floats(type_: pa.DataType) -> None:
    values = pa.array(np.array([-0.1, 1.0, 2.0, -999.9], {"double": "f8", "float": "f4", "halffloat": "f2"}[str(type_)]))
    batch = pa.record_batch({"x": values})
    encoder = Encoder.fit([Dense("x", missing_values=(-0.1, -999.9))], [batch], schema=batch.schema, embedding_dim=4)
    assert encoder.encode(batch).dense_BF[:, 1].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert encoder.statistics["x"]["mean"] == 1.5
