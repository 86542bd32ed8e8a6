"""What the hardware allows: measured rates of matrix products and of gathering rows, and the rows/s that follow from them."""

import time
from collections.abc import Callable

import torch

from mtrec.architectures.products import linear

REPEATS = 7


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several: a ceiling is what the hardware can do when nothing disturbs it."""
    found = []
    for _ in range(REPEATS + 2):  # the first two warm up
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[2:])


def matmul_flops(dtype: torch.dtype, device: torch.device, rows: int = 2048, width: int = 1024) -> float:
    """Floating-point operations a second of this process in a product (rows x width) @ (width x width), as the model makes it."""
    rows = rows if device.type == "cpu" else 8 * rows
    width = width if device.type == "cpu" else 4 * width
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, width, device=device).to(dtype)
    return 2 * rows * width * width / timed(lambda: linear(a, b), device)


def gather_bytes(device: torch.device, num_rows: int = 3_000_000, dim: int = 16, looked_up: int = 130_000) -> float:
    """Bytes a second that looking up rows of `dim` float32 at random places of a table moves, reading alone."""
    looked_up = looked_up if device.type == "cpu" else 64 * looked_up  # fewer take a GPU as long as starting it
    table = torch.zeros(num_rows, dim, device=device)
    rows = torch.randint(0, num_rows, (looked_up,), device=device)
    return looked_up * dim * 4 / timed(lambda: table.index_select(0, rows), device)


def floor_rows_per_second(flops_per_row: float, flops_rate: float, bytes_per_row: float, bytes_rate: float) -> float:
    """Rows/s if only matrix products and table rows took time, one after the other.

    >>> floor_rows_per_second(4e6, 2e11, 8_000, 1e10)
    48076.92307692308
    """
    return 1.0 / (flops_per_row / flops_rate + bytes_per_row / bytes_rate)
