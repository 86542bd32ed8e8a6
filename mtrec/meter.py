"""What a logged step says: mean losses, speed, what the balancer did, how the gates mix."""

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from mtrec import parallel
from mtrec.events import Step
from mtrec.feed import Fed
from mtrec.step import StepResult, TrainState


class Meter:
    """Times and losses between two logged steps."""

    def __init__(self, log_every: int) -> None:
        self._log_every = log_every
        self.restart()

    def restart(self) -> None:
        """Forgets the steps so far; what happens between two steps (saving, validating) is then not counted."""
        self._started, self._waited, self._rows, self._results = time.perf_counter(), 0.0, 0, list[StepResult]()

    def waiting(self, fed: Iterator[Fed]) -> Iterator[Fed]:
        """The same items; takes note of how long each was waited for."""
        while True:
            started = time.perf_counter()
            item = next(fed, None)
            if item is None:
                return
            self._waited += time.perf_counter() - started
            yield item

    def add(self, result: StepResult, rows: int) -> None:
        """Takes note of a step on so many rows of this rank."""
        self._rows += rows
        self._results = [*self._results[-self._log_every + 1 :], result] if self._log_every > 1 else [result]

    def event(self, state: TrainState, epoch: int, total_steps: int) -> Step:
        """Ends the interval, on every rank alike: losses are means over its steps in which the task had a label; gates are
        described as the last of them left them, on x_BD as it had it.
        """
        seconds = max(1e-9, time.perf_counter() - self._started)
        names = state.model.objectives.names
        losses = torch.stack([r.losses_K for r in self._results]).double()
        counted = torch.stack([r.counts_K > 0 for r in self._results]).double() * torch.isfinite(losses)
        mean = (losses.nan_to_num() * counted).sum(0) / counted.sum(0).clamp(min=1)
        rows = torch.tensor([float(self._rows)], device=state.device)
        parallel.all_reduce_sum(rows)
        event = Step(
            step=state.step,
            epoch=epoch,
            total_steps=total_steps,
            losses=dict(zip(names, mean.tolist(), strict=True)),
            weights=dict(zip(names, self._results[-1].weights_K.tolist(), strict=True)),
            balancing=_balancing_scalars(state),
            gates=gate_statistics(state, self._results[-1].x_BD),
            learning_rate=state.schedules.dense_learning_rate(state.step - 1),
            rows_per_second=float(rows) / seconds,
            data_wait=self._waited / seconds,
            nonfinite_steps=state.nonfinite_steps,
        )
        self.restart()
        return event


def _balancing_scalars(state: TrainState) -> dict[str, float]:
    """What the balancer did; norms and cosines of gradients are named for where they were taken."""
    found = {}
    for name, value in state.balancer.describe().items():
        what, _, whose = name.partition("/")
        at = f"_at_{state.balancing.at}" if what in ("gradient_norm", "cosine") else ""
        found[f"{what}{at}/{whose}"] = value
    return found


def gate_statistics(state: TrainState, x_BD: Tensor | None) -> dict[str, float]:
    """Of each gate on these rows of each rank: its mean weights, their entropy (nats) and how many experts get less than 1 %.

    Nothing where no rank has a row.
    """
    if x_BD is None or not hasattr(state.model.dense.architecture, "gates"):
        return {}
    with torch.no_grad(), state.autocast():
        state.model.dense.eval()  # not the tables, which are many modules
        sums = {name: gate_BE.sum(0, dtype=torch.float32) for name, gate_BE in state.model.dense.gates(x_BD).items()}
        state.model.dense.train()
    if not sums:
        return {}
    flat = torch.cat([*sums.values(), torch.tensor([float(len(x_BD))], device=state.device)])
    parallel.all_reduce_sum(flat)
    *total, count = flat.cpu().split([*(len(each) for each in sums.values()), 1])  # a GPU is waited for once
    if not count:
        return {}
    found: dict[str, float] = {}
    for name, total_E in zip(sums, total, strict=True):
        share_E = total_E / count
        found.update({f"{name}/expert{index}": float(value) for index, value in enumerate(share_E)})
        found[f"{name}/entropy"] = float(-(share_E * share_E.clamp(min=1e-12).log()).sum())
        found[f"{name}/dead_experts"] = float((share_E < 0.01).sum())
    return found
