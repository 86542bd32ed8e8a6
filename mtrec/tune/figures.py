"""The plots of a search, as plain Plotly figures (see mtrec/compare/drawing.py)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mtrec.compare.drawing import COLOURS, Figure, Style, dots, figure, named_below, short
from mtrec.compare.space import Parameter, place_of
from mtrec.tune.table import short_paths, short_value
from mtrec.tune.trials import AS_WRITTEN

PLAIN, GOOD, STOPPED, WRITTEN = COLOURS[1], COLOURS[2], "#8c8c8c", COLOURS[4]
# grey, blue, orange: readable on white and on near-black
SCALE: list[tuple[float, str]] = [(0.0, "#8c8c8c"), (0.5, "#0f88d0"), (1.0, "#e08214")]


def _values(results: Mapping[str, Any], trial: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = results["as_written"] if trial["number"] == AS_WRITTEN else trial["values"]
    return found


def _usable(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in results["trials"] if each["state"] != "failed"]


def _name(trial: Mapping[str, Any]) -> str:
    return "as written" if trial["number"] == AS_WRITTEN else f"trial {trial['number']}"


def parallel_coordinates(results: Mapping[str, Any], objective: Mapping[str, Any]) -> Figure:
    """A line a trial through its values to its objectives, which also give the colour; drag along an axis to choose lines."""
    drawn = [each for each in _usable(results) if each["number"] != AS_WRITTEN]
    labels = short_paths(list(results["space"]))
    dimensions = [
        _axis(label, _parameter(results, path), [trial["values"].get(path) for trial in drawn]) for path, label in labels.items()
    ]
    for each in results["objectives"]:
        values = [trial["objectives"][each["name"]] for trial in drawn]
        low, high = min(values), max(values)
        ticks = [low + (high - low) * k / 4 for k in range(5)] if low < high else [low]
        axis = {"values": values, "tickvals": ticks, "ticktext": [f"{tick:.4g}" for tick in ticks]}
        dimensions.append({"label": _broken(each["name"]), **axis})
    colour = [trial["objectives"][objective["name"]] for trial in drawn]
    line = {
        "color": colour,
        "colorscale": SCALE if objective["larger"] else [(1 - place, tint) for place, tint in reversed(SCALE)],
        "showscale": False,
    }
    data = [{"type": "parcoords", "dimensions": dimensions, "line": line, "labelangle": 0}]
    margin = {"l": 60, "r": 60, "t": 96, "b": 24}
    return figure(data, f"orange: best {objective['name']}; drag along an axis to choose trials", "", height=430, margin=margin)


def _parameter(results: Mapping[str, Any], path: str) -> Parameter:
    return Parameter.model_validate(results["space"][path])


def _broken(label: str) -> str:
    """In lines as short as its parts allow, for the head of an axis."""
    return label.replace(".", ".<br>").replace("/", "/<br>")


def _axis(label: str, parameter: Parameter, values: Sequence[Any]) -> Figure:
    """One parameter's axis: log scales as logarithms, choices as numbers, with their own tick texts; - where it does not apply.

    A trial without the value lies a little below the range.
    """
    axis: Figure = {"label": _broken(label)}
    ticks: list[float]
    numbers: list[float | None]
    if parameter.choice is not None:
        texts = [short(short_value(each)) for each in parameter.choice]
        numbers = [None if value is None else parameter.choice.index(value) for value in values]
        ticks = [float(index) for index in range(len(texts))]
        low, high = 0.0, float(len(texts) - 1)
    else:
        low, high = parameter.ends
        shown = [low * (high / low) ** (k / 4) if parameter.log else low + (high - low) * k / 4 for k in range(5)]
        shown = sorted({round(each) for each in shown}) if parameter.whole else shown
        texts = [f"{each:.3g}" for each in shown]
        ticks = [math.log10(each) if parameter.log else each for each in shown]
        numbers = [None if value is None else math.log10(value) if parameter.log else float(value) for value in values]
        low, high = ticks[0], ticks[-1]
    if any(number is None for number in numbers):
        below = low - 0.15 * (high - low)
        numbers = [below if number is None else number for number in numbers]
        ticks, texts, low = [below, *ticks], ["-", *texts], below
    return {**axis, "values": numbers, "range": [low, high], "tickvals": ticks, "ticktext": texts}


def over_trials(results: Mapping[str, Any], objective: Mapping[str, Any]) -> Figure:
    """One objective by the number of the trial, the best so far as a line; rings were stopped, the diamond is as written."""
    trials = sorted(_usable(results), key=lambda each: each["number"])
    data: list[Figure] = []
    best: list[float] = []
    for trial in trials:
        value = trial["objectives"][objective["name"]]
        if trial["state"] == "finished":
            best.append(value if not best else max(best[-1], value) if objective["larger"] else min(best[-1], value))
        else:
            best.append(best[-1] if best else value)
    line = {"color": GOOD, "width": 2, "shape": "hv"}
    x = [trial["number"] for trial in trials]
    data.append({"type": "scatter", "mode": "lines", "x": x, "y": best, "line": line, "hoverinfo": "skip"})
    data += [_mark(results, trial, trial["number"], objective["name"]) for trial in trials]
    return figure(data, objective["name"], "trial (0: as written)", height=330, xaxis={"range": [-0.6, x[-1] + 0.6]})


def _mark(results: Mapping[str, Any], trial: Mapping[str, Any], x: Any, objective: str) -> Figure:
    written, stopped = trial["number"] == AS_WRITTEN, trial["state"] == "stopped"
    best = trial["number"] == results["best"] or (len(results["objectives"]) > 1 and trial["number"] in results["front"])
    tint = WRITTEN if written else GOOD if best else STOPPED if stopped else PLAIN
    symbol = "diamond" if written else "circle-open" if stopped else "circle"
    look = Style(tint, symbol=symbol)
    found = dots([x], [trial["objectives"][objective]], look, _name(trial), size=11 if written or best else 8)
    stop = f"<br>stopped at step {trial['steps']} of {trial['total_steps']}" if stopped else ""
    lines = [f"{path}: {short_value(value)}" for path, value in _values(results, trial).items()]
    lines = [line.replace("<", "&lt;") for line in lines]
    found["hovertemplate"] = f"{_name(trial)}: %{{y:.5f}}{stop}<br>{'<br>'.join(lines)}<extra></extra>"
    return found


def against_parameter(results: Mapping[str, Any], path: str, objective: Mapping[str, Any]) -> Figure:
    """One objective against the values of one parameter."""
    parameter = _parameter(results, path)
    data = []
    for trial in _usable(results):
        value = _values(results, trial).get(path)
        if _has(parameter, value):
            x = short_value(value) if parameter.choice is not None else value
            data.append(_mark(results, trial, x, objective["name"]))
    axis: Figure = {"type": "log" if parameter.log else "linear"}
    upright = 0
    if parameter.choice is not None:
        names = [short_value(each) for each in parameter.choice]
        axis, upright = named_below(names)
        axis |= {"categoryorder": "array", "categoryarray": names}
        axis["range"] = [-0.5, len(parameter.choice) - 0.5]
    elif parameter.log:
        low, high = (math.log10(end) for end in parameter.ends)
        ticks = [10 ** (low + (high - low) * k / 4) for k in range(5)]
        axis |= {"range": [low - 0.07 * (high - low), high + 0.07 * (high - low)], "tickvals": ticks}
        axis["ticktext"] = [f"{tick:.2g}" for tick in ticks]
    return figure(data, short_paths(list(results["space"]))[path], "", objective["name"], height=290 + upright, xaxis=axis)


def _has(parameter: Parameter, value: Any) -> bool:
    """Whether a parameter's range has a value; the experiment as written may have another, such as auto."""
    if parameter.choice is not None:
        return value in parameter.choice
    if value is None or isinstance(value, str | bool) or (parameter.log and value <= 0):
        return False
    return 0 <= place_of(parameter, value) <= 1


def pareto(results: Mapping[str, Any], first: Mapping[str, Any], second: Mapping[str, Any]) -> Figure:
    """Two objectives against each other; the Pareto set over all objectives is marked and joined."""
    trials = _usable(results)
    on = [trial["objectives"] for trial in trials if trial["number"] in results["front"]]
    front = sorted((each[first["name"]], each[second["name"]]) for each in on)
    x, y = [point[0] for point in front], [point[1] for point in front]
    line = {"color": GOOD, "width": 1.5, "dash": "dot"}
    data: list[Figure] = [{"type": "scatter", "mode": "lines", "x": x, "y": y, "line": line, "hoverinfo": "skip"}]
    above = False
    for trial in sorted(trials, key=lambda each: each["objectives"][first["name"]]):
        mark = _mark(results, trial, trial["objectives"][first["name"]], second["name"])
        mark["hovertemplate"] = mark["hovertemplate"].replace("%{y:.5f}", "%{x:.5f}, %{y:.5f}")
        if trial["number"] in results["front"]:
            label = "as written" if trial["number"] == AS_WRITTEN else str(trial["number"])
            above = not above  # neighbours on the front lie close to each other
            where = "top right" if above else "bottom left"
            mark |= {"mode": "markers+text", "text": [label], "textposition": where, "cliponaxis": False}
        data.append(mark)
    return figure(data, f"{first['name']} and {second['name']}", first["name"], second["name"], height=380)


def curves(results: Mapping[str, Any], index: int) -> Figure:
    """One objective over the validations of every trial."""
    objective, data = results["objectives"][index], []
    for trial in _usable(results):
        points = [(point[0], point[1 + index]) for point in trial["curve"] if point[1 + index] is not None]
        best = trial["number"] == results["best"]
        written = trial["number"] == AS_WRITTEN
        tint = WRITTEN if written else GOOD if best else STOPPED if trial["state"] == "stopped" else PLAIN
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [100 * step / trial["total_steps"] for step, _ in points],
                "y": [value for _, value in points],
                "name": _name(trial),
                "line": {"color": tint, "width": 2.2 if best or written else 1},
                "marker": {"size": 4},
                "opacity": 1.0 if best or written else 0.55,
            }
        )
    return figure(data, f"{objective['name']} on validation rows", "% of the trial's training", height=330)
