"""The blocks of all architectures: many small perceptrons that run as one, gates, and the mixture.

Letters in shapes: B rows on this rank, D shared width, N maps that run as one, E experts, H expert width, G gates (or
groups of maps).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from mtrec.architectures.fan_out import Maps, fan_out
from mtrec.architectures.products import linears, reads_gaps
from mtrec.dropout import Dropout, keep_mask

LEAST_COLUMNS = 8  # of a softmax, for which torch's way over rows is the faster one


def packed(x: Tensor) -> Tensor:
    """`x`, contiguous where a batched product would copy it anyway.

    On the CPU, oneDNN's bf16 products copy an operand with gaps between its rows at each use, forward and backward
    (an MMoE of 4 x [256, 128] took 1.7 times as long, measured); fp32 products (`products.linears`, which copies once, or
    not at all) and CUDA's take it as it is.
    """
    return x.contiguous() if x.device.type == "cpu" and x.dtype != torch.float32 else x


class BatchedLinear(nn.Module):
    """N linear maps of one size that run as one matrix product; `weight[n]`, `bias[n]` are those of an `nn.Linear`.

    Each map is initialised as `nn.Linear` would be, that is by its own fan-in `input_dim` (an initialiser that is
    given the whole [N, out, in] tensor takes another fan-in).

    >>> BatchedLinear(4, 8, 16)(torch.ones(5, 8)).shape
    torch.Size([4, 5, 16])
    """

    def __init__(self, num_maps: int, input_dim: int, output_dim: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_maps, output_dim, input_dim))
        self.bias = nn.Parameter(torch.empty(num_maps, output_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all numbers from U(-1 / sqrt(input_dim), 1 / sqrt(input_dim)), as `nn.Linear` does."""
        bound = self.weight.shape[2] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in), read by every map, or (G, B, in), where N / G consecutive maps read x[g], -> (N, B, out), which is not to be
        changed in place.
        """
        return _mapped(x, Maps(self.weight, self.bias))

    def flops_per_row(self) -> int:
        """2 x the number of weights."""
        return 2 * self.weight.numel()


def _mapped(x: Tensor, maps: Maps, *, by_row: bool = False) -> Tensor:
    """As `BatchedLinear.forward`, with the ReLU that may follow in the same pass; `by_row` as for `linears`."""
    num_maps, output_dim, _ = maps.weight.shape
    if x.dim() == 2 or x.shape[0] == 1:  # one product with all maps side by side
        return _fanned_out(x, [maps])[0]
    groups = x.shape[0]
    weight = maps.weight.view(groups, num_maps // groups * output_dim, -1)
    bias = None if maps.bias is None else maps.bias.view(groups, -1)
    grouped = linears(x, weight, bias, maps.relu, by_row=by_row and groups == num_maps)
    if groups == num_maps:
        return grouped
    several = grouped.view(groups, -1, num_maps // groups, output_dim).transpose(1, 2)
    return several.reshape(num_maps, x.shape[1], output_dim)  # a copy: no single stride leads from map to map


def _fanned_out(x: Tensor, readers: Sequence[Maps]) -> list[Tensor]:
    """(N, B, out) of each of the readers of x, (B, in) or (1, B, in)."""
    x_BI = x if x.dim() == 2 else x.squeeze(0)
    by_map = fan_out(x_BI, *readers)
    return by_map if reads_gaps(x_BI) else [packed(each) for each in by_map]


class BatchedLayerNorm(nn.Module):
    """Scale and shift, of its own for each n, of a layer norm (Ba et al., 2016) over the last dimension of (N, B, H)."""

    def __init__(self, num_maps: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_maps, 1, dim))
        self.bias = nn.Parameter(torch.empty(num_maps, 1, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class BatchedMLP(nn.Module):
    """N perceptrons of the same widths that run as one. Each layer: linear, layer norm (option), ReLU, dropout.

    Its layers hold parameters and are not called as modules (see `Abreast`): hooks on them are not run.

    >>> BatchedMLP(4, 8, (16, 3))(torch.ones(5, 8)).shape
    torch.Size([4, 5, 3])
    """

    def __init__(
        self, num_maps: int, input_dim: int, layers: Sequence[int], dropout: float = 0.0, layer_norm: bool = False
    ) -> None:
        super().__init__()
        widths = [input_dim, *layers]
        self.linears = nn.ModuleList([BatchedLinear(num_maps, i, o) for i, o in pairwise(widths)])
        self.norms = nn.ModuleList([BatchedLayerNorm(num_maps, o) for o in layers] if layer_norm else [])
        self.dropout = Dropout(dropout)
        self._flops = 2 * num_maps * sum(i * o for i, o in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in), or (G, B, in) where N / G consecutive perceptrons read x[g], -> (N, B, out)."""
        return Abreast(self)(x) if self.linears else x

    def flops_per_row(self) -> int:
        """Of the linear maps alone."""
        return self._flops


class Abreast:
    """The perceptrons of several blocks as if they were one block's: one product a layer. For one forward pass.

    >>> Abreast(BatchedMLP(3, 8, (16, 2)), BatchedMLP(1, 8, (16, 2)))(torch.ones(5, 8)).shape
    torch.Size([4, 5, 2])

    Args:
        blocks: of the same widths and options, with one layer or more.
        mixed: they are experts, which `mix` reads row by row.
    """

    def __init__(self, *blocks: BatchedMLP, mixed: bool = False) -> None:
        self._mixed = mixed
        self._dropout = blocks[0].dropout
        self._norms = [_joined(norms) for norms in zip(*(block.norms for block in blocks), strict=True)]
        self._linears = [_joined(linears) for linears in zip(*(block.linears for block in blocks), strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        """(B, in), or (G, B, in) where N / G consecutive perceptrons read x[g], -> (N, B, out); N of all blocks."""
        return self.rest(_mapped(x, self.first))

    @property
    def first(self) -> Maps:
        """The first layer's linear maps, with the ReLU where it follows at once."""
        return Maps(*self._linears[0], relu=not self._norms)

    def rest(self, x_NBH: Tensor) -> Tensor:
        """What follows after `first`."""
        for i, (weight, bias) in enumerate(self._linears):
            if i > 0:
                by_row = self._mixed and i == len(self._linears) - 1 and not self._norms  # a norm would copy it
                x_NBH = _mapped(x_NBH, Maps(weight, bias, relu=not self._norms), by_row=by_row)
            if self._norms:
                scale_N1H, shift_N1H = self._norms[i]
                x_NBH = functional.relu(functional.layer_norm(x_NBH, x_NBH.shape[-1:]) * scale_N1H + shift_N1H)
            x_NBH = self._dropout(x_NBH, row_dim=1)
        return x_NBH


def _joined(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weights and biases of layers of several blocks, one after the other."""
    weights: list[Tensor] = [layer.get_parameter("weight") for layer in layers]
    biases: list[Tensor] = [layer.get_parameter("bias") for layer in layers]
    return (weights[0], biases[0]) if len(layers) == 1 else (torch.cat(weights), torch.cat(biases))


class Gates(nn.Module):
    """G gates: softmax(W_g x), without bias, over the experts that each sees.

    Gate dropout (Zhao et al., "Recommending What Video to Watch Next", 2019) leaves each expert out of a row's mixture
    with probability `gate_dropout` and lets the weights of the others sum to 1, while training. A row that would lose
    all its experts keeps them all.

    >>> Gates(3, 8, 4)(torch.ones(5, 8)).sum(2).shape
    torch.Size([3, 5])
    """

    def __init__(self, num_gates: int, input_dim: int, num_experts: int, gate_dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = BatchedLinear(num_gates, input_dim, num_experts, bias=False)
        self.gate_dropout = gate_dropout

    def forward(self, x: Tensor) -> Tensor:
        """(B, in) or (G, B, in) -> (G, B, E), in fp32 also under autocast."""
        return self.rest(self.linear(x))

    @property
    def first(self) -> Maps:
        """The linear maps; no ReLU follows."""
        return Maps(self.linear.weight)

    def rest(self, logits_GBE: Tensor) -> Tensor:
        """The weights, (G, B, E) in fp32, of logits."""
        logits_GBE = logits_GBE.float()
        if self.training and self.gate_dropout > 0.0:
            keep_GBE = keep_mask(logits_GBE.shape, 1.0 - self.gate_dropout, row_dim=1, device=logits_GBE.device)
            if keep_GBE is not None:
                none_left_GB1 = ~keep_GBE.any(2, keepdim=True)
                logits_GBE = logits_GBE.masked_fill(~(keep_GBE | none_left_GB1), -torch.inf)
        return _softmax(logits_GBE)

    def flops_per_row(self) -> int:
        """Of the logits."""
        return self.linear.flops_per_row()


def _softmax(x_GBE: Tensor) -> Tensor:
    """Over the last dimension. On a CPU torch takes row after row, a register at a time: few columns fill none. Over the
    transpose the last bits of a row's weights depend on its place in the batch.
    """
    if x_GBE.device.type != "cpu" or x_GBE.shape[2] >= LEAST_COLUMNS:
        return x_GBE.softmax(2)
    x_GEB = x_GBE.contiguous().transpose(1, 2).contiguous()  # in two steps: the second then reads what lies together
    return x_GEB.softmax(1).transpose(1, 2).contiguous()


def together(x: Tensor, *blocks: Abreast | Gates) -> list[Tensor]:
    """What each block makes of the same inputs, (B, in) or (1, B, in); their first linear maps are one product where that pays.

    Blocks and their maps are not called as modules: hooks on them are not run.

    >>> [tuple(y.shape) for y in together(torch.ones(5, 8), Gates(3, 8, 4), Abreast(BatchedMLP(4, 8, (16, 2))))]
    [(3, 5, 4), (4, 5, 2)]
    """
    firsts = _fanned_out(x, [block.first for block in blocks])
    return [block.rest(first) for block, first in zip(blocks, firsts, strict=True)]


def mix(gates_GBE: Tensor, *experts_EBH: Tensor) -> Tensor:
    """Sums of experts weighted by gates -> (B, G, H); the gates' E are those of all tensors of experts, one after the other.

    One small product a row: on a CPU core 5 to 7 times as fast as multiply-and-sum, and nothing of size G x E x B x H. Several
    tensors of experts are put together first: a product for each took up to twice the time (one of a single expert most).

    >>> mix(torch.full((3, 5, 2), 0.5), torch.ones(1, 5, 4), torch.ones(1, 5, 4)).shape
    torch.Size([5, 3, 4])
    """
    rows_BEH = [experts.transpose(0, 1) for experts in experts_EBH]
    experts_BEH = packed(rows_BEH[0]) if len(rows_BEH) == 1 else torch.cat(rows_BEH, dim=1)
    return torch.bmm(packed(gates_GBE.to(experts_BEH.dtype).transpose(0, 1)), experts_BEH)


def checked_names(tasks: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple; ValueError where there is none, or one twice.

    >>> checked_names(["click", "dwell"])
    ('click', 'dwell')
    """
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"`tasks` should hold at least one name and none twice. Found {list(tasks)}.")
    return tuple(tasks)
