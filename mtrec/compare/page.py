"""One self-contained HTML page: text, tables and Plotly figures, with the library inside; light, dark and print."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = """
:root { color-scheme: light dark; --text: #1b1f24; --soft: #57606a; --line: #d5dae0; --back: #ffffff; --raised: #f5f7f9;
  --good: #116a43; --good-back: #dcf3e6; --bad: #9b2318; --bad-back: #fbe3df; --plain-back: #e9edf1; }
@media screen and (prefers-color-scheme: dark) { :root { --text: #e4e8ec; --soft: #9aa5b1; --line: #333b45; --back: #14181d;
  --raised: #1c2229;
  --good: #7ddba9; --good-back: #143526; --bad: #f5a196; --bad-back: #432019; --plain-back: #2a323b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 28px 60px; max-width: 1280px; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 38px 0 6px; } p { margin: 6px 0; max-width: 82ch; }
.soft { color: var(--soft); } .note { border-left: 3px solid var(--soft); padding-left: 10px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; margin: 10px 0; font-size: 14px; font-variant-numeric:
  tabular-nums; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; } td.number { white-space: nowrap; }
.badge { display: inline-block; padding: 0 7px; border-radius: 9px; background: var(--plain-back); white-space: nowrap;
  font-size: 13px; }
.badge.better { background: var(--good-back); color: var(--good); } .badge.worse { background: var(--bad-back); color:
  var(--bad); }
.figures { display: grid; align-items: start; grid-template-columns: repeat(auto-fit, minmax(min(350px, 100%), 1fr));
  gap: 14px; margin: 10px 0; }
.figures.wide { grid-template-columns: 1fr; }
.figure { min-width: 0; overflow: hidden; background: var(--raised); border-radius: 6px; }
.parcoords .domain, .parcoords .tick line { stroke: var(--soft) !important; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0; font-size: 14px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 50%; margin-right: 6px; }
ul { margin: 6px 0; padding-left: 20px; } pre { background: var(--raised); padding: 10px; overflow-x: auto; font-size:
  13px; border-radius: 6px; white-space: pre-wrap; }
code { font-size: 13px; overflow-wrap: anywhere; } details > summary { cursor: pointer; color: var(--soft); margin: 6px 0; }
@media print { :root { color-scheme: light; } body { padding: 0; max-width: none; font-size: 12px; }
  .figure, tr, li { break-inside: avoid; } h2, h2 + p, .legend { break-after: avoid; } p { max-width: none; }
  .scroll { overflow: visible; } .figures { grid-template-columns: 340px 340px; } .figures.wide { grid-template-columns:
  694px; } table { font-size: 10px; } th, td { padding-right: 7px; } }
"""

SCRIPT = """
const dark = window.matchMedia("(prefers-color-scheme: dark)");
function themed(layout, printing) {
  const night = dark.matches && !printing, text = night ? "#e4e8ec" : "#1b1f24", grid = night ? "#333b45" : "#dfe3e8";
  const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid };
  return { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
    font: { color: text, size: 12.5, family: 'system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif' },
    title: { ...layout.title, font: { size: 14 } }, xaxis: { ...layout.xaxis, ...axis }, yaxis: { ...layout.yaxis, ...axis } };
}
function draw(printing) {
  for (const place of document.querySelectorAll(".figure")) {
    const figure = FIGURES[place.dataset.figure], layout = themed(figure.layout, printing);
    if (printing) { // the widths of the style above: the page's own are not known before it is laid out
      layout.autosize = false; layout.width = place.parentElement.classList.contains("wide") ? 694 : 340;
    }
    Plotly.react(place, figure.data, layout, { displayModeBar: false, responsive: true });
  }
}
draw(false);
dark.addEventListener("change", () => draw(false));
window.addEventListener("beforeprint", () => draw(true));
window.addEventListener("afterprint", () => draw(false));
"""


class Page:
    """Collects the parts of a page in reading order; `text()` is the whole file."""

    def __init__(self, title: str) -> None:
        self._title, self._parts, self._figures = title, [f"<h1>{html.escape(title)}</h1>"], list[Mapping[str, Any]]()

    def heading(self, text: str) -> None:
        """Adds a section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str, style: str = "") -> None:
        """Adds a paragraph; `style` is its class in the sheet."""
        self._parts.append(f'<p class="{style}">{html.escape(text)}</p>')

    def bullets(self, lines: Iterable[str]) -> None:
        """Adds a list."""
        self._parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>")

    def table(
        self, head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = (), fold: str | None = None
    ) -> None:
        """Cells are text, or HTML made by `badge`; `numbers`: columns set to the right; `fold`: shown on a click on this."""

        def line(cells: Sequence[str], tag: str) -> str:
            made = [f'<{tag} class="number">{c}</{tag}>' if i in numbers else f"<{tag}>{c}</{tag}>" for i, c in enumerate(cells)]
            return f"<tr>{''.join(made)}</tr>"

        body = "".join(line([_cell(each) for each in row], "td") for row in rows)
        table = (
            f'<div class="scroll"><table><thead>{line([_cell(h) for h in head], "th")}</thead><tbody>{body}</tbody></table></div>'
        )
        self._parts.append(table if fold is None else f"<details><summary>{html.escape(fold)}</summary>{table}</details>")

    def figures(self, figures: Iterable[Mapping[str, Any]], wide: bool = False) -> None:
        """Beside each other where there is room; `wide`: below each other."""
        places = []
        for figure in figures:
            places.append(
                f'<div class="figure" data-figure="{len(self._figures)}" style="height:{figure["layout"]["height"]}px"></div>'
            )
            self._figures.append(figure)
        self._parts.append(f'<div class="figures{" wide" if wide else ""}">{"".join(places)}</div>')

    def legend(self, colours: Mapping[str, str]) -> None:
        """Adds names with their colours, for figures without a legend of their own."""
        marks = (f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>' for name, colour in colours.items())
        self._parts.append(f'<div class="legend">{"".join(marks)}</div>')

    def code(self, text: str, fold: str) -> None:
        """Adds text as it is, folded under the words `fold`."""
        self._parts.append(f"<details><summary>{html.escape(fold)}</summary><pre>{html.escape(text)}</pre></details>")

    def text(self) -> str:
        """The page, whole: style, scripts and figures are in it."""
        from plotly.offline import get_plotlyjs  # half a second, for whoever writes a report

        figures = json.dumps(self._figures, allow_nan=False).replace("</", "<\\/")
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f'<link rel="icon" href="data:,"><title>{html.escape(self._title)}</title><style>{STYLE}</style></head>\n<body>\n'
            + "\n".join(self._parts)
            + f"\n<script>{get_plotlyjs()}</script>\n<script>const FIGURES = {figures};\n{SCRIPT}</script>\n</body></html>\n"
        )


class Markup(str):
    """Text that is HTML already."""


def badge(outcome: str) -> Markup:
    """A verdict in its colour."""
    return Markup(f'<span class="badge {html.escape(outcome)}">{html.escape(outcome)}</span>')


def stacked(*lines: str) -> Markup:
    """Several lines in one cell."""
    return Markup("<br>".join(_cell(line) for line in lines))


def _cell(value: str) -> str:
    return value if isinstance(value, Markup) else html.escape(value)
