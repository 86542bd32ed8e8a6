"""The order of an epoch's rows: streams of row groups, cut into windows, and the order within a window.

All of it is known from the row groups' sizes, the seed and the epoch, without reading a row; `mtrec.reader` goes by it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BY_ROW_GROUP, BY_ROW = 1, 2  # what a key of `permutation` is for: first number of the key
ROW_ORDER = 2
"""Which order this module shuffles to. Checkpoints note it: within an epoch that was begun in another one nobody can go on."""


class Span(NamedTuple):
    """Rows [start, stop) of a row group; `row_group` is its position in `Dataset.row_groups`."""

    row_group: int
    start: int
    stop: int


Window = tuple[Span, ...]


def permutation(num_rows: int, *key: int) -> np.ndarray:
    """A random order of `num_rows` rows, int64, that depends on the key alone.

    Sorts random words, of 16 bits for up to 16,384 rows, which numpy sorts by counting: 4 ns a row on a Zen 4, where its sort of
    64 bits takes 28. Rows of the same word (of 16,384 rows one in five has such a word) stay as they lie, next to each other: a
    row comes before a later one with a chance of 1/2 + 2^-17. Beyond 16,384 rows words have 32 bits. numpy promises the words
    of its bit generators, not the results of `Generator.permutation`: an order drawn from those could change with numpy's
    version, and a resumed run would then repeat rows.

    >>> permutation(5, 7, 0).tolist()
    [2, 0, 4, 3, 1]
    """
    digits = 1 if num_rows <= 1 << 14 else 2  # of 16 bits, the least significant first
    drawn = np.random.PCG64(np.random.SeedSequence(key)).random_raw(-(-num_rows * digits // 4))
    words = drawn.astype("<u8", copy=False).view("<u2")[: num_rows * digits].reshape(digits, num_rows)
    places: np.ndarray = words[0].argsort(kind="stable")
    for digit in words[1:]:
        places = places.take(digit.take(places).argsort(kind="stable"))
    return places


def plan_streams(
    row_group_rows: Sequence[int], num_streams: int, *, seed: int, epoch: int, shuffle: bool
) -> list[list[Span]]:
    """The rows of each stream, in the epoch's order; the streams' lengths differ by one row at most.

    Row groups of one size are dealt to the streams, as many to each; what is left over is cut into V equal ranges. So
    there are at most V - 1 cuts, of which each makes one stream decode rows of another, and none where all row groups
    have one size and V divides their number.

    >>> plan_streams([4, 3, 4], 2, seed=0, epoch=0, shuffle=False)
    [[Span(row_group=0, start=0, stop=4), Span(row_group=1, start=0, stop=1)], \
[Span(row_group=1, start=1, stop=3), Span(row_group=2, start=0, stop=4)]]
    """
    count = len(row_group_rows)
    order = (permutation(count, BY_ROW_GROUP, seed, epoch) if shuffle else np.arange(count)).tolist()
    of_size: dict[int, list[int]] = {}  # places in the order
    for place, row_group in enumerate(order):
        of_size.setdefault(row_group_rows[row_group], []).append(place)
    streams: list[list[tuple[int, Span]]] = [[] for _ in range(num_streams)]  # with places, to bring them into order
    rest: list[int] = []
    for rows, places in of_size.items():
        dealt = len(places) // num_streams * num_streams
        for turn, place in enumerate(places[:dealt]):
            streams[turn % num_streams].append((place, Span(order[place], 0, rows)))
        rest += places[dealt:]
    rest.sort()
    total = sum(row_group_rows[order[place]] for place in rest)
    start = 0  # of the row group, among the rows left over
    for place in rest:
        row_group = order[place]
        end = start + row_group_rows[row_group]
        for stream in range(num_streams):
            first = max(start, total * stream // num_streams)
            last = min(end, total * (stream + 1) // num_streams)
            if first < last:
                streams[stream].append((place, Span(row_group, first - start, last - start)))
        start = end
    return [[span for _, span in sorted(spans)] for spans in streams]


def window_rows(row_group_rows: int, shuffle_window: int) -> int:
    """The length of the equal parts, none above `shuffle_window` rows, into which a row group is cut.

    >>> window_rows(65_536, 16_384), window_rows(20_000, 16_384), window_rows(100, 16_384)
    (16384, 10000, 100)
    """
    return -(-row_group_rows // -(-row_group_rows // shuffle_window))


def plan_windows(spans: Sequence[Span], row_group_rows: Sequence[int], shuffle_window: int) -> list[Window]:
    """The windows of a stream: its spans cut into the parts of their row groups, small parts put together.

    >>> plan_windows([Span(0, 3, 10), Span(1, 0, 2), Span(2, 0, 2)], [10, 2, 2], shuffle_window=5)
    [(Span(row_group=0, start=3, stop=5),), (Span(row_group=0, start=5, stop=10),), \
(Span(row_group=1, start=0, stop=2), Span(row_group=2, start=0, stop=2))]
    """
    windows: list[Window] = []
    current: list[Span] = []
    held = 0
    for row_group, first, last in spans:
        length = window_rows(row_group_rows[row_group], shuffle_window)
        start = first
        while start < last:
            stop = min(last, (start // length + 1) * length)
            if current and held + stop - start > shuffle_window:
                windows.append(tuple(current))
                current, held = [], 0
            current.append(Span(row_group, start, stop))
            held += stop - start
            start = stop
    return [*windows, tuple(current)] if current else windows
