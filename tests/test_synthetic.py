import dataclasses
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import scipy.sparse
from scipy.stats import kendalltau
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from mtrec.synthetic import LogSummary, ReferenceLog, SyntheticLog, write_log, write_reference
from mtrec.synthetic.population import NUM_ITEMS as NUM_SLOTS
from mtrec.synthetic.population import NUM_USERS
from mtrec.synthetic.reference import CARDINALITIES, NUM_ITEMS

IDS = ("user_id", "item_id", "category", "author_id", "country", "hour")
LISTS = ("tags", "history")


@pytest.fixture(scope="module")
def log_seed7():
    return SyntheticLog(seed=7).rows(0, 200_000)


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def logit(probability: np.ndarray) -> np.ndarray:
    return np.log(probability) - np.log1p(-probability)


def additive_design(table: pa.Table) -> scipy.sparse.csr_matrix:
    """One-hot ids, mean-pooled one-hot lists, standardised numbers with a flag for nulls: no products of features."""
    rows = table.num_rows
    blocks = []
    for name in IDS:
        codes = table[name].combine_chunks().dictionary_encode(null_encoding="encode").indices.to_numpy()
        blocks.append(scipy.sparse.csr_matrix((np.ones(rows), codes, np.arange(rows + 1))))
    for name in LISTS:
        lists = table[name].combine_chunks()
        length = lists.value_lengths().fill_null(0).to_numpy()
        codes = lists.flatten().dictionary_encode().indices.to_numpy()
        weight = np.repeat(1.0 / np.maximum(length, 1), length)
        blocks.append(scipy.sparse.csr_matrix((weight, codes, np.concatenate([[0], np.cumsum(length)]))))
    for name in ("age", "price", "duration_seconds", "is_member", "autoplay"):
        values = table[name].cast(pa.float32()).to_numpy()
        null = np.isnan(values)
        values = np.log1p(values)
        values = np.where(null, 0.0, (values - np.nanmean(values)) / np.nanstd(values))
        blocks += [scipy.sparse.csr_matrix(values[:, None]), scipy.sparse.csr_matrix(null[:, None].astype(float))]
    return scipy.sparse.hstack(blocks, format="csr")


@pytest.mark.parametrize(("seed", "conflict"), [(7, 0.0), (7, 0.5), (7, 1.0), (1, 0.0), (2, 0.0)])
def test_the_truth_is_neither_easy_nor_hopeless(seed, conflict):
    table = SyntheticLog(seed=seed, conflict=conflict).rows(0, 60_000)
    clicked = column(table, "click") == 1
    assert 0.75 <= roc_auc_score(clicked, column(table, "true_p_click")) <= 0.85
    conversion, p_conversion = column(table, "conversion")[clicked], column(table, "true_p_conversion")[clicked]
    assert roc_auc_score(conversion, p_conversion) >= 0.70
    # Without ties XAUC, the share of concordant pairs, is (Kendall's tau + 1) / 2.
    tau = kendalltau(column(table, "true_dwell_seconds")[clicked], column(table, "dwell_seconds")[clicked]).statistic
    assert (tau + 1.0) / 2.0 >= 0.65


# A fit that stopped early would lie further below the truth than an additive model has to.
CONVERGED = pytest.mark.filterwarnings("error::sklearn.exceptions.ConvergenceWarning")


def fit(design_NF: scipy.sparse.csr_matrix, label_N: np.ndarray) -> LogisticRegression:
    return LogisticRegression(C=1.0, max_iter=1000, tol=1e-3).fit(design_NF, label_N)


@CONVERGED
@pytest.mark.parametrize("seed", [7, 1, 10])  # the default, and the two nearest to the limit of 12 that were tried
def test_an_additive_model_stays_below_the_truth(seed):
    table = SyntheticLog(seed=seed).rows(0, 120_000)
    design_NF, click = additive_design(table), column(table, "click")
    train, test = slice(0, 80_000), slice(80_000, None)
    additive = roc_auc_score(click[test], fit(design_NF[train], click[train]).predict_proba(design_NF[test])[:, 1])
    truth = roc_auc_score(click[test], column(table, "true_p_click")[test])
    assert 0.70 <= additive <= truth - 0.02


@CONVERGED
def test_clicked_rows_alone_bias_conversion(log_seed7):
    design_NF, click = additive_design(log_seed7), column(log_seed7, "click")
    train, test = slice(0, 100_000), slice(100_000, None)
    # The same model of conversion, from clicked rows and from what all rows would have done after a click.
    p_conversion = column(log_seed7, "true_p_conversion")
    potential = np.random.default_rng(0).random(len(click)) < p_conversion
    clicked = np.flatnonzero(click[train] == 1)
    on_clicked = fit(design_NF[clicked], column(log_seed7, "conversion")[clicked])
    on_all = fit(design_NF[train], potential[train])
    ratio = {
        name: model.predict_proba(design_NF[test])[:, 1].mean() / p_conversion[test].mean()
        for name, model in (("clicked", on_clicked), ("all", on_all))
    }
    assert ratio["clicked"] > 1.06
    assert abs(ratio["all"] - 1.0) < 0.03


def test_labels_are_drawn_from_the_truth(log_seed7):
    clicked = column(log_seed7, "click") == 1
    cases = [
        (column(log_seed7, "click"), column(log_seed7, "true_p_click")),
        (column(log_seed7, "conversion")[clicked], column(log_seed7, "true_p_conversion")[clicked]),
    ]
    for label, probability in cases:
        for rows in np.array_split(np.argsort(probability), 10):
            expected, variance = probability[rows].sum(), (probability[rows] * (1 - probability[rows])).sum()
            assert abs(label[rows].sum() - expected) < 4.0 * np.sqrt(variance)
    seconds, expected_seconds = column(log_seed7, "dwell_seconds")[clicked], column(log_seed7, "true_dwell_seconds")
    expected_seconds = expected_seconds[clicked]
    for rows in np.array_split(np.argsort(expected_seconds), 5):
        error = (seconds[rows] - expected_seconds[rows]).sum()
        assert abs(error) < 4.0 * np.sqrt(((seconds[rows] - expected_seconds[rows]) ** 2).sum())
    # Heavy tail: a log-normal of sd above 1 has its mean far above its median.
    assert seconds.mean() > 1.5 * np.median(seconds)


def test_conflict_turns_agreement_of_the_tasks_into_opposition():
    correlations = []
    for conflict in (0.0, 0.5, 1.0):
        table = SyntheticLog(seed=7, conflict=conflict).rows(0, 30_000)
        click, conversion = logit(column(table, "true_p_click")), logit(column(table, "true_p_conversion"))
        dwell = np.log(column(table, "true_dwell_seconds"))
        correlations.append((np.corrcoef(click, conversion)[0, 1], np.corrcoef(click, dwell)[0, 1]))
    (agree_conversion, agree_dwell), (half_conversion, half_dwell), (oppose_conversion, oppose_dwell) = correlations
    assert agree_conversion > half_conversion + 0.1 > oppose_conversion + 0.2
    assert agree_dwell > half_dwell + 0.1 > oppose_dwell + 0.2


def test_click_depends_on_the_history_and_on_user_and_item_together():
    log = SyntheticLog(seed=7)
    rng = np.random.default_rng(0)
    rows = log._draw(rng, np.arange(5000))
    before = logit(log._truth(rows).p_click)
    # Another history with everything else left as it is; rows without a history keep their truth.
    changed = logit(log._truth(dataclasses.replace(rows, history_H=rng.permutation(rows.history_H))).p_click)
    empty = np.diff(rows.history_offsets) == 0
    assert empty.any()
    assert np.abs(changed - before)[~empty].mean() > 0.1
    np.testing.assert_allclose(changed[empty], before[empty])
    # Two users and two items: an additive truth would have a second difference of 0.
    count = 500
    square = log._draw(rng, np.arange(4 * count))
    alike = np.tile(np.arange(count), 4)
    square = dataclasses.replace(
        square,
        user_N=np.concatenate([square.user_N[:count], square.user_N[count : 2 * count]] * 2),
        item_N=np.repeat([square.item_N[:count], square.item_N[count : 2 * count]], 2, axis=0).ravel(),
        history_H=square.history_H[:0],
        history_offsets=np.zeros(4 * count + 1, dtype=np.int64),
        price_N=square.price_N[alike],
        hour_N=square.hour_N[alike],
        autoplay_N=square.autoplay_N[alike],
    )
    first, second, third, fourth = logit(log._truth(square).p_click).reshape(4, count)
    assert np.abs(first - second - third + fourth).mean() > 0.3


def test_columns_hold_what_a_real_log_holds(log_seed7):
    click, conversion = column(log_seed7, "click"), column(log_seed7, "conversion")
    assert set(np.unique(click)) == {0, 1}
    assert set(np.unique(conversion)) == {0, 1}
    assert not conversion[click == 0].any()
    np.testing.assert_array_equal(np.isnan(column(log_seed7, "dwell_seconds")), click == 0)
    for name in ("true_p_click", "true_p_conversion", "true_dwell_seconds"):
        values = column(log_seed7, name)
        assert np.isfinite(values).all()
        assert (values > 0).all()
    assert {name for name in log_seed7.column_names if log_seed7[name].null_count} == {
        *("tags", "history", "age", "country", "price", "dwell_seconds")
    }
    for name in ("user_id", "item_id"):
        ids = np.unique(column(log_seed7, name))
        assert ids.min() >= 0
        assert (ids > 2**53).mean() > 0.99
        counts = np.sort(np.unique(column(log_seed7, name), return_counts=True)[1])[::-1]
        assert counts[0] > 20 * np.median(counts)
    assert len(set(np.unique(column(log_seed7, "user_id"))) & set(np.unique(column(log_seed7, "item_id")))) == 0
    lengths = log_seed7["history"].combine_chunks().value_lengths().drop_null().to_numpy()
    assert (lengths.min(), lengths.max()) == (0, 20)
    history = np.unique(log_seed7["history"].combine_chunks().flatten().to_numpy())
    assert np.isin(history, column(log_seed7, "item_id")).mean() > 0.95
    tags = log_seed7["tags"].combine_chunks().value_lengths().drop_null().to_numpy()
    assert tags.min() == 0
    assert tags.max() > 1


def read(summary: LogSummary, below: str) -> pa.Table:
    files = [file for file in summary.files if file.parent.name == below]
    return pa.concat_tables(pq.ParquetFile(file).read() for file in files)


def test_files_are_cut_from_one_log_that_only_the_seed_decides(tmp_path: Path):
    summary = write_log(tmp_path / "a", rows=3000, seed=7, files=4, row_group_rows=500)
    names = [str(file.relative_to(tmp_path / "a")) for file in summary.files]
    assert names == [*(f"train/part-00{part}.parquet" for part in range(4)), "validation/part-000.parquet"]
    assert (summary.rows, summary.validation_rows) == (3000, 300)
    train, validation = read(summary, "train"), read(summary, "validation")
    assert column(train, "row_id").tolist() == list(range(3000))
    assert column(validation, "row_id").tolist() == list(range(3000, 3300))
    both = pa.concat_tables([train, validation])
    assert summary.click_rate == pytest.approx(column(both, "click").mean())
    assert summary.conversion_rate == pytest.approx(column(both, "conversion").sum() / column(both, "click").sum())
    assert summary.mean_dwell_seconds == pytest.approx(np.nanmean(column(both, "dwell_seconds")), rel=1e-5)
    assert summary.num_bytes == sum(file.stat().st_size for file in summary.files)

    metadata = pq.read_metadata(summary.files[0])
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [500, 250]
    codecs = {metadata.row_group(0).column(index).compression for index in range(metadata.num_columns)}
    assert codecs == {"ZSTD"}

    other = write_log(tmp_path / "b", rows=2000, seed=7, files=1, row_group_rows=700, validation_rows=0)
    assert not (tmp_path / "b" / "validation").exists()
    assert read(other, "train").equals(train.slice(0, 2000))
    third = write_log(tmp_path / "c", rows=2000, seed=8, files=1, validation_rows=0)
    assert not np.isin(column(read(third, "train"), "user_id"), column(train, "user_id")).any()


def test_a_chunk_boundary_does_not_show():
    log = SyntheticLog(seed=3)
    across = log.rows(65_000, 66_000)
    assert across.equals(pa.concat_tables([log.rows(65_000, 65_536), log.rows(65_536, 66_000)]))
    assert column(across, "row_id").tolist() == list(range(65_000, 66_000))


def test_ids_drift_over_days(tmp_path: Path):
    def days_of(drift: float, name: str) -> list[pa.Table]:
        summary = write_log(tmp_path / name, rows=60_005, seed=7, files=6, days=6, drift=drift)
        assert sum(1 for _ in (tmp_path / name).rglob("*.parquet")) == len(summary.files) == 6
        whole = pyarrow.dataset.dataset(tmp_path / name, partitioning="hive").to_table()
        assert whole.num_rows == 60_005
        return [whole.filter(pyarrow.dataset.field("dt") == f"2026-11-0{day}") for day in range(1, 7)]

    drifting = days_of(0.15, "drifting")
    assert [table.num_rows for table in drifting] == [10_000] * 5 + [10_005]
    for name in ("user_id", "item_id"):
        first, last = (column(drifting[day], name) for day in (0, -1))
        assert 0.3 < np.isin(last, first).mean() < 0.9  # of the last day's rows, those with an id of the first day
        assert 0.3 < np.isin(first, last).mean() < 0.9
        second = column(drifting[1], name)
        assert np.isin(second, first).mean() > np.isin(last, first).mean()
        assert np.isin(second, first).mean() < 0.995
    # An impression of a faded item stays in the histories of the days after.
    seen = np.unique(np.concatenate([column(table, "item_id") for table in drifting]))
    history = drifting[-1]["history"].combine_chunks().flatten().to_numpy()
    assert np.isin(history, seen).mean() > 0.95
    for table in drifting:
        assert 0.75 <= roc_auc_score(column(table, "click"), column(table, "true_p_click")) <= 0.86

    still = days_of(0.0, "still")
    for name in ("user_id", "item_id"):
        # A population that stands still has no more ids than slots; a drifting one needs more.
        slots = {"user_id": NUM_USERS, "item_id": NUM_SLOTS}[name]
        assert len(np.unique(np.concatenate([column(table, name) for table in still]))) <= slots
        assert len(np.unique(np.concatenate([column(table, name) for table in drifting]))) > 1.2 * slots


@pytest.mark.parametrize(("log", "name"), [(SyntheticLog(seed=3), "user_id"), (ReferenceLog(seed=3), "c25")])
def test_chunks_do_not_repeat_each_other(log, name):
    first, second = column(log.rows(0, 1000), name), column(log.rows(65_536, 66_536), name)
    assert (first == second).mean() < 0.2  # independent Zipf draws agree now and then


def test_half_a_million_rows_take_seconds(tmp_path: Path):
    start = time.process_time()
    write_log(tmp_path, rows=131_072, seed=7, validation_rows=0)
    assert time.process_time() - start < 3.0  # a quarter of 12 s; 0.5 s were seen


@CONVERGED
def test_the_reference_workload(tmp_path: Path):
    assert len(CARDINALITIES) == 26
    assert (min(CARDINALITIES), max(CARDINALITIES)) == (100, 1_000_000)
    assert sum(CARDINALITIES) + NUM_ITEMS == 3_050_000
    summary = write_reference(tmp_path, rows=100_000, seed=7, files=1)
    metadata = pq.read_metadata(summary.files[0])
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [65_536, 34_464]
    assert metadata.row_group(0).column(0).compression == "ZSTD"
    table = read(summary, "train")
    names = [f"c{index}" for index in range(26)] + ["items"] + [f"d{index}" for index in range(13)]
    assert table.column_names == [*names, "click", "conversion", "dwell_seconds"]
    for name, cardinality in zip(names, CARDINALITIES, strict=False):
        values = column(table, name)
        assert values.dtype == np.int64
        assert 0 <= values.min() <= values.max() < cardinality
        counts = np.sort(np.unique(values, return_counts=True)[1])[::-1]
        # Exponent 1.05, from the counts of the ranks 1 and 4.
        assert np.log(counts[0] / counts[3]) / np.log(4.0) == pytest.approx(1.05, abs=0.1)
    items = table["items"].combine_chunks()
    assert (items.value_lengths().to_numpy().min(), items.value_lengths().to_numpy().max()) == (0, 20)
    assert items.value_lengths().to_numpy().mean() == pytest.approx(6.0, abs=0.1)
    assert items.flatten().to_numpy().max() < NUM_ITEMS
    assert all(table.schema.field(f"d{index}").type == pa.float32() for index in range(13))

    click = column(table, "click")
    assert click.mean() == pytest.approx(0.1, abs=0.01)
    assert not column(table, "conversion")[click == 0].any()
    np.testing.assert_array_equal(np.isnan(column(table, "dwell_seconds")), click == 0)
    assert roc_auc_score(click, ReferenceLog(seed=7).p_click(0, 100_000)) > 0.75
    blocks = [scipy.sparse.csr_matrix(np.stack([np.log1p(np.abs(column(table, f"d{d}"))) for d in range(13)], axis=1))]
    blocks += [
        scipy.sparse.csr_matrix((np.ones(100_000), column(table, name), np.arange(100_001))) for name in names[:12]
    ]
    design_NF = scipy.sparse.hstack(blocks, format="csr")
    model = fit(design_NF[:80_000], click[:80_000])
    assert roc_auc_score(click[80_000:], model.predict_proba(design_NF[80_000:])[:, 1]) > 0.65
    # The popular ids are not neighbours.
    ids, counts = np.unique(column(table, "c25"), return_counts=True)
    popular = ids[np.argsort(-counts)[:10]]
    assert np.abs(np.diff(np.sort(popular))).min() > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": 0}, "`rows` should be a positive integer. Found 0."),
        ({"files": -1}, "`files` should be a positive integer. Found -1."),
        ({"row_group_rows": 0}, "`row_group_rows` should be a positive integer. Found 0."),
        ({"rows": 3, "files": 4}, "`files` should be at most the 3 rows of train. Found 4."),
        ({"seed": -1}, "`seed` should be an integer of at least 0. Found -1."),
        ({"conflict": 1.5}, "`conflict` should be a number from 0 to 1. Found 1.5."),
        ({"validation_rows": -5}, "`validation_rows` should be an integer of at least 0. Found -5."),
        ({"drift": 0.1}, "`drift` should be given together with `days`"),
        ({"days": 2, "drift": 1.1}, "`drift` should be a number from 0 to 1"),
        ({"days": 0}, "`days` should be a positive integer. Found 0."),
        ({"days": 200}, "`rows` should be at least `days`, 200. Found 100."),
        ({"days": 2, "validation_rows": 10}, "`validation_rows` should not be given with `days`"),
        ({"days": 2, "start_date": "soon"}, "`start_date` should be a date as 2026-11-01. Found 'soon'."),
    ],
)
def test_errors_name_the_argument(tmp_path: Path, arguments: dict[str, float], message: str):
    with pytest.raises(ValueError, match="should") as error:
        write_log(tmp_path, **{"rows": 100, "seed": 7, **arguments})
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_log_is_kept_unless_told(tmp_path: Path):
    old = write_log(tmp_path, rows=100, seed=7, files=3)
    with pytest.raises(ValueError, match="should be a new folder, or `overwrite` be given"):
        write_log(tmp_path, rows=100, seed=7, files=1)
    new = write_log(tmp_path, rows=100, seed=7, files=1, validation_rows=0, overwrite=True)
    assert sorted(tmp_path.rglob("*.parquet")) == list(new.files) == list(old.files[:1])
