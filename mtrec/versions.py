"""A wrong mix of torch, fbgemm-gpu and torchrec, said in words before any of them is imported.

torch, fbgemm-gpu and torchrec are built for one another and must be released together; pip does not know that. A wrong
mix ends in undefined symbols or missing libraries when torchrec is imported, so the command asks here first.
"""

import ctypes
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import distributions
from pathlib import Path

# torch -> the fbgemm-gpu and torchrec of the same release (FBGEMM's release table; torchrec keeps the same numbers).
RELEASES = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}
# The CUDA release that fbgemm-gpu on PyPI is built for; builds for another one carry a tag such as +cu126.
PYPI_CUDA = "13.0"
PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")


@dataclass(frozen=True)
class Installation:
    """What is installed here, as far as the check needs it.

    `versions`: package -> version, of PACKAGES, absent ones left out. `torch_cuda`: the CUDA release that torch was
    built for ("13.0"), None for a CPU build. `driver_cuda`: the newest CUDA release that NVIDIA's driver on this
    machine serves, None without a driver. `own_fbgemm`: fbgemm_gpu can be imported though neither package is installed
    (a nightly build, or one from source).
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    torch_cuda: str | None = None
    driver_cuda: str | None = None
    own_fbgemm: bool = False


def check_versions(driver_needed: bool = True) -> None:
    """Raise ValueError that says what does not match and what to do; imports neither torch nor torchrec.

    `driver_needed=False` leaves out what only the machine that trains must have (NVIDIA's driver), for installing.

    >>> check_versions()
    """
    problem = mismatch(installation(), driver_needed)
    if problem:
        raise ValueError(problem)


def mismatch(found: Installation, driver_needed: bool = True) -> str:
    """The first thing that does not match, with what to do about it; the empty string where all is well.

    >>> mismatch(Installation({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}))
    ''
    >>> print(mismatch(Installation({"torch": "2.13.0+cpu", "torchrec": "1.6.1", "fbgemm-gpu-cpu": "1.8.0"})))
    torchrec should be 1.8 beside torch 2.13.0+cpu. Found 1.6.1.
    They are built for one another. `deploy/install.sh cpu` installs versions that match.
    """
    problem = _wrong_mix(found) or (_no_driver(found) if driver_needed else "")
    if not problem:
        return ""
    device = "cuda" if found.driver_cuda else "cpu"
    return f"{problem}\nThey are built for one another. `deploy/install.sh {device}` installs versions that match."


def _wrong_mix(found: Installation) -> str:
    """What no machine could run."""
    versions = found.versions
    for package in ("torch", "torchrec"):
        if package not in versions:
            return f"{package} is not installed."
    builds = [package for package in ("fbgemm-gpu", "fbgemm-gpu-cpu") if package in versions]
    if len(builds) == 2:
        return (
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other's files. Remove both first: "
            "`pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu`."
        )
    if not builds and not found.own_fbgemm:
        return "fbgemm-gpu is not installed, neither the CUDA build (fbgemm-gpu) nor the CPU build (fbgemm-gpu-cpu)."
    torch = versions["torch"]
    release = RELEASES.get(_minor(torch))
    if release is None:
        return f"torch should be {', '.join(RELEASES)}. Found {torch}."
    for package in ["torchrec", *builds]:
        if _minor(versions[package]) != release:
            return f"{package} should be {release} beside torch {torch}. Found {versions[package]}."
    return _wrong_build(found) if builds == ["fbgemm-gpu"] else ""


def _wrong_build(found: Installation) -> str:
    """The CUDA build of fbgemm-gpu needs a torch that was built for the same CUDA."""
    torch, fbgemm = found.versions["torch"], found.versions["fbgemm-gpu"]
    if found.torch_cuda is None:
        return (
            f"torch {torch} is a CPU build, fbgemm-gpu {fbgemm} a CUDA build. "
            "torch should be a CUDA build, or fbgemm-gpu should be fbgemm-gpu-cpu."
        )
    tag = re.search(r"\+cu(\d+)(\d)$", fbgemm)
    cuda = f"{tag[1]}.{tag[2]}" if tag else PYPI_CUDA
    if _major(cuda) != _major(found.torch_cuda):
        return (
            f"torch {torch} is built for CUDA {found.torch_cuda}, fbgemm-gpu {fbgemm} for CUDA {cuda}. "
            "Both should be built for the same CUDA."
        )
    return ""


def _no_driver(found: Installation) -> str:
    """What is right in itself, but not on this machine."""
    torch = found.versions["torch"]
    if "fbgemm-gpu" in found.versions:
        if found.driver_cuda is None:
            return (
                f"fbgemm-gpu {found.versions['fbgemm-gpu']} is the CUDA build, which cannot be loaded without NVIDIA's "
                "driver, and there is none here (no libcuda.so.1)."
            )
        if found.torch_cuda is not None and _major(found.driver_cuda) < _major(found.torch_cuda):
            return (
                f"torch {torch} is built for CUDA {found.torch_cuda}, and NVIDIA's driver here serves CUDA "
                f"{found.driver_cuda} at most. Update the driver, or take the CPU build (`deploy/install.sh cpu`)."
            )
    elif "fbgemm-gpu-cpu" in found.versions and found.torch_cuda is not None and found.driver_cuda is not None:
        return (
            f"torch {torch} is a CUDA build and would train on the GPU here, but fbgemm-gpu-cpu "
            f"{found.versions['fbgemm-gpu-cpu']} has no GPU kernels."
        )
    return ""


def installation(path: Sequence[str] | None = None) -> Installation:
    """What is installed in the folders of `path` (default: where Python looks), without importing any of it."""
    versions: dict[str, str] = {}
    torch_cuda = None
    for distribution in distributions() if path is None else distributions(path=list(path)):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name not in PACKAGES or name in versions:  # the first on the path is the one that is imported
            continue
        versions[name] = distribution.version
        if name == "torch":
            torch_cuda = _cuda_of_torch(Path(str(distribution.locate_file("torch/version.py"))))
    own_fbgemm = path is None and importlib.util.find_spec("fbgemm_gpu") is not None
    return Installation(versions, torch_cuda, _cuda_of_driver(), own_fbgemm)


def _cuda_of_torch(version_file: Path) -> str | None:
    """torch writes the CUDA release that it was built for into a file beside its version; None for a CPU build."""
    if not version_file.is_file():
        return None
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", version_file.read_text(), re.MULTILINE)
    return found[1] if found else None


def _cuda_of_driver() -> str | None:
    """The newest CUDA release that the driver serves; asking starts neither the GPU nor a CUDA context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _major(release: str) -> int:
    return int(release.split(".")[0])
