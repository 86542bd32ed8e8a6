"""Two variants of a comparison whose truth is known."""

import numpy as np

from mtrec.compare.statistics import Scores


def simulated(
    rng: np.random.Generator,
    *,
    users: int = 250,
    seeds: int = 4,
    gain: float = 0.0,
    kind: str = "click",
    skill: float = 0.05,
    user_error: float = 0.6,
) -> tuple[Scores, Scores]:
    """Two variants with equal populations (but for `gain`) on a fresh test set.

    Users differ in size and taste; each variant errs on users and rows in its own way, that all its seeds share; a seed has a
    skill of its own and errs on rows of its own. Dwell is log-normal up to the length of the video.
    """
    user = np.repeat(np.arange(users), rng.geometric(0.15, users))
    truth = rng.normal(0, 0.8, users)[user] + rng.normal(0, 1, len(user))
    if kind == "click":
        label = (rng.random(len(user)) < 1 / (1 + np.exp(1 - truth))).astype(float)
    else:
        label = np.minimum(np.exp(truth + rng.normal(0, 1, len(user))), 15) * (rng.random(len(user)) < 0.8)
    sides = []
    for side in range(2):
        own = user_error * rng.normal(0, 1, users)[user] + 0.6 * rng.normal(0, 1, len(user))
        predictions = {}
        for seed in range(seeds):
            signal = (1 + skill * rng.normal() + (side - 0.5) * gain) * truth + own + 0.3 * rng.normal(0, 1, len(user))
            predictions[seed] = 1 / (1 + np.exp(1 - signal)) if kind == "click" else np.minimum(np.exp(signal), 15)
        sides.append(Scores(predictions, label, user))
    return sides[0], sides[1]
