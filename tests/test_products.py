"""Matrix products, through oneDNN and through MKL, against plain torch in double precision: values and gradients."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtrec.architectures import products
from mtrec.architectures.products import fan_out, linear, linears

needs_onednn = pytest.mark.skipif(products._LINEAR is None, reason="this torch has no oneDNN operator")


@pytest.fixture(params=[pytest.param(True, id="onednn", marks=needs_onednn), pytest.param(False, id="torch")])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """fp32 products go through oneDNN, or as torch sends them, whatever this processor is."""
    monkeypatch.setattr(products, "_FP32", request.param)
    return bool(request.param)


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
    library: bool, relu: bool, biased: bool, maps: int | None, rows: int, inputs: int, outputs: int
) -> None:
    many = () if maps is None else (maps,)
    x, weight = drawn(*many, rows, inputs), drawn(*many, outputs, inputs)
    bias = drawn(*many, outputs) if biased else None
    found = gradients_of(x, weight, bias, relu=relu, plain=False)
    exact = gradients_of(x.double(), weight.double(), None if bias is None else bias.double(), relu=relu, plain=True)
    assert len(found) == len(exact)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [300, 1, 0])
def test_maps_of_the_same_inputs_are_those_maps_one_by_one(library: bool, relu: bool, biased: bool, rows: int) -> None:
    x, weight, bias = drawn(rows, 45), drawn(3, 64, 45), drawn(3, 64) if biased else None
    leaves = [each.clone().requires_grad_() for each in (x, weight, bias) if each is not None]
    y = fan_out(*(leaves if biased else [*leaves, None]), relu)
    mask = drawn(3, rows, 64)
    (y * mask).sum().backward()
    same = x.double().expand(3, -1, -1).clone().requires_grad_()
    exact = [each.double().requires_grad_() for each in (weight, bias) if each is not None]
    z = same @ exact[0].transpose(1, 2) + (exact[1].unsqueeze(1) if biased else 0.0)
    z = z.relu() if relu else z
    (z * mask.double()).sum().backward()
    assert y.shape == (3, rows, 64)
    torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=2e-4)
    for leaf, gradient in zip(leaves, [same.grad.sum(0), *(each.grad for each in exact)], strict=True):  # type: ignore[union-attr]
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-5, atol=2e-4)  # type: ignore[union-attr]


def test_fp32_on_a_cpu_is_computed_here_also_for_inputs_with_gaps(library: bool) -> None:
    weight, wide = drawn(64, 45), drawn(300, 90)
    assert linear(wide[:, :45].requires_grad_(), weight).grad_fn.name() == "_LinearBackward"  # type: ignore[union-attr]
    torch.testing.assert_close(linear(wide[:, :45], weight), functional.linear(wide[:, :45], weight))
    assert not products._takes(wide.bfloat16(), weight.bfloat16())
    assert not products._takes(wide.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(wide[:, :45], weight).dtype == torch.bfloat16


@pytest.mark.parametrize("graded", [False, True])
def test_a_nan_stays_one_through_a_relu(library: bool, graded: bool) -> None:
    weight = drawn(64, 45)
    weight[3, 4] = torch.nan
    with torch.set_grad_enabled(graded):
        found = linear(drawn(300, 45), weight, relu=True)
    assert bool(found[:, 3].isnan().all())
    assert not bool(found[:, :3].isnan().any())


@pytest.mark.parametrize("several", [False, True])
def test_a_pass_towards_inputs_computes_no_gradient_of_weights(several: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_FP32", False)
    x, weight = drawn(300, 45).requires_grad_(), drawn(64, 45).requires_grad_()
    if several:
        with torch.no_grad():
            products_of_maps = fan_out(x, weight.view(4, 16, 45))
        monkeypatch.setattr(products, "_takes", lambda x, weight: True)
        y = fan_out(x, weight.view(4, 16, 45))
        assert torch.equal(y, products_of_maps)
        assert y.grad_fn is not None
        assert "FanOut" in type(y.grad_fn).__name__
        y = y.sum()
    else:
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


@pytest.mark.parametrize(
    ("processor", "setting", "through_onednn"),
    [("AuthenticAMD", None, True), ("GenuineIntel", None, False), ("GenuineIntel", "1", True), ("AuthenticAMD", "0", False)],
)
@needs_onednn
def test_the_processor_decides_unless_the_environment_does(processor: str, setting: str | None, through_onednn: bool) -> None:
    code = (
        "import torch, pathlib; real = pathlib.Path.read_text\n"
        f"cpu = lambda path, *a, **k: 'vendor_id : {processor}' if str(path) == '/proc/cpuinfo' else real(path, *a, **k)\n"
        "torch.backends.mkl.is_available = lambda: True; pathlib.Path.read_text = cpu\n"
        "from mtrec.architectures import products; print(products._FP32)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "MTREC_ONEDNN"}
    environment |= {} if setting is None else {"MTREC_ONEDNN": setting}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == str(through_onednn)


@pytest.mark.parametrize(
    ("flags", "emulated"),
    [
        ("flags : fpu avx512f avx512_vnni", True),
        ("flags : fpu avx512f avx512_bf16", False),
        ("flags : amx_bf16 amx_tile", False),
        ("Features : fp asimd bf16", False),
        ("Features : fp asimd", True),
        ("unheard of", False),
    ],
)
def test_a_cpu_without_instructions_for_bf16_is_told_by_its_flags(
    flags: str, emulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products.Path, "read_text", lambda path: f"processor : 0\n{flags}\n")
    assert products.emulates_bf16() is emulated
