"""The convolution with a kernel gradient of its own against JAX's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.networks import convolution
from bqat_jax.networks.convolution import LAYOUT, conv_general_dilated, kernel_gradient

SIMPLE = [
    pytest.param((2, 7, 5, 3), (3, 3), 'SAME', id='same'),
    pytest.param((2, 7, 5, 3), (3, 3), 'VALID', id='valid'),
    pytest.param((2, 7, 6, 3), (5, 3), ((2, 2), (1, 1)), id='oblong'),
    pytest.param((2, 7, 6, 3), (4, 2), 'SAME', id='even'),
    pytest.param((2, 7, 6, 3), (3, 3), ((0, 0), (2, 0)), id='one side'),
    pytest.param((2, 7, 6, 3), (3, 3), ((3, 4), (5, 2)), id='padded beyond the kernel'),
    pytest.param((2, 4, 5, 3), (1, 1), 'SAME', id='one by one'),
    pytest.param((1, 3, 3, 1), (3, 3), 'VALID', id='one pixel of output'),
    pytest.param((1, 1, 1, 2), (5, 5), ((4, 4), (4, 4)), id='one pixel of input'),
]


def gradients(convolve, x, kernel, **options):
    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, dimension_numbers=LAYOUT, **options)))

    return jax.jit(jax.grad(loss, (0, 1)))(x, kernel)


def check(x, kernel, tolerance=1e-4, **options):
    ours = gradients(conv_general_dilated, x, kernel, **options)
    expected = gradients(jax.lax.conv_general_dilated, x, kernel, **options)
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def draw(shape, size, features=4, dtype='float32', groups=1):
    x = jax.random.normal(jax.random.key(0), shape, dtype)
    return x, jax.random.normal(jax.random.key(1), (*size, shape[-1] // groups, features), dtype)


@pytest.mark.parametrize('strides', [(1, 1), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(('shape', 'size', 'padding'), SIMPLE)
def test_the_gradients_are_those_of_jax(shape, size, padding, strides):
    check(*draw(shape, size), window_strides=strides, padding=padding)


@pytest.mark.parametrize('images', [1, 2, 3, 7, 100])
def test_however_many_images_are_taken_at_once(images, monkeypatch):
    monkeypatch.setattr(convolution, 'COLUMN_BYTES', images * 6 * 5 * 9 * 3 * 4)
    check(*draw((7, 6, 5, 3), (3, 3)), window_strides=(1, 1), padding='SAME')


@pytest.mark.parametrize(
    'options',
    [
        {'window_strides': (1, 1), 'rhs_dilation': (2, 2)},
        {'window_strides': (1, 1), 'lhs_dilation': (1, 2)},
        {'window_strides': (1, 1), 'feature_group_count': 2},
    ],
    ids=str,
)
def test_what_is_not_simple_is_left_to_jax(options):
    groups = options.get('feature_group_count', 1)
    check(*draw((2, 7, 6, 4), (3, 3), groups=groups), padding=((1, 1), (1, 1)), **options)


def test_in_bfloat16_sums_are_in_float32():
    x, _ = draw((2, 4, 4, 3), (3, 3), dtype='bfloat16')
    check(*draw((8, 16, 16, 3), (3, 3), dtype='bfloat16'), 0.02, window_strides=(1, 1), padding='SAME')
    assert kernel_gradient(x, x, ((1, 1), (1, 1)), (3, 3)).dtype == 'float32'


def test_it_can_be_differentiated_twice_and_batched():
    x, kernel = draw((2, 5, 5, 3), (3, 3))

    def product(convolve):
        def norm(kernel):
            _, gradient = gradients(convolve, x, kernel, window_strides=(1, 1), padding='SAME')
            return jnp.sum(gradient**2)

        return jax.grad(norm)(kernel)

    np.testing.assert_allclose(
        product(conv_general_dilated), product(jax.lax.conv_general_dilated), rtol=1e-3, atol=1e-2
    )
    xs, kernels = jnp.stack([x, -x, 2 * x]), jnp.stack([kernel, kernel, -kernel])
    batched = jax.vmap(lambda x, k: gradients(conv_general_dilated, x, k, window_strides=(1, 1), padding='SAME')[1])
    expected = [
        gradients(jax.lax.conv_general_dilated, a, k, window_strides=(1, 1), padding='SAME')[1]
        for a, k in zip(xs, kernels, strict=True)
    ]
    np.testing.assert_allclose(batched(xs, kernels), jnp.stack(expected), rtol=1e-4, atol=1e-4)


def test_other_platforms_keep_xlas_gradient():
    x, kernel = draw((2, 8, 8, 3), (3, 3))

    def gradient(x, kernel):
        return gradients(conv_general_dilated, x, kernel, window_strides=(1, 1), padding='SAME')

    traced = jax.jit(gradient).trace(x, kernel)
    on_cpu, on_tpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ('cpu', 'tpu'))
    assert 'while' in on_cpu and 'while' not in on_tpu
