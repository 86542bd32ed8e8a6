"""The two scripts that make Parquet from publishers' files, on small files in their form."""

import csv
import gzip
import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from recipes import PIPELINES, recipe

HOUR = 3_600_000
MAY_4 = 1_651_593_600_000  # midnight in Shanghai
APRIL_25 = MAY_4 - 9 * 24 * HOUR


kuairand = recipe("kuairand/prepare.py")
census = recipe("census_income/prepare.py")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def log_row(user: int, video: int, time: int, date: int = 20220425, **other: int) -> dict[str, int]:
    """A line of the publisher's log, its columns in his order."""
    row = {"user_id": user, "video_id": video, "date": date, "hourmin": 1300, "time_ms": time}
    row |= dict.fromkeys(("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"), 0)
    row |= {"play_time_ms": 0, "duration_ms": 0, "profile_stay_time": 0, "comment_stay_time": 0}
    return row | {"is_profile_enter": 0, "is_rand": 0, "tab": 1} | other


def user_row(user: int, **other: Any) -> dict[str, Any]:
    row = {"user_id": user, "user_active_degree": "full_active", "is_lowactive_period": 0, "is_live_streamer": -124}
    row |= {"is_video_author": 1, "follow_user_num": 5, "follow_user_num_range": "(0,10]", "fans_user_num": 312}
    row |= {"fans_user_num_range": "[100,1k)", "friend_user_num": 0, "friend_user_num_range": "0"}
    row |= {"register_days": 3624, "register_days_range": "730+"}
    return row | {f"onehot_feat{i}": i for i in range(18)} | other


def video_row(video: int, **other: Any) -> dict[str, Any]:
    row = {"video_id": video, "author_id": 441, "video_type": "NORMAL", "upload_dt": "2022-04-20"}
    row |= {"upload_type": "ShortImport", "visible_status": 1, "video_duration": 17200.0, "server_width": 720}
    return row | {"server_height": 1280, "music_id": 9_007_199_254_740_993, "music_type": "4.0", "tag": "12,65"} | other


def write_kuairand(raw: Path, earlier: Sequence[Mapping[str, int]], log: Sequence[Mapping[str, int]]) -> None:
    raw.mkdir(exist_ok=True)
    write_csv(raw / kuairand.EARLIER_LOG, earlier)
    write_csv(raw / kuairand.LOG, log)
    write_csv(raw / kuairand.USERS, [user_row(1), user_row(2, onehot_feat4="", onehot_feat12="1.0")])
    write_csv(raw / kuairand.VIDEOS, [video_row(10), video_row(11, music_type="", tag="", upload_dt="2022-05-01")])


def prepared(
    tmp_path: Path, earlier: Sequence[Mapping[str, int]], log: Sequence[Mapping[str, int]]
) -> dict[str, pa.Table]:
    write_kuairand(tmp_path / "raw", earlier, log)
    kuairand.prepare(tmp_path / "raw", tmp_path / "out")
    return {path.stem: pq.read_table(path) for path in (tmp_path / "out").iterdir()}


NOTHING_EARLIER = [log_row(99, 99, 5, date=20220410)]


def test_kuairand_columns_and_their_types(tmp_path: Path) -> None:
    train = prepared(tmp_path, NOTHING_EARLIER, [log_row(1, 10, APRIL_25)])["train"]
    types = {field.name: str(field.type) for field in train.schema}
    assert len(types) == 59
    assert list(types)[:10] == [
        *("user_id", "video_id", "time_ms", "date", "hour", "weekday", "tab", "duration_ms", "v_author_id"),
        "v_video_type",
    ]
    assert list(types)[47:50] == ["u_long_view_history", "label_click", "label_engage"]
    wanted = {"user_id": "int32", "time_ms": "int64", "v_music_id": "int64", "v_music_type": "int8"}
    wanted |= {"v_tags": "list<element: int32>", "u_onehot_feat3": "int16", "label_dwell_ms": "int32"}
    assert {name: types[name] for name in wanted} == wanted


def test_kuairand_row_holds_what_the_files_say(tmp_path: Path) -> None:
    liked = {"is_click": 1, "is_like": 1, "play_time_ms": 61_802, "duration_ms": 49_866, "comment_stay_time": 7}
    log = [log_row(1, 10, APRIL_25, tab=4, **liked), log_row(2, 11, APRIL_25 + 1, date=20220502, is_hate=1)]
    first, second = prepared(tmp_path, NOTHING_EARLIER, log)["train"].to_pylist()
    assert (first["label_click"], first["label_engage"], first["label_like"], first["label_follow"]) == (1, 1, 1, 0)
    assert (first["label_dwell_ms"], first["duration_ms"], first["label_comment_stay_ms"]) == (61_802, 49_866, 7)
    assert (first["hour"], first["weekday"], first["tab"]) == (13, 0, 4)  # 2022-04-25 was a Monday
    assert first["v_music_id"] == 9_007_199_254_740_993  # 2^53 + 1 does not pass through a float
    assert (first["v_music_type"], first["v_tags"], first["v_age_days"]) == (4, [12, 65], 5)
    assert (second["v_music_type"], second["v_tags"], second["v_age_days"]) == (-1, [], 1)
    assert (first["u_onehot_feat4"], second["u_onehot_feat4"], second["u_onehot_feat12"]) == (4, -1, 1)
    assert (second["label_engage"], second["label_hate"], second["u_long_view_history"]) == (0, 1, [])


def test_kuairand_parts_end_at_midnight_in_shanghai_and_are_sorted(tmp_path: Path) -> None:
    ends = [MAY_4, MAY_4 + 48 * HOUR]
    times = [ends[1], ends[1] - 1, ends[0], ends[0] - 1, APRIL_25 - HOUR]
    parts = prepared(tmp_path, NOTHING_EARLIER, [log_row(1, 10, time) for time in times])
    # The publisher's date decides what is history, the time which part: the last is of "04-25", an hour early.
    assert {name: part["time_ms"].to_pylist() for name, part in parts.items()} == {
        "train": [APRIL_25 - HOUR, ends[0] - 1],
        "val": [ends[0], ends[1] - 1],
        "test": [ends[1]],
    }


def test_kuairand_drops_repeats_and_keeps_the_first(tmp_path: Path) -> None:
    log = [log_row(1, 10, APRIL_25, is_click=1), log_row(1, 10, APRIL_25), log_row(1, 11, APRIL_25)]
    train = prepared(tmp_path, NOTHING_EARLIER, log)["train"]
    assert train.select(["video_id", "label_click"]).to_pylist() == [
        {"video_id": 10, "label_click": 1},
        {"video_id": 11, "label_click": 0},
    ]


def test_kuairand_history_is_the_last_twenty_long_views_before_the_rows(tmp_path: Path) -> None:
    earlier = [log_row(1, 100 + i, 1000 * i, date=20220410, long_view=1) for i in reversed(range(25))]
    earlier += [log_row(1, 7, 500, date=20220411), log_row(2, 8, 500, date=20220411, long_view=1)]
    log = [
        log_row(1, 300, 900_000, date=20220424, long_view=1),  # of the later log, and still before the first date
        log_row(1, 10, APRIL_25, long_view=1),
        log_row(1, 10, 900_000),  # not later than the history: left out
        log_row(2, 10, APRIL_25),
        log_row(2, 10, 501),
    ]
    train = prepared(tmp_path, earlier, log)["train"].to_pylist()
    histories = {(row["user_id"], row["time_ms"]): row["u_long_view_history"] for row in train}
    assert histories == {
        (1, APRIL_25): [*range(106, 125), 300],
        (2, APRIL_25): [8],
        (2, 501): [8],
    }


def test_kuairand_ids_without_features_have_nulls(tmp_path: Path) -> None:
    (row,) = prepared(tmp_path, NOTHING_EARLIER, [log_row(5, 50, APRIL_25)])["train"].to_pylist()
    assert (row["v_author_id"], row["v_age_days"], row["u_register_days"]) == (None, None, None)
    assert (row["v_tags"], row["v_music_type"], row["u_onehot_feat0"]) == ([], -1, -1)


def test_kuairand_errors_name_file_and_column(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with pytest.raises(ValueError, match=f"should hold the publisher's file {kuairand.EARLIER_LOG}"):
        kuairand.prepare(raw, tmp_path)
    log = [log_row(1, 10, APRIL_25)]
    write_kuairand(raw, NOTHING_EARLIER, log)
    write_csv(raw / kuairand.LOG, [{**log[0], "tab": "home"}])
    with pytest.raises(ValueError, match=f"`tab` of .*{kuairand.LOG} should hold whole numbers"):
        kuairand.prepare(raw, tmp_path)
    write_csv(raw / kuairand.LOG, [{name: value for name, value in log[0].items() if name != "is_click"}])
    with pytest.raises(ValueError, match=f"{kuairand.LOG} should be a CSV file with the columns .*is_click"):
        kuairand.prepare(raw, tmp_path)
    write_csv(raw / kuairand.LOG, [log_row(1, 10, APRIL_25, date=20220424)])
    with pytest.raises(ValueError, match="should hold rows of 20220425 and later"):
        kuairand.prepare(raw, tmp_path)
    write_kuairand(raw, NOTHING_EARLIER, log)
    write_csv(raw / kuairand.USERS, [user_row(1), user_row(1)])
    with pytest.raises(ValueError, match=f"`user_id` of .*{kuairand.USERS} should be there and different"):
        kuairand.prepare(raw, tmp_path)


def census_line(age: int = 44, education: str = "Some college", marital: str = "Divorced", weeks: int = 26) -> str:
    """A line as UCI writes it: a blank before each field, some with one behind."""
    values = dict.fromkeys(census.FIELDS, "Not in universe") | {
        name: "0" for name, kind in census.FIELDS.items() if kind != pa.string()
    }
    values |= {"age": str(age), "education": education, "marital_stat": marital, "weeks_worked_in_year": str(weeks)}
    values |= {"instance_weight": "1462.33", "year": "95", "major_occupation": "Handlers equip cleaners etc "}
    return ", ".join([*values.values(), "50000+." if age > 60 else "- 50000."])


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [True, False])
def test_census_parts_follow_the_hash_of_the_line(tmp_path: Path, ending: str, packed: bool) -> None:
    lines = [census_line(age=20 + i % 60, weeks=i % 53) for i in range(500)]
    raw = tmp_path / ("raw.gz" if packed else "raw")
    content = "".join(line + ending for line in lines).encode()
    raw.write_bytes(gzip.compress(content) if packed else content)
    counts = census.prepare(raw, tmp_path / "out")
    wanted: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for line in lines:
        tenth = int(hashlib.sha256(line.encode()).hexdigest()[:8], 16) % 10
        wanted["train" if tenth < 8 else {8: "val", 9: "test"}[tenth]].append(int(line.split(",")[0]))
    for name, ages in wanted.items():
        assert pq.read_table(tmp_path / "out" / f"{name}.parquet")["age"].to_pylist() == ages
        assert counts[name] == len(ages) > 0


def test_census_row_holds_labels_and_trimmed_texts() -> None:
    row = census.parse(census_line(age=73, education="Doctorate degree(PhD EdD)", marital="Never married"), "line 1")
    assert row["major_occupation"] == "Handlers equip cleaners etc"
    assert (row["age"], row["year"], row["instance_weight"]) == (73, 95, 1462.33)
    assert [row[name] for name in census.LABELS] == [1, 1, 1, 26.0, 1]
    row = census.parse(census_line(weeks=0), "line 1")
    assert [row[name] for name in census.LABELS] == [0, 0, 0, 0.0, 0]
    assert list(row) == census.SCHEMA.names
    assert len(census.FIELDS) == 41


def test_census_errors_name_the_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no .*absent"):
        census.prepare(tmp_path / "absent", tmp_path)
    for line, words in [
        ("1, 2, 3", "line 2 of .* should have 42 fields, separated by commas. Found 3"),
        (census_line().replace("44", "old"), "`age` in line 2 of .* should be a number. Found 'old'"),
        (census_line().replace("- 50000.", "rich"), "should end with one of .* Found 'rich'"),
    ]:
        (tmp_path / "raw").write_text(f"{census_line()}\n{line}\n")
        with pytest.raises(ValueError, match=words):
            census.prepare(tmp_path / "raw", tmp_path)


def test_the_commands_print_their_counts_and_their_errors(tmp_path: Path) -> None:
    (tmp_path / "raw").write_text(census_line() + "\n")
    command = [sys.executable, str(PIPELINES / "census_income" / "prepare.py")]
    done = subprocess.run([*command, str(tmp_path / "raw"), str(tmp_path)], capture_output=True, text=True, check=True)
    assert ".parquet: 1 rows" in done.stdout
    command = [sys.executable, str(PIPELINES / "kuairand" / "prepare.py")]
    failed = subprocess.run([*command, str(tmp_path), str(tmp_path)], capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr.startswith("RAW should hold")
