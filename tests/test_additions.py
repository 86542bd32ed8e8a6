"""A newcomer's architecture, task, feature and balancer, from outside of the package, by import path alone."""

import copy
import sys
from pathlib import Path

import pytest
from logs import experiment_tree, write_log
from runs import trained

from mtrec.config import parse_experiment
from mtrec.model import check_buffers, task_specs
from mtrec.prepare import prepare

MODULE = '''
"""What a user writes beside the experiment."""

import torch
from torch import nn

from mtrec.kinds import PositiveInt
from mtrec.tasks import LabelRange


class OneLayer(nn.Module):
    """The same linear layer for all tasks."""

    def __init__(self, input_dim, tasks, *, width: PositiveInt = 6):
        super().__init__()
        self.tasks, self.output_dim = tuple(tasks), width
        self.layer = nn.Linear(input_dim, width)

    def forward(self, x_BD):
        return {task: torch.relu(self.layer(x_BD)) for task in self.tasks}

    def gates(self, x_BD):
        return {}

    def shared_parameters(self):
        return list(self.layer.parameters())

    def flops_per_row(self):
        return 2 * self.layer.weight.numel()


class AtLeast:
    """Whether a number reaches a threshold."""

    family = "binary"
    num_logits, label_scale = 1, 1.0
    label_range = LabelRange(0.0, 1.0, True)

    def __init__(self, name: str, *, smoothing: float = 0.1):
        self.name, self.smoothing = name, smoothing

    def loss(self, logits_BC, labels_B):
        target_B = labels_B * (1 - self.smoothing) + self.smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits_BC[:, 0], target_B, reduction="none")

    def predict(self, logits_BC):
        return logits_BC[:, 0].sigmoid()

    def log_prediction(self, logits_BC):
        return None

    def initial_bias(self, mean, sample_N):
        return torch.logit(torch.tensor([mean]), eps=1e-6)

    def prediction_names(self):
        return (f"p_{self.name}",)


class Widthless(OneLayer):
    """Does not say how wide its output is."""

    def __init__(self, input_dim, tasks):
        super().__init__(input_dim, tasks)
        del self.output_dim


class Unranged(AtLeast):
    """Does not say which labels it takes."""

    label_range = property()


class LargestFirst(nn.Module):
    """All weight on the task with the largest loss."""

    needs_gramian = False

    def __init__(self, tasks, *, boost: float = 2.0):
        super().__init__()
        self.boost = boost

    def forward(self, losses_K, gramian_KK, step, active_K):
        weights_K = torch.ones_like(losses_K)
        weights_K[losses_K.argmax()] = self.boost
        return weights_K
'''


def test_kinds_from_outside_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newcomer_kinds.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    log = write_log(tmp_path / "log", rows=1_000)
    tree = copy.deepcopy(experiment_tree(log, log))
    tree["model"]["architecture"] = {"kind": "newcomer_kinds:OneLayer", "width": 5}
    tree["tasks"]["click"] = {"kind": "newcomer_kinds:AtLeast", "smoothing": 0.2}
    tree["balancing"] = {"kind": "newcomer_kinds:LargestFirst", "boost": 3.0}
    run = prepare(parse_experiment(tree), tmp_path / "run")
    result = trained(str(run.folder))
    assert len(result["losses"]) == 8
    assert result["losses"][-1].isfinite().all()
    assert 0.0 < result["metrics"]["tasks"]["click"]["auc"] < 1.0

    tree["model"]["architecture"] = {"kind": "newcomer_kinds:OneLayer", "widht": 5}
    with pytest.raises(ValueError, match=r"`model.architecture.widht` is not a known key. Did you mean 'width'?"):
        parse_experiment(tree)
    tree["model"]["architecture"] = "newcomer_kinds:Widthless"
    with pytest.raises(ValueError, match=r"`model\.architecture\.kind` should name .* with output_dim\. .*Widthless' without"):
        check_buffers(parse_experiment(tree))
    tree["tasks"]["click"] = {"kind": "newcomer_kinds:Unranged"}
    with pytest.raises(ValueError, match=r"`tasks\.click\.kind` should name a class with family, .* without label_range\."):
        task_specs(parse_experiment(tree))
    sys.modules.pop("newcomer_kinds")
