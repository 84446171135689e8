import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.training.microbatches import accumulate
from tests.training.test_step import FULL_PRECISION_SPEC, make_spec, run_steps

IMAGES = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
LABELS = np.random.default_rng(1).normal(size=24).astype(np.float32)


def loss(params, batch_stats, batch, key):
    del key
    images, labels = batch
    errors = (jnp.tanh(images @ params['w']) - labels) ** 2
    value = jnp.mean(errors)
    return value, ({'calls': batch_stats['calls'] + 1}, {'worst': jnp.mean(jnp.abs(errors)), 'seen': labels.shape[0]})


@pytest.mark.parametrize('count', [1, 2, 3, 24])
def test_parts_give_what_the_whole_gives(count):
    params, stats = {'w': jnp.linspace(-1.0, 1.0, 5)}, {'calls': jnp.int32(0)}
    gradient = jax.value_and_grad(loss, has_aux=True)
    arguments = (params, stats, (IMAGES, LABELS), jax.random.key(0))
    (value, (_, metrics)), gradients = gradient(*arguments)
    (mean, (new_stats, mean_metrics)), mean_gradients = jax.jit(accumulate(gradient, count))(*arguments)
    np.testing.assert_allclose(mean, value, rtol=1e-6)
    np.testing.assert_allclose(mean_metrics['worst'], metrics['worst'], rtol=1e-6)
    np.testing.assert_allclose(mean_gradients['w'], gradients['w'], rtol=1e-5, atol=1e-7)
    assert new_stats['calls'] == count
    assert mean_metrics['seen'] == 24 // count


def test_parts_draw_apart():
    def draw(params, batch_stats, batch, key):
        return jnp.sum(params['w']), (batch_stats, {'drawn': jax.random.uniform(key)})

    gradient = accumulate(jax.value_and_grad(draw, has_aux=True), 2)
    key = jax.random.key(0)
    (_, (_, metrics)), _ = gradient({'w': jnp.ones(1)}, {}, (IMAGES, LABELS), key)
    drawn = [jax.random.uniform(jax.random.fold_in(key, number)) for number in range(2)]
    np.testing.assert_allclose(metrics['drawn'], np.mean(drawn), rtol=1e-6)


def test_a_step_in_parts_on_eight_devices_is_that_on_one():
    """In full precision; batch norm normalises by the part, so parts are compared with the same parts."""
    spec = dataclasses.replace(FULL_PRECISION_SPEC, microbatches=4)
    one, eight = (run_steps(spec, {}, devices, 3)[1] for devices in (1, 8))
    for left, right in zip(one, eight, strict=True):
        for name in ('loss', 'l2_gradients', 'train_top1'):
            np.testing.assert_allclose(left[name], right[name], rtol=1e-4, err_msg=name)


def test_sampled_plans_run_in_parts():
    spec, quantizers = make_spec('prefix_sampled')
    spec = dataclasses.replace(spec, microbatches=2)
    _, (metrics,), _ = run_steps(spec, quantizers, 1, 1)
    assert metrics['path1_lp_blocks'] in (1, 2) and np.isfinite(metrics['loss'])
