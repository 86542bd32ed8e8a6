"""The Balancer over every method: restart, left-out tasks, bounds, guard and gate, degenerate Gramians.  K tasks."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtrec.balancing import BALANCERS, Balancer, make_balancer
from mtrec.balancing.balancer import Observing, bound

TASKS = ["click", "conversion", "dwell"]
ALL = torch.tensor([True, True, True])
SHORT = {"gradnorm": {"warmup_steps": 4}, "stch": {"warmup_steps": 4}, "dwa": {"window": 3}}
NEEDS = {kind for kind, method in BALANCERS.items() if method.needs_gramian}


def batch(step: int, tasks: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, Gramian, active) in fp32 as a trainer would give them; conversion is absent now and then."""
    draws = torch.Generator().manual_seed(1000 + step)
    rows = torch.randn(tasks, 6, generator=draws) * torch.logspace(-1.0, 1.0, tasks)[:, None]
    active = torch.ones(tasks, dtype=torch.bool)
    if tasks > 1 and step % 4 == 2:
        active[1] = False
        rows[1] = 0.0
    values = torch.rand(tasks, generator=draws) + 0.2
    return torch.where(active, values, 0.0), rows @ rows.T, active


def make(kind: str, tasks: list[str] | None = None, **options: object) -> Balancer:
    return make_balancer(kind, {**SHORT.get(kind, {}), **options}, tasks or TASKS, seed=5)


def run(balancer: Balancer, start: int, stop: int) -> list[Tensor]:
    weights = []
    for step in range(start, stop):
        losses_K, gramian_KK, active_K = batch(step)
        given_KK = gramian_KK if balancer.needs_gramian_at(step) else None
        weights.append(balancer(losses_K, given_KK, step, active_K))
    return weights


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_resumed_balancer_continues_exactly(kind: str) -> None:
    options = {"every": 2, "ema": 0.5, "primary": "click"}
    uninterrupted = make(kind, **options)
    whole = run(uninterrupted, 0, 24)
    first = make(kind, **options)
    run(first, 0, 11)  # odd, so that the last Gramian is not the one of the last step
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(kind, **options)
    second.load_state_dict(torch.load(file, weights_only=True), strict=True)
    torch.manual_seed(99)  # the global generator must not matter
    continued = run(second, 11, 24)
    for a, b in zip(whole[11:], continued, strict=True):
        assert torch.equal(a, b)
    assert second.describe() == uninterrupted.describe()
    if kind not in ("static", "scheduled", "rlw"):  # the test would see a lost state: a fresh one goes another way
        assert any(not torch.equal(a, b) for a, b in zip(whole[11:], run(make(kind, **options), 11, 24), strict=True))


@pytest.mark.parametrize("kind", BALANCERS)
def test_two_ranks_with_different_generators_agree(kind: str) -> None:
    torch.manual_seed(1)
    first = run(make(kind, every=1), 0, 12)
    torch.manual_seed(2)
    torch.rand(7)
    second = run(make(kind, every=1), 0, 12)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", BALANCERS)
def test_weights_are_the_methods_not_negative_and_sum_to_the_number_of_weighed_tasks(kind: str) -> None:
    balancer = make(kind, every=1, normalize=True)
    alone = make(kind).method  # the same method without a balancer around it
    for step in range(20):
        losses_K, gramian_KK, active_K = batch(step)
        before = balancer.weights_K.clone()
        weights = balancer(losses_K, gramian_KK, step, active_K)
        if isinstance(alone, Observing):
            alone.observe(losses_K.double(), step, active_K)
        raw_K = torch.where(active_K, alone(losses_K.double(), gramian_KK.double(), step, active_K), 0.0).clamp(min=0.0)
        expected_K = raw_K / raw_K.sum() * active_K.sum()
        torch.testing.assert_close(weights[active_K].double(), expected_K[active_K], rtol=1e-6, atol=1e-7)
        assert weights.dtype == losses_K.dtype
        assert weights.isfinite().all()
        assert (weights >= 0.0).all()
        assert weights[active_K].sum().item() == pytest.approx(active_K.sum().item(), rel=1e-5)
        assert torch.equal(balancer.weights_K[~active_K], before[~active_K])  # left out: as it was


@pytest.mark.parametrize("kind", BALANCERS)
def test_a_task_left_out_does_not_change_what_the_others_get(kind: str) -> None:
    """A step without conversions is, for the others, a step of a run that has no conversion task."""
    options = {"every": 1, "normalize": True}
    three, two = make(kind, **options), make(kind, ["click", "dwell"], **options)
    kept = torch.tensor([True, False, True])
    for step in range(8):
        losses_K, gramian_KK, _ = batch(step)
        losses_K[1], gramian_KK[1], gramian_KK[:, 1] = torch.nan, torch.nan, torch.nan
        found = three(losses_K, gramian_KK, step, kept)
        expected = two(losses_K[kept], gramian_KK[kept][:, kept], step, torch.tensor([True, True]))
        if kind == "rlw":  # one draw for each task, so those of two differ; of three the others keep theirs
            drawn = make(kind)(torch.ones(3), None, step, ALL)[kept]
            expected = drawn / drawn.sum() * 2.0
        torch.testing.assert_close(found[kept], expected, rtol=1e-6, atol=1e-7)
        assert found[1] == 1.0


DEGENERATE = {
    "zero": torch.zeros(3, 3),
    "rank one": torch.tensor([1.0, 2.0, 3.0])[:, None] * torch.tensor([1.0, 2.0, 3.0]),
    "rank one with conflict": torch.tensor([1.0, -2.0, 3.0])[:, None] * torch.tensor([1.0, -2.0, 3.0]),
    "opposite": torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]),
    "sum to zero": torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]),
    "huge": 1e30 * torch.tensor([[1.0, -0.5, 0.2], [-0.5, 2.0, 0.1], [0.2, 0.1, 1.5]]),
    "tiny": 1e-30 * torch.tensor([[1.0, -0.5, 0.2], [-0.5, 2.0, 0.1], [0.2, 0.1, 1.5]]),
    "huge beside tiny": torch.diag(torch.tensor([1e30, 1.0, 1e-30])),
    "rounded below zero": torch.tensor([[1.0, 1.0000002, 1.0], [1.0000002, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    "one zero": torch.diag(torch.tensor([1.0, 0.0, 2.0])),
    "one nan": torch.tensor([[1.0, torch.nan, 0.1], [torch.nan, torch.nan, 0.1], [0.1, 0.1, 2.0]]),
    "one infinite": torch.tensor([[1.0, torch.inf, 0.1], [torch.inf, torch.inf, 0.1], [0.1, 0.1, 2.0]]),
}


@pytest.mark.parametrize("kind", sorted(NEEDS))
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_gramians_give_defined_weights(kind: str, case: str) -> None:
    balancer = make(kind, every=1, ema=0.3)
    for step in range(6):
        weights = balancer(torch.tensor([0.5, 0.1, 2.0]), DEGENERATE[case], step, ALL)
        assert weights.isfinite().all()
        assert (weights >= 0.0).all()
        assert weights.sum().item() == pytest.approx(3.0, rel=1e-5)
    if case == "zero":
        assert weights.tolist() == [1.0, 1.0, 1.0]
    if case in ("one zero", "one nan", "one infinite"):
        assert weights[1] == 1.0
        assert balancer.describe()["weighed/conversion"] == 0.0
        assert "gradient_norm/conversion" not in balancer.describe()
    assert all(value == value for value in balancer.describe().values())


@pytest.mark.parametrize("kind", sorted(NEEDS))
def test_huge_and_tiny_gramians_give_the_weights_of_ordinary_ones(kind: str) -> None:
    ordinary = DEGENERATE["huge"] / 1e30
    expected = make(kind)(torch.tensor([0.5, 0.1, 2.0]), ordinary, 0, ALL)
    for case in ("huge", "tiny"):
        found = make(kind)(torch.tensor([0.5, 0.1, 2.0]), DEGENERATE[case], 0, ALL)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", sorted(NEEDS - {"gradnorm", "db_mtl", "metabalance", "gradvac"}))  # these remember more
@pytest.mark.parametrize("factor", [1e4, 1e9, 1e30])
def test_one_enormous_gramian_leaves_nothing_in_the_next_step(kind: str, factor: float) -> None:
    losses_K, gramian_KK, _ = batch(1)
    outlier_KK = gramian_KK.double() * torch.outer(torch.tensor([1.0, 1.0, factor]), torch.tensor([1.0, 1.0, factor]))
    balancer = make(kind, every=1)
    balancer(losses_K, outlier_KK, 0, ALL)
    other = make(kind, every=1)
    other(losses_K, gramian_KK, 0, ALL)
    torch.testing.assert_close(balancer(losses_K, gramian_KK, 1, ALL), other(losses_K, gramian_KK, 1, ALL))


@pytest.mark.parametrize("kind", BALANCERS)
@pytest.mark.parametrize("size", [1, 10])
def test_one_task_and_ten_tasks(kind: str, size: int) -> None:
    names = [f"task{k}" for k in range(size)]
    balancer = make(kind, names, every=1)
    for step in range(6):
        losses_K, gramian_KK, active_K = batch(step, size)
        weights = balancer(losses_K, gramian_KK, step, active_K)
    assert weights.shape == (size,)
    assert weights.isfinite().all()
    if size == 1 and kind != "scheduled":
        assert weights.item() == pytest.approx(1.0)


@pytest.mark.parametrize("kind", BALANCERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_an_error_that_leaves_the_state(kind: str, bad: float) -> None:
    balancer = make(kind, every=1)
    run(balancer, 0, 6)
    before = copy.deepcopy(balancer.state_dict())
    losses_K, gramian_KK, _ = batch(8)
    losses_K[2] = bad
    with pytest.raises(ValueError, match=r"The loss of task 'dwell' should be finite\. Found (nan|inf) at step 8"):
        balancer(losses_K, gramian_KK, 8, ALL)
    assert all(torch.equal(value, balancer.state_dict()[name]) for name, value in before.items())
    losses_K[2] = bad  # of a task without labels in this batch it means nothing
    assert balancer(losses_K, gramian_KK, 8, torch.tensor([True, True, False])).isfinite().all()


def test_no_active_task_keeps_all_weights() -> None:
    balancer = make("mgda", every=1)
    first = run(balancer, 0, 1)[0]
    nothing = balancer(torch.zeros(3), torch.zeros(3, 3), 1, torch.zeros(3, dtype=torch.bool))
    assert torch.equal(first, nothing)


def test_the_gramian_is_asked_for_every_n_steps_and_missed_when_due() -> None:
    balancer = make("mgda", every=4)
    assert [step for step in range(9) if balancer.needs_gramian_at(step)] == [0, 4, 8]
    weights = run(balancer, 0, 8)
    assert all(torch.equal(weights[0], other) for other in weights[1:4])
    assert not torch.equal(weights[3], weights[4])
    with pytest.raises(ValueError, match=r"`gramian_KK` should be given at step 8, a multiple of `balancing\.every`"):
        balancer(torch.ones(3), None, 8, ALL)
    assert not make("static").needs_gramian
    assert make("static", primary="click").needs_gramian_at(0)


def test_gradnorm_sees_the_losses_of_steps_without_a_gramian() -> None:
    balancer = make_balancer("gradnorm", {"every": 10, "warmup_steps": 7}, TASKS)
    values = []
    for step in range(11):
        losses_K, gramian_KK, _ = batch(step)
        losses_K = losses_K + 0.1
        values.append(losses_K.double())
        balancer(losses_K, gramian_KK if step % 10 == 0 else None, step, ALL)
    torch.testing.assert_close(balancer.method.initial_sum_K / 7, torch.stack(values[:7]).mean(dim=0))


def test_the_moving_average_of_the_gramian_is_corrected_for_its_start() -> None:
    class Recorder(nn.Module):
        needs_gramian = True

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
            self.seen.append(gramian_KK.clone())
            return torch.ones(2)

    recorder = Recorder()
    balancer = Balancer(recorder, ["a", "b"], every=1, ema=0.5)
    both = torch.tensor([True, True])
    balancer(torch.ones(2), torch.tensor([[1.0, 0.0], [0.0, 8.0]]), 0, both)
    balancer(torch.ones(2), torch.tensor([[4.0, 1.0], [1.0, 0.0]]), 1, torch.tensor([True, False]))
    balancer(torch.ones(2), torch.tensor([[4.0, 1.0], [1.0, 2.0]]), 2, both)
    torch.testing.assert_close(recorder.seen[0], torch.tensor([[1.0, 0.0], [0.0, 8.0]]).double())
    assert recorder.seen[1][0, 0].item() == pytest.approx((0.25 * 1.0 + 0.5 * 4.0) / 0.75)
    # b was absent in step 1: its past is one step older, not one step forgotten
    assert recorder.seen[2][1, 1].item() == pytest.approx((0.25 * 8.0 + 0.5 * 2.0) / 0.75)
    assert recorder.seen[2][0, 1].item() == pytest.approx((0.25 * 0.0 + 0.5 * 1.0) / 0.75)


@settings(max_examples=300, deadline=None)
@given(
    raw=st.lists(st.one_of(st.floats(-2.0, 10.0), st.sampled_from([0.0, 1e-30, 1e30])), min_size=1, max_size=8),
    low=st.floats(0.0, 1.0),
    high=st.one_of(st.none(), st.floats(1.0, 10.0)),
)
def test_bounded_weights_keep_bounds_sum_order_and_proportions(raw: list[float], low: float, high: float | None) -> None:
    values = torch.tensor(raw, dtype=torch.float64).numpy()
    weights = bound(values, low, high, float(len(raw)))
    assert weights.sum() == pytest.approx(len(raw), rel=1e-9)
    assert (weights >= low - 1e-9).all()
    assert high is None or (weights <= high + 1e-9).all()
    order = values.argsort(kind="stable")
    assert (weights[order][1:] - weights[order][:-1] >= -1e-9).all()
    if values.max() <= 0.0:
        assert weights.tolist() == pytest.approx([1.0] * len(raw))
        return
    shares = values / values.max()
    free = (shares > 1e-100) & (weights > low + 1e-9) & (weights < (np.inf if high is None else high - 1e-9))
    factors = weights[free] / shares[free]  # what no bound holds is multiplied by one number
    assert np.allclose(factors / factors[:1], 1.0)


def test_min_and_max_weight_hold_for_a_method() -> None:
    for weights in run(make("mgda", every=1, min_weight=0.2, max_weight=1.5), 0, 12):
        assert (weights >= 0.2 - 1e-6).all()
        assert (weights <= 1.5 + 1e-6).all()


def test_the_primary_task_is_guarded() -> None:
    """d = w_p g_p + ... must keep `guard` of the rate of w_p g_p alone; helpful tasks are left alone."""
    rows = torch.tensor([[1.0, 0.0], [-3.0, 1.0], [0.2, 0.5]])
    balancer = make("static", primary="click", guard=0.4, every=1)
    weights = balancer(torch.ones(3), rows @ rows.T, 0, ALL)
    assert (rows[0] @ (weights @ rows)).item() == pytest.approx(0.4 * weights[0].item(), rel=1e-5)
    assert weights[0] == 1.0
    assert weights[2] == 1.0
    assert weights[1].item() == pytest.approx(0.8 / 3.0, rel=1e-5)
    assert balancer.describe()["factor/conversion"] == pytest.approx(0.8 / 3.0, rel=1e-5)
    unharmed = make("static", primary="click", guard=0.4, every=1)(torch.ones(3), torch.eye(3), 0, ALL)
    assert unharmed.tolist() == [1.0, 1.0, 1.0]


def test_a_task_without_a_gradient_stays_as_the_guard_left_it() -> None:
    rows = torch.tensor([[1.0, 0.0], [-3.0, 1.0], [0.2, 0.5]])
    balancer = make("static", primary="click", guard=0.4, every=1)
    shrunk = balancer(torch.ones(3), rows @ rows.T, 0, ALL)
    assert shrunk[1] < 0.3
    assert torch.equal(balancer(torch.ones(3), rows @ rows.T, 1, torch.tensor([True, False, True])), shrunk)


def test_guard_and_gate_survive_a_restart_between_two_gramians() -> None:
    gramian = torch.tensor([[1.0, -3.0, -0.2], [-3.0, 10.0, 0.0], [-0.2, 0.0, 1.0]])
    options = {"primary": "click", "auxiliary_gate": "sign", "every": 5}
    first = make_balancer("static", options, TASKS, ["dwell"])
    shrunk = first(torch.ones(3), gramian, 0, ALL)
    second = make_balancer("static", options, TASKS, ["dwell"])
    second.load_state_dict(first.state_dict())
    assert shrunk.tolist() == pytest.approx([1.0, 0.5 / 3.0, 0.0])
    assert torch.equal(second(torch.ones(3), None, 1, ALL), shrunk)


@pytest.mark.parametrize(("gate", "expected"), [("none", 1.0), ("sign", 0.0), ("cosine", 0.0)])
def test_the_auxiliary_gate_closes_on_conflict(gate: str, expected: float) -> None:
    gramian = torch.tensor([[1.0, 0.5, -0.2], [0.5, 4.0, 0.0], [-0.2, 0.0, 1.0]])
    balancer = make_balancer("static", {"auxiliary_gate": gate, "every": 1}, TASKS, ["dwell"])
    assert balancer(torch.ones(3), gramian, 0, ALL).tolist() == [1.0, 1.0, expected]
    gramian[0, 2] = gramian[2, 0] = 0.3
    opened = balancer(torch.ones(3), gramian, 1, ALL)[2].item()
    assert opened == pytest.approx({"none": 1.0, "sign": 1.0, "cosine": 0.3}[gate])
    # Between Gramians, and in a step without clicks, the gate stays as it was.
    assert balancer(torch.ones(3), gramian, 2, torch.tensor([False, True, True]))[2].item() == pytest.approx(opened)


def test_the_gate_goes_by_the_first_task_that_is_not_auxiliary() -> None:
    balancer = make_balancer("static", {"auxiliary_gate": "sign", "every": 1}, TASKS, ["click"])
    gramian = torch.tensor([[1.0, -0.5, 0.5], [-0.5, 1.0, 0.0], [0.5, 0.0, 1.0]])
    assert balancer(torch.ones(3), gramian, 0, ALL).tolist() == [0.0, 1.0, 1.0]


def test_the_gate_follows_the_moving_average() -> None:
    def gramian(cosine: float) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0, cosine], [0.0, 1.0, 0.0], [cosine, 0.0, 1.0]])

    balancer = make_balancer("static", {"auxiliary_gate": "sign", "every": 1, "ema": 0.5}, TASKS, ["dwell"])
    assert balancer(torch.ones(3), gramian(-0.8), 0, ALL)[2] == 0.0
    assert balancer(torch.ones(3), gramian(0.0), 1, torch.tensor([True, True, False]))[2] == 0.0
    assert balancer(torch.ones(3), gramian(0.2), 2, ALL)[2] == 0.0
    assert balancer(torch.ones(3), gramian(0.9), 3, ALL)[2] == 1.0


def test_describe_names_norms_and_cosines_of_the_last_gramian() -> None:
    balancer = make("upgrad", every=1)
    balancer(torch.ones(3), torch.tensor([[4.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [0.0, 0.0, 9.0]]), 0, ALL)
    scalars = balancer.describe()
    assert scalars["gradient_norm/dwell"] == 3.0
    assert scalars["cosine/click/conversion"] == -0.5
    assert scalars["weighed/click"] == 1.0
    assert sum(scalars[f"weight/{task}"] for task in TASKS) == pytest.approx(3.0)


def test_a_module_that_holds_it_may_be_cast_and_moved() -> None:
    holder = nn.Module()
    holder.balancer = make("famo")
    holder.to(torch.bfloat16).to("meta")
    assert holder.balancer.weights_K.dtype == torch.float64
    assert run(holder.balancer, 0, 2)[1].isfinite().all()


@pytest.mark.parametrize(
    ("kind", "options", "auxiliary", "message"),
    [
        ("mgdaa", {}, [], r"`balancing\.kind` should be one of .* Did you mean 'mgda'"),
        ("mgda", {"evry": 5}, [], r"`balancing\.evry` is not a known key\. Did you mean 'every'"),
        ("mgda", {"normalization": "max"}, [], r"`balancing\.normalization` should be .* Found 'max'"),
        ("static", {"weights": {"clik": 2.0}}, [], r"`balancing\.weights\.clik` .* Did you mean 'click'"),
        ("upgrad", {"preference": {"click": -1.0}}, [], r"`balancing\.preference\.click` should be greater than 0"),
        ("mgda", {"min_weight": 1.5}, [], r"`balancing\.min_weight` should be at most 1 .* Found 1\.5"),
        ("mgda", {"max_weight": 0.5}, [], r"`balancing\.max_weight` should be at least .* Found 0\.5"),
        ("mgda", {"primary": "clicks"}, [], r"`balancing\.primary` .* Did you mean 'click'"),
        ("mgda", {"primary": "dwell"}, ["dwell"], r"`balancing\.primary` .* without `auxiliary: true`"),
        ("mgda", {"auxiliary_gate": "sign"}, [], r"`balancing\.auxiliary_gate` should be none"),
        ("mgda", {}, TASKS, r"`tasks` should hold a task that is not auxiliary"),
        ("metabalance", {"target": "x"}, [], r"`balancing\.target` should name a task"),
    ],
)
def test_errors_name_the_option(kind: str, options: dict[str, object], auxiliary: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_balancer(kind, options, TASKS, auxiliary)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"`losses_K` should have shape \(3,\)"):
        make("static")(torch.ones(2), None, 0, torch.tensor([True, True]))
    with pytest.raises(ValueError, match=r"`gramian_KK` should have shape \(3, 3\)"):
        make("mgda")(torch.ones(3), torch.eye(2), 0, ALL)
