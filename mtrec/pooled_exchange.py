"""Dense columns and pooled embeddings of all ranks side by side: a rank writes what it gets straight to its place.

What torchrec's own all-to-all does with table-wise shards, in a fraction of the passes over the embeddings: it copies what it
sends before that is copied into shared memory, what arrives into one buffer, from there side by side, then into the order that
the model has, then beside the dense columns. Here a rank's columns go through the memory that the ranks of one host share
straight to their places; those of a rank alone, too.

Legend: B rows of this rank, A rows of all ranks (those of rank 0 first), H columns that this rank holds, F dense columns, D
columns of the shared representation.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrec.shared_memory import SharedMemoryGroup, copy_columns


@dataclass(frozen=True, eq=False)
class Layout:
    """Who holds which columns, whole tables all: those of rank 0 lie first, each rank's in the order of its keys.

    Attributes:
        group: of the ranks; None where one rank holds all.
        held: keys (features) of each rank.
        widths: of each key.
    """

    group: SharedMemoryGroup | None
    held: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Of all ranks."""
        return tuple(key for keys in self.held for key in keys)


class Pooled(NamedTuple):
    """The pooled embeddings of a group of tables: `values_AH` of the keys that this rank holds, and how many rows each rank has.
    Of a layout of one rank: of all keys and this rank's rows.
    """

    values_AH: Tensor
    rows: Sequence[int]
    layout: Layout


@functools.lru_cache(maxsize=16)
def alone(keys: tuple[str, ...], widths: tuple[int, ...]) -> Layout:
    """Of one rank that holds all."""
    return Layout(None, (keys,), widths)


def side_by_side(
    dense_BF: Tensor, groups: Sequence[Pooled], wanted: tuple[str, ...], factors: Mapping[str, Tensor] | None = None
) -> Tensor:
    """(B, D): the dense columns, then those of all keys of the groups, in the order of `wanted`. A collective of the layouts'
    ranks, and so is its backward pass.

    Args:
        dense_BF: gets no gradient.
        factors: (B, 1), of some keys, by which their columns are multiplied; they get none, either. Ranks may have other ones.

    >>> pooled = Pooled(torch.tensor([[1.0, 2.0, 3.0]]), [1], alone(("a", "b"), (2, 1)))
    >>> side_by_side(torch.tensor([[9.0]]), [pooled], ("b", "a")).tolist()
    [[9.0, 3.0, 1.0, 2.0]]
    >>> side_by_side(torch.tensor([[9.0]]), [pooled], ("b", "a"), {"a": torch.tensor([[0.5]])}).tolist()
    [[9.0, 3.0, 0.5, 1.0]]
    """
    factors = factors or {}
    if dense_BF.device.type != "cpu":
        return _concatenated(dense_BF, groups, wanted, factors)
    layouts = [each.layout for each in groups]
    columns = tuple((each.held, each.widths) for each in layouts)
    places = _places(columns, wanted, dense_BF.shape[1], frozenset(factors))
    found: Tensor = _SideBySide.apply(
        dense_BF, layouts, [each.rows for each in groups], places, factors, *(each.values_AH for each in groups)
    )
    return found


def _concatenated(
    dense_BF: Tensor, groups: Sequence[Pooled], wanted: tuple[str, ...], factors: Mapping[str, Tensor]
) -> Tensor:
    """The same in torch's own operators, for a GPU; where no layout has ranks."""
    if not factors and wanted == tuple(key for group in groups for key in group.layout.keys):  # as where one rank holds all
        return torch.cat([dense_BF, *(group.values_AH for group in groups)], dim=1)
    columns: dict[str, Tensor] = {}
    for values, _, layout in groups:
        # one split, whose backward is one copy; slices would each make a gradient of the whole width
        columns.update(zip(layout.keys, values.split(layout.widths, dim=1), strict=True))
    return torch.cat([dense_BF, *(columns[name] * factors[name] if name in factors else columns[name] for name in wanted)], 1)


class _Place(NamedTuple):
    """Where columns that lie side by side in a group go to, and the key with whose factor they are multiplied, if with one."""

    columns: slice
    factor: str | None


@functools.lru_cache(maxsize=64)
def _places(
    layouts: tuple[tuple[tuple[tuple[str, ...], ...], tuple[int, ...]], ...],
    wanted: tuple[str, ...],
    first: int,
    scaled: frozenset[str],
) -> list[list[list[_Place]]]:
    """Of each layout, of each rank: places in the order of its columns, as few as there can be; that of wanted[0] is `first`.

    Layouts are given as (held, widths): one that was kept here would keep its process group.
    """
    width = {
        key: each for held, widths in layouts for key, each in zip(itertools.chain.from_iterable(held), widths, strict=True)
    }
    ends = itertools.accumulate((width[name] for name in wanted), initial=first)
    start = dict(zip(wanted, ends, strict=False))
    found = []
    for held, _ in layouts:
        of_ranks = []
        for keys in held:
            places: list[_Place] = []
            for key in keys:
                place = _Place(slice(start[key], start[key] + width[key]), key if key in scaled else None)
                if places and place.factor is None is places[-1].factor and places[-1].columns.stop == place.columns.start:
                    place = _Place(slice(places.pop().columns.start, place.columns.stop), None)
                places.append(place)
            of_ranks.append(places)
        found.append(of_ranks)
    return found


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any,
        dense_BF: Tensor,
        layouts: Sequence[Layout],
        rows: Sequence[Sequence[int]],
        places: Sequence[Sequence[Sequence[_Place]]],
        factors: Mapping[str, Tensor],
        *values_AH: Tensor,
    ) -> Tensor:
        """(B, D)."""
        context.layouts, context.rows, context.places, context.factors = layouts, rows, places, factors
        context.shapes = [values.shape for values in values_AH]
        dense = dense_BF.shape[1]
        x_BD = dense_BF.new_empty(len(dense_BF), dense + sum(sum(layout.widths) for layout in layouts))
        x_BD[:, :dense] = dense_BF
        for layout, of_ranks, per_rank, values in zip(layouts, places, rows, values_AH, strict=True):
            columns = [[x_BD[:, place.columns] for place in of_rank] for of_rank in of_ranks]
            _exchange(layout, [[part] for part in values.split(list(per_rank))], columns)
        for place in itertools.chain.from_iterable(itertools.chain.from_iterable(places)):
            if place.factor is not None:
                x_BD[:, place.columns].mul_(factors[place.factor])
        return x_BD

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy_BD: Tensor) -> Any:
        """The gradients (A, H) of what this rank holds of each group."""
        found = []
        for layout, of_ranks, per_rank, shape in zip(
            context.layouts, context.places, context.rows, context.shapes, strict=True
        ):
            gradient_AH = dy_BD.new_empty(shape)
            columns = [[_scaled(dy_BD, place, context.factors) for place in of_rank] for of_rank in of_ranks]
            _exchange(layout, columns, [[part] for part in gradient_AH.split(list(per_rank))])
            found.append(gradient_AH)
        return *[None] * 5, *found


def _exchange(layout: Layout, sent: list[list[Tensor]], received: list[list[Tensor]]) -> None:
    if layout.group is not None:
        layout.group.exchange(sent, received)
    else:
        copy_columns(received[0], sent[0])


def _scaled(x_BD: Tensor, place: _Place, factors: Mapping[str, Tensor]) -> Tensor:
    columns = x_BD[:, place.columns]
    return columns if place.factor is None else columns * factors[place.factor]


__all__ = ["Layout", "Pooled", "alone", "side_by_side"]
