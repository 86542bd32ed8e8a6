"""What each thing that makes training fast is worth: the same steps with one of them switched off.

python pipelines/benchmark/switches.py [--work runs/bench] [--steps 100] [--rounds 5]

Steps of the reference experiment from memory on two workers, bf16 and fp32; in every round each way is launched once, in
processes of its own, in turning order. A ratio is taken within a round; the median counts. Writes
pipelines/benchmark/results/switches-cpu.json.
"""

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

from mtrec.bench.launches import Asked, Measurement, about, beside, launch, prepare_variants

HERE = Path(__file__).parent
AS_IT_IS = "as it is"
WAYS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {  # name: environment, overrides
    AS_IT_IS: ({}, ()),
    "exchange through gloo (training.exchange=gloo)": ({}, ("training.exchange=gloo",)),
    "freed memory goes back (MALLOC_TRIM_THRESHOLD_=131072)": ({"MALLOC_TRIM_THRESHOLD_": "131072"}, ()),
    "small pages (GLIBC_TUNABLES=glibc.malloc.hugetlb=0)": ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, ()),
    "fp32 products through MKL, as on Intel's processors anyway (MTREC_ONEDNN=0)": ({"MTREC_ONEDNN": "0"}, ()),
    "fp32 products through oneDNN, as elsewhere anyway (MTREC_ONEDNN=1)": ({"MTREC_ONEDNN": "1"}, ()),
    "all of these": (
        {"MALLOC_TRIM_THRESHOLD_": "131072", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "MTREC_ONEDNN": "0"},
        ("training.exchange=gloo",),
    ),
}


@contextlib.contextmanager
def environment(added: dict[str, str]) -> Iterator[None]:
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def main() -> None:
    """Reads the arguments, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/bench"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    asked = Asked(HERE / "reference.yaml", arguments.work.absolute(), steps=arguments.steps, rounds=arguments.rounds)
    kinds = [Measurement(f"compute {kind}", "compute", kind, 2) for kind in ("bf16", "fp32")]
    seconds: dict[tuple[str, str], list[float]] = {}
    for number in range(arguments.rounds):
        for way in list(WAYS) if number % 2 == 0 else list(WAYS)[::-1]:
            added, overrides = WAYS[way]
            changed = beside(asked, "switched", *overrides) if overrides else asked
            for each in kinds:
                with environment(added):
                    found = launch(each, prepare_variants(changed, [each])[each.variant], changed)
                step = 4096 / found["rows_per_second"]
                seconds.setdefault((each.variant, way), []).append(step)
                print(f"round {number + 1}, {each.variant}, {way}: {1e3 * step:.1f} ms a step", flush=True)
    ways = {}
    for (kind, way), values in seconds.items():
        ratios = [mine / base for mine, base in zip(values, seconds[kind, AS_IT_IS], strict=True)]
        ways[f"{kind}, {way}"] = {
            "step_ms": {"median": 1e3 * statistics.median(values), "values": [1e3 * each for each in values]},
            "times_as_long": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
        }
    result = {"about": about(asked), "ways": ways}
    (HERE / "results" / "switches-cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, each in ways.items():
        print(f"{name}: {each['step_ms']['median']:.1f} ms a step, {each['times_as_long']['median']:.2f} times as long as it is")


if __name__ == "__main__":
    main()
