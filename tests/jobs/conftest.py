"""A user's folder, from which jobs are submitted."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from logs import experiment_tree, write_log


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: an experiment with a module of its own, and data."""
    folder = tmp_path_factory.mktemp("user")
    write_log(folder / "data" / "train", rows=1_500)
    write_log(folder / "data" / "validation", rows=500, seed=1)
    tree: Any = experiment_tree(Path("data/train"), Path("data/validation"))
    tree["model"]["architecture"] = {"kind": "own_towers:Plain", "width": 6}
    tree["training"]["max_failures"] = 0
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    (folder / "own_towers.py").write_text(
        "import own_helper\nimport torch\n\n\nclass Plain(torch.nn.Module):\n"
        "    def __init__(self, input_dim, tasks, *, width: int = 4):\n        super().__init__()\n"
        "        self.output_dim, self.tasks = own_helper.same(width), tuple(tasks)\n"
        "        self.layer = torch.nn.Linear(input_dim, width)\n\n"
        "    def forward(self, x_BD):\n        return {task: self.layer(x_BD).relu() for task in self.tasks}\n\n"
        "    def gates(self, x_BD):\n        return {}\n\n"
        "    def shared_parameters(self):\n        return list(self.layer.parameters())\n\n"
        "    def flops_per_row(self):\n        return 2 * self.layer.weight.numel()\n"
    )
    (folder / "own_helper.py").write_text("def same(value):\n    return value\n")
    return folder
