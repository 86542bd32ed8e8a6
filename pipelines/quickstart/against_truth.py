"""Prints a run's validation metrics beside those of the true probabilities: the best that any model could reach.

python pipelines/quickstart/against_truth.py RUN VALIDATION
"""

import json
import sys
from pathlib import Path

import pyarrow.dataset as ds
from rich.console import Console
from rich.table import Table

from mtrec.metrics import BinaryMetrics, DwellMetrics

COLUMNS = ["click", "conversion", "dwell_seconds", "true_p_click", "true_p_conversion", "true_dwell_seconds"]


def truth(folder: str) -> dict[str, dict[str, float]]:
    """Metrics of the true values over all rows of a folder."""
    table = ds.dataset(folder).to_table(columns=COLUMNS)
    column = {name: table.column(name).to_numpy() for name in COLUMNS}
    clicked = column["click"] == 1
    click, conversion, dwell = BinaryMetrics(), BinaryMetrics(), DwellMetrics()
    click.update(column["true_p_click"], column["click"])
    conversion.update(column["true_p_conversion"][clicked], column["conversion"][clicked])
    dwell.update(column["true_dwell_seconds"][clicked], column["dwell_seconds"][clicked])
    return {"click": click.compute(), "conversion": conversion.compute(), "dwell": dwell.compute()}


def main(run: str, validation: str) -> None:
    """Prints the table."""
    best = truth(validation)
    model = json.loads((Path(run) / "metrics.json").read_text())["tasks"]
    table = Table("task", "rows", "metric", "model", "truth", "model - truth", box=None, pad_edge=False)
    for task, rows, metric, suffix in (
        ("click", "all", "auc", ""),
        ("click", "all", "log_loss", ""),
        ("conversion", "clicked", "auc", "_given"),
        ("conversion", "clicked", "log_loss", "_given"),
        ("dwell", "clicked", "xauc", "_given"),
        ("dwell", "clicked", "sum_ratio", "_given"),
    ):
        found, wanted = model[task][metric + suffix], best[task][metric]
        table.add_row(task, rows, metric, f"{found:.4f}", f"{wanted:.4f}", f"{found - wanted:+.4f}")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main(*sys.argv[1:])
