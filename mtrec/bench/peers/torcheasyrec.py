"""TorchEasyRec's own training, `tzrec.main.train_and_evaluate`, with the clock read after each step of its pipeline.

Imported by the peer's interpreter, which has no mtrec; `pipelines/benchmark/torcheasyrec.py` writes the pipeline config and
starts it, one process a rank. Nothing of what it computes is changed: `progress` of the train pipeline that it makes is called as
it is, then the time is noted.

Packages of `NEVER_CALLED` that are not installed are replaced by stubs: TorchEasyRec imports them for features that its own
feature generator makes, for samplers, MaxCompute and Kafka, and training on encoded Parquet (`fg_mode: FG_NONE`) calls none of
them. While TorchEasyRec is imported a stub has any attribute; to call one raises at once, and from then on every access does.
"""

import collections
import gc
import importlib
import importlib.abc
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

NEVER_CALLED = ("alibabacloud_credentials", "common_io", "confluent_kafka", "graphlearn", "odps", "pyfg")
LOSSES = 5  # steps


class NotInstalled(AttributeError):
    """Something of a stub was used. An AttributeError: whoever looks through all modules that are loaded expects no other."""


class Absent:
    """What a stub has under any name, while TorchEasyRec is imported."""

    sealed = False

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Absent":
        return absent(self._name, name)

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        raise NotInstalled(f"{self._name} was called, of a package that is not installed.")


def absent(owner: str, name: str) -> Absent:
    """`owner.name`. Raises NotInstalled once the import is over, and always for what Python itself asks for (`__file__`)."""
    if Absent.sealed or name.startswith("__"):
        raise NotInstalled(f"{owner}.{name} was used, of a package that is not installed.")
    return Absent(f"{owner}.{name}")


class Stub(ModuleType):
    """A module, or package, that is not installed."""

    def __getattr__(self, name: str) -> Absent:
        return absent(self.__name__, name)


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the packages of `NEVER_CALLED` and all their modules; asked last, so only for what is not installed.

    Attributes:
        made: the packages that it was asked for.
    """

    def __init__(self) -> None:
        self.made: list[str] = []

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See importlib."""
        package = fullname.partition(".")[0]
        if package not in NEVER_CALLED:
            return None
        if package not in self.made:
            self.made.append(package)
        return importlib.util.spec_from_loader(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See importlib."""
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """See importlib."""


class Clock:
    """When each step of the pipelines made by `create` was done, and the losses of the first and the last ones on this rank."""

    def __init__(self, create: Any) -> None:
        self.create = create
        self.times: list[float] = []
        self.first: list[dict[str, Any]] = []
        self.last: collections.deque[dict[str, Any]] = collections.deque(maxlen=LOSSES)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        pipeline = self.create(*arguments, **options)
        progress = pipeline.progress

        def timed(batches: Any) -> Any:
            """`progress`, as it is; then the time, and its losses."""
            done = progress(batches)
            self.times.append(time.perf_counter())
            if len(self.first) < LOSSES:
                self.first.append(done[0])
            self.last.append(done[0])
            return done

        pipeline.progress = timed
        return pipeline


def mean_loss(steps: Iterable[dict[str, Any]]) -> float:
    """The mean of the sum of all losses. Raises ValueError where it is not finite."""
    sums = [sum(float(each) for each in losses.values()) for losses in steps]
    if not math.isfinite(sum(sums)):
        raise ValueError(f"The training diverged: losses {sums}.")
    return sum(sums) / len(sums)


def measure(source: str, config: str, batch_size: int, warmup: int, steps: int) -> dict[str, Any]:
    """Rows/s of all ranks from the end of step `warmup` to that of the last one.

    Args:
        source: folder with the package `tzrec`.
        config: file of the pipeline config; its num_steps is `warmup` + `steps`.
        batch_size: rows of a step, of all ranks together.
    """
    stubs = Stubs()
    sys.meta_path.append(stubs)
    sys.path.insert(0, source)
    main = importlib.import_module("tzrec.main")
    Absent.sealed = True
    clock = Clock(main.create_train_pipeline)
    main.create_train_pipeline = clock  # type: ignore[attr-defined]
    main.train_and_evaluate(config)
    if len(clock.times) != warmup + steps:
        raise ValueError(f"{warmup} + {steps} steps were asked for. {len(clock.times)} were made.")
    seconds = clock.times[-1] - clock.times[warmup - 1]
    return {
        "rows_per_second": steps * batch_size / seconds,
        "first_loss": mean_loss(clock.first),
        "last_loss": mean_loss(clock.last),
        "stubs": sorted(stubs.made),
        "versions": {name: metadata.version(name) for name in ("torch", "torchrec", "pyarrow", "protobuf")},
    }


def leave() -> NoReturn:
    """Ends this rank once all have come here. A usual exit aborts now and then: the process group is left to it, with threads."""
    gc.collect()  # its data loader: ends the processes that read
    importlib.import_module("torch.distributed").barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    found = measure(**json.loads(sys.argv[1]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[2]).write_text(json.dumps(found))
    leave()
