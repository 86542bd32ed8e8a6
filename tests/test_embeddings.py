"""The order of the columns of x_BD, however the tables that they come from lie side by side."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtrec import embeddings
from mtrec.embeddings import Columns, in_order

KEYS = tuple("abcdefg")


@given(
    st.lists(st.sampled_from([4, 8, 12, 16, 3, 1]), min_size=1, max_size=len(KEYS)),
    st.integers(1, 3),
    st.sampled_from([0, 1, 5]),
    st.sets(st.sampled_from(KEYS)),
    st.randoms(use_true_random=False),
)
def test_columns_and_their_gradients_are_those_of_slices(
    widths: list[int], num_groups: int, rows: int, scaled: set[str], random: object
) -> None:
    wanted = list(KEYS[: len(widths)])
    random.shuffle(wanted)  # type: ignore[attr-defined]
    per_group = -(-len(widths) // num_groups)
    groups = []
    for start in range(0, len(widths), per_group):
        own = widths[start : start + per_group]
        values = torch.randn(rows, sum(own), requires_grad=True)
        groups.append(Columns(values, KEYS[start : start + len(own)], tuple(own)))
    slices: dict[str, Tensor] = {}
    for group in groups:
        slices.update(zip(group.keys, group.values.split(group.widths, dim=1), strict=True))
    factors = {name: torch.rand(rows, 1) for name in sorted(scaled & slices.keys())}
    expected = torch.cat([slices[name] * factors.get(name, 1.0) for name in wanted], dim=1)
    found = torch.cat(in_order(groups, tuple(wanted), factors), dim=1)
    assert torch.equal(found, expected)
    gradient = torch.randn(found.shape)
    leaves = [group.values for group in groups]
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(expected, leaves, gradient), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_wide_columns_on_a_cpu_are_moved_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Columns(torch.randn(5, 48), ("a", "b"), (16, 32))
    assert len(in_order([group], ("b", "a"))) == 1
    monkeypatch.setattr(embeddings, "LEAST_BLOCK", 64)
    assert len(in_order([group], ("b", "a"))) == 2


def test_columns_that_lie_in_order_are_not_moved() -> None:
    groups = [Columns(torch.randn(5, 48), ("a", "b"), (16, 32)), Columns(torch.randn(5, 3), ("c",), (3,))]
    found = in_order(groups, ("a", "b", "c"))
    assert [id(each) for each in found] == [id(group.values) for group in groups]
    assert len(in_order(groups, ("a", "b", "c"), {"b": torch.ones(5, 1)})) == 3
