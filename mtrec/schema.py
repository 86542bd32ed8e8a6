"""One schema for many files: one type for a column that they hold in different ones, and for partition keys.

int32 beside int64, dictionaries beside plain text, ...: only safe conversions, so that every value stays what it was, or
reading stops with an error that names the file. Columns may be missing where that is asked for.
"""

import datetime
import re
from collections.abc import Collection, Mapping, Sequence

import pyarrow as pa

from mtrec.files import File, Location, several
from mtrec.kinds import nearest

_UNITS = ("s", "ms", "us", "ns")


def plain(type_: pa.DataType) -> pa.DataType:
    """The type without its encoding: dictionaries and views as what they hold, list items under one name.

    >>> plain(pa.dictionary(pa.int32(), pa.string()))
    DataType(string)
    """
    if pa.types.is_dictionary(type_):
        return plain(type_.value_type)
    if pa.types.is_string_view(type_):
        return pa.string()
    if pa.types.is_binary_view(type_):
        return pa.binary()
    if pa.types.is_date64(type_):
        return pa.date32()
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(plain(type_.value_type), type_.list_size)
    if pa.types.is_large_list(type_) or pa.types.is_large_list_view(type_):
        return pa.large_list(plain(type_.value_type))
    if pa.types.is_list(type_) or pa.types.is_list_view(type_):
        return pa.list_(plain(type_.value_type))
    return type_


def is_text(type_: pa.DataType) -> bool:
    """Whether a column holds text or bytes, or lists of them, as dictionaries or not.

    >>> is_text(pa.list_(pa.string())), is_text(pa.dictionary(pa.int32(), pa.string())), is_text(pa.int64())
    (True, True, False)
    """
    type_ = plain(type_)
    if _is_list(type_):
        type_ = type_.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(type_) for test in tests)


def as_dictionary(type_: pa.DataType) -> pa.DataType:
    """The type of a column of text that is read as dictionary arrays.

    >>> as_dictionary(pa.list_(pa.string()))
    ListType(list<item: dictionary<values=string, indices=int32, ordered=0>>)
    """
    if pa.types.is_fixed_size_list(type_):
        return pa.list_(as_dictionary(type_.value_type), type_.list_size)
    if pa.types.is_large_list(type_):
        return pa.large_list(as_dictionary(type_.value_type))
    if pa.types.is_list(type_):
        return pa.list_(as_dictionary(type_.value_type))
    return pa.dictionary(pa.int32(), type_)


def holds_dictionary(type_: pa.DataType) -> bool:
    """Whether it is the type of dictionary arrays, or of lists of them."""
    return bool(pa.types.is_dictionary(type_.value_type if _is_list(type_) else type_))


def common_type(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The narrowest type that holds the values of two `plain` types exactly, or None where there is no such type.

    Integers beside floats become float64; a value beyond 2^53 is then an error when it is met, never a rounded id.

    >>> common_type(pa.int32(), pa.int64()), common_type(pa.list_(pa.int8()), pa.large_list(pa.int64()))
    (DataType(int64), LargeListType(large_list<item: int64>))
    >>> common_type(pa.int64(), pa.string()) is None
    True
    """
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if _is_number(one) and _is_number(other):
        return _common_number(one, other)
    for small, large in ((pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())):
        if {one, other} == {small, large}:
            return large
    if pa.types.is_timestamp(one) and pa.types.is_timestamp(other) and one.tz == other.tz:
        return pa.timestamp(max(one.unit, other.unit, key=_UNITS.index), one.tz)
    if _is_list(one) and _is_list(other):
        fixed = [type_.list_size for type_ in (one, other) if pa.types.is_fixed_size_list(type_)]
        value = common_type(one.value_type, other.value_type)
        if value is None or (len(fixed) == 2 and fixed[0] != fixed[1]):
            return None
        if len(fixed) == 2:
            return pa.list_(value, fixed[0])
        wide = pa.types.is_large_list(one) or pa.types.is_large_list(other)
        return pa.large_list(value) if wide else pa.list_(value)
    return None


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_boolean(type_))


def _is_list(type_: pa.DataType) -> bool:
    return bool(pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_))


def _common_number(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if pa.types.is_boolean(one):
        return other
    if pa.types.is_boolean(other):
        return one
    if pa.types.is_floating(one) and pa.types.is_floating(other):
        return max(one, other, key=lambda type_: type_.bit_width)
    if pa.types.is_floating(one) or pa.types.is_floating(other):
        return pa.float64()
    if pa.types.is_signed_integer(one) == pa.types.is_signed_integer(other):
        return max(one, other, key=lambda type_: type_.bit_width)
    return pa.int64()


def key_types(locations: Sequence[Location]) -> dict[str, pa.DataType]:
    """{partition key: its type}: dates where all values of a key are dates, integers where all are integers, else text."""
    values: dict[str, set[str]] = {}
    for location in locations:
        for key, value in location.keys:
            values.setdefault(key, set()).update(() if value is None else (value,))
    return {key: _key_type(found) for key, found in values.items()}


def _key_type(values: set[str]) -> pa.DataType:
    if values and all(re.fullmatch(r"-?\d{1,18}", value) for value in values):
        return pa.int64()
    try:
        for value in values:
            datetime.date.fromisoformat(value if re.fullmatch(r"\d{4}-\d\d-\d\d", value) else "no date")
    except ValueError:
        return pa.string()
    return pa.date32() if values else pa.string()


def key_value(value: str | None, type_: pa.DataType) -> int | str | datetime.date | None:
    """The value of a partition key in the key's type."""
    if value is None or pa.types.is_string(type_):
        return value
    return int(value) if pa.types.is_integer(type_) else datetime.date.fromisoformat(value)


def unify(
    columns: Sequence[str],
    files: Sequence[File],
    partition_types: Mapping[str, pa.DataType],
    optional: Collection[str],
    place: str,
    asked_by: Mapping[str, Sequence[str]],
) -> tuple[dict[str, pa.DataType], list[str]]:
    """{column: type for all files}, and notes that say where files differ.

    Raises ValueError naming `place` (a YAML path) and the files, where some lack a column that is not `optional` (with its
    keys in `asked_by`: {column: YAML paths}), or hold types that do not go together.
    """
    types: dict[str, pa.DataType] = {}
    notes = []
    for name in columns:
        first: dict[pa.DataType, File] = {}  # the first file with each type
        absent = []
        for file in files:
            if any(key == name for key, _ in file.location.keys):
                first.setdefault(partition_types[name], file)
            elif (position := file.schema.get_field_index(name)) >= 0:
                first.setdefault(file.schema.field(position).type, file)
            else:
                absent.append(file)
        if absent and name not in optional:
            raise ValueError(_missing_column(name, absent, files, place, asked_by.get(name, ())))
        if absent and len(absent) < len(files):
            notes.append(f"Column '{name}' is missing from {several(absent)} and null there.")
        elif absent:
            notes.append(f"Column '{name}' is in no file of `{place}` and null everywhere.")
        common: pa.DataType = pa.null()
        for type_, file in first.items():
            if pa.types.is_list_view(type_) or pa.types.is_large_list_view(type_):
                raise ValueError(
                    f"`{place}`: column '{name}' should hold lists. Found {type_} in '{file.path}', which pyarrow does not read "
                    "right: write it as list."
                )
            wider = common_type(common, plain(type_))
            if wider is None:
                before = next(path for other, path in first.items() if common_type(plain(other), plain(type_)) is None)
                raise ValueError(
                    f"`{place}` should have one type for column '{name}' in all files. "
                    f"Found {_type_of(before, name)} in '{before.path}' and {type_} in '{file.path}'."
                )
            common = wider
        if len(first) > 1:
            found = ", ".join(f"{type_} in '{file.path}'" for type_, file in first.items())
            notes.append(f"Column '{name}' is read as {common}; found {found}.")
        types[name] = common
    return types, notes


def _type_of(file: File, name: str) -> str:
    return str(file.schema.field(name).type) if name in file.schema.names else "a partition key"


def _missing_column(name: str, absent: Sequence[File], files: Sequence[File], place: str, keys: Sequence[str]) -> str:
    known = _shared_columns(absent)
    hint = nearest(name, known)
    if len(absent) < len(files):
        hint += " Other files have it."
    elif not hint:
        hint = f" Columns there: {', '.join(known[:40])}{', ...' if len(known) > 40 else ''}."
    features = [f"`{key}`" for key in keys if key.startswith("features.")]
    if keys and len(features) == len(keys):  # a label, a weight or a group cannot be optional
        hint += f" `optional: true` on {' and '.join(features)} reads it as null where it is missing."
    asked = " and ".join(f"`{key}`" for key in keys)
    what = f"'{name}'" + (f", which {asked} {'asks' if len(keys) == 1 else 'ask'} for" if keys else "")
    return f"`{place}` should have a column {what}. Found none in {several(absent)}.{hint}"


def _shared_columns(files: Sequence[File]) -> list[str]:
    shared = None
    for file in files:
        names = dict.fromkeys([*file.schema.names, *(key for key, _ in file.location.keys)])
        shared = names if shared is None else {name: None for name in shared if name in names}
    return list(shared or ())


def check_column(name: str, files: Sequence[File], partition_types: Mapping[str, pa.DataType], place: str) -> None:
    """Raises ValueError naming `place` where no file has the column `name`."""
    known = dict.fromkeys([*(name for file in files for name in file.schema.names), *partition_types])
    if name not in known:
        raise ValueError(f"`{place}` should name a column of the data. Found '{name}'.{nearest(name, known)}")
