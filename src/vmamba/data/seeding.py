"""Counter-based randomness: what is drawn is a function of numbers that say where one is.

No random state has to be kept, handed to workers or saved: the number of workers and a resume change nothing.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def draw_seed(*counters: int) -> int:
    """A seed of 63 bits that is well mixed from non-negative counters, such as (seed, epoch, sample)."""
    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def seeded(*counters: int) -> Iterator[None]:
    """Run a block with Python's, NumPy's and PyTorch's CPU generators seeded from counters; then as before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = draw_seed(*counters)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
