"""Group keys: the column that per-group metrics (GAUC) group by, as int64.

Legend: N rows.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as pt

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

NULL_GROUP = int(np.iinfo(np.int64).min)  # a row without a group: in no group's AUC, and not covered

# Constants of the string hash; changing one makes keys of different processes or versions disagree.
_STEP = np.uint64(0x9E3779B97F4A7C15)
_BYTES = np.arange(1, 257, dtype=np.uint64)


def group_keys(column: pa.Array | pa.ChunkedArray, name: str = "group") -> Ints:
    """An int64 key (N,) for each row, the same for equal values in every process and batch.

    Integers, booleans, dates and times stay as they are (uint64 wraps around); strings and binary values get a 64-bit
    hash (two of 10 million different strings collide with probability 3e-6); nulls get `NULL_GROUP`. Dictionary-encoded
    columns are decoded. Raises ValueError naming `name` for other types; floats are refused, since ids above 2^53 merge
    in them.

    >>> group_keys(pa.array([7, None, 7])).tolist()
    [7, -9223372036854775808, 7]
    >>> keys = group_keys(pa.array(["ann", "bob", "ann", None]))
    >>> keys[0] == keys[2], keys[0] == keys[1], keys[3] == NULL_GROUP
    (np.True_, np.False_, np.True_)
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pt.is_dictionary(column.type):
        words = group_keys(column.dictionary, name)
        index = pc.fill_null(column.indices.cast(pa.int64()), -1).to_numpy(zero_copy_only=False)
        return np.asarray(np.append(words, NULL_GROUP)[index], np.int64)  # index -1 is the appended null
    kind = column.type
    is_text = pt.is_string(kind) or pt.is_large_string(kind)
    if is_text or pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_fixed_size_binary(kind):
        keys = _hash_binary(column.cast(pa.large_binary()))
    elif pt.is_uint64(kind):
        keys = pc.fill_null(column, 0).to_numpy(zero_copy_only=False).view(np.int64)
    elif pt.is_integer(kind) or pt.is_boolean(kind):
        keys = pc.fill_null(column.cast(pa.int64()), 0).to_numpy(zero_copy_only=False)
    elif pt.is_temporal(kind) and not pt.is_interval(kind):
        whole = pa.int32() if kind.bit_width == 32 else pa.int64()
        keys = pc.fill_null(column.view(whole), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    elif pt.is_null(kind):
        keys = np.zeros(len(column), np.int64)
    else:
        raise ValueError(f"`{name}` should be a column of integers, strings, dates or times. Found {kind}.")
    if column.null_count == 0:
        return np.asarray(keys, np.int64)
    return np.where(pc.is_null(column).to_numpy(zero_copy_only=False), NULL_GROUP, keys)


def _mix(words: Words) -> Words:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014): every input bit changes each output bit half of the
    time."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _hash_binary(column: Any) -> Ints:
    """sum over bytes of R[byte] * odd(position), plus the length, mixed; R is a table of 256 mixed words."""
    _, offsets_buffer, data_buffer = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[column.offset : column.offset + len(column) + 1]
    if len(column) == 0:
        return np.zeros(0, np.int64)
    lengths = np.diff(offsets)
    data = np.zeros(0, np.uint8) if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    data = data[offsets[0] : offsets[-1]]
    starts = offsets[:-1] - offsets[0]
    position = np.arange(len(data), dtype=np.int64) - np.repeat(starts, lengths)
    odd = _mix(np.arange(1, int(lengths.max()) + 1, dtype=np.uint64) * _STEP) | np.uint64(1)
    terms = _mix(_BYTES * _STEP)[data] * odd[position]
    sums = np.zeros(len(column), np.uint64)
    filled = lengths > 0  # reduceat gives the next value, not 0, for an empty segment
    if filled.any():
        sums[filled] = np.add.reduceat(terms, starts[filled])
    return _mix(sums + lengths.astype(np.uint64) * _STEP).view(np.int64)
