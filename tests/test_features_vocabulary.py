"""A vocabulary finds every one of its words and nothing else, and its file can be read by others."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mtrec.features import FIRST_ROW, UNSEEN_ROW
from mtrec.features import vocabulary as vocabulary_module
from mtrec.features.vocabulary import IntegerIndex, TextIndex, Vocabulary


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


def test_integer_index_finds_words_that_no_multiplier_brings_near_their_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "_NEAR", 0)
    words = np.unique(np.random.default_rng(3).integers(-(2**63), 2**63 - 1, 2000))
    assert IntegerIndex(words).rows(words).tolist() == list(range(FIRST_ROW, FIRST_ROW + 2000))


def test_words_that_come_most_often_are_the_nearest_to_their_home() -> None:
    words = np.unique(np.random.default_rng(4).integers(-(2**63), 2**63 - 1, 3000))
    counts = np.random.default_rng(5).permutation(len(words))
    index = Vocabulary("int64", words, counts)._index
    assert isinstance(index, IntegerIndex)
    assert index.rows(words).tolist() == list(range(FIRST_ROW, FIRST_ROW + len(words)))
    at_home = index._keys[index._home(words)]
    count_of = dict(zip(words.tolist(), counts.tolist(), strict=True))
    assert all(count_of[there] >= count_of[word] for there, word in zip(at_home.tolist(), words.tolist(), strict=True))
    assert np.count_nonzero(at_home == words) > 2000


def test_a_slice_of_strings_is_looked_up_as_its_own_rows() -> None:
    texts = pa.array([b"other", b"a", None, b"bcd", b"", b"a"], pa.large_binary())
    for index in (TextIndex(pa.array([b"bcd", b"a", b""], pa.large_binary())), TextIndex(texts[3:])):
        whole = index.rows(texts)
        for start in range(len(texts)):
            known = [place for place in range(start, len(texts)) if texts[place].is_valid]
            assert index.rows(texts[start:])[[place - start for place in known]].tolist() == whole[known].tolist()
    assert whole[[0, 1, 3, 4]].tolist() == [UNSEEN_ROW, 4, 2, 3]


def test_strings_with_one_hash_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_module, "hash_strings", lambda offsets, data: np.diff(offsets).astype(np.uint64))
    words = pa.array([b"aa", b"b", b"cc", b"dd"], pa.large_binary())
    index = TextIndex(words)
    queries = pa.array([b"dd", b"cc", b"b", b"aa", b"zz", b"", b"c"], pa.large_binary())
    assert index.rows(queries).tolist() == [5, 4, 3, 2, 1, 1, 1]


def test_a_vocabulary_file_can_be_read_by_others(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    Vocabulary("string", pa.array([b"b", b"a"], pa.large_binary()), np.array([3, 1])).save(tmp_path / "v.parquet")
    assert pq.read_table(tmp_path / "v.parquet").to_pydict() == {"id": ["b", "a"], "count": [3, 1]}
    Vocabulary("string", pa.array([b"\xff"], pa.large_binary()), np.array([3])).save(tmp_path / "v.parquet")
    assert pq.read_table(tmp_path / "v.parquet")["id"].to_pylist() == [b"\xff"]
    Vocabulary("uint64", np.array([-1]), np.array([3])).save(tmp_path / "v.parquet")
    assert pq.read_table(tmp_path / "v.parquet")["id"].to_pylist() == [2**64 - 1]
