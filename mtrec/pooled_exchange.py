"""Pooled embeddings of all ranks side by side, through the memory that the ranks of one host share.

What torchrec's own all-to-all does with table-wise shards, in half the passes over the embeddings: it copies what it sends
before that is copied into shared memory, what arrives into one buffer, and from there side by side. Here columns go straight
to their place.

Legend: B rows of this rank, A rows of all ranks (those of rank 0 first), H columns that this rank holds, D those of all.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchrec.distributed.sharding.tw_sharding import TwPooledEmbeddingSharding

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


def layout_of(module: Any, group: SharedMemoryGroup, width: Mapping[str, int]) -> Layout | None:
    """Of torchrec's sharded collection; None where not every table lies whole on one rank (its own all-to-all knows the others).

    `width` is that of each feature.
    """
    shardings = module._embedding_shardings
    if len(shardings) != 1 or type(shardings[0]) is not TwPooledEmbeddingSharding:
        return None
    of_ranks = shardings[0].embedding_names_per_rank()
    keys = tuple(itertools.chain.from_iterable(of_ranks))
    per_rank = tuple(sum(width[key] for key in names) for names in of_ranks)
    return Layout(group, keys, tuple(width[key] for key in keys), per_rank)


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


__all__ = ["Layout", "layout_of", "side_by_side"]
