"""A training's numbers among the metrics that every Ray node exports for Prometheus.

`ray_mtrec_rows_per_second{run}`, `ray_mtrec_step{run}`, `ray_mtrec_loss{run, task}`, `ray_mtrec_validation{run, task, metric}`.
"""

import math

from mtrec.events import Event, Step, Validation


class Gauges:
    """Takes the events of `train()` on one rank of a Ray worker and keeps the newest value of each number."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._run = run
        self._rows = Gauge("mtrec_rows_per_second", "training rows a second, all workers together", ("run",))
        self._step = Gauge("mtrec_step", "steps done", ("run",))
        self._loss = Gauge("mtrec_loss", "training loss since the last logged step", ("run", "task"))
        self._validation = Gauge("mtrec_validation", "metrics of the newest validation", ("run", "task", "metric"))

    def __call__(self, event: Event) -> None:
        if isinstance(event, Step):
            self._rows.set(event.rows_per_second, {"run": self._run})
            self._step.set(event.step, {"run": self._run})
            for task, loss in event.losses.items():
                self._loss.set(loss, {"run": self._run, "task": task})
        elif isinstance(event, Validation):
            for task, found in event.metrics["tasks"].items():
                for metric, value in found.items():
                    if isinstance(value, int | float) and math.isfinite(value):
                        self._validation.set(value, {"run": self._run, "task": task, "metric": metric})
