"""Pooled embeddings of all ranks side by side, through the memory that the ranks of one host share.

What torchrec's own all-to-all does with table-wise shards, in half the passes over the embeddings: it copies what it sends
before that is copied into shared memory, what arrives into one buffer, and from there side by side. Here columns go straight
to their place.

Legend: B rows of this rank, A rows of all ranks (those of rank 0 first), H columns that this rank holds, D those of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrec.shared_memory import SharedMemoryGroup


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

    @cached_property
    def per_rank(self) -> tuple[int, ...]:
        """Columns of each rank."""
        width = dict(zip(self.keys, self.widths, strict=True))
        return tuple(sum(width[key] for key in keys) for keys in self.held)


def side_by_side(pooled_AH: Tensor, rows: Sequence[int], layout: Layout) -> Tensor:
    """(B, D): this rank's rows of all columns. A collective, and so is its backward pass; alone, B is A and nothing moves.

    Args:
        pooled_AH: this rank's columns of all rows.
        rows: of each rank; they sum to A.
    """
    if layout.group is None:
        return pooled_AH
    found: Tensor = _SideBySide.apply(pooled_AH, list(rows), layout.group, layout.per_rank)
    return found


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, pooled_AH: Tensor, rows: list[int], group: SharedMemoryGroup, per_rank: tuple[int, ...]
    ) -> Tensor:
        """(B, D)."""
        context.rows, context.group, context.per_rank = rows, group, per_rank
        found_BD = pooled_AH.new_empty((rows[group.rank()], sum(per_rank)))
        group.exchange(pooled_AH.split(rows), found_BD.split(per_rank, dim=1))
        return found_BD

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy_BD: Tensor) -> Any:
        """The gradient (A, H) of what this rank holds."""
        rows, group, per_rank = context.rows, context.group, context.per_rank
        gradient_AH = dy_BD.new_empty((sum(rows), per_rank[group.rank()]))
        group.exchange(dy_BD.split(per_rank, dim=1), gradient_AH.split(rows))
        return gradient_AH, None, None, None


__all__ = ["Layout", "side_by_side"]
