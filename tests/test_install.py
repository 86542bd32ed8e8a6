"""The pinned packages of deploy/: complete, and a set of torch, fbgemm-gpu and torchrec that match."""

import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from mtrec.versions import Installation, installation, mismatch

ROOT = Path(__file__).parents[1]
FBGEMM = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}


def pins(device: str) -> dict[str, str]:
    lines = (ROOT / "deploy" / f"constraints-{device}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in pairs}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


def needs_of(requirement: Requirement) -> list[Requirement]:
    """What an installed package asks for on this machine; nothing of one that is not installed."""
    try:
        texts = distribution(requirement.name).requires or []
    except PackageNotFoundError:
        return []
    extras = [{"extra": extra} for extra in (*requirement.extras, "")]
    needs = map(Requirement, texts)
    return [need for need in needs if need.marker is None or any(need.marker.evaluate(extra) for extra in extras)]


def every_need(roots: list[Requirement]) -> dict[str, set[str]]:
    """{package: who asks for it}, all the way down."""
    found: dict[str, set[str]] = {}
    seen = set()
    waiting = [("pyproject.toml", root) for root in roots]
    while waiting:
        asked_by, requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        found.setdefault(name, set()).add(asked_by)
        if (name, frozenset(requirement.extras)) not in seen:
            seen.add((name, frozenset(requirement.extras)))
            waiting += [(name, need) for need in needs_of(requirement)]
    return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_declared_package_is_pinned_to_an_allowed_version(device: str) -> None:
    pinned = pins(device)
    wrong = [
        str(need)
        for need in declared()
        if (name := canonicalize_name(need.name)) not in pinned or Version(pinned[name]) not in need.specifier
    ]
    assert not wrong


def test_what_is_installed_here_is_pinned_all_the_way_down() -> None:
    device = "cpu" if installation().torch_cuda is None else "cuda"
    pinned = pins(device)
    needs = every_need([*declared(), Requirement("torchrec"), Requirement(FBGEMM[device])])
    assert len(needs) > 80
    if device == "cpu":
        assert needs.pop("fbgemm-gpu") == {"torchrec"}  # which is why torchrec is installed without its needs
    assert not {name: asked_by for name, asked_by in needs.items() if name not in pinned}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_pinned_builds_match_one_another(device: str) -> None:
    pinned = pins(device)
    versions = {name: pinned[name] for name in ("torch", "torchrec", FBGEMM[device])}
    assert pinned.keys() & set(FBGEMM.values()) == {FBGEMM[device]}
    cuda = None if device == "cpu" else "13.0"
    assert mismatch(Installation(versions, torch_cuda=cuda, driver_cuda=cuda)) == ""
    assert pinned["torch"].endswith("+cpu") == (device == "cpu")
    assert device != "cpu" or not [name for name in pinned if name.startswith("nvidia")]
