"""Users and items of the synthetic log: their ids, their visible attributes and the hidden factors behind the labels.

Dimensions: U users, I items (an entity is a slot and a generation: with drift, a slot is taken over by a new entity
from time to time), S user segments, C categories, T tags, F factors, N rows or draws.

Most of what the factors say is shared by many entities (segments, categories, authors, tags) and only a little belongs
to one user or item: a few hundred thousand rows show the former, never the latter, and the truth must be learnable.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mtrec.synthetic.draws import BoolArray, FloatArray, IntArray, lookup, mix, zipf

NUM_USERS = 600
NUM_ITEMS = 300
NUM_SEGMENTS = 8
NUM_CATEGORIES = 20
NUM_AUTHORS = 80
NUM_TAGS = 40
COUNTRIES = ("IN", "US", "BR", "ID", "DE", "JP", "MX", "FR", "NG", "TR", "VN", "PL")

USER_ZIPF = 1.0
ITEM_ZIPF = 1.1

# Columns of every factor matrix. All tasks read `agree` with one sign; conversion and dwell read `oppose` with the sign
# that click does not; `conflict` moves the weight from the former to the latter. The other two belong to one task each.
AGREE, OPPOSE, CONVERSION, DWELL = 0, 1, 2, 3
CLICK = slice(0, 2)
NUM_FACTORS = 4
# Factors have this mean, their deviation being 1: a product of two of them then has main effects beside the
# interaction, and a model that has found the former knows the direction of the latter.
FACTOR_MEAN = 0.9

# A new entity takes over a slot gradually, over this share of the time that an entity lives.
FADE = 0.3
HISTORY_LENGTH = 20


@dataclass(frozen=True)
class Users:
    """Per-user arrays; an entity's index is `generation * NUM_USERS + slot`. Null attributes are NaN or -1."""

    ids: IntArray
    segment: IntArray
    factors_UF: FloatArray
    age: FloatArray
    country: IntArray
    is_member: BoolArray
    click: FloatArray
    conversion: FloatArray
    dwell: FloatArray
    cumulative: FloatArray  # by slot
    history_start: IntArray  # items consumed before the log begins
    history_rate: FloatArray  # items consumed per row of the log, by slot
    history_length: IntArray  # so many of the last ones are logged


@dataclass(frozen=True)
class Items:
    """Per-item arrays; an entity's index is `generation * NUM_ITEMS + slot`. Category and author belong to the slot."""

    ids: IntArray
    category: IntArray
    author: IntArray
    factors_IF: FloatArray
    tag_offsets: IntArray
    tags: IntArray
    has_tags: BoolArray
    price: FloatArray
    duration_seconds: FloatArray
    click: FloatArray
    conversion: FloatArray
    dwell: FloatArray
    cumulative: FloatArray  # by slot


@dataclass(frozen=True)
class Population:
    """All that the rows are drawn from. `segment_category` and `category_item` are look-up tables of draws."""

    users: Users
    items: Items
    segment_category: NDArray[np.int32]
    category_item: NDArray[np.int32]
    country_click: FloatArray
    country_conversion: FloatArray
    phase_user: FloatArray
    phase_item: FloatArray
    salt: np.uint64


def _ids(salt: int, count: int) -> IntArray:
    """`count` ids as hashed logs have them: spread over [0, 2 ** 63), most of them beyond what a float64 can hold."""
    keys = np.arange(count, dtype=np.uint64) ^ mix(np.array([salt], dtype=np.uint64))
    return (mix(keys) >> np.uint64(1)).astype(np.int64)


def _blend(rng: np.random.Generator, *parts: tuple[float, FloatArray]) -> FloatArray:
    """Sum of weight * part, plus noise so that the squares of all weights add to 1."""
    total = np.sum([weight * part for weight, part in parts], axis=0)
    own = np.sqrt(max(0.0, 1.0 - sum(weight**2 for weight, _ in parts)))
    return np.asarray(total + own * rng.standard_normal(total.shape))


def _standardized(values_NF: FloatArray, probability: FloatArray) -> FloatArray:
    """Factors of mean 0 and deviation 1 over the rows, so that no seed is much easier than another."""
    weight_N = np.resize(probability, len(values_NF))  # the slots' probabilities, once a generation
    mean_F = np.average(values_NF, axis=0, weights=weight_N)
    return np.asarray((values_NF - mean_F) / np.sqrt(np.average((values_NF - mean_F) ** 2, axis=0, weights=weight_N)))


def _users(rng: np.random.Generator, salt: int, count: int, segment_SF: FloatArray) -> Users:
    segment = rng.choice(NUM_SEGMENTS, size=count, p=zipf(NUM_SEGMENTS, 0.5))
    taste = segment_SF[segment]
    country_SC = rng.dirichlet(zipf(len(COUNTRIES), 1.0) * 6.0, size=NUM_SEGMENTS)
    country = (rng.random(count)[:, None] > np.cumsum(country_SC, axis=1)[segment]).sum(axis=1)
    country = np.minimum(country, len(COUNTRIES) - 1)
    age = 18.0 + rng.gamma(3.0, rng.uniform(3.0, 7.0, size=NUM_SEGMENTS)[segment])
    segment_click, segment_dwell = rng.standard_normal((2, NUM_SEGMENTS))
    click = _blend(rng, (0.9, segment_click[segment]))
    probability = rng.permutation(zipf(NUM_USERS, USER_ZIPF))
    return Users(
        ids=_ids(salt, count),
        segment=segment,
        factors_UF=_standardized(_blend(rng, (0.97, taste)), probability),
        age=np.where(rng.random(count) < 0.08, np.nan, np.round(np.minimum(age, 95.0))),
        country=np.where(rng.random(count) < 0.05, -1, country),
        is_member=rng.random(count) < rng.uniform(0.1, 0.6, size=NUM_SEGMENTS)[segment],
        click=click,
        conversion=_blend(rng, (0.5, click)),
        dwell=_blend(rng, (0.8, segment_dwell[segment])),
        cumulative=np.cumsum(probability),
        history_start=rng.integers(0, 40, size=count),
        history_rate=0.5 * probability,
        history_length=rng.integers(4, HISTORY_LENGTH + 1, size=count),
    )


def _items(rng: np.random.Generator, salt: int, generations: int) -> Items:
    count = NUM_ITEMS * generations
    # The slot decides category and author, so that the tables of draws by category hold for every generation.
    author_category = rng.choice(NUM_CATEGORIES, size=NUM_AUTHORS, p=zipf(NUM_CATEGORIES, 0.7))
    author = np.tile(rng.choice(NUM_AUTHORS, size=NUM_ITEMS, p=zipf(NUM_AUTHORS, 0.5)), generations)
    category = author_category[author]

    probability = rng.permutation(zipf(NUM_ITEMS, ITEM_ZIPF))
    sizes = rng.integers(0, 6, size=count)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    owner = np.repeat(np.arange(count), sizes)
    own_tags = rng.integers(0, NUM_TAGS, size=(NUM_CATEGORIES, 8))[category[owner], rng.integers(0, 8, size=len(owner))]
    tags = np.where(rng.random(len(owner)) < 0.3, rng.integers(0, NUM_TAGS, size=len(owner)), own_tags)
    tag_TF = rng.standard_normal((NUM_TAGS, NUM_FACTORS))
    tag_sum = np.zeros((count, NUM_FACTORS))
    np.add.at(tag_sum, owner, tag_TF[tags])
    # Divided by the root, not by the number: an item of few tags is not more extreme than one of many.
    tag_part = tag_sum / np.sqrt(np.maximum(sizes, 1))[:, None]

    category_F, author_F = (rng.standard_normal((n, NUM_FACTORS)) for n in (NUM_CATEGORIES, NUM_AUTHORS))
    category_3, author_3 = (rng.standard_normal((3, n)) for n in (NUM_CATEGORIES, NUM_AUTHORS))
    click = _blend(rng, (0.65, category_3[0][category]), (0.65, author_3[0][author]))
    return Items(
        ids=_ids(salt, count),
        category=category,
        author=author,
        factors_IF=_standardized(
            _blend(rng, (0.85, category_F[category]), (0.4, author_F[author]), (0.25, tag_part)), probability
        ),
        tag_offsets=offsets,
        tags=tags,
        has_tags=rng.random(count) >= 0.02,
        price=np.exp(2.5 + rng.normal(0.0, 0.7, NUM_CATEGORIES)[category] + rng.normal(0.0, 0.6, count)),
        duration_seconds=np.exp(4.0 + rng.normal(0.0, 0.5, NUM_CATEGORIES)[category] + rng.normal(0.0, 0.6, count)),
        click=click,
        conversion=_blend(rng, (0.5, click), (0.5, category_3[1][category]), (0.5, author_3[1][author])),
        dwell=_blend(rng, (0.6, category_3[2][category]), (0.6, author_3[2][author])),
        cumulative=np.cumsum(probability),
    )


def make_population(seed: int, generations: int = 1) -> Population:
    """Draw a population of `NUM_USERS` and `NUM_ITEMS` slots, each held by `generations` entities one after another.

    >>> population = make_population(7)
    >>> len(set(population.users.ids.tolist())), len(set(population.items.ids.tolist()))
    (600, 300)
    """
    rng = np.random.default_rng([seed, 0])
    salt_user, salt_item, salt_rows = (int(word) for word in rng.integers(0, 2**63, size=3))
    segment_SF = rng.standard_normal((NUM_SEGMENTS, NUM_FACTORS))
    users = _users(rng, salt_user, NUM_USERS * generations, segment_SF)
    items = _items(rng, salt_item, generations)

    popularity = np.diff(items.cumulative, prepend=0.0)
    slot_category = items.category[:NUM_ITEMS]
    # The root keeps a category's draws from being one item over and over.
    members_CI = (slot_category[None, :] == np.arange(NUM_CATEGORIES)[:, None]) * np.sqrt(popularity)
    # A category that no author drew holds nothing and is never drawn: any row will do for its table.
    category_item = lookup(np.where(members_CI.sum(axis=1, keepdims=True) > 0, members_CI, popularity))
    category_popularity = members_CI.sum(axis=1)
    mean_CF = members_CI @ items.factors_IF[:NUM_ITEMS] / np.maximum(category_popularity, 1e-12)[:, None]
    liking_SC = segment_SF[:, CLICK] @ mean_CF[:, CLICK].T
    segment_category = lookup(category_popularity * np.exp(1.2 * liking_SC / liking_SC.std()))
    return Population(
        users=users,
        items=items,
        segment_category=segment_category,
        category_item=category_item,
        country_click=rng.standard_normal(len(COUNTRIES)),
        country_conversion=rng.standard_normal(len(COUNTRIES)),
        phase_user=rng.random(NUM_USERS),
        phase_item=rng.random(NUM_ITEMS),
        salt=np.uint64(salt_rows),
    )
