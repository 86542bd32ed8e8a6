"""The synthetic log itself: row i of an endless log is a function of (seed, i), with the truth behind its labels.

Click: a logit of additive effects (user, item, author, category, age, hour, country, autoplay, history) and of an
interaction: products of a factor of the item with one of the user and with the mean of that factor over the history.
Conversion given click: the factors that click reads (with its sign in one group, with the opposite sign in the other),
how likely the click was, a product of its own, and other additive effects (price, membership, age, country).
Dwell given click: log-normal; the same shared factors, a product of its own, and additive effects of its own (duration).
Nothing that the labels depend on is hidden from the columns: the truth is the best that a model can reach.

Dimensions: N rows, H history elements of all rows, F factors.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mtrec.synthetic.draws import (
    CHUNK_ROWS,
    LOOKUP_BITS,
    BoolArray,
    Chunks,
    FloatArray,
    IntArray,
    draw,
    mix,
    sigmoid,
    solve_bias,
    uniform,
)
from mtrec.synthetic.population import (
    AGREE,
    CLICK,
    CONVERSION,
    COUNTRIES,
    DWELL,
    FACTOR_MEAN,
    FADE,
    NUM_CATEGORIES,
    NUM_ITEMS,
    NUM_TAGS,
    NUM_USERS,
    OPPOSE,
    Population,
    make_population,
)

HISTORY_BLOCK = 5  # so many consumed items in a row are of one category: short-lived interests
TARGETED = 0.3  # share of impressions chosen by the user's segment, not by popularity

CLICK_RATE = 0.3
CONVERSION_RATE = 0.25  # among the clicked rows
MEDIAN_DWELL_SECONDS = 20.0
INTERACTION_SHARE = 0.35  # of the click logit's variance: what no additive model can reach
CLICK_SPREAD = 1.4  # standard deviations over all rows: of the click logit,
CONVERSION_SPREAD = 1.3  # of the conversion logit,
DWELL_SPREAD = 0.75  # of the mean of log dwell,
DWELL_NOISE = 1.0  # and of log dwell around it

COLUMNS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("user_id", pa.int64()),
        ("item_id", pa.int64()),
        ("category", pa.string()),
        ("author_id", pa.int32()),
        ("tags", pa.list_(pa.string())),
        ("history", pa.list_(pa.int64())),
        ("age", pa.float32()),
        ("country", pa.string()),
        ("is_member", pa.bool_()),
        ("price", pa.float32()),
        ("duration_seconds", pa.float32()),
        ("hour", pa.int8()),
        ("autoplay", pa.bool_()),
        ("click", pa.int8()),
        ("conversion", pa.int8()),
        ("dwell_seconds", pa.float32()),
        ("true_p_click", pa.float32()),
        ("true_p_conversion", pa.float32()),
        ("true_dwell_seconds", pa.float32()),
    ]
)


@dataclass(frozen=True)
class _Rows:
    """What a chunk shows of its rows: entities, history (flat, with offsets), numbers; NaN and -1 are nulls."""

    row_N: IntArray
    user_N: IntArray
    item_N: IntArray
    history_H: IntArray
    history_offsets: IntArray
    history_null_N: BoolArray
    price_N: FloatArray
    hour_N: IntArray
    autoplay_N: BoolArray


@dataclass(frozen=True)
class Truth:
    """p(click), p(conversion | click) and the mean of log dwell given a click, of every row (N,)."""

    p_click: FloatArray
    p_conversion: FloatArray
    log_dwell: FloatArray

    @property
    def dwell_seconds(self) -> FloatArray:
        """E[dwell | click] in seconds: the mean of a log-normal."""
        return np.asarray(np.exp(self.log_dwell + 0.5 * DWELL_NOISE**2))


class SyntheticLog:
    """An endless log of impressions with known truth. `rows(start, stop)` is the same table however it is cut.

    `conflict` in [0, 1] turns what conversion and dwell share with click from agreement (0) into opposition (1).
    `rows_per_day` and `drift` (share of users and items replaced a day) make ids appear and fade along the rows.

    >>> log = SyntheticLog(seed=7)
    >>> table = log.rows(0, 1000)
    >>> table.num_rows, table.equals(log.rows(0, 2000).slice(0, 1000))
    (1000, True)
    """

    def __init__(
        self, *, seed: int, conflict: float = 0.0, rows_per_day: int | None = None, days: int = 1, drift: float = 0.0
    ):
        if not 0.0 <= conflict <= 1.0:
            raise ValueError(f"`conflict` should be a number from 0 to 1. Found {conflict}.")
        if not 0.0 <= drift <= 1.0:
            raise ValueError(f"`drift` should be a number from 0 to 1, the share of ids replaced a day. Found {drift}.")
        if rows_per_day is not None and rows_per_day < 1:
            raise ValueError(f"`rows_per_day` should be a positive integer. Found {rows_per_day}.")
        if seed < 0:
            raise ValueError(f"`seed` should be an integer of at least 0. Found {seed}.")
        self.seed = seed
        self.conflict = conflict
        self.rows_per_day = rows_per_day
        self.days = days
        self.drift = drift
        # The highest that `_generation` can reach, on the last day, at phase 1 and the end of the fade.
        generations = 1 if drift == 0.0 else int(np.floor(drift * (days - 1) + 1.0 + FADE / 2)) + 1
        self.population: Population = make_population(seed, generations)
        self._chunks = Chunks(self._chunk)
        self._scales: dict[str, tuple[float, float]] = {}
        self._bias_click = self._bias_conversion = 0.0
        self._calibrate()

    def rows(self, start: int, stop: int) -> pa.Table:
        """Rows `start` to `stop` (excluded), with the columns of `COLUMNS`."""
        return self._chunks.rows(start, stop)

    def _chunk(self, chunk: int) -> pa.Table:
        rng = np.random.default_rng([self.seed, 1, chunk])
        drawn = self._draw(rng, np.arange(chunk * CHUNK_ROWS, (chunk + 1) * CHUNK_ROWS))
        return self._table(rng, drawn, self._truth(drawn))

    def _generation(self, day: FloatArray, phase: FloatArray, fade: FloatArray) -> IntArray:
        if self.drift == 0.0:
            return np.zeros(day.shape, dtype=np.int64)
        return np.maximum(np.floor(self.drift * day + phase + FADE * (fade - 0.5)), 0.0).astype(np.int64)

    def _day(self, row: FloatArray) -> FloatArray:
        """The day of a row: 0 for what came before the log, the last day for what comes after."""
        if self.rows_per_day is None:
            return np.zeros(row.shape)
        return np.clip(np.floor(row / self.rows_per_day), 0.0, self.days - 1)

    def _draw(self, rng: np.random.Generator, row_N: IntArray) -> _Rows:
        population, count = self.population, len(row_N)
        users, items = population.users, population.items
        user_slot = draw(users.cumulative, rng.random(count))
        day_N = self._day(row_N.astype(np.float64))
        fade_N = rng.random((2, count))
        user_N = user_slot + NUM_USERS * self._generation(day_N, population.phase_user[user_slot], fade_N[0])

        item_slot = draw(items.cumulative, rng.random(count))
        targeted = rng.random(count) < TARGETED
        pick = rng.integers(0, 1 << LOOKUP_BITS, size=(2, count))
        wanted = population.segment_category[users.segment[user_N], pick[0]]
        item_slot = np.where(targeted, population.category_item[wanted, pick[1]], item_slot)
        item_N = item_slot + NUM_ITEMS * self._generation(day_N, population.phase_item[item_slot], fade_N[1])

        price_N = items.price[item_N] * np.exp(0.1 * rng.standard_normal(count))
        hour_N = np.floor(24.0 * rng.beta(2.5, 1.5, size=count)).astype(np.int64)
        history_null_N = rng.random(count) < 0.02
        history_H, offsets = self._history(row_N, user_N, user_slot, history_null_N)
        return _Rows(
            row_N=row_N,
            user_N=user_N,
            item_N=item_N,
            history_H=history_H,
            history_offsets=offsets,
            history_null_N=history_null_N,
            price_N=np.where(rng.random(count) < 0.05, np.nan, price_N),
            hour_N=hour_N,
            autoplay_N=rng.random(count) < 0.4,
        )

    def _history(
        self, row_N: IntArray, user_N: IntArray, user_slot: IntArray, null_N: BoolArray
    ) -> tuple[IntArray, IntArray]:
        """The last items that each row's user consumed, oldest first. The k-th one of a user is a hash of (user, k)."""
        population = self.population
        users = population.users
        end_N = users.history_start[user_N] + np.floor(row_N * users.history_rate[user_slot]).astype(np.int64)
        length_N = np.where(null_N, 0, np.minimum(end_N, users.history_length[user_N]))
        offsets = np.concatenate([[0], np.cumsum(length_N)])
        owner_H = np.repeat(np.arange(len(row_N)), length_N)
        place_H = np.arange(offsets[-1]) - offsets[:-1][owner_H] + (end_N - length_N)[owner_H]
        user_H = user_N[owner_H]
        stream_H = mix(user_H.astype(np.uint64) ^ population.salt)
        block_H = mix(stream_H + (place_H // HISTORY_BLOCK).astype(np.uint64))
        own_H = mix((block_H ^ population.salt) + place_H.astype(np.uint64))
        shift = np.uint64(64 - LOOKUP_BITS)
        category_H = population.segment_category[users.segment[user_H], block_H >> shift]
        slot_H = population.category_item[category_H, own_H >> shift].astype(np.int64)
        if self.drift == 0.0:
            return slot_H, offsets
        # An item is the one that held the slot on the day when it was consumed.
        consumed_H = (place_H - users.history_start[user_H]) / users.history_rate[user_slot[owner_H]]
        generation_H = self._generation(self._day(consumed_H), population.phase_item[slot_H], uniform(mix(own_H)))
        return slot_H + NUM_ITEMS * generation_H, offsets

    def _effects(self, rows: _Rows) -> dict[str, FloatArray]:
        """The parts that the labels are made of, each (N,), not yet scaled. A null attribute has no effect."""
        population = self.population
        users, items = population.users, population.items
        item_NF = items.factors_IF[rows.item_N]
        user_NF = users.factors_UF[rows.user_N]
        product_NF = (FACTOR_MEAN + user_NF) * (FACTOR_MEAN + item_NF)
        sums_HF = np.cumsum(items.factors_IF[rows.history_H, CLICK], axis=0)
        sums_HF = np.concatenate([np.zeros((1, sums_HF.shape[1])), sums_HF])
        length_N = np.maximum(np.diff(rows.history_offsets), 1)
        history_NF = np.diff(sums_HF[rows.history_offsets], axis=0) / length_N[:, None]

        age_N, country_N = users.age[rows.user_N], users.country[rows.user_N]
        has_country = country_N >= 0
        prime_age = np.nan_to_num(np.exp(-(((age_N - 32.0) / 9.0) ** 2)), nan=0.4)
        cheap = -np.nan_to_num(np.log(rows.price_N) - 2.5, nan=0.0)
        evening = np.cos((rows.hour_N - 20.0) * (np.pi / 12.0))
        member = users.is_member[rows.user_N] - 0.3
        duration = np.log(items.duration_seconds[rows.item_N]) - 4.0
        return {
            "agree": product_NF[:, AGREE],
            "oppose": product_NF[:, OPPOSE],
            "history_agree": history_NF[:, AGREE] * item_NF[:, AGREE],
            "history_oppose": history_NF[:, OPPOSE] * item_NF[:, OPPOSE],
            "pair_agree": user_NF[:, AGREE] * item_NF[:, AGREE],
            "pair_oppose": user_NF[:, OPPOSE] * item_NF[:, OPPOSE],
            "single_agree": user_NF[:, AGREE] + item_NF[:, AGREE] + history_NF[:, AGREE],
            "single_oppose": user_NF[:, OPPOSE] + item_NF[:, OPPOSE] + history_NF[:, OPPOSE],
            "conversion": product_NF[:, CONVERSION],
            "dwell": product_NF[:, DWELL],
            "click_additive": 0.6 * users.click[rows.user_N]
            + 0.8 * items.click[rows.item_N]
            + 0.8 * prime_age
            + 0.3 * evening
            + 0.3 * rows.autoplay_N
            + 0.2 * np.where(has_country, population.country_click[country_N], 0.0),
            "conversion_additive": 0.5 * users.conversion[rows.user_N]
            + 0.6 * items.conversion[rows.item_N]
            + 0.7 * cheap
            + 0.8 * member
            - 0.5 * prime_age
            + 0.3 * np.where(has_country, population.country_conversion[country_N], 0.0),
            "dwell_additive": 0.5 * users.dwell[rows.user_N]
            + 0.6 * items.dwell[rows.item_N]
            + 1.0 * duration
            - 0.5 * rows.autoplay_N
            + 0.2 * evening,
        }

    def _scaled(self, name: str, values_N: FloatArray) -> FloatArray:
        """`values_N` shifted and divided to mean 0 and standard deviation 1 over the calibration's rows."""
        if name not in self._scales:  # only while calibrating: the first rows seen set the scale
            self._scales[name] = (float(values_N.mean()), float(values_N.std()))
        mean, deviation = self._scales[name]
        return (values_N - mean) / deviation

    def _truth(self, rows: _Rows) -> Truth:
        effect = {name: self._scaled(name, values) for name, values in self._effects(rows).items()}
        agree, oppose = np.sqrt(1.0 - self.conflict), np.sqrt(self.conflict)
        shared = self._scaled("shared", agree * effect["agree"] - oppose * effect["oppose"])
        pair = self._scaled("pair", agree * effect["pair_agree"] + oppose * effect["pair_oppose"])
        history = self._scaled("history", agree * effect["history_agree"] + oppose * effect["history_oppose"])
        single = self._scaled("single", agree * effect["single_agree"] + oppose * effect["single_oppose"])
        # Scaled apart and then added: the share that no additive model can reach is the same for every seed. Otherwise
        # it hangs on how the few segments' and categories' effects happen to be correlated with their factors.
        additive = self._scaled("additive", 0.6 * single + 0.6 * effect["click_additive"])
        interaction = self._scaled("interaction", 0.8 * pair + 0.4 * history)
        click = self._scaled(
            "click", np.sqrt(1.0 - INTERACTION_SHARE) * additive + np.sqrt(INTERACTION_SHARE) * interaction
        )
        # Steep where a click is unlikely and flat where it is likely: clicked rows alone hardly show the slope.
        interest = self._scaled("interest", -np.logaddexp(0.0, -2.0 * click))
        conversion = self._scaled(
            "conversion_sum",
            0.4 * shared
            + 0.3 * effect["conversion"]
            + 0.75 * effect["conversion_additive"]
            + 0.4 * (1.0 - self.conflict) * interest,
        )
        dwell = self._scaled("dwell_sum", 0.45 * shared + 0.3 * effect["dwell"] + 0.8 * effect["dwell_additive"])
        return Truth(
            p_click=sigmoid(CLICK_SPREAD * click + self._bias_click),
            p_conversion=sigmoid(CONVERSION_SPREAD * conversion + self._bias_conversion),
            log_dwell=DWELL_SPREAD * dwell + np.log(MEDIAN_DWELL_SECONDS),
        )

    def _calibrate(self) -> None:
        """Fix scales and biases on rows of their own, so that every seed gives the same rates and difficulty."""
        row_N = np.arange(0, 8 * CHUNK_ROWS, 16)
        rows = self._draw(np.random.default_rng([self.seed, 2]), row_N)
        truth = self._truth(rows)

        def logit(probability_N: FloatArray) -> FloatArray:
            return np.asarray(np.log(probability_N) - np.log1p(-probability_N))

        self._bias_click = solve_bias(logit(truth.p_click), CLICK_RATE)
        p_click = sigmoid(logit(truth.p_click) + self._bias_click)
        self._bias_conversion = solve_bias(logit(truth.p_conversion), CONVERSION_RATE, p_click)

    def _table(self, rng: np.random.Generator, rows: _Rows, truth: Truth) -> pa.Table:
        users, items = self.population.users, self.population.items
        count = len(rows.row_N)
        click = rng.random(count) < truth.p_click
        conversion = click & (rng.random(count) < truth.p_conversion)
        dwell = np.exp(truth.log_dwell + DWELL_NOISE * rng.standard_normal(count))
        country_N = users.country[rows.user_N]
        columns = {
            "row_id": rows.row_N,
            "user_id": users.ids[rows.user_N],
            "item_id": items.ids[rows.item_N],
            "category": _names("category_", items.category[rows.item_N], NUM_CATEGORIES),
            "author_id": items.author[rows.item_N],
            "tags": self._tags(rows.item_N),
            "history": _lists(items.ids[rows.history_H], rows.history_offsets, rows.history_null_N),
            "age": users.age[rows.user_N],
            "country": pa.array(COUNTRIES).take(pa.array(country_N, mask=country_N < 0)),
            "is_member": users.is_member[rows.user_N],
            "price": np.round(rows.price_N, 2),
            "duration_seconds": items.duration_seconds[rows.item_N],
            "hour": rows.hour_N,
            "autoplay": rows.autoplay_N,
            "click": click.astype(np.int8),
            "conversion": conversion.astype(np.int8),
            "dwell_seconds": np.where(click, dwell, np.nan),
            "true_p_click": truth.p_click,
            "true_p_conversion": truth.p_conversion,
            "true_dwell_seconds": truth.dwell_seconds,
        }
        arrays = []
        for field in COLUMNS:
            values = columns[field.name]
            array = pa.array(values, from_pandas=True) if isinstance(values, np.ndarray) else values
            arrays.append(array.cast(field.type))
        return pa.Table.from_arrays(arrays, schema=COLUMNS)

    def _tags(self, item_N: IntArray) -> pa.Array:
        items = self.population.items
        start_N = items.tag_offsets[item_N]
        length_N = np.where(items.has_tags[item_N], items.tag_offsets[item_N + 1] - start_N, 0)
        offsets = np.concatenate([[0], np.cumsum(length_N)])
        place = np.arange(offsets[-1]) + np.repeat(start_N - offsets[:-1], length_N)
        return _lists(_names("tag_", items.tags[place], NUM_TAGS), offsets, ~items.has_tags[item_N])


def _names(prefix: str, codes: IntArray, count: int) -> pa.Array:
    return pa.array([f"{prefix}{code:02d}" for code in range(count)]).take(pa.array(codes))


def _lists(values: IntArray | pa.Array, offsets: IntArray, null_N: BoolArray) -> pa.Array:
    flat = values if isinstance(values, pa.Array) else pa.array(values)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), flat, mask=pa.array(null_N))
