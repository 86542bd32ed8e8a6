"""Hashes of ids: of the value alone, the same in every process, evenly spread."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
from encoders import FAST
from hypothesis import given
from hypothesis import strategies as st

from mtrec.features import vocabulary as vocabulary_module
from mtrec.features.hashing import mix64


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
