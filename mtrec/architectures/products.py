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
    x_BI, weight_OI, bias_O = _cast(x_BI, weight_OI, bias_O)
    if _takes(x_BI, weight_OI):
        if not torch.is_grad_enabled():
            return _product(x_BI, weight_OI, bias_O, relu)
        found: Tensor = _Linear.apply(x_BI, weight_OI, bias_O, relu)
        return found
    y_BO = functional.linear(x_BI, weight_OI, bias_O)
    return y_BO.relu_() if relu else y_BO


def linears(x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None = None, relu: bool = False) -> Tensor:
    """N maps, each of inputs of its own, (N, B, O).

    >>> linears(torch.ones(2, 1, 3), torch.ones(2, 1, 3) * torch.tensor([1.0, 2.0])[:, None, None]).flatten().tolist()
    [3.0, 6.0]
    """
    x_NBI, weight_NOI, bias_NO = _cast(x_NBI, weight_NOI, bias_NO)
    if _takes(x_NBI, weight_NOI):
        if not torch.is_grad_enabled():
            return _products(x_NBI, weight_NOI, bias_NO, relu)
        found: Tensor = _Linears.apply(x_NBI, weight_NOI, bias_NO, relu)
        return found
    weight_NIO = weight_NOI.transpose(1, 2)
    y_NBO = torch.bmm(x_NBI, weight_NIO) if bias_NO is None else torch.baddbmm(bias_NO.unsqueeze(1), x_NBI, weight_NIO)
    return y_NBO.relu_() if relu else y_NBO


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


def _product(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, relu: bool = False) -> Tensor:
    """x W^T + b. Rows may have gaps; a transpose must be one of what has none: for it oneDNN may have no fast kernel."""
    assert _LINEAR is not None
    found: Tensor = _LINEAR(x_BI, weight_OI, bias_O, "none", [], "")
    return found.relu_() if relu else found  # oneDNN's own ReLU makes a 0 of a NaN, which then nobody notices


def _products(x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, relu: bool) -> Tensor:
    """One after the other, which a core runs faster than MKL's batched product."""
    biases = [None] * len(x_NBI) if bias_NO is None else list(bias_NO)
    return torch.stack([_product(*each, relu) for each in zip(x_NBI, weight_NOI, biases, strict=True)])


class _Linear(torch.autograd.Function):
    """`linear` in fp32 on a CPU."""

    @staticmethod
    def forward(context: Any, x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, relu: bool) -> Tensor:
        x_BI, weight_OI = x_BI.contiguous(), weight_OI.contiguous()
        y_BO = _product(x_BI, weight_OI, bias_O, relu)
        context.save_for_backward(x_BI, weight_OI, y_BO if relu else None)
        return y_BO

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy_BO: Tensor) -> Any:
        x_BI, weight_OI, y_BO = context.saved_tensors
        dz_BO = _before_relu(dy_BO, y_BO)
        to_x, to_weight, to_bias, _ = _wanted(context)
        return (
            _product(dz_BO, weight_OI.t()) if to_x else None,
            _product(dz_BO.t(), x_BI.t()) if to_weight else None,
            dz_BO.sum(0) if to_bias else None,
            None,
        )


class _Linears(torch.autograd.Function):
    """`linears` in fp32 on a CPU."""

    @staticmethod
    def forward(context: Any, x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None, relu: bool) -> Tensor:
        x_NBI, weight_NOI = x_NBI.contiguous(), weight_NOI.contiguous()
        y_NBO = _products(x_NBI, weight_NOI, bias_NO, relu)
        context.save_for_backward(x_NBI, weight_NOI, y_NBO if relu else None)
        return y_NBO

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy_NBO: Tensor) -> Any:
        x_NBI, weight_NOI, y_NBO = context.saved_tensors
        dz_NBO = _before_relu(dy_NBO, y_NBO)
        to_x, to_weight, to_bias, _ = _wanted(context)
        return (
            torch.stack([_product(dz, weight.t()) for dz, weight in zip(dz_NBO, weight_NOI, strict=True)]) if to_x else None,
            torch.stack([_product(dz.t(), x.t()) for dz, x in zip(dz_NBO, x_NBI, strict=True)]) if to_weight else None,
            dz_NBO.sum(1) if to_bias else None,
            None,
        )


def _wanted(context: Any) -> Sequence[bool]:
    """Which gradients are wanted, in the order of the inputs."""
    needed: tuple[bool, ...] = context.needs_input_grad
    return (needed[0], False, False, False) if _inputs_only.get() else needed


def _before_relu(dy: Tensor, y: Tensor | None) -> Tensor:
    """The gradient before a ReLU whose result was `y` (None: there was none), contiguous."""
    dy = dy.contiguous()
    return dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
