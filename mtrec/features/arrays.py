"""Arrow columns -> numpy: ids without a detour through floats, numbers, lists. Any offset, any chunking, any of Arrow's
spellings of one thing (int32 beside int64, dictionaries, large and view types).

Shapes: n values, B rows, W width of a vector.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from mtrec.features.vocabulary import NULL_ROW, UNSEEN_ROW, Key, Rows
from mtrec.kinds import counted

Mask = npt.NDArray[np.bool_]


class BadRowsError(ValueError):
    """Some rows of a batch hold what cannot be trained on.

    Attributes: `column`; `rows`, their numbers within the batch, ascending; `reason`, in words, for counting; `what` is wrong
    with the first of them, for whoever knows where that row lies in the files.
    """

    def __init__(self, place: str, column: str, rows: npt.NDArray[np.int64], should: str, found: object) -> None:
        self.column = column
        self.rows = rows
        self.reason = f"{column} should {should}"
        more = f" and {counted(len(rows) - 1, 'more row')}" if len(rows) > 1 else ""
        where = f"in row {rows[0]} of the batch{more}"
        self.what = f"{place}: column '{column}' should {should}. Found {found}."
        super().__init__(f"{self.what[:-1]} {where}.")


def plain(column: Any) -> Any:
    """One Arrow array of a chunked one, without an extension type around it; views become what Arrow can filter.

    >>> plain(pa.chunked_array([[1], [2]])).to_pylist()
    [1, 2]
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.unify_dictionaries().combine_chunks() if column.num_chunks else pa.array([], column.type)
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if column.type in _VIEWS:
        column = column.cast(pa.large_string() if column.type == pa.string_view() else pa.large_binary())
    return column


def is_plain(type_: pa.DataType) -> bool:
    """Whether `plain` gives arrays of this type back as they are."""
    return not isinstance(type_, pa.BaseExtensionType) and type_ not in _VIEWS


_VIEWS = (pa.string_view(), pa.binary_view())


def is_list(type_: Any) -> bool:
    """Whether it is one of Arrow's list types."""
    return bool(
        types.is_list(type_)
        or types.is_large_list(type_)
        or types.is_fixed_size_list(type_)
        or types.is_list_view(type_)
        or types.is_large_list_view(type_)
    )


def id_key(type_: Any) -> Key | None:
    """How ids of this (not list) type are held: "int64", "uint64", "string"; None where it can hold no ids.

    >>> id_key(pa.int8()), id_key(pa.dictionary(pa.int32(), pa.string())), id_key(pa.float64())
    ('int64', 'string', None)
    """
    if types.is_dictionary(type_):
        return id_key(type_.value_type)
    if types.is_uint64(type_):
        return "uint64"
    if types.is_integer(type_) or types.is_boolean(type_) or types.is_date(type_):
        return "int64"
    texts = (types.is_string, types.is_large_string, types.is_binary, types.is_large_binary, types.is_fixed_size_binary)
    if any(test(type_) for test in texts) or type_ in _VIEWS:
        return "string"
    return None


def nulls(array: Any) -> Mask | None:
    """(n,) mask of the nulls, None where there are none."""
    if not array.null_count:
        return None
    mask: Mask = pc.is_null(array).to_numpy(zero_copy_only=False)
    return mask


def texts(array: Any) -> Any:
    """A large_binary array of strings or bytes."""
    if types.is_string(array.type) or types.is_large_string(array.type):
        array = array.cast(pa.binary() if types.is_string(array.type) else pa.large_binary())
    elif types.is_fixed_size_binary(array.type):
        array = array.cast(pa.binary())
    return array.cast(pa.large_binary())


def integers(array: Any, key: Key) -> tuple[npt.NDArray[np.int64], Mask | None]:
    """((n,) int64 of the same bits as `key`'s type, mask of what that type cannot hold or None); nulls become 0."""
    type_ = array.type
    if types.is_date(type_):
        array = array.cast(pa.date32()).cast(pa.int32())
    if array.null_count:
        array = pc.fill_null(array, False if types.is_boolean(type_) else 0)
    ids = array.to_numpy(zero_copy_only=False)
    outside: Mask | None = None
    if types.is_uint64(type_):
        ids = ids.view(np.int64)
        outside = ids < 0 if key == "int64" else None
    else:
        ids = ids.astype(np.int64, copy=False)
        outside = ids < 0 if key == "uint64" else None
    return ids, outside if outside is not None and outside.any() else None


class Words:
    """The rows of the newest dictionary: batches of a row group share it, and look it up once. Safe in threads."""

    def __init__(self, rows_of: Callable[[Any], Rows]) -> None:
        self._rows_of = rows_of
        self._newest: tuple[Any, Rows] | None = None

    def rows(self, dictionary: Any, key: Key) -> Rows:
        """(n,) rows of its words, not to be written to."""
        newest = self._newest
        if newest is None or not (_same_memory(newest[0], dictionary) or newest[0].equals(dictionary)):
            newest = self._newest = dictionary, look_up(plain(dictionary), key, self._rows_of)
        return newest[1]


def _whole_length(indices: Any) -> int:
    """How many values the array has that this one may be cut from."""
    data = indices.buffers()[1]
    return 0 if data is None else data.size * 8 // int(indices.type.bit_width)


def _same_memory(one: Any, other: Any) -> bool:
    if one.type != other.type or len(one) != len(other) or one.offset != other.offset:
        return False
    places = ([None if part is None else part.address for part in each.buffers()] for each in (one, other))
    return next(places) == next(places)


def look_up(array: Any, key: Key, rows_of: Callable[[Any], Rows], words: Words | None = None) -> Rows:
    """(n,) rows of the ids in a (not list) array: NULL_ROW for nulls, else `rows_of` keys (int64 or large_binary).

    `words`: remembers the rows of a dictionary.
    """
    if types.is_null(array.type):
        return np.full(len(array), NULL_ROW, np.int32)
    if types.is_dictionary(array.type):
        if len(array.dictionary) > _whole_length(array.indices):  # look up what is there
            return look_up(plain(array.dictionary).take(array.indices), key, rows_of)
        if not len(array.dictionary):
            return np.full(len(array), NULL_ROW, np.int32)
        rows_U = (words or Words(rows_of)).rows(array.dictionary, key)
        null_n = nulls(array.indices)
        indices = array.indices if null_n is None else pc.fill_null(array.indices, 0)
        rows_n: Rows = rows_U.take(indices.to_numpy())
    else:
        outside = None
        if key == "string":
            keys_n: Any = texts(array)
        else:
            keys_n, outside = integers(array, key)
        rows_n = rows_of(keys_n)
        if outside is not None:
            rows_n[outside] = UNSEEN_ROW
        null_n = nulls(array)
    if null_n is not None:
        rows_n[null_n] = NULL_ROW
    return rows_n


def known_keys(array: Any, key: Key, place: str) -> tuple[Any, npt.NDArray[np.int64] | None]:
    """(keys, how often each is there, or None: once) of what is not null: int64 or large_binary, for counting."""
    counts = None
    if types.is_dictionary(array.type):
        array, counts = _used_words(array)
    array = array.drop_null()
    if types.is_null(array.type):
        return pa.array([], pa.large_binary()) if key == "string" else np.zeros(0, np.int64), counts
    if key == "string":
        return texts(array), counts
    keys_n, outside = integers(array, key)
    if outside is not None:
        wish = {
            "int64": "below 2^63, since the table holds signed ids",
            "uint64": "of 0 or more, as the table's others",
        }[key]
        raise ValueError(f"`{place}` should hold ids {wish}. Found {array[int(np.flatnonzero(outside)[0])].as_py()}.")
    return keys_n, counts


def _used_words(array: Any) -> tuple[Any, npt.NDArray[np.int64]]:
    """(the words of a dictionary array that are there, how often each), without nulls."""
    words, indices = plain(array.dictionary), array.indices.drop_null()
    counts = np.bincount(indices.to_numpy(), minlength=len(words))
    null_n = nulls(words)
    if null_n is not None:
        counts[null_n] = 0
    used = np.flatnonzero(counts)
    return words.take(pa.array(used)), counts[used]


@dataclass
class Lists:
    """The elements of a list column that are kept: the last `max_length` of each list.

    `elements`: Arrow array, list after list; `lengths_B`: int64, 0 for a null list; `null_B`: mask or None;
    `full_lengths_B`: before the cut.
    """

    elements: Any
    lengths_B: npt.NDArray[np.int64]
    null_B: Mask | None
    full_lengths_B: npt.NDArray[np.int64]


def lists(array: Any, max_length: int | None = None) -> Lists:
    """Takes a list column apart.

    >>> parts = lists(pa.array([[1, 2, 3], None, []]), max_length=2)
    >>> parts.elements.to_pylist(), parts.lengths_B.tolist(), parts.null_B.tolist()
    ([2, 3], [2, 0, 0], [False, True, False])
    """
    if not (types.is_list(array.type) or types.is_large_list(array.type)):
        array = array.cast(pa.large_list(array.type.value_type))
    offsets = array.offsets.to_numpy().astype(np.int64, copy=False)
    null_B = nulls(array)
    full_B = np.diff(offsets)
    if null_B is not None:
        full_B[null_B] = 0  # Arrow allows a null list to cover elements
    lengths_B = full_B if max_length is None else np.minimum(full_B, max_length)
    base, stop = int(offsets[0]), int(offsets[-1])
    elements = plain(array.values.slice(base, stop - base))
    if int(lengths_B.sum()) != stop - base:
        first_B = offsets[1:] - lengths_B - base  # of the elements kept
        ends_B = np.cumsum(lengths_B)
        place = np.arange(int(ends_B[-1]), dtype=np.int64) + np.repeat(first_B - (ends_B - lengths_B), lengths_B)
        elements = elements.take(pa.array(place))
    return Lists(elements, lengths_B, null_B, full_B)


def with_nulls(values_n: npt.NDArray[Any], lists_B: Lists, fill: Any) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """(values, lengths_B) in which each null list is a list of the one value `fill`."""
    if lists_B.null_B is None:
        return values_n, lists_B.lengths_B
    lengths_B = np.where(lists_B.null_B, 1, lists_B.lengths_B)
    spread = np.full(int(lengths_B.sum()), fill, values_n.dtype)
    spread[np.repeat(~lists_B.null_B, lengths_B)] = values_n
    return spread, lengths_B


def is_number(type_: Any) -> bool:
    """Whether a (not list) type holds numbers: integer, float, decimal, bool, or a dictionary of these."""
    if types.is_dictionary(type_):
        return is_number(type_.value_type)
    tests = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)
    return any(test(type_) for test in tests)


def floats(array: Any) -> npt.NDArray[np.float64]:
    """(n,) float64 of a column of numbers; nulls become NaN. May be read-only."""
    if types.is_null(array.type):
        return np.full(len(array), np.nan)
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if types.is_decimal(array.type):
        array = array.cast(pa.float64())
    elif types.is_boolean(array.type):
        array = array.cast(pa.uint8())  # of which Arrow, too, makes floats with NaN where there are nulls
    values: npt.NDArray[np.float64] = array.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return values


@dataclass(frozen=True)
class Vectors:
    """A list column of vectors taken apart: `numbers` of those that are there, vector after vector; `there_B`, None: all are."""

    numbers: Any
    there_B: Mask | None
    num_rows: int
    width: int

    def as_stored(self) -> npt.NDArray[Any] | None:
        """(B, W) floats as they lie in the column, where none is null; None else."""
        if self.there_B is not None or self.numbers.null_count or not types.is_floating(self.numbers.type):
            return None
        stored_BW: npt.NDArray[Any] = self.numbers.to_numpy().reshape(self.num_rows, self.width)
        return stored_BW

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """(b, W) float64 of rows [start, stop), or up to the last one; null lists and numbers are NaN. May be read-only."""
        if self.there_B is None:
            return self._vectors(start, stop - start)
        there_b = self.there_B[start:stop]
        values_bW = np.full((len(there_b), self.width), np.nan)
        values_bW[there_b] = self._vectors(int(np.count_nonzero(self.there_B[:start])), int(np.count_nonzero(there_b)))
        return values_bW

    def _vectors(self, first: int, count: int) -> npt.NDArray[np.float64]:
        return floats(self.numbers.slice(first * self.width, count * self.width)).reshape(-1, self.width)


def vectors(array: Any, width: int, place: str, column: str) -> Vectors:
    """A list column whose lists all have `width` numbers. BadRowsError where a list has another length.

    >>> parts = vectors(pa.array([[1, 2], None]), 2, "`features.v.column`", "v")
    >>> parts.rows(0, 9).tolist()
    [[1.0, 2.0], [nan, nan]]
    """
    if types.is_null(array.type):
        return Vectors(pa.array([], pa.float64()), np.zeros(len(array), np.bool_), len(array), width)
    parts = lists(array)
    there_B = None if parts.null_B is None else ~parts.null_B
    bad = np.flatnonzero(parts.lengths_B != width if there_B is None else there_B & (parts.lengths_B != width))
    if len(bad):
        raise BadRowsError(place, column, bad, f"hold {width} numbers a row", f"{parts.lengths_B[bad[0]]} numbers")
    return Vectors(parts.elements, there_B, len(array), width)
