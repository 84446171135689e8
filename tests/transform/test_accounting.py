"""Every weight is quantized or named, and every layer's input is observed, whatever becomes of its output."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bqat_jax as bq
from bqat_jax.transform.layers import LAYER_TYPES
from bqat_jax.transform.tagging import collect_tagged, tag

BITS = {'name': 'lsq', 'bits': 4}
X = jax.random.normal(jax.random.key(1), (4, 6))


def prepare(module, x=X, **options):
    params = module.init(jax.random.key(0), x)['params']
    return bq.prepare(
        lambda params, x: module.apply({'params': params}, x), params, [x], weights=BITS, activations=BITS, **options
    )


def module_of(function):
    """A module whose compact method is a function."""

    class Module(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(self, x)

    return Module()


def test_layers_that_no_gradient_reaches_are_calibrated():
    def run(module, x):
        y = nn.Dense(5, name='a')(x)
        nn.Dense(3, name='unused')(y)
        jnp.argmax(nn.Dense(3, name='chosen')(jax.lax.stop_gradient(y)), -1)
        return y

    quantizers = prepare(module_of(run)).quantizers
    expected = bq.LSQ(bits=4, signed=True).init(nn.Dense(5).apply(quantized_a(run, quantizers), fake_input(quantizers)))
    for name in ('unused', 'chosen'):
        np.testing.assert_allclose(quantizers[name]['activations']['step_size'], expected['step_size'], rtol=1e-5)


def quantized_a(run, quantizers):
    params = module_of(run).init(jax.random.key(0), X)['params']['a']
    kernel = bq.LSQ(bits=4, signed=True).fake_quantize(quantizers['a']['weights'], params['kernel'])
    return {'params': {**params, 'kernel': kernel}}


def fake_input(quantizers):
    return bq.LSQ(bits=4, signed=True).fake_quantize(quantizers['a']['activations'], X)


def test_a_branch_that_is_not_taken_is_told():
    def run(module, x):
        yes, no = nn.Dense(6, name='yes'), nn.Dense(6, name='no')
        if module.is_initializing():
            return yes(x) + no(x)
        return nn.cond(jnp.sum(x) > -1e9, lambda m, x: yes(x), lambda m, x: no(x), module, x)

    with pytest.raises(ValueError, match=r'layer no .* branch that is not taken'):
        prepare(module_of(run))


def test_integers_are_no_inputs_to_quantize():
    def run(module, x):
        return nn.Dense(3)(nn.Embed(30, 4, name='embed')(x))

    layers = prepare(module_of(run), jnp.arange(24).reshape(4, 6)).quantization.layers
    assert layers['embed'].weights is not None and layers['embed'].activations is None
    assert layers['Dense_0'].activations is not None


class Shifted(nn.Dense):
    def __call__(self, x):
        return super().__call__(x - 0.5)


class Standardized(nn.Dense):
    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        return value - value.mean(0, keepdims=True) if name == 'kernel' else value


class Mixing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x @ self.param('mixing', nn.initializers.lecun_normal(), (x.shape[-1], 6))


def test_a_subclass_is_quantized_where_its_operation_happens():
    step = prepare(module_of(lambda module, x: Shifted(3, name='layer')(x))).quantizers['layer']['activations']
    np.testing.assert_allclose(step['step_size'], bq.LSQ(bits=4, signed=True).init(X - 0.5)['step_size'], rtol=1e-6)


def test_what_no_quantizer_reaches_is_named_with_its_share():
    with pytest.raises(ValueError, match=r'67% .*layer/kernel: Standardized overrides `param`'):
        prepare(module_of(lambda module, x: nn.Dense(3)(Standardized(6, name='layer')(x))))
    module = module_of(lambda module, x: nn.Dense(3)(Mixing(name='layer')(x)))
    with pytest.raises(ValueError, match=r'67% .*layer/mixing: .*register_layer\(Mixing, kernel='):
        prepare(module)
    assert list(prepare(module, allow_unquantized=0.7).quantization.layers) == ['Dense_0']
    bq.register_layer(Mixing, kernel='mixing')
    try:
        quantized = prepare(module).quantization.layers['layer']
        assert quantized.weights is not None and quantized.activations is not None
    finally:
        del LAYER_TYPES[Mixing]
    with pytest.raises(TypeError, match='not a subclass of'):
        bq.register_layer(nn.Dense(3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ('cell', 'layers'),
    [(nn.LSTMCell, 8), (nn.OptimizedLSTMCell, 8), (nn.GRUCell, 6), (nn.SimpleCell, 2)],
)
def test_recurrent_cells_are_known(cell, layers):
    prepared = prepare(module_of(lambda module, x: nn.RNN(cell(5))(x)), jax.random.normal(jax.random.key(2), (2, 3, 6)))
    assert len(prepared.quantization.layers) == layers


def test_a_slash_in_a_name_is_refused():
    for module in (
        module_of(lambda module, x: nn.Dense(3, name='net/d0')(x)),
        module_of(lambda module, x: nn.WeightNorm(nn.Dense(3))(x)),
    ):
        with pytest.raises(ValueError, match='contains a slash'):
            prepare(module)


def test_tags_come_out_of_loops_branches_and_maps():
    def run(x):
        def body(carry, x):
            tag(0, (x, carry))
            return carry + x, None

        total, _ = jax.lax.scan(jax.checkpoint(body), jnp.float32(0), x)
        jax.lax.cond(x[0] > 0, lambda x: tag(1, (jnp.int32(7), x)), lambda x: tag(2, (jnp.int32(8), x)), x[0])
        jax.vmap(lambda x: tag(3, (jnp.int32(0), x)))(x)
        return total

    collected = collect_tagged(run, jnp.arange(1.0, 4.0))
    ((own, before),) = collected[0]
    np.testing.assert_array_equal(own, [1, 2, 3])
    np.testing.assert_array_equal(before, [0, 1, 3])
    assert [int(collected[number][0][0]) for number in (1, 2)] == [7, -1]
    np.testing.assert_array_equal(collected[3][0][0], [0, 0, 0])
    np.testing.assert_array_equal(collected[3][0][1], [1, 2, 3])
