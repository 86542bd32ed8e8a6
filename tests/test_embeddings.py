"""The order of the columns of x_BD, however the tables that they come from lie side by side."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtrec import embeddings
from mtrec.embeddings import Columns, in_order, write_initial_rows
from mtrec.features import Table

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


def test_initial_rows_of_many_blocks_are_the_same_however_a_table_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "INIT_BLOCK_ROWS", 10)
    table = Table("item", 35, 4, ("item",), "mean", False, "auto", 1, 0.01, vocabulary_size=33, encoding="vocabulary")
    whole = torch.zeros(35, 4)
    write_initial_rows(whole, table, seed=1)
    assert len(whole.unique()) == whole.numel()
    for row, rows in ((0, 10), (3, 4), (7, 20), (20, 15), (34, 1)):
        part = torch.zeros(rows, 2)
        write_initial_rows(part, table, seed=1, row=row, column=2)
        assert torch.equal(part, whole[row : row + rows, 2:])
    for name, seed, generation in (("item", 2, 0), ("user", 1, 0), ("item", 1, 1)):
        other = torch.zeros(35, 4)
        write_initial_rows(other, dataclasses.replace(table, name=name), seed, generation=generation)
        assert not (other == whole).any()


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
