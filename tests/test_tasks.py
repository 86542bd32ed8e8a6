"""Tasks against scipy, scikit-learn and formulas in float64. B rows, C logits, K tasks, N labels of a sample."""

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtrec.kinds import check_options, resolve
from mtrec.tasks import (
    DWELL_LOSSES,
    TASKS,
    Binary,
    Dwell,
    LabelRange,
    Multiclass,
    Objectives,
    Regression,
    Task,
    TaskSpec,
    automatic_weight,
)
from mtrec.tasks.dwell import build_loss
from mtrec.tasks.dwell_losses import LogSUN

NAN = math.nan
LOSS_FORMS: list[str | dict[str, Any]] = [
    "logsun",
    "log_mse",
    "huber",
    {"kind": "huber", "on": "seconds", "delta": 30.0},
    "weighted_logistic",
    {"kind": "weighted_logistic", "variant": "covington"},
    "ziln",
    "tweedie",
    {"kind": "tweedie", "power": 1.05},
    {"kind": "tweedie", "power": 1.95},
    "poisson",
]
ALL_TASKS: list[Task] = [
    Binary("like"),
    Regression("price"),
    Regression("price", loss="huber", scale=5.0),
    Multiclass("reaction", num_classes=4),
    *[Dwell("dwell", loss=form) for form in LOSS_FORMS],
]
SECONDS_N = np.array([0.0, 0.0, 0.25, 1.0, 4.0, 33.0, 1800.0])


def task_id(task: Task) -> str:
    loss = getattr(task, "dwell_loss", None)
    options = [str(value) for value in vars(loss).values()] if loss is not None else []
    return "-".join([task.family, *([type(loss).__name__] if loss is not None else []), *options])


def random_logits(rows: int, columns: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def skewed_seconds(rows: int = 4001) -> Tensor:
    """Zero-inflated log-normal by its quantiles: 40 % zeros, log T ~ N(2, 1.2^2)."""
    quantiles = (np.arange(rows) + 0.5) / rows
    seconds = np.exp(scipy.stats.norm.ppf(quantiles, 2.0, 1.2))
    zeros = np.zeros(rows * 2 // 3)
    return torch.tensor(np.concatenate([zeros, seconds]), dtype=torch.float32)


def fit_constant(loss: Callable[[Tensor, Tensor], Tensor], start_C: Tensor, seconds_N: Tensor) -> Tensor:
    """(1, C) constant logits after gradient descent (L-BFGS) on the mean loss."""
    logits_C = start_C.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits_C], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-10)

    def closure() -> Tensor:
        optimizer.zero_grad()
        total = loss(logits_C.expand(len(seconds_N), -1), seconds_N).mean()
        total.backward()
        return total

    optimizer.step(closure)
    return logits_C.detach().reshape(1, -1)


# --- losses against outside formulas ---------------------------------------------------------------------------------


def test_binary_is_the_log_loss():
    logits_BC, labels_B = random_logits(50, 1), (torch.arange(50) % 3 == 0).float()
    task = Binary("click")
    expected = sklearn.metrics.log_loss(labels_B.numpy(), scipy.special.expit(logits_BC[:, 0].double().numpy()))
    assert task.loss(logits_BC, labels_B).mean().item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(task.predict(logits_BC), scipy.special.expit(logits_BC[:, 0].numpy()), rtol=1e-6)


def test_multiclass_is_cross_entropy():
    logits_BC, labels_B = random_logits(50, 4), torch.arange(50).float() % 4
    task = Multiclass("reaction", num_classes=4)
    p_BC = scipy.special.softmax(logits_BC.double().numpy(), axis=1)
    expected = sklearn.metrics.log_loss(labels_B.numpy(), p_BC, labels=[0, 1, 2, 3])
    assert task.loss(logits_BC, labels_B).mean().item() == pytest.approx(expected, rel=1e-6)
    np.testing.assert_allclose(task.predict(logits_BC), p_BC, rtol=1e-5)


def test_regression_squared_and_huber_in_scales():
    logits_BC, labels_B = torch.tensor([[1.0], [1.0], [-2.0]]), torch.tensor([12.0, 40.0, 0.0])
    squared = Regression("price", scale=10.0)
    np.testing.assert_allclose(squared.loss(logits_BC, labels_B), [0.04, 9.0, 4.0], rtol=1e-5)
    huber = Regression("price", scale=10.0, loss="huber", delta=1.0)
    np.testing.assert_allclose(huber.loss(logits_BC, labels_B), [0.02, 2.5, 1.5], rtol=1e-5)
    np.testing.assert_allclose(squared.predict(logits_BC), [10.0, 10.0, -20.0])


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


# --- finite at any logit ---------------------------------------------------------------------------------------------


def labels_for(task: Task) -> list[float]:
    low, high, integer = task.label_range
    if integer:
        return [float(label) for label in range(int(low), int(high) + 1)]
    return [0.0, 1e-3, 1.0, 40.0, 1e6] + ([-40.0] if low is None else [])


@pytest.mark.parametrize("task", ALL_TASKS, ids=task_id)
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_losses_gradients_and_predictions_are_finite(task: Task, size: float):
    signs = torch.cartesian_prod(*[torch.tensor([-size, 0.0, size])] * task.num_logits).reshape(-1, task.num_logits)
    for label in labels_for(task):
        logits_BC = signs.clone().requires_grad_()
        loss_B = task.loss(logits_BC, torch.full((len(signs),), label))
        loss_B.sum().backward()
        assert loss_B.isfinite().all(), label
        assert logits_BC.grad.isfinite().all(), label
    assert task.predict(signs).isfinite().all()
    if task.family != "regression":
        assert (task.predict(signs) >= 0.0).all()
    log_prediction = task.log_prediction(signs)
    assert log_prediction is None or log_prediction.isfinite().all()


@pytest.mark.parametrize("task", ALL_TASKS, ids=task_id)
def test_a_diverged_model_shows(task: Task):
    for bad in (NAN, math.inf, -math.inf):
        logits_BC = torch.full((1, task.num_logits), bad)
        assert not task.loss(logits_BC, torch.tensor([1.0])).isfinite().any()


@pytest.mark.parametrize("form", ["weighted_logistic", "tweedie", "poisson", "logsun", "log_mse", "huber"])
def test_far_logits_are_pulled_back(form: str):
    loss = build_loss(form, "x")
    logits_BC = torch.tensor([[-1e4] * loss.num_logits, [1e4] * loss.num_logits]).requires_grad_()
    loss.loss(logits_BC, torch.tensor([20.0, 20.0])).sum().backward()
    assert logits_BC.grad[0, 0] < 0.0 < logits_BC.grad[1, 0]


@pytest.mark.parametrize("task", ALL_TASKS, ids=task_id)
def test_gradients_agree_with_finite_differences(task: Task):
    logits_BC = random_logits(6, task.num_logits, seed=3, scale=1.0).requires_grad_()
    labels_B = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    task.loss(logits_BC, labels_B).sum().backward()
    step = 1e-2
    for column in range(task.num_logits):
        if isinstance(task, Dwell) and isinstance(task.dwell_loss, LogSUN) and column == 0:
            continue  # f is detached in the branch: its gradient is tested by itself
        shift_C = torch.zeros(task.num_logits)
        shift_C[column] = step
        with torch.no_grad():
            up_B, down_B = task.loss(logits_BC + shift_C, labels_B), task.loss(logits_BC - shift_C, labels_B)
        difference_B = (up_B - down_B) / (2 * step)
        np.testing.assert_allclose(logits_BC.grad[:, column], difference_B, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("task", ALL_TASKS, ids=task_id)
def test_bf16_logits_give_float32_losses_and_predictions(task: Task):
    logits_BC = random_logits(4, task.num_logits).bfloat16()
    assert task.loss(logits_BC, torch.ones(4)).dtype == torch.float32
    assert task.predict(logits_BC).dtype == torch.float32
    assert torch.equal(task.predict(logits_BC), task.predict(logits_BC.float()))


@pytest.mark.parametrize("task", ALL_TASKS, ids=task_id)
def test_no_rows(task: Task):
    assert task.loss(torch.zeros(0, task.num_logits), torch.zeros(0)).shape == (0,)
    assert task.predict(torch.zeros(0, task.num_logits)).shape[0] == 0


# --- base rates ------------------------------------------------------------------------------------------------------


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


def test_initial_bias_of_the_others():
    binary = Binary("click")
    assert binary.predict(binary.initial_bias(0.03, torch.zeros(5)).reshape(1, 1)).item() == pytest.approx(
        0.03, rel=1e-5
    )
    assert binary.initial_bias(0.0, torch.zeros(5)).isfinite().all()
    multiclass = Multiclass("reaction", num_classes=3)
    p_C = multiclass.predict(multiclass.initial_bias(0.0, torch.tensor([0.0, 0.0, 1.0, 0.0])).reshape(1, 3))[0]
    np.testing.assert_allclose(p_C, [0.75, 0.25, 0.0], atol=3e-3)
    assert (p_C > 0).all()
    regression = Regression("price", scale=7.0)
    assert regression.predict(regression.initial_bias(-21.0, torch.zeros(1)).reshape(1, 1)).item() == -21.0


def test_base_loss_is_the_entropy_the_variance_or_the_fitted_minimum():
    seconds_N = skewed_seconds(601)
    objectives = Objectives(
        {
            "click": TaskSpec(Binary("click")),
            "reaction": TaskSpec(Multiclass("reaction", num_classes=3)),
            "price": TaskSpec(Regression("price")),
            "dwell": TaskSpec(Dwell("dwell", loss="tweedie")),
        }
    )
    # The sample holds no click at all; the mean knows better.
    assert objectives.base_loss("click", 0.01, torch.zeros(9)) == pytest.approx(scipy.stats.entropy([0.01, 0.99]))
    classes_N = torch.tensor([0.0] * 50 + [1.0] * 30 + [2.0] * 20)
    assert objectives.base_loss("reaction", 0.7, classes_N) == pytest.approx(
        scipy.stats.entropy([0.5, 0.3, 0.2]), rel=1e-4
    )
    prices_N = torch.tensor([1.0, 5.0, 9.0])
    assert objectives.base_loss("price", 5.0, prices_N) == pytest.approx(np.var(prices_N.numpy()))
    mean = seconds_N.double().mean().item()
    expected = sklearn.metrics.mean_tweedie_deviance(seconds_N.numpy(), np.full(len(seconds_N), mean), power=1.5) / 2
    assert objectives.base_loss("dwell", mean, seconds_N) == pytest.approx(expected, rel=1e-4)


def test_base_rates_take_the_rows_that_count():
    objectives = funnel(space="entire")
    labels = {
        "click": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, NAN]),
        "conversion": torch.tensor([1.0, 0.0, 0.0, NAN, NAN, 1.0, 0.0, 1.0]),
        "dwell": torch.tensor([2.0, 4.0, NAN, 6.0, 99.0, NAN, NAN, 99.0]),
    }
    rates = objectives.base_rates(labels)
    assert (rates["click"].rows, rates["click"].mean) == (7, pytest.approx(4 / 7))
    assert rates["click"].share == pytest.approx(7 / 8)
    # The head predicts p(conversion | click) = 1/3; its loss is on the product, known on 6 rows, 1 in one of them.
    assert rates["conversion"].mean == pytest.approx(1 / 3)
    assert rates["conversion"].bias_C.sigmoid().item() == pytest.approx(1 / 3, rel=1e-5)
    assert (rates["conversion"].rows, rates["conversion"].loss) == (
        6,
        pytest.approx(scipy.stats.entropy([1 / 6, 5 / 6])),
    )
    assert (rates["dwell"].rows, rates["dwell"].mean) == (3, pytest.approx(4.0))
    assert rates["dwell"].bias_C[0].item() == pytest.approx(np.log1p([2.0, 4.0, 6.0]).mean(), rel=1e-5)
    labels["conversion"] = torch.tensor([NAN, NAN, NAN, NAN, 0.0, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match=r"`tasks\.conversion` should have a label on a row where its given, 'click'"):
        objectives.base_rates(labels)


def test_automatic_weight_is_clipped():
    assert [automatic_weight(loss) for loss in (0.5, 0.05, 0.0, -3.0, 100.0)] == [1.0, 5.0, 5.0, 5.0, 0.2]


# --- objectives: masks, given, the entire space ----------------------------------------------------------------------


def funnel(space: str = "observed", loss: str = "logsun") -> Objectives:
    return Objectives(
        {
            "click": TaskSpec(Binary("click")),
            "conversion": TaskSpec(Binary("conversion"), given="click", space=space),  # type: ignore[arg-type]
            "dwell": TaskSpec(Dwell("dwell", loss=loss), given="click"),
        }
    )


def chain(space: str = "entire") -> Objectives:
    """Declared leaf first: the order of the file is not the order of the funnel."""
    return Objectives(
        {
            "buy": TaskSpec(Binary("buy"), "cart", space),  # type: ignore[arg-type]
            "cart": TaskSpec(Binary("cart"), "click", space),  # type: ignore[arg-type]
            "click": TaskSpec(Binary("click")),
        }
    )


def test_observed_space_counts_rows_whose_given_is_observed_and_1():
    labels = {
        "click": torch.tensor([1.0, 1.0, 0.0, NAN]),
        "conversion": torch.tensor([1.0, NAN, 1.0, 1.0]),
        "dwell": torch.tensor([3.0, 5.0, 3.0, 3.0]),
    }
    objectives = funnel()
    logits = {"click": random_logits(4, 1), "conversion": random_logits(4, 1, 1), "dwell": random_logits(4, 2, 2)}
    loss_BK, mask_BK = objectives.losses(logits, labels)
    expected_BK = [[True, True, True], [True, False, True], [True, False, False], [False, False, False]]
    assert mask_BK.tolist() == expected_BK
    assert torch.equal(mask_BK, ~objectives.targets(labels).isnan())
    assert (loss_BK[~mask_BK] == 0.0).all()
    assert loss_BK[0, 1] == Binary("c").loss(logits["conversion"][:1], torch.ones(1))[0]
    assert loss_BK[1, 2] == Dwell("d").loss(logits["dwell"][1:2], torch.tensor([5.0]))[0]


@pytest.mark.parametrize("task", ALL_TASKS, ids=task_id)
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_masked_rows_get_exactly_no_gradient(task: Task, size: float):
    objectives = Objectives({"click": TaskSpec(Binary("click")), "other": TaskSpec(task, given="click")})
    logits = {
        "click": (size * random_logits(5, 1)).requires_grad_(),
        "other": (size * random_logits(5, task.num_logits, 1)).requires_grad_(),
    }
    labels = {"click": torch.tensor([1.0, 0.0, NAN, 1.0, 1.0]), "other": torch.tensor([NAN, 1.0, 1.0, NAN, 1.0])}
    loss_BK, mask_BK = objectives.losses(logits, labels)
    loss_BK.sum().backward()
    assert mask_BK[:, 1].tolist() == [False, False, False, False, True]
    assert loss_BK.isfinite().all()
    for column, name in enumerate(("click", "other")):
        assert (logits[name].grad[~mask_BK[:, column]] == 0.0).all()
        assert logits[name].grad.isfinite().all()
    if size == 1.0:
        assert (logits["other"].grad[4] != 0.0).any()


def test_masked_labels_are_replaced_by_allowed_ones():
    seen: list[Tensor] = []

    class Picky(Regression):
        def loss(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
            seen.append(labels_B)
            return super().loss(logits_BC, labels_B)

    for low, high in ((2.0, None), (None, -2.0), (2.0, 3.0), (-1.0, 1.0)):
        objectives = Objectives({"price": TaskSpec(Picky("price", low=low, high=high))})
        objectives.losses({"price": torch.zeros(1, 1)}, {"price": torch.tensor([NAN])})
    assert torch.cat(seen).tolist() == [2.0, -2.0, 2.0, 0.0]
    seen.clear()
    several = {"price": TaskSpec(Picky("price", low=2.0)), "gain": TaskSpec(Picky("gain", low=-1.0, high=1.0))}
    logits, labels = dict.fromkeys(several, torch.zeros(2, 1)), dict.fromkeys(several, torch.tensor([NAN, 3.0]))
    loss_BK, mask_BK = Objectives(several).losses(logits, labels)
    assert torch.stack(seen).tolist() == [[2.0, 3.0], [0.0, 3.0]]
    assert mask_BK.tolist() == [[False, False], [True, True]]
    assert (loss_BK[0] == 0.0).all()


def direct_joint_loss(links_BG: Tensor, joint_B: Tensor) -> Tensor:
    p_B = links_BG.sigmoid().prod(dim=1)
    return -(joint_B * p_B.log() + (1.0 - joint_B) * (1.0 - p_B).log())


@settings(max_examples=60, deadline=None)
@given(
    a=st.lists(st.floats(-12, 12, width=32), min_size=3, max_size=3),
    joint=st.sampled_from([0.0, 1.0]),
    length=st.sampled_from([2, 3]),
)
def test_entire_space_is_the_direct_formula_in_float64(a: list[float], joint: float, length: int):
    objectives = chain() if length == 3 else Objectives({k: v for k, v in chain().specs.items() if k != "buy"})
    names = ["click", "cart", "buy"][:length]
    logits = {name: torch.tensor([[a[i]]], requires_grad=True) for i, name in enumerate(names)}
    labels = {name: torch.ones(1) for name in names}
    labels[names[-1]] = torch.tensor([joint])
    loss_BK, _ = objectives.losses(logits, labels)
    loss = loss_BK[0, 0]  # the leaf of the funnel is declared first
    loss.backward()
    links = torch.tensor([a[:length]], dtype=torch.float64, requires_grad=True)
    expected = direct_joint_loss(links, torch.tensor([joint], dtype=torch.float64))[0]
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=3e-7)
    for i, name in enumerate(names):
        assert logits[name].grad.item() == pytest.approx(links.grad[0, i].item(), rel=1e-4, abs=3e-7)


@pytest.mark.parametrize("size", [1e4, 3e38])
def test_entire_space_is_finite_at_any_logits(size: float):
    signs_BG = torch.cartesian_prod(*[torch.tensor([-size, 0.0, size])] * 3)
    names = ("click", "cart", "buy")
    for buy in (0.0, 1.0):
        logits = {name: signs_BG[:, i : i + 1].clone().requires_grad_() for i, name in enumerate(names)}
        labels = {"click": torch.ones(27), "cart": torch.ones(27), "buy": torch.full((27,), buy)}
        loss_BK, _ = chain().losses(logits, labels)
        loss_BK.sum().backward()
        assert loss_BK.isfinite().all()
        for name in names:
            assert logits[name].grad.isfinite().all()
    # p(click) p(cart) p(buy) of sure things, and no purchase: the loss is log of the nearest odds, not inf.
    loss_BK, _ = chain().losses({name: torch.full((1, 1), 1e4) for name in names}, dict.fromkeys(names, torch.ones(1)))
    assert loss_BK.tolist() == [[0.0, 0.0, 0.0]]


def test_entire_space_label_is_the_product_where_it_is_determined():
    labels = {
        "click": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, NAN, NAN, 1.0, NAN]),
        "cart": torch.tensor([1.0, 1.0, 0.0, 1.0, NAN, 0.0, 1.0, NAN, NAN]),
        "buy": torch.tensor([1.0, 0.0, 1.0, 1.0, NAN, 1.0, 1.0, 0.0, NAN]),
    }
    expected_B = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, NAN, 0.0, NAN]
    objectives = chain()
    np.testing.assert_array_equal(objectives.joint_label("buy", labels).numpy(), np.array(expected_B, dtype=np.float32))
    logits = {name: torch.zeros(9, 1) for name in labels}
    loss_BK, mask_BK = objectives.losses(logits, labels)
    assert mask_BK[:, 0].tolist() == [not math.isnan(label) for label in expected_B]
    # All logits 0: p(buy and cart and click) = 1/8.
    surprise = [-math.log(1 / 8) if label == 1.0 else -math.log(7 / 8) for label in expected_B]
    np.testing.assert_allclose(loss_BK[mask_BK[:, 0], 0], np.array(surprise)[mask_BK[:, 0].numpy()], rtol=1e-6)


def test_observed_chain_needs_every_link():
    labels = {
        "click": torch.tensor([1.0, 1.0, 0.0, NAN]),
        "cart": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "buy": torch.tensor([0.0, 1.0, 1.0, 1.0]),
    }
    assert chain("observed").targets(labels)[:, 0].isnan().tolist() == [False, True, True, True]
    np.testing.assert_array_equal(chain("observed").reached("buy", labels).numpy(), [1.0, 0.0, 0.0, NAN])


def test_entire_space_teaches_what_clicked_rows_alone_cannot():
    """Fitted constants: in the entire space sigmoid(a) sigmoid(b) is the rate over all rows."""
    rows = torch.arange(100)
    labels = {"click": (rows < 30).float(), "conversion": torch.where(rows < 30, (rows < 6).float(), NAN)}
    objectives = Objectives({name: spec for name, spec in funnel("entire").specs.items() if name != "dwell"})

    def loss(logits_BC: Tensor, _: Tensor) -> Tensor:
        return objectives.losses({"click": logits_BC[:, :1], "conversion": logits_BC[:, 1:]}, labels)[0].sum(dim=1)

    # float64: in float32 the loss is flat to within 1e-3 of the rate, and where L-BFGS stops is the CPU's rounding
    start_C = torch.zeros(2, dtype=torch.float64)
    p_click, p_conversion = fit_constant(loss, start_C, torch.zeros(100))[0].sigmoid().tolist()
    assert (p_click, p_conversion) == (pytest.approx(0.3, rel=1e-3), pytest.approx(0.2, rel=1e-3))


def test_a_conversion_without_a_click_is_no_conversion_of_the_funnel():
    labels = {"click": torch.tensor([0.0]), "conversion": torch.tensor([1.0]), "dwell": torch.tensor([1.0])}
    assert funnel("entire").joint_label("conversion", labels).tolist() == [0.0]


# --- predictions -----------------------------------------------------------------------------------------------------


def test_prediction_columns_and_their_values():
    specs = {
        **funnel(loss="poisson").specs,
        "buy": TaskSpec(Binary("buy"), given="conversion"),
        "price": TaskSpec(Regression("price"), given="conversion"),
        "reaction": TaskSpec(Multiclass("reaction", num_classes=2), given="click"),
        "stars": TaskSpec(Regression("stars")),
    }
    objectives = Objectives(specs)
    sizes = {name: spec.task.num_logits for name, spec in specs.items()}
    logits = {name: random_logits(3, size, seed) for seed, (name, size) in enumerate(sizes.items())}
    predictions = objectives.predictions(logits)
    assert tuple(predictions) == objectives.prediction_names()
    assert tuple(predictions) == (
        *("p_click", "p_conversion", "p_conversion_and_click", "dwell_seconds", "dwell_seconds_expected"),
        *("p_buy", "p_buy_and_conversion_and_click", "price", "price_expected"),
        *("p_reaction_0", "p_reaction_1", "p_reaction_0_and_click", "p_reaction_1_and_click", "stars"),
    )
    p_click, p_conversion, p_buy = (torch.sigmoid(logits[name][:, 0]) for name in ("click", "conversion", "buy"))
    close = torch.testing.assert_close
    close(predictions["p_conversion_and_click"], p_click * p_conversion)
    close(predictions["p_buy_and_conversion_and_click"], p_click * p_conversion * p_buy)
    close(predictions["dwell_seconds_expected"], p_click * logits["dwell"][:, 0].exp())
    close(predictions["price_expected"], p_click * p_conversion * logits["price"][:, 0])
    close(predictions["p_reaction_1_and_click"], p_click * logits["reaction"].softmax(1)[:, 1])
    assert all(column.shape == (3,) for column in predictions.values())


def test_log_predictions_are_of_log_scale_heads_only():
    specs = {form: TaskSpec(Dwell(form, loss=form)) for form in DWELL_LOSSES}
    logits = {name: random_logits(3, spec.task.num_logits) for name, spec in specs.items()}
    found = Objectives(specs).log_predictions(logits)
    assert set(found) == {"logsun", "log_mse", "huber"}
    assert torch.equal(found["logsun"], logits["logsun"][:, 0])


def test_units_and_cap_of_dwell():
    assert [Dwell("d", unit=unit).label_scale for unit in ("seconds", "milliseconds", "minutes")] == [1.0, 0.001, 60.0]
    capped = Dwell("d", loss="poisson", cap_seconds=10.0)
    logits_BC, plain = torch.tensor([[1.0], [1.0]]), Dwell("d", loss="poisson")
    assert torch.equal(
        capped.loss(logits_BC, torch.tensor([3.0, 500.0])), plain.loss(logits_BC, torch.tensor([3.0, 10.0]))
    )
    sample_N = torch.tensor([2.0, 500.0])
    assert capped.predict(capped.initial_bias(251.0, sample_N).reshape(1, 1)).item() == pytest.approx(6.0)


# --- options and errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dwell", {"unit": "hours"}, "x.unit` should be 'seconds', 'milliseconds' or 'minutes'. Found 'hours'"),
        ("dwell", {"cap_seconds": 0}, "x.cap_seconds` should be greater than 0. Found 0"),
        ("dwell", {"los": "ziln"}, "x.los` is not a known key. Did you mean 'loss'?"),
        ("multiclass", {}, "x.num_classes` is missing"),
        ("multiclass", {"num_classes": 1}, "x.num_classes` should be at least 2. Found 1."),
        ("dwell", {"loss": "tweedy"}, "x.loss` should be one of huber, log_mse, logsun"),
        ("dwell", {"loss": {"kind": "tweedy"}}, "x.loss.kind` should be one of huber, log_mse, logsun"),
        ("dwell", {"loss": {"power": 1.5}}, "x.loss.kind` should be one of huber, log_mse, logsun"),
        ("dwell", {"loss": {"kind": "tweedie", "power": 2}}, "x.loss.power` should be less than 2. Found 2"),
        ("dwell", {"loss": {"kind": "tweedie", "powr": 1.5}}, "x.loss.powr` is not a known key. Did you mean 'power'?"),
        ("dwell", {"loss": {"kind": "ziln", "max_sigma": 0}}, "x.loss.max_sigma` should be greater than 0.05. Found 0"),
        ("dwell", {"loss": "fractions:Fraction"}, "x.loss` should have the members of mtrec.tasks.DwellLoss"),
        ("regression", {"low": 2, "high": 1}, "x.low` should be below `tasks.x.high`, which is 1.0. Found 2.0."),
    ],
)
def test_wrong_options_are_named(kind: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(f"`tasks.{message}")):
        build(kind, options)


def build(kind: str, options: dict[str, Any]) -> Task:
    cls = resolve(kind, TASKS, "tasks.x.kind")
    return cls("x", **check_options(cls, options, "tasks.x"))


def test_every_kind_builds_from_its_options_and_is_a_task():
    for kind, options in (("binary", {}), ("dwell", {}), ("regression", {}), ("multiclass", {"num_classes": 3})):
        assert isinstance(build(kind, options), Task)
    assert set(TASKS) == {"binary", "dwell", "regression", "multiclass"}
    for loss in DWELL_LOSSES:
        task = build("dwell", {"loss": {"kind": loss}, "unit": "minutes"})
        assert type(task.dwell_loss) is DWELL_LOSSES[loss]
        assert task.label_range == LabelRange(0.0, None, False)
    assert build("multiclass", {"num_classes": 3}).label_range == (0.0, 2.0, True)
    assert build("regression", {"low": -1}).label_range == (-1.0, None, False)


class NoTask:
    name, family = "x", "binary"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, r"`tasks` should hold at least one task"),
        (
            {"click": TaskSpec(Binary("click")), "buy": TaskSpec(Binary("buy"), given="clik")},
            r"`tasks\.buy\.given` should name a task \(click, buy\)\. Found 'clik'\. Did you mean 'click'",
        ),
        (
            {"a": TaskSpec(Binary("a"), "b"), "b": TaskSpec(Binary("b"), "c"), "c": TaskSpec(Binary("c"), "a")},
            r"`tasks\.c\.given` should not lead back to where it started\. Found a -> b -> c -> a",
        ),
        ({"a": TaskSpec(Binary("a"), "a")}, r"`tasks\.a\.given` should not lead back .* Found a -> a"),
        (
            {"dwell": TaskSpec(Dwell("dwell")), "buy": TaskSpec(Binary("buy"), given="dwell")},
            r"`tasks\.buy\.given` should name a binary task\. Found 'dwell', a task of the family dwell",
        ),
        (
            {"click": TaskSpec(Binary("click")), "dwell": TaskSpec(Dwell("dwell"), "click", "entire")},
            r"`tasks\.dwell\.space` should be 'observed' .*dwell_seconds_expected",
        ),
        ({"a": TaskSpec(Binary("a"), space="entire")}, r"`tasks\.a\.space` should be left out .*`tasks\.a\.given`"),
        (
            {"a": TaskSpec(Regression("p_b")), "b": TaskSpec(Binary("b"))},
            r"`tasks\.b` should predict columns of its own\. Found 'p_b', which `tasks\.a` predicts too",
        ),
        (
            {"a": TaskSpec(NoTask())},  # type: ignore[arg-type]
            r"`tasks\.a\.kind` should be a class with the members .* Found NoTask, which lacks num_logits, label_range",
        ),
    ],
    ids=["empty", "unknown", "cycle", "self", "not-binary", "entire-dwell", "entire-alone", "same-column", "no-task"],
)
def test_wrong_objectives_are_named(tasks: dict[str, TaskSpec], message: str):
    with pytest.raises(ValueError, match=message):
        Objectives(tasks)
