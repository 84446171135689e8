import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.quantizers import LSQ, QUANTIZERS
from bqat_jax.quantizers.oscillations import (
    can_freeze,
    dampening_loss,
    freeze,
    init_tracker,
    track,
)

QUANTIZER = LSQ(bits=3)
PARAMETERS = {'step_size': jnp.float32(0.5)}


def follow(codes, momentum=0.5, threshold=np.inf):
    """The tracker of one weight that has these codes, one after another."""
    tracker = init_tracker(QUANTIZER, PARAMETERS, jnp.array([codes[0] * 0.5]))
    for code in codes[1:]:
        tracker = track(tracker, jnp.array([code], jnp.int8), momentum, threshold)
    return tracker


def paper(codes, momentum):
    """Frequency and average as in the paper, a step at a time."""
    direction, frequency, average = 0, 0.0, float(codes[0])
    for before, after in itertools.pairwise(codes):
        change = np.sign(after - before)
        frequency = momentum * (change != 0 and change == -direction) + (1 - momentum) * frequency
        direction = change or direction
        average = momentum * after + (1 - momentum) * average
    return frequency, average, direction


@pytest.mark.parametrize(
    'codes', [[0, 1, 0, 1, 0], [0, 1, 1, 1, 0], [0, 1, 2, 3], [0, 0, 0], [1, 0, 0, 1, 0, 0, 1], [3, -4, 3]]
)
def test_oscillations_are_counted_as_in_the_paper(codes):
    tracker = follow(codes, momentum=0.1)
    frequency, average, direction = paper(codes, 0.1)
    np.testing.assert_allclose(tracker.frequency, [frequency], rtol=1e-6)
    np.testing.assert_allclose(tracker.average, [average], rtol=1e-6)
    assert int(tracker.direction[0]) == direction and not tracker.is_frozen[0]


def test_a_weight_that_oscillates_is_frozen_at_its_mean_code_for_good():
    tracker = follow([0, 1, 1, 1, 0, 1, 1], momentum=0.3, threshold=0.4)
    assert bool(tracker.is_frozen[0]) and int(tracker.codes[0]) == 1
    later = track(tracker, jnp.array([-3], jnp.int8), 0.3, np.inf)
    assert bool(later.is_frozen[0]) and int(later.codes[0]) == 1
    np.testing.assert_array_equal(later.average, tracker.average)
    weights = jnp.array([-1.7])
    np.testing.assert_allclose(freeze(QUANTIZER, PARAMETERS, weights, later), [0.5])
    # The scale still learns: the weight moves with it and keeps its code.
    np.testing.assert_allclose(freeze(QUANTIZER, {'step_size': jnp.float32(0.7)}, weights, later), [0.7])


def test_weights_that_are_not_frozen_stay():
    weights = jnp.array([0.1, -0.3])
    tracker = init_tracker(QUANTIZER, PARAMETERS, weights)
    np.testing.assert_array_equal(freeze(QUANTIZER, PARAMETERS, weights, tracker), weights)


def of_weights(name):
    cls = QUANTIZERS.get(name)
    return cls(bits=2 if 2 in cls.bits_signed else 1)


@pytest.mark.parametrize('quantizer', [q for q in map(of_weights, QUANTIZERS) if can_freeze(q)], ids=lambda q: q.name)
def test_a_frozen_weight_keeps_its_code_in_every_quantizer_that_allows_it(quantizer):
    weights = jax.random.normal(jax.random.key(0), (32,))
    parameters = quantizer.init(weights)
    tracker = init_tracker(quantizer, parameters, weights)._replace(is_frozen=jnp.ones(32, bool))
    moved = freeze(quantizer, parameters, weights + 1.0, tracker)
    np.testing.assert_array_equal(quantizer.encode(parameters, moved), tracker.codes)


def test_dampening_pulls_weights_to_their_level_and_leaves_clipped_ones():
    weights = jnp.array([[0.1, 0.3, 0.5, 9.0, -9.0, 0.75]]).T
    loss, gradient = jax.value_and_grad(lambda w: dampening_loss(QUANTIZER, PARAMETERS, w, 'sum'))(weights)
    distance = np.array([[0.1, 0.3 - 0.5, 0, 0, 0, -0.25]]).T
    np.testing.assert_allclose(loss, (distance**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, 2 * distance, atol=1e-6)
    scale = jax.grad(lambda p: dampening_loss(QUANTIZER, p, weights, 'sum'))(PARAMETERS)
    assert float(scale['step_size']) == 0


def test_kernel_mean_is_a_mean_over_each_kernel():
    weights = jax.random.normal(jax.random.key(0), (3, 3, 2, 5))
    total, mean = (dampening_loss(QUANTIZER, PARAMETERS, weights, how) for how in ('sum', 'kernel_mean'))
    np.testing.assert_allclose(mean, total / 18, rtol=1e-6)
    with pytest.raises(ValueError, match='kernel_mean'):
        dampening_loss(QUANTIZER, PARAMETERS, weights, 'mean')
