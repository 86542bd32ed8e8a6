"""Architectures against implementations of the papers with one `nn.Linear` for every map of every expert and gate."""

from contextlib import nullcontext

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from mtrec.architectures import ARCHITECTURES, CGC, PLE, MMoE, OMoE, SharedBottom, SingleTask, Towers
from mtrec.architectures.experts import BatchedLinear, BatchedMLP, Gates
from mtrec.architectures.fan_out import apart
from mtrec.dropout import stream_dropout
from mtrec.kinds import check_options, option_types

TASKS = ("click", "conversion", "dwell")
D = 20
VARIANTS = {
    "single_task": ("single_task", {}),
    "shared_bottom": ("shared_bottom", {}),
    "shared_bottom one layer": ("shared_bottom", {"expert_layers": (12,)}),
    "omoe": ("omoe", {"num_experts": 3}),
    "mmoe": ("mmoe", {}),
    "mmoe one layer": ("mmoe", {"expert_layers": (12,)}),
    "mmoe three layers": ("mmoe", {"expert_layers": (16, 12, 8), "num_experts": 5}),
    "mmoe one expert": ("mmoe", {"num_experts": 1}),
    "cgc": ("cgc", {}),
    "cgc 2 + 3": ("cgc", {"num_task_experts": 2, "num_shared_experts": 3}),
    "ple": ("ple", {}),
    "ple one level": ("ple", {"levels": 1}),
    "ple 2 + 1": ("ple", {"num_task_experts": 2, "num_shared_experts": 1}),
    "ple one layer": ("ple", {"num_task_experts": 2, "expert_layers": (12,)}),
    "ple three levels": ("ple", {"levels": 3, "num_task_experts": 2, "num_shared_experts": 2}),
    "ple layer norm": ("ple", {"num_task_experts": 2, "layer_norm": True}),
    "mmoe layer norm": ("mmoe", {"layer_norm": True}),
}
each_variant = pytest.mark.parametrize("variant", VARIANTS)
each_gated_variant = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "mmoe one expert"])


def build(variant: str, tasks=TASKS, seed: int = 0, **options) -> nn.Module:
    kind, own = VARIANTS[variant]
    torch.manual_seed(seed)
    model = ARCHITECTURES[kind](D, tasks, **({"expert_layers": (16, 12)} | own | options))
    for name, parameter in model.named_parameters():  # gates that differ, layer norms that do something
        if "gate" in name or "norm" in name:
            nn.init.normal_(parameter)
    return model


class Plain:
    """Copies batched blocks into plain ones, and remembers which plain parameters stand for which batched one."""

    def __init__(self) -> None:
        self.pairs: list[tuple[nn.Parameter, list[nn.Parameter]]] = []

    def experts(self, mlp: BatchedMLP) -> list[nn.Sequential]:
        num_maps = mlp.linears[0].weight.shape[0]
        experts = [nn.Sequential() for _ in range(num_maps)]
        for i, linear in enumerate(mlp.linears):
            made = [nn.Linear(linear.weight.shape[2], linear.weight.shape[1]) for _ in range(num_maps)]
            self.copy(linear.weight, [each.weight for each in made])
            self.copy(linear.bias, [each.bias for each in made])
            norms = [nn.Identity() for _ in range(num_maps)]
            if mlp.norms:
                norms = [nn.LayerNorm(linear.weight.shape[1]) for _ in range(num_maps)]
                self.copy(mlp.norms[i].weight, [each.weight for each in norms])
                self.copy(mlp.norms[i].bias, [each.bias for each in norms])
            for expert, each, norm in zip(experts, made, norms, strict=True):
                expert.extend([each, norm, nn.ReLU()])
        return experts

    def gates(self, gates: Gates) -> list[nn.Linear]:
        num_maps, num_experts, dim = gates.linear.weight.shape
        made = [nn.Linear(dim, num_experts, bias=False) for _ in range(num_maps)]
        self.copy(gates.linear.weight, [each.weight for each in made])
        return made

    def copy(self, batched: nn.Parameter, plain: list[nn.Parameter]) -> None:
        with torch.no_grad():
            for n, parameter in enumerate(plain):
                parameter.copy_(batched[n].view_as(parameter))
        self.pairs.append((batched, plain))


def mixture(gate: nn.Linear, x: Tensor, experts: list[Tensor]) -> Tensor:
    weights = functional.softmax(gate(x), dim=1)
    return sum(weights[:, [e]] * expert for e, expert in enumerate(experts))


def plain_forward(model: nn.Module, plain: Plain):
    """The paper's equations for `model`: a function x_BD -> {task: (B, H)}."""
    if isinstance(model, SingleTask):
        experts = plain.experts(model.experts)
        return lambda x: {task: expert(x) for task, expert in zip(TASKS, experts, strict=True)}
    if isinstance(model, SharedBottom):
        (bottom,) = plain.experts(model.bottom)
        return lambda x: {task: bottom(x) for task in TASKS}
    if isinstance(model, OMoE | MMoE):
        experts = plain.experts(model.experts)
        gates = plain.gates(model.gate) * len(TASKS) if isinstance(model, OMoE) else plain.gates(model.task_gates)
        return lambda x: {
            task: mixture(gate, x, [expert(x) for expert in experts]) for task, gate in zip(TASKS, gates, strict=True)
        }
    levels = [
        (
            plain.experts(level.task_experts),
            plain.experts(level.shared_experts),
            plain.gates(level.task_gates),
            None if level.shared_gate is None else plain.gates(level.shared_gate)[0],
        )
        for level in (model.levels if isinstance(model, PLE) else [model.level])
    ]
    return lambda x: plain_ple(levels, x)


def plain_ple(levels, x: Tensor) -> dict[str, Tensor]:
    task_inputs, shared_input = [x] * len(TASKS), x
    for task_experts, shared_experts, task_gates, shared_gate in levels:
        per_task = len(task_experts) // len(TASKS)
        own = [
            [expert(task_inputs[k]) for expert in task_experts[k * per_task : (k + 1) * per_task]]
            for k in range(len(TASKS))
        ]
        shared = [expert(shared_input) for expert in shared_experts]
        outputs = [mixture(task_gates[k], task_inputs[k], own[k] + shared) for k in range(len(TASKS))]
        if shared_gate is not None:
            shared_input = mixture(shared_gate, shared_input, [y for ys in own for y in ys] + shared)
        task_inputs = outputs
    return dict(zip(TASKS, task_inputs, strict=True))


@each_variant
def test_outputs_and_gradients_are_those_of_plain_experts(variant, own_products):
    model, plain = build(variant), Plain()
    forward = plain_forward(model, plain)
    assert {id(batched) for batched, _ in plain.pairs} == {id(parameter) for parameter in model.parameters()}
    x = torch.randn(17, D, requires_grad=True)
    x_plain = x.detach().clone().requires_grad_()
    ours, theirs = model(x), forward(x_plain)
    assert list(ours) == list(TASKS)
    weights = {task: torch.randn(17, model.output_dim) for task in TASKS}
    for task in TASKS:
        assert ours[task].shape == (17, model.output_dim)
        torch.testing.assert_close(ours[task], theirs[task], rtol=1e-5, atol=1e-5)
    sum((ours[task] * weights[task]).sum() for task in TASKS).backward()
    sum((theirs[task] * weights[task]).sum() for task in TASKS).backward()
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-5, atol=1e-5)
    for batched, separate in plain.pairs:
        expected = torch.stack([parameter.grad for parameter in separate]).view_as(batched)
        torch.testing.assert_close(batched.grad, expected, rtol=1e-5, atol=1e-5)


@each_variant
def test_blocks_apart_and_together_make_the_same(variant, own_products):
    model, x = build(variant), torch.randn(17, D)
    ours = model(x)
    with apart("readers"):
        separate = model(x)
    parameters = list(model.parameters())
    weights = {task: torch.randn(17, model.output_dim) for task in TASKS}  # squares had gradients of a thousand, and of one
    found, expected = (
        torch.autograd.grad(sum((ys[task] * weights[task]).sum() for task in TASKS), parameters) for ys in (ours, separate)
    )
    for task in TASKS:
        torch.testing.assert_close(ours[task], separate[task], rtol=1e-5, atol=1e-6)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("experts", [1, 2, 3, 7, 8, 9])
@pytest.mark.parametrize("rows", [0, 1, 33])
def test_a_softmax_of_any_number_of_columns_is_torchs(experts: int, rows: int) -> None:
    gates = Gates(3, D, experts)
    logits = torch.randn(rows, 3 * experts + 5)[:, : 3 * experts].view(rows, 3, experts).transpose(0, 1)  # rows with gaps
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, expected = gates.rest(ours), theirs.softmax(2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gates.rest(logits), expected, rtol=1e-6, atol=1e-7)
    weights = torch.randn(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)  # differences of what nearly cancels


@pytest.mark.parametrize("variant", ["cgc 2 + 3", "ple three levels"])
def test_passes_towards_shared_experts_alone_leave_the_tasks_own_out(variant):
    model = build(variant)
    level = model.levels[-1] if variant.startswith("ple") else model.level
    reached = {}
    for together, within in ((True, nullcontext()), (False, apart("blocks"))):
        with within:
            loss = sum(y.sum() for y in model(torch.randn(17, D)).values())
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node in seen or node is None:
                continue
            seen.add(node)
            nodes += [each for each, _ in node.next_functions]
        shared, own = (
            {node for node in seen for each, _ in node.next_functions if getattr(each, "variable", None) is weight}
            for weight in (level.shared_experts.linears[1].weight, level.task_experts.linears[1].weight)
        )
        reached[together] = shared & own
    assert reached[True]
    assert not reached[False]


@each_gated_variant  # the softmax of a single expert is 1, whatever its parameters
def test_shared_parameters_are_those_that_several_losses_reach(variant):
    model = build(variant).double()
    x = torch.randn(64, D, dtype=torch.float64)
    reached = {id(p): torch.zeros(p.shape[0], dtype=torch.int64) for p in model.parameters()}  # losses a map
    for task in TASKS:
        gradients = torch.autograd.grad(
            (model(x)[task] ** 2).sum(), list(model.parameters()), allow_unused=True, materialize_grads=True
        )
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            reached[id(parameter)] += (gradient.flatten(1) != 0).any(1)
    assert all((counts > 0).all() for counts in reached.values())
    shared = {id(parameter) for parameter in model.shared_parameters()}
    assert shared == {i for i, counts in reached.items() if (counts > 1).any()}
    assert len(shared) == len(model.shared_parameters())
    assert build(variant, tasks=("click",)).shared_parameters() == []


@each_variant
def test_flops_are_those_that_torch_counts(variant):
    for model in (build(variant), build(variant, tasks=("click",))):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(7, D))
        assert counter.get_total_flops() == 7 * model.flops_per_row()


@each_gated_variant
def test_gates_sum_to_one_and_look_without_touching(variant):
    model = build(variant, **({"gate_dropout": 0.5} if "gate_dropout" in _options(variant) else {}), dropout=0.5)
    x = torch.randn(17, D, requires_grad=True)
    state = torch.get_rng_state()
    gates = model.gates(x)
    assert torch.equal(torch.get_rng_state(), state)
    kind = VARIANTS[variant][0]
    levels = [f"level{n + 1}/" for n in range(len(model.levels))] if kind == "ple" else [""]
    names = {"single_task": [], "shared_bottom": [], "omoe": ["shared"]}.get(
        kind, [level + task for level in levels for task in TASKS] + [f"{level}shared" for level in levels[:-1]]
    )
    assert sorted(gates) == sorted(names)
    expected = model.eval().gates(x)
    for name, weights in gates.items():
        assert not weights.requires_grad
        torch.testing.assert_close(weights.sum(1), torch.ones(17))
        assert torch.equal(weights, expected[name])
    assert len({weights[0, 0].item() for weights in gates.values()}) == len(gates)


@each_gated_variant
def test_gates_are_those_that_the_forward_pass_mixes_by(variant, monkeypatch):
    model, x, seen = build(variant), torch.randn(17, D), []
    rest = Gates.rest
    monkeypatch.setattr(Gates, "rest", lambda self, logits: seen.append(rest(self, logits)) or seen[-1])
    model(x)
    mixed_by = [gate_BE for gates_GBE in seen for gate_BE in gates_GBE]
    found = list(model.gates(x).values())
    assert len(found) == len(mixed_by)
    for gate_BE, expected_BE in zip(found, mixed_by, strict=True):
        torch.testing.assert_close(gate_BE, expected_BE, rtol=1e-5, atol=1e-6)


def _options(variant: str) -> set[str]:
    return set(option_types(ARCHITECTURES[VARIANTS[variant][0]]))


@each_variant
def test_rows_do_not_see_each_other(variant):
    model = build(variant)
    x = torch.randn(17, D)
    order = torch.randperm(17)
    whole, permuted = model(x), model(x[order])
    for task in TASKS:
        torch.testing.assert_close(permuted[task], whole[task][order], rtol=1e-5, atol=1e-6)


@each_variant
def test_no_rows(variant):
    model = build(variant)
    x = torch.empty(0, D, requires_grad=True)
    outputs = model(x)
    assert all(outputs[task].shape == (0, model.output_dim) for task in TASKS)
    sum(output.sum() for output in outputs.values()).backward()
    assert x.grad.shape == (0, D)
    for parameter in model.parameters():
        assert (parameter.grad == 0).all()
    assert all(len(weights) == 0 for weights in model.gates(x.detach()).values())


@each_variant
def test_bf16_autocast(variant, own_products):
    model = build(variant)
    towers = Towers(TASKS, model.output_dim, (6,))
    x = torch.randn(40, D, requires_grad=True)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x)
        gates = model.gates(x)
        logits = towers(outputs)
    for task in TASKS:
        error = (outputs[task].float() - expected[task]).norm() / expected[task].norm()
        assert 0 < error < 0.03
        assert logits[task].dtype == torch.bfloat16
    for weights in gates.values():
        assert weights.dtype == torch.float32
        torch.testing.assert_close(weights.sum(1), torch.ones(40))
    sum(logit.float().sum() for logit in logits.values()).backward()
    for parameter in [x, *model.parameters(), *towers.parameters()]:
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@each_variant
def test_builds_and_runs_on_meta_and_is_initialised_afterwards(variant):
    with torch.device("meta"):
        model = build(variant, dropout=0.1)
        assert all(output.device.type == "meta" for output in model(torch.empty(3, D)).values())
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            assert 0 < parameter.abs().max() <= (parameter.shape[-1] if parameter.dim() == 3 else 12) ** -0.5


@each_variant
def test_dropout_does_not_depend_on_the_number_of_ranks(variant, own_products):
    gate = {"gate_dropout": 0.3} if "gate_dropout" in _options(variant) else {}
    model = build(variant, dropout=0.4, **gate)
    rows = (3, 2, 0, 4, 1, 2, 3, 2)
    x = torch.randn(sum(rows), D)

    def run(streams, x):
        with stream_dropout(5, 1, streams, [rows[v] for v in streams]):
            return model(x)

    whole = run(range(8), x)
    halves = [run(range(3), x[:5]), run(range(3, 8), x[5:])]
    for task in TASKS:
        torch.testing.assert_close(torch.cat([half[task] for half in halves]), whole[task], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(whole[task], model.eval()(x)[task], rtol=0.01)
        model.train()


def test_cgc_is_ple_with_one_level(own_products):
    options = {"num_task_experts": 2, "num_shared_experts": 3}
    cgc, ple = CGC(D, TASKS, **options), PLE(D, TASKS, levels=1, **options)
    ple.load_state_dict({name.replace("level.", "levels.0."): value for name, value in cgc.state_dict().items()})
    x = torch.randn(9, D)
    for task in TASKS:
        assert torch.equal(cgc(x)[task], ple(x)[task])
        assert torch.equal(cgc.gates(x)[task], ple.gates(x)[f"level1/{task}"])


def test_omoe_is_mmoe_whose_gates_are_one():
    omoe, mmoe = OMoE(D, TASKS), MMoE(D, TASKS)
    weights = omoe.state_dict()
    weights["task_gates.linear.weight"] = weights.pop("gate.linear.weight").expand(3, -1, -1)
    mmoe.load_state_dict(weights)
    x = torch.randn(9, D)
    for task in TASKS:
        torch.testing.assert_close(omoe(x)[task], mmoe(x)[task], rtol=1e-5, atol=1e-6)


def test_no_shared_gate_at_the_last_level():
    for levels in (1, 2, 3):
        model = PLE(D, TASKS, levels=levels)
        assert [level.shared_gate is not None for level in model.levels] == [True] * (levels - 1) + [False]


def test_each_expert_is_initialised_as_a_linear_would_be():
    torch.manual_seed(0)
    model = MMoE(64, TASKS, num_experts=6, expert_layers=(48, 32))
    for linear in [*model.experts.linears, model.task_gates.linear]:
        assert isinstance(linear, BatchedLinear)
        input_dim = linear.weight.shape[2]
        reference = nn.Linear(input_dim, 4000)
        for weight in linear.weight:  # one expert each
            same = stats.ks_2samp(weight.detach().flatten(), reference.weight.detach().flatten()[:100_000])
            assert same.pvalue > 1e-3
            assert weight.abs().max() <= input_dim**-0.5
        if linear.bias is not None:
            assert stats.ks_2samp(linear.bias.detach().flatten(), reference.bias.detach()).pvalue > 1e-3
        flat = linear.weight.detach().flatten(1)
        assert (torch.corrcoef(flat) - torch.eye(len(flat))).abs().max() < 6 * flat.shape[1] ** -0.5


def test_gate_dropout_leaves_out_experts_and_renormalises():
    torch.manual_seed(0)
    gates = Gates(2, D, 4, gate_dropout=0.3)
    x = torch.randn(5000, D)
    full = gates.eval()(x)
    dropped = gates.train()(x)
    torch.testing.assert_close(dropped.sum(2), torch.ones(2, 5000))
    zero = dropped == 0
    kept = full.masked_fill(zero, 0.0)
    torch.testing.assert_close(dropped, kept / kept.sum(2, keepdim=True))
    # an expert is left out with probability 0.3, unless all four are, when none is
    share = 0.3 - 0.3**4
    assert abs(zero.float().mean().item() - share) < 5 * (share * (1 - share) / zero.numel()) ** 0.5
    gates(x.requires_grad_()).square().sum().backward()
    assert x.grad.isfinite().all()


def test_the_gate_picks_the_expert():
    """With one-hot gates a task's output is that expert's: the task's own experts come first, then the shared ones."""
    model = CGC(D, TASKS, num_task_experts=2, num_shared_experts=2)
    x = torch.rand(5, D)
    own, shared = model.level.task_experts(x), model.level.shared_experts(x)
    for column in range(4):
        with torch.no_grad():
            model.level.task_gates.linear.weight.zero_()
            model.level.task_gates.linear.weight[:, column] = 1000.0
        for k, task in enumerate(TASKS):
            expected = own[2 * k + column] if column < 2 else shared[column - 2]
            torch.testing.assert_close(model(x)[task], expected)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_defaults_and_options(kind):
    options = check_options(ARCHITECTURES[kind], {}, "model.architecture")
    common = {"expert_layers": (128, 64), "dropout": 0.0, "layer_norm": False}
    assert common.items() <= options.items()
    assert options.get("gate_dropout", 0.0) == 0.0
    assert options.get("num_experts", 4) == 4
    assert options.get("levels", 2) == 2
    model = ARCHITECTURES[kind](D, TASKS, **options)
    assert model.output_dim == 64
    with pytest.raises(ValueError, match=r"`model\.architecture\.expert_layers` should"):
        check_options(ARCHITECTURES[kind], {"expert_layers": []}, "model.architecture")
    for tasks in ([], ["click", "click"]):
        with pytest.raises(ValueError, match="`tasks` should hold at least one name and none twice"):
            ARCHITECTURES[kind](D, tasks)


def test_a_task_cannot_be_called_shared_in_ple():
    with pytest.raises(ValueError, match=r"`tasks\.shared` should have another name"):
        PLE(D, ["click", "shared"])


@pytest.mark.parametrize(
    "layers", [(), (6,), (6, 4), {"click": (6, 4), "conversion": (), "dwell": (6, 4)}, dict.fromkeys(TASKS, (3,))]
)
@pytest.mark.parametrize("same_input", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_towers_are_plain_perceptrons(layers, same_input, layer_norm):
    torch.manual_seed(0)
    towers, plain = Towers(TASKS, 8, layers, layer_norm=layer_norm), Plain()
    separate: dict[str, nn.Module] = {}
    for group, mlp in zip(towers.groups, towers.mlps, strict=True):
        separate |= zip(group, plain.experts(mlp) if mlp.linears else [nn.Identity()] * len(group), strict=True)
    assert {id(batched) for batched, _ in plain.pairs} == {id(parameter) for parameter in towers.parameters()}
    x = torch.randn(3, 11, 8)
    inputs = dict.fromkeys(TASKS, x[0]) if same_input else dict(zip(TASKS, x, strict=True))
    with FlopCounterMode(display=False) as counter:
        outputs = towers(inputs)
    assert counter.get_total_flops() == 11 * towers.flops_per_row()
    assert list(outputs) == list(TASKS)
    expected = {task: separate[task](inputs[task]) for task in TASKS}
    for task in TASKS:
        assert outputs[task].shape == (11, towers.output_dims[task])
        torch.testing.assert_close(outputs[task], expected[task], rtol=1e-5, atol=1e-5)
    for results in (outputs, expected):
        loss = sum((k + 1) * results[task].square().mean() for k, task in enumerate(TASKS))
        if loss.requires_grad:
            loss.backward()
    for batched, parts in plain.pairs:
        torch.testing.assert_close(
            batched.grad, torch.stack([part.grad for part in parts]).view_as(batched), rtol=1e-5, atol=1e-5
        )


def test_towers_need_widths_for_every_task():
    with pytest.raises(ValueError, match=r"`towers` should have widths for the tasks \['click', 'dwell'\]"):
        Towers(["click", "dwell"], 8, {"click": (4,)})
