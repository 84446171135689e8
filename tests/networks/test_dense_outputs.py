"""The networks that give logits for every token or every pixel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.networks import make_network
from tests.foreign.cases import draw_variables

TOKENS = np.random.default_rng(0).integers(0, 50, (3, 8)).astype(np.int32)
IMAGES = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
CASES = {
    'decoder': ('decoder', {'depth': 4, 'width': 8, 'heads': 2}, TOKENS),
    'unet': ('unet', {'width': 4, 'levels': 2}, IMAGES),
}


def build(case, cut='stage', **options):
    name, small, x = CASES[case]
    return with_inputs(make_network(name, 50, cut, {**small, **options}), jax.ShapeDtypeStruct(x.shape[1:], x.dtype)), x


@pytest.mark.parametrize('cut', ['stage', 'block'])
@pytest.mark.parametrize('case', CASES)
def test_blocks_are_the_network(case, cut):
    network, x = build(case, cut)
    last = len(network.blocks)

    @jax.jit
    def run_pieces(variables):
        bound = network.bind(variables, train=False)
        run = bound.run(x)
        return [run.outputs, *(bound.run_pieces(number, last, run.alive[number - 1]) for number in range(1, last + 1))]

    variables = draw_variables(network)
    whole = jax.jit(lambda variables: network.apply(variables, x, train=False)[0])(variables)
    outputs = run_pieces(variables)
    for output in outputs:
        np.testing.assert_allclose(output, whole, rtol=1e-4, atol=1e-5)
    assert whole.shape == (*x.shape[:3], 50) and whole.dtype == jnp.float32


def test_no_token_sees_a_later_one():
    network, _ = build('decoder')
    variables = draw_variables(network)
    run = jax.jit(lambda tokens: network.apply(variables, tokens, train=False)[0])
    logits, changed = run(TOKENS), run(np.concatenate([TOKENS[:, :5], TOKENS[:, 5:] + 1], axis=1))
    np.testing.assert_allclose(changed[:, :5], logits[:, :5], rtol=1e-5, atol=1e-6)
    assert not np.allclose(changed[:, 5:], logits[:, 5:])


def test_skip_connections_pass_by_the_cuts():
    network, _ = build('unet', 'block')
    assert network.blocks == ('down1', 'down2', 'bottom', 'up2', 'up1')
    assert [len(crossings) for crossings in network.crossings] == [1, 2, 3, 2, 1, 1]


@pytest.mark.parametrize(
    ('case', 'options', 'message'),
    [
        ('decoder', {'heads': 3}, 'heads must divide width'),
        ('decoder', {'depth': 1}, 'at least two layers'),
        ('decoder', {'cut': 'layer1'}, "layers such as 'layers"),
        ('decoder', {'cut': 'layers[1],layers[9]'}, 'iterations 0 to 3'),
        ('unet', {'levels': 0}, 'at least 1'),
        ('unet', {'levels': 4}, 'cannot be halved 4 times'),
        ('unet', {'cut': 'down1,middle'}, 'some of these: down1'),
    ],
)
def test_what_does_not_fit_is_refused(case, options, message):
    with pytest.raises(ValueError, match=message):
        build(case, options.pop('cut', 'stage'), **options)
