"""The yardstick: what a competent engineer would write in an afternoon, in plain torch and fbgemm, with all data in memory.

Fused embedding tables with row-wise Adagrad, one module an expert, no reader, no encoder, no ranks, no balancing, no checks.
Ratios to it can be repeated on any machine.  Legend: B rows, D width of the shared representation.
"""

import time
from collections.abc import Sequence
from itertools import pairwise

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import Tensor, nn
from torch.nn import functional

from mtrec.batch import Batch
from mtrec.experiment import Experiment
from mtrec.features import Table


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between and after them."""
    layers: list[nn.Module] = []
    for narrow, wide in pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers)


class BareModel(nn.Module):
    """MMoE over fused tables, with experts, gates and towers as lists of modules.

    Args:
        tables: of the encoder, each of one feature or several, in the order of the batch's keys.
        experiment: its architecture must be an `mmoe`; three tasks: binary, binary, positive seconds.
    """

    def __init__(self, tables: Sequence[Table], num_dense: int, experiment: Experiment, device: torch.device) -> None:
        super().__init__()
        options = experiment.model.architecture.options
        num_experts, expert_layers = options["num_experts"], options["expert_layers"]
        on_gpu = device.type == "cuda"
        self.tables = SplitTableBatchedEmbeddingBagsCodegen(
            [
                (
                    table.num_embeddings,
                    table.dim,
                    EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST,
                    ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU,
                )
                for table in tables
            ],
            optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
            learning_rate=0.1,
            eps=1e-8,
            device=device,
        )
        self.tables.init_embedding_weights_uniform(-0.01, 0.01)
        width = num_dense + sum(table.dim for table in tables)
        tasks = len(experiment.tasks)
        self.experts = nn.ModuleList([perceptron([width, *expert_layers]) for _ in range(num_experts)])
        self.gates = nn.ModuleList([nn.Linear(width, num_experts, bias=False) for _ in range(tasks)])
        self.towers = nn.ModuleList(
            [
                nn.Sequential(
                    perceptron([expert_layers[-1], *experiment.model.tower_layers]),
                    nn.Linear(experiment.model.tower_layers[-1], 1),
                )
                for _ in range(tasks)
            ]
        )
        self.to(device)

    def forward(self, values: Tensor, offsets: Tensor, dense_BF: Tensor) -> list[Tensor]:
        """Logits (B,) of each task."""
        x_BD = torch.cat([dense_BF, self.tables(values, offsets)], dim=1)
        experts_BEH = torch.stack([expert(x_BD) for expert in self.experts], dim=1)
        logits = []
        for gate, tower in zip(self.gates, self.towers, strict=True):
            mixed_BH = torch.einsum("be,beh->bh", gate(x_BD).softmax(1), experts_BEH)
            logits.append(tower(mixed_BH).squeeze(1))
        return logits


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """(values, offsets, dense_BF, labels) of a batch; unobserved labels as 0."""
    labels = [label.nan_to_num() for label in batch.labels.values()]
    return batch.sparse.values().long(), batch.sparse.offsets().long(), batch.dense_BF, labels


def train_bare(model: BareModel, batches: Sequence[tuple[Tensor, Tensor, Tensor, list[Tensor]]], steps: int) -> float:
    """Seconds that `steps` steps take: forward, sum of three losses, backward (the tables step in it), Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    on_gpu = batches[0][0].is_cuda
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    for step in range(steps):
        values, offsets, dense_BF, (click, conversion, dwell) = batches[step % len(batches)]
        logits = model(values, offsets, dense_BF)
        loss = (
            functional.binary_cross_entropy_with_logits(logits[0], click)
            + functional.binary_cross_entropy_with_logits(logits[1], conversion)
            + functional.mse_loss(logits[2], dwell.log1p())
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started
