"""Matrix products of linear maps; in fp32 on a CPU through whichever of MKL and oneDNN knows it better. Of maps that read the
same inputs: `fan_out`.

torch calls MKL, which uses AVX-512 on Intel's processors only; oneDNN does on all that have it. On an AMD EPYC with AVX-512
oneDNN makes 218 GFLOP/s a core, MKL 97. On an Intel Xeon (Cascade Lake) MKL is the faster one, by up to 2.2 times for gradients
of weights, 1.3 times over a whole step; on an AMD EPYC without AVX-512 (Zen 3), too, by 1.15 to 1.2 times over a step's
products. Both are fp32 with sums in another order. oneDNN's operator is the one that torch's own compiler (Inductor) emits; a
torch without it takes its own products, and so do other devices and other types. MTREC_ONEDNN=0 in the environment switches it
off, MTREC_ONEDNN=1 takes it everywhere.

Letters in shapes: B rows, N maps, I inputs, O outputs of a map.
"""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def _onednn() -> Any:
    """The operator, None where there is none or it is switched off."""
    if os.environ.get("MTREC_ONEDNN") == "0" or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _processor() -> list[str]:
    """What Linux says of it, line by line; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def _instructions() -> set[str]:
    """The sets of instructions that Linux names; none where it names none."""
    found = next((line for line in _processor() if line.startswith(("flags", "Features"))), "")  # x86 and Arm
    return set(found.split())


def _mkl_is_at_home() -> bool:
    """Whether torch's own fp32 products are MKL's, on a processor whose widest registers it uses."""
    intel = any("GenuineIntel" in line for line in _processor())
    return torch.backends.mkl.is_available() and (intel or "avx512f" not in _instructions())


def emulates_bf16() -> bool:
    """Whether this CPU has no instructions for bf16 products: they then take longer than those in fp32."""
    found = _instructions()
    return bool(found) and not {"avx512_bf16", "amx_bf16", "bf16"} & found


def _prefers_onednn() -> bool:
    """Whether products in fp32 are oneDNN's, not torch's own."""
    return _onednn() is not None and (os.environ.get("MTREC_ONEDNN") == "1" or not _mkl_is_at_home())


_LINEAR = _onednn()
_FP32 = _prefers_onednn()
_BF16 = _LINEAR is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # not on every CPU that oneDNN runs on
_backward_to: ContextVar[str] = ContextVar("backward_to", default="all")
_LEAST_SIZE, _LEAST_PRODUCTS = 8, 1 << 18  # below them MKL's call is the shorter one, or oneDNN has no fast kernel


def linear(x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, relu: bool = False) -> Tensor:
    """x W^T + b, (B, O); `relu` sets what is negative to 0.

    >>> linear(torch.ones(2, 3), torch.ones(4, 3), torch.full((4,), -5.0), relu=True).tolist()
    [[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    """
    x, weight, bias = _cast(x_BI, weight_OI, bias_O)
    if _takes(x, weight):
        return _computed(x, weight, bias, relu)
    y_BO = functional.linear(x, weight, bias)
    return y_BO.relu_() if relu else y_BO


def linears(
    x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None = None, relu: bool = False, *, by_row: bool = False
) -> Tensor:
    """N maps, each of inputs of its own, (N, B, O). `by_row`: without a gradient it may be a view in which all maps' outputs of a
    row lie together, for what reads them row by row.

    >>> linears(torch.ones(2, 1, 3), torch.ones(2, 1, 3) * torch.tensor([1.0, 2.0])[:, None, None]).flatten().tolist()
    [3.0, 6.0]
    """
    x, weight, bias = _cast(x_NBI, weight_NOI, bias_NO)
    if _takes(x, weight):
        return _computed(x, weight, bias, relu, by_row)
    y_NBO = _batched(x, weight, bias)
    return y_NBO.relu_() if relu else y_NBO


@contextmanager
def backward_to(what: Literal["inputs", "parameters"]) -> Iterator[None]:
    """Within it backward passes compute no gradients of weights and biases ("inputs", on which they must not depend), or none of
    the leaf that the first layers read ("parameters"): the engine asks for no such ones, but does not say so.
    """
    token = _backward_to.set(what)
    try:
        yield
    finally:
        _backward_to.reset(token)


def reads_gaps(x: Tensor) -> bool:
    """Whether products of `x`, in bf16 too, are computed as they are: without a gradient gaps between rows cost nothing."""
    known = _BF16 or not torch.is_autocast_enabled("cpu")
    return _LINEAR is not None and known and x.device.type == "cpu" and not torch.is_grad_enabled()


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do, where oneDNN is called past it: without a gradient."""
    if not (reads_gaps(x) and torch.is_autocast_enabled("cpu")):
        return x, weight, bias
    dtype = torch.get_autocast_dtype("cpu")
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def autocast_type(x: Tensor) -> torch.dtype:
    """In which torch computes a product of `x`.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     autocast_type(torch.ones(1)), autocast_type(torch.ones(1, dtype=torch.float64))
    (torch.bfloat16, torch.float64)
    """
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta knows no autocast
    return torch.get_autocast_dtype(kind) if on and x.is_floating_point() and x.dtype != torch.float64 else x.dtype


def takes_bf16() -> bool:
    """Whether oneDNN computes bf16 on this CPU."""
    return _BF16


def through_onednn(dtype: torch.dtype) -> bool:
    """Whether `product` is oneDNN's, which copies what has gaps between its rows where there is a gradient."""
    return _FP32 or dtype != torch.float32


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether this product is computed here: on a CPU, of a size at which that is the faster way, and in fp32; in bf16 (in which
    torch calls oneDNN, too) without a gradient only, where oneDNN reads what torch would copy first.
    """
    if x.device.type != "cpu" or x.dtype != weight.dtype:
        return False
    rows, (outputs, inputs) = x.shape[-2], weight.shape[-2:]
    if x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        if x.dim() == 3:  # torch asks MKL for the weights' gradients as x^T dy: nine times as long where outputs are few
            return min(rows, inputs) >= _LEAST_SIZE and rows * inputs * outputs >= _LEAST_PRODUCTS
        return is_large(rows, inputs, outputs)
    return _BF16 and x.dtype == torch.bfloat16 and reads_gaps(x) and is_large(rows, inputs, outputs)


def is_large(*sizes: int) -> bool:
    """Whether a product of so many rows, inputs and outputs, in any order, is worth a function of our own."""
    return min(sizes) >= _LEAST_SIZE and math.prod(sizes) >= _LEAST_PRODUCTS


def _computed(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, by_row: bool = False) -> Tensor:
    if not torch.is_grad_enabled():
        return product(x, weight, bias, relu, by_row)
    found: Tensor = _Linear.apply(x, weight, bias, relu)
    return found


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, by_row: bool = False) -> Tensor:
    """x W^T + b of one map (x (B, I), weight (O, I), bias (O,)) or of N, each (N, ...); `by_row` as for `linears`.

    Rows may have gaps; a transpose must be one of what has none: for it oneDNN may have no fast kernel.
    """
    if not _is_onednns(x, weight):
        y = functional.linear(x, weight, bias) if x.dim() == 2 else _batched(x, weight, bias)
    elif x.dim() == 3:  # one after the other: a core runs them faster so than a batched product
        biases = [None] * len(x) if bias is None else list(bias)
        found = [product(*each, relu) for each in zip(x, weight, biases, strict=True)]
        return torch.stack(found, dim=1).transpose(0, 1) if by_row else torch.stack(found)
    else:
        y = _LINEAR(x, weight, bias, "none", [], "")
    return y.relu_() if relu else y  # oneDNN's own ReLU makes a 0 of a NaN, which then nobody notices


def _is_onednns(x: Tensor, weight: Tensor) -> bool:
    """Whether `product` calls oneDNN, which has fast kernels for large ones."""
    return _LINEAR is not None and through_onednn(x.dtype) and is_large(x.shape[-2], *weight.shape[-2:])


def training_product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x W^T + b, where there is a gradient. In bf16 it is torch's, which hands a transpose to oneDNN as it is: the operator would
    copy it first (5 ms of 2,048 x 1,040). `out`: of one map through MKL, where to write it.
    """
    if out is not None:
        return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    return product(x, weight, bias) if x.dtype == torch.float32 else functional.linear(x, weight, bias)


def _batched(x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None) -> Tensor:
    """torch's own product of N maps."""
    weight_NIO = weight_NOI.transpose(1, 2)
    return torch.bmm(x_NBI, weight_NIO) if bias_NO is None else torch.baddbmm(bias_NO.unsqueeze(1), x_NBI, weight_NIO)


class _Linear(torch.autograd.Function):
    """`linear` and `linears` in fp32 on a CPU."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """(B, O), or (N, B, O)."""
        context.reads_leaf = is_input(x)
        if x.stride(-1) != 1 or _is_onednns(x, weight):  # MKL reads rows with gaps between them
            x = x.contiguous()
        weight = weight.contiguous()
        y = product(x, weight, bias, relu)
        context.save_for_backward(x, weight, y if relu else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(context: Any, dy: Tensor) -> Any:
        """The gradients of x, weight and bias."""
        x, weight, y = context.saved_tensors
        if y is None:
            dz = dy.contiguous()
        else:
            dz = torch.ops.aten.threshold_backward.grad_input(dy, y, 0, grad_input=torch.empty_like(y))
        return *gradients(wanted_gradients(context)[:3], dz, x, weight), None


def is_input(x: Tensor) -> bool:
    """Whether a backward pass ends at x, which is no parameter either."""
    return x.grad_fn is None and not isinstance(x, torch.nn.Parameter)


def gradients(
    wanted: Sequence[bool], dz: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, of the weight and of the bias; those that are wanted. `dz` is that of x W^T + b."""
    to_x, to_weight, to_bias = wanted
    return (
        training_product(dz, weight.transpose(-1, -2)) if to_x else None,
        training_product(dz.transpose(-1, -2), x.transpose(-1, -2)) if to_weight else None,
        dz.sum(-2) if to_bias else None,
    )


def wanted_gradients(context: Any) -> list[bool]:
    """Which gradients are wanted within `backward_to`, in the order of the inputs, of which x is the first. `context.reads_leaf`
    says whether that is where a pass ends.
    """
    needed: tuple[bool, ...] = context.needs_input_grad
    towards = _backward_to.get()
    to_x = needed[0] and not (towards == "parameters" and context.reads_leaf)
    return [to_x, *(each and towards != "inputs" for each in needed[1:])]
