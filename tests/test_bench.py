"""`mtrec bench`: what follows from launches, wrong options, and one small real measurement."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from typer.testing import CliRunner

from mtrec.architectures import ARCHITECTURES as KINDS
from mtrec.bench.launches import ARCHITECTURES, Asked, Measurement, measurements, summary
from mtrec.bench.page import page
from mtrec.bench.stages import Phases
from mtrec.bench.table import show
from mtrec.cli import app
from mtrec.kinds import check_options
from mtrec.launch_bench import REFERENCE, launch_bench

CEILINGS = {"fp32_flops": 1e11, "bf16_flops": 2e11, "gather_bytes": 2e9}


def launched(train: float, bare: float) -> dict[str, dict[str, Any]]:
    return {
        "ceilings": CEILINGS,
        "yardstick": {"rows_per_second": bare},
        "decode": {"rows_per_second": 4 * bare},
        "encode": {"rows_per_second": 3 * bare},
        "train bf16, 2 workers": {"rows_per_second": train, "data_wait": 0.01, "peak_bytes": 10**9},
        "mtrec --help": {"seconds": 0.2},
    }


def result() -> dict[str, Any]:
    asked = Asked(Path("e.yaml"), Path("work"))
    wanted = [
        Measurement("ceilings", "ceilings", "fp32"),
        Measurement("yardstick", "yardstick", "fp32"),
        Measurement("decode", "decode", "fp32"),
        Measurement("encode", "encode", "fp32"),
        Measurement("train bf16, 2 workers", "read", "bf16", 2),  # `read` has no floor: no run is opened here
        Measurement("mtrec --help", "help", "fp32"),
    ]
    rounds = [launched(200.0, 100.0), launched(60.0, 20.0), launched(190.0, 100.0)]
    return summary(asked, wanted, {each.variant: Path("run") for each in wanted}, rounds)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architectures_beside_the_reference_are_ones_that_there_are(name: str) -> None:
    options = dict(ARCHITECTURES[name])
    kind = options.pop("kind")
    assert options.keys() <= check_options(KINDS[str(kind)], options, "model.architecture").keys()


def test_ratios_are_taken_within_rounds() -> None:
    found = result()
    ratio = found["ratios"]["train bf16, 2 workers / yardstick"]
    assert ratio["values"] == [2.0, 3.0, 1.9]
    assert found["train_over_yardstick"] == ratio["median"] == 2.0  # of the medians it would be 1.9
    assert found["ratios"]["encode / decode"]["median"] == 0.75
    assert found["startup"]["mtrec --help"]["median"] == 0.2


def test_the_table_and_the_page_show_what_was_measured() -> None:
    found = result()
    to = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115 - rich writes there
    show(found, to)
    text = to.export_text()
    assert "train bf16, 2 workers" in text
    assert "60 to 200" in text
    html = page(found)
    assert "Ratios within a round" in html
    assert "http://" not in html.split("<script>")[0]


def test_all_stages_are_launched_once_a_round() -> None:
    names = [each.name for each in measurements(Asked(Path("e.yaml"), Path("work"), workers=2))]
    assert len(names) == len(set(names))
    assert {each.stage for each in measurements(Asked(Path("e.yaml"), Path("work"), stages=("encode",)))} == {
        "ceilings",
        "decode",
        "encode",
    }


def test_phases_add_up_to_the_time_between_the_marks() -> None:
    phases = Phases(torch.device("cpu"))
    start = phases.at
    for name in ("lookup", "forward", "lookup"):
        phases.mark(name)
    assert set(phases.seconds) == {"lookup", "forward"}
    assert sum(phases.seconds.values()) == pytest.approx(phases.at - start, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stage", "trian"], "--stage should be one of .* Did you mean 'train'"),
        (["--workers", "0"], "--workers should be at least 1. Found 0."),
        (["--device", "gpu"], "--device should be cpu or cuda. Found 'gpu'."),
        (["nowhere.yaml"], "There is no experiment file 'nowhere.yaml'"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, ["bench", *options])
    assert isinstance(outcome.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise outcome.exception


@pytest.mark.slow
def test_a_small_measurement_from_parquet_to_weights(tmp_path: Path) -> None:
    tree = yaml.safe_load(REFERENCE.read_text())
    tree["features"] = {name: tree["features"][name] for name in ("c0", "c1", "items", "d0")}
    tree["data"]["batch_size"] = 64
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    launch_bench(
        ["compute", "encode"],
        experiment=tmp_path / "small.yaml",
        work=tmp_path / "work",
        workers=1,
        device="cpu",
        rounds=1,
        steps=6,
        rows=2_000,
        architectures=False,
        overrides=["model.architecture.expert_layers=[8]"],
        json_file=tmp_path / "found.json",
        page_file=tmp_path / "found.html",
    )
    found = json.loads((tmp_path / "found.json").read_text())
    compute = found["stages"]["compute bf16, 1 worker"]
    assert sum(compute["phases"].values()) == pytest.approx(1.0)
    assert compute["rows_per_second"]["median"] > 0
    assert 0 < found["ratios"]["encode / decode"]["median"] < 10
