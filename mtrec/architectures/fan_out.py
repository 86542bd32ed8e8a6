"""Linear maps that read the same inputs, as one matrix product: experts' first layers and gates.

On a CPU, in fp32 and bf16. Two things make it fast where there is a gradient, or the product is MKL's, measured on 2,048 rows of
445 inputs and 1,024 outputs on a Cascade Lake:

- Inputs and outputs are widened to multiples of 16, with a 1 (whose weight is the bias) and zeros: 448 inputs in place of 445
  save a tenth of the gradients' products through MKL, a quarter through oneDNN.
- Rows of y lie 16 numbers further apart where they would be a multiple of 2 KiB apart and meet in few lines of the cache: 6.1 ms
  in place of 11 for the next layer's gradient of weights.

Letters in shapes: B rows, N maps, I inputs, O outputs of a map, Q outputs of all maps, P inputs after widening.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mtrec.architectures.products import (
    autocast_type,
    gradients,
    is_input,
    is_large,
    linear,
    product,
    reads_gaps,
    takes_bf16,
    through_onednn,
    training_product,
    wanted_gradients,
)

_LANES = 16  # numbers in a register and in a line of the cache
_LEAST_WIDENED = 64  # outputs, for which widening pays
_ALIASED = 512  # numbers: rows of a multiple of them are padded
_ALIGNING = ("cuda",)  # kinds of devices on which rows begin at multiples of 16 bytes
_apart: ContextVar[str] = ContextVar("apart", default="")


class Maps(NamedTuple):
    """N linear maps: weights (N, O, I), biases (N, O), and whether a ReLU follows."""

    weight: Tensor
    bias: Tensor | None = None
    relu: bool = False

    @property
    def outputs(self) -> int:
        """Of all maps."""
        return self.weight.shape[:2].numel()


def fan_out(x_BI: Tensor, *readers: Maps) -> list[Tensor]:
    """(N, B, O) of each of the readers, which all read the same inputs: as one product where that is faster. They may be views,
    in which the rows of a map are further than O apart; not to be changed in place.

    All readers' gradients are computed in one go: weights of a reader that are not finite make x's so, whichever is used.

    >>> one, two = Maps(torch.ones(1, 1, 3)), Maps(torch.ones(2, 4, 3))
    >>> [tuple(y.shape) for y in fan_out(torch.ones(5, 3), one, two)]
    [(1, 5, 1), (2, 5, 4)]
    """
    found: dict[int, Tensor] = {}
    is_one = _is_one_product(x_BI, readers)
    if is_one and _without_gradient(x_BI):
        found = _side_by_side(x_BI, readers)
    elif is_one:
        for group in _groups(readers):
            found.update(zip(group, _FanOut.apply(x_BI, *_arguments([readers[i] for i in group])), strict=True))
    else:
        once = _aligned(x_BI.to(autocast_type(x_BI)))  # not once for each reader, and its gradient back
        for i, (weight_NOI, bias_NO, relu) in enumerate(readers):
            bias = None if bias_NO is None else bias_NO.flatten()
            y_BQ = linear(once, _aligned(weight_NOI.flatten(0, 1)), bias, relu)
            found[i] = y_BQ.view(-1, *weight_NOI.shape[:2]).transpose(0, 1)
    return [found[i] for i in range(len(readers))]


def _aligned(x: Tensor) -> Tensor:
    """On a GPU with zeros up to a multiple of 8 columns: cuBLAS is at its fastest where rows begin at multiples of 16 bytes."""
    spare = -x.shape[1] % 8 if x.device.type in _ALIGNING else 0
    return functional.pad(x, (0, spare)) if spare else x


@contextmanager
def apart(what: Literal["blocks", "readers"]) -> Iterator[None]:
    """Within it blocks of maps that are trained for different tasks are products of their own ("blocks"), or every reader of
    the same inputs is ("readers", which holds for blocks, too): for backward passes towards some of them, which would cost that
    of all.
    """
    token = _apart.set(what)
    try:
        yield
    finally:
        _apart.reset(token)


def blocks_are_apart() -> bool:
    """Whether this is within `apart`."""
    return _apart.get() != ""


def _groups(readers: Sequence[Maps]) -> list[list[int]]:
    """Which readers are one product: those that are trained."""
    order = _widest_first(readers)
    if _apart.get() == "readers":
        return [[i] for i in order]
    trained = [i for i in order if readers[i].weight.requires_grad]
    return [each for each in (trained, [i for i in order if i not in trained]) if each]


def _widest_first(readers: Sequence[Maps]) -> list[int]:
    """The order in which they lie side by side: the widest begins where a register does."""
    return sorted(range(len(readers)), key=lambda i: -readers[i].outputs)


def _is_one_product(x: Tensor, readers: Sequence[Maps]) -> bool:
    """On a CPU of a size that pays, in fp32 or bf16; of one reader oneDNN does as well as it is, where there is no gradient."""
    dtype = autocast_type(x)
    of_one_type = all(tensor.dtype == x.dtype for maps in readers for tensor in maps[:2] if tensor is not None)
    if x.device.type != "cpu" or not (of_one_type or torch.is_autocast_enabled("cpu")):
        return False
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and takes_bf16())
    pays = len(readers) > 1 or not _without_gradient(x)
    return known and pays and is_large(*x.shape, sum(maps.outputs for maps in readers))


def _without_gradient(x: Tensor) -> bool:
    """Whether oneDNN computes it, and nobody asks for a gradient."""
    return through_onednn(autocast_type(x)) and reads_gaps(x)


def _side_by_side(x: Tensor, readers: Sequence[Maps]) -> dict[int, Tensor]:
    """{reader: (N, B, O)}, views of one product through oneDNN; without a gradient."""
    order = _widest_first(readers)
    x_BI = x.to(autocast_type(x))
    widths = [readers[i].outputs for i in order]
    weight_QI = _stacked([readers[i].weight.flatten(0, 1) for i in order], [None] * len(order), 0, x_BI.dtype)
    bias_Q = x_BI.new_zeros(len(weight_QI)) if any(maps.bias is not None for maps in readers) else None
    parts = _parts(widths, len(weight_QI))
    for i, place in zip(order, () if bias_Q is None else bias_Q.split(parts), strict=False):
        bias_NO = readers[i].bias
        if bias_NO is not None:
            place.copy_(bias_NO.flatten())
    found: dict[int, Tensor] = {}
    for i, y_BQ in zip(order, product(x_BI, weight_QI, bias_Q).split(parts, dim=1), strict=False):
        found[i] = _by_map(y_BQ.relu_() if readers[i].relu else y_BQ, len(readers[i].weight))
    return found


def _arguments(readers: Sequence[Maps]) -> list[Any]:
    """Of `_FanOut`, after x."""
    biases = [maps.bias for maps in readers]
    return [
        [(len(maps.weight), maps.relu) for maps in readers],
        [bias is not None for bias in biases],
        *(maps.weight.flatten(0, 1) for maps in readers),
        *(bias.flatten() for bias in biases if bias is not None),
    ]


class _FanOut(torch.autograd.Function):
    """The maps of all readers side by side, (B, Q): gradients, laid out map after map, are brought into rows in the pass that the
    ReLU takes.
    """

    @staticmethod
    def forward(
        context: Any, x: Tensor, readers: Sequence[tuple[int, bool]], biased: Sequence[bool], *parameters: Tensor
    ) -> Any:
        """(N, B, O) of each reader, of which the number of maps and whether a ReLU follows are given, the weights (N O, I) of
        all and the biases (N O) of those that have some.
        """
        dtype, inputs = autocast_type(x), x.shape[1]
        weights, rest = parameters[: len(readers)], iter(parameters[len(readers) :])
        biases = [next(rest) if has else None for has in biased]
        widths = [len(weight) for weight in weights]
        spare = _spare(inputs, sum(widths), len(readers) > 1 and any(biased))
        context.readers, context.widths, context.inputs, context.spare = readers, widths, inputs, spare
        context.biased = [i for i, has in enumerate(biased) if has]
        context.reads_leaf = is_input(x)
        if spare or len(readers) > 1:
            weight_QP, bias_Q = _stacked(weights, biases, spare, dtype), None
            x_BP = _widened(x, spare, dtype)
        else:
            weight_QP, bias_Q = weights[0].to(dtype).contiguous(), None if biases[0] is None else biases[0].to(dtype)
            x_BP = x.to(dtype)
            x_BP = x_BP.contiguous() if x.stride(-1) != 1 or through_onednn(dtype) else x_BP
        y_BQ = training_product(x_BP, weight_QP, bias_Q, _padded_rows(x_BP, len(weight_QP)))
        found = []
        for part, (maps, relu) in zip(y_BQ.split(_parts(widths, len(weight_QP)), dim=1), readers, strict=False):
            y = _by_map(part, maps)
            if relu:  # what oneDNN reads next is packed in the same pass
                y = torch.clamp_min(y, 0.0, out=y.new_empty(y.shape) if through_onednn(dtype) else y)
            found.append(y)
        context.save_for_backward(x_BP, weight_QP, *(y for y, (_, relu) in zip(found, readers, strict=True) if relu))
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(context: Any, *dy: Tensor) -> Any:
        """The gradients of x, of the weights, and of the biases."""
        x_BP, weight_QP, *rectified = context.saved_tensors
        widths, inputs, outputs = context.widths, context.inputs, len(weight_QP)
        rows = _padded_rows(x_BP, outputs)
        dz_BQ = x_BP.new_empty(len(x_BP), outputs) if rows is None else rows
        for (maps, relu), dy_NBO, dz in zip(context.readers, dy, dz_BQ.split(_parts(widths, outputs), 1), strict=False):
            if relu:
                torch.ops.aten.threshold_backward.grad_input(dy_NBO, rectified.pop(0), 0, grad_input=_by_map(dz, maps))
            else:
                _by_map(dz, maps).copy_(dy_NBO)
        dz_BQ[:, sum(widths) :] = 0.0  # last, where the rows are in the cache: before them it took 3 ms of 112
        to_x, _, _, *to_each = wanted_gradients(context)
        to_parameters, bias_apart = any(to_each), len(context.biased) > 0 and not context.spare
        dx, dweight, dbias = gradients((to_x, to_parameters, to_parameters and bias_apart), dz_BQ, x_BP, weight_QP)
        dweights: Sequence[Tensor | None] = [None] * len(widths)
        dbiases: Sequence[Tensor | None] = [None] * len(context.biased)
        if dweight is not None:
            each = dweight.split(_parts(widths, outputs))[: len(widths)]
            dweights = [gradient[:, :inputs] for gradient in each]
            dbiases = [each[i][:, inputs] if dbias is None else dbias for i in context.biased]
        return None if dx is None else dx[:, :inputs], None, None, *dweights, *dbiases


def _spare(inputs: int, outputs: int, bias: bool) -> int:
    """By how many columns inputs are widened: for the bias by some in any case."""
    return (-inputs % _LANES if outputs >= _LEAST_WIDENED else 0) or (_LANES if bias else 0)


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


def _stacked(weights: Sequence[Tensor], biases: Sequence[Tensor | None], spare: int, dtype: torch.dtype) -> Tensor:
    """(Q, P): all weights with so many more inputs, the first of them the biases, the others 0; and with outputs that are 0, up
    to a multiple of a register's.
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


def _padded_rows(x: Tensor, width: int) -> Tensor | None:
    """Where MKL writes a product of that width, None where it may do so anywhere."""
    if through_onednn(x.dtype) or width % _ALIASED:
        return None
    return x.new_empty(len(x), width + _LANES)[:, :width]
