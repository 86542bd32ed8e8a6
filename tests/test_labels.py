"""Label statistics: of weighted rows those of rows that come so often; B rows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import mtrec.labels
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


def test_statistics_are_those_of_the_rows_that_count() -> None:
    columns = log()
    click, conversion, dwell = columns["click"], columns["conversion"], columns["dwell"]
    clicked, free = click == 1, np.flatnonzero(click == 0)
    conversion[free[:7]] = 1.0  # not without a click
    click[free[5:9]] = np.nan  # unknown: the conversions of two of the seven may be right
    conversion[free[7:9]] = 1.0, 0.0
    found = fitted(columns, None)
    joint = np.where(clicked, conversion, 0.0)
    settled = ~np.isnan(click) | (conversion == 0)
    for name, observed, trained, mean, target_mean, broken in (
        ("click", ~np.isnan(click), ~np.isnan(click), np.nanmean(click), np.nanmean(click), 0),
        ("conversion", ~np.isnan(conversion), settled, conversion[clicked].mean(), joint[settled].mean(), 5),
        ("dwell", clicked, clicked, dwell[clicked].mean(), dwell[clicked].mean(), 0),
    ):
        each = found[name]
        assert (each.rows, each.observed, each.trained, each.broken_given) == (3_000, observed.sum(), trained.sum(), broken)
        assert (each.mean, each.target_mean) == pytest.approx((mean, target_mean), rel=1e-6)
        assert each.density == pytest.approx(trained.mean())
    assert np.array_equal(found["dwell"].sample, dwell[clicked].astype(np.float32))


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


def test_the_sample_is_every_second_row_however_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtrec.labels, "SAMPLE_ROWS", 100)
    price = np.arange(150, dtype=np.float64)
    for size in (150, 7, 1):
        fit = LabelFit({"price": Label("price")}, Objectives({"price": TaskSpec(Regression("price"))}), None)
        for start in range(0, 150, size):
            fit.add(pa.record_batch({"price": price[start : start + size]}))
        assert fit.statistics()["price"].sample.tolist() == price[::2].tolist()


def test_the_sample_is_spread_over_all_rows() -> None:
    fit = LabelFit({"price": Label("price")}, Objectives({"price": TaskSpec(Regression("price"))}), "weight")
    for start in range(0, 3 * SAMPLE_ROWS, 50_000):
        price = np.arange(start, min(start + 50_000, 3 * SAMPLE_ROWS), dtype=np.float64)
        fit.add(pa.record_batch({"price": price, "weight": np.where(price < SAMPLE_ROWS, 2.0, 1.0)}))
    sample = fit.statistics()["price"].sample
    assert SAMPLE_ROWS / 2 < len(sample) <= SAMPLE_ROWS
    assert (sample < SAMPLE_ROWS).mean() == pytest.approx(0.5, abs=0.001)
    assert fit.statistics()["price"].mean == pytest.approx((2 * (SAMPLE_ROWS / 2) + 2 * (2 * SAMPLE_ROWS)) / 4, rel=1e-4)
