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
    hold,
    init_tracker,
    track,
)

QUANTIZER = LSQ(bits=3)
PARAMETERS = {'step_size': jnp.float32(0.5)}


def follow(codes, momentum=0.5, threshold=1.0):  # no frequency is larger: nothing is frozen
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
    tracker = follow([0, 1, 1, 1, 1, 1, 0, 1, 1], momentum=0.3, threshold=0.4)
    assert bool(tracker.is_frozen[0]) and int(tracker.codes[0]) == 1
    later = track(tracker, jnp.array([-3], jnp.int8), 0.3, np.inf)
    assert bool(later.is_frozen[0]) and int(later.codes[0]) == 1
    np.testing.assert_array_equal(later.average, tracker.average)
    weights = jnp.array([-1.7])
    np.testing.assert_allclose(freeze(QUANTIZER, PARAMETERS, weights, later), [0.5])
    # The scale still learns: the weight moves with it and keeps its code.
    np.testing.assert_allclose(freeze(QUANTIZER, {'step_size': jnp.float32(0.7)}, weights, later), [0.7])


def test_it_is_frozen_at_the_average_before_the_step():
    """The average is 0.4 before the step that freezes and 0.64 after it."""
    tracker = follow([0, 1, 0, 0])._replace(average=jnp.array([0.4]), frequency=jnp.array([0.3]))
    tracker = track(tracker, jnp.array([1], jnp.int8), 0.4, 0.5)
    assert bool(tracker.is_frozen[0]) and int(tracker.codes[0]) == 0


def test_before_freezing_begins_oscillations_count_and_the_average_is_the_code():
    tracker = follow([0, 1, 0, 1, 0], momentum=0.5, threshold=np.inf)
    assert float(tracker.frequency[0]) > 0.8 and not tracker.is_frozen[0]
    np.testing.assert_array_equal(tracker.average, [0.0])
    tracker = track(tracker, jnp.array([1], jnp.int8), 0.5, 0.5)  # begins: frozen at the code before
    assert bool(tracker.is_frozen[0]) and int(tracker.codes[0]) == 0


def test_the_step_learns_from_frozen_weights_by_their_codes():
    """y = s · code, so dy/ds = code: 0 + 2 - 1 + 3. The straight-through rule, round(u) - u, gives 3 here."""
    quantizer, weights = LSQ(bits=3), jnp.array([0.12, 0.61, -0.37, 0.9])
    parameters = {'step_size': jnp.float32(0.25)}
    tracker = init_tracker(quantizer, parameters, weights)._replace(is_frozen=jnp.ones(4, bool))
    np.testing.assert_array_equal(tracker.codes, [0, 2, -1, 3])
    weights = freeze(quantizer, parameters, weights, tracker)

    def total(parameters, weights, tracker):
        quantized = quantizer.fake_quantize(parameters, weights)
        return jnp.sum(hold(quantizer, parameters, tracker, quantized))

    value, (by_step, by_weight) = jax.value_and_grad(total, (0, 1))(parameters, weights, tracker)
    np.testing.assert_allclose(value, 1.0)
    np.testing.assert_allclose(by_step['step_size'], 4.0, rtol=1e-6)
    np.testing.assert_array_equal(by_weight, jnp.zeros(4))
    free = tracker._replace(is_frozen=jnp.zeros(4, bool))
    np.testing.assert_array_equal(jax.grad(total, 1)(parameters, weights, free), [1, 1, 1, 0])


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


@pytest.mark.parametrize('quantizer', [q for q in map(of_weights, QUANTIZERS) if can_freeze(q)], ids=lambda q: q.name)
def test_parameters_learn_from_frozen_weights_as_from_constant_codes(quantizer):
    """Against the numerical derivative of what the codes stand for, in every quantizer that allows freezing."""
    weights, weighting = jax.random.normal(jax.random.key(0), (32,)), jax.random.normal(jax.random.key(1), (32,))
    parameters = quantizer.init(weights)
    tracker = init_tracker(quantizer, parameters, weights)._replace(is_frozen=jnp.ones(32, bool))
    weights = freeze(quantizer, parameters, weights, tracker)
    np.testing.assert_array_equal(
        hold(quantizer, parameters, tracker, jnp.zeros(32)), quantizer.fake_quantize(parameters, weights)
    )

    def total(parameters):
        quantized = quantizer.fake_quantize(parameters, weights)
        return jnp.sum(weighting * hold(quantizer, parameters, tracker, quantized))

    gradients = jax.grad(total)(parameters)
    for name, x in parameters.items() if quantizer.is_learned else ():
        for index in np.ndindex(x.shape):
            up, down = ({**parameters, name: x.at[index].add(change)} for change in (0.01, -0.01))
            decoded = [np.float64(quantizer.decode(p, tracker.codes)) @ np.float64(weighting) for p in (up, down)]
            np.testing.assert_allclose(gradients[name][index], (decoded[0] - decoded[1]) / 0.02, rtol=1e-3, atol=1e-4)


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
