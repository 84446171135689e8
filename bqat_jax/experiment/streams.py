"""Random numbers: what they are drawn for, and how seeds and keys follow from that."""

import enum

import jax
import numpy as np


class Stream(enum.IntEnum):
    """What random numbers are drawn for; no two uses share a stream. Results depend on the numbers."""

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
    """Returns the seed of the order in which a stream reads examples."""
    return int(np.random.SeedSequence([seed, int(stream)]).generate_state(1)[0])
