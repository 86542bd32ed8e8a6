"""Matrix products of linear maps; in fp32 on a CPU through oneDNN, where torch itself would call MKL.

MKL uses AVX-512 on Intel's processors only; oneDNN on all that have it: 2.2 times as fast on an AMD EPYC (218 in place of 97
GFLOP/s a core), the same fp32 with sums in another order. The operator is the one that torch's own compiler (Inductor) emits; a
torch without it, other devices and other types take `torch.nn.functional.linear` and `torch.bmm`. MTREC_ONEDNN=0 in the
environment switches it off.

Letters in shapes: B rows, N maps, I inputs, O outputs of a map.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def _onednn() -> Any:
    """The operator, None where there is none or it is switched off."""
    if os.environ.get("MTREC_ONEDNN") == "0" or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_LINEAR = _onednn()
_BF16 = _LINEAR is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # not on every CPU that oneDNN runs on
_inputs_only: ContextVar[bool] = ContextVar("inputs_only", default=False)
_LEAST_SIZE, _LEAST_PRODUCTS = 8, 1 << 18  # below them MKL's call is the shorter one, or oneDNN has no fast kernel


def linear(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, relu: bool = False) -> Tensor:
    """x W^T + b, (B, O); `relu` sets what is negative to 0.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3), torch.full((4,), -5.0), relu=True).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    found = _through_onednn(x_BI, weight_OI, bias_O, relu)
    if found is not None:
        return found
    y_BO = functional.linear(x_BI, weight_OI, bias_O)
    return y_BO.relu_() if relu else y_BO


def linears(x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None = None, relu: bool = False) -> Tensor:
    """N maps, each of inputs of its own, (N, B, O).

    >>> linears(torch.ones(2, 1, 3), torch.ones(2, 1, 3) * torch.tensor([1.0, 2.0])[:, None, None]).flatten().tolist()
    [3.0, 6.0]
    """
    found = _through_onednn(x_NBI, weight_NOI, bias_NO, relu)
    if found is not None:
        return found
    weight_NIO = weight_NOI.transpose(1, 2)
    y_NBO = torch.bmm(x_NBI, weight_NIO) if bias_NO is None else torch.baddbmm(bias_NO.unsqueeze(1), x_NBI, weight_NIO)
    return y_NBO.relu_() if relu else y_NBO


def _through_onednn(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor | None:
    """The product, None where torch is to compute it."""
    x, weight, bias = _cast(x, weight, bias)
    if not _takes(x, weight):
        return None
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, relu)
    found: Tensor = _Linear.apply(x, weight, bias, relu)
    return found


@contextmanager
def towards_inputs() -> Iterator[None]:
    """Within it backward passes give gradients of inputs alone: the engine asks for no other, but does not say so."""
    token = _inputs_only.set(True)
    try:
        yield
    finally:
        _inputs_only.reset(token)


def reads_gaps(x: Tensor) -> bool:
    """Whether products of `x`, in bf16 too, go through oneDNN as they are: without a gradient gaps between rows cost nothing."""
    known = _BF16 or not torch.is_autocast_enabled("cpu")
    return _LINEAR is not None and known and x.device.type == "cpu" and not torch.is_grad_enabled()


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do, where oneDNN is called past it: without a gradient."""
    if not (reads_gaps(x) and torch.is_autocast_enabled("cpu")):
        return x, weight, bias
    dtype = torch.get_autocast_dtype("cpu")
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes this product: on a CPU, of a size at which it is the faster one, and in fp32; in bf16 (in which
    torch calls it, too) without a gradient only, where it reads what torch would copy first.
    """
    outputs, inputs = weight.shape[-2:]
    half = _BF16 and x.dtype == torch.bfloat16 and reads_gaps(x)
    return (
        _LINEAR is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype
        and (half or (x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")))
        and min(x.shape[-2], inputs, outputs) >= _LEAST_SIZE
        and x.shape[-2] * inputs * outputs >= _LEAST_PRODUCTS
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """x W^T + b of one map (x (B, I), weight (O, I), bias (O,)) or of N, each (N, ...), one after the other.

    A core runs them faster so than MKL's batched product. Rows may have gaps; a transpose must be one of what has none: for
    it oneDNN may have no fast kernel.
    """
    assert _LINEAR is not None
    if x.dim() == 3:
        biases = [None] * len(x) if bias is None else list(bias)
        return torch.stack([_product(*each, relu) for each in zip(x, weight, biases, strict=True)])
    found: Tensor = _LINEAR(x, weight, bias, "none", [], "")
    return found.relu_() if relu else found  # oneDNN's own ReLU makes a 0 of a NaN, which then nobody notices


class _Linear(torch.autograd.Function):
    """`linear` and `linears` in fp32 on a CPU."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """(B, O), or (N, B, O)."""
        x, weight = x.contiguous(), weight.contiguous()
        y = _product(x, weight, bias, relu)
        context.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy: Tensor) -> Any:
        """The gradients of x, weight and bias."""
        x, weight, y = context.saved_tensors
        dz = dy.contiguous() if y is None else torch.ops.aten.threshold_backward(dy.contiguous(), y, 0)
        to_x, to_weight, to_bias, _ = _wanted(context)
        return (
            _product(dz, weight.transpose(-1, -2)) if to_x else None,
            _product(dz.transpose(-1, -2), x.transpose(-1, -2)) if to_weight else None,
            dz.sum(-2) if to_bias else None,
            None,
        )


def _wanted(context: Any) -> Sequence[bool]:
    """Which gradients are wanted, in the order of the inputs."""
    needed: tuple[bool, ...] = context.needs_input_grad
    return (needed[0], False, False, False) if _inputs_only.get() else needed
