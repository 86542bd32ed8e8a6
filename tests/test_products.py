"""Matrix products through oneDNN against plain torch in double precision: values and gradients."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtrec.architectures import products
from mtrec.architectures.products import linear, linears

needs_onednn = pytest.mark.skipif(products._LINEAR is None, reason="this torch has no oneDNN operator")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gradients_of(x: Tensor, weight: Tensor, bias: Tensor | None, *, relu: bool, plain: bool) -> list[Tensor]:
    """The result, and the gradients of its weighted sum with respect to what is given."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    bias = None if bias is None else bias.clone().requires_grad_()
    leaves = [x, weight] if bias is None else [x, weight, bias]
    if plain:
        y = x @ weight.transpose(-1, -2)
        y = y if bias is None else y + bias.unsqueeze(-2)
        y = y.relu() if relu else y
    else:
        y = (linear if x.dim() == 2 else linears)(x, weight, bias, relu)
    (y * drawn(*y.shape, dtype=y.dtype)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("maps", [None, 3])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(300, 45, 64), (64, 448, 16), (1, 45, 64), (0, 45, 64), (300, 3, 2)])
def test_a_product_and_its_gradients_are_those_of_double_precision(
    relu: bool, biased: bool, maps: int | None, rows: int, inputs: int, outputs: int
) -> None:
    many = () if maps is None else (maps,)
    x, weight = drawn(*many, rows, inputs), drawn(*many, outputs, inputs)
    bias = drawn(*many, outputs) if biased else None
    found = gradients_of(x, weight, bias, relu=relu, plain=False)
    exact = gradients_of(x.double(), weight.double(), None if bias is None else bias.double(), relu=relu, plain=True)
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-4)


@needs_onednn
def test_fp32_on_a_cpu_goes_through_onednn_also_for_inputs_with_gaps() -> None:
    weight, wide = drawn(64, 45), drawn(300, 90)
    assert linear(wide[:, :45].requires_grad_(), weight).grad_fn.name() == "_LinearBackward"  # type: ignore[union-attr]
    torch.testing.assert_close(linear(wide[:, :45], weight), functional.linear(wide[:, :45], weight))
    assert not products._takes(wide.bfloat16(), weight.bfloat16())
    assert not products._takes(wide.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(wide[:, :45], weight).dtype == torch.bfloat16


@needs_onednn
@pytest.mark.parametrize("graded", [False, True])
def test_a_nan_stays_one_through_a_relu(graded: bool) -> None:
    weight = drawn(64, 45)
    weight[3, 4] = torch.nan
    with torch.set_grad_enabled(graded):
        found = linear(drawn(300, 45), weight, relu=True)
    assert bool(found[:, 3].isnan().all())
    assert not bool(found[:, :3].isnan().any())


@needs_onednn
def test_a_pass_towards_inputs_computes_no_gradient_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = drawn(300, 45).requires_grad_(), drawn(64, 45).requires_grad_()
    y = linear(x, weight).sum()
    (exact,) = torch.autograd.grad(y, x, retain_graph=True)
    shapes: list[tuple[int, ...]] = []
    real = products._product

    def counted(*arguments: Any) -> Tensor:
        shapes.append(tuple(arguments[0].shape))
        return real(*arguments)

    monkeypatch.setattr(products, "_product", counted)
    with products.towards_inputs():
        (found,) = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(found, exact)
    assert shapes == [(300, 64)]
    torch.autograd.grad(y, weight)
    assert (64, 300) in shapes


def test_it_can_be_switched_off() -> None:
    code = "from mtrec.architectures import products; print(products._LINEAR)"
    environment = {**os.environ, "MTREC_ONEDNN": "0"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "None"
