"""The helpers beside the tests (logs, ranks, runs, oracles, ...) are importable from all of them, spawned ranks included."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from torch import Tensor

    from mtrec.architectures import fan_out

HERE = str(Path(__file__).parent)
sys.path.insert(0, HERE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH")]))
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would give its workers a thirtieth of a core that other tests want

# The same examples at every run, so that a commit that passed goes on passing; MTREC_HYPOTHESIS=explore draws new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile(os.environ.get("MTREC_HYPOTHESIS", "repeatable"))


def _starts_ray(item: pytest.Item) -> bool:
    return Path(HERE) / "jobs" in item.path.parents


def pytest_itemcollected(item: pytest.Item) -> None:
    """For `pytest -n 2 --dist loadgroup`: what starts Ray clusters runs in one of the processes, which mostly waits, the files of
    the rest in the other.
    """
    item.add_marker(pytest.mark.xdist_group("ray" if _starts_ray(item) else str(item.path)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest group first."""
    items.sort(key=lambda item: not _starts_ray(item))


def pytest_configure(config: pytest.Config) -> None:
    """Groups that are passed over in silence cost minutes: Ray's clusters then start in both processes at once."""
    if config.getoption("dist", default="no") == "loadgroup" and not hasattr(pytest.Item, "_nodeid"):
        raise pytest.UsageError(
            f"pytest-xdist cannot keep groups together with pytest {pytest.__version__}: install what pyproject.toml asks for."
        )


@pytest.fixture(autouse=True)
def no_ray_beside_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray that a command starts beside its imports would live on in the process of the tests, and a command that ends while
    it is starting ends the process at once.
    """
    monkeypatch.setattr("mtrec.jobs.connection.connect_beside", lambda: None)


@pytest.fixture(params=["as torch does", "as one product"])
def own_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products as small as the tests' are torch's; with the second, first layers that read the same are one product of ours."""
    if request.param == "as torch does":
        yield
        return
    from mtrec.architectures import fan_out, products

    monkeypatch.setattr(products, "_LEAST_SIZE", 1)
    monkeypatch.setattr(products, "_LEAST_PRODUCTS", 1)
    taken: list[bool] = []
    real = fan_out._is_one_product

    def noted(x: "Tensor", readers: "Sequence[fan_out.Maps]") -> bool:
        taken.append(real(x, readers))
        return taken[-1]

    monkeypatch.setattr(fan_out, "_is_one_product", noted)
    yield
    assert any(taken)
