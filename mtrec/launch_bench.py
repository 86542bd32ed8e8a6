"""What `mtrec bench` does: checks the request, measures, shows the table, writes JSON and the page."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mtrec.architectures.products import emulates_bf16
from mtrec.atomic import check_file, write_atomically
from mtrec.bench import Asked, bench
from mtrec.bench.environment import check_experiment
from mtrec.bench.launches import STAGE_NAMES
from mtrec.bench.page import page
from mtrec.bench.table import show
from mtrec.config import apply_overrides, parse_experiment
from mtrec.kinds import nearest
from mtrec.terminal import console
from mtrec.yaml_tree import read_yaml

PRECISIONS = ("bf16", "fp32")
REFERENCE = Path(__file__).parents[1] / "pipelines" / "benchmark" / "reference.yaml"


def launch_bench(
    stages: Sequence[str],
    *,
    experiment: Path | None,
    work: Path,
    workers: int | None,
    device: str,
    rounds: int,
    steps: int,
    rows: int,
    architectures: bool,
    overrides: Sequence[str],
    json_file: Path | None,
    page_file: Path | None,
    peers: bool = False,
    precisions: Sequence[str] = (),
) -> None:
    """Raises ValueError naming the option for a stage, a device or a number that is not there or makes no sense."""
    check_file(json_file, "--json")
    check_file(page_file, "--html")
    for stage in stages:
        if stage not in STAGE_NAMES:
            raise ValueError(f"--stage should be one of {', '.join(STAGE_NAMES)}. Found '{stage}'.{nearest(stage, STAGE_NAMES)}")
    for option, value in (("workers", workers), ("rounds", rounds), ("steps", steps), ("rows", rows)):
        if value is not None and value < 1:
            raise ValueError(f"--{option} should be at least 1. Found {value}.")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"--precision should be {' or '.join(PRECISIONS)}. Found '{precision}'.")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device should be cpu or cuda. Found '{device}'.")
    if peers and device != "cpu":
        raise ValueError(f"--peers times its libraries on the CPU. Found --device {device}; leave one of the two out.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU and a CUDA build of torch. Found none; leave the option out to use the CPU.")
    if workers is None:
        workers = torch.cuda.device_count() if device == "cuda" else 2
    if device == "cuda" and workers > torch.cuda.device_count():
        raise ValueError(f"--workers {workers} needs as many GPUs with --device cuda. Found {torch.cuda.device_count()}.")
    experiment = experiment or REFERENCE
    if not experiment.is_file():
        raise ValueError(f"There is no experiment file '{experiment}'. Name one as the argument of `mtrec bench`.")
    if peers:
        tree = read_yaml(experiment.read_text(encoding="utf-8"), str(experiment))
        check_experiment(parse_experiment(apply_overrides(tree, overrides), default_name=experiment.stem), experiment, rows)
    warmup = max(1, min(20, steps // 3))
    slow_bf16 = not precisions and device == "cpu" and emulates_bf16()
    asked = Asked(
        experiment=experiment,
        work=work.absolute(),
        stages=tuple(stages),
        workers=workers,
        device=device,
        rounds=rounds,
        steps=-(-steps // warmup) * warmup,  # a logged step at its end
        warmup=warmup,
        rows=rows,
        architectures=architectures,
        overrides=tuple(overrides),
        peers=peers,
        precisions=tuple(dict.fromkeys(precisions)) or (("fp32",) if slow_bf16 else PRECISIONS),
    )
    to = console()
    if slow_bf16:
        to.print("this CPU has no instructions for bf16: fp32 alone is measured, which is faster here (--precision bf16)")
    with to.status("prepares data and runs") as status:
        found = bench(asked, status.update if to.is_terminal else to.print)
    show(found, to)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(json_file, json.dumps(found, indent=1) + "\n")
        to.print(f"written: {json_file}", soft_wrap=True)
    if page_file is not None:
        page_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(page_file, page(found))
        to.print(f"written: {page_file}", soft_wrap=True)
