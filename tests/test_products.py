"""Matrix products, through oneDNN and through MKL, against plain torch in double precision: values and gradients."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from mtrec.architectures import ARCHITECTURES, products
from mtrec.architectures import fan_out as fan_out_module
from mtrec.architectures.experts import Abreast, BatchedLinear, BatchedMLP, mix
from mtrec.architectures.fan_out import Maps, apart, fan_out
from mtrec.architectures.products import backward_to, linear, linears

needs_onednn = pytest.mark.skipif(products._LINEAR is None, reason="this torch has no oneDNN operator")


@pytest.fixture(params=[pytest.param(True, id="onednn", marks=needs_onednn), pytest.param(False, id="torch")])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """fp32 products go through oneDNN, or as torch sends them, whatever this processor is."""
    monkeypatch.setattr(products, "_FP32", request.param)
    return bool(request.param)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
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
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(300, 45, 64), (64, 448, 16), (1, 45, 64), (0, 45, 64), (300, 3, 2), (3_000, 45, 2)]
)
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


@pytest.mark.parametrize(("rows", "inputs", "outputs", "own"), [(3_000, 45, 2, True), (300, 3, 2, False), (3_000, 45, 64, True)])
def test_thin_maps_of_inputs_of_their_own_are_products_of_ours(rows: int, inputs: int, outputs: int, own: bool) -> None:
    x, weight = drawn(3, rows, inputs).requires_grad_(), drawn(3, outputs, inputs).requires_grad_()
    assert (type(linears(x, weight).grad_fn).__name__ == "_LinearBackward") == own
    assert type(linear(x[0], weight[0]).grad_fn).__name__ == ("_LinearBackward" if outputs == 64 else "MmBackward0")


# (maps, outputs of each, biased, ReLU) of each reader
ONE, GATES, WIDE = (3, 64, True, True), (3, 4, False, False), (4, 128, True, False)
READERS = {
    "one": [ONE],
    "plain": [(3, 64, False, False)],
    "gates": [(3, 4, True, True)],
    "aliased": [(4, 128, True, True)],
    "several": [GATES, ONE, WIDE],
    "alike": [ONE, ONE],
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
    for seed, (maps, outputs, biased, relu) in enumerate(READERS[readers]):
        weight = drawn(maps, outputs, inputs, seed=seed).requires_grad_()
        bias = drawn(maps, outputs, seed=seed).requires_grad_() if biased else None
        mine.append(Maps(weight, bias, relu))
        weight, bias = (None if each is None else each.detach().double().requires_grad_() for each in (weight, bias))
        exact.append(Maps(weight, bias, relu))
        z = same @ weight.transpose(1, 2)
        z = z if bias is None else z + bias.unsqueeze(1)
        expected.append(z.relu() if relu else z)
    found = fan_out(x, *mine)
    with torch.no_grad():
        for y, again in zip(found, fan_out(x, *mine), strict=True):
            torch.testing.assert_close(y, again, rtol=1e-5, atol=1e-4)
    for y, z in zip(found, expected, strict=True):
        assert y.shape == z.shape
        torch.testing.assert_close(y.double(), z, rtol=1e-5, atol=2e-4)
    sum((y * drawn(*y.shape)).sum() for y in found).backward()  # type: ignore[union-attr]
    sum((z * drawn(*z.shape).double()).sum() for z in expected).backward()  # type: ignore[union-attr]
    leaves = [(x, same)] + [pair for one, other in zip(mine, exact, strict=True) for pair in zip(one[:2], other[:2], strict=True)]
    for leaf, other in leaves:
        if leaf is not None:
            torch.testing.assert_close(leaf.grad.double(), other.grad, rtol=1e-5, atol=2e-4)  # type: ignore[union-attr]


@pytest.mark.skipif(not products.takes_bf16(), reason="oneDNN computes no bf16 on this CPU")
@pytest.mark.parametrize(("readers", "shapes"), [("several", [(12 + 192 + 512 + 4, 45)]), ("aliased", [])])
def test_without_a_gradient_several_readers_are_one_product_in_bf16_too(
    monkeypatch: pytest.MonkeyPatch, readers: str, shapes: list[tuple[int, int]]
) -> None:
    maps = [
        Maps(drawn(n, outputs, 45, seed=seed), drawn(n, outputs, seed=seed) if biased else None, relu)
        for seed, (n, outputs, biased, relu) in enumerate(READERS[readers])
    ]
    made, real = [], fan_out_module.product

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append(tuple(weight.shape))
        return real(x, weight, bias)

    monkeypatch.setattr(fan_out_module, "product", noted)
    x = drawn(300, 45)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = fan_out(x, *maps)
    assert made == shapes
    for y, (weight, bias, relu) in zip(found, maps, strict=True):
        z = x.bfloat16().double() @ weight.bfloat16().double().transpose(1, 2)
        z = z if bias is None else z + bias.bfloat16().double().unsqueeze(1)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), z.relu() if relu else z, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_not_finite_reaches_every_task_of_its_row(kind: str, bad: float, precision: str, library: bool) -> None:
    model = ARCHITECTURES[kind](45, ["click", "dwell"], expert_layers=(64, 16))
    x = drawn(300, 45)
    x[7, 3] = bad
    for gradient in (False, True):
        with torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            for h in model(x).values():
                finite = h.isfinite().all(1)
                assert finite.sum() == 299
                assert not finite[7]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_nan_goes_through_experts_whatever_gates_say(gradient: bool, precision: str, library: bool) -> None:
    """oneDNN's own ReLU would make a 0 of it."""
    x = drawn(300, 45)
    x[7, 3] = torch.nan
    with torch.set_grad_enabled(gradient), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        nan_NB = Abreast(BatchedMLP(3, 45, (64, 16)), mixed=True)(x).isnan().any(2)
    assert nan_NB.nonzero().tolist() == [[0, 7], [1, 7], [2, 7]]


@pytest.mark.parametrize("readers", ["aliased", "several"])
def test_products_are_of_whole_registers_and_rows_not_2_kib_apart(readers: str, library: bool) -> None:
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


@pytest.mark.parametrize("inputs", [45, 48])
def test_a_gpu_reads_rows_of_whole_16_bytes(inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fan_out_module, "_ALIGNING", ("cpu",))  # the operators are those of any device
    monkeypatch.setattr(fan_out_module, "_is_one_product", lambda x, readers: False)
    widths: list[tuple[int, int]] = []

    def noted(x: Tensor, weight: Tensor, *more: Any) -> Tensor:
        widths.append((x.shape[1], weight.shape[1]))
        return linear(x, weight, *more)

    monkeypatch.setattr(fan_out_module, "linear", noted)
    results = []
    for dtype in (torch.float32, torch.float64):
        x = drawn(30, inputs, dtype=dtype).requires_grad_()
        weight, bias = (drawn(3, *shape, dtype=dtype).requires_grad_() for shape in ((5, inputs), (5,)))
        if dtype == torch.float32:
            [y] = fan_out(x, Maps(weight, bias, True))
        else:
            y = torch.relu(x @ weight.transpose(1, 2) + bias[:, None])
        (y * drawn(*y.shape, dtype=dtype)).sum().backward()
        results.append([y.detach(), x.grad, weight.grad, bias.grad])
    assert widths == [(48, 48)]
    for found, wanted in zip(*results, strict=True):
        assert found is not None
        assert wanted is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not products._BF16, reason="oneDNN has no bf16 on this CPU")
@pytest.mark.parametrize("inputs", [45, 48])
@pytest.mark.parametrize("readers", READERS)
def test_bf16_is_as_near_to_the_truth_as_autocast_map_by_map(readers: str, inputs: int) -> None:
    results: list[list[Tensor]] = []
    for way in ("exact", "autocast", "fan_out"):
        dtype = torch.float64 if way == "exact" else torch.float32
        x = drawn(600, inputs, dtype=dtype).requires_grad_()
        leaves, ys, maps = [x], [], []
        with torch.autocast("cpu", torch.bfloat16, enabled=way != "exact"):
            for seed, (n, outputs, biased, relu) in enumerate(READERS[readers]):
                weight = drawn(n, outputs, inputs, dtype=dtype, seed=seed).requires_grad_()
                bias = drawn(n, outputs, dtype=dtype, seed=seed).requires_grad_() if biased else None
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
    x, frozen, weight, bias = drawn(300, 45), drawn(3, 64, 45), drawn(3, 64, 45, seed=1), drawn(3, 64)
    for wanted in ([x], [weight], [bias]):
        for leaf in wanted:
            leaf.requires_grad_()
        one, other = fan_out(x, Maps(frozen, None, True), Maps(weight, bias))
        (found,) = torch.autograd.grad(one.sum() + 2.0 * other.sum(), wanted)
        below = functional.linear(x, frozen.flatten(0, 1)).relu().sum() + 2.0 * functional.linear(x, weight.flatten(0, 1)).sum()
        exact = torch.full((3, 64), 600.0) if wanted[0] is bias else torch.autograd.grad(below, wanted)[0]
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-3)
        for leaf in wanted:
            leaf.requires_grad_(False)


def test_inputs_that_are_a_parameter_have_a_gradient() -> None:
    x, weight = torch.nn.Parameter(drawn(300, 45)), drawn(3, 64, 45).requires_grad_()
    for y in (fan_out(x, Maps(weight))[0], linear(x, weight.flatten(0, 1))):
        (exact,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        with backward_to("parameters"):
            (found,) = torch.autograd.grad(y.sum(), x, materialize_grads=True, retain_graph=True)
        assert torch.equal(found, exact)
        assert float(exact.abs().max()) > 0.0


def test_what_is_not_trained_or_asked_to_be_apart_has_a_product_of_its_own() -> None:
    x = drawn(300, 45).requires_grad_()
    frozen, one, other = (Maps(drawn(3, 64, 45, seed=seed)) for seed in range(3))
    for maps in (one, other):
        maps.weight.requires_grad_()
    together = fan_out(x, frozen, one, other)
    assert together[1].grad_fn is together[2].grad_fn is not together[0].grad_fn
    with apart("readers"):
        separate = fan_out(x, frozen, one, other)
    assert len({y.grad_fn for y in separate}) == 3
    for y, z in zip(together, separate, strict=True):
        torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)


def test_several_passes_through_one_product_are_those_through_several(library: bool) -> None:
    x = drawn(300, 45).requires_grad_()
    readers = [Maps(drawn(3, 64, 45, seed=seed).requires_grad_(), drawn(3, 64).requires_grad_(), True) for seed in range(2)]
    leaves = [x, *(leaf for maps in readers for leaf in maps[:2])]
    together = fan_out(x, *readers)
    with apart("readers"):
        separate = fan_out(x, *readers)
    for weights in ((1.0, 0.0), (0.5, 2.0)):
        found, exact = (
            torch.autograd.grad(sum(w * (y * y).sum() for w, y in zip(weights, ys, strict=True)), leaves, retain_graph=True)
            for ys in (together, separate)
        )
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("graded", [False, True])
def test_what_is_not_finite_stays_so_where_it_belongs(library: bool, graded: bool) -> None:
    x, weight = drawn(300, 45), drawn(2, 64, 45)
    weight[1, 3, 4] = torch.nan
    x[7, 5] = torch.inf
    with torch.set_grad_enabled(graded):
        one, other = fan_out(x, Maps(weight, drawn(2, 64), True), Maps(drawn(3, 4, 45).requires_grad_()))
    assert bool(one[1, :, 3].isnan().all())
    assert bool(one[0, :7].isfinite().all())
    assert bool(other[:, 8:].isfinite().all())
    assert not bool(other[:, 7].isfinite().any())


def test_types_that_autocast_leaves_alone() -> None:
    layer, x = BatchedLinear(4, 48, 64).double(), drawn(300, 48, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.float64
    with pytest.raises(RuntimeError, match="dtype"):
        fan_out(drawn(600, 48).bfloat16(), Maps(drawn(4, 64, 48)))


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
def test_passes_to_inputs_or_to_parameters_alone(several: bool, library: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    leaf, weight = drawn(300, 45).requires_grad_(), drawn(64, 45).requires_grad_()
    calls: list[list[bool]] = []
    real = products.gradients

    def noted(wanted: Any, *arguments: Any) -> Any:
        calls.append(list(wanted))
        return real(wanted, *arguments)

    monkeypatch.setattr(products, "gradients", noted)
    monkeypatch.setattr("mtrec.architectures.fan_out.gradients", noted)
    for x in (leaf, 1.0 * leaf):
        y = fan_out(x, Maps(weight.view(4, 16, 45)))[0] if several else linear(x, weight)
        exact = torch.autograd.grad(y.sum(), [leaf, weight], retain_graph=True)
        calls.clear()
        with backward_to("inputs"):
            (dx,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
        with backward_to("parameters"):
            (dweight,) = torch.autograd.grad(y.sum(), weight, retain_graph=True)
        assert torch.equal(dx, exact[0])
        assert torch.equal(dweight, exact[1])
        assert calls == [[True, False, False], [x is not leaf, True, False]]


@pytest.mark.parametrize(
    ("processor", "flags", "setting", "through_onednn"),
    [
        ("AuthenticAMD", "avx2 avx512f", None, True),
        ("AuthenticAMD", "avx2", None, False),
        ("GenuineIntel", "avx2 avx512f", None, False),
        ("GenuineIntel", "avx2", None, False),
        ("GenuineIntel", "avx2 avx512f", "1", True),
        ("AuthenticAMD", "avx2", "1", True),
        ("AuthenticAMD", "avx2 avx512f", "0", False),
    ],
)
@needs_onednn
def test_the_processor_decides_unless_the_environment_does(
    processor: str, flags: str, setting: str | None, through_onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = f"processor : 0\nvendor_id : {processor}\nflags : fpu {flags}\n"
    monkeypatch.setattr(products.Path, "read_text", lambda path: cpu)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.delenv("MTREC_ONEDNN", raising=False)
    if setting is not None:
        monkeypatch.setenv("MTREC_ONEDNN", setting)
    assert products._prefers_onednn() is through_onednn


@needs_onednn
@pytest.mark.parametrize(("setting", "through_onednn"), [("0", False), ("1", True)])
def test_the_environment_is_asked_when_the_module_is_imported(setting: str, through_onednn: bool) -> None:
    code = "from mtrec.architectures import products; print(products._FP32)"
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MTREC_ONEDNN": setting}, check=True, capture_output=True, text=True
    )
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


@pytest.mark.skipif(not products.takes_bf16(), reason="oneDNN computes no bf16 on this CPU")
@pytest.mark.parametrize("layers", [(64, 16), (64, 32, 16)])
def test_experts_that_are_mixed_lie_row_by_row_without_a_gradient(layers: tuple[int, ...]) -> None:
    """What `mix` then reads is no copy; the numbers are those of experts that are not mixed, to the bit."""
    mlp, x = BatchedMLP(3, 45, layers), drawn(1_000, 45)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed, apart = Abreast(mlp, mixed=True)(x), Abreast(mlp)(x)
        assert mixed.transpose(0, 1).is_contiguous()
        assert apart.is_contiguous()
        assert torch.equal(mixed, apart)
        gates = drawn(2, 1_000, 3).softmax(2)
        torch.testing.assert_close(mix(gates, mixed), mix(gates, apart), rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Abreast(mlp, mixed=True)(x), Abreast(mlp)(x))  # with a gradient: as ever


@pytest.mark.skipif(not products.takes_bf16(), reason="oneDNN computes no bf16 on this CPU")
@pytest.mark.parametrize(("layers", "layer_norm"), [((64,), False), ((64, 16), True)])
def test_experts_that_end_otherwise_than_in_a_product_are_mixed_alike(layers: tuple[int, ...], layer_norm: bool) -> None:
    mlp, x = BatchedMLP(3, 45, layers, layer_norm=layer_norm), drawn(1_000, 45)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Abreast(mlp, mixed=True)(x), Abreast(mlp)(x))
