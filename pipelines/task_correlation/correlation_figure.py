"""The plot of REPORT.md: the missed share by p, relative to MMoE at the lowest p of the same draw. An SVG without a library."""

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

COLOURS = {"shared_bottom": "#d0568f", "omoe": "#e08214", "mmoe": "#666666", "ple": "#0f88d0"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 680, 400, 64, 130, 46, 52
TICKS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)


def error_svg(missed: Mapping[tuple[int, float, str], float], correlations: Sequence[float]) -> str:
    """Geometric mean over draws, its 95 % interval, and a small dot for each draw."""
    draws, base = sorted({draw for draw, _, _ in missed}), min(correlations)
    logs = {
        (p, name): [math.log(missed[draw, p, name] / missed[draw, base, "mmoe"]) for draw in draws]
        for p in correlations
        for name in COLOURS
    }
    quantile = float(stats.t.ppf(0.975, len(draws) - 1))
    mean = {key: statistics.fmean(each) for key, each in logs.items()}
    half = {key: quantile * statistics.stdev(each) / math.sqrt(len(draws)) for key, each in logs.items()}
    ends = [end for key, each in logs.items() for end in (*each, mean[key] + half[key], mean[key] - half[key])]
    low, high = min(ends) - 0.1, max(ends) + 0.1

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def x(p: float, name: str) -> float:
        middle = LEFT + (list(correlations).index(p) + 0.5) / len(correlations) * (WIDTH - LEFT - RIGHT)
        return middle + (list(COLOURS).index(name) - 1.5) * 24

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15" fill="#222">Missed share / MMoE\'s at p = {base:g} in the same draw</text>',
    ]
    for tick in [each for each in TICKS if low <= math.log(each) <= high]:
        at = y(math.log(tick))
        colour = "#999" if tick == 1 else "#e4e4e4"
        lines.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{colour}"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end" fill="#444">{tick:g}</text>')
    for index, p in enumerate(correlations):
        at = LEFT + (index + 0.5) / len(correlations) * (WIDTH - LEFT - RIGHT)
        lines.append(f'<text x="{at:.1f}" y="{HEIGHT - 24}" text-anchor="middle" fill="#222">p = {p:g}</text>')
    for name, colour in COLOURS.items():
        points = [(x(p, name), y(mean[p, name])) for p in correlations]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.2" opacity="0.5"/>')
        for p, (a, b) in zip(correlations, points, strict=True):
            top, bottom = y(mean[p, name] + half[p, name]), y(mean[p, name] - half[p, name])
            lines.append(f'<path d="M{a:.1f} {top:.1f}V{bottom:.1f}" stroke="{colour}" stroke-width="2.5"/>')
            dots = [y(each) for each in logs[p, name]]
            lines += [f'<circle cx="{a + 7:.1f}" cy="{dot:.1f}" r="2" fill="{colour}" opacity="0.6"/>' for dot in dots]
            lines.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" fill="{colour}"/>')
        row = TOP + 14 + 22 * list(COLOURS).index(name)
        lines.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{row - 4}" r="5" fill="{colour}"/>')
        lines.append(f'<text x="{WIDTH - RIGHT + 28}" y="{row}" fill="#222">{name}</text>')
    return "\n".join([*lines, "</svg>", ""])
