"""`mtrec bench`: how fast reading, encoding, computing, training and scoring are here, beside a yardstick and a floor.

    stages.py     what one launched process measures        yardstick.py   the bare loop that speeds are ratios to
    launches.py   interleaved launches, medians, ratios     floor.py       measured rates of products and gathers
    page.py       the plot                                  table.py       the table in the terminal
    peers/        other libraries, in environment.py's venv
"""

from mtrec.bench.launches import Asked, bench

__all__ = ["Asked", "bench"]
