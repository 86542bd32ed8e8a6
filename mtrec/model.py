"""MultiTaskModel = embeddings + interaction + architecture + towers + heads, built from an experiment and what its fit found.

Legend: B rows on this rank, D width of the shared representation, C logits of a head.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtrec.architectures import ARCHITECTURES, Towers
from mtrec.batch import Batch
from mtrec.dropout import Dropout
from mtrec.embeddings import Embeddings
from mtrec.experiment import Experiment
from mtrec.features import Encoder
from mtrec.interactions import INTERACTIONS
from mtrec.kinds import check_members, check_options, resolve
from mtrec.labels import LabelStatistics
from mtrec.tasks import TASKS, Objectives, TaskSpec, automatic_weight

TASK_ATTRIBUTES = ("family", "num_logits", "label_range", "label_scale")
ANY_WIDTH = 64  # of x_BD, for a look at the structure of the dense part


def task_specs(experiment: Experiment) -> dict[str, TaskSpec]:
    """The tasks of an experiment, built from their kinds."""
    specs = {}
    for name, task in experiment.tasks.items():
        task_class = resolve(task.kind, TASKS, f"tasks.{name}.kind")
        options = check_options(task_class, task.options, f"tasks.{name}")
        made = task_class(name, **options)
        check_members(made, TASK_ATTRIBUTES, task.kind, f"tasks.{name}.kind")
        specs[name] = TaskSpec(made, given=task.given, space=task.space)
    return specs


def check_buffers(experiment: Experiment) -> None:
    """Raises ValueError where a module of the dense part keeps numbers of its own beside its parameters, as batch norm does.

    Each rank would have others, and checkpoints hold parameters alone. Builds the dense part on `meta`: milliseconds, no data.
    """
    with torch.device("meta"):
        dense = DensePart(ANY_WIDTH, experiment, task_specs(experiment))
    parameters = {name for name, _ in dense.named_parameters(remove_duplicate=False)}
    for name in dense.state_dict():
        if name not in parameters:
            owner = type(dense.get_submodule(name.rpartition(".")[0])).__name__
            raise ValueError(
                f"`model`: {owner} keeps the buffer `{name}`, which checkpoints do not hold and workers do not share. Use layer "
                "norm in place of batch norm; a constant is registered with persistent=False."
            )


class DensePart(nn.Module):
    """x_BD -> {task: logits_BC}: everything above the tables, the same on every rank."""

    def __init__(self, input_dim: int, experiment: Experiment, specs: Mapping[str, TaskSpec]) -> None:
        super().__init__()
        config, names = experiment.model, list(specs)
        interaction = resolve(config.interaction.kind, INTERACTIONS, "model.interaction.kind")
        options = check_options(interaction, config.interaction.options, "model.interaction")
        self.dropout = Dropout(config.dropout)
        self.interaction = interaction(input_dim, **options)
        check_members(self.interaction, ["output_dim"], config.interaction.kind, "model.interaction.kind")
        architecture = resolve(config.architecture.kind, ARCHITECTURES, "model.architecture.kind")
        options = check_options(architecture, config.architecture.options, "model.architecture")
        self.architecture = architecture(self.interaction.output_dim, names, **options)
        check_members(self.architecture, ["output_dim"], config.architecture.kind, "model.architecture.kind")
        self.towers = Towers(names, self.architecture.output_dim, config.tower_layers)
        self.heads = nn.ModuleDict(
            {
                f"head_{name}": nn.Linear(self.towers.output_dims[name], spec.task.num_logits)
                for name, spec in specs.items()
            }
        )

    def forward(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{task: (B, outputs) float32 logits} of (B, D) pooled embeddings and dense columns."""
        towers = self.towers(self.architecture(self.interaction(self.dropout(x_BD))))
        # losses are computed in float32 whatever the precision of the matrix products
        return {name: self.heads[f"head_{name}"](tower_BH).float() for name, tower_BH in towers.items()}

    def gates(self, x_BD: Tensor) -> dict[str, Tensor]:
        """{gate: weights (B, E)} of the architecture, for the log."""
        found: dict[str, Tensor] = self.architecture.gates(self.interaction(x_BD))
        return found

    @property
    def begins_at_x(self) -> bool:
        """Whether the architecture reads x_BD itself: neither dropout nor an interaction with parameters lies between."""
        return self.dropout.p == 0.0 and next(self.interaction.parameters(), None) is None

    def shared_parameters(self) -> list[nn.Parameter]:
        """The parameters that more than one task's loss reaches; of one task all, so that its gradient has a norm."""
        if len(self.heads) == 1:
            return [*self.parameters()]
        return [*self.interaction.parameters(), *self.architecture.shared_parameters()]

    def flops_per_row(self) -> int:
        """Floating-point operations of one forward pass of one row (a multiply-add is two); training takes three times that."""
        heads = sum(2 * head.weight.numel() for head in self.heads.values() if isinstance(head, nn.Linear))
        return int(
            self.interaction.flops_per_row() + self.architecture.flops_per_row() + self.towers.flops_per_row() + heads
        )


class MultiTaskModel(nn.Module):
    """The model of an experiment.

    Args:
        experiment: the checked configuration.
        encoder: the fitted encoder (tables, dense features).
        labels: label statistics of the training rows (output biases).
        device: `meta` to count only; else where the dense part lives. Tables are made on `meta`, to be sharded.

    The initial weights depend on `experiment.seed` alone, not on the number of ranks.
    """

    def __init__(
        self, experiment: Experiment, encoder: Encoder, labels: Mapping[str, LabelStatistics], device: torch.device
    ) -> None:
        super().__init__()
        self.specs = task_specs(experiment)
        self.objectives = Objectives(self.specs)
        clip_value = experiment.optimizer.tables.clip_value
        # of dates, buckets: one value a row
        ids_a_row = {name: float(each.get("mean_length", 1.0)) for name, each in encoder.statistics.items()}
        self.embeddings = Embeddings(encoder.tables, encoder.num_dense, torch.device("meta"), clip_value, ids_a_row)
        with torch.random.fork_rng(devices=[]), torch.device("cpu" if device.type == "cuda" else device):
            torch.manual_seed(experiment.seed)
            self.dense = DensePart(self.embeddings.output_dim, experiment, self.specs)
            if device.type != "meta":
                self._set_output_biases(labels)
        self.dense.to(device)

    def _set_output_biases(self, labels: Mapping[str, LabelStatistics]) -> None:
        """Each head starts by predicting its base rate."""
        for name in self.specs:
            statistics = labels[name]
            if statistics.trained:
                bias = self.objectives.initial_bias(name, statistics.mean, statistics.sample_tensor())
                head = self.dense.heads[f"head_{name}"]
                assert isinstance(head, nn.Linear)
                head.bias.data.copy_(bias)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """{task: (B, outputs) float32 logits} of a batch; a collective."""
        logits: dict[str, Tensor] = self.dense(self.embeddings(batch))
        return logits


def loss_weights(
    experiment: Experiment, objectives: Objectives, labels: Mapping[str, LabelStatistics]
) -> dict[str, float]:
    """The static weight of each task; `auto`: 1 / (2 L0), L0 the loss of predicting the base rate, clipped to [0.2, 5]."""
    weights = {}
    for name, task in experiment.tasks.items():
        if task.weight == "auto":
            statistics = labels[name]
            weights[name] = automatic_weight(
                objectives.base_loss(name, statistics.target_mean, statistics.sample_tensor())
            )
        else:
            weights[name] = task.weight
    return weights
