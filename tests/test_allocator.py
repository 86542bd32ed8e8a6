"""Freed memory stays with the process, unless the user has tuned the allocators."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from mtrec.allocator import KEPT, huge_pages, kept

ADVISED = """
import re
from pathlib import Path
maps = Path("/proc/self/smaps").read_text()
heap = maps[maps.index("[heap]"):]
print("hg" in re.search("VmFlags: (.*)", heap)[1].split())
"""
MODES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
OLD = platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35)

PAGE_FAULTS = """
import resource, sys, tempfile, time
from pathlib import Path
from mtrec.allocator import keep_freed_memory
keep_freed_memory()
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
path = Path(tempfile.mkdtemp(dir=sys.argv[1])) / "a.parquet"
columns = {f"x{i}": np.random.default_rng(i).integers(0, 1000, 262_144) for i in range(26)}
pq.write_table(pa.table(columns), path, row_group_size=65_536)
faults = []
for _ in range(8):
    file = pq.ParquetFile(path)
    for group in range(4):
        for batch in file.iter_batches(65_536, row_groups=[group], use_threads=False):
            del batch
            time.sleep(0.03)  # in which a reader encodes what was decoded
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[2])
"""


def run(script: str, *arguments: str, **environment: str) -> str:
    tuned = ("MALLOC_", "GLIBC_", "MIMALLOC_")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(tuned)}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=True).stdout.strip()


def test_memory_that_is_freed_is_kept_unless_the_user_tunes_the_allocator() -> None:
    script = "from mtrec.allocator import keep_freed_memory; print(keep_freed_memory())"
    for tunables in ("", "glibc.malloc.hugetlb=1", "glibc.cpu.x86_rep_movsb_threshold=4096"):
        assert run(script, GLIBC_TUNABLES=tunables) == "True"
    assert run(script) == "True"
    assert run(script, MALLOC_TRIM_THRESHOLD_="131072") == "False"
    for tunables in ("glibc.malloc.trim_threshold=131072", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=8"):
        assert run(script, GLIBC_TUNABLES=tunables) == "False"


@pytest.mark.skipif(not huge_pages({}), reason="Pages of more than 4 KiB.")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.rtld.nns=4", "glibc.malloc.hugetlb=1:glibc.rtld.nns=4"),
        ("glibc.rtld.nns=4:glibc.malloc.hugetlb=0", "glibc.rtld.nns=4:glibc.malloc.hugetlb=0"),
    ],
)
def test_huge_pages_are_asked_for_beside_the_users_tunables(given: str | None, expected: str) -> None:
    assert kept({} if given is None else {"GLIBC_TUNABLES": given}) == {**KEPT, "GLIBC_TUNABLES": expected}


@pytest.mark.skipif(OLD or not MODES.exists() or "[madvise]" not in MODES.read_text(), reason="Nobody can ask for huge pages.")
def test_a_process_that_is_started_so_asks_for_huge_pages() -> None:
    asked = {name: kept({})[name] for name in ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX")}
    assert (run(ADVISED), run(ADVISED, **asked)) == ("False", "True")
    # as Ray leaves it where the cluster has no tunables of its own, and where it has one that says otherwise
    assert run(ADVISED, GLIBC_TUNABLES=asked["GLIBC_TUNABLES"] + ":") == "True"
    assert run(ADVISED, GLIBC_TUNABLES=asked["GLIBC_TUNABLES"] + ":glibc.malloc.hugetlb=0") == "False"


def test_decoded_row_groups_are_kept_for_the_next_ones(tmp_path: object) -> None:
    assert int(run(PAGE_FAULTS, str(tmp_path))) < 20  # 60 and more where Arrow gives them back


def test_the_users_own_delay_stays() -> None:
    script = "import os, mtrec.allocator as a; a.keep_freed_memory(); print(os.environ['MIMALLOC_PURGE_DELAY'])"
    assert run(script) == KEPT["MIMALLOC_PURGE_DELAY"]
    assert run(script, MIMALLOC_PURGE_DELAY="10") == "10"
