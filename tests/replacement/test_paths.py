import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bqat_jax.networks.cifar_resnet import cifar_resnet
from bqat_jax.quantization.rules import assign_quantizers
from bqat_jax.quantization.transform import (
    FULL_PRECISION,
    build_quantization,
    calibrate,
    find_layers,
    find_signed_inputs,
)
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.paths import run_backbone, run_paths, run_teacher
from bqat_jax.replacement.plans import Plan, prefix_weights

NETWORK = cifar_resnet(10, depth=14, width=4, shortcut='B', cut='block')  # six blocks
BLOCKS = len(NETWORK.blocks)
X = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
LABELS = jnp.arange(8)
SETTINGS = {'name': 'lsq', 'bits': 2, 'estimator': 'identity'}


def make_variables(seed):
    """Variables of a network that has seen data: its stored statistics fit."""
    variables = NETWORK.init(jax.random.key(seed), (8, 8, 3))
    for _ in range(30):
        _, variables['batch_stats'] = NETWORK.apply(variables, X, NETWORK.names, train=True)
    return variables


PARTNER = make_variables(1)
PLANS = {
    'prefix': Plan('prefix', prefix_weights('halving', BLOCKS)),
    'sampled': Plan('prefix_sampled', prefix_weights('halving', BLOCKS)),
    'sampled_3': Plan('prefix_sampled', prefix_weights('halving', BLOCKS), 3),
}


@functools.cache
def low_precision():
    def run(params, x):
        return NETWORK.apply({**PARTNER, 'params': params}, x, NETWORK.names, train=True)

    layers = find_layers(run, PARTNER['params'], X).quantizable
    settings = assign_quantizers(tuple(layers), SETTINGS, SETTINGS, ())
    signed = find_signed_inputs(run, PARTNER['params'], [X], layers, settings)
    quantization = build_quantization(layers, settings, signed)
    return quantization, calibrate(quantization, PARTNER['params'], run, [X])


def backbone(params, quantizer_params, x=X, train=True):
    return run_backbone(NETWORK, low_precision()[0], params, quantizer_params, PARTNER['batch_stats'], x, train=train)


def path_by_hand(features, cut):
    """The MP model with `cut` leading LP blocks, written out."""
    z = features[cut - 1]
    for names in (*NETWORK.segments[cut:], NETWORK.head):
        z, _ = NETWORK.apply(PARTNER, z, names, train=False)
    return z


def by_hand(plan, features, mask):
    if plan.num_paths == 0:
        return None
    return jnp.stack([path_by_hand(features, cut) for cut in np.asarray(mask).sum(axis=1)])


def loss_with(paths, plan, trainable, partner, mask, weights):
    lp = backbone(*trainable)
    teacher = run_teacher(NETWORK, partner, X)
    return Objective()(LABELS, lp.logits, teacher, paths(lp.features, partner, mask), weights)[0]


@pytest.mark.parametrize('name', PLANS)
def test_paths_equal_the_same_paths_run_one_by_one(name):
    """Values and gradients: together along the batch, or chosen by cond, or one after another."""
    plan = PLANS[name]
    mask, weights = plan.draw(jax.random.key(7))
    trainable = (PARTNER['params'], low_precision()[1])
    ours = jax.jit(jax.value_and_grad(functools.partial(
        loss_with, lambda f, partner, mask: run_paths(NETWORK, plan, partner, f, mask), plan)))  # fmt: skip
    plain = jax.value_and_grad(functools.partial(
        loss_with, lambda f, partner, _: by_hand(plan, f, mask), plan))  # fmt: skip
    got, expected = (run(trainable, PARTNER, mask, weights) for run in (ours, jax.jit(plain)))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)

    def close(got, want):
        np.testing.assert_allclose(got, want, atol=2e-4 * max(float(np.abs(want).max()), 1e-3))

    jax.tree.map(close, got[1], expected[1])


def test_every_prefix_draw_equals_the_plan_prefix():
    lp = backbone(PARTNER['params'], low_precision()[1])
    everything = run_paths(NETWORK, PLANS['prefix'], PARTNER, lp.features, PLANS['prefix'].draw(jax.random.key(0))[0])
    run = jax.jit(lambda mask: run_paths(NETWORK, PLANS['sampled'], PARTNER, lp.features, mask))
    for _, mask, _ in PLANS['sampled'].outcomes():
        cut = int(np.asarray(mask).sum())
        np.testing.assert_allclose(run(mask)[0], everything[cut - 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', PLANS)
def test_no_gradient_reaches_a_parameter_of_the_partner(name):
    plan = PLANS[name]
    mask, weights = plan.draw(jax.random.key(0))

    def loss(partner):
        def paths(features, partner, mask):
            return run_paths(NETWORK, plan, partner, features, mask)

        return loss_with(paths, plan, (PARTNER['params'], low_precision()[1]), partner, mask, weights)

    gradients = jax.jit(jax.grad(loss))(PARTNER)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize('name', PLANS)
def test_a_path_gives_gradients_to_its_lp_blocks_and_to_no_other(name):
    plan = PLANS[name]
    mask, weights = plan.draw(jax.random.key(3))

    def loss(params):
        features = backbone(params, low_precision()[1]).features
        return jnp.sum(run_paths(NETWORK, plan, PARTNER, features, mask) * weights.reshape(-1, 1, 1) ** 2)

    gradients = jax.jit(jax.grad(loss))(PARTNER['params'])
    longest = int(np.asarray(mask).sum(axis=1).max())
    for number, names in enumerate((*NETWORK.segments, NETWORK.head)):
        for submodule in names:
            largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[submodule]))
            assert (largest > 0) == (number < longest), submodule


@pytest.mark.parametrize('name', PLANS)
def test_with_identity_quantizers_and_equal_weights_every_path_is_the_partner(name):
    plan = PLANS[name]
    lp = run_backbone(NETWORK, FULL_PRECISION, PARTNER['params'], {}, PARTNER['batch_stats'], X, train=False)
    teacher = run_teacher(NETWORK, PARTNER, X)
    np.testing.assert_array_equal(lp.logits, teacher)
    mask, _ = plan.draw(jax.random.key(5))
    for logits in run_paths(NETWORK, plan, PARTNER, lp.features, mask):
        np.testing.assert_allclose(logits, teacher, rtol=1e-4, atol=1e-5)


def test_the_backbone_updates_its_statistics_once():
    lp = backbone(PARTNER['params'], low_precision()[1])
    old = PARTNER['batch_stats']
    assert jax.tree.structure(lp.batch_stats) == jax.tree.structure(old)
    h = X - 0  # the first batch norm, by hand: one step of the running mean
    quantization, parameters = low_precision()
    h = quantization.layers['stem/conv'].activations.fake_quantize(parameters['stem/conv']['activations'], h)
    kernel = quantization.quantize_params(parameters, PARTNER['params'])['stem']['conv']['kernel']
    y = jax.lax.conv_general_dilated(h, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    expected = 0.9 * old['stem']['norm']['mean'] + 0.1 * y.mean((0, 1, 2))
    np.testing.assert_allclose(lp.batch_stats['stem']['norm']['mean'], expected, rtol=1e-4, atol=1e-5)


def test_the_teacher_gives_no_gradient():
    gradient = jax.grad(lambda x: jnp.sum(run_teacher(NETWORK, PARTNER, x)))(X)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(X))


@pytest.mark.parametrize('name', ['sampled', 'sampled_3'])
@pytest.mark.parametrize('devices', [1, 8])
def test_one_conditional_survives_per_sampled_block(name, devices):
    """In the compiled program: one per path and block whose kind is drawn; forward and backward one each."""
    plan = PLANS[name]
    mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
    over_batch, everywhere = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    features = [jax.device_put(h, over_batch) for h in backbone(PARTNER['params'], low_precision()[1]).features]
    partner, mask = jax.device_put((PARTNER, plan.draw(jax.random.key(0))[0]), everywhere)

    def forward(features, partner, mask):
        return jnp.sum(run_paths(NETWORK, plan, partner, features, mask) ** 2)

    sampled_blocks = BLOCKS - 2  # the first of a prefix is always LP, the last always FP
    for function, passes in ((forward, 1), (jax.grad(forward), 2)):
        text = jax.jit(function).lower(features, partner, mask).compile().as_text()
        assert text.count(' conditional(') == passes * plan.num_paths * sampled_blocks


def test_each_partner_block_runs_once_for_all_prefixes():
    """Counted in the traced program: the convolutions of blocks 2 .. n, each once."""
    lp = backbone(PARTNER['params'], low_precision()[1])
    mask, _ = PLANS['prefix'].draw(jax.random.key(0))
    program = jax.make_jaxpr(lambda f: run_paths(NETWORK, PLANS['prefix'], PARTNER, f, mask))(lp.features)
    convolutions = str(program).count('conv_general_dilated[')
    expected = sum(1 for names in NETWORK.segments[1:] for n in names for key in PARTNER['params'][n] if 'conv' in key)
    assert convolutions == expected
