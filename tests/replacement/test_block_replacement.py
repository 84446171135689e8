"""Block replacement of networks whose files know nothing of this project."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bqat_jax.blocks.splitting import split_after
from bqat_jax.quantizers.rounding import Context
from bqat_jax.replacement.block_replacement import Batch, replace_blocks
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.paths import Variables
from bqat_jax.replacement.plans import PLANS
from tests.blocks import outside

SHAPE = (8, 8, 3)
LSQ = {'name': 'lsq', 'bits': 4}
QUANTIZERS = {'weights': LSQ, 'activations': LSQ}
IMAGES = jax.random.normal(jax.random.key(0), (32, *SHAPE))
LABELS = (IMAGES[..., 0].mean((1, 2)) > 0).astype(jnp.int32)
BATCH = Batch(IMAGES, LABELS)
PARTNER = outside.Network().init(jax.random.key(1), IMAGES)
NETWORK = split_after(outside.Network(), ['layer0', 'layer1', 'layer2'], SHAPE)


@pytest.mark.parametrize('plan', list(PLANS))
def test_a_network_from_outside_is_trained(plan):
    replacement, variables = replace_blocks(NETWORK, PARTNER, [IMAGES], QUANTIZERS, plan)
    optimizer = optax.sgd(0.03, 0.9)

    @jax.jit
    def step(trained, collections, state, key):
        (_, (collections, metrics)), gradients = jax.value_and_grad(
            lambda trained: replacement.loss(Variables(*trained, collections), PARTNER, BATCH, Context(key=key)),
            has_aux=True,
        )(trained)
        updates, state = optimizer.update(gradients, state)
        params, new = optax.apply_updates(trained, updates)
        trained = (params, replacement.quantization.constrain(new, trained[1]))
        return trained, collections, state, metrics['loss/cross_entropy'], gradients

    trained, collections = (variables.params, variables.quantizers), variables.collections
    state, losses = optimizer.init(trained), []
    for number in range(30):
        trained, collections, state, loss, gradients = step(trained, collections, state, jax.random.key(number))
        losses.append(float(loss))
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses
    assert replacement.logits(Variables(*trained, collections), IMAGES).shape == (32, 5)


def test_the_partner_gets_no_gradient_and_stays():
    replacement, variables = replace_blocks(NETWORK, PARTNER, [IMAGES], QUANTIZERS)

    def loss(partner):
        return replacement.loss(variables, partner, BATCH, Context(key=jax.random.key(0)))[0]

    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(PARTNER)))


def test_in_full_precision_every_path_is_the_network():
    none = {'name': 'none', 'bits': 8}
    replacement, variables = replace_blocks(
        NETWORK, PARTNER, [IMAGES], {'weights': none, 'activations': none}, objective=Objective(temperature=2.0)
    )
    assert variables.quantizers == {}
    logits = replacement.logits(variables, IMAGES)
    np.testing.assert_array_equal(logits, outside.Network().apply(PARTNER, IMAGES, train=False))


def test_without_images_there_is_no_calibration():
    with pytest.raises(ValueError, match='at least one batch'):
        replace_blocks(NETWORK, PARTNER, [], QUANTIZERS)


def test_a_loss_without_a_term_of_the_network_is_refused():
    silent = Objective(cross_entropy=0.0, distillation=0.0)
    with pytest.raises(ValueError, match='weight'):
        replace_blocks(NETWORK, PARTNER, [IMAGES], QUANTIZERS, objective=silent)
