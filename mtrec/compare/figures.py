"""The plots of a report as plain Plotly figures ({"data", "layout"}); colours of text and grid are the page's business."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mtrec.compare.drawing import (
    COLOURS,
    FEW,
    PLOT_PIXELS,
    POINTS_SHOWN,
    WIDE_PIXELS,
    Figure,
    Style,
    dots,
    figure,
    height_of,
    line,
    named,
    named_below,
    short,
    style,
)

MANY = 6  # variants beyond which a heat map takes the page's width


def styles(results: Mapping[str, Any]) -> dict[str, Style]:
    """{variant: style}; the baseline alone is grey, the points of a preference sweep have one style together."""
    swept = {point: name for name, sweep in results.get("sweeps", {}).items() for point in sweep}
    groups = list(dict.fromkeys(swept.get(name, name) for name in results["variants"]))
    places = {name: groups.index(swept.get(name, name)) for name in results["variants"]}
    return {name: Style(COLOURS[0]) if place == 0 else style(place - 1) for name, place in places.items()}


def legend(results: Mapping[str, Any], again: bool = False) -> dict[str, str]:
    """{name: colour} for a page, a sweep under its own name; `again`: with the A/A row."""
    looks, found = styles(results), {}
    swept = {point: name for name, sweep in results.get("sweeps", {}).items() for point in sweep}
    for name, variant in results["variants"].items():
        if again or not variant["again"]:
            sweep = swept.get(name)
            label = name if sweep is None else f"{sweep} ({len(results['sweeps'][sweep])} preferences)"
            found[f"{label} ({looks[name].words})" if looks[name].words else label] = looks[name].colour
    return found


def metric_intervals(results: Mapping[str, Any], task: str, metric: str) -> Figure:
    """A dot and its interval a variant, and a small mark for each seed."""
    names, looks = list(results["variants"]), styles(results)
    data: list[Figure] = []
    for name in names:
        found = results["variants"][name]["metrics"][task][metric]
        if found["value"] is None:
            continue
        seeds = [value for value in found["by_seed"].values() if value is not None]
        look = dataclasses.replace(looks[name], symbol="line-ns-open")
        data.append(dots(seeds, [name] * len(seeds), look, name, size=6, opacity=0.55))
        data.append(_interval(found, name, looks[name]))
    return figure(data, f"{task}: {metric}", metric, height=height_of(len(names)), yaxis=_categories(names))


def differences(results: Mapping[str, Any], task: str, metric: str) -> Figure:
    """Variant minus baseline with its interval, and the line of no difference."""
    rows = [row for row in results["differences"] if (row["task"], row["metric"]) == (task, metric) and row["value"] is not None]
    looks = styles(results)
    names = [name for name in results["variants"] if name != results["baseline"]]
    data = [_interval(row, row["variant"], looks[row["variant"]]) for row in rows]
    line = {
        "type": "line",
        "x0": 0,
        "x1": 0,
        "yref": "paper",
        "y0": 0,
        "y1": 1,
        "line": {"width": 1, "dash": "dot", "color": "#888"},
    }
    title = f"{task}: {metric} minus {short(results['baseline'])}'s"
    axes: dict[str, Any] = {"yaxis": _categories(names), "xaxis": {"nticks": 4}}
    return figure(data, title, "difference", height=height_of(len(names)), shapes=[line], **axes)


def _interval(found: Mapping[str, Any], name: str, look: Style) -> Figure:
    value, low, high = found["value"], found["low"], found["high"]
    dot = dots([value], [name], look, name, size=10)
    if low is not None and high is not None:
        dot["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [high - value],
            "arrayminus": [value - low],
            "color": look.colour,
            "thickness": 2,
            "width": 5,
        }
        dot["hovertemplate"] = f"{name}: %{{x:.5f}} ({low:.5f} to {high:.5f})<extra></extra>"
    return dot


def _categories(names: Sequence[str]) -> Figure:
    # top to bottom in the order of the table, half a row of room at both ends
    order = {"categoryorder": "array", "categoryarray": list(reversed(names)), "range": [-0.6, len(names) - 0.4]}
    return {**named(names), **order}


def variance_sources(results: Mapping[str, Any], task: str, metric: str) -> Figure:
    """Variance of the difference over users and over seeds, in units of the metric squared."""
    rows = [row for row in results["differences"] if (row["task"], row["metric"]) == (task, metric) and row["value"] is not None]
    names = [name for name in results["variants"] if name != results["baseline"]]
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "y": [row["variant"] for row in rows],
            "x": [row[f"variance_{what}"] for row in rows],
            "name": label,
            "marker": {"color": colour},
        }
        for what, label, colour in (
            ("users", "test users" if results["test_users"] else "test rows", COLOURS[1]),
            ("seeds", "seeds", COLOURS[2]),
        )
    ]
    return figure(
        data,
        f"{task}: {metric}",
        "variance",
        height=height_of(len(names)) + 30,
        yaxis=_categories(names),
        xaxis={"exponentformat": "e", "nticks": 4, "rangemode": "tozero"},
        barmode="stack",
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
        margin={"l": 8, "r": 16, "t": 66, "b": 14},
    )


def learning_curves(results: Mapping[str, Any], task: str) -> Figure:
    """Mean of the validation metric over seeds, with a band of one standard deviation."""
    looks, data, metric = styles(results), [], ""
    for name, variant in results["variants"].items():
        curve = variant["curves"]["validation"].get(task)
        points = [each for each in (curve or {"mean": []})["mean"] if each[1] is not None]
        if not points or variant["again"]:
            continue
        metric = curve["metric"]
        steps, means, sds = [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]
        band = [m + s for m, s in zip(means, sds, strict=True)] + [
            m - s for m, s in zip(reversed(means), reversed(sds), strict=True)
        ]
        base: Figure = {"type": "scatter", "legendgroup": name, "name": name}
        data.append(
            {
                **base,
                "x": steps + steps[::-1],
                "y": band,
                "fill": "toself",
                "fillcolor": looks[name].colour,
                "opacity": 0.13,
                "line": {"width": 0},
                "mode": "lines",
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
        data.append({**base, "x": steps, "y": means, **_line(looks[name], 2)})
    return figure(data, f"{task}: {metric} on validation rows", "step", height=330)


def _line(look: Style, width: float, **marker: Any) -> Figure:
    """What of a trace makes it a line with its points marked."""
    return {"mode": "lines+markers", "line": line(look, width), "marker": {"symbol": look.symbol, **marker}}


def pareto(results: Mapping[str, Any], first: str, second: str) -> Figure:
    """Two objectives against each other; a ring marks the Pareto front over all objectives.

    The points of a preference sweep are joined in the order of their preference between the two, and say what it is.
    """
    looks, metrics = styles(results), results["primary"]
    data: list[Figure] = []
    at = {}
    for name, variant in results["variants"].items():
        x, y = (variant["metrics"][task][metrics[task]]["value"] for task in (first, second))
        if x is not None and y is not None:
            at[name] = (x, y)

    def ratio(preference: Mapping[str, float]) -> float:
        return preference.get(first, 1.0) / preference.get(second, 1.0)  # auxiliary tasks have none

    for sweep in results.get("sweeps", {}).values():
        order = sorted((point for point in sweep if point in at), key=lambda point: ratio(sweep[point]))
        line = {"color": looks[order[0]].colour if order else None, "width": 1.5}
        x, y = ([at[point][index] for point in order] for index in (0, 1))
        data.append({"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "hoverinfo": "skip"})
    preferences = {point: each for sweep in results.get("sweeps", {}).values() for point, each in sweep.items()}
    for name, (x, y) in at.items():
        dot = dots([x], [y], looks[name], name, size=11)
        if results["across"][name]["pareto"]:
            dot["marker"] |= {"symbol": f"{looks[name].symbol}-open-dot", "size": 16, "line": {"width": 2.5}}
        if name in preferences:
            text = ":".join(f"{value:g}" for value in preferences[name].values())
            dot |= {"mode": "markers+text", "text": [text], "textposition": "top center", "cliponaxis": False}
        dot["hovertemplate"] = f"{name}: %{{x:.5f}}, %{{y:.5f}}<extra></extra>"
        data.append(dot)
    return figure(data, f"{first} and {second}", f"{first} {metrics[first]}", f"{second} {metrics[second]}", height=330)


def calibration(results: Mapping[str, Any], task: str) -> Figure:
    """Mean label against mean prediction in bins of equal rows; on the diagonal predictions are right on average."""
    looks, data, most = styles(results), [], 0.0
    for name, variant in results["variants"].items():
        found = variant["calibration"].get(task)
        if found is None or variant["again"]:
            continue
        data.append(
            {
                "type": "scatter",
                "x": found["prediction"],
                "y": found["label"],
                "name": name,
                **_line(looks[name], 1.5, size=5),
            }
        )
        most = max(most, *found["prediction"], *found["label"])
    data.insert(
        0,
        {
            "type": "scatter",
            "mode": "lines",
            "x": [0, most],
            "y": [0, most],
            "line": {"dash": "dot", "width": 1, "color": "#888"},
            "hoverinfo": "skip",
        },
    )
    return figure(data, f"{task}: label against prediction", "mean prediction", "mean label", height=330)


def gate_heat(gates: Mapping[str, Any], name: str) -> Figure:
    """Gate x expert: mean weight at the end of the first seed's training (experts have no order that seeds share)."""
    rows = {gate: next(iter(seeds.values()))["shares"][-1] for gate, seeds in gates.items()}
    width = max(len(each) for each in rows.values())
    z = [[*each, *([None] * (width - len(each)))] for each in rows.values()]
    text = [["" if value is None else f"{value:.2f}" for value in each] for each in z]
    data = [
        {
            "type": "heatmap",
            "z": z,
            "x": [str(index) for index in range(width)],
            "y": list(rows),
            "text": text,
            "texttemplate": "%{text}",
            "zmin": 0,
            "zmax": 1,
            "colorscale": [[0, "#eef3f8"], [0.5, "#5b9bd5"], [1, "#123d6b"]],
            "showscale": False,
            "xgap": 2,
            "ygap": 2,
            "hovertemplate": "%{y}, expert %{x}: %{z:.3f}<extra></extra>",
        }
    ]
    return figure(
        data,
        f"{short(name)}: weight of each expert",
        "expert",
        height=height_of(len(rows)),
        yaxis={"autorange": "reversed", **named(list(rows))},
        xaxis={"type": "category"},
    )


def expert_use(gates: Mapping[str, Any], name: str) -> Figure:
    """Mean weight of each expert over training, the first seed: one line an expert of each gate."""
    data = []
    for index, (gate, seeds) in enumerate(gates.items()):
        found = next(iter(seeds.values()))
        every = max(1, len(found["steps"]) // POINTS_SHOWN)
        data += [
            {
                "type": "scatter",
                "mode": "lines" if len(found["steps"]) > FEW else "lines+markers",
                "marker": {"size": 5},
                "x": found["steps"][::every],
                "y": [share[expert] for share in found["shares"][::every]],
                "name": gate,
                "legendgroup": gate,
                "showlegend": expert == 0,
                "line": line(style(index), 1.3),
                "hovertemplate": f"{gate}, expert {expert}: %{{y:.3f}}<extra></extra>",
            }
            for expert in range(len(found["shares"][0]))
        ]
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    rows = 1 + len(gates) // 2  # of the legend, where the figure is narrow
    return figure(
        data,
        f"{short(name)}: expert use over training",
        "step",
        "weight",
        height=310 + 24 * rows,
        yaxis={"rangemode": "tozero"},
        showlegend=True,
        legend=legend,
        margin={"l": 8, "r": 16, "t": 50 + 24 * rows, "b": 14},
    )


def segments(results: Mapping[str, Any], task: str) -> Figure:
    """Difference to the baseline by segment: the colour its size, a dot where the interval leaves out 0 (exploratory)."""
    rows = [
        row
        for row in results["segments"]
        if row["task"] == task and row["variant"] != results["again"] and row["value"] is not None
    ]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    order = {row["segment"]: row["rows"] for row in rows}
    found = {(row["variant"], row["segment"]): row for row in rows}
    z: list[list[float | None]] = []
    text: list[list[str]] = []
    for segment in order:
        line = [found.get((name, segment)) for name in names]
        z.append([None if each is None else each["value"] for each in line])
        text.append([_cell(each) for each in line])
    beside = named(list(order), [f" ({count:,})" for count in order.values()])
    below, upright = named_below(names, WIDE_PIXELS if len(names) > MANY else PLOT_PIXELS)
    most = max((abs(value) for line in z for value in line if value is not None), default=1.0)
    data = [
        {
            "type": "heatmap",
            "z": z,
            "x": names,
            "y": beside["tickvals"],
            "text": text,
            "texttemplate": "%{text}",
            "zmin": -most,
            "zmax": most,
            "colorscale": [[0, "#c8553d"], [0.5, "#f2f2f2"], [1, "#2a7fb8"]],
            "showscale": False,
            "xgap": 2,
            "ygap": 2,
        }
    ]
    title = f"{task}: {results['primary'][task]} minus {short(results['baseline'])}'s"
    return figure(
        data,
        title,
        "",
        height=height_of(len(order)) + 20 + upright,
        yaxis={"autorange": "reversed", **beside},
        xaxis=below,
    )


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return ""
    clear = row["low"] is not None and (row["low"] > 0 or row["high"] < 0)
    return f"{row['value']:+.3f}{'•' if clear else ''}"


COSTS = {
    "flops_per_row": "FLOPs a row (forward)",
    "train_rows_per_second": "rows/s in training",
}


def cost_against_quality(results: Mapping[str, Any], task: str, cost: str) -> Figure:
    """A primary metric with its interval against one cost."""
    looks, data, metric = styles(results), [], results["primary"][task]
    for name, variant in results["variants"].items():
        found, price = variant["metrics"][task][metric], variant["cost"][cost]
        if found["value"] is None or price is None or variant["again"]:
            continue
        dot = dots([price], [found["value"]], looks[name], name, size=11)
        dot["hovertemplate"] = f"{name}: %{{x:,.0f}}, %{{y:.5f}}<extra></extra>"
        data.append(dot)
    return figure(data, f"{task} against {COSTS[cost]}", COSTS[cost], metric, height=330, xaxis={"rangemode": "tozero"})


def losses(events: Sequence[Mapping[str, Any]]) -> Figure:
    """Training losses of one run."""
    steps = [event for event in events if event["event"] == "step"]
    data = [
        {
            "type": "scatter",
            "mode": "lines" if len(steps) > FEW else "lines+markers",
            "x": [event["step"] for event in steps],
            "y": [event["losses"][task] for event in steps],
            "name": task,
            "line": line(style(index), 1.5),
        }
        for index, task in enumerate(steps[0]["losses"] if steps else ())
    ]
    legend = {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}
    return figure(
        data,
        "training loss before weighting",
        "step",
        height=330,
        showlegend=True,
        legend=legend,
        margin={"l": 8, "r": 16, "t": 66, "b": 14},
    )


def validations(events: Sequence[Mapping[str, Any]], task: str, metric: str) -> Figure:
    """One metric of one run over its validations."""
    found = {event["step"]: event["metrics"]["tasks"][task].get(metric) for event in events if event["event"] == "validation"}
    line = {"color": COLOURS[1], "width": 2}
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "x": sorted(found),
            "y": [found[step] for step in sorted(found)],
            "line": line,
        }
    ]
    return figure(data, f"{task}: {metric} on validation rows", "step", height=300)
