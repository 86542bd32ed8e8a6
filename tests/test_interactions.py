"""Interaction blocks against torchrec's cross networks, which are the paper's equations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet

from mtrec.interactions import DCNV2, INTERACTIONS
from mtrec.kinds import check_options


def plain(block: DCNV2, dim: int, rank: int | None) -> torch.nn.Module:
    """torchrec's network with the weights of `block`."""
    layers = len(block.up)
    net = CrossNet(dim, layers) if rank is None else LowRankCrossNet(dim, layers, rank)
    with torch.no_grad():
        for i in range(layers):
            if rank is None:
                net.kernels[i].copy_(block.up[i].weight)
                net.bias[i].copy_(block.up[i].bias.view_as(net.bias[i]))
            else:
                net.V_kernels[i].copy_(block.down[i].weight)
                net.W_kernels[i].copy_(block.up[i].weight)
                net.bias[i].copy_(block.up[i].bias)
    return net


@pytest.mark.parametrize("rank", [None, 1, 5])
@pytest.mark.parametrize("layers", [1, 3])
def test_outputs_and_gradients_are_torchrecs(rank, layers):
    torch.manual_seed(0)
    block = DCNV2(12, layers=layers, rank=rank)
    net = plain(block, 12, rank)
    ours, theirs = (torch.randn(9, 12, generator=torch.manual_seed(1)).requires_grad_() for _ in range(2))
    weight = torch.randn(9, 12)
    y = block(ours)
    expected = net(theirs)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    for i, up in enumerate(block.up):
        torch.testing.assert_close(
            up.weight.grad, (net.kernels if rank is None else net.W_kernels)[i].grad, rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(up.bias.grad, net.bias[i].grad.view(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", INTERACTIONS)
def test_every_kind(kind):
    block = INTERACTIONS[kind](24, **check_options(INTERACTIONS[kind], {}, "model.interaction"))
    x = torch.randn(6, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = block(x)
    assert y.shape == (6, block.output_dim)
    assert counter.get_total_flops() == 6 * block.flops_per_row()
    order = torch.randperm(6)
    torch.testing.assert_close(block(x[order]), y[order])

    with torch.autocast("cpu", torch.bfloat16):
        low = block(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, y, rtol=0.05, atol=0.05)
    low.sum().backward()
    assert x.grad.isfinite().all()

    empty = torch.empty(0, 24, requires_grad=True)
    block(empty).sum().backward()
    assert empty.grad.shape == (0, 24)
    with torch.device("meta"):
        assert INTERACTIONS[kind](24)(torch.empty(3, 24)).device.type == "meta"


def test_full_rank_costs_what_a_square_matrix_costs():
    block = DCNV2(24, rank=None)
    with FlopCounterMode(display=False) as counter:
        block(torch.ones(5, 24))
    assert counter.get_total_flops() == 5 * block.flops_per_row() == 5 * 2 * 2 * 24 * 24


def test_options_are_checked():
    assert check_options(DCNV2, {}, "model.interaction") == {"layers": 2, "rank": 64}
    with pytest.raises(ValueError, match=r"`model\.interaction\.rank` should be greater than or equal to 1"):
        check_options(DCNV2, {"rank": 0}, "model.interaction")
