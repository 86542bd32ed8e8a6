"""What the plots of all pages have in common: colours and symbols, names on an axis, sizes, the layout."""

import dataclasses
from collections.abc import Sequence
from typing import Any

# Okabe and Ito (2008), in an order whose first members differ most; readable on white and on near-black
COLOURS = ("#8c8c8c", "#0f88d0", "#e08214", "#17a27c", "#d0568f", "#b59a00", "#7a6fd0", "#d1495b", "#4aa3a2")
POINTS_SHOWN = 200  # of a gate's curve
FEW = 40  # points of a line that are marked
ROW_PIXELS, EDGE_PIXELS = 30, 105
NAME_LENGTH = 24  # letters of a name on an axis
LETTER_PIXELS = 7.5  # of such a letter
PLOT_PIXELS, WIDE_PIXELS = 220, 500  # that labels leave to a plot, at least, beside others and alone in its line

Figure = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Style:
    """How one of several things is drawn: a plotly colour, dash of lines and symbol of dots; `words`: what a legend adds."""

    colour: str
    dash: str = "solid"
    symbol: str = "circle"
    words: str = ""


_AGAIN = (("solid", "circle", ""), ("dash", "square", "square"), ("dot", "diamond", "diamond"), ("dashdot", "x", "cross"))


def style(index: int) -> Style:
    """Of the thing with this number, from 0: eight colours, none of them the baseline's, then with other dashes and symbols.

    >>> style(0) == style(8), style(0).colour == style(8).colour, style(8).symbol
    (False, True, 'square')
    """
    again, place = divmod(index, len(COLOURS) - 1)
    return Style(COLOURS[1 + place], *_AGAIN[again % len(_AGAIN)])


def line(look: Style, width: float) -> Figure:
    """Plotly's `line`."""
    return {"color": look.colour, "dash": look.dash, "width": width}


def short(name: str) -> str:
    """A name as an axis or a title has room for it: both ends of a long one.

    >>> short("mmoe"), short("a-very-long-variant-name-with-many-words-7")
    ('mmoe', 'a-very-long-…any-words-7')
    """
    return name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH // 2]}…{name[1 - NAME_LENGTH // 2 :]}"


def named(names: Sequence[str], more: Sequence[str] = ()) -> Figure:
    """An axis of categories with each of them named, in short; hovering tells the whole name.

    `more`: what follows each name, in the category as on the axis.
    """
    ends = more or [""] * len(names)
    texts = [f"{short(name)}{end}".replace("<", "&lt;") for name, end in zip(names, ends, strict=True)]  # "<" begins markup
    values = [f"{name}{end}" for name, end in zip(names, ends, strict=True)]
    return {"type": "category", "tickmode": "array", "tickvals": values, "ticktext": texts}


def named_below(names: Sequence[str], pixels: float = PLOT_PIXELS) -> tuple[Figure, int]:
    """(the same below a figure, upright where that is too narrow, pixels that this takes of its height)."""
    longest = max((len(short(name)) for name in names), default=0) * LETTER_PIXELS
    upright = longest * len(names) > pixels
    return {**named(names), "tickangle": 90 if upright else 0}, round(longest) if upright else 0


def figure(data: list[Figure], title: str, x: str, y: str = "", height: int = 320, **axes: Any) -> Figure:
    """A plotly figure with the layout that all of a page have in common; `axes` go into it."""
    layout: Figure = {
        "title": {
            "text": title,
            **{"x": 0, "xref": "container", "xanchor": "left", "y": 1, "yref": "container", "yanchor": "top"},
            "pad": {"l": 10, "t": 12},
        },
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 42, "b": 14},
        "xaxis": {"title": {"text": x, "font": {"size": 12.5}, "standoff": 8}, "automargin": True, "nticks": 6},
        "yaxis": {"title": {"text": y, "font": {"size": 12.5}, "standoff": 8}, "automargin": True},
        "showlegend": False,
        "hoverlabel": {"namelength": -1},
    }
    for axis, changes in axes.items():
        layout[axis] = {**layout.get(axis, {}), **changes} if isinstance(changes, dict) else changes
    for axis in ("xaxis", "yaxis"):
        if layout[axis].get("type") == "category":  # none of them is left out
            layout[axis] = {"dtick": 1, **{key: value for key, value in layout[axis].items() if key != "nticks"}}
    return {"data": data, "layout": layout}


def height_of(rows: int) -> int:
    """Pixels of a figure with so many rows."""
    return EDGE_PIXELS + ROW_PIXELS * max(2, rows)


def dots(x: list[Any], y: list[Any], look: Style, name: str, size: int, opacity: float = 1.0) -> Figure:
    """A plotly trace of markers."""
    marker = {"color": look.colour, "size": size, "opacity": opacity, "symbol": look.symbol}
    return {"type": "scatter", "mode": "markers", "x": x, "y": y, "name": name, "marker": marker}
