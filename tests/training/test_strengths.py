import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.quantizers import LSQ, PACT
from bqat_jax.quantizers.estimators import get_estimator
from bqat_jax.training.strengths import TraceSettings, hutchinson_traces, mean_strengths, measure_strengths
from bqat_jax.transform import KernelLayout, Layer, LayerQuantizers, Quantization

LAYER = Layer('Dense', (6, 4), (), KernelLayout((0, 1)), jax.ShapeDtypeStruct((2, 6), 'float32'))


def symmetric(seed, size):
    matrix = np.random.default_rng(seed).normal(size=(size, size))
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize('shift', [5.0, 0.0, -5.0])
def test_the_trace_of_a_quadratic_lies_within_the_confidence_interval(shift):
    """Two blocks with a coupling between them; positive, small and negative traces."""
    whole = symmetric(0, 30) + shift * np.eye(30)
    hessian = jnp.asarray(whole, jnp.float32)

    def gradient(x):
        joined = hessian @ jnp.concatenate([x['a'], x['b']])
        return {'a': joined[:10], 'b': joined[10:]}

    at = {'a': jnp.ones(10), 'b': jnp.ones(20)}
    run = jax.jit(lambda key: hutchinson_traces(gradient, at, key, 400, 0.0))
    covered = []
    for seed in range(20):
        trace = run(jax.random.key(seed))
        assert int(trace.iterations) == 400
        for name, expected in (('a', whole[:10, :10].trace()), ('b', whole[10:, 10:].trace())):
            covered.append(abs(float(trace.mean[name]) - expected) < 1.96 * float(trace.standard_error[name]))
    # 40 intervals of 95 %: fewer than 33 hold with a probability below 1e-3.
    assert sum(covered) >= 33


def test_no_more_vectors_are_drawn_once_the_mean_stands_still():
    """A diagonal Hessian gives the same number every time, also a negative one."""
    for sign in (1, -1):
        trace = hutchinson_traces(lambda x, sign=sign: sign * 3.0 * x, jnp.zeros(8), jax.random.key(0), 50, 1e-3)
        assert int(trace.iterations) == 2
        np.testing.assert_allclose(trace.mean, sign * 24.0, rtol=1e-6)
        np.testing.assert_allclose(trace.standard_error, 0.0, atol=1e-5)


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_delta_follows_the_formula(sign):
    """For a loss that is quadratic in the output with a known Hessian: Tr(H)/N / (3 std(g)), normalized."""
    quantizer = LSQ(bits=2, estimator=get_estimator('ewgs_trace'))
    weights = jax.random.normal(jax.random.key(0), (6, 4))
    parameters = {'layer': {'weights': quantizer.init(weights)}}
    quantization = Quantization({'layer': LayerQuantizers(quantizer, None, LAYER)})
    curvature = jnp.asarray(np.random.default_rng(0).uniform(0.5, 2, (6, 4)), jnp.float32)

    def loss(quantization, parameters):
        y = quantization.layers['layer'].weights.fake_quantize(parameters['layer']['weights'], weights)
        return sign * jnp.sum(curvature * y**2) / 2

    strengths = measure_strengths(
        quantization, parameters, {'layer': {'weights': (6, 4)}}, loss, jax.random.key(1), TraceSettings()
    )
    lowest, highest = quantizer.limits(parameters['layer']['weights'], 2)
    span = float(highest - lowest)
    y = np.asarray(quantizer.fake_quantize(parameters['layer']['weights'], weights), np.float64)
    h, g = np.asarray(curvature, np.float64) * span**2, np.asarray(curvature, np.float64) * span * y
    expected = sign * h.mean() / (3 * g.std())
    np.testing.assert_allclose(strengths['layer']['weights'], expected, rtol=1e-4)
    mean = mean_strengths([strengths, strengths])
    np.testing.assert_allclose(mean['layer']['weights'], max(expected, 0.0), rtol=1e-4)


def test_the_mean_over_batches_is_cut_off_at_zero_once():
    of_batches = [{'a': jnp.float32(x), 'b': jnp.float32(y)} for x, y in ((2.02, -1.0), (-2.34, 0.5), (2.06, -0.1))]
    mean = mean_strengths(of_batches)
    np.testing.assert_allclose(mean['a'], (2.02 - 2.34 + 2.06) / 3, rtol=1e-6)
    assert float(mean['b']) == 0


def test_no_gradient_gives_no_delta():
    quantizer = PACT(bits=2, estimator=get_estimator('ewgs_trace'))
    quantization = Quantization({'layer': LayerQuantizers(quantizer, None, LAYER)})
    weights = jnp.ones((3, 3))
    parameters = {'layer': {'weights': quantizer.init(weights)}}
    strengths = measure_strengths(
        quantization,
        parameters,
        {'layer': {'weights': (3, 3)}},
        lambda q, p: 0.0 * jnp.sum(q.layers['layer'].weights.fake_quantize(p['layer']['weights'], weights)),
        jax.random.key(0),
        TraceSettings(),
    )
    assert float(strengths['layer']['weights']) == 0


@pytest.mark.parametrize(('name', 'value'), [('batches', 0), ('iterations', 1), ('tolerance', -1.0)])
def test_settings_that_cannot_work_are_refused(name, value):
    with pytest.raises(ValueError, match=f'quant.trace.{name}'):
        TraceSettings(**{name: value})
