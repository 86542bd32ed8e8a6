"""The trials of a search as Ray Tune trials: Optuna draws (TPE; Bergstra et al. 2011), ASHA stops; see mtrec/jobs/trials.py.

The driver is the only one that draws and writes results; a trial only trains its folder. So a search that was cut short is
taken up from its folders: finished trials are told to a new Optuna study, and what had no result is given out first. ASHA's
rungs begin anew.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from ray.tune import Callback
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler
from ray.tune.search.optuna import OptunaSearch

from mtrec.checkpoint import to_resume
from mtrec.compare.space import Parameter
from mtrec.jobs.train import train_on_ray
from mtrec.jobs.trials import MAX_FAILURES, enter, remaining, run_trials, slot_on_ray
from mtrec.run import Run
from mtrec.tune.plan import Objective, Plan
from mtrec.tune.trials import (
    AS_WRITTEN,
    WHOLE,
    best_validation,
    drawn,
    folder_of,
    make_trial,
    read_result,
    train_trial,
    values_at,
    write_result,
)

ALMOST_ONE = 1.0 - 1e-9
POLL_SECONDS = 0.2


def search_on_ray(
    plan: Plan,
    folder: Path,
    *,
    workers: int = 1,
    parallel: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Makes the trials of a search that are missing in its folder, which every node must see.

    Args:
        workers: a trial trains on so many.
        parallel: trials at a time; None: as many as the cluster's CPUs (or GPUs) allow.
        say: gets a line whenever a trial is over, and where the first one has to wait until something is free.

    A trial that fails is written down as failed, and the search goes on. Raises CheckpointError, before any trial starts, where
    one is to go on and none of its checkpoints can be trusted.
    """
    known = drawn(folder)
    unfinished = [number for number in known if read_result(folder, number) is None]
    for number in unfinished:
        to_resume(folder_of(folder, number) / "checkpoints")
    fresh = [number for number in range(plan.trials + 1) if number not in known]
    numbers = [*unfinished, *fresh]
    if not numbers:
        return
    slot = slot_on_ray(workers, parallel, say)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    spec = {**slot.spec(), "objectives": [[each.name, each.larger] for each in plan.objectives]}
    asha = plan.asha
    scheduler = FIFOScheduler()
    if asha is not None:
        scheduler = AsyncHyperBandScheduler(
            time_attr="share",
            metric=_key(0),
            mode=_mode(plan.objectives[0]),
            max_t=WHOLE,
            grace_period=max(1, round(WHOLE * asha.grace)),
            reduction_factor=asha.reduction_factor,
        )
    run_trials(
        folder,
        _trial,
        slot,
        {},
        search_alg=_Search(plan, folder, numbers, spec),
        scheduler=scheduler,
        num_samples=len(numbers),
        callbacks=[_Results(plan, folder, len(numbers), slot.at_once, say)],
    )


def _key(index: int) -> str:
    return f"objective_{index}"


def _mode(objective: Objective) -> str:
    return "max" if objective.larger else "min"


def distribution(parameter: Parameter) -> BaseDistribution:
    """What Optuna draws for a parameter: the number of a choice, else the share of its range (where a log scale is even)."""
    if parameter.choice is not None:
        return CategoricalDistribution(list(range(len(parameter.choice))))
    return FloatDistribution(0.0, ALMOST_ONE)


def share_of(parameter: Parameter, number: float) -> float:
    """The share in [0, 1) that a draw of `distribution` stands for."""
    return float(number) if parameter.choice is None else (number + 0.5) / len(parameter.choice)


class _Search(OptunaSearch):  # type: ignore[misc]
    """Optuna's draws with the number of their trial and its folder; the experiment as written is one more, not drawn."""

    def __init__(self, plan: Plan, folder: Path, numbers: list[int], spec: dict[str, Any]) -> None:
        self._plan, self._folder, self._waiting, self._spec = plan, folder, list(numbers), spec
        space = plan.search.parameters
        # names by position: a path may hold a slash, which Ray takes for nesting
        self._names = {f"p{index}": path for index, path in enumerate(space)}
        known = drawn(folder)
        again = [self._coded(known[number]["shares"]) for number in numbers if number in known and number != AS_WRITTEN]
        keys, modes = [_key(index) for index in range(len(plan.objectives))], [_mode(each) for each in plan.objectives]
        super().__init__(
            {name: distribution(space[path]) for name, path in self._names.items()},
            metric=keys if len(keys) > 1 else keys[0],
            mode=modes if len(modes) > 1 else modes[0],
            points_to_evaluate=again,
            # so that a search that goes on does not draw again what it drew
            seed=plan.search.seed + 1_000 * (len(known) - len(again)),
        )
        for number, trial in known.items():
            found = read_result(folder, number)
            if number != AS_WRITTEN and found is not None and found["objectives"]:
                self._ot_study.add_trial(
                    create_trial(
                        state=TrialState.COMPLETE,
                        values=[found["objectives"][each.name] for each in plan.objectives],
                        params=self._coded(trial["shares"]),
                        distributions=self._space,
                    )
                )
        self._undrawn = set[str]()

    def _coded(self, shares: dict[str, float]) -> dict[str, float]:
        space, found = self._plan.search.parameters, {}
        for name, path in self._names.items():
            choice = space[path].choice
            found[name] = shares[path] if choice is None else int(shares[path] * len(choice))
        return found

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """Makes the next trial's folder, with values that Optuna suggests unless it is the experiment as written."""
        number, shares = self._waiting.pop(0), dict[str, float]()
        if number == AS_WRITTEN:
            self._undrawn.add(trial_id)
        else:
            space = self._plan.search.parameters
            found = super().suggest(trial_id)
            assert found is not None
            shares = {self._names[name]: share_of(space[self._names[name]], value) for name, value in found.items()}
        place = make_trial(self._plan, self._folder, number, shares)
        return {"spec": {**self._spec, "trial": str(place.absolute()), "number": number}}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id not in self._undrawn:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id not in self._undrawn:
            super().on_trial_complete(trial_id, result, error)


class _Results(Callback):  # type: ignore[misc]
    """Writes result.json of every trial that is over, and says so."""

    def __init__(self, plan: Plan, folder: Path, total: int, at_once: int, say: Callable[[str], None]) -> None:
        self._plan, self._folder, self._total, self._at_once, self._say = plan, folder, total, at_once, say
        self._done, self._began = 0, time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_say": None}  # Tune writes itself down, which is never read here; a terminal cannot be

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._over(trial, None)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._over(trial, f"its process died {MAX_FAILURES + 1} times")

    def _over(self, trial: Any, error: str | None) -> None:
        number = trial.config["spec"]["number"]
        found = write_result(self._plan, self._folder, number, error)
        self._done += 1
        values = ", ".join(f"{name} {value:.4f}" for name, value in found["objectives"].items())
        state = {"finished": values, "stopped": f"{values}, stopped at step {found['steps']} of {found['total_steps']}"}
        name = "the experiment as written" if number == AS_WRITTEN else f"trial {number}"
        what = state.get(found["state"], f"failed: {(found['error'] or '').splitlines()[0] if found['error'] else ''}")
        self._say(f"{name}: {what} ({remaining(self._done, self._total, time.monotonic() - self._began)})")


def _trial(config: dict[str, Any]) -> None:
    """What a Tune trial runs."""
    from ray import tune

    spec = config["spec"]
    device, place = enter(spec), Path(spec["trial"])
    objectives = tuple(Objective(name, larger) for name, larger in spec["objectives"])

    def report(share: int, values: list[float]) -> None:
        if spec["number"] != AS_WRITTEN:  # what the others are measured against always goes to its end
            tune.report({"share": share, **{_key(index): value for index, value in enumerate(values)}})

    train_trial(place, objectives, device, report, _on_workers(spec) if spec["workers"] > 1 else None)
    best = best_validation(Run(place), objectives)
    assert best is not None
    tune.report({"share": WHOLE, **{_key(index): value for index, value in enumerate(values_at(best, objectives))}})


def _on_workers(spec: dict[str, Any]) -> Callable[[Run, Callable[[], None]], None]:
    """Trains on Ray Train's workers, which are asked to stop when the trial is."""

    def train(run: Run, tell: Callable[[], None]) -> None:
        """Trains in a thread, and calls `tell` meanwhile, whose SystemExit asks the workers to stop."""
        from mtrec.jobs import recovery

        errors: list[BaseException] = []

        def go() -> None:
            try:
                train_on_ray(run.folder, spec["workers"], spec["gpu"], run.experiment.training.max_failures)
            except BaseException as error:  # raised again below, in the trial's own thread
                errors.append(error)

        thread = threading.Thread(target=go)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(POLL_SECONDS)
                tell()
        except SystemExit:  # of `tell`: ASHA has stopped this trial
            (run.folder / recovery.STOP).touch()
            thread.join()
            raise
        if errors:
            raise errors[0]

    return train
