"""Label statistics: of weighted rows those of rows that come so often; B rows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from mtrec.batch import Label
from mtrec.labels import SAMPLE_ROWS, LabelFit, LabelStatistics
from mtrec.tasks import Binary, Dwell, Objectives, Regression, TaskSpec

OBJECTIVES = Objectives(
    {
        "click": TaskSpec(Binary("click")),
        "conversion": TaskSpec(Binary("conversion"), given="click", space="entire"),
        "dwell": TaskSpec(Dwell("dwell"), given="click"),
        "price": TaskSpec(Regression("price", loss="huber")),
    }
)
LABELS = {name: Label(name) for name in OBJECTIVES.specs}


def log(rows: int = 3_000) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    click = (rng.random(rows) < 0.4).astype(np.float32)
    return {
        "click": click,
        "conversion": np.where(click == 1, rng.random(rows) < 0.2, np.where(rng.random(rows) < 0.5, 0.0, np.nan)),
        "dwell": np.where(click == 1, rng.lognormal(2, 1, rows), np.nan),
        "price": np.where(rng.random(rows) < 0.3, rng.normal(50, 9, rows), np.nan),
        "weight": rng.integers(0, 4, rows) * (1 + 3 * click.astype(np.int64)),  # a click weighs more
    }


def fitted(columns: dict[str, Any], weight: str | None) -> dict[str, LabelStatistics]:
    fit = LabelFit(LABELS, OBJECTIVES, weight)
    table = pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()})
    for batch in table.to_batches(max_chunksize=700):
        fit.add(batch)
    return fit.statistics()


def test_a_weight_is_so_many_rows() -> None:
    columns = log()
    repeated = {name: np.repeat(values, columns["weight"]) for name, values in columns.items()}
    weighted, plain = fitted(columns, "weight"), fitted(repeated, None)
    without = fitted(columns, None)
    for name, found in weighted.items():
        wanted = plain[name]
        assert (found.rows, found.trained) == (without[name].rows, without[name].trained)  # counts stay counts
        assert found.mean == pytest.approx(wanted.mean, rel=1e-6)
        assert found.target_mean == pytest.approx(wanted.target_mean, rel=1e-6)
        assert found.density == pytest.approx(wanted.density, rel=1e-6)
        assert found.target_mean != pytest.approx(without[name].target_mean, rel=0.005) or name == "price"
        found_loss = OBJECTIVES.base_loss(name, found.target_mean, found.sample_tensor())
        assert found_loss == pytest.approx(OBJECTIVES.base_loss(name, wanted.target_mean, wanted.sample_tensor()), rel=0.01)
        bias = OBJECTIVES.initial_bias(name, found.mean, found.sample_tensor())
        wanted_bias = OBJECTIVES.initial_bias(name, wanted.mean, wanted.sample_tensor())
        torch.testing.assert_close(bias, wanted_bias, rtol=0.01, atol=0.01)


def test_equal_weights_change_nothing_and_no_weight_is_no_rate() -> None:
    columns = log()
    without = fitted(columns, None)
    for name, found in fitted({**columns, "weight": np.full(3_000, 0.25)}, "weight").items():
        assert found.mean == pytest.approx(without[name].mean)
        assert np.array_equal(found.sample, without[name].sample)
    for name, found in fitted({**columns, "weight": np.zeros(3_000)}, "weight").items():
        assert (found.mean, found.target_mean, found.density) == (0.0, 0.0, 0.0)
        assert np.isfinite(float(OBJECTIVES.base_loss(name, found.target_mean, found.sample_tensor())))
        assert OBJECTIVES.initial_bias(name, found.mean, found.sample_tensor()).isfinite().all()


def test_the_sample_is_spread_over_all_rows() -> None:
    fit = LabelFit({"price": Label("price")}, Objectives({"price": TaskSpec(Regression("price"))}), "weight")
    for start in range(0, 3 * SAMPLE_ROWS, 50_000):
        price = np.arange(start, min(start + 50_000, 3 * SAMPLE_ROWS), dtype=np.float64)
        fit.add(pa.record_batch({"price": price, "weight": np.where(price < SAMPLE_ROWS, 2.0, 1.0)}))
    sample = fit.statistics()["price"].sample
    assert SAMPLE_ROWS / 2 < len(sample) <= SAMPLE_ROWS
    assert (sample < SAMPLE_ROWS).mean() == pytest.approx(0.5, abs=0.001)
    assert fit.statistics()["price"].mean == pytest.approx((2 * (SAMPLE_ROWS / 2) + 2 * (2 * SAMPLE_ROWS)) / 4, rel=1e-4)
