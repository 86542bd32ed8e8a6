"""The result of `mtrec bench` in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mtrec.terminal import say


def show(found: Mapping[str, Any], to: Console) -> None:
    """What every stage reached, ratios within rounds, and where a step's time goes."""
    about = found["about"]
    where = about["gpu"] or f"{about['processor']}, {about['cores']} cores"
    say(to, f"medians of {about['rounds']} interleaved rounds (lowest to highest)", word=where, style="bold")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (("stage", "left"), ("rows/s", "right"), ("lowest to highest", "right"), ("of its floor", "right")):
        table.add_column(name, justify=justify, no_wrap=name != "stage")  # type: ignore[arg-type]
    for name, each in found["stages"].items():
        speed = each["rows_per_second"]
        share = f"{each['of_floor']:.0%}" if "of_floor" in each else ""
        table.add_row(name, f"{speed['median']:,.0f}", f"{speed['low']:,.0f} to {speed['high']:,.0f}", share)
    to.print(table)
    if found["ratios"]:
        ratios = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("ratio, within a round", "median", "lowest to highest"):
            first = name.startswith("ratio")  # what does not fit is folded there, not cut
            ratios.add_column(name, justify="left" if first else "right", no_wrap=not first)
        for name, each in found["ratios"].items():
            ratios.add_row(name, f"{each['median']:.2f}", f"{each['low']:.2f} to {each['high']:.2f}")
        to.print(ratios)
    for name, each in found["stages"].items():
        if "phases" in each:
            shares = ", ".join(f"{phase} {share:.0%}" for phase, share in each["phases"].items() if share >= 0.005)
            say(to, f"{name}: {shares} of a step")
    for line in notes(found):
        say(to, line)


def notes(found: Mapping[str, Any]) -> list[str]:
    """Ceilings, waiting, memory, peers and startup, a line each."""
    ceilings = found["ceilings"]
    lines = [
        f"ceilings, one process: {ceilings['fp32_flops'] / 1e9:,.0f} GFLOP/s fp32, {ceilings['bf16_flops'] / 1e9:,.0f} bf16, "
        f"rows gathered at {ceilings['gather_bytes'] / 1e9:,.1f} GB/s"
    ]
    for name, each in found["stages"].items():
        if "data_wait" in each:
            peak = f", peak memory of a worker {each['peak_bytes']['median'] / 1e6:,.0f} MB"
            own = each["stage"] != "train_from_memory"  # which holds the batches, too
            lines.append(f"{name}: data wait {each['data_wait']['median']:.1%}{peak if own else ''}")
    versions = found["about"]["versions"]
    if peers := [f"{name} {versions[name]}" for name, each in found["stages"].items() if each["stage"] == "peer"]:
        lines.append(f"{', '.join(peers)}: as they come, fp32, from memory, one process on all cores")
    for name, each in found.get("startup", {}).items():
        lines.append(f"{name}: {each['median']:.2f} s ({each['low']:.2f} to {each['high']:.2f})")
    if "idle_worker_bytes" in found:
        lines.append(f"an idle Ray Train worker with torchrec imported: {found['idle_worker_bytes'] / 1e6:,.0f} MB")
    return lines
