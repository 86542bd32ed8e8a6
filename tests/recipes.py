"""Scripts of `pipelines/`, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

PIPELINES = Path(__file__).parents[1] / "pipelines"


def recipe(path: str) -> ModuleType:
    """The script of this path below `pipelines`. Two may have one file name: it is known by its path."""
    name = path.removesuffix(".py").replace("/", "_")
    specification = importlib.util.spec_from_file_location(name, PIPELINES / path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where dataclasses look for it
    specification.loader.exec_module(module)
    return module
