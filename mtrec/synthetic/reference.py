"""The workload that speed is measured on: 26 ids, one list of ids, 13 numbers, three labels.

Dimensions: N rows, T tasks (click, conversion, dwell), S columns whose ids carry the labels, F numbers.
"""

from dataclasses import dataclass
from math import gcd

import numpy as np
import pyarrow as pa

from mtrec.synthetic.draws import CHUNK_ROWS, Chunks, FloatArray, IntArray, draw, sigmoid, solve_bias, zipf

CARDINALITIES = (
    *(100, 200, 300, 500, 700, 1_000, 1_200, 1_500, 2_000, 2_500, 3_000, 4_000, 5_000),
    *(8_000, 10_000, 15_000, 20_000, 30_000, 45_000, 70_000, 100_000, 150_000, 230_000, 500_000, 800_000, 1_000_000),
)
NUM_ITEMS = 50_000  # values of the list column; 3.05 million table rows with those above
MAX_ITEMS = 20
NUM_DENSE = 13
ZIPF = 1.05

SIGNAL_COLUMNS = 12  # the ids of the smallest columns carry the labels: one pass over the data can learn them
CLICK_RATE = 0.1
CONVERSION_RATE = 0.1  # among the clicked rows
SPREAD = 1.2  # standard deviation of the logits of click and conversion
MEDIAN_DWELL_SECONDS = 20.0

COLUMNS = pa.schema(
    [
        *((f"c{column}", pa.int64()) for column in range(len(CARDINALITIES))),
        ("items", pa.list_(pa.int64())),
        *((f"d{column}", pa.float32()) for column in range(NUM_DENSE)),
        ("click", pa.int8()),
        ("conversion", pa.int8()),
        ("dwell_seconds", pa.float32()),
    ]
)


@dataclass(frozen=True)
class _Rows:
    ids: list[IntArray]
    items: IntArray
    item_offsets: IntArray
    dense_NF: FloatArray


class ReferenceLog:
    """An endless log for measuring speed: ids in [0, cardinality), Zipf-distributed with exponent 1.05.

    Popular ids lie spread over their table, as a hash or a growing vocabulary leaves them: side by side they would
    make a gather look faster than it is. There are no truth columns; `p_click(start, stop)` gives the truth of click.

    >>> log = ReferenceLog(seed=7)
    >>> table = log.rows(0, 1000)
    >>> table.num_columns, table.equals(log.rows(0, 2000).slice(0, 1000))
    (43, True)
    """

    def __init__(self, *, seed: int):
        if seed < 0:
            raise ValueError(f"`seed` should be an integer of at least 0. Found {seed}.")
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        sizes = (*CARDINALITIES, NUM_ITEMS)
        self._cumulative = [np.cumsum(zipf(size, ZIPF)) for size in sizes]
        self._strides = [_coprime(size) for size in sizes]
        self._effects = [rng.standard_normal((3, size)) for size in CARDINALITIES[:SIGNAL_COLUMNS]]
        self._dense_TF = 0.5 * rng.standard_normal((3, NUM_DENSE))
        self._mean_T, self._deviation_T, self._bias_T = np.zeros(3), np.ones(3), np.zeros(3)
        self._calibrate()
        self._chunks = Chunks(self._chunk)

    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop` (excluded), with the columns of `COLUMNS`."""
        return self._chunks.rows(start, stop)

    def p_click(self, start: int, stop: int) -> FloatArray:
        """The true p(click) (N,) of rows `start` to `stop` (excluded)."""
        first, last = start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)
        scores = [self._scores_TN(self._draw(self._rng(chunk), CHUNK_ROWS))[0] for chunk in range(first, last)]
        return sigmoid(np.concatenate(scores))[start - first * CHUNK_ROWS : stop - first * CHUNK_ROWS]

    def _rng(self, chunk: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 1, chunk])

    def _draw(self, rng: np.random.Generator, count: int) -> _Rows:
        # A beta-binomial: mean 0.3 x 20 = 6, and wide enough to reach both 0 and 20.
        length_N = rng.binomial(MAX_ITEMS, rng.beta(1.5, 3.5, size=count))
        offsets = np.concatenate([[0], np.cumsum(length_N)])
        ids: list[IntArray] = []
        for cumulative, stride in zip(self._cumulative, self._strides, strict=True):
            values = draw(cumulative, rng.random(count if len(ids) < len(CARDINALITIES) else offsets[-1]))
            ids.append(values * stride % len(cumulative))
        dense_NF = rng.standard_normal((count, NUM_DENSE))
        # The odd ones are skewed, as prices and counts are.
        dense_NF[:, 1::2] = np.exp(dense_NF[:, 1::2])
        return _Rows(ids=ids[:-1], items=ids[-1], item_offsets=offsets, dense_NF=dense_NF)

    def _scores_TN(self, rows: _Rows) -> FloatArray:
        """Logits of click and conversion, and the mean of log dwell."""
        scores_TN = self._dense_TF @ np.log1p(np.abs(rows.dense_NF)).T
        for effects, ids in zip(self._effects, rows.ids, strict=False):
            scores_TN += effects[:, ids]
        # One interaction, so that the experts have something to find.
        scores_TN += 1.5 * self._effects[0][:, rows.ids[0]] * self._effects[1][:, rows.ids[1]]
        return np.asarray(
            SPREAD * (scores_TN - self._mean_T[:, None]) / self._deviation_T[:, None] + self._bias_T[:, None]
        )

    def _calibrate(self) -> None:
        """Fix scales and biases on rows of their own, so that every seed gives the same rates and difficulty."""
        rows = self._draw(np.random.default_rng([self.seed, 2]), CHUNK_ROWS // 2)
        raw_TN = self._scores_TN(rows) / SPREAD
        self._mean_T, self._deviation_T = raw_TN.mean(axis=1), raw_TN.std(axis=1)
        click_N, conversion_N, _ = self._scores_TN(rows)
        bias_click = solve_bias(click_N, CLICK_RATE)
        bias_conversion = solve_bias(conversion_N, CONVERSION_RATE, sigmoid(click_N + bias_click))
        self._bias_T = np.array([bias_click, bias_conversion, np.log(MEDIAN_DWELL_SECONDS)])

    def _chunk(self, chunk: int) -> pa.Table:
        rng = self._rng(chunk)
        rows = self._draw(rng, CHUNK_ROWS)
        click_N, conversion_N, log_dwell_N = self._scores_TN(rows)
        clicked_N = rng.random(CHUNK_ROWS) < sigmoid(click_N)
        converted_N = clicked_N & (rng.random(CHUNK_ROWS) < sigmoid(conversion_N))
        dwell_N = np.exp(log_dwell_N + rng.standard_normal(CHUNK_ROWS)).astype(np.float32)
        arrays = [pa.array(ids) for ids in rows.ids]
        arrays.append(pa.ListArray.from_arrays(pa.array(rows.item_offsets.astype(np.int32)), pa.array(rows.items)))
        arrays += [pa.array(rows.dense_NF[:, column].astype(np.float32)) for column in range(NUM_DENSE)]
        arrays += [pa.array(clicked_N.astype(np.int8)), pa.array(converted_N.astype(np.int8))]
        arrays.append(pa.array(dwell_N, mask=~clicked_N))
        return pa.Table.from_arrays(arrays, schema=COLUMNS)


def _coprime(size: int) -> int:
    """A number near 0.618 x `size` without a common factor: multiplying by it, modulo `size`, permutes the ids."""
    stride = int(0.618 * size)
    while gcd(stride, size) != 1:
        stride += 1
    return stride
