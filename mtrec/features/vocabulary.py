"""A vocabulary: the ids of one table, in the order of their rows, and the look-up of a batch of ids in it.

Every table keeps three kinds of rows: NULL_ROW for a null, UNSEEN_ROW for an id that the table does not know, and from
FIRST_ROW on the known ids. Ids are int64, uint64 (held as the int64 of the same bits) or byte strings; never floats.

Shapes: n values of a batch, V words.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mtrec.features.hashing import hash_strings
from mtrec.written import as_written

NULL_ROW = 0
UNSEEN_ROW = 1
FIRST_ROW = 2

Key = Literal["int64", "uint64", "string"]
Rows = npt.NDArray[Any]  # int32, or int64 where a table has 2^31 rows or more: `row_type`


_INT32_MAX = int(np.iinfo(np.int32).max)  # asking numpy takes as long as converting a thousand ids


def row_type(num_embeddings: int) -> type[np.signedinteger[Any]]:
    """The smallest type of numpy that holds the rows of a table with so many: half the memory for all but the largest."""
    return np.int32 if num_embeddings <= _INT32_MAX else np.int64


# Odd multipliers tried in turn: the first that keeps every word within _NEAR slots of its own is taken.
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xD6E8FEB86659FD93, 0xC2B2AE3D27D4EB4F, 0xBF58476D1CE4E5B9)
_NEAR = 64


class IntegerIndex:
    """The row of each of V distinct int64 words: word i has row FIRST_ROW + i, any other value UNSEEN_ROW.

    Where the words lie close together (range at most 8 V or 65,536) it is an array addressed by the id; else a hash
    table with open addressing and linear probing (Knuth, 1973), at most half full, 12 bytes a slot, which probes a
    whole batch at a time: of an id's home and the slots after it, until the id or an empty slot is found. The words that
    come most often, as `counts_V` says, are nearest to their homes.

    >>> index = IntegerIndex(np.array([10**18, -5, 7]))
    >>> index.rows(np.array([7, 8, 10**18])).tolist()
    [4, 1, 2]
    """

    def __init__(self, words_V: npt.NDArray[np.int64], counts_V: npt.NDArray[np.int64] | None = None) -> None:
        dtype = row_type(FIRST_ROW + len(words_V))
        rows_V = np.arange(FIRST_ROW, FIRST_ROW + len(words_V), dtype=dtype)
        self._low = int(words_V.min()) if len(words_V) else 0
        span = int(words_V.max()) - self._low + 1 if len(words_V) else 0
        self._direct: Rows | None = None
        if span <= max(8 * len(words_V), 1 << 16):
            self._direct = np.full(span + 1, UNSEEN_ROW, dtype)  # the last place answers for all that lie outside
            self._direct[words_V - self._low] = rows_V
        else:
            first = slice(None) if counts_V is None else np.argsort(-counts_V, kind="stable")
            self._build(words_V[first], rows_V[first])

    def rows(self, ids_n: npt.NDArray[np.int64]) -> Rows:
        """(n,) rows of the ids."""
        if self._direct is not None:
            # Below the lowest word the difference wraps to a huge unsigned number, and so lies outside as well.
            place = ids_n.view(np.uint64) - np.uint64(self._low % 2**64)
            np.minimum(place, np.uint64(len(self._direct) - 1), out=place)
            return self._direct[place.view(np.int64)]
        slot_n = self._home(ids_n)
        found_n = self._keys.take(slot_n, mode="wrap")  # as in [slot_n], without a check
        rows_n: Rows = self._slot_rows.take(slot_n, mode="wrap")
        missed = np.flatnonzero(found_n != ids_n)  # few: ids that came often are in their home
        missed = missed[found_n[missed] != self._empty]
        slot, wanted = slot_n[missed], ids_n[missed]
        while missed.size:
            slot = (slot + 1) & self._mask
            found = self._keys[slot]
            rows_n[missed] = self._slot_rows[slot]
            on = (found != wanted) & (found != self._empty)
            missed, slot, wanted = missed[on], slot[on], wanted[on]
        return rows_n

    def _home(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        h = ids.view(np.uint64) >> np.uint64(32)
        h ^= ids.view(np.uint64)
        h *= self._multiplier
        h >>= self._shift
        return h.view(np.int64)

    def _build(self, words_V: npt.NDArray[np.int64], rows_V: Rows) -> None:
        bits = max(int(2 * len(words_V) - 1).bit_length(), 4)
        self._mask = (1 << bits) - 1
        self._shift = np.uint64(64 - bits)
        # An empty slot holds a key that is no word, with UNSEEN_ROW: who asks for that key gets the right answer too.
        known = np.sort(words_V)
        gap = np.flatnonzero(np.diff(known.view(np.uint64)) > 1)  # unsigned, since a signed difference may overflow
        self._empty = np.int64(known[gap[0]] + 1)
        for multiplier in _MULTIPLIERS:
            self._multiplier = np.uint64(multiplier)
            if self._insert(words_V, rows_V, give_up=multiplier != _MULTIPLIERS[-1]):
                break

    def _insert(self, words_V: npt.NDArray[np.int64], rows_V: Rows, give_up: bool) -> bool:
        self._keys = np.full(self._mask + 1, self._empty, np.int64)
        self._slot_rows = np.full(self._mask + 1, UNSEEN_ROW, rows_V.dtype)
        slot, words, rows = self._home(words_V), words_V, rows_V
        distance = 0
        while words.size:
            if give_up and distance > _NEAR:
                return False
            free = np.flatnonzero(self._keys[slot] == self._empty)[::-1]
            self._keys[slot[free]] = words[free]  # of several for one slot the last one written stays: the first word
            settled = self._keys[slot] == words
            self._slot_rows[slot[settled]] = rows[settled]
            slot, words, rows = (slot[~settled] + 1) & self._mask, words[~settled], rows[~settled]
            distance += 1
        return True


class TextIndex:
    """The row of each of V distinct byte strings (large_binary); any other string has UNSEEN_ROW.

    A 64-bit hash finds the one candidate, whose bytes are then compared: two strings are never taken for each other.

    >>> index = TextIndex(pa.array([b"feed", b"shop"], pa.large_binary()))
    >>> index.rows(pa.array([b"shop", b"ad", b""], pa.large_binary())).tolist()
    [3, 1, 1]
    """

    def __init__(self, words_V: pa.LargeBinaryArray, counts_V: npt.NDArray[np.int64] | None = None) -> None:
        hashes = hash_array(words_V).view(np.int64)
        unique, first = np.unique(hashes, return_index=True)
        self._others: dict[bytes, int] = {}  # words whose hash another word has as well
        if len(unique) < len(hashes):
            first = np.sort(first)
            for place in np.setdiff1d(np.arange(len(hashes)), first):
                self._others[words_V[int(place)].as_py()] = FIRST_ROW + int(place)
        else:
            first = np.arange(len(hashes))
        self._index = IntegerIndex(hashes[first], None if counts_V is None else counts_V[first])
        self._words = words_V if len(first) == len(hashes) else words_V.take(pa.array(first))
        self._rows = (first + FIRST_ROW).astype(row_type(FIRST_ROW + len(hashes)))

    def rows(self, texts_n: pa.LargeBinaryArray) -> Rows:
        """(n,) rows of the strings; the row of a null is not defined."""
        candidate_n = self._index.rows(hash_array(texts_n).view(np.int64)) - FIRST_ROW
        if not len(self._words):
            return np.full(len(texts_n), UNSEEN_ROW, np.int32)
        same_n = np.asarray(
            pc.fill_null(pc.equal(self._words.take(pa.array(np.maximum(candidate_n, 0))), texts_n), False)
        )
        same_n &= candidate_n >= 0
        rows_n: Rows = np.where(same_n, self._rows[np.maximum(candidate_n, 0)], UNSEEN_ROW)
        if self._others:
            for place in np.flatnonzero(~same_n):
                rows_n[place] = self._others.get(texts_n[int(place)].as_py(), UNSEEN_ROW)
        return rows_n


def hash_array(texts_n: pa.LargeBinaryArray) -> npt.NDArray[np.uint64]:
    """(n,) 64-bit hashes of a large_binary array (any offset); the hash of a null is not defined."""
    _, offset_buffer, data_buffer = texts_n.buffers()
    if offset_buffer is None or not len(texts_n):
        return np.zeros(len(texts_n), np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64, len(texts_n) + 1, texts_n.offset * 8)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    return hash_strings(offsets, data)


class Vocabulary:
    """The words of a table with the counts that the last fit saw, and their look-up.

    `words` is an int64 array (also for uint64: the same bits) or a large_binary array; word i has row FIRST_ROW + i.

    >>> vocabulary = Vocabulary("int64", np.array([40, 7]), np.array([9, 3]))
    >>> vocabulary.rows(np.array([7, 8])).tolist(), len(vocabulary)
    ([3, 1], 2)
    """

    def __init__(self, key: Key, words: Any, counts_V: npt.NDArray[np.int64]) -> None:
        self.key: Key = key
        self.words = words
        self.counts_V = counts_V
        self._index = TextIndex(words, counts_V) if key == "string" else IntegerIndex(words, counts_V)

    def __len__(self) -> int:
        return len(self.words)

    def rows(self, keys_n: Any) -> Rows:
        """(n,) rows of keys of this vocabulary's type."""
        return self._index.rows(keys_n)

    def save(self, path: Path) -> None:
        """Writes a Parquet file with the columns `id` and `count`, in the order of the rows."""
        if self.key == "string":
            ids = self.words
            try:
                ids = ids.cast(pa.large_string())
            except pa.ArrowInvalid:  # bytes that are no UTF-8 stay bytes
                ids = self.words
        else:
            ids = pa.array(self.words.view(np.uint64) if self.key == "uint64" else self.words)
        pq.write_table(pa.table({"id": ids, "count": pa.array(self.counts_V)}), path, compression="zstd")

    @classmethod
    def load(cls, path: Path, key: Key) -> "Vocabulary":
        """Reads what `save` wrote."""
        with as_written(path, "Parquet"):
            table = pq.ParquetFile(path).read().combine_chunks()
        ids = table["id"].combine_chunks()
        words = ids.cast(pa.large_binary()) if key == "string" else ids.to_numpy().view(np.int64)
        return cls(key, words, table["count"].to_numpy())
