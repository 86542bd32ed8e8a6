"""What balancing did in a run, read from its log and drawn: weights; gradient norms and cosines, named for their place."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from mtrec.compare.drawing import COLOURS, FEW, POINTS_SHOWN, Figure, figure
from mtrec.compare.page import Page

PLACES = {  # of balancing.at
    "parameters": "at the shared dense parameters",
    "batch_sum": "at the experts' input, summed over the rows of the batch",
    "representation": "at the experts' input, row by row",
}
KEYS = {"weights": "weight/", "norms": "gradient_norm_at_", "cosines": "cosine_at_"}
Series = dict[str, Any]


def balancing_series(events: Iterable[Mapping[str, Any]]) -> Series:
    """{"at": place or None, "weights", "norms": {task: [[step, value]]}, "cosines": {"task/task": [[step, value]]}} of a log.

    A step that is logged again after a restart counts as it was logged last. At most POINTS_SHOWN points each.

    >>> scalars = {"weight/click": 1.5, "gradient_norm_at_parameters/click": 2.0, "cosine_at_parameters/click/dwell": -0.5}
    >>> found = balancing_series([{"event": "step", "step": 10, "balancing": scalars}])
    >>> found["at"], found["weights"], found["cosines"]
    ('parameters', {'click': [[10, 1.5]]}, {'click/dwell': [[10, -0.5]]})
    """
    by_step = {event["step"]: event["balancing"] for event in events if event["event"] == "step"}
    found: Series = {"at": None, **{name: {} for name in KEYS}}
    for step in sorted(by_step):
        for key, value in by_step[step].items():
            what, _, whose = key.partition("/")
            for name, start in KEYS.items():
                if f"{what}/".startswith(start):
                    found[name].setdefault(whose, []).append([step, value])
                    found["at"] = found["at"] if name == "weights" else what.removeprefix(start)
    for name in KEYS:
        for whose, points in found[name].items():
            found[name][whose] = points[:: max(1, -(-len(points) // POINTS_SHOWN))]
    return found


def is_told(series: Series) -> bool:
    """Whether there is something to see: gradients that were compared, or weights other than 1."""
    return bool(series["norms"]) or any(value != 1.0 for points in series["weights"].values() for _, value in points)


def section(
    page: Page, runs: Mapping[str, Mapping[str, Series]], single_task: str | None, weights_only: Collection[str] = ()
) -> None:
    """Weights, norms and cosines of {name: {seed: series}}: lines are of the first seed, means of all.

    `single_task`: the variant of a comparison that tells whether learning together costs anything; `weights_only`: names of
    which gradients are left out, so that a sweep does not fill the page.
    """
    told = {name: seeds for name, seeds in runs.items() if any(is_told(series) for series in seeds.values())}
    page.heading("Balancing")
    if not told:
        page.paragraph(
            "The weights of the tasks are constant, and gradients were not compared: balancing.log_gradients: true logs their "
            "norms and cosines.",
            "soft",
        )
        return
    seeds = max(len(each) for each in told.values())
    page.paragraph(
        "Weight: what the balancer multiplied onto a task's loss, beside tasks.*.weight. Gradient norms and cosines are those of "
        "the tasks' own losses, before that weight"
        + ("; lines are of the first seed, cosines in the matrix are means over training and seeds." if seeds > 1 else ".")
        + (" Of a preference sweep, gradients are shown for the first preference." if weights_only else ""),
        "soft",
    )
    remarks = [remark for name, each in told.items() if name not in weights_only for remark in disagreements(name, each)]
    if remarks:
        page.bullets(remarks)
        where = f"here {single_task} against the others" if single_task else "a comparison with a single_task variant"
        page.paragraph(
            "That gradients disagree does not say that learning the tasks together costs anything: single-task against "
            f"multi-task tells ({where}).",
            "note",
        )
    drawn = []
    for name, each in told.items():
        first, title = next(iter(each.values())), f"{name}: " if name else ""
        if any(len({value for _, value in points}) > 1 for points in first["weights"].values()):
            drawn.append(_lines(first["weights"], f"{title}weights", "step"))
        if first["norms"] and name not in weights_only:
            place = PLACES.get(first["at"], str(first["at"]))
            drawn.append(_lines(first["norms"], f"{title}gradient norms", f"step; {place}", yaxis={"type": "log"}))
            if first["cosines"]:
                drawn.append(_cosines(first["cosines"], f"{title}cosines", f"step; {place}"))
                drawn.append(_matrix(each, f"{title}mean cosine", place))
    page.figures(drawn)


def mean_cosines(seeds: Mapping[str, Series]) -> dict[str, tuple[float, float]]:
    """{"task/task": (mean cosine, share of logged steps where it is negative)} over the training of all seeds."""
    found: dict[str, list[float]] = {}
    for series in seeds.values():
        for pair, points in series["cosines"].items():
            found.setdefault(pair, []).extend(value for _, value in points)
    return {pair: (float(np.mean(values)), float(np.mean(np.array(values) < 0))) for pair, values in found.items()}


def disagreements(name: str, seeds: Mapping[str, Series]) -> list[str]:
    """A sentence for each pair of tasks whose gradients point apart in most of the logged steps."""
    at = next(iter(seeds.values()))["at"]
    start = f"{name}: t" if name else "T"
    return [
        f"{start}he gradients of {pair.replace('/', ' and ', 1)} disagree: cosine below 0 in {share:.0%} of the logged steps, "
        f"{mean:+.2f} on average, {PLACES.get(at, at)}."
        for pair, (mean, share) in mean_cosines(seeds).items()
        if share > 0.5
    ]


def _lines(series: Mapping[str, list[list[float]]], title: str, x: str, **axes: Any) -> Figure:
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(points) <= FEW else "lines",
            "marker": {"size": 5},
            "x": [step for step, _ in points],
            "y": [value for _, value in points],
            "name": name.replace("/", " and ", 1),
            "line": {"color": colour, "width": 1.5},
        }
        for (name, points), colour in zip(series.items(), itertools.cycle(COLOURS[1:]))
    ]
    rows = 1 + len(series) // 3
    return figure(
        data,
        title,
        x,
        height=300 + 24 * rows,
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        margin={"l": 8, "r": 16, "t": 40 + 24 * rows, "b": 14},
        **axes,
    )


def _cosines(series: Mapping[str, list[list[float]]], title: str, x: str) -> Figure:
    drawn = _lines(series, title, x, yaxis={"range": [-1.05, 1.05]})
    line = {"width": 1, "dash": "dot", "color": "#888"}
    drawn["layout"]["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 0, "y1": 0, "line": line}]
    return drawn


def _matrix(seeds: Mapping[str, Series], title: str, place: str) -> Figure:
    found = mean_cosines(seeds)
    tasks = list(next(iter(seeds.values()))["norms"])
    cells = {(a, b): found.get(f"{a}/{b}", found.get(f"{b}/{a}", (None, 0.0)))[0] for a in tasks for b in tasks if a != b}
    z = [[1.0 if a == b else cells[a, b] for b in tasks] for a in tasks]
    data = [
        {
            "type": "heatmap",
            "z": z,
            "x": tasks,
            "y": tasks,
            "text": [["" if value is None else f"{value:+.2f}" for value in row] for row in z],
            "texttemplate": "%{text}",
            "zmin": -1,
            "zmax": 1,
            "colorscale": [[0, "#c8553d"], [0.5, "#f2f2f2"], [1, "#2a7fb8"]],
            "showscale": False,
            "xgap": 2,
            "ygap": 2,
            "hovertemplate": "%{y}, %{x}: %{z:.3f}<extra></extra>",
        }
    ]
    axes: dict[str, Any] = {"yaxis": {"autorange": "reversed", "type": "category"}, "xaxis": {"type": "category"}}
    return figure(data, title, place, height=324, **axes)
