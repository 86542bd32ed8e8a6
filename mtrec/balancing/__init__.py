"""Balancing: (global losses_K, gramian_KK or None, step, active_K) -> weights_K, one class a method.

The trainer minimises weights_K @ losses_K by one backward pass. Losses are those of the global batch, the Gramian of
the tasks' gradients is reduced over the ranks, random methods draw from (seed, step), and all state lies in buffers: so
every rank has the same weights, and a resumed run goes on with them. `Balancer` adds what is common to all methods.

From TorchJD: IMTL-G, Aligned-MTL, UPGrad, DualProj (`mtrec.balancing.torchjd_methods` says how, the other modules why
not).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtrec.balancing.balancer import Balancer
from mtrec.balancing.bargaining import FairGrad, NashMTL
from mtrec.balancing.cagrad import CAGrad
from mtrec.balancing.learned import IMTLL, Uncertainty
from mtrec.balancing.mgda import MGDA
from mtrec.balancing.norms import DBMTL, GradNorm, MetaBalance
from mtrec.balancing.pace import DWA, FAMO
from mtrec.balancing.rlw import RLW
from mtrec.balancing.scalarization import GLS, STCH
from mtrec.balancing.static import Scheduled, Static
from mtrec.balancing.surgery import GradVac, PCGrad
from mtrec.balancing.torchjd_methods import IMTLG, AlignedMTL, DualProj, UPGrad
from mtrec.kinds import Kinds, check_options, nearest, option_types, resolve

BALANCERS = Kinds(
    {
        "static": Static,
        "scheduled": Scheduled,
        "uncertainty": Uncertainty,
        "dwa": DWA,
        "rlw": RLW,
        "gls": GLS,
        "imtl_l": IMTLL,
        "famo": FAMO,
        "stch": STCH,
        "gradnorm": GradNorm,
        "metabalance": MetaBalance,
        "mgda": MGDA,
        "pcgrad": PCGrad,
        "gradvac": GradVac,
        "cagrad": CAGrad,
        "imtl_g": IMTLG,
        "nash_mtl": NashMTL,
        "fairgrad": FairGrad,
        "aligned_mtl": AlignedMTL,
        "upgrad": UPGrad,
        "dualproj": DualProj,
        "db_mtl": DBMTL,
    },
    ("needs_gramian", "forward"),
)


def make_balancer(
    kind: str,
    options: Mapping[str, Any],
    tasks: Sequence[str],
    auxiliary: Sequence[str] = (),
    seed: int = 0,
    place: str = "balancing",
    also_known: Iterable[str] = (),
) -> Balancer:
    """The Balancer of a `balancing:` node: options of the method and the common ones, side by side.

    `seed` is used by random methods whose options name none; `also_known` are keys that may stand at `place` beside the
    options. Raises ValueError naming `place.option`.

    >>> balancer = make_balancer("cagrad", {"c": 0.5, "every": 5}, ["click", "dwell"])
    >>> balancer.method.c, balancer.every
    (0.5, 5)
    """
    method_class = resolve(kind, BALANCERS, f"{place}.kind")
    own, common = option_types(method_class), option_types(Balancer)
    for name in options:
        if name not in own and name not in common:
            known = sorted({*own, *common, *also_known})
            hint = nearest(name, known) or f" Known here: {', '.join(known)}."
            raise ValueError(f"`{place}.{name}` is not a known key.{hint}")
    chosen = {name: value for name, value in options.items() if name in own}
    if "seed" in own and chosen.get("seed") is None:
        chosen["seed"] = seed
    method = method_class(tasks, **check_options(method_class, chosen, place))
    shared = check_options(Balancer, {name: value for name, value in options.items() if name in common}, place)
    return Balancer(method, tasks, auxiliary, **shared)


__all__ = ["BALANCERS", "Balancer", "make_balancer"]
