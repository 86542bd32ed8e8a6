"""Group keys: equal for equal values of any encoding, the same in every process."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from mtrec.metrics import NULL_GROUP, group_keys


def test_group_keys_are_equal_for_equal_values_of_any_encoding():
    words = ["", "a", "b", "ab", "ba", None, "a", "\0", "\0\0", "ünï", "user_1234567890", "user_1234567891"]
    keys = group_keys(pa.array(words))
    assert keys[5] == NULL_GROUP
    assert keys[1] == keys[6]
    assert len(set(keys.tolist())) == len(set(words))
    plain = pa.array(words)
    for other in (
        pa.array(words, pa.large_string()),
        plain.dictionary_encode(),
        plain.cast(pa.binary()),
        pa.chunked_array([plain[:4], plain[4:]]),
        pa.concat_arrays([pa.array(["x", None]), plain])[2:],
    ):
        assert group_keys(other).tolist() == keys.tolist()
    assert group_keys(plain[3:5]).tolist() == keys[3:5].tolist()
    assert group_keys(pa.array([], pa.string())).tolist() == []
    assert group_keys(pa.array(["a"])).tolist() == [keys[1]]
    big = pa.array([str(number) for number in range(300_000)])
    assert len(np.unique(group_keys(big))) == 300_000


def test_the_string_hash_is_the_same_in_every_process():
    program = "import pyarrow as pa; from mtrec.metrics import group_keys; print(group_keys(pa.array(['user_7', ''])))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True).stdout
    assert found.strip() == str(group_keys(pa.array(["user_7", ""])))


def test_group_keys_of_integers_dates_and_others():
    big = [2**53 + 1, None, -5]
    assert group_keys(pa.array(big)).tolist() == [2**53 + 1, NULL_GROUP, -5]
    assert group_keys(pa.array([3, None], pa.int8())).tolist() == [3, NULL_GROUP]
    assert group_keys(pa.array([2**64 - 1, None], pa.uint64())).tolist() == [-1, NULL_GROUP]
    assert group_keys(pa.array([True, None, False])).tolist() == [1, NULL_GROUP, 0]
    assert group_keys(pa.array([19_000, None], pa.date32())).tolist() == [19_000, NULL_GROUP]
    assert group_keys(pa.array([10**15], pa.timestamp("us", "UTC"))).tolist() == [10**15]
    assert group_keys(pa.nulls(2)).tolist() == [NULL_GROUP] * 2
    with pytest.raises(ValueError, match=r"`evaluation\.group` should be a column of integers.* Found double\."):
        group_keys(pa.array([1.0]), "evaluation.group")
