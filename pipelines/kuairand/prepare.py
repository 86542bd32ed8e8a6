"""Make train, validation and test Parquet from the publisher's files of KuaiRand-Pure.

    python pipelines/kuairand/prepare.py RAW OUT

RAW is the folder with the publisher's CSV files, OUT gets train.parquet, val.parquet and test.parquet. README.md in
this folder tells where the data comes from, under what licence, and what each column is.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

EARLIER_LOG = "log_standard_4_08_to_4_21_pure.csv"
LOG = "log_standard_4_22_to_5_08_pure.csv"
USERS = "user_features_pure.csv"
VIDEOS = "video_features_basic_pure.csv"

FIRST_DATE = 20220425  # rows of earlier dates (the publisher's `date` column) are history only
HISTORY_LENGTH = 20
# Shanghai midnights (UTC+8, no daylight saving), in milliseconds: a part holds the rows before its end.
PARTS = {"train": 1_651_593_600_000, "val": 1_651_766_400_000, "test": None}  # before 05-04, before 05-06, the rest
ROW_GROUP = 25_000

ENGAGEMENTS = ("like", "follow", "comment", "forward")
ONEHOTS = tuple(f"onehot_feat{i}" for i in range(18))


class Column(NamedTuple):
    """A column of the output: which publisher's column it is, its type, and what stands for a missing value."""

    source: str
    type: pa.DataType
    missing: Any = None


VIDEO_COLUMNS = {
    "v_author_id": Column("author_id", pa.int32()),
    "v_video_type": Column("video_type", pa.string()),
    "v_upload_type": Column("upload_type", pa.string()),
    "v_server_width": Column("server_width", pa.int16()),
    "v_server_height": Column("server_height", pa.int16()),
    "v_music_id": Column("music_id", pa.int64()),
    "v_music_type": Column("music_type", pa.int8(), missing=-1),
}
USER_COLUMNS = {
    "u_user_active_degree": Column("user_active_degree", pa.string()),
    "u_is_lowactive_period": Column("is_lowactive_period", pa.int32()),
    "u_is_live_streamer": Column("is_live_streamer", pa.int32()),
    "u_is_video_author": Column("is_video_author", pa.int32()),
    "u_follow_user_num": Column("follow_user_num", pa.int32()),
    "u_follow_user_num_range": Column("follow_user_num_range", pa.string()),
    "u_fans_user_num": Column("fans_user_num", pa.int32()),
    "u_fans_user_num_range": Column("fans_user_num_range", pa.string()),
    "u_friend_user_num": Column("friend_user_num", pa.int32()),
    "u_friend_user_num_range": Column("friend_user_num_range", pa.string()),
    "u_register_days": Column("register_days", pa.int32()),
    "u_register_days_range": Column("register_days_range", pa.string()),
    **{f"u_{name}": Column(name, pa.int16(), missing=-1) for name in ONEHOTS},
}
LABEL_COLUMNS = {
    "label_click": Column("is_click", pa.int8()),
    "label_dwell_ms": Column("play_time_ms", pa.int32()),
    "label_long_view": Column("long_view", pa.int8()),
    **{f"label_{name}": Column(f"is_{name}", pa.int8()) for name in ENGAGEMENTS},
    "label_hate": Column("is_hate", pa.int8()),
    "label_profile_enter": Column("is_profile_enter", pa.int8()),
    "label_comment_stay_ms": Column("comment_stay_time", pa.int32()),
}
CONTEXT = ("user_id", "video_id", "time_ms", "date", "hourmin", "tab", "duration_ms")
LOG_COLUMNS = (*CONTEXT, *(column.source for column in LABEL_COLUMNS.values()))


def read_csv(path: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Blocks of the file, every column as text, so that no id passes through a float."""
    if not path.is_file():
        raise ValueError(f"RAW should hold the publisher's file {path.name}. There is none in {path.parent}.")
    text = pa.csv.ConvertOptions(
        include_columns=list(columns),
        column_types=dict.fromkeys(columns, pa.string()),
        strings_can_be_null=True,
        null_values=["", "nan", "NaN", "NULL"],
    )
    try:
        yield from pa.csv.open_csv(path, convert_options=text)
    except (KeyError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} should be a CSV file with the columns {', '.join(columns)}. {error}") from error


def convert(values: pa.Array | pa.ChunkedArray, column: Column, path: Path) -> pa.Array | pa.ChunkedArray:
    """Text as the type of a column; "9.0" is an integer to the publisher where a column has missing values."""
    if pa.types.is_integer(column.type):
        whole = pc.replace_substring_regex(values, r"\.0*$", "")
        try:
            values = pc.cast(whole, column.type)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"`{column.source}` of {path} should hold whole numbers ({column.type}). {error}"
            ) from error
    return values if column.missing is None else pc.fill_null(values, pa.scalar(column.missing, column.type))


def required_int64(batch: pa.RecordBatch | pa.Table, name: str, path: Path) -> NDArray[np.int64]:
    """A log column without missing values."""
    values = convert(batch[name], Column(name, pa.int64()), path)
    if values.null_count:
        raise ValueError(f"`{name}` of {path} should have a value in every row. Found {values.null_count} empty.")
    return np.asarray(values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy())


def read_history(raw: Path) -> dict[int, tuple[list[int], int]]:
    """{user: (the last 20 videos watched at length before FIRST_DATE, oldest first; time of the last one)}.

    A repeated log line counts as often as it stands there.
    """
    kept: list[NDArray[np.int64]] = []
    names = ("user_id", "video_id", "time_ms", "date", "long_view")
    for path in (raw / EARLIER_LOG, raw / LOG):
        for batch in read_csv(path, names):
            user, video, time, date, long_view = (required_int64(batch, name, path) for name in names)
            rows = (long_view == 1) & (date < FIRST_DATE)
            kept.append(np.stack([user[rows], video[rows], time[rows]]))
    user, video, time = np.concatenate(kept, axis=1)
    order = np.lexsort((video, time, user))
    user, video, time = user[order], video[order], time[order]
    users, starts, counts = np.unique(user, return_index=True, return_counts=True)
    return {
        int(u): (video[max(start, end - HISTORY_LENGTH) : end].tolist(), int(time[end - 1]))
        for u, start, end in zip(users, starts, starts + counts, strict=True)
    }


def read_log(raw: Path, last_seen: dict[int, int]) -> pa.Table:
    """The rows from FIRST_DATE on, sorted by time, user and video.

    Repeats of (user, video, time) and rows that are not later than the user's history are left out.
    """
    path = raw / LOG
    batches = [
        batch.filter(pa.array(required_int64(batch, "date", path) >= FIRST_DATE))
        for batch in read_csv(path, LOG_COLUMNS)
    ]
    if not sum(batch.num_rows for batch in batches):
        raise ValueError(f"{path} should hold rows of {FIRST_DATE} and later. Found none.")
    log = pa.Table.from_batches(batches)
    user, video, time = (required_int64(log, name, path) for name in ("user_id", "video_id", "time_ms"))
    order = np.lexsort((video, user, time))  # stable: of repeats the first in the file comes first
    keys = np.stack([user, video, time])[:, order]
    first = np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0))
    after_history = time > np.array([last_seen.get(int(u), -1) for u in user])
    return log.take(pa.array(order[first & after_history[order]]))


def look_up(path: Path, key: str, wanted: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
    """A feature file's rows in the order of the wanted ids, as text; all null for an id that is not in the file."""
    table = pa.Table.from_batches(list(read_csv(path, [key, *columns])))
    ids = required_int64(table, key, path)
    order = np.argsort(ids, kind="stable")
    if not len(ids) or (np.diff(ids[order]) == 0).any():
        raise ValueError(f"`{key}` of {path} should be there and different in every row.")
    at = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
    found = ids[order][at] == wanted
    return table.select(list(columns)).take(pa.array(order[at], mask=~found))


def parse_tags(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """ "12,65" as [12, 65]; no tags as an empty list."""
    parts = pc.split_pattern(pc.fill_null(pc.replace_substring_regex(text, r"[\s\[\]]", ""), ""), ",")
    return pa.chunked_array(
        [pa.array([[int(float(tag)) for tag in tags if tag] for tags in parts.to_pylist()], pa.list_(pa.int32()))]
    )


def days(dates: Sequence[str | None]) -> NDArray[np.datetime64]:
    return np.array([date or "NaT" for date in dates], dtype="datetime64[D]")


def context_columns(log: pa.Table, path: Path) -> dict[str, Any]:
    """What is known when the video is offered: who, what, when, where."""
    number = {name: required_int64(log, name, path) for name in CONTEXT}
    date = days([f"{d // 10_000}-{d // 100 % 100:02d}-{d % 100:02d}" for d in number["date"].tolist()])
    return {
        "user_id": pa.array(number["user_id"]).cast(pa.int32()),
        "video_id": pa.array(number["video_id"]).cast(pa.int32()),
        "time_ms": pa.array(number["time_ms"]),
        "date": pa.array(number["date"]).cast(pa.int32()),
        "hour": pa.array(number["hourmin"] // 100).cast(pa.int8()),
        "weekday": pa.array((date.astype(np.int64) + 3) % 7).cast(pa.int8()),  # 1970-01-01 was a Thursday
        "tab": pa.array(number["tab"]).cast(pa.int8()),
        "duration_ms": pa.array(number["duration_ms"]).cast(pa.int32()),
    }


def join(log: pa.Table, histories: dict[int, tuple[list[int], int]], raw: Path) -> pa.Table:
    """The log's rows with the features of their video and user, the user's history, and the labels."""
    columns = context_columns(log, raw / LOG)
    user, video = (required_int64(log, name, raw / LOG) for name in ("user_id", "video_id"))

    path = raw / VIDEOS
    sources = [column.source for column in VIDEO_COLUMNS.values()]
    videos = look_up(path, "video_id", video, [*sources, "tag", "upload_dt"])
    for name, column in VIDEO_COLUMNS.items():
        columns[name] = convert(videos[column.source], column, path)
    columns["v_tags"] = parse_tags(videos["tag"])
    date = days([f"{d[:4]}-{d[4:6]}-{d[6:]}" for d in log["date"].to_pylist()])
    age = date - days(videos["upload_dt"].to_pylist())
    columns["v_age_days"] = pa.array(age.astype(np.int64), mask=np.isnat(age)).cast(pa.int16())

    path = raw / USERS
    users = look_up(path, "user_id", user, [column.source for column in USER_COLUMNS.values()])
    for name, column in USER_COLUMNS.items():
        columns[name] = convert(users[column.source], column, path)
    past = [histories.get(int(u), ([], 0))[0] for u in user]
    columns["u_long_view_history"] = pa.array(past, pa.list_(pa.int32()))

    labels = {name: convert(log[column.source], column, raw / LOG) for name, column in LABEL_COLUMNS.items()}
    engaged = pc.max_element_wise(*(labels[f"label_{name}"] for name in ENGAGEMENTS))
    columns["label_click"] = labels.pop("label_click")
    columns["label_engage"] = engaged
    return pa.table({**columns, **labels})


def split(rows: pa.Table) -> Iterator[tuple[str, pa.Table]]:
    """The parts by time: rows are sorted, so each is a range."""
    time = rows["time_ms"].to_numpy()
    start = 0
    for name, end_time in PARTS.items():
        end = len(time) if end_time is None else int(np.searchsorted(time, end_time))
        yield name, rows.slice(start, end - start)
        start = end


def prepare(raw: Path, out: Path) -> dict[str, int]:
    """Write the parts; {part: rows}. A part without rows (an extract of the log) is not written.

    Raises ValueError naming the file, and the column where there is one, if the publisher's files are not as expected.
    """
    histories = read_history(raw)
    log = read_log(raw, {user: last for user, (_, last) in histories.items()})
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for name, part in split(join(log, histories, raw)):
        counts[name] = part.num_rows
        if part.num_rows:
            pq.write_table(part, out / f"{name}.parquet", row_group_size=ROW_GROUP, compression="zstd")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("raw", type=Path, help="folder with the publisher's CSV files")
    parser.add_argument("out", type=Path, help="folder for train.parquet, val.parquet and test.parquet")
    arguments = parser.parse_args()
    try:
        counts = prepare(arguments.raw, arguments.out)
    except ValueError as error:
        parser.exit(1, f"{error}\n")
    for name, rows in counts.items():
        print(f"{arguments.out / name}.parquet: {rows:,} rows" if rows else f"{name}: no rows in this log, no file")


if __name__ == "__main__":
    main()
