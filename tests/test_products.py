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
from mtrec.architectures.products import Maps, fan_out, linear, linears

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


# (maps, outputs of each, biased, ReLU) of each reader
ONE, GATES, WIDE = (3, 64, True, True), (3, 4, False, False), (4, 128, True, False)
READERS = {
    "one": [ONE],
    "plain": [(3, 64, False, False)],
    "gates": [(3, 4, True, True)],
    "aliased": [(4, 128, True, True)],
    "several": [GATES, ONE, WIDE],
    "unbiased": [GATES, (2, 32, False, True)],
    "small": [GATES, (1, 8, True, True)],
}


@pytest.mark.parametrize("rows", [300, 1, 0])
@pytest.mark.parametrize("inputs", [45, 47, 48])
@pytest.mark.parametrize("readers", READERS)
def test_maps_of_the_same_inputs_are_those_maps_one_by_one(library: bool, readers: str, inputs: int, rows: int) -> None:
    x, mine, exact = drawn(rows, inputs).requires_grad_(), [], []
    same = x.detach().double().requires_grad_()
    expected = []
    for maps, outputs, biased, relu in READERS[readers]:
        weight, bias = drawn(maps, outputs, inputs).requires_grad_(), drawn(maps, outputs).requires_grad_() if biased else None
        mine.append(Maps(weight, bias, relu))
        weight, bias = (None if each is None else each.detach().double().requires_grad_() for each in (weight, bias))
        exact.append(Maps(weight, bias, relu))
        z = same @ weight.transpose(1, 2)
        z = z if bias is None else z + bias.unsqueeze(1)
        expected.append(z.relu() if relu else z)
    found = fan_out(x, *mine)
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape
        torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=2e-4)
    sum((y * drawn(*y.shape)).sum() for y in found).backward()  # type: ignore[union-attr]
    sum((z * drawn(*z.shape).double()).sum() for z in expected).backward()  # type: ignore[union-attr]
    leaves = [(x, same)] + [pair for one, other in zip(mine, exact, strict=True) for pair in zip(one[:2], other[:2], strict=True)]
    for leaf, other in leaves:
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=2e-4)  # type: ignore[union-attr]


@pytest.mark.parametrize("readers", ["aliased", "several"])
def test_products_are_of_whole_registers_and_rows_no_page_apart(readers: str, library: bool) -> None:
    maps = [
        Maps(drawn(n, outputs, 45).requires_grad_(), drawn(n, outputs) if biased else None, relu)
        for n, outputs, biased, relu in READERS[readers]
    ]
    y = fan_out(drawn(300, 45), *maps)[-1]
    wide, weights = y.grad_fn.saved_tensors[:2]  # type: ignore[union-attr]
    assert wide.shape == (300, 48)
    assert weights.shape == {"aliased": (512, 48), "several": (12 + 192 + 512 + 4, 48)}[readers]
    if readers == "aliased":
        assert y.stride() == ((300 * 128, 128, 1) if library else (128, 512 + 16, 1))


@pytest.mark.skipif(not products._BF16, reason="oneDNN has no bf16 on this CPU")
@pytest.mark.parametrize("readers", READERS)
def test_bf16_is_as_near_to_the_truth_as_autocast_map_by_map(readers: str) -> None:
    results: list[list[Tensor]] = []
    for way in ("exact", "autocast", "fan_out"):
        dtype = torch.float64 if way == "exact" else torch.float32
        x = drawn(600, 45, dtype=dtype).requires_grad_()
        leaves, ys, maps = [x], [], []
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            for n, outputs, biased, relu in READERS[readers]:
                weight = drawn(n, outputs, 45, dtype=dtype).requires_grad_()
                bias = drawn(n, outputs, dtype=dtype).requires_grad_() if biased else None
                leaves += [weight] if bias is None else [weight, bias]
                maps.append(Maps(weight, bias, relu))
                z = torch.stack([functional.linear(x, w, None if bias is None else bias[i]) for i, w in enumerate(weight)])
                ys.append(z.relu() if relu else z)
            if way == "fan_out":
                ys = fan_out(x, *maps)
                assert all("FanOut" in type(y.grad_fn).__name__ and y.dtype == torch.bfloat16 for y in ys)
        sum((y.to(dtype) * drawn(*y.shape, dtype=dtype)).sum() for y in ys).backward()  # type: ignore[union-attr]
        assert all(leaf.grad is not None and leaf.grad.dtype == dtype for leaf in leaves)
        results.append([each.double() for each in [*(y.detach() for y in ys), *(leaf.grad for leaf in leaves)]])  # type: ignore[union-attr]
    for exact, autocast, found in zip(*results, strict=True):
        assert (found - exact).norm() <= 1.2 * (autocast - exact).norm() < 0.1 * exact.norm()


def test_some_gradients_alone(library: bool) -> None:
    x, frozen, weight, bias = drawn(300, 45), drawn(3, 64, 45), drawn(3, 64, 45), drawn(3, 64)
    for wanted in ([x], [weight], [bias]):
        for leaf in wanted:
            leaf.requires_grad_()
        one, other = fan_out(x, Maps(frozen, None, True), Maps(weight, bias))
        (found,) = torch.autograd.grad(one.sum() + other.sum(), wanted)
        below = functional.linear(x, frozen.flatten(0, 1)).relu().sum() + functional.linear(x, weight.flatten(0, 1)).sum()
        exact = torch.full((3, 64), 300.0) if wanted[0] is bias else torch.autograd.grad(below, wanted)[0]
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
        for leaf in wanted:
            leaf.requires_grad_(False)


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
            (products_of_maps,) = fan_out(x, Maps(weight.view(4, 16, 45)))
        monkeypatch.setattr(products, "_takes", lambda x, weight: True)
        (y,) = fan_out(x, Maps(weight.view(4, 16, 45)))
        torch.testing.assert_close(y, products_of_maps)
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
