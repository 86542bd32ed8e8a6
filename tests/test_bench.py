"""`mtrec bench`: what follows from launches, wrong options, and one small real measurement."""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Generator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from runs import small_run
from typer.testing import CliRunner

from mtrec import checkpoint
from mtrec.architectures import ARCHITECTURES as KINDS
from mtrec.bench import launches
from mtrec.bench.environment import PEERS, PINS, make_environment
from mtrec.bench.launches import ARCHITECTURES, Asked, Measurement, bench, launch, measurements, prepare_variants, summary
from mtrec.bench.page import page
from mtrec.bench.peers.workload import Workload, read
from mtrec.bench.stages import Phases, device_of, whole, whole_from_memory
from mtrec.bench.table import show
from mtrec.cli import app
from mtrec.feed import Fed, feed
from mtrec.kinds import check_options
from mtrec.launch_bench import REFERENCE, launch_bench
from mtrec.reader import Reader

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
    from_memory = ["train bf16, 2 workers, fed from memory", "train fp32, 2 workers, fed from memory"]
    assert [name for name in names if "fed from memory" in name] == from_memory
    on_a_gpu = measurements(Asked(Path("e.yaml"), Path("work"), workers=2, device="cuda"))
    assert not [each.name for each in on_a_gpu if "fed from memory" in each.name]  # `compute` holds its batches on the device
    assert {each.stage for each in measurements(Asked(Path("e.yaml"), Path("work"), stages=("encode",)))} == {
        "ceilings",
        "decode",
        "encode",
    }


def test_one_precision_alone_is_measured_where_the_other_is_emulated() -> None:
    asked = Asked(Path("e.yaml"), Path("work"), precisions=("fp32",), architectures=True)
    wanted = measurements(asked)
    assert {each.variant.partition("-")[0] for each in wanted} == {"fp32"}
    names = [each.name for each in wanted]
    for name in ("train fp32, 2 workers", "train fp32, 1 worker", "score fp32, 2 workers", "train fp32 ple, 2 workers"):
        assert names.count(name) == 1
    rounds = [{"ceilings": CEILINGS, "yardstick": {"rows_per_second": 2.0}, "score fp32, 2 workers": {"rows_per_second": 12.0}}]
    assert summary(asked, [Measurement("ceilings", "ceilings", "fp32")], {}, rounds)["ratios"] == {
        "score fp32, 2 workers / yardstick": {"median": 6.0, "low": 6.0, "high": 6.0, "values": [6.0]}
    }


def test_steps_that_are_fed_from_memory_train_as_those_from_parquet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[int] = []

    def counted(reader: Reader, *arguments: Any, **options: Any) -> Generator[Fed]:
        readings.append(reader.num_batches)
        return feed(reader, *arguments, **options)

    monkeypatch.setattr("mtrec.bench.stages.feed", counted)
    overrides = ("data.validation=null", "training.max_steps=6", "training.log_every=1", "training.checkpoint_every=3")
    run = small_run(tmp_path, *overrides)
    spec = {"device": "cpu", "steps": 4, "warmup": 2}
    found, weights = [], []
    for stage in (whole, whole_from_memory):
        found.append(stage(run, spec))
        newest = checkpoint.newest(run.checkpoints)
        assert newest is not None
        weights.append(checkpoint.read(newest.folder))
        assert len(readings) == len(found) - 1  # the second stage's, before its steps: training itself reads by another name
    assert [each["checkpoints"] for each in found] == [2, 2]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    short = small_run(tmp_path, *overrides, "training.epochs=6", rows=300)
    assert whole_from_memory(short, spec)["rows_per_second"] > 0
    assert len(readings) == 2
    assert readings[1] < 6  # its batches came once more in the next epochs


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
        (["--peers", "--device", "cuda"], "--peers times its libraries on the CPU. Found --device cuda; leave one"),
        (["--peers", "--rows", "9000"], "--peers needs 4 batches of 4,096: --rows of at least 16,384. Found 9,000."),
        (["--peers", "--set", "model.architecture=ple"], "`model.architecture` of .* should be mmoe. Found ple. Leave"),
    ],
)
def test_wrong_options_are_named(options: list[str], message: str) -> None:
    outcome = CliRunner().invoke(app, ["bench", *options])
    assert isinstance(outcome.exception, ValueError)
    with pytest.raises(ValueError, match=message):
        raise outcome.exception


def test_each_worker_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    outcome = CliRunner().invoke(app, ["bench", "--device", "cuda", "--workers", "2"])
    assert str(outcome.exception) == "--workers 2 needs as many GPUs with --device cuda. Found 1."
    asked: list[Asked] = []
    monkeypatch.setattr("mtrec.launch_bench.bench", lambda what, say: asked.append(what) or sys.exit())
    for device in ("cuda", "cpu"):
        CliRunner().invoke(app, ["bench", "--device", device])
    assert [(each.device, each.workers) for each in asked] == [("cuda", 1), ("cpu", 2)]
    told: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [device_of({"device": each}) for each in ("cuda", "cpu")] == [torch.device("cuda", 1), torch.device("cpu")]
    assert told == [torch.device("cuda", 1)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")  # of which each scoring process is given one
    assert launches.visible_gpus() == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launches.visible_gpus() == ["0"]


def test_peers_need_the_columns_of_the_reference(tmp_path: Path) -> None:
    tree = yaml.safe_load(REFERENCE.read_text())
    tree["features"] = {name: tree["features"][name] for name in ("c0", "c1", "items", "d0")}
    del tree["tasks"]["dwell"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    outcome = CliRunner().invoke(app, ["bench", str(tmp_path / "own.yaml"), "--peers", "--work", str(tmp_path / "work")])
    assert isinstance(outcome.exception, ValueError)
    with pytest.raises(ValueError, match=r"own.yaml' has no features or labels c2, c3, c4, c5 and 33 more. Leave --peers out"):
        raise outcome.exception
    assert not (tmp_path / "work").exists()


def test_peers_are_measured_where_they_are_asked_for() -> None:
    asked = Asked(Path("e.yaml"), Path("work"), stages=("train",))
    names = [each.name for each in measurements(asked)]
    with_peers = [each.name for each in measurements(dataclasses.replace(asked, peers=True))]
    assert with_peers == [*names, "torch-rechub", "deepctr-torch", "torch-rechub predict", "deepctr-torch predict"]


def test_peers_stand_beside_the_others_in_ratios_table_and_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speeds = {"torch-rechub": (10.0, 30.0), "deepctr-torch": (8.0, 60.0)}
    launched: list[str] = []

    def fake(each: Measurement, run: Path, asked: Asked) -> dict[str, Any]:
        launched.append(each.name)
        if each.name == "ceilings":
            return dict(CEILINGS)
        if each.stage == "peer":
            train, predict = speeds[each.name]
            return {"rows_per_second": train, "score_rows_per_second": predict}
        return {"rows_per_second": 120.0}

    monkeypatch.setattr(launches, "launch", fake)
    monkeypatch.setattr(launches, "make_environment", lambda folder: launched.append(folder.name))
    monkeypatch.setattr(launches, "prepare_variants", lambda asked, wanted: {each.variant: Path("run") for each in wanted})
    monkeypatch.setattr(launches, "_floor", lambda *arguments: 240.0)
    asked = Asked(Path("e.yaml"), tmp_path, stages=("train", "score"), rounds=2, peers=True)
    found = bench(asked, lambda line: None)
    assert launched[0] == "peers-env"
    assert [launched.count(name) for name in ("torch-rechub", "deepctr-torch", "torch-rechub predict")] == [2, 2, 0]
    assert launched[-1] == "ceilings"  # the second round goes the other way
    assert found["ratios"]["train bf16, 2 workers / torch-rechub"]["values"] == [12.0, 12.0]
    assert found["ratios"]["train fp32, 2 workers / deepctr-torch"]["median"] == 15.0
    assert found["ratios"]["score bf16, 2 workers / torch-rechub predict"]["median"] == 4.0
    assert found["stages"]["deepctr-torch predict"]["rows_per_second"]["median"] == 60.0
    assert "score_rows_per_second" not in found["stages"]["deepctr-torch"]
    assert found["about"]["versions"]["torch-rechub"] == PINS["torch-rechub"]
    to = Console(record=True, width=140, file=open("/dev/null", "w"))  # noqa: SIM115 - rich writes there
    show(found, to)
    for text in (to.export_text(), page(found)):
        assert "score bf16, 2 workers / deepctr-torch predict" in text
        assert f"deepctr-torch {PINS['deepctr-torch']}: as they come" in text


@pytest.fixture
def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes `-m venv` give an interpreter whose pip notes its arguments and fails at a package; gives the notes' place."""

    def make(fails_at: str) -> Path:
        python, notes = tmp_path / "python", tmp_path / "notes"
        python.write_text(
            f"""#!/bin/sh
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; exit; fi
echo "$@" >>{notes}
case "$*" in *"{fails_at}"*) echo "ERROR: No matching distribution found for {fails_at}"; exit 1 ;; esac
"""
        )
        python.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(python))
        return notes

    return make


def test_the_environment_of_the_peers_is_made_once(tmp_path: Path, fake_python: Callable[[str], Path]) -> None:
    notes, folder = fake_python("nothing"), tmp_path / "peers-env"
    make_environment(folder)
    calls = notes.read_text().splitlines()
    torch_pin = f"torch=={metadata.version('torch')}"  # the one that runs here, never a newer one
    assert [call.split()[-1] for call in calls if " torch==" in call] == [torch_pin] * (len(calls) - 1)
    assert f" --no-deps torch-rechub=={PINS['torch-rechub']} deepctr-torch=={PINS['deepctr-torch']} " in calls[-1]
    make_environment(folder)
    assert len(notes.read_text().splitlines()) == len(calls)
    (folder / "installed.txt").write_text("torch-rechub==0.1\n")
    make_environment(folder)
    assert len(notes.read_text().splitlines()) == 2 * len(calls)


@pytest.mark.parametrize("package", ["torch", "torch-rechub", "deepctr-torch"])
def test_what_pip_cannot_install_is_named(tmp_path: Path, fake_python: Callable[[str], Path], package: str) -> None:
    pin = f"{package}=={({'torch': metadata.version('torch')} | PINS)[package]}"
    fake_python(pin)
    message = rf"pip could not install what --peers needs: No matching .* {re.escape(pin)} .*\nRun it again where"
    with pytest.raises(ValueError, match=message):
        make_environment(tmp_path / "peers-env")
    assert not (tmp_path / "peers-env" / "installed.txt").exists()  # the next call begins anew


def test_a_peer_is_told_the_workload_and_run_by_its_own_interpreter(tmp_path: Path) -> None:
    batch = "data.batch_size=64"
    asked = Asked(REFERENCE, tmp_path, rows=1_000, steps=40, warmup=13, overrides=(batch,), peers=True)
    each = next(one for one in measurements(asked) if one.name == "deepctr-torch")
    run = prepare_variants(asked, [each])["fp32"]
    python = asked.environment / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/sh
echo "$1 $2 $PYTHONPATH" >{tmp_path}/called
echo "$3" >{tmp_path}/spec.json
echo '{{"rows_per_second": 9000.0, "score_rows_per_second": 70000.0}}' >"$4"
"""
    )
    python.chmod(0o755)
    assert launch(each, run, asked) == {"rows_per_second": 9000.0, "score_rows_per_second": 70000.0}
    peers = Path(launches.__file__).parent
    assert (tmp_path / "called").read_text().split() == ["-m", f"peers.{PEERS['deepctr-torch']}", str(peers)]
    assert (peers / "peers" / f"{PEERS['deepctr-torch']}.py").is_file()

    work = Workload(**json.loads((tmp_path / "spec.json").read_text()))
    assert (work.ids["c0"], work.ids["c25"], work.lists) == (102, 1_000_002, {"items": 50_002})
    assert (work.embedding_dim, work.num_experts, work.expert_layers, work.tower_layers) == (16, 4, [256, 128], [64])
    assert (work.batch_size, work.warmup, work.steps) == (64, 3, 12)  # 1,000 rows are 15 batches
    rows = read(work)
    assert rows.labels.shape == (15 * 64, 3)
    assert rows.labels.dtype == np.float32
    assert np.isfinite(rows.labels).all()
    items = rows.features["list_items"]
    assert items.shape == (15 * 64, rows.longest("list_items"))
    logged = pq.read_table(work.files[0])
    for row in range(5):
        there = logged["items"][row].as_py()
        assert items[row].tolist() == [1 + value % 50_001 for value in there] + [0] * (items.shape[1] - len(there))
        assert rows.features["c25"][row] == logged["c25"][row].as_py()

    python.write_text("#!/bin/sh\necho 'No module named torch_rechub'; exit 1\n")
    with pytest.raises(RuntimeError, match=r"(?s)The stage deepctr-torch failed:.*No module named torch_rechub"):
        launch(each, run, asked)


@pytest.mark.slow
def test_a_small_measurement_from_parquet_to_weights(tmp_path: Path) -> None:
    tree = yaml.safe_load(REFERENCE.read_text())
    tree["features"] = {name: tree["features"][name] for name in ("c0", "c1", "items", "d0")}
    tree["data"]["batch_size"] = 64
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree))
    launch_bench(
        ["compute", "encode", "train"],
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
        precisions=["bf16"],
    )
    found = json.loads((tmp_path / "found.json").read_text())
    compute = found["stages"]["compute bf16, 1 worker"]
    assert sum(compute["phases"].values()) == pytest.approx(1.0)
    assert compute["rows_per_second"]["median"] > 0
    assert 0 < found["ratios"]["encode / decode"]["median"] < 10
    assert found["stages"]["train bf16, 1 worker, fed from memory"]["checkpoints"]["median"] >= 1
    assert 0 < found["ratios"]["train bf16, 1 worker / train bf16, 1 worker, fed from memory"]["median"] < 10
