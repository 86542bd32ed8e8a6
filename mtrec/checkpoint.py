"""Checkpoints: complete, atomic, independent of the number of workers.

A checkpoint is a folder `checkpoints/step-00000300` written by torch.distributed.checkpoint (every rank its shards), plus
`state.json` (step, reader position) and, last of all, `manifest.json` with the size and SHA-256 of every file. A folder
without a valid manifest is not a checkpoint: the newest valid one is the truth. What is in it: tables and their optimizer
state, dense weights and theirs, the balancer's buffers. What a validation at that step found comes later: `validation.json`,
which overrides keys of `state.json` and holds the whole event, and a new manifest that names it, put in the old one's place in
one go.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.utils.serialization import config as serialization

from mtrec import parallel
from mtrec.atomic import write_atomically
from mtrec.mirror import Mirror

log = logging.getLogger(__name__)
FORMAT = 1
PROBE_BYTES = 1 << 20
VALIDATION, WHOLE_VALIDATION = "validation.json", "validation"  # the file, and the key in it that holds the event


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its folder, and what `state.json` and `validation.json` say."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that were done when it was written."""
        return int(self.state["step"])

    @property
    def metric(self) -> float | None:
        """The value of the run's best metric at this step, None where there was no validation."""
        value = self.state.get("metric")
        return None if value is None else float(value)


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or trusted; the message names the folder and the file."""


def folder_of(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step-{step:08d}"


def find(checkpoints: Path, verify: bool = True) -> list[Checkpoint]:
    """The valid checkpoints of a run, newest first. An invalid one is passed over with a warning that names the bad file."""
    return list(_valid(checkpoints, verify))


def _valid(checkpoints: Path, verify: bool) -> Iterator[Checkpoint]:
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        if not (folder / "manifest.json").is_file():
            log.warning(
                "Checkpoint %s has no manifest.json (it was being written when the run stopped): passed over.", folder
            )
            continue
        problem = check(folder) if verify else None
        if problem:
            log.warning("Checkpoint %s is damaged and passed over: %s", folder, problem)
            continue
        try:
            state = state_of(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if verify:  # its files are sound: it is the storage that fails, now
                raise
            log.warning("Checkpoint %s is damaged and passed over: %s", folder, error)
            continue
        yield Checkpoint(folder, state)


def state_of(folder: Path) -> dict[str, Any]:
    """What a valid checkpoint says beside its tensors: step, position, metric, experiment, versions."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if VALIDATION in json.loads((folder / "manifest.json").read_text())["files"]:
        state |= json.loads((folder / VALIDATION).read_text())
    return state


def newest(checkpoints: Path) -> Checkpoint | None:
    """The newest valid checkpoint; older ones are not looked at."""
    return next(_valid(checkpoints, verify=True), None)


def to_resume(checkpoints: Path) -> Checkpoint | None:
    """The newest valid checkpoint; None where none was ever written whole, so that a run begins at its first step.

    Raises CheckpointError where there are some and none can be trusted: beginning anew would not be going on.
    """
    found = newest(checkpoints)
    if found is None and (bad := damaged(checkpoints)):
        raise CheckpointError(
            f"No checkpoint in {checkpoints} can be trusted: {told(bad)} Put one back from a copy, or begin anew: with another "
            "--output, or, of a comparison or search, once this run's folder is removed."
        )
    return found


def damaged(checkpoints: Path) -> dict[str, str]:
    """{name: what is wrong} of the checkpoints that were written whole and cannot be trusted any more, newest first."""
    whole = (each for each in sorted(checkpoints.glob("step-*"), reverse=True) if (each / "manifest.json").is_file())
    return {folder.name: problem for folder in whole if (problem := check(folder)) is not None}


def told(problems: Mapping[str, str]) -> str:
    """What `damaged` found, in a message."""
    return "; ".join(f"{name}: {problem}" for name, problem in problems.items())


def check(folder: Path) -> str | None:
    """What is wrong with a checkpoint (the file, and what was found), or None."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        files, written = dict(manifest["files"]), manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"manifest.json is not readable ({error})."
    if written != FORMAT:
        return f"it has the format {written}, of another mtrec; this one reads {FORMAT}."
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing."
        if path.stat().st_size != expected["bytes"]:
            return f"{name} should have {expected['bytes']} bytes. Found {path.stat().st_size}."
        if _sha256(path) != expected["sha256"]:
            return f"{name} was altered: its SHA-256 is not the manifest's."
    return None


def newest_validation(resumed: Checkpoint | None) -> dict[str, Any] | None:
    """The event of the newest validation up to a checkpoint; None where there was none, or only an earlier mtrec's."""
    if resumed is None:
        return None
    folders = [each for each in resumed.folder.parent.glob("step-*") if each <= resumed.folder]
    for folder in sorted(folders, reverse=True):
        with suppress(OSError, ValueError, KeyError, TypeError):  # of a damaged one
            found: dict[str, Any] = state_of(folder)[WHOLE_VALIDATION]
            return found
    return None


def fetch(checkpoints: Path, mirror: Mirror) -> list[str]:
    """Brings the valid checkpoints of a mirror that this folder lacks; their names, the newest first."""
    here, fetched = {each.folder.name for each in find(checkpoints)}, []
    for name in reversed(mirror.names(checkpoints.name)):
        if name in here or mirror.read(f"{checkpoints.name}/{name}/manifest.json") is None:
            continue
        beside = checkpoints / f".fetched-{name}"
        shutil.rmtree(beside, ignore_errors=True)
        mirror.get(f"{checkpoints.name}/{name}", beside)
        problem = check(beside)
        if problem:
            log.warning("Checkpoint %s of %s is damaged and passed over: %s", name, mirror.uri, problem)
            shutil.rmtree(beside)
            continue
        if (checkpoints / name).exists():
            discard(checkpoints / name)  # it is damaged
        beside.rename(checkpoints / name)
        fetched.append(name)
    return fetched


def copy_missing(checkpoints: Path, mirror: Mirror) -> None:
    """Copies the valid checkpoints whose copy was cut short, or never begun, to a mirror."""
    for folder in sorted(checkpoints.glob("step-*")):
        manifest, inside = folder / "manifest.json", f"{checkpoints.name}/{folder.name}"
        if manifest.is_file() and mirror.read(f"{inside}/manifest.json") != manifest.read_bytes() and check(folder) is None:
            names = json.loads(manifest.read_text())["files"]
            mirror.put(*(f"{inside}/{name}" for name in [*names, "manifest.json"]))


def best(found: list[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the largest metric; the newest where none has one."""
    with_metric = [each for each in found if each.metric is not None]
    return max(with_metric, key=lambda each: (each.metric, each.step)) if with_metric else (found[0] if found else None)


def staged(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in the CPU's memory, each rank its own shards.

    torch's `BlockingAsyncStager` copies, for every shard that is a view of the fused kernel's one buffer, the whole buffer:
    54 times 195 MB at the reference size, 3 s. The shards alone are .1 s.
    """
    with torch.no_grad():
        return {key: value.to("cpu", copy=True) for key, value in tensors.items()}


class _Stager(BlockingAsyncStager):
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return staged(state_dict)


class _Writer(FileSystemWriter):
    """DCP's own, without the CRC-32 that torch.save takes of every tensor: the manifest has the SHA-256 of every file."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        with serialization.patch("save.compute_crc32", False):  # type: ignore[attr-defined]  # in this thread alone
            return super().write_data(plan, planner)


class Saver:
    """Writes checkpoints of one run, in the background if asked; every rank makes one and calls it alike.

    In the background rank 0 commits a checkpoint as soon as all ranks' files are there; what went wrong there is raised by
    the next `save` or `finish`.

    Args:
        checkpoints: folder on storage that all ranks see.
        keep_last: newest checkpoints kept; keep_best: best ones kept besides.
        in_background: training waits only until the tensors are copied.
        timeout_seconds: how long a rank waits for the others in the background.
        mirror: of the run's folder; rank 0 copies each checkpoint there, and deletes there what is deleted here.
    """

    def __init__(
        self,
        checkpoints: Path,
        keep_last: int,
        keep_best: int,
        in_background: bool,
        timeout_seconds: int = 600,
        mirror: Mirror | None = None,
    ) -> None:
        self._checkpoints, self._keep_last, self._keep_best, self._mirror = checkpoints, keep_last, keep_best, mirror
        checkpoints.mkdir(parents=True, exist_ok=True)  # once: where it vanishes later, the run has gone with it
        self._timeout = timeout_seconds
        # saving beside the training needs collectives of its own: shared with the training's they would be mixed up
        self._group = parallel.new_group(timeout_seconds) if in_background else None
        self._committer = ThreadPoolExecutor(1, "mtrec-checkpoint") if in_background else None
        self._pending: list[tuple[Future[Any], Path]] = []

    def save(
        self, tensors: Mapping[str, Any], state: Mapping[str, Any], files: Mapping[str, bytes] | None = None
    ) -> Path:
        """Does a save, or starts one; it counts once its manifest is written, at the latest when `settle` returns.

        `files`: {name: content} that rank 0 lays beside the tensors.

        Raises CheckpointError (a full disk, say); earlier checkpoints are then as they were.
        """
        self.settle()
        folder = folder_of(self._checkpoints, int(state["step"]))
        try:
            if parallel.rank() == 0:
                if folder.exists():
                    discard(folder)  # a run that died left it here, or this step is made again
                folder.mkdir()
                for name, content in (files or {}).items():
                    (folder / name).write_bytes(content)
            parallel.barrier()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self._committer is None:
                    save(dict(tensors), checkpoint_id=folder, storage_writer=_Writer(folder))
                    self._commit(folder, dict(state))
                    parallel.by_rank_zero(lambda: self._copy(folder), self._timeout)
                    return folder
                written = async_save(
                    dict(tensors),
                    checkpoint_id=folder,
                    storage_writer=_Writer(folder),
                    process_group=self._group,
                    async_stager=_Stager(),
                )
                assert isinstance(written, Future)
                self._pending.append((self._committer.submit(self._commit_written, written, folder, dict(state)), folder))
        except (OSError, CheckpointException) as error:
            raise self._failure(folder, error) from error
        return folder

    def add_validation(self, step: int, state: Mapping[str, Any]) -> None:
        """Adds what the validation of the newest checkpoint found: `state` overrides keys of that given to `save`."""
        folder = folder_of(self._checkpoints, step)
        if self._committer is not None:
            if parallel.rank() == 0:
                self._pending.append((self._committer.submit(self._amend, folder, dict(state)), folder))
            return
        try:
            parallel.by_rank_zero(lambda: self._amend(folder, dict(state)), self._timeout)
        except OSError as error:
            raise self._failure(folder, error) from error

    def settle(self) -> None:
        """`finish` on all ranks alike, however long rank 0 takes to copy a checkpoint to the mirror."""
        under_way = [future for future, _ in self._pending]
        parallel.wait_for_rank_zero(lambda seconds: not wait(under_way, seconds).not_done, self._timeout)
        self.finish()

    def finish(self) -> None:
        """Waits for this rank's part of the save under way, until it is committed. Raises CheckpointError where it failed."""
        pending, self._pending = self._pending, []
        for future, folder in pending:
            try:
                future.result()
            except (OSError, CheckpointException) as error:
                raise self._failure(folder, error) from error

    def _commit_written(self, written: "Future[Any]", folder: Path, state: dict[str, Any]) -> None:
        written.result()
        self._commit(folder, state)
        if parallel.rank() == 0:
            self._copy(folder)

    def _commit(self, folder: Path, state: dict[str, Any]) -> None:
        """Every rank hashes its files, rank 0 writes the manifest. DCP's own metadata, written last, is there already."""
        hashed = self._hashed(folder)
        if parallel.rank() != 0:
            return
        write_atomically(folder / "state.json", json.dumps(state, indent=1))
        here = sorted(path for path in folder.iterdir() if path.name != "manifest.json")
        if unseen := sorted(hashed.keys() - {path.name for path in here}):
            raise CheckpointError(
                f"Checkpoint {folder} could not be written: rank 0 does not see {', '.join(unseen)}, which another worker wrote. "
                "The run's folder should lie on storage that all workers share."
            )
        files = {path.name: hashed.get(path.name) or _entry(path) for path in here}
        write_atomically(folder / "manifest.json", json.dumps({"format": FORMAT, "files": files}, indent=1))
        self._remove_old(folder)

    def _hashed(self, folder: Path) -> dict[str, Any]:
        """{file of tensors: entry of the manifest} on rank 0. Hashing is most of what a save costs where the CPU has no
        instructions for SHA-256 (.6 s for 200 MB): each rank does its own.
        """
        own: dict[str, Any] | Exception
        try:
            own = {path.name: _entry(path) for path in sorted(folder.glob(f"__{parallel.rank()}_*"))}
        except Exception as error:
            own = error  # raised below: the others wait for an answer
        every = parallel.gather_objects(own, self._group) or [own]
        for entries in every:
            if isinstance(entries, Exception):
                raise entries
        return {name: entry for entries in every for name, entry in entries.items()}

    def _amend(self, folder: Path, state: dict[str, Any]) -> None:
        write_atomically(folder / VALIDATION, json.dumps(state, indent=1))
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"][VALIDATION] = _entry(folder / VALIDATION)
        write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1))
        self._remove_old(folder)
        self._copy(folder, [VALIDATION])

    def _copy(self, folder: Path, names: Sequence[str] = ()) -> None:
        """To the mirror, all files or those named, the manifest last; what is gone here goes there, too."""
        if self._mirror is None:
            return
        inside = self._checkpoints.name
        if not names or self._mirror.read(f"{inside}/{folder.name}/manifest.json") is None:  # or an earlier copy was cut short
            names = list(json.loads((folder / "manifest.json").read_text())["files"])
        self._mirror.put(*(f"{inside}/{folder.name}/{name}" for name in [*names, "manifest.json"]))
        for name in self._mirror.names(inside):
            if not (self._checkpoints / name).exists():
                self._mirror.delete(f"{inside}/{name}", first="manifest.json")

    def _remove_old(self, newest: Path) -> None:
        found = [each for each in find(self._checkpoints, verify=False) if each.folder <= newest]
        ranked = sorted(
            (e for e in found if e.metric is not None), key=lambda e: (e.metric or 0.0, e.step), reverse=True
        )
        kept = {each.folder for each in [*found[: self._keep_last], *ranked[: self._keep_best]]}
        for each in found:
            if each.folder not in kept:
                discard(each.folder)
        for folder in self._checkpoints.glob("step-*"):
            if folder < newest and not (folder / "manifest.json").is_file():
                discard(folder)  # what a run that died was writing

    def _failure(self, folder: Path, error: BaseException) -> CheckpointError:
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
        if not isinstance(cause, OSError):
            cause = _write_error(folder) or cause  # torch.save hides the reason of a write that failed
        good = [each.folder.name for each in find(self._checkpoints, verify=False)]
        return CheckpointError(
            f"Checkpoint {folder} could not be written: {cause}. "
            + (
                f"The last good one is {good[0]}; continue from it with --resume."
                if good
                else "There is no earlier one."
            )
        )


def discard(folder: Path) -> None:
    """Deletes a checkpoint, its manifest first: a half-deleted folder is no checkpoint."""
    (folder / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def load(folder: Path, tensors: Mapping[str, Any]) -> None:
    """Fills the tensors (plain, or sharded in any way) in place. Raises CheckpointError naming what does not fit."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key, value in tensors.items():
            if key not in stored:
                raise CheckpointError(f"{folder} holds no '{key}'. It was written by another model: {_some(stored)}.")
            size = getattr(stored[key], "size", None)
            if size is not None and tuple(size) != tuple(value.size()):
                raise CheckpointError(f"{folder}: '{key}' has the shape {tuple(size)}; the model expects {tuple(value.size())}.")
        load_state(dict(tensors), checkpoint_id=folder)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """{key: shape} of the tensors of a checkpoint."""
    return {key: tuple(meta.size) for key, meta in _stored(folder).items()}


def read(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, gathered to this process, on the CPU; only keys that start with `prefix`."""
    return read_keys(folder, [key for key in _stored(folder) if key.startswith(prefix)])


def read_keys(folder: Path, keys: Sequence[str]) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint, gathered to this process alone, on the CPU. Raises KeyError for one that it lacks."""
    stored = _stored(folder)
    tensors = {key: torch.empty(tuple(stored[key].size), dtype=stored[key].properties.dtype) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load_state(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


def _stored(folder: Path) -> dict[str, TensorStorageMetadata]:
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {key: meta for key, meta in stored.items() if isinstance(meta, TensorStorageMetadata)}


def _some(names: Mapping[str, Any]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", ..." if len(listed) > 5 else "")


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_error(folder: Path) -> OSError | None:
    """Why nothing can be written into a folder, if so: a full disk, a quota, no permission."""
    path = folder / f".probe.{os.getpid()}"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        path.unlink(missing_ok=True)
    return None
