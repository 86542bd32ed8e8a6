"""All tasks together: base rates, `given`, the entire space, prediction columns. B rows, K tasks, N labels of a sample."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from heads import ALL_TASKS, NAN, fit_constant, random_logits, skewed_seconds, task_id
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mtrec.tasks import DWELL_LOSSES, Binary, Dwell, Multiclass, Objectives, Regression, Task, TaskSpec, automatic_weight

# --- base rates ------------------------------------------------------------------------------------------------------


def test_base_loss_is_the_entropy_the_variance_or_the_fitted_minimum():
    seconds_N = skewed_seconds(601)
    objectives = Objectives(
        {
            "click": TaskSpec(Binary("click")),
            "reaction": TaskSpec(Multiclass("reaction", num_classes=3)),
            "price": TaskSpec(Regression("price")),
            "dwell": TaskSpec(Dwell("dwell", loss="tweedie")),
            "robust": TaskSpec(Regression("robust", loss="huber", delta=2.0, scale=5.0)),
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

    def huber(constant: float) -> float:
        return float(scipy.special.huber(2.0, seconds_N.numpy() / 5.0 - constant).mean())

    least = scipy.optimize.minimize_scalar(huber, bounds=(0.0, mean), method="bounded").fun
    assert least < 0.9 * huber(mean / 5.0)  # skewed: the mean would not do
    assert objectives.base_loss("robust", mean, seconds_N) == pytest.approx(least, rel=1e-4)


def test_heads_and_losses_see_the_rows_that_count():
    objectives = funnel(space="entire")
    labels = {
        "click": torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, NAN]),
        "conversion": torch.tensor([1.0, 0.0, 0.0, NAN, NAN, 1.0, 0.0, 1.0]),
        "dwell": torch.tensor([2.0, 4.0, NAN, 6.0, 99.0, NAN, NAN, 99.0]),
    }

    def known_values(name: str) -> list[list[float]]:
        both = objectives.reached_label(name, labels), objectives.target(name, labels)
        return [values[~values.isnan()].tolist() for values in both]

    known = {name: known_values(name) for name in labels}
    every_click = [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert known["click"] == [every_click, every_click]
    # The head predicts p(conversion | click) = 1/3; its loss is on the product, known on 6 rows, 1 in one of them.
    assert known["conversion"] == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]]
    assert known["dwell"] == [[2.0, 4.0, 6.0], [2.0, 4.0, 6.0]]
    bias_C = objectives.initial_bias("conversion", 1 / 3, torch.tensor(known["conversion"][0]))
    assert bias_C.sigmoid().item() == pytest.approx(1 / 3, rel=1e-5)


def test_automatic_weight_is_clipped():
    assert [automatic_weight(loss) for loss in (0.5, 0.08, 0.05, 0.0, -3.0, 100.0)] == [1.0, 5.0, 5.0, 5.0, 5.0, 0.2]


# --- masks, given, the entire space ----------------------------------------------------------------------------------


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


# --- errors ----------------------------------------------------------------------------------------------------------


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
