"""What travels with a submitted job: the experiment with its input files pinned, and the user's own modules. Never the data."""

import hashlib
import importlib.util
import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtrec.experiment import Experiment, Source
from mtrec.files import find_files
from mtrec.kinds import counted, own_modules

SOURCES = ("train", "validation", "test")
MAX_CODE_BYTES = 20_000_000  # Ray sends packages through its control store
CHANGEABLE = ("name", "output", "training", "evaluation", "scoring")  # what a run that goes on may change


def pin(experiment: Experiment) -> tuple[Experiment, list[str], dict[str, str]]:
    """(experiment with every path that can be read here resolved to its files, lines on them, {source: why it cannot be read}).

    A relative path becomes absolute, for the job runs in another folder; one that names nothing here raises ValueError.
    """
    pinned: dict[str, Source] = {}
    lines: list[str] = []
    unread: dict[str, str] = {}
    for name in SOURCES:
        source = getattr(experiment.data, name)
        if source is None:
            continue
        place = f"data.{name}"
        try:
            files = _files(source, place)
        except (ValueError, OSError) as error:
            if any("://" not in path and not Path(path).expanduser().is_absolute() for path in _paths(source)):
                raise ValueError(
                    f"{error} A relative path must exist on this machine; for data that only the cluster sees, give an "
                    "absolute path or a URI."
                ) from None
            unread[place] = str(error)
            continue
        pinned[name] = source.model_copy(update={"path": files})
        lines.append(f"{place}: {counted(len(files), 'file')} pinned")
    return experiment.model_copy(update={"data": experiment.data.model_copy(update=pinned)}), lines, unread


def _paths(source: Source) -> list[str]:
    return [source.path] if isinstance(source.path, str) else list(source.path)


def _files(source: Source, place: str) -> list[str]:
    found = []
    for entry in _paths(source):
        remote = "://" in entry and not entry.startswith("file://")
        _, _, options = entry.partition("?") if remote else ("", "", "")
        for file in find_files(entry, place)[0]:
            shown = file.shown if remote else str(Path(file.path).absolute())
            found.append(f"{shown}?{options}" if options else shown)
    return list(dict.fromkeys(found))


def tree_of(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain values, every default written out."""
    return experiment.model_dump(mode="json")


def absolute_sources(experiment: Experiment) -> dict[str, Any]:
    """The experiment's tree before pinning, local paths made absolute: the same from whichever folder it is submitted."""
    tree = tree_of(experiment)
    for name in SOURCES:
        source = tree["data"][name]
        if source is not None:
            paths = [source["path"]] if isinstance(source["path"], str) else source["path"]
            source["path"] = [path if "://" in path else str(Path(path).expanduser().absolute()) for path in paths]
    return tree


def digest(tree: Mapping[str, Any]) -> str:
    """A short name of a tree of plain values.

    >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    True
    """
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()


def user_modules(tree: Mapping[str, Any], folders: list[Path]) -> dict[str, bytes]:
    """{path in the package: content} of the Python files beside the modules that kinds such as `my_module:MyClass` name.

    A module found in one of `folders`, or elsewhere on Python's path, brings that folder's Python files and packages; an
    installed one must be installed on the cluster too. Raises ValueError where that is more than a package should hold.
    """
    found: dict[str, bytes] = {}
    for name in sorted(own_modules(tree) - {"mtrec"}):
        home = next((folder for folder in folders if (folder / name).is_dir() or (folder / f"{name}.py").is_file()), None)
        home = home or _home(name)
        if home is None:  # it is installed
            continue
        files = [*home.glob("*.py"), *(home / name).rglob("*.py")]
        files += [
            file
            for package in home.glob("*/__init__.py")
            if package.parent.name != "mtrec"
            for file in package.parent.rglob("*.py")
        ]
        for file in files:
            found.setdefault(str(file.relative_to(home)), file.read_bytes())
    _check_size(found, "the modules beside the experiment")
    return found


def _home(name: str) -> Path | None:
    """The folder of a module that is not installed (beside another experiment, say), None of one that is; ValueError of none."""
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ValueError(f"The module '{name}' of a kind is neither beside the experiment nor installed.")
    places = [*(spec.submodule_search_locations or []), *([spec.origin] if spec.has_location and spec.origin else [])]
    installed = [sysconfig.get_path(each) for each in ("stdlib", "purelib", "platlib")]
    if not places or any(Path(places[0]).is_relative_to(folder) for folder in installed):
        return None
    return Path(places[0]).parent


def _is_code(file: Path) -> bool:
    return file.is_file() and file.suffix != ".pyc"


def _check_size(files: Mapping[str, bytes], what: str) -> None:
    size = sum(len(content) for content in files.values())
    if size > MAX_CODE_BYTES:
        raise ValueError(
            f"{what} hold {size / 1e6:.0f} MB of Python; at most {MAX_CODE_BYTES / 1e6:.0f} MB are sent with a job. Put the "
            "experiment and its modules into a folder of their own, or install the modules on the cluster."
        )


def own_code() -> dict[str, bytes]:
    """This machine's mtrec, for a cluster that lacks it (`--with-code`); its dependencies must be there all the same."""
    package = Path(__file__).parents[1]
    found = {f"mtrec/{file.relative_to(package)}": file.read_bytes() for file in package.rglob("*") if _is_code(file)}
    _check_size(found, "mtrec's own files")
    return found
