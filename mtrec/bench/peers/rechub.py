"""torch-rechub on the reference workload, as its examples/ranking/run_ali_ccp_multi_task.py trains an MMoE.

Arrays in memory through `DataGenerator` (its data sets give row by row what its loader, in this process, puts together to
batches), `MMOE`, `MTLTrainer` with its defaults: Adam over all rows of all tables, weight decay 1e-5, losses' mean. The list is a
`SequenceFeature` with its default, the mean; experts, gates and towers have batch norms, which cannot be left out.

Timed: `train_one_epoch` of the trainer, over whole shuffled batches, after one over `warmup` batches, in which Adam makes its
state; it is `fit` without the validation, the copies of the best weights and the file of the model. Then its `predict`, from
arrays to a list of lists, over the same rows. Not timed: reading Parquet, which happens before.
"""

import time

import torch
from torch.utils.data import DataLoader

from .workload import Rows, Workload, answer, asked, read, speeds


def measure(work: Workload) -> tuple[float, float]:
    """Rows/s of training and of prediction."""
    from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature  # type: ignore[import-not-found]
    from torch_rechub.models.multi_task import MMOE  # type: ignore[import-not-found]
    from torch_rechub.trainers import MTLTrainer  # type: ignore[import-not-found]
    from torch_rechub.utils.data import DataGenerator, PredictDataset  # type: ignore[import-not-found]

    torch.manual_seed(1)
    rows = read(work)
    features = [SparseFeature(name, vocab_size=size, embed_dim=work.embedding_dim) for name, size in work.ids.items()]
    features += [
        SequenceFeature(name, vocab_size=size, embed_dim=work.embedding_dim, pooling="mean", padding_idx=0)
        for name, size in work.sequences.items()
    ]
    features += [DenseFeature(name) for name in work.numbers]
    tasks = ["classification", "classification", "regression"]
    towers = [{"dims": work.tower_layers} for _ in tasks]
    model = MMOE(features, tasks, work.num_experts, expert_params={"dims": work.expert_layers}, tower_params_list=towers)
    trainer = MTLTrainer(model, task_types=tasks, n_epoch=1)

    def train(part: Rows) -> float:
        x, y = part.features, part.labels
        loaders = DataGenerator(x, y).generate_dataloader(x_val=x, y_val=y, x_test=x, y_test=y, batch_size=work.batch_size)
        started = time.perf_counter()
        trainer.train_one_epoch(loaders[0])
        return len(y) / (time.perf_counter() - started)

    def predict(part: Rows) -> float:
        loader = DataLoader(PredictDataset(part.features), batch_size=work.batch_size, shuffle=False)
        started = time.perf_counter()
        predicted = trainer.predict(model, loader)
        return len(predicted) / (time.perf_counter() - started)

    return speeds(work, rows, train, predict)


if __name__ == "__main__":
    answer(*measure(asked()))
