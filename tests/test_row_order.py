"""The order of an epoch's rows: permutations that are promised to stay, and streams and windows that hold every row once."""

import collections
import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtrec.row_order import BY_ROW_GROUP, Span, permutation, plan_streams, plan_windows


def test_permutation_is_one_and_depends_on_the_whole_key() -> None:
    for size in (0, 1, 2, 3, 1000, 16_384):
        assert sorted(permutation(size, 5, size)) == list(range(size))
    keys = [(0,), (1,), (0, 1), (1, 0, 0, 0, 1), (0, 0, 0, 0, 1), (2**63,)]
    assert len({tuple(permutation(50, *key)) for key in keys}) == len(keys)
    # every row is equally likely at every place: chi-squared over 5 x 5 cells, 16 degrees of freedom
    counts = collections.Counter((i, int(v)) for draw in range(5_000) for i, v in enumerate(permutation(5, draw)))
    assert sum((counts[i, v] - 1000) ** 2 / 1000 for i in range(5) for v in range(5)) < 39.3  # p = .001


def test_permutations_are_those_of_this_row_order() -> None:
    # others need a higher ROW_ORDER: a resumed run would read other rows
    found = [hashlib.sha256(permutation(size, 1, 2, 3).astype("<i8").tobytes()) for size in (1_000, 16_384, 100_000)]
    assert [each.hexdigest()[:16] for each in found] == ["ecf554f3adce0147", "1500a0e7fb83a21f", "a868fa414a6e27bc"]


@pytest.mark.parametrize("size", [10_000, 16_384, 16_385, 200_000])
def test_rows_of_all_parts_of_a_window_come_to_all_places(size: int) -> None:
    places = permutation(size, 3, size)
    assert np.array_equal(np.sort(places), np.arange(size))
    # rows of each eighth among the places of each: chi-squared, 49 degrees of freedom
    counts, _, _ = np.histogram2d(np.arange(size), places, bins=8)
    assert ((counts - size / 64) ** 2 / (size / 64)).sum() < 85.4  # p = .001
    if size > 1 << 14:  # words of 32 bits: hardly any are the same. Ascents have the variance n / 12
        assert abs(np.mean(np.diff(places) > 0) - 0.5) < 4 * (12 * size) ** -0.5


@given(
    row_groups=st.lists(st.integers(1, 50), min_size=1, max_size=30),
    num_streams=st.integers(1, 9),
    window=st.integers(1, 60),
    shuffle=st.booleans(),
)
def test_plan_covers_every_row_once_in_equal_streams(
    row_groups: list[int], num_streams: int, window: int, shuffle: bool
) -> None:
    streams = plan_streams(row_groups, num_streams, seed=1, epoch=2, shuffle=shuffle)
    covered = collections.Counter(
        (span.row_group, row) for spans in streams for span in spans for row in range(span.start, span.stop)
    )
    assert covered == {(group, row): 1 for group, count in enumerate(row_groups) for row in range(count)}
    lengths = [sum(span.stop - span.start for span in spans) for spans in streams]
    assert max(lengths) - min(lengths) <= 1
    assert sum(map(len, streams)) <= len(row_groups) + num_streams - 1  # few row groups are cut
    for spans in streams:
        windows = plan_windows(spans, row_groups, window)
        assert all(0 < sum(span.stop - span.start for span in one) <= window for one in windows)
        unwound = [(span.row_group, row) for one in windows for span in one for row in range(span.start, span.stop)]
        assert unwound == [(span.row_group, row) for span in spans for row in range(span.start, span.stop)]


def test_row_groups_are_dealt_in_the_order_drawn_by_seed_and_epoch() -> None:
    sizes = [5, 7, 5, 5, 6, 7, 8]
    for seed, epoch in ((0, 0), (0, 1), (1, 0)):
        order = permutation(len(sizes), BY_ROW_GROUP, seed, epoch).tolist()
        ordered = plan_streams([sizes[group] for group in order], 2, seed=0, epoch=0, shuffle=False)
        expected = [[span._replace(row_group=order[span.row_group]) for span in spans] for spans in ordered]
        assert plan_streams(sizes, 2, seed=seed, epoch=epoch, shuffle=True) == expected


def test_row_groups_of_a_size_are_dealt_in_turn_and_the_rest_is_cut_as_it_lies() -> None:
    dealt = plan_streams([5, 5, 5, 5], 2, seed=0, epoch=0, shuffle=False)
    assert dealt == [[Span(0, 0, 5), Span(2, 0, 5)], [Span(1, 0, 5), Span(3, 0, 5)]]
    cut = plan_streams([5, 4, 5], 4, seed=0, epoch=0, shuffle=False)
    assert cut == [[Span(0, 0, 3)], [Span(0, 3, 5), Span(1, 0, 2)], [Span(1, 2, 4), Span(2, 0, 1)], [Span(2, 1, 5)]]


def test_equal_row_groups_are_not_cut() -> None:
    streams = plan_streams([100] * 24 + [70] * 8, 8, seed=0, epoch=0, shuffle=True)
    assert all(span.start == 0 for spans in streams for span in spans)
    assert [sorted(span.stop for span in spans) for spans in streams] == [[70, 100, 100, 100]] * 8
