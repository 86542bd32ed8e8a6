"""Kills and resumes small trainings on every pair of 1, 2 and 4 ranks, and says whether anything was lost, or seen twice.

    .venv/bin/python pipelines/resilience/trials.py [--seeds 0 1 2] [--out RESULTS.md]

A trial: ranks train two epochs on gloo, as processes of this machine; a random one gets SIGKILL at a random moment of a random
step; ranks of the second number go on from the newest valid checkpoint to the end. Held against a run that nobody killed. The
trial itself stands in tests/trials.py, of which the tests run six. Takes about ten seconds a trial on 2 cores.
"""

import argparse
import itertools
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = str(HERE.parents[1] / "tests")
sys.path.insert(0, TESTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [TESTS, os.environ.get("PYTHONPATH")]))  # for the ranks
os.environ.setdefault("OMP_NUM_THREADS", "1")

HEAD = (
    "| ranks | seed | SIGKILL to rank, at step | resumed from | losses, 20 steps | metrics | bit for bit | result |",
    "|---|---|---|---|---|---|---|---|",
)


def main() -> int:
    """Runs the trials; the exit code is the number of those that failed."""
    from logs import write_log
    from trials import ROWS, Trial, conduct, prepared

    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--out", type=Path, default=HERE / "RESULTS.md")
    chosen = arguments.parse_args()
    logging.getLogger("mtrec.checkpoint").setLevel(logging.ERROR)  # half-written checkpoints are what this is about
    lines, failed, began = list(HEAD), 0, time.monotonic()
    print("\n".join(HEAD))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / f"log-{ROWS}" / "train", rows=ROWS)
        write_log(folder / f"log-{ROWS}" / "validation", rows=1_000, seed=1)
        base = prepared(folder)
        for before, after in itertools.product((1, 2, 4), repeat=2):
            for seed in chosen.seeds:
                found = conduct(base, Trial(before, after, seed))
                failed += bool(found.failures)
                lines.append(
                    f"| {before} -> {after} | {seed} | {found.kill.rank}, {found.kill.step + 1} | {found.resumed_step} "
                    f"| {found.loss_difference:.1e} | {found.metric_difference:.1e} | {'yes' if found.bit_equal else 'no'} "
                    f"| {'; '.join(found.failures) or 'as it should'} |"
                )
                print(lines[-1], flush=True)
    lines += [
        "",
        f"{len(lines) - 2} trials, {failed} failed, {time.monotonic() - began:.0f} s. Losses: largest relative difference to the "
        "run without a kill in the 20 steps after resuming (at most 1e-5; 0 on the same number of ranks). Metrics: of the last "
        "validation (at most 1e-3). Bit for bit: all final weights and optimizer states (must be so on the same number of "
        "ranks). Every trial also checks that each row was trained on exactly once an epoch, in the same global batches, and "
        "that the restored state, gathered, is to the bit what was saved.",
    ]
    chosen.out.write_text("# Trials of kill and resume\n\nMade by `trials.py`.\n\n" + "\n".join(lines) + "\n")
    print(lines[-1])
    return failed


if __name__ == "__main__":
    sys.exit(main())
