"""A network from outside is cut behind its submodules, or into functions, without a change to it."""

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.blocks.block_network import BlockNetwork, stream_keys
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.blocks.splitting import split_after, split_into
from tests.blocks import modules, outside
from tests.foreign.cases import draw_variables
from tests.programs import without_dead_code

SHAPE = (8, 8, 3)
X = np.random.default_rng(1).normal(size=(4, *SHAPE)).astype(np.float32)
KEY = jax.random.key(2)


class Case(NamedTuple):
    """A module, where it is cut, and the arguments that train it."""

    module: nn.Module
    ends: tuple[str, ...]
    training: dict[str, bool]


TRAIN, DETERMINISTIC = {'train': True}, {'deterministic': False}
CASES = {
    'compact': Case(outside.Network(), ('layer0', 'layer1', 'layer2'), TRAIN),
    'setup': Case(modules.SetUp(), ('dropout', 'dropout', 'dropout'), DETERMINISTIC),
    # The shortcut around a layer is added behind it.
    'in a shortcut': Case(modules.SetUp(), ('layers_0', 'layers_1'), DETERMINISTIC),
    'nested': Case(modules.Nested(), ('encoder/first', 'encoder/shared', 'encoder/middle', 'encoder/shared'), {}),
    'bypassed': Case(modules.Bypassed(), ('a', 'b'), {}),
    'remat': Case(modules.Rematerialised(), ('layer0', 'layer1'), TRAIN),
    'in remat': Case(modules.Rematerialised(), ('layer0/enter', 'layer1/norm', 'layer1/leave'), TRAIN),
    'scan': Case(modules.Scanned(), ('layers[0]', 'layers[2]'), TRAIN),
    'behind scan': Case(modules.Scanned(), ('layers', 'behind'), TRAIN),
    'in and behind scan': Case(modules.Scanned(), ('embed', 'layers[1]', 'layers[3]', 'behind'), TRAIN),
    'vmap': Case(modules.Mapped(), ('single/first', 'single/second'), TRAIN),
    'field': Case(modules.Trained(), ('layer0', 'layer1'), {}),
    'two switches': Case(modules.TwoSwitches(), ('layer0', 'layer1'), {'train': True, 'deterministic': False}),
    'stream': Case(modules.DropPath(), ('layer0', 'layer1'), TRAIN),
    'collections': Case(modules.Collections(), ('first', 'second'), TRAIN),
    'partitioned': Case(modules.Partitioned(), ('layer0', 'layer1'), {}),
}


def assert_equal(got, expected):
    """Trees are the same, bit for bit."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_close(got, expected):
    """Trees are the same but for rounding."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


# Run eagerly too: where the compiler rounds otherwise in a scan of another length, and one of the others.
EAGERLY = ('bypassed', *(name for name in CASES if 'scan' in name))


@functools.cache
def split(name):
    """The network of a case, cut, and variables of it."""
    network = split_after(*CASES[name][:2], SHAPE)
    return network, draw_variables(network)


@pytest.mark.parametrize('name', list(CASES))
def test_the_pieces_compose_to_the_whole(name):
    """In evaluation and in training."""
    module, ends, training = CASES[name]
    network, variables = split(name)

    def run_whole(variables, x, key):
        runs = []
        for train in (False, True):
            switched = module.clone(train=train) if isinstance(module, modules.Trained) else module
            arguments = {name: value == train for name, value in training.items()}
            rngs, mutable = stream_keys(key, network.streams), list(network.mutable) if train else []
            runs.append(switched.apply(variables, x, **arguments, mutable=mutable, rngs=rngs))
        return runs

    def run_cut(variables, x, key):
        runs = []
        for train in (False, True):
            bound = network.bind(variables, train=train, key=key)
            whole, crossings = bound.run(x), []
            alive = whole.alive[0]
            for number in range(1, len(ends)):
                alive = bound.run_pieces(number, number, alive)
                crossings.append(alive)
            runs.append((whole, crossings, bound.run_pieces(len(ends), len(ends), alive)))
        return runs

    for compiled in (lambda function: function, jax.jit) if name in EAGERLY else (jax.jit,):
        is_same = assert_close if compiled is jax.jit and 'scan' in name else assert_equal
        runs = zip(compiled(run_whole)(variables, X, KEY), compiled(run_cut)(variables, X, KEY), strict=True)
        for (expected, updated), (whole, crossings, outputs) in runs:
            is_same(whole.outputs, expected)
            is_same(whole.state, {**{name: variables[name] for name in network.mutable}, **updated})
            is_same((crossings, outputs), (list(whole.alive[1:]), expected))


@pytest.mark.parametrize('name', ['remat', 'in remat', 'scan'])
def test_gradients_are_those_of_the_whole(name):
    module, ends, _ = CASES[name]
    network, _ = split(name)
    variables = jax.jit(network.init)(jax.random.key(0))  # no gradient is nothing but rounding

    def whole(variables, x):
        rngs = {'dropout': KEY}
        return (module.apply(variables, x, train=True, mutable=['batch_stats'], rngs=rngs)[0] ** 2).sum()

    def pieces(variables, x):
        bound = network.bind(variables, train=True, key=KEY)
        alive = bound.run(x).alive[0]
        for number in range(1, len(ends) + 1):
            alive = bound.run_pieces(number, number, alive)
        return (alive**2).sum()

    got, expected = (jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, X) for loss in (pieces, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max()), got, expected)


def test_a_network_without_a_key_or_in_evaluation_draws_nothing():
    network, variables = split('stream')
    trained, again = (network.apply(variables, X, train=True, key=jax.random.key(seed))[0] for seed in (3, 4))
    assert (trained != again).any()
    with_key = network.apply(variables, X, train=False, key=KEY)[0]
    np.testing.assert_array_equal(with_key, network.apply(variables, X, train=False)[0])


def test_features_are_what_the_ends_give():
    network, variables = split('compact')
    _, seen = network.module.apply(variables, X, train=False, capture_intermediates=True, mutable=['intermediates'])
    features = network.bind(variables, train=False).run(X).features
    expected = [seen['intermediates'][end]['__call__'][0] for end in network.blocks]
    assert_equal(features, expected)


def test_what_passes_by_a_cut_is_carried():
    network, _ = split('bypassed')
    image, mask = ((1, 8, 8, 3), jnp.float32), ((1, 8, 8, 1), jnp.bool_)
    carried = [[(x.shape, x.dtype) for x in cut] for cut in network.crossings]
    assert carried == [[image, mask, image], [image, mask, image, image], [((1, 3), jnp.float32)]]
    assert [[x.is_shared for x in cut] for cut in network.crossings[:2]] == [
        [True, True, False],
        [True, True, False, False],
    ]
    assert all(x.axis == 0 and x.can_merge for cut in network.crossings for x in cut)


def test_of_a_scan_the_results_so_far_are_carried():
    network, _ = split('scan')
    carried = [sorted((x.shape, x.axis) for x in cut) for cut in network.crossings]
    # What an iteration gives on, and a sum of each that is done, (iterations, examples).
    assert carried == [[((1, 1), 1), ((1, 6), 0)], [((1, 1), 1), ((1, 6), 0), ((2, 1), 1)], [((1, 3), 0)]]
    assert [sorted(x.can_merge for x in cut) for cut in network.crossings] == [[True] * 2, [True] * 3, [True]]


def test_a_piece_computes_nothing_of_the_others():
    network, variables = split('compact')
    bound = network.bind(variables, train=False)

    def count(run, x):
        text = jax.jit(run).lower(x).compile().as_text()
        return text.count(' convolution(') + text.count(' dot(')  # of a 1×1 convolution XLA makes a product

    alive = bound.run(X).alive
    pieces = [count(lambda x, n=n: bound.run_pieces(n, n, x), alive[n - 1]) for n in (1, 2, 3)]
    first = count(lambda x: bound.run(x).alive[0], X)
    assert [first, *pieces, count(lambda x: bound.run(x).outputs, X)] == [4, 3, 3, 1, 11]
    assert count(lambda x: bound.run_pieces(1, 2, x), alive[0]) == 6


def test_a_piece_of_a_scan_runs_its_own_iterations():
    network, variables = split('scan')
    bound = network.bind(variables, train=True, key=KEY)

    def lengths(run, x):
        program = without_dead_code(jax.make_jaxpr(run)(x).jaxpr)
        return [x.params['length'] for x in program.eqns if x.primitive.name == 'scan']

    alive = bound.run(X).alive
    pieces = [lengths(lambda x, n=n: bound.run_pieces(n, n, x), alive[n - 1]) for n in (1, 2)]
    assert [lengths(lambda x: bound.run(x).alive[0], X), *pieces] == [[1], [2], [1]]


def test_a_cut_into_functions():
    network = with_inputs(
        split_into(
            modules.SetUp(),
            lambda module, x, train: module.embed(x).reshape(x.shape[0], -1, 6),
            [
                lambda module, x, train, i=i: module.dropout(x + nn.gelu(module.layers[i](x)), deterministic=not train)
                for i in range(3)
            ],
            lambda module, x, train: module.out(x.mean(1)),
        ),
        SHAPE,
    )
    variables = network.init(jax.random.key(0))
    bound = network.bind(variables, train=False)
    expected = modules.SetUp().apply(variables, X, deterministic=True)
    np.testing.assert_array_equal(bound.run(X).outputs, expected)
    np.testing.assert_array_equal(bound.run_pieces(1, 3, bound.run(X).alive[0]), expected)
    x = modules.SetUp().apply(variables, X, method=lambda module, x: module.embed(x).reshape(x.shape[0], -1, 6))
    dense = nn.Dense(6).apply({'params': variables['params']['layers_0']}, x)
    np.testing.assert_array_equal(bound.run(X).features[0], x + nn.gelu(dense))  # the stem is part of the first block


def test_inputs_and_outputs_may_be_trees():
    shapes = {'tokens': jax.ShapeDtypeStruct((5,), jnp.int32), 'mask': jax.ShapeDtypeStruct((5,), jnp.bool_)}
    network = split_after(modules.Tagger(), ['attention0', 'attention1'], shapes)
    variables = network.init(jax.random.key(0))
    for size in (1, 4):
        tokens = jax.random.randint(jax.random.key(1), (size, 5), 0, 7)
        inputs = {'tokens': tokens, 'mask': tokens > 0}
        for train in (False, True):
            bound = network.bind(variables, train=train, key=KEY)
            run = bound.run(inputs)
            expected = modules.Tagger().apply(variables, **inputs, train=train, rngs={'dropout': KEY})
            assert_equal(run.outputs, expected)
            assert_equal(bound.run_pieces(1, 2, run.alive[0]), expected)
    # A tuple of inputs is given as arguments.
    other = split_after(modules.Tagger(), network.blocks, (shapes['tokens'], shapes['mask']))
    assert_equal(
        other.bind(variables, train=False).run((tokens, tokens > 0)).outputs,
        network.apply(variables, inputs, train=False)[0],
    )
    with pytest.raises(
        ValueError, match=r"like \{'mask': bool\[5\], 'tokens': int32\[5\]\}, and these are like .*float32"
    ):
        bound.run({**inputs, 'tokens': tokens.astype(jnp.float32)})


def test_boxes_of_parameters_are_kept_apart():
    network, _ = split('partitioned')
    boxed = network.init_boxed(jax.random.key(0))
    assert isinstance(boxed['params']['layer0']['kernel'], nn.Partitioned)
    variables = network.init(jax.random.key(0))
    assert_equal(variables['params'], nn.meta.unbox(boxed['params']))
    np.testing.assert_array_equal(network.apply(boxed, X, train=False)[0], network.apply(variables, X, train=False)[0])


REFUSED = {
    'not there': (outside.Network(), ['layer', 'layer2'], r"'layer' is never reached: .* after the input"),
    'order': (
        outside.Network(),
        ['layer0', 'layer2', 'layer1'],
        r"'layer1' is never reached: .* after 'layer2'.*layer0",
    ),
    'too often': (modules.SetUp(), ['dropout'] * 4, r"'dropout' is never reached: .* after 'dropout'"),
    'one block': (outside.Network(), ['layer0'], 'at least two'),
    'no switch': (modules.Unswitched(), ['first', 'second'], r'norm \(BatchNorm\).*Give call='),
    'sow': (modules.Sowing(), ['layer0', 'layer1'], "collection 'losses'.*'intermediates'"),
    'axis': (modules.OverAxis(), ['layer0', 'layer1'], 'mapped axis .*batch.*leave axis_name out'),
    'iteration': (modules.Scanned(), ['embed', 'layers/layer/enter'], "'layers/layer/enter' is within an iteration"),
    'iterations': (modules.Scanned(), ['embed', 'layers[4]'], r'layers\[4\]: this nn.scan has the iterations 0 to 3'),
    'no iterations': (modules.SetUp(), ['embed', 'layers_0[0]'], r"'layers_0\[0\]' is never reached"),
    'cond': (modules.Conditional(), ['first', 'one'], "'one' is within 'cond'"),
    'training': (modules.TwoViews(), ['first', 'second'], "after 'first' .*in evaluation, and in training"),
}


@pytest.mark.parametrize('name', list(REFUSED))
def test_what_cannot_be_cut_is_refused(name):
    module, ends, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        split_after(module, ends, SHAPE)


def test_one_function_is_no_cut():
    with pytest.raises(ValueError, match='at least two'):
        split_into(modules.SetUp(), lambda m, x, t: x, [lambda m, x, t: x], lambda m, x, t: x)


def test_inputs_of_another_shape_are_refused():
    network, variables = split('bypassed')
    bound = network.bind(variables, train=False)
    message = r'made for inputs like float32\[8, 8, 3\], and these are like float32\[8, 9, 3\]'
    with pytest.raises(ValueError, match=message):
        bound.run(jnp.zeros((4, 8, 9, 3)))
    with pytest.raises(ValueError, match=message):
        with_inputs(network, (8, 9, 3))
    assert with_inputs(network, SHAPE) is network
    with pytest.raises(ValueError, match='with_inputs'):
        BlockNetwork(network.module, network.blocks, network.call).bind({}, train=False)


def test_variables_that_inputs_make_are_taken_from_the_module():
    network = split_after(modules.Centered(), ['layer0', 'layer1'], SHAPE)
    with pytest.raises(ValueError, match='variables out of its inputs'):
        network.init(jax.random.key(0))
    variables = network.module.init(jax.random.key(0), X)
    np.testing.assert_allclose(network.bind(variables, train=False).run(X).outputs.mean(0), np.zeros(4), atol=1e-6)


def test_a_network_that_prints_its_inputs_can_be_initialised():
    class Printing(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            jax.debug.print('{}', x.mean())
            return nn.Dense(2, name='layer1')(nn.Dense(2, name='layer0')(x.mean((1, 2))))

    variables = split_after(Printing(), ['layer0', 'layer1'], SHAPE).init(jax.random.key(0))
    assert set(variables['params']) == {'layer0', 'layer1'}


def test_the_argument_for_training_may_be_anything():
    class Modal(nn.Module):
        @nn.compact
        def __call__(self, x, mode):
            for number in range(2):
                x = nn.Dense(4, name=f'layer{number}')(x)
                x = nn.BatchNorm(use_running_average=mode != 'fit')(x)
            return x.mean((1, 2))

    network = split_after(
        Modal(), ['layer0', 'layer1'], SHAPE, lambda module, x, train: module(x, 'fit' if train else 'use')
    )
    variables = network.init(jax.random.key(0))
    for train, mode in ((True, 'fit'), (False, 'use')):
        got, _ = network.apply(variables, X, train=train)
        expected, _ = Modal().apply(variables, X, mode, mutable=['batch_stats'])
        np.testing.assert_array_equal(got, expected)
    assert jnp.isfinite(got).all()
