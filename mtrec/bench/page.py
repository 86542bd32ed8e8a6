"""The result of `mtrec bench` as one self-contained page: speeds beside yardstick and floor, and where a step's time goes."""

from collections.abc import Mapping
from typing import Any

from mtrec.bench.table import notes
from mtrec.compare.page import Page

PHASES = {
    "lookup": "#4c78a8",
    "forward": "#54a24b",
    "backward": "#e4a11b",
    "flags": "#b279a2",
    "tables": "#e45756",
    "optimizer": "#72b7b2",
    "between": "#9d9da1",
}


def page(found: Mapping[str, Any]) -> str:
    """The HTML text."""
    about = found["about"]
    made = Page("mtrec bench")
    where = about["gpu"] or f"{about['processor']}, {about['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    made.paragraph(f"{where}; {about['rounds']} interleaved rounds of up to {about['steps']} steps; {versions}", "soft")
    made.heading("Rows a second")
    made.paragraph(
        "Medians, lowest and highest round. The floor is what the measured rates of matrix products and of gathering rows "
        "allow for this model on so many cores, if nothing else took time."
    )
    made.figures([_speeds(found)], wide=True)
    if any("phases" in each for each in found["stages"].values()):
        made.heading("Where the time of a step goes")
        made.paragraph(
            "lookup and tables: reading and updating rows, with the exchange between workers; flags: waiting for the other "
            "workers' word that all gradients are finite."
        )
        made.figures([_phases(found)], wide=True)
    made.heading("Ratios within a round")
    rows = [[name, f"{r['median']:.2f}", f"{r['low']:.2f} to {r['high']:.2f}"] for name, r in found["ratios"].items()]
    made.table(["ratio", "median", "lowest to highest"], rows, numbers=(1, 2))
    made.bullets(notes(found))
    return made.text()


def _layout(height: int, title: str, **more: Any) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 190, "r": 40, "t": 12, "b": 52},
        "xaxis": {"title": {"text": title}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed", "automargin": True},
        **more,
    }


def _speeds(found: Mapping[str, Any]) -> dict[str, Any]:
    stages = found["stages"]
    names = list(stages)
    speeds = [each["rows_per_second"] for each in stages.values()]
    medians = [each["median"] for each in speeds]
    measured = {  # dots: on a logarithmic axis the length of a bar would mean nothing
        "type": "scatter",
        "mode": "markers+text",
        "name": "measured",
        "y": names,
        "x": medians,
        "text": [f"{value:,.0f}" for value in medians],
        "textposition": "top center",
        "marker": {"color": "#4c78a8", "size": 10},
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [each["high"] - each["median"] for each in speeds],
            "arrayminus": [each["median"] - each["low"] for each in speeds],
        },
    }
    floors = {
        "type": "scatter",
        "mode": "markers",
        "name": "floor",
        "y": [name for name in names if "floor" in stages[name]],
        "x": [each["floor"] for each in stages.values() if "floor" in each],
        "marker": {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": "#e45756"}},
    }
    layout = _layout(120 + 38 * len(names), "rows/s (logarithmic)", legend={"orientation": "h", "y": 1.08})
    layout["xaxis"] = {"title": {"text": "rows/s (logarithmic)"}, "type": "log"}
    layout["margin"]["t"] = 44
    return {"data": [measured, floors], "layout": layout}


def _phases(found: Mapping[str, Any]) -> dict[str, Any]:
    stages = {name: each for name, each in found["stages"].items() if "phases" in each}
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": phase,
            "y": list(stages),
            "x": [100 * each["phases"].get(phase, 0.0) for each in stages.values()],
            "marker": {"color": colour},
        }
        for phase, colour in PHASES.items()
    ]
    legend = {"orientation": "h", "y": 1.25}
    layout = _layout(150 + 34 * len(stages), "per cent of a step", barmode="stack", legend=legend)
    layout["margin"]["t"] = 60
    return {"data": traces, "layout": layout}
