"""Ids to the ranks that hold their rows, as one message a rank through the memory that the ranks of one host share.

torchrec sends how many ids there will be, then how many each row has, then the ids, and puts what arrives in order with
operators of its own: of a step of few rows a fifth was spent there. Here all travels at once, and where one rank holds all
tables nothing does.

A message is three sections, or four, each aligned: a checksum of the keys' names, how many rows there are, and how many ids of
each key (int64); the ids, key after key, of the type that all ranks have; the ids that each row has of each key (int32); a weight
an id, where there are weights.

Legend: B rows of this rank, A rows of all ranks (those of rank 0 first), H keys that this rank holds.
"""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtrec.pooled_exchange import Layout
from mtrec.shared_memory import UNLIKE_CALLS, Section, message_bytes, sections


class _Held(NamedTuple):
    """What one rank's rows have of the keys that one rank holds: ids and weights of each key, `lengths_HB` ids a row."""

    rows: int
    ids: Sequence[Tensor]
    lengths_HB: Tensor
    weights: Sequence[Tensor]


class IdsExchange:
    """The ids of one batch on their way. They set out at once; all ranks make one, in the same order.

    Args:
        ids: of this rank's rows; keys in any order, and some perhaps that nobody holds.
        layout: who holds which key.
    """

    def __init__(self, ids: KeyedJaggedTensor, layout: Layout) -> None:
        self._ids, self._layout = ids, layout
        if layout.group is not None:
            own = layout.group.rank()
            parts = _parts(ids, layout.held)
            dtype = ids.values().dtype
            messages = {rank: _message(part, layout.held[rank], dtype) for rank, part in enumerate(parts) if rank != own}
            self._work = layout.group.send_messages(messages, functools.partial(self._take_in, own=own, part=parts[own]))

    def _take_in(self, messages: Mapping[int, Tensor], *, own: int, part: _Held) -> None:
        keys = self._layout.held[own]
        held = [part if rank == own else _read(messages[rank], keys, self._ids) for rank in range(len(messages) + 1)]
        self._ids, self._rows = _together(held, keys, self._ids), [each.rows for each in held]

    def arrived(self) -> tuple[KeyedJaggedTensor, list[int]]:
        """(ids of all ranks' rows for the H keys that this rank holds, A a key; rows of each rank), once all are there."""
        if self._layout.group is None:
            return _ordered(self._ids, self._layout.keys), [self._ids.stride()]
        self._work.wait()
        return self._ids, self._rows


def _ordered(ids: KeyedJaggedTensor, keys: tuple[str, ...]) -> KeyedJaggedTensor:
    given = tuple(ids.keys())
    if given == keys:
        return ids
    order, order_H = _order(given, keys, ids.device())
    return ids.permute(order, order_H)


@functools.lru_cache(maxsize=16)
def _order(given: tuple[str, ...], wanted: tuple[str, ...], device: torch.device) -> tuple[list[int], Tensor]:
    order = [given.index(key) for key in wanted]
    return order, torch.tensor(order, dtype=torch.int32, device=device)


def _parts(ids: KeyedJaggedTensor, held: Sequence[Sequence[str]]) -> list[_Held]:
    """What each rank is to get."""
    keys, rows = ids.keys(), ids.stride()
    lengths_KB = ids.lengths().view(len(keys), rows)
    counts = ids.length_per_key()
    of_key = dict(zip(keys, ids.values().split(counts), strict=True))
    weights = ids.weights_or_none()
    weights_of_key = {} if weights is None else dict(zip(keys, weights.split(counts), strict=True))
    place = {key: number for number, key in enumerate(keys)}
    return [
        _Held(
            rows,
            [of_key[key] for key in wanted],
            lengths_KB[[place[key] for key in wanted]],
            [weights_of_key[key] for key in wanted if weights is not None],
        )
        for wanted in held
    ]


@functools.lru_cache(maxsize=64)
def _checksum(keys: tuple[str, ...], dtype: torch.dtype) -> int:
    return zlib.crc32("\0".join([str(dtype), *keys]).encode())


def _message(part: _Held, keys: tuple[str, ...], dtype: torch.dtype) -> list[Sequence[Tensor]]:
    head = torch.tensor([_checksum(keys, dtype), part.rows, *map(len, part.ids)])
    return [[head], part.ids, [part.lengths_HB.view(-1)], *([part.weights] if part.weights else [])]


def _read(message: Tensor, keys: tuple[str, ...], like: KeyedJaggedTensor) -> _Held:
    """What `_message` made; its tensors lie in the message. RuntimeError where it is something else."""
    head = Section(torch.int64, 2 + len(keys))
    (found,) = sections(message, [head])
    checksum, rows, *counts = found.tolist()
    if checksum != _checksum(keys, like.values().dtype):
        raise RuntimeError(f"Something else came than the ids of {', '.join(keys)}: {UNLIKE_CALLS}")
    weights = like.weights_or_none()
    total = sum(counts)
    kinds = [head, Section(like.values().dtype, total), Section(torch.int32, len(keys) * rows)]
    kinds += [] if weights is None else [Section(weights.dtype, total)]
    if len(message) != message_bytes(kinds):
        raise RuntimeError(f"Ids came in {len(message)} bytes, not {message_bytes(kinds)}: {UNLIKE_CALLS}")
    _, ids, lengths, *weight = sections(message, kinds)
    return _Held(rows, ids.split(counts), lengths.view(len(keys), rows), weight[0].split(counts) if weight else ())


def _together(held: Sequence[_Held], keys: Sequence[str], like: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """The rows of all ranks, key after key."""
    places = range(len(keys))
    weights = like.weights_or_none()
    if keys:
        values = torch.cat([each.ids[place] for place in places for each in held])
        lengths = torch.cat([each.lengths_HB for each in held], dim=1).view(-1)
        weights = None if weights is None else torch.cat([each.weights[place] for place in places for each in held])
    else:
        values, lengths = like.values()[:0], like.lengths()[:0]
        weights = None if weights is None else weights[:0]
    counts = [sum(len(each.ids[place]) for each in held) for place in places]
    rows = sum(each.rows for each in held)
    return KeyedJaggedTensor(list(keys), values, weights, lengths, stride=rows, length_per_key=counts)


__all__ = ["IdsExchange"]
