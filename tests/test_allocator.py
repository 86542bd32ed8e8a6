"""Freed memory stays with the process, unless the user has tuned the allocators."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtrec.allocator import KEPT

HUGE_PAGES = """
from pathlib import Path
block = b"1" * (48 << 20)
rollup = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
print(int(rollup["AnonHugePages"].split()[0]) >> 10)
"""
MADVISED = Path("/sys/kernel/mm/transparent_hugepage/enabled")

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
    assert run(script) == run(script, GLIBC_TUNABLES=KEPT["GLIBC_TUNABLES"]) == "True"
    assert run(script, MALLOC_TRIM_THRESHOLD_="131072") == "False"
    assert run(script, GLIBC_TUNABLES="glibc.malloc.trim_threshold=131072") == "False"


@pytest.mark.skipif(not MADVISED.exists() or "[madvise]" not in MADVISED.read_text(), reason="No huge pages where asked for.")
def test_a_process_started_with_it_has_huge_pages() -> None:
    kept = {name: KEPT[name] for name in ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX")}
    script = "from mtrec.allocator import keep_freed_memory; keep_freed_memory()\n" + HUGE_PAGES
    assert int(run(script)) < 8 < int(run(script, **kept))


def test_decoded_row_groups_are_kept_for_the_next_ones(tmp_path: object) -> None:
    assert int(run(PAGE_FAULTS, str(tmp_path))) < 20  # 60 and more where Arrow gives them back


def test_the_users_own_delay_stays() -> None:
    script = "import os, mtrec.allocator as a; a.keep_freed_memory(); print(os.environ['MIMALLOC_PURGE_DELAY'])"
    assert run(script) == KEPT["MIMALLOC_PURGE_DELAY"]
    assert run(script, MIMALLOC_PURGE_DELAY="10") == "10"
