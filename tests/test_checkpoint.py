"""Checkpoints that can be trusted: damage is named, the previous one is used, a full disk costs nothing that was good."""

import json
import logging
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from mtrec import parallel
from mtrec.checkpoint import CheckpointError, Saver, best, check, copy_missing, find, folder_of, load, newest, read, to_resume

CPU = torch.device("cpu")


def tensors(step: int, rows: int = 100) -> dict[str, torch.Tensor]:
    return {"tables.user": torch.full((rows, 4), float(step)), "dense.bias": torch.arange(3.0) + step}


def save(checkpoints: Path, *steps: int, keep_last: int = 5, keep_best: int = 0, background: bool = False) -> None:
    with parallel.process_group(CPU):
        saver = Saver(checkpoints, keep_last, keep_best, background)
        for step in steps:
            saver.save(tensors(step), {"step": step, "metric": None})
        saver.finish()


def data_file(folder: Path) -> Path:
    """The largest file: the tensors."""
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def truncated(folder: Path) -> str:
    path = data_file(folder)
    os.truncate(path, path.stat().st_size - 7)
    return rf"{path.name} should have \d+ bytes. Found \d+"


def flipped(folder: Path) -> str:
    path = data_file(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path.name} was altered"


def deleted(folder: Path) -> str:
    path = data_file(folder)
    path.unlink()
    return f"{path.name} is missing"


def without_state(folder: Path) -> str:
    (folder / "state.json").unlink()
    return "state.json is missing"


def without_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "has no manifest.json"


def half_a_manifest(folder: Path) -> str:
    path = folder / "manifest.json"
    path.write_text(path.read_text()[:40])
    return "manifest.json is not readable"


@pytest.mark.parametrize("damage", [truncated, flipped, deleted, without_state, without_manifest, half_a_manifest])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning_that_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], str]
) -> None:
    save(tmp_path, 1, 2, 3)
    assert [each.step for each in find(tmp_path)] == [3, 2, 1]
    words = damage(folder_of(tmp_path, 3))
    with caplog.at_level(logging.WARNING, "mtrec"):
        found = newest(tmp_path)
    assert found is not None
    assert found.step == 2
    assert torch.equal(read(found.folder)["tables.user"], tensors(2)["tables.user"])
    (warning,) = caplog.messages
    assert str(folder_of(tmp_path, 3)) in warning
    assert re.search(words, warning), warning


def test_nothing_valid_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "none") is None
    save(tmp_path, 1)
    without_manifest(folder_of(tmp_path, 1))
    assert newest(tmp_path) is None
    assert to_resume(tmp_path) is None  # it was being written: the run begins at its first step


@pytest.mark.parametrize("damage", [truncated, flipped, deleted, half_a_manifest])
def test_a_run_does_not_begin_anew_where_its_checkpoints_are_damaged(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    save(tmp_path, 1, 2)
    words = [damage(folder_of(tmp_path, step)) for step in (2, 1)]
    with pytest.raises(CheckpointError, match=rf"can be trusted: step-0+2: .*{words[0]}.*step-0+1: .*{words[1]}.* --output"):
        to_resume(tmp_path)


@pytest.mark.parametrize("background", [False, True])
def test_the_manifest_names_every_file_and_is_written_last(tmp_path: Path, background: bool) -> None:
    save(tmp_path, 7, background=background)
    folder = folder_of(tmp_path, 7)
    manifest = folder / "manifest.json"
    names = {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert set(json.loads(manifest.read_text())["files"]) == names
    assert check(folder) is None
    assert all(manifest.stat().st_mtime_ns >= (folder / name).stat().st_mtime_ns for name in names)


@pytest.mark.parametrize("background", [False, True])
def test_tensors_are_written_without_a_crc_beside_the_sha256(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    asked, real = [], torch.serialization.get_crc32_options

    def noted() -> bool:
        asked.append(real())
        return asked[-1]

    monkeypatch.setattr(torch.serialization, "get_crc32_options", noted)
    save(tmp_path, 1, background=background)
    assert asked
    assert not any(asked)
    assert real()  # what others save has one as ever


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    metrics = {1: 0.9, 2: 0.1, 3: 0.8, 4: None, 5: 0.2, 6: 0.3}
    with parallel.process_group(CPU):
        saver = Saver(tmp_path, 2, 2, in_background=True)
        for step, metric in metrics.items():
            saver.save(tensors(step), {"step": step, "metric": metric})
        saver.finish()
    found = find(tmp_path)
    assert [each.step for each in found] == [6, 5, 3, 1]
    chosen = best(found)
    assert chosen is not None
    assert chosen.step == 1
    assert {path.name for path in tmp_path.iterdir()} == {each.folder.name for each in found}
    folder_of(tmp_path, 4).mkdir()  # what a run that died was writing goes with the next commit
    save(tmp_path, 7, keep_last=4)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-0000000{step}" for step in (3, 5, 6, 7)]


def test_a_save_leaves_newer_checkpoints_alone_and_keeps_its_own(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 5, 6)
    folder_of(tmp_path, 9).mkdir()  # under way
    save(tmp_path, 3, keep_last=2)  # of a run that went on from an earlier one
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"step-0000000{step}" for step in (2, 3, 5, 6, 9)]


def test_a_checkpoint_of_another_format_is_not_trusted(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = folder_of(tmp_path, 1) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    assert check(folder_of(tmp_path, 1)) == "it has the format 2, of another mtrec; this one reads 1."
    assert find(tmp_path) == []


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(saver: Saver, *arguments: Any) -> None:
        time.sleep(0.5)
        commit(saver, *arguments)

    commit = Saver._commit
    monkeypatch.setattr(Saver, "_commit", slowly)
    with parallel.process_group(CPU):
        saver = Saver(tmp_path, 2, 0, in_background=True)
        saver.save(tensors(1), {"step": 1, "metric": None})
        saver.save(tensors(2), {"step": 2, "metric": None})
        assert (folder_of(tmp_path, 1) / "manifest.json").is_file()
        saver.finish()
    assert [each.step for each in find(tmp_path)] == [2, 1]


class Noted:
    """Stands for a mirror: what it was given, in order."""

    def __init__(self) -> None:
        self.given: list[str] = []

    def put(self, *paths: str) -> None:
        self.given += paths

    def names(self, inside: str) -> list[str]:
        return []

    def read(self, path: str) -> bytes | None:
        return None


def test_a_copy_ends_with_the_manifest(tmp_path: Path) -> None:
    checkpoints, saved, later = tmp_path / "checkpoints", Noted(), Noted()
    with parallel.process_group(CPU):
        Saver(checkpoints, 1, 0, False, mirror=saved).save(tensors(1), {"step": 1, "metric": None})  # type: ignore[arg-type]
    copy_missing(checkpoints, later)  # type: ignore[arg-type]
    names = {path.name for path in folder_of(checkpoints, 1).iterdir()}
    for mirror in (saved, later):
        assert {path.rpartition("/")[2] for path in mirror.given} == names
        assert mirror.given[-1] == "checkpoints/step-00000001/manifest.json"


def test_in_the_background_a_checkpoint_counts_before_the_next_one_is_asked_for(tmp_path: Path) -> None:
    with parallel.process_group(CPU):
        saver = Saver(tmp_path, 2, 0, in_background=True)
        values = tensors(1)
        saver.save(values, {"step": 1, "metric": None})
        values["tables.user"].fill_(-1.0)  # training goes on: the copy was taken
        for _ in range(500):
            if find(tmp_path, verify=False):
                break
            time.sleep(0.02)
        found = newest(tmp_path)
        saver.finish()
    assert found is not None
    assert torch.equal(read(found.folder)["tables.user"], tensors(1)["tables.user"])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = folder_of(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"'tables.user' has the shape \(100, 4\); the model expects \(90, 4\)"):
        load(folder, {"tables.user": torch.zeros(90, 4)})
    with pytest.raises(
        CheckpointError, match=r"holds no 'tables.item'. It was written by another model: dense.bias, tables.user"
    ):
        load(folder, {"tables.item": torch.zeros(1)})


def save_beyond_the_limit(checkpoints: str, background: bool) -> str:
    """In a process of its own: files may not grow above 64 KB, as if the disk were full there."""
    folder = Path(checkpoints)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an OSError instead, as for a full disk
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))
    return failure(folder, background)


def failure(folder: Path, background: bool) -> str:
    """The message of a save that is 16 times too large."""
    with parallel.process_group(CPU):
        saver = Saver(folder, 2, 0, background)
        try:
            saver.save(tensors(2, rows=65_536), {"step": 2, "metric": None})
            saver.finish()
        except CheckpointError as error:
            return str(error)
    return "no error"


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_last_good_checkpoint_and_a_clear_error(tmp_path: Path, background: bool) -> None:
    checkpoints = tmp_path / "checkpoints"
    save(checkpoints, 1)
    (said,) = run_ranks(1, save_beyond_the_limit, str(checkpoints), background, folder=tmp_path)
    assert f"Checkpoint {folder_of(checkpoints, 2)} could not be written" in said
    assert "File too large" in said
    assert "The last good one is step-00000001; continue from it with --resume." in said
    found = newest(checkpoints)
    assert found is not None
    assert found.step == 1
    assert torch.equal(read(found.folder)["tables.user"], tensors(1)["tables.user"])
    save(checkpoints, 2)  # once there is room
    assert [each.step for each in find(checkpoints)] == [2, 1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a file system needs rights that this user does not have")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("background", [False, True])
def test_a_really_full_disk(small_disk: Path, background: bool) -> None:
    save(small_disk, 1)
    said = failure(small_disk, background)
    assert "No space left on device" in said
    assert "The last good one is step-00000001" in said
    assert [each.step for each in find(small_disk)] == [1]


@pytest.mark.parametrize("damage", ["half a manifest", "no state"])
def test_a_save_passes_over_a_checkpoint_that_cannot_be_read(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 100, 200)
    if damage == "half a manifest":
        (folder_of(tmp_path, 200) / "manifest.json").write_text('{"format": 1, "fi')
    else:
        (folder_of(tmp_path, 200) / "state.json").unlink()
    save(tmp_path, 300, keep_last=2)
    assert [each.step for each in find(tmp_path)] == [300, 100]
