"""The next batch on its way to the device, and its ids to the ranks that hold their rows: on a GPU beside what is computed.

Both take a stream of their own, one a device. What waits there (torchrec reads on the host how many ids each rank will get)
waits for the next batch alone, not for what is computed, on one GPU; of whole tables on one GPU nothing is sent, nor waited for.
On several the exchange of these numbers queues behind the collectives before it (NCCL has one stream a group), so the host may
wait for the step before. On a CPU there is no stream and nothing special.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mtrec.batch import Batch


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(device: torch.device) -> AbstractContextManager[object]:
    """Within it work on a GPU (`device` with its index) goes to the stream beside the computation."""
    return torch.cuda.stream(_stream(device)) if device.type == "cuda" else nullcontext()


def arrive(device: torch.device) -> torch.cuda.Stream | None:
    """What is computed from now on waits (the host does not) for what was started `beside`; the computation's stream, of a GPU.

    Tensors made there have to be told of it (`record_stream`): else their memory might be used again too early.
    """
    if device.type != "cuda":
        return None
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(_stream(device))
    return computing


def copy_ahead(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device. From page-locked memory the copy to a GPU waits for nothing, and overlaps with the steps that
    the device has still to do.
    """
    if device.type == "cuda":
        device = torch.empty(0, device=device).device  # with its index
        for ids in _ids(batch):
            ids.length_per_key()  # torchrec asks for it, and would have to wait for the device
    with beside(device):
        there = batch.to(device)
    computing = arrive(device)
    if computing is not None:
        for tensor in tensors_of(there):
            tensor.record_stream(computing)
    return there


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a batch."""
    found = [batch.dense_BF, *batch.labels.values(), batch.sample_weight_B]
    for ids in _ids(batch):
        found += [ids.values(), ids.weights_or_none(), ids.lengths_or_none(), ids.offsets_or_none()]
    return [each for each in found if each is not None]


def _ids(batch: Batch) -> list[KeyedJaggedTensor]:
    return [batch.sparse] if batch.weighted is None else [batch.sparse, batch.weighted]
