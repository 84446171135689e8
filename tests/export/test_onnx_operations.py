"""Operations that ONNX export writes give in onnxruntime what they give in JAX."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

pytest.importorskip('onnx', reason='onnx is not installed')
pytest.importorskip('onnxruntime', reason='onnxruntime is not installed')

from tests.export.onnx_models import check

RANDOM = np.random.default_rng(0)
EDGES = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -0.0, 0.0, np.inf, -np.inf, 0.49999997, -3], np.float32).reshape(
    4, 3
)
X = np.concatenate([RANDOM.normal(size=(4, 3)), EDGES], 1).astype(np.float32)
Y = np.concatenate([RANDOM.normal(size=(4, 3)), RANDOM.permuted(EDGES)], 1).astype(np.float32)
Z = RANDOM.normal(size=(4, 6)).astype(np.float32)
SMALL = np.concatenate([RANDOM.uniform(-0.9, 0.9, (4, 5)), [[0], [1e-8], [-1e-8], [3e-4]]], 1).astype(np.float32)
POSITIVE = np.abs(Z) + np.float32(0.01)
NEAR = np.where(np.isfinite(X), X, np.float32(1.25))
INTEGERS = RANDOM.integers(-9, 9, (4, 6)).astype(np.int32)
DIVISORS = RANDOM.choice(np.array([-3, -2, 2, 3], np.int32), (4, 6))
BYTES = RANDOM.integers(0, 256, (4, 6)).astype(np.uint8)
IMAGE = RANDOM.normal(size=(4, 6, 6, 2)).astype(np.float32)
WHOLE = RANDOM.integers(-4, 5, (4, 6, 6, 2)).astype(np.float32)


EXACT = {
    'add': (lax.add, [X, Z]),
    'add scalar': (lambda x: x + 0.5, [X]),
    'sub': (lax.sub, [X, Z]),
    'mul': (lax.mul, [X, Z]),
    'div': (lax.div, [X, POSITIVE]),
    'max': (lax.max, [X, Y]),
    'min': (lax.min, [X, Y]),
    'neg': (lax.neg, [X]),
    'sign': (lax.sign, [X]),
    'abs': (lax.abs, [X]),
    'floor': (lax.floor, [X]),
    'ceil': (lax.ceil, [X]),
    'round to even': (jnp.round, [X]),
    'round away': (lambda x: lax.round(x, lax.RoundingMethod.AWAY_FROM_ZERO), [X]),
    'clamp': (lambda x: lax.clamp(-1.0, x, 1.5), [X]),
    'clip': (lambda x, y: jnp.clip(x, -jnp.abs(y), 1.5), [X, Z]),
    'square': (jnp.square, [X]),
    'integer_pow': (lambda x: lax.integer_pow(x, 3), [X]),
    'integer_pow 0': (lambda x: x * lax.integer_pow(x, 0), [NEAR]),
    'sqrt': (lax.sqrt, [POSITIVE]),
    'is_finite': (lax.is_finite, [X]),
    'comparisons': (lambda x, y: [f(x, y) for f in (lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge)], [X, Y]),
    'comparisons of integers': (lambda x: [x == 3, x != 3, x < 3, x >= 3], [INTEGERS]),
    'comparisons of bytes': (lambda x: [x == 3, x < 100, x >= 100], [BYTES]),
    'logic': (lambda x, y: [(x > 0) & (y > 0), (x > 0) | (y > 0), (x > 0) ^ (y > 0), ~(x > 0)], [X, Y]),
    'bits': (lambda x: [x & 3, x | 3, x ^ 3, ~x], [INTEGERS]),
    'shifts': (lambda x: [x << 2, lax.shift_right_logical(x, 2)], [INTEGERS]),
    'shifts of bytes': (lambda x: [x << 1, (x >> 3) & 1], [BYTES]),
    'integers': (lambda x, y: [x + y, x - y, x * y, lax.div(x, y), lax.rem(x, y), x // y, x % y], [INTEGERS, DIVISORS]),
    'functions of integers': (lambda x: [abs(x), -x, jnp.sign(x), jnp.clip(x, -2, 3), x**2], [INTEGERS]),
    'bytes': (lambda x: [x + 200, x * 3, x - 9, jnp.maximum(x, 9), x // 7], [BYTES]),
    'rem': (lax.rem, [NEAR, POSITIVE]),
    'select': (lambda x, y: jnp.where(x > y, x, y), [X, Y]),
    'select bool': (lambda x, y: jnp.where(x > 0, x > y, y > 1), [X, Y]),
    'select integer': (lambda x, n: lax.select_n(n % 3, x, x + 1, x + 2), [X, INTEGERS]),
    'cast': (lambda x: [x.astype(jnp.int32), (x > 0).astype(jnp.float32), x.astype(bool)], [NEAR]),
    'cast bytes': (lambda x: x.astype(jnp.float32) - 128, [BYTES]),
    'reduce_precision': (lambda x: lax.reduce_precision(x, 8, 23), [X]),
    'bfloat16 precision': (lambda x: lax.reduce_precision(x, 8, 7), [X]),
    'stop_gradient': (lambda x: lax.stop_gradient(x) + 1, [X]),
    'copy': (lambda x: jnp.array(x, copy=True), [X]),
    'barrier': (lambda x: lax.optimization_barrier((x, x + 1)), [X]),
    'jit': (lambda x: jax.jit(lambda y: y + 1)(x), [X]),
    'remat': (lambda x: jax.checkpoint(lambda y: y * 2)(x), [X]),
    'relu': (jax.nn.relu, [X]),
    'custom_vjp': (lambda x: straight_through(x), [X]),
    'broadcast': (lambda x: jnp.broadcast_to(x[:, None, :], (x.shape[0], 2, 6)), [X]),
    'broadcast scalar': (lambda x: jnp.full(x.shape, 2.0) + jnp.zeros_like(x), [X]),
    'broadcast and add': (lambda x: x[:, :, None] + x[:, None, :], [Z]),
    'broadcast constant': (lambda x: jnp.concatenate([x, jnp.ones((x.shape[0], 1))], 1), [X]),
    'reshape': (lambda x: [x.reshape(-1, 2, 3), x.reshape(-1, 2), x.reshape(-1), x[:, None, :, None]], [X]),
    'reshape broadcast': (lambda x: jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), [IMAGE]),
    'squeeze': (lambda x: jnp.squeeze(x[:, None], 1), [X]),
    'transpose': (lambda x: [x.transpose(0, 3, 1, 2), x.transpose(0, 3, 1, 2).transpose(0, 2, 3, 1)], [IMAGE]),
    'concatenate': (lambda x, y: [jnp.concatenate([x, y], 1), jnp.concatenate([x, y, x], 0)], [X, Y]),
    'stack': (lambda x, y: jnp.stack([x, y], 1), [X, Y]),
    'slices': (
        lambda x: [
            x[:, 0],
            x[:, -1],
            x[:, 1:3],
            x[:, ::2],
            x[..., ::-1],
            x[:, 1:6:2, 3],
            x[:, ::2, 1:],
            x[:, None, [4]],
        ],
        [IMAGE],
    ),
    'two strides': (lambda x: [x[:, ::2, ::2], x[:, 1, 2], x[:, 1::3, :, 1]], [IMAGE]),
    'batch slices': (lambda x: [x[1:], x[:-1]], [X]),
    'lax slice': (lambda x: lax.slice_in_dim(x, 1, 6, 2, 1), [IMAGE]),
    'dynamic_slice': (lambda x: lax.dynamic_slice_in_dim(x, 7, 3, 1), [IMAGE]),
    'computed slice': (lambda x, n: lax.dynamic_slice_in_dim(x, jnp.abs(n).max(), 3, 1), [X, INTEGERS]),
    'pad': (lambda x: lax.pad(x, 1.5, ((0, 0, 0), (1, 2, 0), (-1, 2, 1), (0, -1, 0))), [IMAGE]),
    'jnp.pad': (lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), [IMAGE]),
    'reflect': (lambda x: jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode='reflect'), [IMAGE]),
    'rev': (lambda x: jnp.flip(x, (1, 2)), [IMAGE]),
    'roll': (lambda x: jnp.roll(x, 2, 1), [IMAGE]),
    'split': (lambda x: jnp.split(x, 3, 1), [IMAGE]),
    'iota': (lambda x: x + jnp.arange(6.0)[None], [X]),
    'iota of the batch': (lambda x: jnp.arange(x.shape[0]), [X]),
    'triangle': (lambda x: jnp.tril(x), [IMAGE]),
    'reduce_max': (lambda x: [x.max(1), x.min((1, 2)), jnp.max(x, 3, keepdims=True)], [IMAGE]),
    'whole sums': (lambda x: [x.sum((1, 2)), x.sum(), x[:, :3, 0].prod(1)], [WHOLE]),
    'sums of integers': (lambda x: [x.sum(1), x.max(1), x[:, :4].prod(1)], [INTEGERS]),
    'any and all': (lambda x: [(x > 0).any(1), (x > -1).all(1)], [X]),
    'argmax': (lambda x: [jnp.argmax(x, 1), jnp.argmin(x, 2)], [IMAGE]),
    'cumsum': (lambda x: [jnp.cumsum(x, 1), lax.cumsum(x, 2, reverse=True)], [WHOLE]),
    'max_pool': (lambda x: nn.max_pool(x, (2, 2), (2, 2)), [IMAGE]),
    'max_pool same': (lambda x: nn.max_pool(x, (3, 3), (2, 2), 'SAME'), [IMAGE]),
    'max_pool 1d': (lambda x: nn.max_pool(x, (2,)), [IMAGE[..., 0]]),
    'min_pool': (lambda x: lax.reduce_window(x, jnp.inf, lax.min, (1, 2, 3, 1), (1, 2, 1, 1), 'SAME'), [IMAGE]),
    'wide window': (lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 2), (1, 1, 1, 1), 'VALID'), [IMAGE]),
    'sums of windows': (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 1, 1), 'SAME', window_dilation=(1, 1, 2, 1)),
        [WHOLE],
    ),
    'unstack': (lambda x: lax.unstack(x, 1), [IMAGE]),
    'one_hot': (lambda x: jax.nn.one_hot(x, 5), [INTEGERS]),
    'embedding': (lambda x: jnp.take(np.arange(40.0, dtype=np.float32).reshape(10, 4) / 3, x, axis=0), [INTEGERS]),
    'clipped take': (lambda x: jnp.take(np.arange(6.0, dtype=np.float32), x, mode='clip'), [INTEGERS]),
    'take of constants': (lambda x: x[:, np.array([0, 3, 3, 1])], [IMAGE]),
    'take two': (lambda x: x[:, np.array([0, 3, 1]), np.array([0, 2, 1])], [IMAGE]),
    'take_along_axis': (lambda x: jnp.take_along_axis(x, jnp.argmax(x, 1)[:, None], 1), [IMAGE]),
    'resize nearest': (lambda x: jax.image.resize(x, (x.shape[0], 12, 12, 2), 'nearest'), [IMAGE]),
    'tile': (lambda x: jnp.tile(x, (1, 2)), [X]),
    'scan': (lambda x: lax.scan(lambda c, y: (c + y, c * 2), x[:, 0], jnp.moveaxis(x, 1, 0)), [Z]),
    'reverse scan': (lambda x: lax.scan(lambda c, y: (c + y, c), x, jnp.arange(3.0), reverse=True), [Z]),
    'cond': (lambda x: lax.cond(True, lambda y: y + 1, lambda y: y - 1, x), [X]),
    'switch': (lambda x: lax.switch(2, [lambda y: y, lambda y: y + 1, lambda y: y + 2], x), [X]),
    'dead random': (lambda x: (jax.random.normal(jax.random.key(0), (3,)), x)[1] + 1, [X]),
}
CLOSE = {
    'exp': (jnp.exp, [NEAR]),
    'exp2': (jnp.exp2, [NEAR]),
    'log': (jnp.log, [POSITIVE]),
    'log1p': (jnp.log1p, [SMALL]),
    'log1p of large': (jnp.log1p, [np.array([[np.inf, 1e9, 0, -1]], np.float32)]),
    'expm1': (jnp.expm1, [SMALL]),
    'expm1 of large': (jnp.expm1, [np.array([[np.inf, -np.inf, 5, -100, 0]], np.float32)]),
    'tanh': (jnp.tanh, [X]),
    'logistic': (jax.nn.sigmoid, [X]),
    'erf': (lax.erf, [X]),
    'erfc': (lax.erfc, [NEAR]),
    'rsqrt': (lax.rsqrt, [POSITIVE]),
    'cbrt': (jnp.cbrt, [NEAR]),
    'pow': (lambda x, y: x**y, [POSITIVE, NEAR]),
    'negative pow': (lambda x: x**-3, [POSITIVE]),
    'trigonometry': (lambda x: [jnp.sin(x), jnp.cos(x), jnp.tan(x), jnp.arctan(x)], [SMALL]),
    'arcs': (lambda x: [jnp.arcsin(x), jnp.arccos(x), jnp.arctanh(x), jnp.arcsinh(x)], [SMALL]),
    'hyperbolic': (lambda x: [jnp.sinh(x), jnp.cosh(x), jnp.arccosh(x + 2)], [SMALL]),
    'mean': (lambda x: [x.mean((1, 2)), jnp.var(x, (1, 2))], [IMAGE]),
    'whole mean': (jnp.mean, [IMAGE]),
    'softmax': (nn.softmax, [Z]),
    'log_softmax': (nn.log_softmax, [Z]),
    'logsumexp': (lambda x: jax.nn.logsumexp(x, 1), [Z]),
    'activations': (lambda x: [f(x) for f in (nn.gelu, nn.silu, nn.relu6, nn.elu, nn.softplus, nn.hard_swish)], [NEAR]),
    'exact gelu': (lambda x: nn.gelu(x, approximate=False), [NEAR]),
    'avg_pool': (lambda x: [average(x, (2, 2), (2, 2)), average(x, (3, 3), (1, 1), 'SAME')], [IMAGE]),
    'norm': (lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True), [Z]),
    'resize': (lambda x: jax.image.resize(x, (x.shape[0], 9, 9, 2), 'bilinear'), [IMAGE]),
    **{
        f'einsum {formula}': (functools.partial(jnp.einsum, formula), shapes)
        for formula, shapes in {
            'bij,bjk->bik': [IMAGE[..., 0], IMAGE[..., 1]],
            'bhqd,bhkd->bhqk': [IMAGE, IMAGE],
            'bqhd,bkhd->bhqk': [IMAGE, IMAGE],
            'bhqk,bkhd->bqhd': [np.moveaxis(IMAGE, 3, 1), IMAGE.transpose(0, 1, 3, 2)],
            'bi,bi->b': [X[:, :3], Z[:, :3]],
            'bi,bj->bij': [Z, Z],
            'bhwc,bhwc->c': [IMAGE, IMAGE],
            'bhwc,bhwd->cd': [IMAGE, IMAGE],
        }.items()
    },
}


def average(*arguments):
    with jax.numpy_dtype_promotion('standard'):  # Linen divides by an integer
        return nn.avg_pool(*arguments)


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@pytest.mark.parametrize('case', EXACT)
def test_exact(case):
    function, inputs = EXACT[case]
    check(function, inputs)


@pytest.mark.parametrize('case', CLOSE)
def test_close(case):
    check(*CLOSE[case], tolerance=3e-6)
