"""The check of versions against made-up installations, and against a folder with package metadata in it."""

import subprocess
import sys
from pathlib import Path

import pytest

from mtrec import versions
from mtrec.versions import Installation, check_versions, installation, mismatch

CPU = {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0"}
CUDA = {"torch": "2.11.0", "torchrec": "1.6.1", "fbgemm-gpu": "1.6.0"}


@pytest.mark.parametrize(
    "found",
    [
        Installation(CPU),
        Installation({"torch": "2.12.1+cpu", "torchrec": "1.7.0", "fbgemm-gpu-cpu": "1.7.3"}),
        Installation(CUDA, torch_cuda="13.0", driver_cuda="13.0"),
        Installation(CUDA, torch_cuda="13.0", driver_cuda="13.2"),
        Installation({**CUDA, "fbgemm-gpu": "1.6.0+cu126"}, torch_cuda="12.6", driver_cuda="13.0"),
        # A build of one's own has no package of these names.
        Installation({"torch": "2.13.0+cpu", "torchrec": "1.8.0"}, own_fbgemm=True),
        # A CUDA torch on a machine without a GPU trains on the CPU.
        Installation({**CPU, "torch": "2.13.0"}, torch_cuda="13.0"),
    ],
)
def test_a_matching_installation_passes(found: Installation) -> None:
    assert mismatch(found) == ""


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (Installation(), "torch is not installed"),
        (Installation({"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0"}), "torchrec is not installed"),
        (Installation({"torch": "2.13.0+cpu", "torchrec": "1.8.0"}), "fbgemm-gpu is not installed"),
        (Installation({**CPU, "fbgemm-gpu": "1.8.0"}), "both installed"),
        (Installation({**CPU, "torch": "2.10.1+cpu"}), "torch should be 2.11, 2.12, 2.13. Found 2.10.1+cpu."),
        (
            Installation({**CPU, "torch": "2.12.0+cpu"}),
            "torchrec should be 1.7 beside torch 2.12.0+cpu. Found 1.8.0.",
        ),
        (
            Installation({**CPU, "fbgemm-gpu-cpu": "1.6.0"}),
            "fbgemm-gpu-cpu should be 1.8 beside torch 2.13.0+cpu. Found 1.6.0.",
        ),
        (
            Installation({"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu": "1.8.0"}, driver_cuda="13.0"),
            "torch 2.13.0+cpu is a CPU build, fbgemm-gpu 1.8.0 a CUDA build.",
        ),
        (
            Installation(CUDA, torch_cuda="12.6", driver_cuda="13.0"),
            "torch 2.11.0 is built for CUDA 12.6, fbgemm-gpu 1.6.0 for CUDA 13.0.",
        ),
        (Installation(CUDA, torch_cuda="13.0"), "cannot be loaded without NVIDIA's driver"),
        (Installation(CUDA, torch_cuda="13.0", driver_cuda="12.4"), "serves CUDA 12.4 at most"),
        (Installation({**CPU, "torch": "2.13.0"}, torch_cuda="13.0", driver_cuda="13.0"), "has no GPU kernels"),
    ],
)
def test_a_wrong_mix_is_named_with_what_to_do(found: Installation, words: str) -> None:
    message = mismatch(found)
    assert words in message
    assert f"`deploy/install.sh {'cuda' if found.driver_cuda else 'cpu'}`" in message


def test_installing_needs_no_driver() -> None:
    assert mismatch(Installation(CUDA, torch_cuda="13.0"), driver_needed=False) == ""
    assert "both installed" in mismatch(Installation({**CPU, "fbgemm-gpu": "1.8.0"}), driver_needed=False)


def fake_package(folder: Path, name: str, version: str) -> None:
    """Metadata as pip leaves it, under the underscored folder name that wheels use."""
    information = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")


def test_versions_are_read_from_package_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_cuda_of_driver", lambda: None)
    for name, version in [("torch", "2.11.0"), ("torchrec", "1.6.1"), ("fbgemm_gpu", "1.6.0"), ("numpy", "2.4.6")]:
        fake_package(tmp_path, name, version)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.11.0'\ncuda: Optional[str] = '13.0'\nhip = None\n")
    assert installation([str(tmp_path)]) == Installation(CUDA, torch_cuda="13.0")
    (tmp_path / "torch" / "version.py").write_text(
        "__version__ = '2.11.0+cpu'\ncuda: Optional[str] = None\nhip = '6'\n"
    )
    assert installation([str(tmp_path)]).torch_cuda is None


def test_the_first_of_two_installations_counts(tmp_path: Path) -> None:
    fake_package(tmp_path / "first", "torchrec", "1.8.0")
    fake_package(tmp_path / "second", "torchrec", "1.6.1")
    assert installation([str(tmp_path / "first"), str(tmp_path / "second")]).versions["torchrec"] == "1.8.0"


def test_the_error_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "installation", lambda: Installation({**CPU, "torchrec": "1.6.1"}))
    with pytest.raises(ValueError, match=r"torchrec should be 1\.8"):
        check_versions()


def test_torch_is_installed_here_as_its_metadata_says() -> None:
    import torch

    found = installation()
    assert found.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found.torch_cuda == torch.version.cuda
    assert (found.driver_cuda is not None) or not torch.cuda.is_available()


def test_the_check_imports_no_torch() -> None:
    code = (
        "import sys\nfrom mtrec.versions import check_versions\ncheck_versions()\n"
        "print(sorted({'torch', 'torchrec', 'fbgemm_gpu', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
