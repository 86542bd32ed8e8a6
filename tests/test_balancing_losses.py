"""Methods on the losses, against TorchJD's scalarizers differentiated by autograd, and against torch.optim's Adam.

K tasks.
"""

import pytest
import torch
from torch import Tensor
from torchjd.scalarization import DWA, FAMO, IMTLL, STCH, UW, GeometricMean
from torchjd.scalarization import Random as TorchJDRandom

from mtrec.balancing import BALANCERS
from mtrec.balancing.adam import Adam
from mtrec.balancing.draws import generator
from mtrec.balancing.norms import norm_gap_gradient

TASKS = ["click", "conversion", "dwell"]
ALL = torch.tensor([True, True, True])


def losses(step: int) -> Tensor:
    """Positive losses of different size that fall at different rates, with noise."""
    noise = torch.rand(3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return torch.tensor([0.7, 0.05, 4.0], dtype=torch.float64) * (0.8 + 0.4 * noise) * 0.99**step


def slope(scalarizer: torch.nn.Module, losses_K: Tensor) -> Tensor:
    """dS/dL by autograd."""
    leaf = losses_K.clone().requires_grad_()
    return torch.autograd.grad(scalarizer(leaf), leaf, retain_graph=True)[0]


def test_static_and_scheduled_follow_their_formula() -> None:
    static = BALANCERS["static"](TASKS, weights={"dwell": 0.3})
    assert static(losses(0), None, 0, ALL).tolist() == [1.0, 1.0, 0.3]
    scheduled = BALANCERS["scheduled"](TASKS, weights={"click": 2.0}, ratio={"click": 0.9, "dwell": 1.1}, period=10)
    expected = [2.0 * 0.9**2.5, 1.0, 1.1**2.5]
    assert scheduled(losses(0), None, 25, ALL).tolist() == pytest.approx(expected, rel=1e-12)
    assert scheduled(losses(0), None, 10**9, ALL).isfinite().all()


@pytest.mark.parametrize(
    ("kind", "oracle", "parameter"), [("uncertainty", UW, "log_var"), ("imtl_l", IMTLL, "log_scale")]
)
def test_learned_scales_equal_torchjd_with_torch_adam(kind: str, oracle: type, parameter: str) -> None:
    method = BALANCERS[kind](TASKS, learning_rate=0.05)
    reference = oracle(3).double()
    adam = torch.optim.Adam(reference.parameters(), lr=0.05)
    for step in range(60):
        torch.testing.assert_close(
            method(losses(step), None, step, ALL), slope(reference, losses(step)), rtol=1e-12, atol=1e-12
        )
        adam.zero_grad()
        reference(losses(step)).backward()
        adam.step()
    learned = method.log_variance_K if kind == "uncertainty" else method.log_scale_K
    torch.testing.assert_close(learned, getattr(reference, parameter).detach(), rtol=1e-12, atol=1e-12)


def test_uncertainty_stays_bounded_and_reaches_the_optimum() -> None:
    method = BALANCERS["uncertainty"](TASKS, learning_rate=0.1, log_variance_bound=4.0)
    fixed = torch.tensor([0.5, 0.0, 1e9], dtype=torch.float64)
    for step in range(500):
        weights = method(fixed, None, step, ALL)
    # The optimum of 1/2 e^-s L + s/2 is s = log L, so the weight is 1 / (2 L); the others are at their bounds.
    assert weights[0].item() == pytest.approx(1.0, rel=1e-3)
    assert weights[1].item() == pytest.approx(0.5 * torch.e**4, rel=1e-9)
    assert weights[2].item() == pytest.approx(0.5 * torch.e**-4, rel=1e-9)


def test_an_entry_of_adam_goes_on_where_it_was_when_it_was_last_active() -> None:
    both, alone = Adam(2, 0.1, 0.01), Adam(1, 0.1, 0.01)
    gradients = torch.randn(12, 2, generator=torch.Generator().manual_seed(4))
    value, expected = torch.ones(2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        value = both.descend(value, gradient, torch.tensor([True, step % 3 == 1]))
        if step % 3 == 1:
            expected = alone.descend(expected, gradient[1:], torch.tensor([True]))
        assert torch.equal(value[1:], expected)


def test_imtl_l_stays_bounded_and_reaches_the_optimum() -> None:
    method = BALANCERS["imtl_l"](TASKS, learning_rate=0.1, log_scale_bound=4.0)
    fixed = torch.tensor([0.5, 0.0, 1e9], dtype=torch.float64)
    for step in range(500):
        weights = method(fixed, None, step, ALL)
    assert weights.tolist() == pytest.approx([2.0, torch.e**4, torch.e**-4], rel=1e-3)  # the optimum of e^s L - s is 1 / L


@pytest.mark.parametrize("kind", ["rlw", "dwa"])
def test_the_weights_of_the_active_tasks_sum_to_their_number(kind: str) -> None:
    weights = BALANCERS[kind](TASKS)(losses(0), None, 0, torch.tensor([True, False, True]))
    assert weights.sum().item() == pytest.approx(2.0)
    assert weights[1] == 0.0


def test_dwa_equals_torchjd_with_windows_as_epochs() -> None:
    method, reference = BALANCERS["dwa"](TASKS, temperature=1.5, window=7), DWA(temperature=1.5)
    for step in range(50):
        torch.testing.assert_close(
            method(losses(step), None, step, ALL), slope(reference, losses(step)), rtol=1e-12, atol=1e-12
        )
        if step % 7 == 6:
            reference.step()


def test_dwa_refuses_means_below_zero_of_which_no_rate_can_be_told() -> None:
    method, both = BALANCERS["dwa"](["click", "dwell"], window=2), torch.tensor([True, True])
    method(torch.tensor([1.0, -3.0]), None, 0, both)  # one step may be
    method(torch.tensor([1.0, 4.0]), None, 1, both)
    method(torch.tensor([1.0, -3.0]), None, 2, both)
    with pytest.raises(ValueError, match=r"`tasks\.dwell` should have a loss of at least 0 .* Found a mean"):
        method(torch.tensor([1.0, 2.0]), None, 3, both)


def test_dwa_averages_over_steps_with_labels_only() -> None:
    method = BALANCERS["dwa"](["click", "conversion"], window=2, temperature=1.0)
    both, first = torch.tensor([True, True]), torch.tensor([True, False])
    for step, (values, active) in enumerate(
        [((1.0, 4.0), both), ((1.0, 9.9), first), ((1.0, 2.0), both), ((1.0, 9.9), first)]
    ):
        method(torch.tensor(values), None, step, active)
    for step, values in ((4, (1.0, 6.0)), (5, (1.0, 4.0))):
        weights = method(torch.tensor(values), None, step, both)
        expected = 2.0 * torch.softmax(torch.tensor([1.0, 2.0 / 4.0], dtype=torch.float64), dim=0)
        torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0.0)
    weights = method(torch.tensor([1.0, 2.0]), None, 6, both)
    expected = 2.0 * torch.softmax(torch.tensor([1.0, 5.0 / 2.0], dtype=torch.float64), dim=0)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0.0)


def test_famo_equals_torchjd_given_the_next_batch_as_after() -> None:
    minimum = torch.tensor([0.1, 0.0, 0.0], dtype=torch.float64)
    method = BALANCERS["famo"](TASKS, minimum={"click": 0.1}, weight_decay=0.01)
    reference = FAMO(3, min_losses=minimum, weight_decay=0.01).double()
    for step in range(60):
        if step:
            reference.update(losses(step))
        torch.testing.assert_close(
            method(losses(step), None, step, ALL), slope(reference, losses(step)), rtol=1e-10, atol=1e-12
        )


def test_famo_compares_a_loss_with_the_last_one_of_the_task() -> None:
    method, adam = BALANCERS["famo"](["click", "dwell"]), Adam(2, 0.025, 1e-3)
    both, first = torch.tensor([True, True]), torch.tensor([True, False])
    method(torch.tensor([0.5, 4.0]), None, 0, both)
    method(torch.tensor([0.4, 99.0]), None, 1, first)
    weights = method(torch.tensor([0.2, 1.0]), None, 2, both)
    logit = adam.descend(torch.zeros(2), torch.zeros(2), first)  # a softmax over one task has no slope
    fall = torch.tensor([0.4 / 0.2, 4.0 / 1.0], dtype=torch.float64).log()
    logit = adam.descend(logit, 0.5 * (fall - fall.mean()), both)
    expected = torch.softmax(logit, dim=0) / torch.tensor([0.2, 1.0], dtype=torch.float64)
    torch.testing.assert_close(weights, expected / expected.sum(), rtol=1e-6, atol=0.0)


def test_famo_gives_more_weight_to_the_log_of_the_loss_that_falls_slower() -> None:
    method = BALANCERS["famo"](["click", "dwell"])
    active = torch.tensor([True, True])
    for step in range(50):
        values = torch.tensor([0.9**step, 0.99**step], dtype=torch.float64)
        weights = method(values, None, step, active)
    share = weights * values
    assert share[1] > 2.0 * share[0]


def test_famo_names_the_minimum_that_is_too_high() -> None:
    method = BALANCERS["famo"](["click", "dwell"], minimum={"dwell": 1.0})
    with pytest.raises(ValueError, match=r"`balancing\.minimum\.dwell` should be at most the loss .* Found 1\.0"):
        method(torch.tensor([0.5, 0.5]), None, 3, torch.tensor([True, True]))


def test_rlw_equals_torchjd_given_the_same_draw() -> None:
    method = BALANCERS["rlw"](TASKS, seed=3)
    weights = method(losses(0), None, 17, ALL)
    torch.manual_seed(generator(3, 17).initial_seed())
    torch.testing.assert_close(weights, 3.0 * slope(TorchJDRandom(), losses(0)), rtol=1e-12, atol=0.0)
    assert (method(losses(0), None, 18, ALL) != weights).all()
    assert (BALANCERS["rlw"](TASKS, seed=4)(losses(0), None, 17, ALL) != weights).all()


@pytest.mark.parametrize("distribution", ["normal", "dirichlet"])
def test_rlw_is_fair_on_average(distribution: str) -> None:
    method = BALANCERS["rlw"](TASKS, seed=1, distribution=distribution)
    draws = torch.stack([method(losses(0), None, step, ALL) for step in range(2000)])
    torch.testing.assert_close(draws.sum(dim=1), torch.full((2000,), 3.0, dtype=torch.float64))
    assert draws.mean(dim=0).tolist() == pytest.approx([1.0] * 3, abs=0.06)
    if distribution == "dirichlet":  # Var of 3 x Dirichlet(1, 1, 1) = 9 x 1/18
        assert draws.var(dim=0).tolist() == pytest.approx([0.5] * 3, abs=0.06)


def test_gls_and_stch_equal_torchjd() -> None:
    values = losses(4)
    torch.testing.assert_close(
        BALANCERS["gls"](TASKS)(values, None, 4, ALL), slope(GeometricMean(), values), rtol=1e-10, atol=1e-12
    )
    weights = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64) / 5.0
    ideal = torch.tensor([0.1, 0.0, -1.0], dtype=torch.float64)
    method = BALANCERS["stch"](
        TASKS, preference={"conversion": 3.0}, ideal={"click": 0.1, "dwell": -1.0}, mu=0.2, warmup_steps=0
    )
    reference = STCH(0.2, weights, ideal)
    torch.testing.assert_close(method(values, None, 4, ALL), slope(reference, values), rtol=1e-10, atol=1e-14)


def test_gls_preference_is_the_derivative_of_the_weighted_geometric_mean() -> None:
    leaf = losses(0).requires_grad_()
    exponents = torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64) / 5.0
    expected = torch.autograd.grad((leaf**exponents).prod(), leaf)[0]
    method = BALANCERS["gls"](TASKS, preference={"dwell": 3.0})
    torch.testing.assert_close(method(leaf.detach(), None, 0, ALL), expected, rtol=1e-10, atol=0.0)
    with pytest.raises(ValueError, match=r"`tasks\.dwell` should have a loss of at least 0"):
        method(torch.tensor([0.1, 0.1, -0.1]), None, 0, ALL)


def test_stch_after_warm_up_does_not_depend_on_the_unit_of_a_loss() -> None:
    shares = []
    for unit in (1.0, 1000.0):
        method = BALANCERS["stch"](TASKS, warmup_steps=5)
        scale = torch.tensor([1.0, 1.0, unit], dtype=torch.float64)
        for step in range(12):
            weights = method(losses(step) * scale, None, step, ALL)
        shares.append(weights * scale)
    torch.testing.assert_close(shares[0], shares[1], rtol=1e-9, atol=0.0)


def test_stch_measures_losses_in_their_mean_over_the_warm_up() -> None:
    method = BALANCERS["stch"](["click", "dwell"], mu=0.5, warmup_steps=2)
    both = torch.tensor([True, True])
    for step, (values, unit) in enumerate(
        [((1.0, 4.0), (1.0, 4.0)), ((3.0, 8.0), (2.0, 6.0)), ((5.0, 1.0), (2.0, 6.0)), ((0.5, 9.0), (2.0, 6.0))]
    ):
        losses_K, unit_K = torch.tensor(values, dtype=torch.float64), torch.tensor(unit, dtype=torch.float64)
        share_K = 0.5 if step < 2 else 0.5 * torch.softmax(0.5 * losses_K / unit_K / 0.5, dim=0)
        torch.testing.assert_close(method(losses_K, None, step, both), share_K / unit_K, rtol=1e-12, atol=0.0)


def test_gradnorm_closed_form_equals_autograd() -> None:
    norms = torch.tensor([2.0, 0.3, 7.0], dtype=torch.float64)
    ratio = torch.tensor([0.9, 1.0, 0.4], dtype=torch.float64)
    leaf = torch.tensor([0.5, 1.5, 1.0], dtype=torch.float64).requires_grad_()
    weighted = leaf * norms
    mean = weighted.mean().detach()
    target = mean * (ratio / ratio.mean()) ** 1.5  # a constant, as Chen et al. 2018 prescribe
    expected = torch.autograd.grad(((weighted - target).abs() / mean).sum(), leaf)[0]
    torch.testing.assert_close(norm_gap_gradient(leaf.detach(), norms, ratio, ALL, 1.5), expected, rtol=1e-12, atol=0.0)


def test_gradnorm_equals_the_same_steps_with_autograd_and_torch_adam() -> None:
    method = BALANCERS["gradnorm"](TASKS, alpha=1.2, learning_rate=0.03, warmup_steps=10)
    weights = torch.ones(3, dtype=torch.float64).requires_grad_()
    adam = torch.optim.Adam([weights], lr=0.03)
    initial = torch.stack([losses(step) for step in range(10)]).mean(dim=0)
    for step in range(60):
        jacobian = torch.randn(3, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        jacobian *= torch.tensor([[1.0], [0.2], [5.0]], dtype=torch.float64)
        method.observe(losses(step), step, ALL)
        found = method(losses(step), jacobian @ jacobian.T, step, ALL)
        if step >= 9:  # the tenth observation completes the initial losses
            norms = (weights[:, None] * jacobian).norm(dim=1)
            pace = losses(step) / initial
            gap = norms - (norms.mean() * (pace / pace.mean()) ** 1.2).detach()
            adam.zero_grad()
            (gap.abs().sum() / norms.mean().detach()).backward()
            adam.step()
            with torch.no_grad():
                weights.clamp_(min=1e-3).mul_(3.0 / weights.sum())
        torch.testing.assert_close(found, weights.detach(), rtol=1e-9, atol=1e-12)


def test_gradnorm_brings_weighted_norms_together_when_all_losses_fall_alike() -> None:
    method = BALANCERS["gradnorm"](TASKS, learning_rate=0.01, warmup_steps=1)
    norms = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for step in range(600):
        values = torch.tensor([0.7, 0.1, 3.0], dtype=torch.float64) * 0.999**step
        method.observe(values, step, ALL)
        weights = method(values, torch.diag(norms.square()), step, ALL)
    assert (weights * norms / (weights * norms).mean()).tolist() == pytest.approx([1.0] * 3, abs=0.05)


def test_gradnorm_keeps_its_sum_and_the_weights_of_tasks_without_labels() -> None:
    method, gramian = BALANCERS["gradnorm"](TASKS, learning_rate=0.1, warmup_steps=2), torch.diag(torch.tensor([1.0, 9.0, 0.04]))
    before = torch.ones(3, dtype=torch.float64)
    for step in range(12):
        active = torch.tensor([True, step % 3 != 2, True])
        method.observe(losses(step), step, active)
        weights = method(losses(step), gramian, step, active)
        assert weights.sum().item() == pytest.approx(3.0)
        assert torch.equal(weights[~active], before[~active])
        before = weights
    assert weights[2] > 1.2 > 0.8 > weights[1]


def test_gradnorm_compares_losses_with_their_mean_over_the_warm_up() -> None:
    method, both = BALANCERS["gradnorm"](["click", "dwell"], warmup_steps=2, alpha=1.0), torch.tensor([True, True])
    for step, values in enumerate(((1.0, 4.0), (3.0, 8.0), (2.0, 3.0))):
        method.observe(torch.tensor(values), step, both)
    assert (method.initial_sum_K / method.initial_count_K).tolist() == [2.0, 6.0]
    weights = method(torch.tensor([2.0, 3.0]), torch.eye(2), 2, both)  # dwell has halved: click is to move faster
    assert weights[0] > 1.0 > weights[1]
