"""64-bit hashes of integers and strings that are the same in every process, on every platform and in every version.

Shapes: n values.
"""

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]

_LONG = 256  # bytes; strings above it are hashed one by one, so that one huge value costs no pass over the batch a word
_PRIME = np.uint64(0x9FB21C651E98DF25)


def mix64(values_n: npt.NDArray[Any]) -> UInt64s:
    """A 64-bit hash (bijective) of 64-bit integers: the output function of splitmix64 (Steele, Lea and Flood, 2014).

    `values_n` is int64 or uint64; other types raise ValueError, since they would first need a conversion.

    >>> [hex(h) for h in mix64(np.array([0, 1]))]
    ['0xe220a8397b1dcdaf', '0x910a2dec89025cc1']
    """
    if values_n.dtype not in (np.int64, np.uint64):
        raise ValueError(f"`values_n` should be int64 or uint64. Found {values_n.dtype}.")
    h = values_n.view(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    h ^= h >> np.uint64(30)
    h *= np.uint64(0xBF58476D1CE4E5B9)
    h ^= h >> np.uint64(27)
    h *= np.uint64(0x94D049BB133111EB)
    h ^= h >> np.uint64(31)
    return h


def hash_strings(offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]) -> UInt64s:
    """A 64-bit hash of each of n byte strings; string i is `data[offsets[i]:offsets[i + 1]]` (Arrow's layout).

    The strings are read in little-endian words of eight bytes, all strings at once: h = (h ^ word) x odd constant,
    folded by a shift, from a start that depends on the length; `mix64` at the end. Not for use against an adversary.

    >>> data = np.frombuffer(b"abacusab", np.uint8)
    >>> h = hash_strings(np.array([0, 2, 6, 8]), data)
    >>> bool(h[0] == h[2]), bool(h[0] == h[1])
    (True, False)
    """
    starts, lengths = offsets[:-1], np.diff(offsets)
    h = lengths.astype(np.uint64) * _PRIME
    if not len(starts):
        return h
    begin, end = int(offsets[0]), int(offsets[-1])
    padded = np.zeros(end - begin + 8, np.uint8)
    padded[: end - begin] = data[begin:end]
    # Every byte position as the start of a word; numpy reads unaligned words correctly on all platforms.
    words = np.ndarray(shape=(end - begin + 1,), dtype="<u8", buffer=padded, strides=(1,))
    starts = starts - begin
    short = lengths <= _LONG
    longest = int(lengths.max(where=short, initial=0))
    for position in range(0, longest, 8):
        active: Any = slice(None)
        if position or not short.all():
            active = np.flatnonzero(short & (lengths > position))
        rest = np.minimum(lengths[active] - position, 8)
        word = words[starts[active] + position] & _TAIL_MASK[rest]
        state = (h[active] ^ word) * _PRIME
        h[active] = state ^ (state >> np.uint64(29))
    for i in np.flatnonzero(~short):
        piece = padded[starts[i] : starts[i] + lengths[i]].tobytes()
        h[i] = int.from_bytes(hashlib.blake2b(piece, digest_size=8).digest(), "little")
    return mix64(h)


_TAIL_MASK = np.array([(1 << (8 * count)) - 1 for count in range(9)], np.uint64)  # by the number of bytes left
