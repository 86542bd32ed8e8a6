"""Matrix products of linear maps; in fp32 on a CPU through whichever of MKL and oneDNN knows it better.

torch calls MKL, which uses AVX-512 on Intel's processors only; oneDNN does on all that have it. On an AMD EPYC oneDNN makes 218
GFLOP/s a core, MKL 97; on an Intel Xeon (Cascade Lake) MKL is the faster one, by up to 2.2 times for gradients of weights, 1.3
times over a whole step. Both are fp32 with sums in another order. oneDNN's operator is the one that torch's own compiler
(Inductor) emits; a torch without it takes its own products, and so do other devices and other types. MTREC_ONEDNN=0 in the
environment switches it off, MTREC_ONEDNN=1 takes it on Intel's processors, too.

Letters in shapes: B rows, N maps, I inputs, O outputs of a map.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

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


def _mkl_is_at_home() -> bool:
    """Whether torch's own fp32 products are MKL's on an Intel processor."""
    return torch.backends.mkl.is_available() and any("GenuineIntel" in line for line in _processor())


def emulates_bf16() -> bool:
    """Whether this CPU has no instructions for bf16 products: they then take longer than those in fp32."""
    lines = _processor()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), None)  # x86 and Arm
    return found is not None and not {"avx512_bf16", "amx_bf16", "bf16"} & set(found.split())


_LINEAR = _onednn()
_FP32 = _LINEAR is not None and (os.environ.get("MTREC_ONEDNN") == "1" or not _mkl_is_at_home())  # oneDNN's, or torch's own
_BF16 = _LINEAR is not None and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # not on every CPU that oneDNN runs on
_inputs_only: ContextVar[bool] = ContextVar("inputs_only", default=False)
_LANES = 16  # numbers in a cache line and in a register: products are fastest of a multiple of them
_LEAST_WIDENED = 64  # outputs, for which widening the inputs pays
_ALIASED = 512  # rows of a multiple of so many numbers are padded
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


def linears(x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None = None, relu: bool = False) -> Tensor:
    """N maps, each of inputs of its own, (N, B, O).

    >>> linears(torch.ones(2, 1, 3), torch.ones(2, 1, 3) * torch.tensor([1.0, 2.0])[:, None, None]).flatten().tolist()
    [3.0, 6.0]
    """
    x, weight, bias = _cast(x_NBI, weight_NOI, bias_NO)
    if _takes(x, weight):
        return _computed(x, weight, bias, relu)
    y_NBO = _batched(x, weight, bias)
    return y_NBO.relu_() if relu else y_NBO


class Maps(NamedTuple):
    """N linear maps: weights (N, O, I), biases (N, O), and whether a ReLU follows."""

    weight: Tensor
    bias: Tensor | None = None
    relu: bool = False


def fan_out(x_BI: Tensor, *readers: Maps) -> list[Tensor]:
    """(N, B, O) of each of the readers, which all read the same inputs: on a CPU one product for all of them, else one for each.
    They may be views, in which the rows of a map are further than O apart; not to be changed in place.

    >>> one, two = Maps(torch.ones(1, 1, 3)), Maps(torch.ones(2, 4, 3))
    >>> [tuple(y.shape) for y in fan_out(torch.ones(5, 3), one, two)]
    [(1, 5, 1), (2, 5, 4)]
    """
    if _fans_out(x_BI, readers):
        # the widest first: it begins where a register does
        order = sorted(range(len(readers)), key=lambda i: -readers[i].weight.shape[:-1].numel())
        ordered = [readers[i] for i in order]
        shapes = tuple((len(maps.weight), maps.relu) for maps in ordered)
        flat = [maps.weight.flatten(0, 1) for maps in ordered]
        flat += [maps.bias.flatten() for maps in ordered if maps.bias is not None]
        biased = tuple(maps.bias is not None for maps in ordered)
        results = dict(zip(order, _FanOut.apply(x_BI, _autocast_type(x_BI), shapes, biased, *flat), strict=True))
        return [results[i] for i in range(len(readers))]
    found = []
    once = x_BI.to(_autocast_type(x_BI))  # not once for each reader, and its gradient back
    for weight_NOI, bias_NO, relu in readers:
        x, weight, bias = _cast(once, weight_NOI.flatten(0, 1), None if bias_NO is None else bias_NO.flatten())
        found.append(linear(x, weight, bias, relu).view(-1, *weight_NOI.shape[:2]).transpose(0, 1))
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
    """Whether products of `x`, in bf16 too, are computed as they are: without a gradient gaps between rows cost nothing."""
    known = _BF16 or not torch.is_autocast_enabled("cpu")
    return _LINEAR is not None and known and x.device.type == "cpu" and not torch.is_grad_enabled()


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast would do, where oneDNN is called past it: without a gradient."""
    if not (reads_gaps(x) and torch.is_autocast_enabled("cpu")):
        return x, weight, bias
    dtype = torch.get_autocast_dtype("cpu")
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def _autocast_type(x: Tensor) -> torch.dtype:
    """In which a product of `x` is computed."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # meta knows no autocast
    return torch.get_autocast_dtype(kind) if on else x.dtype


def _takes(x: Tensor, weight: Tensor) -> bool:
    """Whether this product is computed here: on a CPU, of a size at which that is the faster way, and in fp32; in bf16 (in which
    torch calls oneDNN, too) without a gradient only, where oneDNN reads what torch would copy first.
    """
    half = _BF16 and x.dtype == torch.bfloat16 and reads_gaps(x)
    kind = half or (x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"))
    return x.device.type == "cpu" and x.dtype == weight.dtype and kind and _is_large(x, *weight.shape[-2:])


def _fans_out(x: Tensor, readers: Sequence[Maps]) -> bool:
    """Whether all maps are one product: on a CPU in fp32, or in bf16 for a gradient; oneDNN needs it for a gradient only."""
    kind = _autocast_type(x)
    outputs = sum(maps.weight.shape[:-1].numel() for maps in readers)
    return (
        x.device.type == "cpu"
        and {x.dtype, *(maps.weight.dtype for maps in readers)} <= {torch.float32, kind}
        and (kind == torch.float32 or (kind == torch.bfloat16 and _BF16))
        and (torch.is_grad_enabled() or (kind == torch.float32 and not _FP32))
        and _is_large(x, outputs, x.shape[1])
    )


def _is_large(x: Tensor, outputs: int, inputs: int) -> bool:
    rows = x.shape[-2]
    return min(rows, inputs, outputs) >= _LEAST_SIZE and rows * inputs * outputs >= _LEAST_PRODUCTS


def _computed(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    if not torch.is_grad_enabled():
        return _product(x, weight, bias, relu)
    found: Tensor = _Linear.apply(x, weight, bias, relu)
    return found


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, out: Tensor | None = None
) -> Tensor:
    """x W^T + b of one map (x (B, I), weight (O, I), bias (O,)) or of N, each (N, ...).

    Rows may have gaps; a transpose must be one of what has none: for it oneDNN may have no fast kernel. `out`: of one map through
    MKL, where to write it.
    """
    if out is not None:
        y = torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)
    elif not (_FP32 or (_LINEAR is not None and x.dtype != torch.float32)):
        y = functional.linear(x, weight, bias) if x.dim() == 2 else _batched(x, weight, bias)
    elif x.dim() == 3:  # one after the other: a core runs them faster so than a batched product
        biases = [None] * len(x) if bias is None else list(bias)
        return torch.stack([_product(*each, relu) for each in zip(x, weight, biases, strict=True)])
    else:
        assert _LINEAR is not None
        y = _LINEAR(x, weight, bias, "none", [], "")
    return y.relu_() if relu else y  # oneDNN's own ReLU makes a 0 of a NaN, which then nobody notices


def _batched(x_NBI: Tensor, weight_NOI: Tensor, bias_NO: Tensor | None) -> Tensor:
    """torch's own product of N maps."""
    weight_NIO = weight_NOI.transpose(1, 2)
    return torch.bmm(x_NBI, weight_NIO) if bias_NO is None else torch.baddbmm(bias_NO.unsqueeze(1), x_NBI, weight_NIO)


class _Linear(torch.autograd.Function):
    """`linear` and `linears` in fp32 on a CPU."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """(B, O), or (N, B, O)."""
        if _FP32 or x.stride(-1) != 1:  # MKL reads rows with gaps between them
            x = x.contiguous()
        weight = weight.contiguous()
        y = _product(x, weight, bias, relu)
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
        return *_gradients(_wanted(context)[:3], dz, x, weight), None


class _FanOut(torch.autograd.Function):
    """`fan_out` on a CPU, the maps of all readers side by side, (B, Q): gradients, laid out map after map, are brought into rows
    in the pass that the ReLU takes.

    Inputs of an odd width, and those of several readers, are widened to a multiple of a register's, the outputs too; the bias is
    then the weight of one more input, that is 1.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        dtype: torch.dtype,
        readers: Sequence[tuple[int, bool]],
        biased: Sequence[bool],
        *parameters: Tensor,
    ) -> Any:
        """(N, B, O) of each reader, of which the number of maps and whether a ReLU follows are given, the weights (N O, I) of
        all and the biases (N O) of those that have some. `dtype` is what products are computed in.
        """
        weights, rest = parameters[: len(readers)], iter(parameters[len(readers) :])
        biases = [next(rest) if has else None for has in biased]
        widths = [len(weight) for weight in weights]
        spare = _spare(x.shape[1], sum(widths), len(readers) > 1 and any(biased))
        if spare or len(readers) > 1:
            weight, bias = _side_by_side(weights, biases, spare, dtype), None
            x_BP = _widened(x, spare, dtype)
        else:
            weight, bias = weights[0].to(dtype).contiguous(), None if biases[0] is None else biases[0].to(dtype)
            x_BP = x.to(dtype) if x.stride(-1) == 1 and not _copied(dtype) else x.to(dtype).contiguous()
        y_BQ = _product(x_BP, weight, bias, False, _rows(x_BP, len(weight)))
        found = []
        for part, (maps, relu) in zip(y_BQ.split(_parts(widths, len(weight)), dim=1), readers, strict=False):
            y = _by_map(part, maps)
            if relu:
                y = torch.clamp_min(y, 0.0, out=y.new_empty(y.shape) if _copied(dtype) else y)
            found.append(y)
        context.readers, context.widths, context.inputs, context.spare = readers, widths, x.shape[1], spare
        context.biased = [i for i, has in enumerate(biased) if has]
        context.save_for_backward(x_BP, weight, *(y for y, (_, relu) in zip(found, readers, strict=True) if relu))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *dy: Tensor) -> Any:
        """The gradients of x, of the weights, and of the biases."""
        x_BP, weight, *rectified = context.saved_tensors
        widths, inputs, spare = context.widths, context.inputs, context.spare
        rows = _rows(x_BP, len(weight))
        dz_BQ = x_BP.new_empty(len(x_BP), len(weight)) if rows is None else rows
        for (maps, relu), dy_NBO, dz in zip(context.readers, dy, dz_BQ.split(_parts(widths, len(weight)), 1), strict=False):
            if relu:
                torch.ops.aten.threshold_backward.grad_input(dy_NBO, rectified.pop(0), 0, grad_input=_by_map(dz, maps))
            else:
                _by_map(dz, maps).copy_(dy_NBO)
        dz_BQ[:, sum(widths) :] = 0.0  # last, where the rows are in the cache: before them it took 3 ms of 112
        wanted = _wanted(context)
        to_parameters, bias_apart = any(wanted[4:]), not spare and len(context.biased) > 0
        to_x, to_weight, to_bias = _gradients((wanted[0], to_parameters, to_parameters and bias_apart), dz_BQ, x_BP, weight)
        to_weights: Sequence[Tensor | None] = [None] * len(widths)
        to_biases: Sequence[Tensor | None] = [None] * len(context.biased)
        if to_weight is not None:
            each = to_weight.split(_parts(widths, len(weight)))[: len(widths)]
            to_weights = [gradient[:, :inputs] for gradient in each]
            to_biases = [each[i][:, inputs] if to_bias is None else to_bias for i in context.biased]
        return None if to_x is None else to_x[:, :inputs], None, None, None, *to_weights, *to_biases


def _spare(inputs: int, outputs: int, bias: bool) -> int:
    """By how many columns inputs are widened: for the bias by some in any case."""
    pays = outputs >= _LEAST_WIDENED
    return (-inputs % _LANES if pays else 0) or (_LANES if bias else 0)


def _copied(dtype: torch.dtype) -> bool:
    """Whether oneDNN computes the products, which copies what has gaps between its rows where there is a gradient."""
    return _FP32 or dtype != torch.float32


def _widened(x: Tensor, spare: int, dtype: torch.dtype) -> Tensor:
    """`x` with so many more columns, a 1 and zeros."""
    if not spare:
        return x.to(dtype).contiguous()
    inputs = x.shape[1]
    wide = x.new_empty(len(x), inputs + spare, dtype=dtype)
    wide[:, :inputs] = x
    wide[:, inputs] = 1.0
    wide[:, inputs + 1 :] = 0.0
    return wide


def _side_by_side(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], spare: int, dtype: torch.dtype
) -> Tensor:
    """All weights (Q, I) with so many more inputs, the first of them the biases, the others 0; and with outputs that are 0, up to
    a multiple of a register's.
    """
    inputs, widths = weights[0].shape[1], [len(weight) for weight in weights]
    outputs = sum(widths)
    wide = weights[0].new_empty(outputs + (-outputs % _LANES if outputs >= _LEAST_WIDENED else 0), inputs + spare, dtype=dtype)
    wide[:, inputs:] = 0.0
    wide[outputs:] = 0.0
    for part, weight, bias in zip(wide.split(_parts(widths, len(wide))), weights, biases, strict=False):
        part[:, :inputs] = weight
        if bias is not None:
            part[:, inputs] = bias
    return wide


def _parts(widths: Sequence[int], whole: int) -> list[int]:
    """Of what is split: the readers' own, then what is there besides."""
    return [*widths, whole - sum(widths)]


def _by_map(x_BQ: Tensor, maps: int) -> Tensor:
    """(N, B, O), a view."""
    return x_BQ.view(len(x_BQ), maps, x_BQ.shape[1] // maps).transpose(0, 1)


def _rows(x: Tensor, width: int) -> Tensor | None:
    """Where MKL writes a product of that width: rows of whole pages' distance would meet in the same lines of the cache."""
    if _copied(x.dtype) or width % _ALIASED:
        return None
    return x.new_empty(len(x), width + _LANES)[:, :width]


def _gradients(
    wanted: Sequence[bool], dz: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias; those that are wanted."""
    to_x, to_weight, to_bias = wanted
    return (
        _product(dz, weight.transpose(-1, -2)) if to_x else None,
        _product(dz.transpose(-1, -2), x.transpose(-1, -2)) if to_weight else None,
        dz.new_ones(dz.shape[-2]) @ dz if to_bias else None,
    )


def _wanted(context: Any) -> Sequence[bool]:
    """Which gradients are wanted, in the order of the inputs."""
    needed: tuple[bool, ...] = context.needs_input_grad
    return (needed[0], False, False) if _inputs_only.get() else needed
