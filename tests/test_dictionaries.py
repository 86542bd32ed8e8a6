"""Text that files hold as dictionaries is read as dictionary arrays: which columns, and that nothing else changes by it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from runs import small_run, train_on

from mtrec.batch import Batch
from mtrec.checkpoint import find
from mtrec.dataset import Dataset, Source, open_dataset, open_each
from mtrec.evaluate import evaluate, whole_reader
from mtrec.features import NULL_ROW, UNSEEN_ROW, Categorical, Dense, Encoder, id_columns
from mtrec.feed import feed
from mtrec.labels import labels_of
from mtrec.model import MultiTaskModel
from mtrec.parallel import process_group
from mtrec.predictions import load_model
from mtrec.run import SAMPLE_FILE, Run, open_run
from mtrec.scored_files import Asked, score_files
from mtrec.scored_files.job import score_here
from mtrec.sources import open_source
from mtrec.train import Progress, make_reader

DRAWS = np.random.default_rng(0).integers(0, 9, 600)
WORDS = pa.array([None if draw == 8 else f"wörd {draw}" for draw in DRAWS])
LISTS = pa.array([None if draw == 7 else [f"w{draw}", None, f"w{draw // 2}"][: draw % 4] for draw in DRAWS])
PAIRS = pa.array([[f"w{draw}", f"w{draw + 1}"] for draw in DRAWS])

COLUMNS = {
    "string": WORDS,
    "large_string": WORDS.cast(pa.large_string()),
    "string_view": WORDS.cast(pa.string_view()),
    "binary": WORDS.cast(pa.binary()),
    "dictionary": WORDS.dictionary_encode(),
    "dictionary of int8": WORDS.dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
    "list": LISTS,
    "large_list": LISTS.cast(pa.large_list(pa.string())),
    "list of large_string": LISTS.cast(pa.list_(pa.large_string())),
    "fixed_size_list": PAIRS.cast(pa.list_(pa.string(), 2)),
}


def written(folder: Path, first: pa.Array, second: pa.Array, **options: Any) -> Dataset:
    """Two files with a column `x`, in row groups of 100 rows, whose dictionaries differ."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, column in (("a", first), ("b", second)):
        table = pa.table({"x": column, "row": range(len(column))})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=100, **options)
    return open_dataset(Source(str(folder)), ["x", "row"], place="data.train")


def values(data: Dataset, rows: int) -> list[Any]:
    return [value for batch in data.batches(["x"], rows) for value in batch["x"].to_pylist()]


def is_dictionary(type_: pa.DataType) -> bool:
    return pa.types.is_dictionary(type_) or pa.types.is_dictionary(getattr(type_, "value_type", pa.null()))


@pytest.mark.parametrize("name", list(COLUMNS))
def test_the_values_are_those_of_plain_text(name: str, tmp_path: Path) -> None:
    data = written(tmp_path, COLUMNS[name], COLUMNS[name].slice(50))
    assert data.dictionaries == {"x"}
    found = data.with_dictionaries(["x"])
    assert is_dictionary(found.schema.field("x").type)
    assert all(is_dictionary(batch["x"].type) for batch in found.batches(["x"], 30))
    for rows in (30, 1_000):
        assert values(found, rows) == values(data, rows)
    assert found.with_dictionaries(["x"]).schema == found.schema
    assert data.with_dictionaries(["row"]).schema == data.schema


def test_files_that_store_a_column_in_other_types_have_one(tmp_path: Path) -> None:
    plain = written(tmp_path, COLUMNS["large_string"], COLUMNS["dictionary of int8"])
    found = plain.with_dictionaries(["x"])
    assert found.schema.field("x").type == pa.dictionary(pa.int32(), pa.large_string())
    assert {batch["x"].type for batch in found.batches(["x"], 1_000)} == {found.schema.field("x").type}
    assert values(found, 1_000) == values(plain, 1_000) == [*WORDS.to_pylist(), *WORDS.to_pylist()]


def test_a_column_that_files_lack_is_null_there(tmp_path: Path) -> None:
    written(tmp_path, WORDS, WORDS)
    pq.write_table(pa.table({"row": [1, 2]}), tmp_path / "c.parquet")
    data = open_dataset(Source(str(tmp_path)), ["x"], ["x"], place="data.train").with_dictionaries(["x"])
    assert values(data, 1_000) == [*WORDS.to_pylist(), *WORDS.to_pylist(), None, None]


@pytest.mark.parametrize(
    ("column", "options"),
    [
        (pa.array([f"a value that comes once, {row}" for row in range(600)]), {}),  # the dictionary is as large as the column
        (WORDS, {"use_dictionary": False}),
        (pa.array([f"{draw:04d}" for draw in range(600)]), {"dictionary_pagesize_limit": 64}),  # given up by the writer
        (pa.array(DRAWS), {}),
    ],
)
def test_columns_that_gain_nothing_stay_as_they_are(column: pa.Array, options: dict[str, Any], tmp_path: Path) -> None:
    data = written(tmp_path, column, column, **options)
    assert data.dictionaries == set()
    assert data.with_dictionaries(["x"]).schema == data.schema


def test_one_file_without_a_dictionary_decides_for_all(tmp_path: Path) -> None:
    written(tmp_path, WORDS, WORDS)
    pq.write_table(pa.table({"x": WORDS}), tmp_path / "b.parquet", use_dictionary=False)
    assert open_dataset(Source(str(tmp_path)), ["x"], place="data.train").dictionaries == set()


def test_what_a_condition_reads_and_what_folders_are_named_after_is_plain(tmp_path: Path) -> None:
    written(tmp_path / "x=wörd 1", WORDS, WORDS)
    (tmp_path / "x=other").mkdir()
    pq.write_table(pa.table({"x": WORDS, "y": WORDS, "row": range(600)}), tmp_path / "x=other" / "a.parquet")
    data = open_dataset(Source(str(tmp_path), where="y == 'wörd 2'"), ["x", "y"], ["y"], place="data.train")
    assert data.dictionaries == set()
    assert {value for batch in data.with_dictionaries(["x"]).batches(["x"], 99) for value in batch["x"].to_pylist()} == {"other"}


# Looked up, and counted, by the word


def test_a_dictionary_is_looked_up_once_for_all_batches_that_are_cut_from_its_array(monkeypatch: pytest.MonkeyPatch) -> None:
    words = pa.array([f"w{number}" for number in range(50)])
    batch = pa.record_batch({"x": pa.DictionaryArray.from_arrays(pa.array(np.tile(np.arange(50, dtype=np.int32), 4)), words)})
    encoder = Encoder.fit([Categorical("x", min_count=1)], [batch], schema=batch.schema, embedding_dim=4)
    looked_up: list[int] = []
    index = encoder._fitted.vocabularies["x"]._index
    rows_of = type(index).rows
    monkeypatch.setattr(type(index), "rows", lambda self, keys: [looked_up.append(len(keys)), rows_of(self, keys)][1])
    whole = encoder.encode(batch.slice(0, 200)).values
    parts = [encoder.encode(batch.slice(start, 20)).values for start in range(0, 200, 20)]
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert looked_up == [50]
    copied = pa.record_batch({"x": pa.concat_arrays([batch["x"], batch["x"]])})  # another array, the same words
    assert encoder.encode(copied).values.tolist() == [*whole, *whole]
    assert looked_up == [50]
    other = pa.DictionaryArray.from_arrays(batch["x"].indices, words[::-1])  # as many words, others
    assert encoder.encode(pa.record_batch({"x": other})).values.tolist() == encoder.encode(
        pa.record_batch({"x": other.cast(pa.string())})
    ).values.tolist()


def test_of_a_dictionary_with_more_words_than_rows_those_that_are_there_are_looked_up() -> None:
    words = pa.array([f"w{number}" for number in range(1_000)])
    column = pa.DictionaryArray.from_arrays(pa.array([999, None, 3], pa.int32()), words)
    batch = pa.record_batch({"x": pa.array(["w3", "w3", "w4"])})
    encoder = Encoder.fit([Categorical("x", min_count=1)], [batch], schema=batch.schema, embedding_dim=4)
    assert encoder.encode(pa.record_batch({"x": column})).values.tolist() == [UNSEEN_ROW, NULL_ROW, 2]


@pytest.mark.parametrize("encoding", ["vocabulary", "hash"])
def test_a_fit_counts_words_that_stand_twice_or_unused_or_null_in_a_dictionary(encoding: Any) -> None:
    words = pa.array(["b", "a", None, "b", "unused"])
    column = pa.DictionaryArray.from_arrays(pa.array([0, 3, 1, 2, None, 0, 3, 3], pa.int32()), words)
    size = None if encoding == "vocabulary" else 50
    feature = Categorical("x", encoding=encoding, num_embeddings=size, min_count=1 if size is None else None)
    encoders = [
        Encoder.fit([feature], [pa.record_batch({"x": each})] * 2, schema=pa.schema({"x": each.type}), embedding_dim=4)
        for each in (column, column.cast(pa.string()))
    ]
    assert encoders[0].statistics == encoders[1].statistics
    assert encoders[0].fingerprint() == encoders[1].fingerprint()
    assert encoders[0].statistics["x"]["distinct"] == 2
    assert encoders[0].profiles["x"].null_share == 2 / 8


def test_only_ids_that_nothing_else_reads_come_as_dictionaries() -> None:
    features = [Categorical("a"), Categorical("b", column="c", weights="w"), Categorical("d"), Dense("e"), Dense("f", column="d")]
    assert id_columns(features) == {"a", "c"}


# The whole way


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """Prepared from the same log, in which ids are text, and the first one trained: with dictionaries and without."""
    folder, overrides = tmp_path_factory.mktemp("runs"), ["training.max_steps=2"]
    one = small_run(folder, *overrides)
    train_on(1, one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "with_dictionaries", lambda self, columns: self)
        other = small_run(folder, *overrides)
    assert open_source(one.experiment, one.experiment.data.train, "data.train").dictionaries == {"item_id"}
    return one, other


def test_a_run_is_prepared_as_from_plain_text(runs: tuple[Run, Run]) -> None:
    one, other = runs
    assert one.encoder.fingerprint() == other.encoder.fingerprint()
    assert one.encoder.statistics == other.encoder.statistics
    assert pq.read_table(one.folder / SAMPLE_FILE).equals(pq.read_table(other.folder / SAMPLE_FILE))


def batches_of(run: Run) -> list[Batch]:
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    specs = MultiTaskModel(run.experiment, run.encoder, run.labels, torch.device("meta")).specs
    reader = make_reader(run, data, Progress(epoch=1, next_batch=3))
    return [fed.batch for fed in feed(reader, run.encoder, labels_of(run.experiment, specs), None)]


def test_batches_metrics_and_scores_are_those_of_plain_text(
    runs: tuple[Run, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found, device = open_run(runs[0].folder), [], torch.device("cpu")
    encoding, types = run.encoder._ids["item_id"], list[set[pa.DataType]]()
    encode = type(encoding).encode
    monkeypatch.setattr(
        type(encoding), "encode", lambda self, array, *more: [types[-1].add(array.type), encode(self, array, *more)][1]
    )
    data = open_source(run.experiment, run.experiment.data.train, "data.train")
    for number in range(2):
        types.append(set())
        with process_group(device):
            model = load_model(run, find(run.checkpoints)[0], device)
            metrics = evaluate(model, data, run.experiment, run.encoder, device=device, by="click")
        source, out = Source([file.path for file in data.files]), tmp_path / str(number)
        score_files(Asked(str(run.folder), source, str(out), top=3, by="item_id"), score_here)
        found.append((batches_of(run), metrics, {path.name: pq.read_table(path) for path in out.glob("*.parquet")}))
        monkeypatch.setattr(Dataset, "with_dictionaries", lambda self, columns: self)
    of_text = [{type_ for type_ in each if not pa.types.is_list(type_)} for each in types]
    assert of_text == [{pa.dictionary(pa.int32(), pa.string()), pa.string()}, {pa.string()}]  # golden rows are plain
    (batches, metrics, scores), (plain_batches, plain_metrics, plain_scores) = found
    assert len(batches) > 3
    for one, other in zip(batches, plain_batches, strict=True):
        assert torch.equal(one.sparse.values(), other.sparse.values())
        assert torch.equal(one.sparse.lengths(), other.sparse.lengths())
    assert metrics == plain_metrics
    assert metrics["by"]["click"]["1"]["rows"] > 0
    assert scores == plain_scores
    assert {table.schema.field("item_id").type for table in scores.values()} == {pa.string()}


def test_what_an_evaluation_groups_by_is_plain(runs: tuple[Run, Run]) -> None:
    data, encoder = open_source(runs[0].experiment, runs[0].experiment.data.train, "data.train"), runs[0].encoder
    with process_group(torch.device("cpu")):
        types = [whole_reader(data, encoder, others, 100).dataset.schema.field("item_id").type for others in ([], ["item_id"])]
    assert types == [pa.dictionary(pa.int32(), pa.string()), pa.string()]


def test_a_column_with_a_dot_in_its_name_is_told_from_what_lies_in_another(tmp_path: Path) -> None:
    path, tags = str(tmp_path / "a.parquet"), pa.array([["a"], None] * 50)
    structs = pa.array([{"b": 1, "c": ["x"]}] * 100)
    pq.write_table(pa.table({"a": structs, "a.b": tags, "d": pa.array(range(100))}), path)
    ((_, data),) = open_each(Source(path, where="d >= 50"), ["a.b"], place="INPUT")
    assert isinstance(data, Dataset)
    assert data.dictionaries == {"a.b"}
    assert data.list_bytes.keys() == {"a.b"}
    found = [value for batch in data.with_dictionaries(["a.b"]).batches(["a.b"], 30) for value in batch["a.b"].to_pylist()]
    assert found == tags.to_pylist()[50:]
