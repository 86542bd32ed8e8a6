"""A rank that hangs: the others end in time, with an error that names the key to change."""

import os
import signal
from pathlib import Path

import torch
from ranks import run_ranks
from runs import small_run

from mtrec.run import Run
from mtrec.train import train

SECONDS = 8


def rank_beside_a_stopped_one(folder: str) -> str:
    """Rank 1 stops itself (SIGSTOP) at its fifth step, and goes on once rank 0 has ended; what each of them met."""
    run, rank, steps = Run(Path(folder)), int(os.environ["RANK"]), 0
    stopped = run.folder / "stopped"

    def at_every_step() -> bool:
        nonlocal steps
        steps += 1
        if rank == 1 and steps == 5:
            stopped.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return False

    try:
        for _ in train(run, device=torch.device("cpu"), stop_requested=at_every_step):
            pass
    except RuntimeError as error:
        return f"{type(error).__name__} at step {steps}: {error}"
    finally:
        if rank == 0 and stopped.exists():
            os.kill(int(stopped.read_text()), signal.SIGCONT)
    return "no error"


def test_a_stopped_rank_ends_the_training_with_an_error_that_names_the_timeout(tmp_path: Path) -> None:
    run = small_run(tmp_path, f"training.collective_timeout_seconds={SECONDS}", "training.validate_every=3")
    first, second = run_ranks(2, rank_beside_a_stopped_one, str(run.folder), folder=tmp_path)
    assert first.startswith("HangError at step 5: another worker did not answer within")
    assert f"within {SECONDS} s (training.collective_timeout_seconds)" in first
    assert second != "no error"  # whoever it was, it cannot go on as if nothing had happened
