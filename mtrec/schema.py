"""One type for a column that files hold in different ones: int32 beside int64, dictionaries beside plain text, ...

Only safe conversions: every value stays what it was, or reading stops with an error that names the file.
"""

import pyarrow as pa

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
