import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.networks.cifar_resnet import cifar_resnet
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.paths import Features, Variables, bind_partner, run_backbone, run_paths, run_teacher
from bqat_jax.replacement.plans import PLANS as REGISTERED
from bqat_jax.replacement.plans import Plan, register_plan
from bqat_jax.replacement.schedules import Constant
from bqat_jax.transform import FULL_PRECISION, prepare
from tests.programs import count_operations

NETWORK = with_inputs(cifar_resnet(10, depth=8, width=4, shortcut='B', cut='block'), (8, 8, 3))  # three blocks
BLOCKS = len(NETWORK.blocks)
X = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))
LABELS = jnp.arange(8)
SETTINGS = {'name': 'lsq', 'bits': 2}


def make_variables(seed):
    """Variables of a network that has seen data: its stored statistics fit."""
    step = jax.jit(lambda variables: NETWORK.apply(variables, X, train=True)[1])
    variables = NETWORK.init(jax.random.key(seed), (8, 8, 3))
    for _ in range(30):
        variables |= step(variables)
    return variables


PARTNER = make_variables(1)
BOUND = bind_partner(NETWORK, PARTNER)
PLANS = {
    'prefix': Plan('prefix', BLOCKS),
    'prefix and last': Plan('prefix', BLOCKS, include_last=True),
    'single': Plan('single', BLOCKS),
    'suffix': Plan('suffix', BLOCKS),
    'sampled': Plan('prefix_sampled', BLOCKS),
    'sampled_2': Plan('prefix_sampled', BLOCKS, num_sampled=2),
    'single_sampled': Plan('single_sampled', BLOCKS, num_sampled=2),
    'bernoulli': Plan('bernoulli', BLOCKS, num_sampled=2, probability=Constant(value=0.5)),
}
# What is registered besides, by somebody who need not know of this test.
PLANS |= {name: Plan(name, BLOCKS) for name in set(REGISTERED) - {'none'} - {plan.name for plan in PLANS.values()}}


@functools.cache
def low_precision():
    run = NETWORK.as_function(PARTNER, train=True)
    return prepare(run, PARTNER['params'], [X], weights=SETTINGS, activations=SETTINGS)


def backbone(params, quantizer_params, x=X, train=True):
    variables = Variables(params, quantizer_params, other_collections(PARTNER))
    return run_backbone(NETWORK, low_precision().quantization, variables, x, train=train)


def full_precision(train):
    variables = Variables(PARTNER['params'], {}, other_collections(PARTNER))
    return run_backbone(NETWORK, FULL_PRECISION, variables, X, train=train)


def our_paths(plan, lp, partner, mask):
    bound = bind_partner(NETWORK, partner)
    alive = run_teacher(bound, X).alive
    return jnp.stack(run_paths(bound, plan, mask, Features(lp.alive, alive, lp.run_block)))


def paths_by_hand(plan, lp, partner, mask):
    """The MP models one after another and block by block, nothing shared; the mask is known."""
    fp, logits = NETWORK.bind(jax.lax.stop_gradient(partner), train=False), []
    for row in np.asarray(mask):
        alive = lp.alive[0] if row[0] else fp.run(X).alive[0]
        for number in range(1, BLOCKS):
            alive = lp.run_block(number, alive) if row[number] else fp.run_pieces(number, number, alive)
        logits.append(fp.run_pieces(BLOCKS, BLOCKS, alive))
    return jnp.stack(logits)


def loss_with(paths, plan, trainable, partner, mask, weights):
    lp = backbone(*trainable)
    teacher = run_teacher(bind_partner(NETWORK, partner), X)
    return Objective()(LABELS, lp, teacher, paths(plan, lp, partner, mask), weights)[0]


@pytest.mark.parametrize('name', PLANS)
def test_paths_equal_the_same_paths_run_one_by_one(name):
    """Values and gradients: together along the batch, or chosen by cond, or one after another."""
    plan = PLANS[name]
    mask, weights = plan.draw(jax.random.key(7))
    trainable = (PARTNER['params'], low_precision()[1])

    def by_hand(plan, lp, partner, _):
        return paths_by_hand(plan, lp, partner, mask)

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(loss_with, paths, plan)))(trainable, PARTNER, mask, weights)
        for paths in (our_paths, by_hand)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)

    def close(got, want):
        np.testing.assert_allclose(got, want, atol=2e-4 * max(float(np.abs(want).max()), 1e-3))

    jax.tree.map(close, got[1], expected[1])


@pytest.mark.parametrize(('drawn', 'known'), [('sampled', 'prefix'), ('single_sampled', 'single')])
def test_every_draw_equals_the_model_of_the_known_plan(drawn, known):
    """One compiled program for all draws."""
    lp = backbone(PARTNER['params'], low_precision()[1])
    (_, all_masks, _), = PLANS[known].outcomes()  # fmt: skip
    everything = dict(
        zip(map(tuple, np.asarray(all_masks)), our_paths(PLANS[known], lp, PARTNER, all_masks), strict=True)
    )
    run = jax.jit(lambda mask: our_paths(PLANS[drawn], lp, PARTNER, mask))
    for _, mask, _ in PLANS[drawn].outcomes():
        for row, logits in zip(map(tuple, np.asarray(mask)), run(mask), strict=True):
            np.testing.assert_allclose(logits, everything[row], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', PLANS)
def test_no_gradient_reaches_a_parameter_of_the_partner(name):
    plan = PLANS[name]
    mask, weights = plan.draw(jax.random.key(0))
    quantizers = low_precision()[1]

    def loss(partner):
        return loss_with(our_paths, plan, (PARTNER['params'], quantizers), partner, mask, weights)

    gradients = jax.jit(jax.grad(loss))(PARTNER)
    assert all(float(jnp.abs(leaf).max()) == 0 for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize('name', PLANS)
def test_a_path_gives_gradients_to_its_lp_blocks_and_to_no_other(name):
    plan = PLANS[name]
    mask, weights = plan.draw(jax.random.key(3))
    quantizers = low_precision()[1]

    def loss(params):
        lp = backbone(params, quantizers)
        return jnp.sum(our_paths(plan, lp, PARTNER, mask) * weights.reshape(-1, 1, 1) ** 2)

    gradients = jax.jit(jax.grad(loss))(PARTNER['params'])
    lp_blocks = {*np.nonzero(np.asarray(mask).any(axis=0))[0].tolist()}
    assert lp_blocks
    for number, names in enumerate((('stem', 'stage1_block1'), ('stage2_block1',), ('stage3_block1',), ('head',))):
        for submodule in names:
            largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[submodule]))
            assert (largest > 0) == (number in lp_blocks), submodule


@pytest.mark.parametrize('name', PLANS)
def test_with_identity_quantizers_and_equal_weights_every_path_is_the_partner(name):
    plan = PLANS[name]
    lp = full_precision(train=False)
    teacher = run_teacher(BOUND, X).logits
    np.testing.assert_array_equal(lp.logits, teacher)
    mask, _ = plan.draw(jax.random.key(5))
    for logits in our_paths(plan, lp, PARTNER, mask):
        np.testing.assert_allclose(logits, teacher, rtol=1e-4, atol=1e-5)


def test_the_backbone_updates_its_statistics_once():
    lp = backbone(PARTNER['params'], low_precision()[1])
    old = PARTNER['batch_stats']
    assert jax.tree.structure(lp.collections['batch_stats']) == jax.tree.structure(old)
    h = X - 0  # the first batch norm, by hand: one step of the running mean
    quantization, parameters = low_precision()
    h = quantization.layers['stem/conv'].activations.fake_quantize(parameters['stem/conv']['activations'], h)
    kernel = quantization.quantize_params(parameters, PARTNER['params'])['stem']['conv']['kernel']
    y = jax.lax.conv_general_dilated(h, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    expected = 0.9 * old['stem']['norm']['mean'] + 0.1 * y.mean((0, 1, 2))
    mean = lp.collections['batch_stats']['stem']['norm']['mean']
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)


def test_lp_blocks_on_other_features_leave_the_statistics_alone():
    """They normalise by their own batch: the same features twice as large give the same outputs, as batch norm does."""
    lp = full_precision(train=True)
    (again,) = lp.run_block(1, lp.alive[0])
    np.testing.assert_array_equal(again, lp.features[1])
    (doubled,) = lp.run_block(1, (2 * lp.features[0],))
    np.testing.assert_allclose(doubled, again, rtol=1e-2, atol=1e-2)
    assert not np.array_equal(doubled, again)


@pytest.mark.parametrize('is_drawn', [False, True])
def test_models_of_a_users_plan_may_go_back_and_forth(is_drawn, registries):
    """LP, FP and LP again: a path leaves those that run together, and may come back to them."""
    zigzag = ((True, False, True), (False, True, False), (True, False, False))
    register_plan('zigzag', is_drawn=is_drawn)(lambda num_blocks: zigzag)
    plan = Plan('zigzag', BLOCKS, num_sampled=3)
    mask, _ = plan.draw(jax.random.key(0))
    assert sorted(map(tuple, np.asarray(mask).tolist())) == sorted(zigzag)
    lp = backbone(PARTNER['params'], low_precision().quantizers)
    expected = paths_by_hand(plan, lp, PARTNER, mask)
    np.testing.assert_allclose(our_paths(plan, lp, PARTNER, mask), expected, rtol=1e-4, atol=1e-4)
    register_plan('short')(lambda num_blocks: ((True,),))
    with pytest.raises(ValueError, match='of each of 3 blocks'):
        Plan('short', BLOCKS)


def test_a_plan_that_lacks_what_it_needs_is_refused():
    lp = backbone(PARTNER['params'], low_precision()[1])
    with pytest.raises(ValueError, match='run_block'):
        run_paths(BOUND, PLANS['single'], PLANS['single'].draw(jax.random.key(0))[0], Features(lp.alive))


def test_the_teacher_gives_no_gradient():
    gradient = jax.grad(lambda x: jnp.sum(run_teacher(BOUND, x).logits))(X)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(X))


# Conditionals of one path: a prefix's first block is always LP, its last always FP; of a single LP block the first and
# the last block have two possibilities, those between three; of any mask the first has two, all others four.
CONDITIONALS = {
    'sampled': BLOCKS - 2,
    'sampled_2': BLOCKS - 2,
    'single_sampled': 1 + 2 * (BLOCKS - 2) + 1,
    'bernoulli': 1 + 3 * (BLOCKS - 1),
}


@pytest.mark.parametrize('name', CONDITIONALS)
@pytest.mark.parametrize('devices', [1, 8])
def test_what_is_drawn_stays_a_conditional(name, devices):
    """In the compiled program; forward and backward one each."""
    plan = PLANS[name]
    mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
    over_batch, everywhere = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    lp = backbone(PARTNER['params'], low_precision()[1])
    features = jax.device_put(lp.alive, over_batch)
    partner_features = jax.device_put(list(run_teacher(BOUND, X).alive), over_batch)
    partner, mask = jax.device_put((PARTNER, plan.draw(jax.random.key(0))[0]), everywhere)

    def forward(features, partner_features, partner, mask):
        lp = NETWORK.bind(partner, train=True)

        def run_block(number, alive):
            return lp.run_pieces(number, number, alive)

        outputs = run_paths(bind_partner(NETWORK, partner), plan, mask, Features(features, partner_features, run_block))
        return sum(jnp.sum(logits**2) for logits in outputs)

    for function, passes in ((forward, 1), (jax.grad(forward), 2)):
        text = jax.jit(function).lower(features, partner_features, partner, mask).compile().as_text()
        assert text.count(' conditional(') == passes * plan.num_paths * CONDITIONALS[name]


def test_each_partner_block_runs_once_for_all_prefixes():
    """Counted in the traced program: the convolutions of blocks 2 .. n, each once."""
    lp = backbone(PARTNER['params'], low_precision()[1])
    mask, _ = PLANS['prefix'].draw(jax.random.key(0))
    program = jax.make_jaxpr(lambda f: run_paths(BOUND, PLANS['prefix'], mask, Features(f)))(lp.alive)
    convolutions = count_operations(program.jaxpr, 'conv_general_dilated')
    names = ('stage2_block1', 'stage3_block1')
    expected = sum(1 for name in names for key in PARTNER['params'][name] if 'conv' in key)
    assert convolutions == expected
