"""The order of the columns of x_BD, however the tables that they come from lie side by side."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtrec import embeddings, pooled_exchange
from mtrec.embeddings import write_initial_rows
from mtrec.features import Table
from mtrec.pooled_exchange import Pooled, alone, side_by_side
from mtrec.shared_memory import copy_columns

KEYS = tuple("abcdefg")


@given(
    st.lists(st.sampled_from([4, 8, 12, 16, 3, 1]), min_size=0, max_size=len(KEYS)),
    st.integers(1, 3),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([0, 3]),
    st.sets(st.sampled_from(KEYS)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_columns_and_their_gradients_are_those_of_slices(
    widths: list[int], num_groups: int, rows: int, dense: int, scaled: set[str], in_order: bool, random: object
) -> None:
    wanted = list(KEYS[: len(widths)])
    if not in_order:
        random.shuffle(wanted)  # type: ignore[attr-defined]
    per_group = max(1, -(-len(widths) // num_groups))
    groups, slices = [], dict[str, Tensor]()
    for start in range(0, len(widths), per_group):
        own, keys = widths[start : start + per_group], KEYS[start : min(start + per_group, len(widths))]
        values = torch.randn(rows, sum(own), requires_grad=True)
        groups.append(Pooled(values, [rows], alone(keys, tuple(own))))
        slices.update(zip(keys, values.split(own, dim=1), strict=True))
    factors = {name: torch.rand(rows, 1) for name in sorted(scaled & slices.keys())}
    dense_BF = torch.randn(rows, dense)
    expected = torch.cat([dense_BF, *(slices[name] * factors.get(name, 1.0) for name in wanted)], dim=1)
    gradient = torch.randn(expected.shape)
    untouched = gradient.clone()
    for found in (
        side_by_side(dense_BF, groups, tuple(wanted), factors),
        pooled_exchange._concatenated(dense_BF, groups, tuple(wanted), factors),  # as on a GPU
    ):
        assert torch.equal(found, expected)
        leaves = [group.values_AH for group in groups]
        if leaves:
            for ours, theirs in zip(
                torch.autograd.grad(found, leaves, gradient), torch.autograd.grad(expected, leaves, gradient, retain_graph=True),
                strict=True,
            ):
                assert torch.equal(ours, theirs)
    assert torch.equal(gradient, untouched)  # others may read it


def test_columns_that_stay_together_are_copied_together() -> None:
    layouts = (((("a", "b", "c"),), (2, 3, 1)), ((("d", "e"),), (4, 4)))
    whole = [[[(slice(5, 11), None)]], [[(slice(11, 19), None)]]]
    assert pooled_exchange._places(layouts, ("a", "b", "c", "d", "e"), 5, frozenset()) == whole
    cut = [[[(slice(4, 6), None), (slice(6, 9), "b"), (slice(9, 10), None)]], [[(slice(10, 14), None), (slice(0, 4), None)]]]
    assert pooled_exchange._places(layouts, ("e", "a", "b", "c", "d"), 0, frozenset("b")) == cut


def test_columns_that_do_not_fit_are_refused() -> None:
    for rows, width in ((1, 4), (3, 1), (3, 5)):  # of which torch would repeat what is 1
        pooled = Pooled(torch.ones(rows, width), [rows], alone(("a",), (4,)))
        with pytest.raises(ValueError, match=rf"shape \({rows}, {width}\) are to be written where \(3, 4\) is"):
            side_by_side(torch.ones(3, 2), [pooled], ("a",))
    with pytest.raises(ValueError, match="no place for it: 1 matrices, 0 places"):
        copy_columns([], [torch.ones(2, 1)])
    with pytest.raises(ValueError, match="nothing to be written"):
        copy_columns([torch.ones(2, 1)], [])
    copy_columns([], [torch.ones(2, 0)])


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
