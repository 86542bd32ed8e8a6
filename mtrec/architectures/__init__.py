"""Multi-task architectures: the shared representation x_BD -> {task: (B, H)}, and the towers that follow.

Each architecture is a kind (`model.architecture` in the YAML): `(input_dim, tasks, *, options)` with
    forward(x_BD)         {task: (B, H)}, in the order of the tasks
    output_dim            H
    gates(x_BD)           {gate: (B, experts it sees)}, rows sum to 1; {} without gates
    shared_parameters()   the parameters that the losses of more than one task reach: where gradients are balanced
    flops_per_row()       of the forward's matrix products, a multiply-add counted as two
No layer mixes rows, so a gradient per row means something, and a batch may have no rows.

To add one: write such a class in a file here and enter it below, or in a module of your own
(`kind: my_module:MyClass`), from the same blocks (`mtrec.architectures.experts`).

Letters in shapes: B rows on this rank, D shared width, H expert width.
"""

from mtrec.architectures.cgc import CGC
from mtrec.architectures.mmoe import MMoE
from mtrec.architectures.omoe import OMoE
from mtrec.architectures.ple import PLE
from mtrec.architectures.shared_bottom import SharedBottom
from mtrec.architectures.single_task import SingleTask
from mtrec.architectures.towers import Towers
from mtrec.kinds import Kinds

__all__ = ["ARCHITECTURES", "CGC", "PLE", "MMoE", "OMoE", "SharedBottom", "SingleTask", "Towers"]

ARCHITECTURES = Kinds(
    {
        "single_task": SingleTask,
        "shared_bottom": SharedBottom,
        "omoe": OMoE,
        "mmoe": MMoE,
        "cgc": CGC,
        "ple": PLE,
    },
    ("forward", "gates", "shared_parameters", "flops_per_row"),
)
