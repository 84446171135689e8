"""One step of block replacement for every network: gradients are finite, and none reaches the partner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.block_replacement import Batch, replace_blocks
from bqat_jax.replacement.paths import Variables
from tests.networks.test_networks import SMALL, X, all_but_slow, drawn, quick_jit, small

BATCH = Batch(X, jnp.arange(len(X)) % 10)
CONTEXT = Context(key=jax.random.key(0))


@pytest.mark.parametrize('case', all_but_slow('resnet18', 'resnet50', 'mobilenet_v2', 'vgg_small', 'vit'))
@pytest.mark.parametrize('bits', [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_step_of_two_and_four_bits(case, bits):
    network, partner, settings = small(case), drawn(case), {'name': 'lsq', 'bits': bits}
    replacement, start = replace_blocks(network, partner, [X], {'weights': settings, 'activations': settings})
    signed = {path: layer.activations.signed for path, layer in replacement.quantization.layers.items()}
    assert signed[next(iter(signed))], 'normalised images have negative numbers'

    def loss(params, quantizers, partner):
        variables = Variables(params, quantizers, other_collections(partner))
        return replacement.loss(variables, partner, BATCH, CONTEXT)[0]

    run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    value, gradients = jax.device_get(run(start.params, start.quantizers, partner))
    of_network, of_quantizers, of_partner = gradients
    assert np.isfinite(value)
    for leaf in jax.tree.leaves((of_network, of_quantizers)):
        assert np.isfinite(leaf).all()
    assert all(leaf.any() for leaf in jax.tree.leaves(of_quantizers))
    assert not any(leaf.any() for leaf in jax.tree.leaves(of_partner))


@pytest.mark.slow
@pytest.mark.parametrize('case', SMALL)
def test_blocks_that_recompute_are_calibrated_and_trained_as_others(case):
    """What is measured inside `nn.remat`, and what quantizes there, is as outside."""
    partner, settings = drawn(case), {'name': 'lsq', 'bits': 4, 'estimator': 'ewgs'}
    outcomes = []
    for remat in (False, True):
        network, quantizers = small(case, remat=remat), {'weights': settings, 'activations': settings}
        replacement, start = replace_blocks(network, partner, [X], quantizers)

        def loss(quantizers, replacement=replacement, start=start):
            return replacement.loss(start._replace(quantizers=quantizers), partner, BATCH, CONTEXT)[0]

        outcomes.append((start.quantizers, *quick_jit(jax.value_and_grad(loss))(start.quantizers)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *outcomes)
