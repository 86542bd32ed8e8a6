"""Scoring on Ray: actors that hold the model and score one piece after the other. Nothing but pieces and events travels."""

import contextlib
import logging
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mtrec.events import Failed
from mtrec.formula import ranking_formula
from mtrec.jobs.resources import tell_wait, whole_cluster
from mtrec.run import open_run
from mtrec.score import Scorer, check_golden, check_memory, free_memory, open_scorer
from mtrec.scored_files.inputs import Piece
from mtrec.scored_files.job import Done, Event, Progress, Spread, Work, scored

MAX_DEATHS = 3  # of actors at one piece, or as they load the model: what kills a process (memory, as a rule) kills the next, too


def scoring_workers(asked: int | None, say: Callable[[str], None] = lambda line: None) -> int:
    """How many actors: as many as asked, else one a GPU of the cluster, or one a CPU. Raises ValueError where there are fewer.

    `say` gets a line where the first one has to wait until something is free.
    """
    cluster = whole_cluster()
    there = cluster.of(cluster.kind)
    if asked is not None and asked > there:
        raise ValueError(f"--workers {asked} needs {asked} {cluster.kind}s. The Ray cluster has {there}.")
    tell_wait({cluster.kind: 1}, say)
    return asked if asked is not None else max(1, there)


def score_on_ray(workers: int) -> Spread:
    """Scores pieces on at most `workers` actors; for `score_files`."""

    def spread(work: Work, pieces: Sequence[Piece]) -> Iterator[Event]:
        return _Crew(work, pieces, min(workers, len(pieces))).events()

    return spread


class _Actor:
    """What runs on a worker: the model, loaded once."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._stack = contextlib.ExitStack()
        self._scorer: Scorer | None = None

    def open(self) -> Progress:
        """Loads the model and compares the golden rows."""
        for name in ("torchrec.distributed.planner", "torch.fx", "torchrec"):
            logging.getLogger(name).setLevel(logging.ERROR)
        run = open_run(self._work.run)
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        check_memory(run.encoder, free_memory(device), f"node {socket.gethostname()}")
        formula = ranking_formula(run.experiment, self._work.formula)
        self._scorer = self._stack.enter_context(open_scorer(run, self._work.checkpoint, formula, device))
        return Progress(golden=check_golden(self._scorer, run, self._work.checkpoint))

    def score(self, index: int, piece: Piece) -> Iterator[Event]:
        assert self._scorer is not None
        yield from scored(self._scorer, index, piece, self._work.request)


class _Crew:
    """The actors of one job. An actor that dies is replaced and its piece begun anew; what it had finished stays."""

    def __init__(self, work: Work, pieces: Sequence[Piece], workers: int) -> None:
        cluster = whole_cluster()
        import ray

        encoder, use_gpu = open_run(work.run).encoder, cluster.gpus >= 1
        if cluster.memory and not use_gpu:  # each actor looks at its own GPU's
            check_memory(encoder, cluster.memory, "the Ray cluster", workers)
        self._class = ray.remote(_Actor).options(num_cpus=0 if use_gpu else 1, num_gpus=1 if use_gpu else 0)
        self._work, self._pieces, self._workers = work, pieces, workers
        self._left = deque(range(len(pieces)))
        self._opening: dict[Any, Any] = {}  # reference of open() -> actor
        self._busy: dict[Any, tuple[Any, int]] = {}  # generator of events -> (actor, number of its piece)
        self._deaths: Counter[int | None] = Counter()  # by piece; None: while the model was loaded

    def events(self) -> Iterator[Event]:
        """Until every piece is done. Raises what an actor raised (a golden row that differs), or Failed for many deaths."""
        import ray

        try:
            for _ in range(self._workers):
                self._hire()
            while self._left or self._busy:
                ready, _ = ray.wait([*self._opening, *self._busy], num_returns=1)
                yield from self._opened(ready[0]) if ready[0] in self._opening else self._heard(ready[0])
        finally:
            for actor in [*self._opening.values(), *(actor for actor, _ in self._busy.values())]:
                ray.kill(actor)

    def _hire(self) -> None:
        actor = self._class.remote(self._work)
        self._opening[actor.open.remote()] = actor

    def _opened(self, reference: Any) -> Iterator[Event]:
        import ray

        actor = self._opening[reference]
        try:
            yield ray.get(reference)
        except _gone() as error:
            del self._opening[reference]
            self._replace(actor, None, error)
            return
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # the error itself, not Ray's text around it
        del self._opening[reference]
        self._deaths[None] = 0
        self._give_work(actor)

    def _give_work(self, actor: Any) -> None:
        if self._left:
            index = self._left.popleft()
            generator = actor.score.options(num_returns="streaming").remote(index, self._pieces[index])
            self._busy[generator] = (actor, index)

    def _heard(self, generator: Any) -> Iterator[Event]:
        import ray

        actor, index = self._busy[generator]
        try:
            event: Event = ray.get(next(generator))
        except StopIteration:
            del self._busy[generator]
            self._give_work(actor)
            return
        except _gone() as error:
            del self._busy[generator]
            self._left.appendleft(index)
            self._replace(actor, index, error)
            return
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        if isinstance(event, Done) or event.rows:
            yield event

    def _replace(self, actor: Any, index: int | None, error: Exception) -> None:
        import ray

        ray.kill(actor)  # one that is only out of reach must not write the piece beside the next one
        if not getattr(error, "preempted", False):  # a node that is taken away says nothing of the piece
            self._deaths[index] += 1
        if self._deaths[index] > MAX_DEATHS:
            what = "loading the model" if index is None else f"'{self._pieces[index].file.shown}'"
            raise Failed(
                f"{self._deaths[index]} scoring processes died at {what}, most likely for want of memory: take fewer --workers. "
                f"What is finished stays; the same command goes on there. The last one: {str(error).strip().splitlines()[0]}"
            ) from None
        self._hire()


def _gone() -> tuple[type[Exception], ...]:
    """What Ray raises for an actor that is gone, or was killed by its memory monitor."""
    from ray import exceptions

    return exceptions.RayActorError, exceptions.OutOfMemoryError, exceptions.NodeDiedError, exceptions.ObjectLostError
