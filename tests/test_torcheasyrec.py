"""The comparison with TorchEasyRec: what is written for it, what stands in for packages that are not there, ratios."""

import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recipes import recipe

from mtrec.bench.environment import IDS, LABELS, NUMBERS
from mtrec.bench.launches import Asked, Measurement, prepare_variants
from mtrec.bench.peers import torcheasyrec as peer
from mtrec.launch_bench import REFERENCE
from mtrec.run import open_run

script: Any = recipe("benchmark/torcheasyrec.py")


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Iterator[peer.Stubs]:
    """As `measure` puts them in; nothing of them is left afterwards."""
    made, before = peer.Stubs(), set(sys.modules)
    monkeypatch.setattr(peer, "NEVER_CALLED", ("not_there", "nor_this"))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, made])
    monkeypatch.setattr(peer.Absent, "sealed", False)
    yield made
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_what_is_not_installed_can_be_imported_and_not_used(stubs: peer.Stubs) -> None:
    from nor_this.apis import storage  # type: ignore[import-not-found]
    from not_there import Graph  # type: ignore[import-not-found]

    assert stubs.made == ["nor_this", "not_there"]
    with pytest.raises(peer.NotInstalled, match=r"not_there\.Graph was called, of a package that is not installed"):
        Graph()
    kept = storage.Client
    peer.Absent.sealed = True
    for used in (lambda: storage.Client, lambda: kept.open, lambda: sys.modules["nor_this"].apis.more):
        with pytest.raises(peer.NotInstalled, match="was used"):
            used()
    with pytest.raises(ModuleNotFoundError, match="not_a_package"):
        importlib.import_module("not_a_package")


def test_the_clock_calls_the_pipeline_as_it_is() -> None:
    class Pipeline:
        def progress(self, batches: list[float]) -> tuple[dict[str, float]]:
            return ({"a": batches.pop(0), "b": 1.0},)

    clock = peer.Clock(lambda *arguments, **options: Pipeline())
    pipeline, batches = clock("model", lr=1), [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    assert [pipeline.progress(batches)[0]["a"] for _ in range(7)] == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0]
    assert len(clock.times) == 7
    assert clock.times == sorted(clock.times)
    assert (peer.mean_loss(clock.first), peer.mean_loss(clock.last)) == (7.0, 5.0)  # of 5 steps each, b included
    with pytest.raises(ValueError, match="diverged"):
        peer.mean_loss([{"a": float("nan")}])


def test_the_log_is_copied_with_labels_that_it_can_read(tmp_path: Path) -> None:
    click, conversion, dwell = LABELS
    columns = {
        "c0": pa.array([5, 6, 7, 8], pa.int64()),
        click: pa.array([1, 0, 1, None], pa.int8()),
        conversion: pa.array([1, 0, 0, 0], pa.int8()),
        dwell: pa.array([3.0, None, 0.0, None], pa.float32()),
    }
    source = tmp_path / "log"
    source.mkdir()
    pq.write_table(pa.table(columns), source / "part-0.parquet", compression="zstd", row_group_size=3)
    script.copy_log(source, tmp_path / "copy")
    copied = pq.ParquetFile(tmp_path / "copy" / "part-0.parquet")
    assert [copied.metadata.row_group(group).num_rows for group in range(copied.num_row_groups)] == [3, 1]
    table = copied.read()
    assert table["c0"].to_pylist() == [5, 6, 7, 8]
    assert table[click].type == table[conversion].type == pa.int32()
    assert table[click].to_pylist() == [1, 0, 1, 0]
    assert table[dwell].to_pylist() == pytest.approx([1.386294, 0.0, 0.0, 0.0])
    assert not (tmp_path / "copy-unfinished").exists()


def test_its_config_says_what_the_reference_says(tmp_path: Path) -> None:
    asked = Asked(REFERENCE, tmp_path, rows=1_000, steps=2, warmup=1)
    run = open_run(prepare_variants(asked, [Measurement("train", "train", "fp32", 2)])["fp32"])
    text = script.config_of(run, "log/*.parquet", tmp_path / "model", script.LAYOUTS[script.SAME], "bf16", 30, 15)
    assert text.count("feature_configs") == len(IDS) + 1 + len(NUMBERS)
    for name, rows in (("c0", 102), ("c25", 1_000_002), ("items", 50_002)):
        assert re.search(rf'feature_name: "{name}" expression: "user:{name}" num_buckets: {rows} embedding_dim: 16 ', text)
    assert "hidden_units: [256, 128] } num_expert: 4" in text
    assert text.count("hidden_units: [64]") == 3
    assert "batch_size: 2048" in text  # of each of two processes
    assert "num_steps: 30 save_checkpoints_steps: 15" in text
    assert 'mixed_precision: "BF16"' in text
    plain = script.config_of(run, "log/*.parquet", tmp_path / "model", script.LAYOUTS["1 process x 2 threads"], "fp32", 30, 0)
    assert "batch_size: 4096" in plain
    assert "mixed_precision" not in plain


def test_ratios_are_taken_within_a_round_and_against_the_best_layout() -> None:
    mine, same = script.ours("bf16"), script.theirs("bf16", script.SAME)
    other = script.theirs("bf16", "1 process x 2 threads")
    speeds = [(60.0, 30.0, 40.0), (66.0, 44.0, 33.0), (50.0, 25.0, 50.0)]
    rounds = [{name: {"rows_per_second": each} for name, each in zip((mine, same, other), row, strict=True)} for row in speeds]
    found = script.ratios(rounds)
    assert found[f"{mine} / {same}"] == {"median": 2.0, "low": 1.5, "high": 2.0, "values": [2.0, 1.5, 2.0], "wanted": 1.3}
    best = found[f"{mine} / {script.theirs('bf16', script.BEST)}"]
    assert (best["best"], best["median"], best["wanted"]) == ("1 process x 2 threads", 1.5, 1.2)


def test_a_rank_that_fails_ends_the_others() -> None:
    def started(*codes: str) -> "list[subprocess.Popen[bytes]]":
        return [subprocess.Popen([sys.executable, "-c", code]) for code in codes]

    began = time.monotonic()
    ranks = started("import time; time.sleep(60)", "raise SystemExit(3)")
    assert script.first_failure(ranks) == 1
    assert time.monotonic() - began < 30
    assert [rank.returncode for rank in ranks] == [-9, 3]
    assert script.first_failure(started("", "")) is None
