"""Weights from the norms of the gradients: GradNorm, MetaBalance, DB-MTL.  Legend: K tasks.  n_k = |g_k|."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mtrec.balancing.adam import Adam
from mtrec.balancing.named import task_index
from mtrec.kinds import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Probability

_SMALL = 1e-12


class GradNorm(nn.Module):
    """w descends along sum_k |w_k n_k - target_k|, target_k = mean_j(w_j n_j) r_k^alpha; then sum(w) = K.

    r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0)): a task that has fallen less than the others is given a larger gradient.
    With the target held constant, as in the paper, the derivative is sign(w_k n_k - target_k) n_k: no second backward
    pass. Source: Chen et al. 2018. Deviations: L_k(0) is the mean over the first `warmup_steps` steps with labels of
    the task (a first mini-batch is noise), the weights are 1 until `warmup_steps` steps have been seen; the derivative is
    divided by mean_j(w_j n_j), so that it has no unit; Adam makes the step, which ends at .001 or more (a plain one may end
    below 0) before the sum is restored.

    Options:
        alpha: strength of the pull towards equal training rates.
        learning_rate: of Adam on w.
        warmup_steps: steps with weights of 1, whose mean loss is L_k(0).

    >>> method = GradNorm(["click", "dwell"], warmup_steps=1)
    >>> both = torch.tensor([True, True])
    >>> method.observe(torch.tensor([0.5, 2.0]), 0, both)
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    >>> [round(w, 4) for w in method(torch.tensor([0.5, 2.0]), gramian, 0, both).tolist()]
    [1.025, 0.975]
    """

    needs_gramian = True
    weights_K: Tensor
    initial_sum_K: Tensor
    initial_count_K: Tensor
    steps: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        alpha: NonNegativeFloat = 1.5,
        learning_rate: PositiveFloat = 0.025,
        warmup_steps: PositiveInt = 100,
    ) -> None:
        super().__init__()
        self.alpha = alpha
        self.warmup_steps = warmup_steps
        self.adam = Adam(len(tasks), learning_rate)
        self.register_buffer("weights_K", torch.ones(len(tasks), dtype=torch.float64))
        self.register_buffer("initial_sum_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("initial_count_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, losses_K: Tensor, step: int, active_K: Tensor) -> None:
        """Called at every step, whether or not there is a Gramian: gathers the initial losses."""
        filling_K = active_K & (self.initial_count_K < self.warmup_steps)
        self.initial_sum_K += torch.where(filling_K, losses_K.double(), 0.0)
        self.initial_count_K += filling_K
        self.steps += 1

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: the weights after one step of Adam; as they were, until `observe` has seen `warmup_steps` steps.

        The active tasks that have an L_k(0) step and share the sum they had; the others keep their weights.
        """
        known_K = active_K & (self.initial_count_K > 0)
        if int(self.steps) < self.warmup_steps or not known_K.any():
            return self.weights_K.clone()
        initial_K = (self.initial_sum_K / self.initial_count_K.clamp(min=1.0)).clamp(min=_SMALL)
        gradient_K = norm_gap_gradient(
            self.weights_K, gramian_KK.double().diagonal().sqrt(), losses_K.double() / initial_K, known_K, self.alpha
        )
        stepped_K = self.adam.descend(self.weights_K, gradient_K, known_K).clamp(min=1e-3)
        # The tasks of this solve share what they had, so that all weights together keep the sum K.
        kept = self.weights_K[known_K].sum() / stepped_K[known_K].sum()
        self.weights_K.copy_(torch.where(known_K, stepped_K * kept, self.weights_K))
        return self.weights_K.clone()


def norm_gap_gradient(weights_K: Tensor, norm_K: Tensor, ratio_K: Tensor, active_K: Tensor, alpha: float) -> Tensor:
    """(K,): d/dw of sum_k |w_k n_k - target_k| / mean_j(w_j n_j), target and mean held constant; 0 where not active.

    `ratio_K` is L_k / L_k(0).

    >>> norm_gap_gradient(torch.ones(2), torch.tensor([1.0, 3.0]), torch.ones(2), torch.tensor([True, True]), 1.5)
    tensor([-0.5000,  1.5000])
    """
    weighted_K = weights_K * norm_K
    mean = weighted_K[active_K].mean()
    pace_K = (ratio_K / ratio_K[active_K].mean().clamp(min=_SMALL)).clamp(min=0.0)
    gradient_K = torch.sign(weighted_K - mean * pace_K**alpha) * norm_K / mean
    return torch.where(active_K, gradient_K, 0.0)


class MetaBalance(nn.Module):
    """w_k = relax m_target / m_k + (1 - relax): auxiliary gradients are brought towards the norm of the target's.

    m_k is a moving average of n_k; strategy "reduce" changes only those with m_k > m_target, "enlarge" only those
    below, "both" all. Source: He et al. 2022 (MetaBalance; strategies A, B, C). Deviations: one norm over the whole
    shared part where the paper has one a parameter tensor; the moving average is corrected for its start at 0.

    Options:
        target: a task (default: the first).
        relax: 1: norms become the target's, 0: they stay.
        strategy: which norms change: "reduce" the larger, "enlarge" the smaller, "both".
        decay: share of the past in the moving average.

    >>> method = MetaBalance(["click", "dwell"], relax=0.5)
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 16.0]])
    >>> method(torch.ones(2), gramian, 0, torch.tensor([True, True])).tolist()
    [1.0, 0.625]
    """

    needs_gramian = True
    norm_K: Tensor
    mass_K: Tensor

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        target: str | None = None,
        relax: Probability = 0.7,
        strategy: Literal["reduce", "enlarge", "both"] = "both",
        decay: Fraction = 0.9,
    ) -> None:
        super().__init__()
        self.target = 0 if target is None else task_index(target, tasks, "target")
        self.relax = relax
        self.strategy = strategy
        self.decay = decay
        self.register_buffer("norm_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("mass_K", torch.zeros(len(tasks), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: moves m_k of the active tasks, then relax r_k + 1 - relax, r_k = m_target / m_k; 0 for inactive tasks.

        r_k is at most 1 for "reduce", at least 1 for "enlarge"; active tasks get 1 until the target has had a gradient.
        """
        new_K = torch.where(active_K, gramian_KK.double().diagonal(), 0.0).sqrt()
        # not norm += share * (new - norm): after a far larger norm that would leave nothing of this one
        self.norm_K.copy_(torch.where(active_K, self.decay * self.norm_K + (1.0 - self.decay) * new_K, self.norm_K))
        self.mass_K += active_K.double() * (1.0 - self.decay) * (1.0 - self.mass_K)
        if self.mass_K[self.target] == 0.0:  # no gradient of the target so far: nothing to compare with
            return active_K.double()
        mean_K = torch.where(self.mass_K > 0.0, self.norm_K / self.mass_K, 1.0)
        ratio_K = mean_K[self.target] / mean_K
        if self.strategy == "reduce":
            ratio_K = ratio_K.clamp(max=1.0)
        if self.strategy == "enlarge":
            ratio_K = ratio_K.clamp(min=1.0)
        return torch.where(active_K, self.relax * ratio_K + (1.0 - self.relax), 0.0)


class DBMTL(nn.Module):
    """w_k = max_j(m_j) / m_k / L_k: the gradients of log L_k, each stretched to the norm of the largest.

    m_k^2 is a moving average of |d log L_k|^2 = G_kk / L_k^2, with the share beta / t^sigma for the past, t the number
    of averages. Source: dual balancing (Lin et al. 2023). Deviation: the paper averages the gradients, which a Gramian
    of one step does not show; here their squared norms are averaged. Raises ValueError where a loss is not positive.

    Options:
        beta: share of the past in the moving average, at its start.
        sigma: how fast that share falls, as beta / t^sigma.

    >>> method = DBMTL(["click", "dwell"])
    >>> gramian = torch.tensor([[1.0, 0.0], [0.0, 16.0]])
    >>> method(torch.tensor([0.5, 2.0]), gramian, 0, torch.tensor([True, True])).tolist()
    [2.0, 0.5]
    """

    needs_gramian = True
    square_K: Tensor
    count_K: Tensor

    def __init__(self, tasks: Sequence[str], *, beta: Fraction = 0.9, sigma: NonNegativeFloat = 0.5) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.beta = beta
        self.sigma = sigma
        self.register_buffer("square_K", torch.zeros(len(tasks), dtype=torch.float64))
        self.register_buffer("count_K", torch.zeros(len(tasks), dtype=torch.float64))

    @torch.no_grad()
    def forward(self, losses_K: Tensor, gramian_KK: Tensor, step: int, active_K: Tensor) -> Tensor:
        """(K,) float64: moves m_k of the active tasks, then max_j(m_j) / m_k / L_k over them; 0 for the others.

        Raises ValueError where the loss of an active task is not positive.
        """
        for k in (active_K & (losses_K <= 0.0)).nonzero().flatten().tolist():
            raise ValueError(
                f"`tasks.{self.tasks[k]}` should have a positive loss with `balancing.kind: db_mtl`. "
                f"Found {float(losses_K[k])} at step {step}."
            )
        if not active_K.any():
            return torch.zeros_like(self.square_K)
        loss_K = torch.where(active_K, losses_K.double(), 1.0)
        new_K = torch.where(active_K, gramian_KK.double().diagonal() / loss_K.square(), 1.0)
        self.count_K += active_K
        past_K = torch.where(self.count_K > 1, self.beta / self.count_K.clamp(min=1.0) ** self.sigma, 0.0)
        self.square_K.copy_(torch.where(active_K, (1.0 - past_K) * new_K + past_K * self.square_K, self.square_K))
        norm_K = torch.where(active_K, self.square_K, 1.0).sqrt()
        return torch.where(active_K, norm_K[active_K].max() / norm_K / loss_K, 0.0)
