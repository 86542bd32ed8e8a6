"""Balancing within a training: where gradients are compared, what is refused, and runs that are killed and resumed."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from logs import experiment_tree, write_log
from runs import small_run
from torch import Tensor, nn
from torch.testing import assert_close

import mtrec.step
from mtrec import parallel
from mtrec.architectures import ARCHITECTURES
from mtrec.atomic import write_atomically
from mtrec.balancing import BALANCERS
from mtrec.batch import Batch
from mtrec.checkpoint import find
from mtrec.config import apply_overrides, parse_experiment, to_yaml
from mtrec.dropout import stream_dropout
from mtrec.events import Step
from mtrec.experiment import Experiment
from mtrec.feed import feed
from mtrec.gradients import check_place, gramian, gramian_of_parameters, sampled_rows, task_gradients
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel, check_buffers
from mtrec.run import Run
from mtrec.sources import open_source
from mtrec.step import FlatGradients, TrainState, build_state, train_step
from mtrec.train import Progress, make_reader, train

CPU = torch.device("cpu")


class NormedBottom(nn.Module):
    """An architecture of a user's own, with batch norm."""

    def __init__(self, input_dim: int, tasks: list[str]) -> None:
        super().__init__()
        self.tasks, self.output_dim = tasks, 4
        self.linear, self.norm = nn.Linear(input_dim, 4), nn.BatchNorm1d(4)

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        return dict.fromkeys(self.tasks, self.norm(self.linear(x_BD)).relu())

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        return {}

    def shared_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def flops_per_row(self) -> int:
        return 2 * self.linear.weight.numel()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return small_run(tmp_path_factory.mktemp("run"), rows=1_100)


def changed(run: Run, *overrides: str) -> Experiment:
    return parse_experiment(apply_overrides(run.experiment.model_dump(mode="json"), overrides))


def state_and_batch(run: Run, *overrides: str) -> tuple[TrainState, Batch]:
    """A fresh model and a batch for it; call within a process group."""
    experiment = changed(run, *overrides)
    model = MultiTaskModel(experiment, run.encoder, run.labels, CPU)
    data = open_source(experiment, experiment.data.train, "data.train")
    reader = make_reader(run, data, Progress())
    batch = next(iter([batch for _, batch in feed(reader, run.encoder, labels_of(experiment, model.specs), None)]))
    return build_state(experiment, model, run.labels, batch_size=128, total_steps=50, device=CPU), batch


def plain_losses(
    state: TrainState, x_BD: Tensor, labels: dict[str, Tensor], weight_B: Tensor, stream_rows: list[int]
) -> Tensor:
    with stream_dropout(state.seed, state.step, state.streams, stream_rows):
        loss_BK, mask_BK = state.model.objectives.losses(state.model.dense(x_BD), labels)
    return weight_B @ loss_BK / (weight_B @ mask_BK.float()).clamp(min=1e-9) * state.task_weights_K


def plain_gradients(loss_K: Tensor, inputs: list[Tensor]) -> Tensor:
    """(K, N) in float64, by torch's own jacobian row by row."""
    rows = []
    for loss in loss_K:
        found = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.double().flatten() for gradient in found]))
    return torch.stack(rows)


@pytest.mark.parametrize("at", ["parameters", "batch_sum", "representation"])
@pytest.mark.parametrize("rows", [1.0, 0.25])
@pytest.mark.parametrize("interaction", ["dcn_v2", "none"])
@pytest.mark.usefixtures("own_products")
def test_the_gramian_is_that_of_the_plain_gradients(run: Run, at: str, rows: float, interaction: str) -> None:
    with parallel.process_group(CPU):
        options = (f"balancing.at={at}", f"balancing.rows={rows}", f"model.interaction={interaction}")
        state, unweighted = state_and_batch(run, "balancing.kind=upgrad", *options)
        weight_B = torch.arange(unweighted.num_rows) % 5 / 2.0
        batch = dataclasses.replace(unweighted, sample_weight_B=weight_B)
        chosen = sampled_rows(rows, batch.stream_rows, state.streams, state.seed, 0)
        assert [len(index) for index in chosen] == [16 if rows == 1.0 else 4] * 8
        index = torch.cat(chosen)
        leaf_BD = state.model.embeddings(batch).detach()[index].requires_grad_()
        labels = {name: label[index] for name, label in batch.labels.items()}
        loss_K = plain_losses(state, leaf_BD, labels, weight_B[index], [len(each) for each in chosen])
        if at == "parameters":
            jacobian = plain_gradients(loss_K, state.model.dense.shared_parameters())
        else:
            jacobian = plain_gradients(loss_K, [leaf_BD])
        if at == "batch_sum":
            jacobian = jacobian.view(len(loss_K), *leaf_BD.shape).sum(1)
        expected = jacobian @ jacobian.T
        train_step(state, batch)
    assert_close(state.balancer.gramian_KK, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))


@pytest.mark.parametrize(
    ("at", "interaction", "own_experts"),
    [("parameters", "none", False), ("parameters", "dcn_v2", False), ("batch_sum", "none", True), ("batch_sum", "dcn_v2", True)],
)
def test_passes_on_a_share_of_the_rows_go_through_the_tasks_own_experts_only_on_the_way_to_x(
    run: Run, monkeypatch: pytest.MonkeyPatch, at: str, interaction: str, own_experts: bool
) -> None:
    seen: list[tuple[Tensor, list[nn.Parameter]]] = []
    real = mtrec.step._sampled_shares

    def noted(state: TrainState, batch: Batch, leaf_BD: Tensor) -> tuple[Tensor, Tensor]:
        share_K, sampled_BD = real(state, batch, leaf_BD)
        experts = [state.model.dense.architecture.level.task_experts, state.model.dense.architecture.level.shared_experts]
        seen.append((share_K, [each.linears[-1].weight for each in experts]))
        return share_K, sampled_BD

    monkeypatch.setattr(mtrec.step, "_sampled_shares", noted)
    architecture = "model.architecture={kind: cgc, expert_layers: [8, 4]}"
    options = (architecture, f"balancing.at={at}", "balancing.rows=0.25", f"model.interaction={interaction}")
    with parallel.process_group(CPU):
        state, batch = state_and_batch(run, "balancing.kind=upgrad", *options)
        train_step(state, batch)
    ((share_K, weights),) = seen
    assert share_K.grad_fn is not None
    graph, found = [share_K.grad_fn], set[Any]()
    while graph:
        node = graph.pop()
        if node not in found:
            found.add(node)
            graph += [each for each, _ in node.next_functions if each is not None]
    own, shared = ({n for n in found for each, _ in n.next_functions if getattr(each, "variable", None) is w} for w in weights)
    assert bool(own & shared) == own_experts  # a node that computes the gradients of both
    assert own
    assert shared


@pytest.mark.parametrize("interaction", ["dcn_v2", "none"])  # the tasks' passes go down to x_BD, or end above it
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("at", ["parameters", "batch_sum"])
@pytest.mark.usefixtures("own_products")
def test_a_step_with_a_gramian_is_the_step_of_the_weighted_losses(run: Run, at: str, dropout: float, interaction: str) -> None:
    weights = "balancing.weights={click: 1.5, dwell: 0.25}"
    plain = (
        f"model.interaction={interaction}",
        f"model.dropout={dropout}",
        "optimizer.dense.kind=sgd",
        "optimizer.tables.kind=sgd",
        "optimizer.dense.learning_rate=0.5",
    )
    with parallel.process_group(CPU):
        found = []
        for logged in (f"balancing.at={at}", "balancing.log_gradients=true"), ():
            state, batch = state_and_batch(run, weights, *plain, *logged)
            before = {name: table.local_shards()[0].tensor.clone() for name, table in state.tables.weights().items()}
            result = train_step(state, batch)
            tables = [t.local_shards()[0].tensor - before[name] for name, t in state.tables.weights().items()]
            found.append((result, state.dense_gradients.buffer.clone(), tables))
    (with_gramian, gradient, tables), (without, plain_gradient, plain_tables) = found
    assert_close(with_gramian.weights_K, without.weights_K)
    assert_close(gradient, plain_gradient, rtol=1e-4, atol=1e-6)
    assert float(plain_gradient.abs().max()) > 1e-2
    for table, plain_table in zip(tables, plain_tables, strict=True):
        assert_close(table, plain_table, rtol=1e-3, atol=1e-7)
        assert float(plain_table.abs().max()) > 1e-5


def test_sampled_rows_are_drawn_anew_for_every_seed_step_and_stream() -> None:
    draws = [
        tuple(index.tolist())
        for seed, step in ((1, 0), (2, 0), (1, 1), (1, 2))
        for index in (sampled_rows(0.5, [40], [0], seed, step)[0], sampled_rows(0.5, [40], [3], seed, step)[0])
    ]
    assert len(set(draws)) == len(draws) == 8
    assert all(len(set(rows)) == 20 and list(rows) == sorted(rows) for rows in draws)


def test_only_shared_parameters_count() -> None:
    shared, own = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([3.0]))
    leaf_BD = torch.ones(1, 1, requires_grad=True)
    share_K = torch.stack([shared.sum() * leaf_BD.sum(), (shared * own).sum() * leaf_BD.sum()])
    gradients = task_gradients(share_K, leaf_BD, [own, shared])
    assert_close(gramian_of_parameters(gradients.dense_KP, [own, shared], [shared]).float(), torch.tensor([[2.0, 6], [6, 18]]))
    assert_close(gramian(gradients.dense_KP).float(), torch.tensor([[2.0, 6], [6, 27]]))
    dense, x_BD = gradients.weighted(torch.tensor([1.0, 0.5]))
    assert dense.tolist() == [1.5, 2.5, 2.5]
    assert x_BD.tolist() == [[7.5]]


def test_a_loss_that_is_not_finite_changes_neither_model_nor_balancer(run: Run) -> None:
    with parallel.process_group(CPU):
        state, batch = state_and_batch(run, "balancing.kind=gradnorm", "balancing.warmup_steps=1", "balancing.every=1")
        for _ in range(3):
            train_step(state, batch)
        before = {name: value.clone() for name, value in state.balancer.state_dict().items()}
        dense = [parameter.detach().clone() for parameter in state.model.dense.parameters()]
        batch.dense_BF[0, 0] = float("nan")
        result = train_step(state, batch)
        assert not state.finite
        assert result.weights_K.isfinite().all()
        assert state.nonfinite_in_a_row == 1
        for name, value in state.balancer.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert all(torch.equal(p, q) for p, q in zip(state.model.dense.parameters(), dense, strict=True))
        batch.dense_BF[0, 0] = 0.0
        train_step(state, batch)
        assert state.finite


SINGLE = ("model.architecture=single_task", "model.interaction=none")


def test_a_place_without_gradients_is_refused_before_the_data_are_read(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`balancing.at` should be batch_sum or .*tasks share no dense parameter"):
        check_place(changed(run, *SINGLE, "balancing.kind=mgda"))
    with pytest.raises(ValueError, match=r"`balancing.at` should be"):
        check_place(changed(run, *SINGLE, "balancing.log_gradients=true"))
    check_place(changed(run, *SINGLE, "balancing.kind=mgda", "balancing.at=batch_sum"))
    check_place(changed(run, *SINGLE, "balancing.kind=uncertainty"))
    check_place(changed(run, "model.architecture=single_task", "balancing.kind=mgda"))  # shares the interaction
    tree = experiment_tree(write_log(tmp_path / "log", rows=200))
    with pytest.raises(ValueError, match=r"`balancing.at` should be"):
        small_run(tmp_path, *SINGLE, "balancing.kind=mgda", tree=tree)


@pytest.mark.parametrize("architecture", ["single_task", "mmoe"])
@pytest.mark.parametrize("rows", [1.0, 0.5])
def test_one_task_alone_trains_with_any_method(run: Run, architecture: str, rows: float) -> None:
    alone = (f"model.architecture={architecture}", "model.interaction=none", f"balancing.rows={rows}", "balancing.every=1")
    tree = experiment_tree(Path(str(run.experiment.data.train.path)))
    tree["tasks"] = {"click": {"kind": "binary"}}
    single = small_run(run.folder.parent, tree=tree)
    with parallel.process_group(CPU):
        for method in ("balancing.kind=upgrad", "balancing.log_gradients=true"):
            check_place(changed(single, *alone, method))
            state, batch = state_and_batch(single, *alone, method)
            before = [parameter.clone() for parameter in state.model.dense.parameters()]
            train_step(state, batch)
            found = state.balancer.describe()
            assert found["weight/click"] == pytest.approx(1.0)
            assert found["gradient_norm/click"] > 0.0
            assert not all(torch.equal(p, q) for p, q in zip(state.model.dense.parameters(), before, strict=True))


def test_what_keeps_statistics_of_its_own_is_refused(run: Run) -> None:
    own = f"model.architecture.kind={__name__}:NormedBottom"
    with pytest.raises(ValueError, match=r"`model`: BatchNorm1d keeps the buffer `architecture\.norm\.running_mean`"):
        check_buffers(changed(run, own))
    for kind in ARCHITECTURES:
        check_buffers(changed(run, f"model.architecture={kind}"))


def test_batch_norm_is_refused_where_rows_are_compared(run: Run) -> None:
    own = f"model.architecture.kind={__name__}:NormedBottom"
    with pytest.raises(ValueError, match=r"batch norm `architecture.norm`"):
        check_place(changed(run, own, "balancing.kind=mgda", "balancing.at=representation"))
    check_place(changed(run, own, "balancing.kind=mgda", "balancing.at=parameters"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("balancing.rows=0", "`balancing.rows` should be greater than 0"),
        ("balancing.rows=1.5", "`balancing.rows` should be less than or equal to 1"),
        ("balancing.at=experts", "`balancing.at` should be"),
    ],
)
def test_bad_options_are_named(run: Run, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        changed(run, override)


def test_the_log_says_where_gradients_were_taken(run: Run, tmp_path: Path) -> None:
    options = ("balancing.log_gradients=true", "balancing.at=batch_sum", "training.max_steps=1", "data.validation=null")
    shutil.copytree(run.folder, tmp_path / "run")
    write_atomically(tmp_path / "run" / "experiment.yaml", to_yaml(changed(run, *options)))
    logged = next(event for event in train(Run(tmp_path / "run"), device=CPU) if isinstance(event, Step)).balancing
    assert logged["weight/click"] == logged["weighed/dwell"] == 1.0
    assert logged["gradient_norm_at_batch_sum/dwell"] > 0.0
    assert -1.0 < logged["cosine_at_batch_sum/click/dwell"] < 1.0
    assert not [name for name in logged if "parameters" in name]


# with state within 8 steps, and a Gramian every other step, so that the restart lies between two
STATEFUL = {
    "uncertainty": [],
    "dwa": ["window=2"],
    "imtl_l": [],
    "famo": [],
    "stch": ["warmup_steps=6"],
    "gradnorm": ["warmup_steps=4"],
    "metabalance": [],
    "gradvac": [],
    "db_mtl": [],
    "mgda": ["ema=0.5", "auxiliary_gate=none", "primary=click"],
    "rlw": [],
    "pcgrad": [],
    "upgrad": ["rows=0.25"],
}


def test_every_method_with_buffers_is_in_the_test_of_resuming() -> None:
    with_state = {kind for kind, method in BALANCERS.items() if method(["click", "dwell"]).state_dict()}
    assert with_state <= STATEFUL.keys()


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_killed_and_resumed_run_goes_on_with_the_same_weights(run: Run, tmp_path: Path, kind: str) -> None:
    options = [f"balancing.{option}" for option in (f"kind={kind}", "every=2", *STATEFUL[kind])]
    short = ("training.checkpoint_every=3", "training.checkpoint_async=false", "data.validation=null", "training.max_steps=8")
    shutil.copytree(run.folder, tmp_path / "run")
    write_atomically(tmp_path / "run" / "experiment.yaml", to_yaml(changed(run, *options, *short)))

    def weights(resume: bool, stop_at: int | None) -> dict[int, tuple[dict[str, float], dict[str, float]]]:
        own = Run(tmp_path / "run")
        found = {}
        events = train(own, device=CPU, resume_from=find(own.checkpoints)[0] if resume else None)
        for event in events:
            if isinstance(event, Step):
                found[event.step] = (event.weights, event.losses)
                if event.step == stop_at:  # killed: the steps since the last checkpoint are lost
                    events.close()
                    break
        return found

    killed = weights(False, 5)
    assert [checkpoint.step for checkpoint in find(tmp_path / "run" / "checkpoints")] == [3]
    resumed = weights(True, None)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "checkpoints").mkdir()
    whole = weights(False, None)
    assert list(resumed) == [4, 5, 6, 7, 8]
    assert killed == {step: whole[step] for step in range(1, 6)}
    assert resumed == {step: whole[step] for step in resumed}
    assert len({tuple(w.values()) for w, _ in whole.values()}) > 2, "the weights do not change in this test"


@pytest.mark.parametrize("overrides", [(), ("balancing.kind=upgrad",), ("balancing.kind=upgrad", "balancing.rows=0.25")])
def test_a_frozen_parameter_stays_as_it_is(run: Run, overrides: tuple[str, ...]) -> None:
    experiment = changed(run, *overrides)
    with parallel.process_group(CPU):
        model = MultiTaskModel(experiment, run.encoder, run.labels, CPU)
        frozen, *others = model.dense.parameters()
        frozen.requires_grad_(False)
        state = build_state(experiment, model, run.labels, batch_size=128, total_steps=50, device=CPU)
        before = [each.detach().clone() for each in (frozen, *others)]
        train_step(state, state_and_batch(run)[1])
        assert torch.equal(frozen, before[0])
        assert any(not torch.equal(now, then) for now, then in zip(others, before[1:], strict=True))
        assert {key for key in state.tensors() if key.startswith("dense_state.")}


def test_flat_gradients_take_what_lies_in_memory_as_it_likes() -> None:
    parameters = [nn.Parameter(torch.zeros(3, 5)), nn.Parameter(torch.zeros(4))]
    flat, wide = FlatGradients(parameters), torch.randn(3, 8)
    flat.take([wide[:, :5], wide.bfloat16()[0, ::2]])
    assert torch.equal(flat.buffer[:15].view(3, 5), wide[:, :5])
    assert torch.equal(parameters[1].grad, wide.bfloat16()[0, ::2].float())
    assert parameters[0].grad.data_ptr() == flat.buffer.data_ptr()
    FlatGradients([]).take([])
