"""Comparisons over a small log: the files that make one, and its runs in this process."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from logs import experiment_tree, write_log

from mtrec.compare.runs import conduct, folder_of

CPU = torch.device("cpu")


def write_logs(folder: Path) -> Path:
    """Rows of training, of validation and of the test, each in a folder below."""
    write_log(folder / "train", rows=2_000)
    write_log(folder / "validation", rows=500, seed=1)
    write_log(folder / "test", rows=800, seed=2)
    return folder


def base_tree(folder: Path) -> dict[str, Any]:
    """An experiment over `write_logs`."""
    tree: dict[str, Any] = experiment_tree(folder / "train", folder / "validation")
    tree["data"]["test"] = str(folder / "test")
    tree["evaluation"] = {"group_by": "user_id"}
    tree["optimizer"] = {"dense": {"learning_rate": 0.01}}
    return tree


def comparison_file(folder: Path, base: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A comparison file beside its base experiment."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base or base_tree(folder)))
    comparison: dict[str, Any] = {
        "base": "base.yaml",
        "baseline": "mmoe",
        "variants": {
            "shared_bottom": {"set": {"model.architecture.kind": "shared_bottom"}},
            "single_task": {"set": {"model.architecture.kind": "single_task"}},
        },
        "seeds": 2,
        "match": "parameters",
        "segment": "click",
        **changes,
    }
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(comparison))
    return path


def conduct_here(folder: Path, names: Sequence[str]) -> None:
    """The runs of these names, one after the other."""
    for name in names:
        conduct(folder_of(folder, name), CPU)
