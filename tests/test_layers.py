"""The map of the package, held by its imports: lower layers know nothing of higher ones; leaves import what they must.

Every import statement counts, also those inside functions, except those for type checkers only.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).parents[1] / "mtrec"

# From the bottom to the top; the modules of one line do not import each other. A new module is written in here.
LAYERS = [
    ["versions", "kinds", "yaml_tree", "stopping", "locking", "atomic", "hang", "allocator", "shared_memory", "written"],
    ["flags", "events", "terminal", "mirror"],
    ["recorder"],
    ["synthetic"],
    ["features"],
    ["batch"],
    ["where", "files", "row_order"],
    ["schema"],
    ["row_groups"],
    ["dataset"],
    ["windows"],
    ["reader"],
    ["dropout"],
    ["architectures", "interactions"],
    ["tasks"],
    ["balancing"],
    ["metrics"],
    ["experiment"],
    ["config"],
    ["feed", "ahead", "pooled_exchange", "sources"],
    ["ids_exchange"],
    ["labels"],
    ["embeddings"],
    ["model"],
    ["formula"],
    ["parallel"],
    ["optim", "gradients"],
    ["checkpoint"],
    ["step"],
    ["run"],
    ["display", "display_scoring", "prepare"],
    ["evaluate", "warm", "predictions"],
    ["check"],
    ["meter"],
    ["train"],
    ["score"],
    ["scored_files"],
    ["compare"],
    ["tune", "bench"],
    ["jobs"],
    ["launch", "launch_compare", "launch_tune", "launch_bench"],
    ["cli"],
]
HEIGHT = {name: height for height, names in enumerate(LAYERS) for name in names}

# What a leaf may import beside the standard library, so that it can be read, tested and copied alone.
LEAVES = {
    "versions": set[str](),
    "events": set[str](),
    "terminal": {"rich"},
    "recorder": {"tensorboard", "mtrec.atomic", "mtrec.events"},
    "kinds": {"pydantic", "pydantic_core", "annotated_types"},
    "synthetic": {"numpy", "pyarrow"},
    "features": {"numpy", "pyarrow", "annotated_types", "mtrec.kinds", "mtrec.written"},
    "where": {"pyarrow", "mtrec.kinds"},
    "files": {"pyarrow", "mtrec.kinds"},
    "schema": {"pyarrow", "mtrec.kinds", "mtrec.files"},
    "row_groups": {"pyarrow", "mtrec.where", "mtrec.files", "mtrec.schema"},
    "dataset": {"pyarrow", "mtrec.kinds", "mtrec.where", "mtrec.files", "mtrec.schema", "mtrec.row_groups"},
    "row_order": {"numpy"},
    "windows": {"pyarrow", "numpy", "mtrec.dataset", "mtrec.row_order"},
    "reader": {"pyarrow", "mtrec.dataset", "mtrec.row_order", "mtrec.windows"},
    "dropout": {"torch"},
    "architectures": {"torch", "annotated_types", "mtrec.kinds", "mtrec.dropout"},
    "interactions": {"torch", "annotated_types", "mtrec.kinds"},
    "tasks": {"torch", "annotated_types", "mtrec.kinds"},
    "balancing": {"torch", "torchjd", "numpy", "scipy", "annotated_types", "mtrec.kinds"},
    "metrics": {"numpy", "scipy", "pyarrow"},
}

# Module prefix -> the only members of the package that may name it.
HOMES = {
    "ray": {"jobs"},
    "torch.distributed": {"parallel", "shared_memory", "checkpoint"},
    "torchrec.distributed": {"parallel"},
}


class Use(NamedTuple):
    """The file at `place` names the module `name`; `member` is what it belongs to directly below mtrec/."""

    member: str
    name: str
    place: str
    by_import: bool


def imported(node: ast.AST, inside: str) -> list[str]:
    """The full names that a statement imports; `from a import b` gives a.b, for b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        source = node.module or ""
        if node.level:
            source = ".".join([*inside.split(".")[: -node.level], *filter(None, [source])])
        return [f"{source}.{alias.name}" for alias in node.names]
    return []


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        if not is_for_type_checkers(child):
            yield child
            yield from nodes(child)


def attribute_of_module(node: ast.AST) -> list[str]:
    """`torch.distributed` in `torch.distributed.barrier()` speaks it as well as an import does."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return [f"{node.value.id}.{node.attr}"]
    return []


def uses_in(source: str, path: Path) -> list[Use]:
    """What a file of the package imports or names; `path` is relative to the package's folder."""
    parts = [*path.parts[:-1], path.stem]
    inside = ".".join(["mtrec", *parts])
    return [
        Use(parts[0], name, f"mtrec/{path}:{getattr(node, 'lineno', 0)}", by_import)
        for node in nodes(ast.parse(source))
        for names, by_import in ((imported(node, inside), True), (attribute_of_module(node), False))
        for name in names
    ]


@cache
def all_uses() -> tuple[Use, ...]:
    return tuple(
        use
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
        for use in uses_in(path.read_text(), path.relative_to(PACKAGE))
    )


def is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def climbs(use: Use) -> bool:
    """Whether a member of the package imports one of its own height or higher."""
    parts = use.name.split(".")
    if parts[0] != "mtrec" or len(parts) == 1 or parts[1] == use.member or not {parts[1], use.member} <= HEIGHT.keys():
        return False
    return HEIGHT[parts[1]] >= HEIGHT[use.member]


def is_foreign(use: Use) -> bool:
    """Whether a leaf imports something that is not on its list."""
    top = use.name.split(".")[0]
    if (
        not use.by_import
        or use.member not in LEAVES
        or top in sys.stdlib_module_names
        or is_below(use.name, f"mtrec.{use.member}")
    ):
        return False
    return not any(is_below(use.name, allowed) for allowed in LEAVES[use.member])


def is_away_from_home(use: Use) -> bool:
    return any(is_below(use.name, module) and use.member not in homes for module, homes in HOMES.items())


def places(uses: list[Use]) -> list[str]:
    return [f"{use.place} {use.name}" for use in uses]


def test_every_module_has_its_place() -> None:
    members = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert members - {"__init__"} == HEIGHT.keys(), "LAYERS should have every module, at its height, and no other"


def test_no_layer_imports_a_higher_one() -> None:
    assert not places([use for use in all_uses() if climbs(use)])


def test_leaves_import_only_what_they_must() -> None:
    assert not places([use for use in all_uses() if is_foreign(use)])


def test_ray_and_torch_distributed_have_one_home() -> None:
    assert not places([use for use in all_uses() if is_away_from_home(use)])


@pytest.mark.parametrize(
    ("path", "source", "broken"),
    [
        ("kinds.py", "from mtrec import config", climbs),
        ("tasks/binary.py", "def f():\n    import mtrec.model", climbs),
        ("features/hashing.py", "from ..reader import Reader", climbs),
        ("architectures.py", "from mtrec.interactions import DCNV2", climbs),
        ("metrics/rows.py", "def f():\n    import torch", is_foreign),
        ("tasks/dwell.py", "from mtrec.dropout import Dropout", is_foreign),
        ("train.py", "def f():\n    from ray import train", is_away_from_home),
        ("evaluate.py", "import torch\ntorch.distributed.barrier()", is_away_from_home),
        ("model.py", "from torch import distributed", is_away_from_home),
    ],
)
def test_each_rule_can_be_broken(path: str, source: str, broken: object) -> None:
    assert callable(broken)
    assert any(broken(use) for use in uses_in(source, Path(path)))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "tasks/dwell.py",
            "from mtrec.tasks.task import Task\nfrom . import task\nimport torch.nn.functional as F\nimport math",
        ),
        ("jobs/train.py", "import ray\nfrom mtrec.train import train"),
        ("checkpoint.py", "import torch.distributed.checkpoint as dcp"),
        ("tasks/task.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mtrec.model import Model"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    uses = uses_in(source, Path(path))
    assert uses
    assert not [use for use in uses if climbs(use) or is_away_from_home(use) or is_foreign(use)]


def test_help_imports_no_torch_and_is_quick() -> None:
    code = (
        "import sys\nfrom mtrec.cli import main\nsys.argv = ['mtrec', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'torchrec', 'ray', 'pyarrow', 'pandas', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = os.times()
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout
        # Processor time of the child, which a busy machine does not stretch as it does the clock's.
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(seconds) < 0.3
