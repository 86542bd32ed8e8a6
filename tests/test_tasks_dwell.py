"""Losses for seconds against scipy and scikit-learn, what they are minimal at, and where they begin.

B rows, C logits, N labels of a sample.
"""

import math
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from heads import LOSS_FORMS, fit_constant, random_logits, skewed_seconds

from mtrec.tasks import Dwell
from mtrec.tasks.dwell import build_loss

SECONDS_N = np.array([0.0, 0.0, 0.25, 1.0, 4.0, 33.0, 1800.0])


# --- losses against outside formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1.1, 1.5, 1.9])
def test_tweedie_is_half_the_deviance_of_scikit_learn(power: float):
    logits_BC = random_logits(len(SECONDS_N), 1)
    loss_B = build_loss({"kind": "tweedie", "power": power}, "x").loss(logits_BC, torch.tensor(SECONDS_N).float())
    for row, seconds in enumerate(SECONDS_N):
        mean = [math.exp(logits_BC[row, 0].item())]
        expected = sklearn.metrics.mean_tweedie_deviance([seconds], mean, power=power) / 2
        assert loss_B[row].item() == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_poisson_is_half_the_deviance_and_differs_from_the_likelihood_by_a_constant():
    seconds_B = torch.tensor([0.0, 1.0, 7.0, 7.0])
    logits_BC = random_logits(4, 1)
    loss_B = build_loss("poisson", "x").loss(logits_BC, seconds_B)
    mean_B = logits_BC[:, 0].double().exp().numpy()
    expected = sklearn.metrics.mean_poisson_deviance(seconds_B.numpy(), mean_B) / 2
    assert loss_B.mean().item() == pytest.approx(expected, rel=1e-5)
    likelihood_B = -scipy.stats.poisson.logpmf(seconds_B.numpy(), mean_B)
    assert (loss_B[2] - loss_B[3]).item() == pytest.approx(likelihood_B[2] - likelihood_B[3], rel=1e-4)


def test_ziln_is_the_density_of_scipy():
    logits_BC = random_logits(len(SECONDS_N), 3)
    loss = build_loss({"kind": "ziln", "max_sigma": 2.0}, "x")
    loss_B = loss.loss(logits_BC, torch.tensor(SECONDS_N).float())
    p_B, mu_B, raw_B = scipy.special.expit(logits_BC[:, 0].double().numpy()), logits_BC[:, 1], logits_BC[:, 2]
    for row, seconds in enumerate(SECONDS_N):
        sigma = 0.05 + 1.95 * scipy.special.expit(raw_B[row].item())
        p, mu = float(p_B[row]), mu_B[row].item()
        log_density = scipy.stats.lognorm.logpdf(seconds, s=sigma, scale=math.exp(mu)) if seconds else 0.0
        expected = -(math.log(p) + log_density) if seconds else -math.log1p(-p)
        assert loss_B[row].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        mean = p * scipy.stats.lognorm.mean(s=sigma, scale=math.exp(mu))
        assert loss.seconds(logits_BC)[row].item() == pytest.approx(mean, rel=1e-4)


def test_ziln_sigma_never_exceeds_its_bound():
    seconds = build_loss("ziln", "x").seconds(torch.tensor([[1e4, 0.0, 1e4]]))
    assert seconds.item() == pytest.approx(math.exp(2.5**2 / 2), rel=1e-5)


def test_weighted_logistic_is_logistic_regression_on_weighted_rows():
    logits_BC, seconds_B = random_logits(len(SECONDS_N), 1), torch.tensor(SECONDS_N).float()
    p_B = scipy.special.expit(logits_BC[:, 0].double().numpy())
    unbiased_B = build_loss("weighted_logistic", "x").loss(logits_BC, seconds_B)
    np.testing.assert_allclose(unbiased_B, -SECONDS_N * np.log(p_B) - np.log1p(-p_B), rtol=1e-5)
    published_B = build_loss({"kind": "weighted_logistic", "variant": "covington"}, "x").loss(logits_BC, seconds_B)
    weight_B = np.where(SECONDS_N > 0, SECONDS_N, 1.0)
    expected = sklearn.metrics.log_loss(SECONDS_N > 0, p_B, sample_weight=weight_B)
    assert published_B.sum().item() / weight_B.sum() == pytest.approx(expected, rel=1e-5)


def test_log_mse_and_huber():
    logits_BC, seconds_B = random_logits(len(SECONDS_N), 1), torch.tensor(SECONDS_N).float()
    f_B = logits_BC[:, 0].double().numpy()
    error_B = f_B - np.log1p(SECONDS_N)
    np.testing.assert_allclose(build_loss("log_mse", "x").loss(logits_BC, seconds_B), error_B**2, rtol=1e-4, atol=1e-6)
    huber = build_loss({"kind": "huber", "delta": 0.7}, "x")
    np.testing.assert_allclose(
        huber.loss(logits_BC, seconds_B), scipy.special.huber(0.7, error_B), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(huber.seconds(logits_BC), np.expm1(np.maximum(f_B, 0.0)), rtol=1e-5)
    seconds_huber = build_loss({"kind": "huber", "delta": 5.0, "on": "seconds"}, "x")
    np.testing.assert_allclose(
        seconds_huber.loss(logits_BC, seconds_B), scipy.special.huber(5.0, f_B - SECONDS_N), rtol=1e-4
    )
    assert seconds_huber.log1p_seconds(logits_BC) is None


def test_logsun_is_log_mse_plus_a_tenth_of_the_ratio_deviance():
    logits_BC, seconds_B = random_logits(len(SECONDS_N), 2), torch.tensor(SECONDS_N).float()
    f_B, z_B = logits_BC[:, 0].double().numpy(), np.log1p(np.exp(logits_BC[:, 1].double().numpy()))
    scale_B = np.abs(np.expm1(f_B)) + 1.0
    ratio_B = np.minimum(SECONDS_N / scale_B, 100.0)
    branch_B = [sklearn.metrics.mean_poisson_deviance([r], [z]) / 2 for r, z in zip(ratio_B, z_B, strict=True)]
    loss = build_loss("logsun", "x")
    expected_B = (f_B - np.log1p(SECONDS_N)) ** 2 + 0.1 * np.array(branch_B)
    np.testing.assert_allclose(loss.loss(logits_BC, seconds_B), expected_B, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss.seconds(logits_BC), z_B * scale_B, rtol=1e-5)
    np.testing.assert_allclose(loss.log1p_seconds(logits_BC), f_B, rtol=1e-6)
    assert ratio_B.max() == 100.0  # the last row is one that the clip moves


def test_logsun_branch_leaves_the_order_alone():
    seconds_B = torch.tensor(SECONDS_N).float()
    logits_BC = random_logits(len(SECONDS_N), 2).requires_grad_()
    build_loss("logsun", "x").loss(logits_BC, seconds_B).sum().backward()
    alone_BC = logits_BC.detach()[:, :1].clone().requires_grad_()
    build_loss("log_mse", "x").loss(alone_BC, seconds_B).sum().backward()
    assert torch.equal(logits_BC.grad[:, 0], alone_BC.grad[:, 0])
    assert (logits_BC.grad[:, 1] != 0).all()


# --- what the losses are minimal at ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        *("weighted_logistic", "tweedie", {"kind": "tweedie", "power": 1.2}, "poisson", "ziln"),
        {"kind": "logsun", "max_ratio": 1e6},  # without the clip
    ],
    ids=str,
)
def test_a_fitted_constant_is_the_mean(form: str | dict[str, Any]):
    seconds_N = skewed_seconds()
    loss = build_loss(form, "x")
    logits_1C = fit_constant(loss.loss, torch.full((loss.num_logits,), 0.3), seconds_N)
    assert loss.seconds(logits_1C).item() == pytest.approx(seconds_N.mean().item(), rel=0.01)


def test_log_scale_heads_fit_the_mean_of_log1p_and_too_few_seconds():
    seconds_N = skewed_seconds()
    for form in ("log_mse", "logsun"):
        loss = build_loss(form, "x")
        logits_1C = fit_constant(loss.loss, torch.zeros(loss.num_logits), seconds_N)
        assert loss.log1p_seconds(logits_1C).item() == pytest.approx(seconds_N.log1p().mean().item(), rel=1e-3)
    log_mse = build_loss("log_mse", "x")
    fitted = log_mse.seconds(fit_constant(log_mse.loss, torch.zeros(1), seconds_N)).item()
    assert fitted < 0.5 * seconds_N.mean().item()


def test_logsun_clip_loses_little():
    seconds_N = skewed_seconds()
    loss = build_loss("logsun", "x")
    logits_1C = fit_constant(loss.loss, torch.zeros(2), seconds_N)
    assert loss.seconds(logits_1C).item() == pytest.approx(seconds_N.mean().item(), rel=0.02)


def test_covington_is_off_by_the_share_of_zeros():
    seconds_N = skewed_seconds()
    loss = build_loss({"kind": "weighted_logistic", "variant": "covington"}, "x")
    logits_1C = fit_constant(loss.loss, torch.zeros(1), seconds_N)
    expected = seconds_N.mean().item() / (seconds_N == 0).float().mean().item()
    assert loss.seconds(logits_1C).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", ["weighted_logistic", "tweedie", "poisson", "logsun", "log_mse", "huber"])
def test_far_logits_are_pulled_back(form: str):
    loss = build_loss(form, "x")
    logits_BC = torch.tensor([[-1e4] * loss.num_logits, [1e4] * loss.num_logits]).requires_grad_()
    loss.loss(logits_BC, torch.tensor([20.0, 20.0])).sum().backward()
    assert logits_BC.grad[0, 0] < 0.0 < logits_BC.grad[1, 0]


# --- where they begin, units and the cap ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", LOSS_FORMS, ids=str)
def test_initial_bias_of_dwell_predicts_the_base_rate(form: str | dict[str, Any]):
    seconds_N = skewed_seconds()
    task = Dwell("dwell", loss=form)
    mean = seconds_N.mean().item()
    logits_1C = task.initial_bias(mean, seconds_N).reshape(1, -1)
    assert logits_1C.shape == (1, task.num_logits)
    kind = form if isinstance(form, str) else form["kind"]
    seconds = task.predict(logits_1C).item()
    if kind in ("log_mse", "huber"):  # no mean in their reach: their own minimiser instead
        fitted_1C = fit_constant(task.loss, logits_1C[0] + 0.2, seconds_N)
        assert seconds == pytest.approx(task.predict(fitted_1C).item(), rel=5e-3)
    elif isinstance(form, dict) and "variant" in form:
        assert seconds == pytest.approx(mean / (seconds_N == 0).float().mean().item(), rel=1e-3)
    else:
        assert seconds == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("form", LOSS_FORMS, ids=str)
@pytest.mark.parametrize("sample", [[0.0], [5.0], [0.0, 0.0, 1e9]], ids=str)
def test_initial_bias_is_finite_for_odd_samples(form: str | dict[str, Any], sample: list[float]):
    task = Dwell("dwell", loss=form)
    assert task.initial_bias(float(np.mean(sample)), torch.tensor(sample)).isfinite().all()


@pytest.mark.parametrize("form", LOSS_FORMS, ids=str)
def test_initial_bias_is_that_of_the_capped_labels(form: str | dict[str, Any]):
    sample_N = skewed_seconds()
    capped_N = sample_N.clamp(max=10.0)
    found_C = Dwell("dwell", loss=form, cap_seconds=10.0).initial_bias(sample_N.mean().item(), sample_N)
    torch.testing.assert_close(found_C, Dwell("dwell", loss=form).initial_bias(capped_N.mean().item(), capped_N))


def test_ziln_begins_at_the_spread_of_the_sample_and_off_the_bounds_of_sigma():
    ziln = build_loss({"kind": "ziln", "max_sigma": 2.0}, "x")
    sample_N = torch.tensor([0.0, 2.0, 6.0], dtype=torch.float64)
    assert ziln.initial_bias(3.0, sample_N)[2].sigmoid() * 1.95 + 0.05 == pytest.approx(math.log(3) / 2)
    for sample, share in (([5.0, 5.0], 0.02), ([1e-3, 1e5], 0.98)):
        bias_C = ziln.initial_bias(7.0, torch.tensor(sample, dtype=torch.float64))
        assert bias_C[2].sigmoid().item() == pytest.approx(share)
        assert ziln.seconds(bias_C.reshape(1, 3)).item() == pytest.approx(7.0, rel=1e-5)


def test_units_and_cap_of_dwell():
    assert [Dwell("d", unit=unit).label_scale for unit in ("seconds", "milliseconds", "minutes")] == [1.0, 0.001, 60.0]
    capped = Dwell("d", loss="poisson", cap_seconds=10.0)
    logits_BC, plain = torch.tensor([[1.0], [1.0]]), Dwell("d", loss="poisson")
    assert torch.equal(
        capped.loss(logits_BC, torch.tensor([3.0, 500.0])), plain.loss(logits_BC, torch.tensor([3.0, 10.0]))
    )
    sample_N = torch.tensor([2.0, 500.0])
    assert capped.predict(capped.initial_bias(251.0, sample_N).reshape(1, 1)).item() == pytest.approx(6.0)
