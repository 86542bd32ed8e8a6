"""Random numbers of a step that are the same on all ranks and after a restart."""

import numpy as np
import torch


def generator(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU, keyed by (seed, step): it holds no state between steps, so none has to be saved.

    >>> torch.rand(1, generator=generator(7, 3)) == torch.rand(1, generator=generator(7, 3))
    tensor([True])
    """
    key = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(key) >> 1)  # manual_seed takes 63 bits
