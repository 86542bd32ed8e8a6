"""Freed memory stays with the process, unless the user has tuned glibc's allocator."""

import os
import subprocess
import sys


def test_memory_that_is_freed_is_kept_unless_the_user_tunes_the_allocator() -> None:
    script = "from mtrec.allocator import keep_freed_memory; print(keep_freed_memory())"
    for tuned, kept in (({}, "True"), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "False"), ({"GLIBC_TUNABLES": ""}, "False")):
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
        said = subprocess.run([sys.executable, "-c", script], env={**plain, **tuned}, capture_output=True, text=True, check=True)
        assert said.stdout.strip() == kept
