import functools
import itertools

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
from tests.foreign.cases import draw_variables
from tests.programs import count_operations

BLOCKS = 3
X = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(8)
SETTINGS = {'name': 'lsq', 'bits': 2}
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

# Variants of others: more models of the same kind, or the same from the other end.
SLOW = ('prefix and last', 'suffix', 'sampled_2')
every_plan = pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in PLANS]
)


@functools.cache
def network():
    network = with_inputs(cifar_resnet(10, depth=8, width=4, shortcut='B', cut='block'), (8, 8, 3))
    assert len(network.blocks) == BLOCKS
    return network


@functools.cache
def partner():
    """Variables of a network that has seen data: its stored statistics fit."""

    def see(_, variables):
        return variables | network().apply(variables, X, train=True)[1]

    return jax.jit(lambda variables: jax.lax.fori_loop(0, 30, see, variables))(draw_variables(network()))


@functools.cache
def low_precision():
    run = network().as_function(partner(), train=True)
    return prepare(run, partner()['params'], [X], weights=SETTINGS, activations=SETTINGS)


@pytest.fixture(autouse=True)
def prepared():
    """What is kept must not be made within a trace."""
    low_precision()


def trainable():
    return partner()['params'], low_precision().quantizers


def backbone(params, quantizer_params, x=X, train=True):
    variables = Variables(params, quantizer_params, other_collections(partner()))
    return run_backbone(network(), low_precision().quantization, variables, x, train=train)


def full_precision(train):
    variables = Variables(partner()['params'], {}, other_collections(partner()))
    return run_backbone(network(), FULL_PRECISION, variables, X, train=train)


def teacher():
    return run_teacher(bind_partner(network(), partner()), X)


@functools.cache
def features():
    """What leaves every block of the backbone and of the partner."""
    return jax.jit(lambda: (backbone(*trainable()).alive, list(teacher().alive)))()


def our_paths(plan, lp, partner, mask):
    bound = bind_partner(network(), partner)
    alive = run_teacher(bound, X).alive
    return jnp.stack(run_paths(bound, plan, mask, Features(lp.alive, alive, lp.run_block)))


def paths_by_hand(lp, partner, mask):
    """The MP models one after another and block by block, nothing shared; the mask is known."""
    fp, logits = network().bind(jax.lax.stop_gradient(partner), train=False), []
    for row in np.asarray(mask):
        alive = lp.alive[0] if row[0] else fp.run(X).alive[0]
        for number in range(1, BLOCKS):
            alive = lp.run_block(number, alive) if row[number] else fp.run_pieces(number, number, alive)
        logits.append(fp.run_pieces(BLOCKS, BLOCKS, alive))
    return jnp.stack(logits)


def loss_with(paths, plan, trainable, partner, mask, weights):
    """The loss, and a sum of the paths' logits alone."""
    lp = backbone(*trainable)
    logits = paths(plan, lp, partner, mask)
    teacher = run_teacher(bind_partner(network(), partner), X)
    loss, _ = Objective()(LABELS, lp, teacher, logits, weights)
    return loss, jnp.sum(logits * weights.reshape(-1, 1, 1) ** 2)


@functools.cache
def our_gradients(name):
    """One program for all draws of a plan: from (mask, weights) to the loss and three gradients of it and of the sum.

    They are the loss's for what is trained and for the partner, and the sum's for the parameters.
    """

    def run(mask, weights):
        def losses(trainable, partner):
            return loss_with(our_paths, PLANS[name], trainable, partner, mask, weights)

        (loss, _), pullback = jax.vjp(losses, trainable(), partner())
        of_trained, of_partner = pullback((jnp.float32(1), jnp.float32(0)))
        (of_params, _), _ = pullback((jnp.float32(0), jnp.float32(1)))
        return loss, of_trained, of_partner, of_params

    return jax.jit(run)


MASKS = list(itertools.product((False, True), repeat=BLOCKS))


@functools.cache
def gradients_by_hand():
    """One program for all plans: all models that there are, one after another, from which a plan's are chosen."""

    def loss(trainable, chosen, weights):
        def paths(plan, lp, partner, mask):
            return paths_by_hand(lp, partner, MASKS)[chosen]

        return loss_with(paths, None, trainable, partner(), None, weights)[0]

    return jax.jit(jax.value_and_grad(loss))


@every_plan
def test_paths_equal_the_same_paths_run_one_by_one(name):
    """Values and gradients: together along the batch, or chosen by cond, or one after another."""
    mask, weights = PLANS[name].draw(jax.random.key(7))
    loss, gradients, _, _ = our_gradients(name)(mask, weights)
    # Models of no weight make the number of them that of the plan with most.
    chosen = np.zeros(max(plan.num_paths for plan in PLANS.values()), int)
    chosen[: len(mask)] = [MASKS.index(tuple(row)) for row in np.asarray(mask).tolist()]
    padded = np.zeros(len(chosen), np.float32)
    padded[: len(mask)] = weights
    expected = gradients_by_hand()(trainable(), chosen, padded)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)

    def close(got, want):
        np.testing.assert_allclose(got, want, atol=2e-4 * max(float(np.abs(want).max()), 1e-3))

    jax.tree.map(close, gradients, expected[1])


@pytest.mark.parametrize(('drawn', 'known'), [('sampled', 'prefix'), ('single_sampled', 'single')])
def test_every_draw_equals_the_model_of_the_known_plan(drawn, known):
    """One compiled program for all draws."""

    def compiled(name):
        return jax.jit(lambda mask: our_paths(PLANS[name], backbone(*trainable()), partner(), mask))

    (_, all_masks, _), = PLANS[known].outcomes()  # fmt: skip
    everything = dict(zip(map(tuple, np.asarray(all_masks)), compiled(known)(all_masks), strict=True))
    run = compiled(drawn)
    for _, mask, _ in PLANS[drawn].outcomes():
        for row, logits in zip(map(tuple, np.asarray(mask)), run(mask), strict=True):
            np.testing.assert_allclose(logits, everything[row], rtol=1e-4, atol=1e-4)


@every_plan
def test_no_gradient_reaches_a_parameter_of_the_partner(name):
    _, _, gradients, _ = our_gradients(name)(*PLANS[name].draw(jax.random.key(0)))
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(jax.device_get(gradients)))


@every_plan
def test_a_path_gives_gradients_to_its_lp_blocks_and_to_no_other(name):
    mask, weights = PLANS[name].draw(jax.random.key(3))
    gradients = jax.device_get(our_gradients(name)(mask, weights)[3])
    lp_blocks = {*np.nonzero(np.asarray(mask).any(axis=0))[0].tolist()}
    assert lp_blocks
    for number, names in enumerate((('stem', 'stage1_block1'), ('stage2_block1',), ('stage3_block1',), ('head',))):
        for submodule in names:
            largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradients[submodule]))
            assert (largest > 0) == (number in lp_blocks), submodule


def test_without_quantizers_the_backbone_is_the_partner():
    np.testing.assert_array_equal(full_precision(train=False).logits, teacher().logits)


@every_plan
def test_with_identity_quantizers_and_equal_weights_every_path_is_the_partner(name):
    plan = PLANS[name]
    mask, _ = plan.draw(jax.random.key(5))

    @jax.jit
    def run(mask):
        lp = full_precision(train=False)
        return lp.logits, teacher().logits, our_paths(plan, lp, partner(), mask)

    own, expected, paths = run(mask)
    np.testing.assert_array_equal(own, expected)
    for logits in paths:
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_backbone_updates_its_statistics_once():
    collections = jax.jit(lambda: backbone(*trainable()).collections)()
    old = partner()['batch_stats']
    assert jax.tree.structure(collections['batch_stats']) == jax.tree.structure(old)
    h = jnp.asarray(X)  # the first batch norm, by hand: one step of the running mean
    quantization, parameters = low_precision()
    h = quantization.layers['stem/conv'].activations.fake_quantize(parameters['stem/conv']['activations'], h)
    kernel = quantization.quantize_params(parameters, partner()['params'])['stem']['conv']['kernel']
    y = jax.lax.conv_general_dilated(h, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
    expected = 0.9 * old['stem']['norm']['mean'] + 0.1 * y.mean((0, 1, 2))
    mean = collections['batch_stats']['stem']['norm']['mean']
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

    @jax.jit
    def run(drawn):
        lp = backbone(*trainable())
        return our_paths(plan, lp, partner(), drawn), paths_by_hand(lp, partner(), mask)

    np.testing.assert_allclose(*run(mask), rtol=1e-4, atol=1e-4)
    register_plan('short')(lambda num_blocks: ((True,),))
    with pytest.raises(ValueError, match='for each of 3 blocks'):
        Plan('short', BLOCKS)


def test_a_plan_that_lacks_what_it_needs_is_refused():
    bound = bind_partner(network(), partner())
    with pytest.raises(ValueError, match='run_block'):
        run_paths(bound, PLANS['single'], PLANS['single'].draw(jax.random.key(0))[0], Features(features()[0]))


def test_the_teacher_gives_no_gradient():
    bound = bind_partner(network(), partner())
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(run_teacher(bound, x).logits)))(X)
    np.testing.assert_array_equal(gradient, jnp.zeros_like(X))


# Conditionals of one path: a prefix's first block is always LP, its last always FP; of a single LP block the first and
# the last block have two possibilities, those between three; of any mask the first has two, all others four.
CONDITIONALS = {
    'sampled': BLOCKS - 2,
    'sampled_2': BLOCKS - 2,
    'single_sampled': 1 + 2 * (BLOCKS - 2) + 1,
    'bernoulli': 1 + 3 * (BLOCKS - 1),
}


@pytest.mark.parametrize(
    ('devices', 'name'),
    [
        (1, 'sampled'),
        (8, 'sampled'),
        (8, 'single_sampled'),
        (8, 'bernoulli'),
        *[
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((1, 'sampled_2'), (8, 'sampled_2'), (1, 'single_sampled'), (1, 'bernoulli'))
        ],
    ],
)
def test_what_is_drawn_stays_a_conditional(name, devices):
    """In the compiled program; forward and backward one each."""
    plan = PLANS[name]
    mesh = Mesh(np.array(jax.devices()[:devices]), ('data',))
    over_batch, everywhere = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    own_features, partner_features = jax.device_put(features(), over_batch)
    variables, mask = jax.device_put((partner(), plan.draw(jax.random.key(0))[0]), everywhere)

    def forward(features, partner_features, variables, mask):
        lp = network().bind(variables, train=True)

        def run_block(number, alive):
            return lp.run_pieces(number, number, alive)

        bound = bind_partner(network(), variables)
        outputs = run_paths(bound, plan, mask, Features(features, partner_features, run_block))
        return sum(jnp.sum(logits**2) for logits in outputs)

    for function, passes in ((forward, 1), (jax.grad(forward), 2)):
        text = jax.jit(function).lower(own_features, partner_features, variables, mask).compile().as_text()
        assert text.count(' conditional(') == passes * plan.num_paths * CONDITIONALS[name]


def test_each_partner_block_runs_once_for_all_prefixes():
    """Counted in the traced program: the convolutions of blocks 2 .. n, each once."""
    bound = bind_partner(network(), partner())
    mask, _ = PLANS['prefix'].draw(jax.random.key(0))
    program = jax.make_jaxpr(lambda f: run_paths(bound, PLANS['prefix'], mask, Features(f)))(features()[0])
    convolutions = count_operations(program.jaxpr, 'conv_general_dilated')
    names = ('stage2_block1', 'stage3_block1')
    expected = sum(1 for name in names for key in partner()['params'][name] if 'conv' in key)
    assert convolutions == expected
