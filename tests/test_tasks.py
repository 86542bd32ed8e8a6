"""Every kind of task: its formula in float64, finite at any logit, its first bias, its options. B rows, C logits."""

import math
import re
from typing import Any

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from heads import ALL_TASKS, NAN, random_logits, task_id

from mtrec.kinds import check_options, resolve
from mtrec.tasks import DWELL_LOSSES, TASKS, Binary, Dwell, LabelRange, Multiclass, Regression, Task
from mtrec.tasks.dwell_losses import LogSUN


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


def test_initial_bias_of_the_others():
    binary = Binary("click")
    for rate in (0.03, 1e-5, 1 - 1e-4):
        assert binary.predict(binary.initial_bias(rate, torch.zeros(5)).reshape(1, 1)).item() == pytest.approx(rate, rel=1e-5)
    assert binary.initial_bias(0.0, torch.zeros(5)).isfinite().all()
    multiclass = Multiclass("reaction", num_classes=3)
    p_C = multiclass.predict(multiclass.initial_bias(0.0, torch.tensor([0.0, 0.0, 1.0, 0.0])).reshape(1, 3))[0]
    np.testing.assert_allclose(p_C, [0.75, 0.25, 0.0], atol=3e-3)
    assert (p_C > 0).all()
    regression = Regression("price", scale=7.0)
    assert regression.predict(regression.initial_bias(-21.0, torch.zeros(1)).reshape(1, 1)).item() == -21.0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("dwell", {"unit": "hours"}, "x.unit` should be 'seconds', 'milliseconds' or 'minutes'. Found 'hours'"),
        ("dwell", {"cap_seconds": 0}, "x.cap_seconds` should be greater than 0. Found 0"),
        ("dwell", {"los": "ziln"}, "x.los` is not a known key. Did you mean 'loss'?"),
        ("multiclass", {}, "x.num_classes` is missing"),
        ("multiclass", {"num_classes": 1}, "x.num_classes` should be greater than or equal to 2. Found 1."),
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
