"""Each rank hashes the files that it wrote; the manifest has them all, and one that cannot read its own fails the save."""

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from mtrec import checkpoint, parallel
from mtrec.checkpoint import CheckpointError, Saver


def save(folder: str, background: bool, broken: int | None) -> tuple[list[str], str | None]:
    """(names that this rank hashed, the error it got)."""
    hashed: list[str] = []
    real = checkpoint._sha256

    def noted(path: Path) -> str:
        hashed.append(path.name)
        if parallel.rank() == broken and path.suffix == ".distcp":
            raise OSError(5, "Input/output error", str(path))
        return real(path)

    checkpoint._sha256 = noted  # in this process, which ends with the function
    with parallel.process_group(torch.device("cpu")):
        saver = Saver(Path(folder), 2, 0, background)
        problem = None
        try:
            tensors = {f"dense.{name}": torch.full((50,), float(number)) for number, name in enumerate("abcd")}
            saver.save(tensors, {"step": 3, "metric": None})
            saver.finish()
        except CheckpointError as error:
            problem = str(error)
        parallel.barrier()
    return hashed, problem


@pytest.mark.parametrize("background", [True, False])
def test_every_rank_hashes_its_own_files(background: bool, tmp_path: Path) -> None:
    found = run_ranks(2, save, str(tmp_path / "checkpoints"), background, None, folder=tmp_path)
    assert [problem for _, problem in found] == [None, None]
    (kept,) = checkpoint.find(tmp_path / "checkpoints")
    written = {path.name for path in kept.folder.glob("*.distcp")}
    assert {name.split("_")[2] for name in written} == {"0", "1"}
    assert json.loads((kept.folder / "manifest.json").read_text())["files"].keys() == {".metadata", "state.json", *written}
    for rank, (hashed, _) in enumerate(found):
        assert {name for name in hashed if name in written} == {name for name in written if name.startswith(f"__{rank}_")}
    assert all(name in written for name in found[1][0])  # the rest is rank 0's


@pytest.mark.parametrize("background", [True, False])
def test_a_rank_that_cannot_read_its_file_fails_the_save_on_rank_0_too(background: bool, tmp_path: Path) -> None:
    found = run_ranks(2, save, str(tmp_path / "checkpoints"), background, 1, folder=tmp_path)
    for _, problem in found:
        assert problem is not None
        assert "Input/output error" in problem
    assert checkpoint.find(tmp_path / "checkpoints") == []
