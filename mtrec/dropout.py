"""Dropout whose masks belong to the logical streams of the data, not to the ranks that happen to hold them.

A global batch is the same rows for any number of ranks: one piece of every logical stream (`mtrec.reader`). So that a
run on 1, 2 or 8 ranks also drops the same units of the same rows, masks are drawn stream by stream, each from a
generator keyed by (seed, step, stream). Layers differ because they draw one after the other from the same generators.

Letters in shapes: B rows on this rank.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class _Streams:
    generators: tuple[torch.Generator, ...]
    rows: tuple[int, ...]


# What `keep_mask` draws from: None is torch's global generator. A context variable, because several training functions
# may run in threads of one process.
_streams: ContextVar[_Streams | None] = ContextVar("streams", default=None)
_off: ContextVar[bool] = ContextVar("off", default=False)


@contextmanager
def stream_dropout(
    seed: int, step: int, streams: Sequence[int], rows: Sequence[int], device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Within it, dropout masks depend on (seed, step, stream, row within the stream) and on nothing else.

    Args:
        seed: the run's seed.
        step: the number of the global batch, so that no two steps share a mask.
        streams: the numbers of the streams whose rows the tensors hold, in their order.
        rows: how many rows of each stream the tensors hold; they sum to B. A stream may have none.
        device: where the masks are drawn. The CPU and CUDA draw different masks.

    Every rank must call the same dropout layers in the same order, which it does when it runs the same model.

    Raises:
        ValueError: `streams` and `rows` differ in length.

    >>> x = torch.ones(6, 4)
    >>> layer = Dropout(0.5)
    >>> with stream_dropout(7, 0, streams=[0, 1], rows=[2, 4]):
    ...     whole = layer(x)
    >>> with stream_dropout(7, 0, streams=[1], rows=[4]):
    ...     part = layer(x[2:])
    >>> torch.equal(whole[2:], part)
    True
    """
    if len(streams) != len(rows):
        raise ValueError(f"`rows` should have one number a stream. Found {len(rows)} for {len(streams)} streams.")
    generators = tuple(torch.Generator(device).manual_seed(_key(seed, step, stream)) for stream in streams)
    token = _streams.set(_Streams(generators, tuple(rows)))
    try:
        yield
    finally:
        _streams.reset(token)


def _key(seed: int, step: int, stream: int) -> int:
    # A hash, not a sum: seed 1 at step 0 must not repeat seed 0 at step 1. 32 bits, because the CPU's generator
    # (Mersenne twister) ignores the rest.
    return int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{stream}".encode(), digest_size=4).digest(), "little")


@contextmanager
def without_dropout() -> Iterator[None]:
    """Within it nothing is dropped and no random number is drawn, whatever mode the modules are in.

    For looking at a model in the middle of its training (gate statistics) without changing what follows.

    >>> with without_dropout():
    ...     Dropout(0.9)(torch.ones(2, 2))
    tensor([[1., 1.],
            [1., 1.]])
    """
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


def keep_mask(shape: Sequence[int], keep: float, *, row_dim: int, device: torch.device) -> Tensor | None:
    """A bool mask of `shape`, True with probability `keep`; None within `without_dropout`.

    Within `stream_dropout` it is drawn stream by stream along dimension `row_dim`, else from torch's global generator.

    Raises:
        ValueError: within `stream_dropout`, dimension `row_dim` does not hold as many rows as the streams have.

    >>> keep_mask((2, 3), 1.0, row_dim=0, device=torch.device("cpu"))
    tensor([[True, True, True],
            [True, True, True]])
    """
    if _off.get():
        return None
    streams = _streams.get()
    if streams is None:
        return torch.empty(*shape, dtype=torch.bool, device=device).bernoulli_(keep)
    if sum(streams.rows) != shape[row_dim]:
        raise ValueError(
            f"`rows` of stream_dropout should sum to the {shape[row_dim]} rows of the tensor (dimension {row_dim} of "
            f"{tuple(shape)}). Found {streams.rows}."
        )
    masks = []
    for generator, rows in zip(streams.generators, streams.rows, strict=True):
        part = [*shape]
        part[row_dim] = rows
        masks.append(torch.empty(part, dtype=torch.bool, device=device).bernoulli_(keep, generator=generator))
    return torch.cat(masks, dim=row_dim) if masks else torch.empty(*shape, dtype=torch.bool, device=device)


class Dropout(nn.Module):
    """Sets each number to zero with probability `p` and divides the others by 1 - p, while training.

    As `torch.nn.Dropout` (Srivastava et al., 2014), except that within `stream_dropout` the mask does not depend on
    how the rows are distributed over ranks. In `eval()`, with p = 0 and within `without_dropout` it is the identity.

    Args:
        p: share of numbers dropped, 0 <= p < 1.

    Raises:
        ValueError: `p` is out of range.

    >>> Dropout(0.5).eval()(torch.ones(1, 3))
    tensor([[1., 1., 1.]])
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0.0 <= p < 1.0:
            raise ValueError(f"`dropout` should be at least 0 and less than 1. Found {p}.")
        self.p = p

    def forward(self, x: Tensor, row_dim: int = 0) -> Tensor:
        """`x` of any shape, with its B rows along dimension `row_dim`; the result has the same shape and type."""
        if not self.training or self.p == 0.0 or _off.get():
            return x
        if _streams.get() is None:
            return functional.dropout(x, self.p)
        mask = keep_mask(x.shape, 1.0 - self.p, row_dim=row_dim, device=x.device)
        assert mask is not None
        return x * mask.to(x.dtype).div_(1.0 - self.p)

    def extra_repr(self) -> str:
        """What the module's repr shows: p."""
        return f"p={self.p}"
