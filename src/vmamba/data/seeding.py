"""Counter-based randomness: every draw is a function of counters such as (seed, epoch, sample).

No random state has to be kept, passed to workers or saved: neither the number of workers nor a resume changes
a draw.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator


def draw_seed(purpose: str, *counters: int) -> int:
    """A seed of 63 bits, well mixed from counters such as (seed, epoch, sample).

    Args:
        purpose: A name for what is drawn; equal counters give different seeds for different purposes.
        counters: Numbers that identify the draw.
    """
    digest = hashlib.blake2b(repr((purpose, *counters)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


_idle_generators: list[np.random.MT19937] = []
"""NumPy generators that no `seeded` block uses at the moment; each of nested blocks needs one."""


@contextmanager
def seeded(purpose: str, *counters: int) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators inside a block, and restore them after it."""
    states = random.getstate(), torch.get_rng_state()
    # Swap NumPy's generator: copying its state takes 0.1 ms, as long as decoding a small image.
    numpy_generator = get_bit_generator()
    generator = _idle_generators.pop() if _idle_generators else np.random.MT19937(0)
    seed = draw_seed(purpose, *counters)
    random.seed(seed)
    set_bit_generator(generator)
    np.random.seed(seed % 2**32)
    torch.random.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        set_bit_generator(numpy_generator)
        _idle_generators.append(generator)
        torch.set_rng_state(states[1])
