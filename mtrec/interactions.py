"""Interaction blocks between the shared representation and the architecture: x_BD -> x_BD.

Each is a kind (`model.interaction` in the YAML): `(input_dim, *, options)`, with the attribute `output_dim` and the
method `flops_per_row()`.

Letters in shapes: B rows on this rank, D shared width, R rank.
"""

import torch
from torch import Tensor, nn

from mtrec.kinds import Kinds, PositiveInt


class NoInteraction(nn.Module):
    """Hands x_BD on as it is.

    >>> NoInteraction(3)(torch.ones(1, 3))
    tensor([[1., 1., 1.]])
    """

    def __init__(self, input_dim: int) -> None:
        super().__init__()
        self.output_dim = input_dim

    def forward(self, x_BD: Tensor) -> Tensor:
        """The same tensor."""
        return x_BD

    def flops_per_row(self) -> int:
        """0."""
        return 0


class DCNV2(nn.Module):
    """Cross layers x_{l+1} = x_0 * (U_l V_l x_l + b_l) + x_l: products of up to `layers` + 1 features.

    Source: Wang et al., "DCN V2: Improved Deep & Cross Network" (2021), the low-rank form (their equation 4), without
    the mixture of several low-rank experts and without a non-linearity in the low-rank space. Deviation: U, V and b are
    initialised as `nn.Linear` would (the paper's code: truncated normal and zeros).

    Args:
        input_dim: D.
        layers: number of cross layers.
        rank: R, the width of the low-rank space; null: full D x D matrices. The low-rank form costs less while
            R < D / 2.

    >>> block = DCNV2(8, layers=2, rank=4)
    >>> block(torch.ones(5, 8)).shape, block.output_dim, block.flops_per_row()
    (torch.Size([5, 8]), 8, 256)
    """

    def __init__(self, input_dim: int, *, layers: PositiveInt = 2, rank: PositiveInt | None = 64) -> None:
        super().__init__()
        self.output_dim = input_dim
        self.down = nn.ModuleList(
            [nn.Identity() if rank is None else nn.Linear(input_dim, rank, bias=False) for _ in range(layers)]
        )
        self.up = nn.ModuleList([nn.Linear(rank or input_dim, input_dim) for _ in range(layers)])
        self._flops = layers * 2 * (input_dim * input_dim if rank is None else 2 * input_dim * rank)

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, D) -> (B, D), in the type of x_BD also under autocast: only the matrix products run in bf16."""
        crossed_BD = x_BD
        for down, up in zip(self.down, self.up, strict=True):
            crossed_BD = torch.addcmul(crossed_BD, x_BD, up(down(crossed_BD)).to(x_BD.dtype))
        return crossed_BD

    def flops_per_row(self) -> int:
        """Floating-point operations of the forward's matrix products for one row (a multiply-add is two)."""
        return self._flops


INTERACTIONS = Kinds({"dcn_v2": DCNV2, "none": NoInteraction}, ("forward", "flops_per_row"))
