"""What ranks do for a checkpoint: each hashes the files that it wrote, and all wait for what rank 0 does alone."""

import json
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

from mtrec import checkpoint, parallel
from mtrec.checkpoint import CheckpointError, Saver
from mtrec.mirror import Mirror


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


def save_with_a_slow_copy(folder: str, background: bool) -> list[str]:
    """Names of the mirror's checkpoints on this rank's view, after a copy that took longer than a collective may."""
    put = Mirror.put

    def slow(mirror: Mirror, *names: str) -> None:
        time.sleep(6)
        put(mirror, *names)

    Mirror.put = slow  # type: ignore[method-assign]  # in this process, which ends with the function
    with parallel.process_group(torch.device("cpu"), timeout_seconds=4):
        mirror = Mirror((Path(folder) / "far").as_uri(), Path(folder) / "run")
        saver = Saver(Path(folder) / "run" / "checkpoints", 2, 0, background, timeout_seconds=4, mirror=mirror)
        saver.save({"dense.a": torch.zeros(50)}, {"step": 3, "metric": None})
        saver.settle()
        parallel.barrier()
        return mirror.names("checkpoints")


@pytest.mark.parametrize("background", [True, False])
def test_a_copy_may_take_longer_than_a_collective(background: bool, tmp_path: Path) -> None:
    found = run_ranks(2, save_with_a_slow_copy, str(tmp_path), background, folder=tmp_path)
    assert found == [["step-00000003"], ["step-00000003"]]


def refuse() -> int:
    raise CheckpointError("no checkpoint can be trusted")


def asked_of_rank_0(slow: bool) -> tuple[int, str]:
    with parallel.process_group(torch.device("cpu"), timeout_seconds=4):
        rank = parallel.rank()
        found = parallel.by_rank_zero(lambda: time.sleep(6 * slow) or rank + 7, 4)
        with pytest.raises(CheckpointError) as caught:
            parallel.by_rank_zero(refuse, 4)
        return found, str(caught.value)


def test_what_rank_0_does_for_all_may_take_its_time_and_its_error_is_everybodys(tmp_path: Path) -> None:
    for world_size, slow in ((1, False), (2, True)):
        found = run_ranks(world_size, asked_of_rank_0, slow, folder=tmp_path)
        assert found == [(7, "no checkpoint can be trusted")] * world_size
