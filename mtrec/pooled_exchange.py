"""Pooled embeddings of all ranks side by side, through the memory that the ranks of one host share.

What torchrec's own all-to-all does with table-wise shards, in half the passes over the embeddings: it copies what it sends
before that is copied into shared memory, what arrives into one buffer, and from there side by side. Here columns go straight
to their place.

Legend: B rows of this rank, A rows of all ranks (those of rank 0 first), H columns that this rank holds, D those of all.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtrec.shared_memory import SharedMemoryGroup


class Layout(NamedTuple):
    """Whose columns lie where: those of rank 0 first, each rank's in the order of `keys`.

    Attributes:
        keys: features; widths: of each; per_rank: columns of each rank.
    """

    group: SharedMemoryGroup
    keys: tuple[str, ...]
    widths: tuple[int, ...]
    per_rank: tuple[int, ...]


def side_by_side(pooled_AH: Tensor, rows: Sequence[int], layout: Layout) -> Tensor:
    """(B, D): this rank's rows of all columns. A collective, and so is its backward pass.

    Args:
        pooled_AH: this rank's columns of all rows.
        rows: of each rank; they sum to A.
    """
    found: Tensor = _SideBySide.apply(pooled_AH, list(rows), layout)
    return found


class _SideBySide(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, pooled_AH: Tensor, rows: list[int], layout: Layout) -> Tensor:
        """(B, D)."""
        context.rows, context.layout = rows, layout
        found_BD = pooled_AH.new_empty((rows[layout.group.rank()], sum(layout.per_rank)))
        layout.group.exchange(pooled_AH.split(rows), found_BD.split(layout.per_rank, dim=1))
        return found_BD

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy_BD: Tensor) -> Any:
        """The gradient (A, H) of what this rank holds."""
        rows, layout = context.rows, context.layout
        gradient_AH = dy_BD.new_empty((sum(rows), layout.per_rank[layout.group.rank()]))
        layout.group.exchange(dy_BD.split(layout.per_rank, dim=1), gradient_AH.split(rows))
        return gradient_AH, None, None


__all__ = ["Layout", "side_by_side"]
