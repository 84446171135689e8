"""One step of block replacement for every network: gradients are finite, and none reaches the partner."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.replacement.block_replacement import replace_blocks
from tests.networks.test_networks import X, all_but_slow, drawn, quick_jit, small

LABELS = jnp.arange(len(X)) % 10


@pytest.mark.parametrize('case', all_but_slow('resnet18', 'resnet50', 'mobilenet_v2', 'vit'))
def test_a_step_of_two_and_four_bits(case):
    network, partner = small(case), drawn(case)
    for bits in (2, 4):
        settings = {'name': 'lsq', 'bits': bits, 'estimator': 'identity'}
        replacement, quantizers = replace_blocks(network, partner, [X], weights=settings, activations=settings)
        signed = {path: layer.activations.signed for path, layer in replacement.quantization.layers.items()}
        assert signed[next(iter(signed))], 'normalised images have negative numbers'

        def loss(params, quantizers, partner, replacement=replacement):
            return replacement.loss(params, quantizers, partner['batch_stats'], partner, X, LABELS, jax.random.key(0))[
                0
            ]

        run = quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
        value, (of_network, of_quantizers, of_partner) = run(partner['params'], quantizers, partner)
        assert jnp.isfinite(value)
        for leaf in jax.tree.leaves((of_network, of_quantizers)):
            assert jnp.isfinite(leaf).all()
        assert all(leaf.any() for leaf in jax.tree.leaves(of_quantizers))
        assert not any(leaf.any() for leaf in jax.tree.leaves(of_partner))


@pytest.mark.parametrize('case', all_but_slow('resnet18', 'resnet50', 'mobilenet_v2', 'vit'))
def test_blocks_that_recompute_are_calibrated_and_trained_as_others(case):
    """What is measured inside `nn.remat`, and what quantizes there, is as outside."""
    partner, settings = drawn(case), {'name': 'lsq', 'bits': 4, 'estimator': 'ewgs'}
    found = []
    for remat in (False, True):
        replacement, quantizers = replace_blocks(
            small(case, remat=remat), partner, [X], weights=settings, activations=settings
        )

        def loss(quantizers, replacement=replacement):
            return replacement.loss(
                partner['params'], quantizers, partner['batch_stats'], partner, X, LABELS, jax.random.key(0)
            )[0]

        found.append((quantizers, *quick_jit(jax.value_and_grad(loss))(quantizers)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *found)
