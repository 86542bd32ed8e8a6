"""What an asynchronous checkpoint costs the training, at the reference size (195 MB of tables).

python pipelines/benchmark/checkpoint.py [--work runs/bench] [--steps 120] [--checkpoints 3] [--rounds 3]

The reference experiment is trained on one worker, from Parquet, in the process of its own, with so many asynchronous checkpoints
between its steps, and without; launches alternate. The cost of a checkpoint is the difference of the two times over the same
steps, divided by their number: copying the tables (which training waits for), and writing, hashing and committing, which go on
beside it and take its cores. Writes pipelines/benchmark/results/checkpoint-cpu.json.
"""

import argparse
import json
import statistics
from pathlib import Path

from mtrec.bench.launches import Asked, Measurement, about, beside, launch, prepare_variants

HERE = Path(__file__).parent


def main() -> None:
    """Reads the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    warmup = 20
    asked = Asked(HERE / "reference.yaml", arguments.work.absolute(), steps=arguments.steps, warmup=warmup)
    every = (arguments.steps - 1) // arguments.checkpoints
    ways = {
        "with": (f"training.checkpoint_every={every}",),
        "without": (f"training.checkpoint_every={10 * (arguments.steps + warmup)}",),
    }
    one = Measurement("train", "train", "fp32")
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    made = 0
    for number in range(arguments.rounds):
        for way in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            changed = beside(asked, f"checkpoint-{way}", *ways[way])
            found = launch(one, prepare_variants(changed, [one])[one.variant], changed)
            seconds[way].append(asked.steps * 4096 / found["rows_per_second"])
            if way == "with":
                made = sum(1 for step in range(every, asked.steps + warmup, every) if step > warmup)
            print(f"round {number + 1}, {way} checkpoints: {seconds[way][-1]:.2f} s for {asked.steps} steps", flush=True)
    costs = [(a - b) / made for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    step = statistics.median(seconds["without"]) / asked.steps
    cost = statistics.median(costs)
    result = {
        "about": {**about(asked), "workers": 1},
        "checkpoints": made,
        "seconds_a_checkpoint": {"median": cost, "values": costs},
        "step_seconds": step,
        "share_every_200_steps": cost / (200 * step + cost),
        "share_every_1000_steps": cost / (1000 * step + cost),
    }
    target = HERE / "results" / "checkpoint-cpu.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(f"a checkpoint costs {cost:.2f} s ({min(costs):.2f} to {max(costs):.2f}), a step takes {step:.3f} s:")
    shares = result["share_every_200_steps"], result["share_every_1000_steps"]
    print(f"{shares[0]:.1%} of the time every 200 steps, {shares[1]:.1%} every 1,000")


if __name__ == "__main__":
    main()
