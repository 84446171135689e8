"""Random streams: their uses, and the seeds and keys derived from them."""

import enum

import jax
import numpy as np


class Stream(enum.IntEnum):
    """The uses of random numbers, each with its own stream. Results depend on the values."""

    PARTNER_INIT = 0
    PARTNER_TRAINING = 1
    TRAINING = 2
    CALIBRATION = 3
    REESTIMATION = 4
    DIAGNOSIS = 5


def random_key(seed: int, stream: Stream) -> jax.Array:
    """Returns the random key of a stream."""
    return jax.random.fold_in(jax.random.key(seed), int(stream))


def data_seed(seed: int, stream: Stream) -> int:
    """Returns the seed for a stream's order of examples."""
    return int(np.random.SeedSequence([seed, int(stream)]).generate_state(1)[0])
