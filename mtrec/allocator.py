"""What becomes of memory that is freed: kept for the next step, not given back to the kernel. And how large its pages are."""

import ctypes
import os
import platform
import re
from collections.abc import Mapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
KEPT = {
    "MALLOC_ARENA_MAX": "1",  # Ray's workers train in a thread, whose own arena would give freed memory back each step
    "MIMALLOC_PURGE_DELAY": "60000",  # milliseconds; Arrow's allocator gives back what was not used for 10
}
"""Environment of processes that are to keep freed memory from their start."""
TUNABLES = "GLIBC_TUNABLES"
LARGEST_KEPT = 64 << 20
KEPT_AT_THE_END = 256 << 20


def kept(environment: Mapping[str, str]) -> dict[str, str]:
    """What a process that trains, scores or reads is to have in its environment from its start: `KEPT`, and `huge_pages` beside
    glibc's other tunables; each as `environment` has it, where it says something of it.

    >>> kept({"MALLOC_ARENA_MAX": "2", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) == {
    ...     "MALLOC_ARENA_MAX": "2", "MIMALLOC_PURGE_DELAY": "60000", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    True
    """
    asked, tunables = huge_pages(environment), environment.get(TUNABLES, "")
    if asked not in tunables:
        tunables = f"{asked}:{tunables}" if tunables else asked
    return {**{name: environment.get(name, value) for name, value in KEPT.items()}, **({TUNABLES: tunables} if tunables else {})}


def huge_pages(environment: Mapping[str, str]) -> str:
    """The tunable of glibc that has its heap in pages of 2 MiB, where the kernel gives some to those that ask: fewer addresses to
    look up. As `environment` has it, else on; empty where a page is more than 4 KiB, for huge ones are then up to 512 MiB.
    """
    found = re.search(r"glibc\.malloc\.hugetlb=\w+", environment.get(TUNABLES, ""))
    if found:
        return found[0]
    return "glibc.malloc.hugetlb=1" if hasattr(os, "sysconf") and os.sysconf("SC_PAGE_SIZE") == 4096 else ""


def keep_freed_memory() -> bool:
    """Lets glibc keep blocks of up to 64 MiB, and 256 MiB at the end of its heap, when they are freed; whether it does now.

    By itself it gives large activations back to the kernel at the end of a backward pass, and the next step gets them page
    by page, each cleared: up to a sixth of a step. Threads that begin later share the main heap, not one of their own, which
    would give back whatever lies in 64 MiB that are free; but where threads have had one before this is called, as those that
    importing torch starts, later ones take these. So it is called first, or `KEPT` is in the environment.
    Nothing is changed on other C libraries, nor where the environment already tunes glibc's heap (a variable MALLOC_..._, or
    glibc.malloc.... in GLIBC_TUNABLES other than the size of pages): MALLOC_TRIM_THRESHOLD_=131072 switches this off.

    Arrow has an allocator of its own, which gives decoded row groups back before the next one is decoded; where pyarrow is
    imported after this, it keeps them for a minute. MIMALLOC_PURGE_DELAY=10 switches that off.
    """
    os.environ.setdefault("MIMALLOC_PURGE_DELAY", KEPT["MIMALLOC_PURGE_DELAY"])
    tuned = any(name.startswith("MALLOC_") and name.endswith("_") for name in os.environ)
    tuned = tuned or re.search(r"glibc\.malloc\.(?!hugetlb)", os.environ.get(TUNABLES, "")) is not None
    if tuned or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    if "MALLOC_ARENA_MAX" not in os.environ:
        libc.mallopt(M_ARENA_MAX, 1)
    return bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and libc.mallopt(M_TRIM_THRESHOLD, KEPT_AT_THE_END))
