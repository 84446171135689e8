"""Block replacement of networks whose files know nothing of this project."""

import functools

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
from tests.foreign.cases import draw_variables

SHAPE = (8, 8, 3)
LSQ = {'name': 'lsq', 'bits': 4}
QUANTIZERS = {'weights': LSQ, 'activations': LSQ}
IMAGES = np.random.default_rng(0).normal(size=(32, *SHAPE)).astype(np.float32)
LABELS = (IMAGES[..., 0].mean((1, 2)) > 0).astype(np.int32)
BATCH = Batch(IMAGES, LABELS)
STEPS = 30
# Every plan's gradients are compared in test_paths.py.
DEFAULT = ('prefix',)


@functools.cache
def outsider():
    """The network, cut, and a partner."""
    network = split_after(outside.Network(), ['layer0', 'layer1', 'layer2'], SHAPE)
    return network, draw_variables(network)


@pytest.mark.parametrize('plan', [x if x in DEFAULT else pytest.param(x, marks=pytest.mark.slow) for x in PLANS])
def test_a_network_from_outside_is_trained(plan):
    network, partner = outsider()
    replacement, variables = replace_blocks(network, partner, [IMAGES], QUANTIZERS, plan)
    optimizer = optax.flatten(optax.sgd(0.03, 0.9))

    def step(carry, number):
        trained, collections, state = carry
        context = Context(key=jax.random.key(number))
        (_, (collections, metrics)), gradients = jax.value_and_grad(
            lambda trained: replacement.loss(Variables(*trained, collections), partner, BATCH, context), has_aux=True
        )(trained)
        updates, state = optimizer.update(gradients, state)
        params, new = optax.apply_updates(trained, updates)
        trained = (params, replacement.quantization.constrain(new, trained[1]))
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients)]).all()
        return (trained, collections, state), (metrics['loss/cross_entropy'], finite)

    @jax.jit
    def train(trained, collections):
        carry, seen = jax.lax.scan(step, (trained, collections, optimizer.init(trained)), jnp.arange(STEPS))
        return carry[:2], replacement.logits(Variables(*carry[0], carry[1]), IMAGES), seen

    _, logits, (losses, finite) = train((variables.params, variables.quantizers), variables.collections)
    assert np.all(finite)
    assert np.mean(losses[-5:]) < 0.5 * losses[0], losses
    assert logits.shape == (32, 5) and np.all(np.isfinite(logits))


def test_the_partner_gets_no_gradient_and_stays():
    network, partner = outsider()
    replacement, variables = replace_blocks(network, partner, [IMAGES], QUANTIZERS)

    def loss(partner):
        return replacement.loss(variables, partner, BATCH, Context(key=jax.random.key(0)))[0]

    assert all(not leaf.any() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(partner)))


def test_in_full_precision_every_path_is_the_network():
    none = {'name': 'none', 'bits': 8}
    network, partner = outsider()
    replacement, variables = replace_blocks(
        network, partner, [IMAGES], {'weights': none, 'activations': none}, objective=Objective(temperature=2.0)
    )
    assert variables.quantizers == {}
    logits = replacement.logits(variables, IMAGES)
    np.testing.assert_array_equal(logits, outside.Network().apply(partner, IMAGES, train=False))


def test_without_images_there_is_no_calibration():
    with pytest.raises(ValueError, match='at least one batch'):
        replace_blocks(*outsider(), [], QUANTIZERS)


def test_a_loss_without_a_term_of_the_network_is_refused():
    silent = Objective(cross_entropy=0.0, distillation=0.0)
    with pytest.raises(ValueError, match='weight'):
        replace_blocks(*outsider(), [IMAGES], QUANTIZERS, objective=silent)
