"""Two regression tasks whose relation is set: the synthetic data of the MMoE paper, as Parquet.

    python pipelines/task_correlation/prepare.py --correlation 0.9 OUTPUT --rows 120000 --seed 0

OUTPUT gets train.parquet, validation.parquet and test.parquet. Ma et al. (2018), section 3.2:

    w1 = c u1, w2 = c (p u1 + sqrt(1 - p^2) u2)          u1, u2 orthogonal unit vectors, so cosine(w1, w2) = p
    y_k = w_k.x + sum_i sin(alpha_i w_k.x + beta_i) + e   x ~ N(0, I_d), e ~ N(0, .01), m sines, the same for both tasks

README.md tells where each constant comes from. One seed gives the same u1, u2, alpha, beta, x and noise for every p, and so the
same `task_1`: only the second task moves.

Shapes: N rows, D input width, M sines, K = 2 tasks.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WIDTH = 512  # d of Tang et al. (2020); Ma et al. took 100
NUM_SINES = 10  # m of Tang et al. (2020)
SCALE = 1.0  # c of Tang et al. (2020)
NOISE_VARIANCE = 0.01  # Ma et al. (2018): "N(0, 0.01)", read as mean and variance
TASKS = ("task_1", "task_2")
TRUTH = "_truth"  # suffix of a column with a task's label without noise
SHARES = {"validation": 1 / 12, "test": 1 / 12}  # of the rows; the others are for training
LEAST_ROWS = 120
ROW_GROUP = 10_000  # rows drawn, and written, at a time


@dataclass(frozen=True)
class Truth:
    """What the labels are made of. `weights_KD`: w1 and w2; `alpha_M`, `beta_M`: of the sines."""

    weights_KD: Floats
    alpha_M: Floats
    beta_M: Floats

    def mean(self, x_ND: Floats) -> Floats:
        """(N, K) labels without noise.

        >>> mean_NK = draw_truth(1.0, seed=0).mean(np.ones((3, WIDTH)))
        >>> mean_NK.shape, bool(np.allclose(mean_NK[:, 0], mean_NK[:, 1]))
        ((3, 2), True)
        """
        return self.curve(x_ND @ self.weights_KD.T)

    def curve(self, z: Floats) -> Floats:
        """z + sum_i sin(alpha_i z + beta_i), of numbers of any shape."""
        made: Floats = z + np.sin(z[..., None] * self.alpha_M + self.beta_M).sum(axis=-1)
        return made


def draw_truth(correlation: float, seed: int, width: int = WIDTH) -> Truth:
    """The truth of a seed at a task relation p = cosine(w1, w2) in [-1, 1]; w1, alpha and beta are the same for every p.

    Raises ValueError for another p.

    >>> w1, w2 = draw_truth(0.9, seed=0).weights_KD
    >>> round(float(w1 @ w2), 6), round(float(np.linalg.norm(w2)), 6)
    (0.9, 1.0)
    """
    if not -1 <= correlation <= 1:
        raise ValueError(f"`--correlation` should be from -1 to 1. Found {correlation}.")
    rng = np.random.default_rng([seed, 0])
    units_DK, _ = np.linalg.qr(rng.normal(size=(width, 2)))
    u1, u2 = units_DK.T
    weights_KD = SCALE * np.stack([u1, correlation * u1 + np.sqrt(1 - correlation**2) * u2])
    return Truth(weights_KD, alpha_M=rng.normal(size=NUM_SINES), beta_M=rng.normal(size=NUM_SINES))


def draw_rows(truth: Truth, rows: int, seed: int, block: int) -> pa.Table:
    """A block of rows: `x` (a fixed-size list of float32), the labels, and these without noise as `task_1_truth`, ...

    The same `x` and noise for every truth.
    """
    rng = np.random.default_rng([seed, 1, block])
    width = truth.weights_KD.shape[1]
    x_ND = rng.normal(size=(rows, width)).astype(np.float32)
    noise_NK = rng.normal(scale=np.sqrt(NOISE_VARIANCE), size=(rows, len(TASKS)))
    mean_NK = truth.mean(x_ND.astype(np.float64))
    made = {"x": pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), width)}
    for index, task in enumerate(TASKS):
        made[task] = pa.array((mean_NK + noise_NK)[:, index].astype(np.float32))
        made[task + TRUTH] = pa.array(mean_NK[:, index].astype(np.float32))
    return pa.table(made)


def prepare(output: Path, correlation: float, rows: int, seed: int) -> dict[str, int]:
    """Writes the three files; returns {part: rows}. Blocks of one part are numbered on from those of the part before."""
    if rows < LEAST_ROWS:
        raise ValueError(f"`--rows` should be at least {LEAST_ROWS}, so that every part has some. Found {rows}.")
    truth = draw_truth(correlation, seed)
    counts = {name: round(rows * share) for name, share in SHARES.items()}
    counts = {"train": rows - sum(counts.values()), **counts}
    output.mkdir(parents=True, exist_ok=True)
    block = 0
    for name, count in counts.items():
        part = output / f"{name}.parquet.part"
        with pq.ParquetWriter(part, draw_rows(truth, 0, seed, 0).schema, compression="none") as writer:
            for first in range(0, count, ROW_GROUP):
                writer.write_table(draw_rows(truth, min(ROW_GROUP, count - first), seed, block), row_group_size=ROW_GROUP)
                block += 1
        part.replace(output / f"{name}.parquet")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("output", type=Path, help="folder for train.parquet, validation.parquet and test.parquet")
    parser.add_argument("--correlation", type=float, required=True, metavar="P", help="cosine of the tasks' weight vectors")
    parser.add_argument("--rows", type=int, default=120_000, help="of all parts: 10/12 train, 1/12 validation, 1/12 test")
    parser.add_argument("--seed", type=int, default=0, help="of the truth, the rows and the noise")
    arguments = parser.parse_args()
    try:
        counts = prepare(arguments.output, arguments.correlation, arguments.rows, arguments.seed)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for name, count in counts.items():
        print(f"{arguments.output / name}.parquet: {count:,} rows")


if __name__ == "__main__":
    main()
