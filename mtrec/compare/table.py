"""The table of a comparison in the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mtrec.compare.verdict import none_seen, shown
from mtrec.terminal import say

COLOURS = {"better": "green", "worse": "red"}


def summary(results: Mapping[str, Any]) -> list[str]:
    """The verdicts, task by task; where several variants do not differ, these in one sentence."""
    lines = []
    for task in results["primary"]:
        rows = [r for r in results["differences"] if r["primary"] and r["task"] == task and r["variant"] != results["again"]]
        same = [row for row in rows if row["outcome"] == "no difference" and row["detectable"] is not None]
        folded = same if len(same) > 1 else []
        lines += [row["verdict"] for row in rows if row not in folded]
        told: dict[str, list[Mapping[str, Any]]] = {}
        for row in folded:
            told.setdefault(none_seen(row["metric"], row["detectable"]), []).append(row)
        for none, alike in told.items():
            names = ", ".join(row["variant"] + (" (once corrected)" if _excludes_0(row) else "") for row in alike)
            ends = dict.fromkeys(shown(extreme(row["detectable"] for row in alike)) for extreme in (min, max))
            seen = none or f"{' to '.join(ends)} would be seen"
            lines.append(f"{task}: no difference to {results['baseline']} found for {names}; {seen}")
    return lines


def _excludes_0(row: Mapping[str, Any]) -> bool:
    return row["low"] is not None and (row["low"] > 0 or row["high"] < 0)


def signed(value: float, digits: int = 4) -> str:
    """A difference; one that is 0 in these digits has no sign.

    >>> signed(0.00123), signed(-0.00001)
    ('+0.0012', '0.0000')
    """
    text = f"{value:+.{digits}f}"
    return text if float(text) else text.lstrip("+-")


def show_results(results: Mapping[str, Any], to: Console) -> None:
    """A row a variant: each task's primary metric as difference to the baseline with its interval; then the verdicts."""
    primary, baseline = results["primary"], results["baseline"]
    seeds = len(results["seeds"])
    users = f", {results['test_users']:,} users" if results["test_users"] else ", rows taken as independent (no user column)"
    what = f"against {baseline}; {seeds} seeds, {results['test_rows']:,} test rows{users}"
    say(to, what, word=results["name"], style="bold")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("variant", no_wrap=True)
    for task, metric in primary.items():
        table.add_column(f"{task} {metric}", justify="right")
    for name in ("dense par.", "train rows/s", "peak MB"):
        table.add_column(name, justify="right")
    rows = {(row["variant"], row["task"]): row for row in results["differences"] if row["primary"]}
    for name, variant in results["variants"].items():
        cells: list[str | Text] = []
        for task, metric in primary.items():
            row = rows.get((name, task))
            if row is None:
                value = variant["metrics"][task][metric]["value"]
                cells.append("-" if value is None else f"{value:.4f}")
            elif row["value"] is None:
                cells.append("undefined")
            else:
                colour = COLOURS.get(row["outcome"], "")
                text = f"{signed(row['value'])} ± {(row['high'] - row['low']) / 2:.4f}"
                cells.append(Text(text, colour))
        cost = variant["cost"]
        speed = cost["train_rows_per_second"]
        cells += [
            f"{cost['dense_parameters']:,.0f}",
            f"{speed:,.0f}" if speed else "-",
            f"{cost['peak_memory_bytes'] / 1e6:,.0f}",
        ]
        flag = " (seesaw)" if results["across"][name]["seesaw"] else ""
        table.add_row(name + flag, *cells)
    to.print(table)
    for line in summary(results):
        say(to, line)
    for note in results["notes"]:
        say(to, note, word="note", style="yellow")
