"""Files found by path, folder, glob, list and URI, on S3 too; damaged ones and replaced ones are named."""

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from parquet_files import message, rows_of, write

from mtrec.dataset import Source, open_dataset
from mtrec.files import ChangedFile


def test_finds_files_folders_globs_lists_and_leaves_out_hidden_ones(tmp_path: Path) -> None:
    for number, name in enumerate(["b/2.parquet", "a/1.parquet", "a/_tmp/9.parquet", "a/.x.parquet", "a/note.txt"]):
        write(tmp_path / name, x=[number])
    folder = str(tmp_path)
    for path, expected in [
        (folder, [1, 0]),
        (folder + "/b/2.parquet", [0]),
        (folder + "/*/*.parquet", [1, 0]),
        (folder + "/[ab]", [1, 0]),
        (folder + "/**/2.parquet", [0]),
        ([folder + "/b", folder + "/a"], [0, 1]),
        ("file://" + folder + "/a", [1]),
        ("file://" + folder + "/**/*.parquet", [1, 0]),
        ("file://" + folder + "/b*", [0]),
    ]:
        assert rows_of(open_dataset(Source(path), ["x"], place="data.train"), "x") == expected, path


def test_a_file_named_twice_is_read_once_and_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=[1, 2])
    dataset = open_dataset(Source([path, str(tmp_path)]), ["x"], place="data.train")
    assert rows_of(dataset, "x") == [1, 2]
    assert any("twice" in note and path in note for note in dataset.notes)


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "logs" / "a.parquet", x=[5])
    monkeypatch.chdir(tmp_path)
    for path in ("logs", "logs/a.parquet", "logs/*.parquet", "./logs"):
        assert rows_of(open_dataset(Source(path), ["x"], place="data.train"), "x") == [5]


@pytest.fixture(scope="module")
def s3_endpoint() -> object:
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    names = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in [*names, "AWS_ENDPOINT_URL"]}
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    os.environ.update(names)
    options = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    filesystem, _ = pa.fs.FileSystem.from_uri(f"s3://logs?{options}&allow_bucket_creation=true")
    filesystem.create_dir("logs")
    for day in (1, 2, 3):
        table = pa.table({"x": list(range(day * 10, day * 10 + 10))})
        pq.write_table(table, f"logs/click/dt=2026-01-0{day}/a.parquet", filesystem=filesystem, row_group_size=4)
    yield port, options, filesystem
    server.stop()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def test_s3_by_uri_options_and_by_environment(s3_endpoint: object, monkeypatch: pytest.MonkeyPatch) -> None:
    port, options, _ = s3_endpoint
    for path, endpoint in [
        (f"s3://logs/click?{options}", None),
        ("s3://logs/click/dt=2026-01-0*", f"http://127.0.0.1:{port}"),
        ("s3://logs/**/a.parquet", f"http://127.0.0.1:{port}"),
    ]:
        if endpoint is not None:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        source = Source(path, where="x != 24", window=("2026-01-02", "2026-01-03"))
        dataset = open_dataset(source, ["x", "dt"], place="data.train")
        assert rows_of(dataset, "x") == [x for x in range(20, 40) if x != 24]
        assert dataset.files[0].path == "s3://logs/click/dt=2026-01-01/a.parquet"
    with pytest.raises(ValueError, match=re.escape("`data.train.path` should name a file or folder that exists")):
        open_dataset(Source("s3://logs/clack"), ["x"], place="data.train")


def test_s3_object_replaced_while_in_use(s3_endpoint: object) -> None:
    _, options, filesystem = s3_endpoint
    pq.write_table(pa.table({"x": [1, 2, 3]}), "logs/changed/a.parquet", filesystem=filesystem)
    dataset = open_dataset(Source(f"s3://logs/changed?{options}"), ["x"], place="data.train")
    pq.write_table(pa.table({"x": [1, 2, 4]}), "logs/changed/a.parquet", filesystem=filesystem)
    with pytest.raises(ChangedFile, match=r"s3://logs/changed/a\.parquet"):
        rows_of(dataset, "x")


def test_missing_paths(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", x=[1])
    found = message(Source(str(tmp_path / "trian.parquet")), ["x"])
    assert found.startswith("`data.train.path` should name a file or folder that exists.")
    assert found.endswith("Did you mean 'train.parquet'?")
    assert "does not exist" in message(Source(str(tmp_path / "no" / "x.parquet")), ["x"])
    assert "Found none for" in message(Source(str(tmp_path / "*.parq")), ["x"])
    (tmp_path / "empty").mkdir()
    assert "at least one file named *.parquet" in message(Source(str(tmp_path / "empty")), ["x"])
    assert "empty list" in message(Source([]), ["x"])
    for empty in ("", [str(tmp_path), ""]):
        assert message(Source(empty), ["x"]).startswith("`data.train.path` should name files or a folder. Found an empty path")
    assert "should be a URI that pyarrow can open" in message(Source("nowhere://a/b"), ["x"])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "good.parquet", x=list(range(1000)))).read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    cases = {
        "cut.parquet": (whole[:-100], "cut short"),
        "empty.parquet": (b"", "cut short"),
        "tiny.parquet": (b"PAR1", "cut short"),
        "text.parquet": (b"user,item\n" * 100, "cut short"),
        "short.parquet": (whole[-footer + 10 :], "damaged"),
        "noise.parquet": (whole[: -footer - 8] + b"\xff" * footer + whole[-8:], "damaged footer"),
        "secret.parquet": (whole[:-4] + b"PARE", "encrypted"),
    }
    for name, (content, hint) in cases.items():
        path = tmp_path / "bad" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        found = message(Source([str(tmp_path / "good.parquet"), str(path)]), ["x"])
        assert f"'{path}' should be a whole Parquet file" in found, name
        assert hint in found, name


def test_damaged_pages_name_the_file_and_the_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": np.arange(10_000) ** 2}), path, row_group_size=5_000, compression="zstd")
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    middle = group.dictionary_page_offset or group.data_page_offset
    content[middle : middle + group.total_compressed_size] = b"\x5a" * group.total_compressed_size
    dataset = open_dataset(Source(str(path)), ["x"], place="data.train")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet', row group 1, cannot be decoded"):
        rows_of(dataset, "x")


def test_a_replaced_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", x=[1, 2, 3])
    dataset = open_dataset(Source(path), ["x"], place="data.train")
    other = write(tmp_path / "b.parquet", x=[1, 2, 9])  # same size, same rows: only the footer's statistics differ
    assert os.path.getsize(other) == os.path.getsize(path)
    os.replace(other, path)
    with pytest.raises(ChangedFile, match=r"a\.parquet' was replaced while it was in use"):
        rows_of(dataset, "x")
    os.remove(path)
    with pytest.raises(ValueError, match=r"a\.parquet' should be a readable Parquet file"):
        rows_of(dataset, "x")
