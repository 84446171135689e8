"""What once went wrong with networks of strangers, each as small as can be: the right value, or the right error."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bqat_jax as bq
from bqat_jax.blocks.block_network import stream_keys
from bqat_jax.blocks.exploring import with_inputs
from tests.foreign.cases import array, draw_variables

KEY = jax.random.key(3)
X = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
W4A4 = {'weights': {'name': 'lsq', 'bits': 4}, 'activations': {'name': 'lsq', 'bits': 4}}


def network_of(function):
    """A Linen module whose compact `__call__` is `function`."""
    return type('Network', (nn.Module,), {'__call__': nn.compact(function)})()


def check(module, inputs=X, ends=('a', 'b'), trained=None, evaluated=None, variables=None, call=None):
    """Checks the whole and what follows every cut against the module itself, called with other arguments in training.

    Returns:
        The network, and the state after training as the module itself gives it.
    """
    network = bq.split_after(module, ends, jax.tree.map(lambda x: array(*x.shape[1:], dtype=x.dtype), inputs), call)
    variables = draw_variables(network) if variables is None else variables
    last, updated = len(network.blocks), None
    for train, own in ((True, trained or {}), (False, evaluated or {})):
        expected, state = module.apply(
            variables,
            *(inputs if isinstance(inputs, tuple) else (inputs,)),
            **own,
            rngs=stream_keys(KEY, network.streams),
            mutable=list(network.mutable) if train else [],
        )
        bound = network.bind(variables, train=train, key=KEY)
        run = bound.run(inputs)
        for got in (run.outputs, *(bound.run_pieces(n + 1, last, alive) for n, alive in enumerate(run.alive))):
            assert jax.tree.structure(got) == jax.tree.structure(expected)
            jax.tree.map(np.testing.assert_array_equal, got, expected)
        for name, tree in state.items():
            jax.tree.map(np.testing.assert_array_equal, run.state[name], tree)
        updated = state if train else updated
    return network, updated


def test_inputs_that_pass_by_a_cut_are_carried():
    def call(self, x):
        y = nn.Dense(3, name='b')(nn.Dense(4, name='a')(x))
        return nn.Dense(2)(y + x[:, :3])

    network, _ = check(network_of(call))
    assert [len(crossing) for crossing in network.crossings] == [2, 2, 1]


def test_all_switches_are_set():
    def call(self, x, train=True, deterministic=True):
        x = nn.Dropout(0.5)(nn.Dense(4, name='a')(x), deterministic=deterministic)
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4, name='b')(x))

    check(network_of(call), trained={'train': True, 'deterministic': False}, evaluated={'train': False})


def test_a_switch_that_is_not_found_is_missed():
    def call(self, x, mode='fit'):
        return nn.BatchNorm(use_running_average=mode != 'fit')(nn.Dense(4, name='b')(nn.Dense(4, name='a')(x)))

    with pytest.raises(ValueError, match=r'BatchNorm_0 \(BatchNorm\).*Give call='):
        bq.split_after(network_of(call), ['a', 'b'], (4,))
    module = network_of(call)
    check(
        module,
        trained={'mode': 'fit'},
        evaluated={'mode': 'use'},
        call=lambda module, x, train: module(x, 'fit' if train else 'use'),
    )


def test_a_field_is_a_switch():
    class Network(nn.Module):
        train: bool = False

        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=not self.train)(nn.Dense(4, name='a')(x))
            return nn.Dense(4, name='b')(x)

    network = bq.split_after(Network(), ['a', 'b'], (4,))
    variables = draw_variables(network)
    _, state = network.apply(variables, X, train=True)
    _, expected = Network(train=True).apply(variables, X, mutable=['batch_stats'])
    jax.tree.map(np.testing.assert_array_equal, state['batch_stats'], expected['batch_stats'])


def test_statistics_of_the_root_move_once():
    def call(self, x, train):
        center = self.variable('batch_stats', 'center', jnp.zeros, (4,))
        x = nn.Dense(4, name='b')(nn.Dense(4, name='a')(x - center.value))
        if train and not self.is_initializing():
            center.value = 0.5 * center.value + 0.5 * x.mean(0)
        return x

    _, state = check(network_of(call), trained={'train': True}, evaluated={'train': False})
    assert state['batch_stats']['center'].any()


def test_an_example_is_described_without_the_batch():
    network = bq.split_after(network_of(lambda self, x: nn.Dense(3, name='b')(nn.Dense(4, name='a')(x))), ['a', 'b'], X)
    with pytest.raises(ValueError, match=r'made for inputs like float32\[3, 4\], and these are like float32\[4\]'):
        network.bind(draw_variables(network), train=False).run(X)


def test_trees_cross_a_cut():
    class Pair(nn.Module):
        @nn.compact
        def __call__(self, x, state):
            return nn.Dense(4)(x), {'sum': state['sum'] + x, 'mask': state['mask'] & (x > 0)}

    def call(self, x):
        x, state = Pair(name='a')(x, {'sum': x, 'mask': x > -1})
        x, state = Pair(name='b')(x, state)
        return x * state['mask'].astype(x.dtype), state['sum']

    network, _ = check(network_of(call))
    assert len(network.crossings[1]) == 3


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.relu(nn.Dense(4, name='inner')(x)), None


def scanned(self, x):
    layers = nn.scan(Layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=3)
    return nn.Dense(2, name='b')(layers(name='layers')(x, None)[0])


def test_a_cut_behind_a_scan_or_between_its_iterations():
    module = network_of(scanned)
    check(module, ends=('layers', 'b'))
    network = bq.split_after(module, ['layers[0]', 'layers[1]'], (4,))
    variables = draw_variables(network)
    bound = network.bind(variables, train=False)
    for got in (run := bound.run(X)).outputs, bound.run_pieces(1, 2, run.alive[0]):
        np.testing.assert_allclose(got, module.apply(variables, X), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'layers/inner' is within an iteration of nn.scan. .*'layers\[3\]'"):
        bq.split_after(module, ['layers/inner', 'b'], (4,))
    with pytest.raises(ValueError, match='iterations 0 to 2'):
        bq.split_after(module, ['layers[1]', 'layers[3]'], (4,))


def test_a_cut_behind_a_module_that_is_mapped_over_the_batch():
    def call(self, x):
        mapped = nn.vmap(nn.Dense, in_axes=0, variable_axes={'params': None}, split_rngs={'params': False})
        return nn.Dense(2, name='b')(mapped(4, name='a')(x))

    check(network_of(call))


def test_boxes_around_parameters():
    def call(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ('in', 'out'))
        return nn.Dense(2, name='b')(nn.Dense(4, kernel_init=init, name='a')(x))

    network, _ = check(network_of(call))
    assert isinstance(network.init_boxed(KEY)['params']['a']['kernel'], nn.Partitioned)
    replacement, variables = bq.replace_blocks(network, draw_variables(network), [X], W4A4, 'none')
    assert jnp.isfinite(replacement.logits(variables, X)).all()


def test_a_random_stream_of_another_name():
    def call(self, x, train):
        x = nn.Dense(4, name='a')(x)
        if train:
            x = x * jax.random.bernoulli(self.make_rng('drop_path'), 0.5, x.shape)
        return nn.Dense(4, name='b')(x)

    network, _ = check(network_of(call), trained={'train': True}, evaluated={'train': False})
    assert network.streams == ('drop_path',)


def test_a_network_that_draws_in_evaluation_too_draws_the_same_each_time():
    def call(self, x):
        x = nn.Dense(4, name='a')(x)
        return nn.Dense(4, name='b')(x + jax.random.normal(self.make_rng('noise'), x.shape))

    network, _ = check(network_of(call))
    partner = draw_variables(network)
    replacement, variables = bq.replace_blocks(network, partner, [X], W4A4, 'prefix')
    batch = bq.Batch(X, jnp.arange(3))
    loss, _ = replacement.loss(variables, partner, batch, bq.Context(key=KEY))
    assert jnp.isfinite(loss)
    np.testing.assert_array_equal(replacement.logits(variables, X), replacement.logits(variables, X))


def test_other_collections_are_carried():
    def call(self, x, train):
        scale = self.variable('constants', 'scale', lambda: jnp.ones((4,)))
        count = self.variable('counters', 'steps', lambda: jnp.zeros((), jnp.int32))
        x = nn.Dense(4, name='b')(nn.Dense(4, name='a')(x) * scale.value)
        if train and not self.is_initializing():
            count.value += 1
        self.sow('intermediates', 'seen', x)
        return x

    network, state = check(network_of(call), trained={'train': True}, evaluated={'train': False})
    assert network.mutable == ('batch_stats', 'counters')
    assert state['counters']['steps'] == 1


def test_integer_inputs_keep_their_dtype():
    def call(self, tokens, lengths):
        x = nn.Dense(4, name='a')(nn.Embed(7, 4)(tokens))
        mask = jnp.arange(tokens.shape[1]) < lengths[:, None]
        return nn.Dense(2, name='b')((x * mask[..., None]).sum(1))

    inputs = jnp.array([[1, 2, 3], [4, 5, 6]]), jnp.array([2, 3])
    network, _ = check(network_of(call), inputs)
    assert [crossing.dtype for crossing in network.crossings[0]] == [jnp.int32, jnp.float32]
    with pytest.raises(ValueError, match=r'like \(int32\[3\], int32\[\]\), and these are like \(float32'):
        network.bind(draw_variables(network), train=False).run((inputs[0] * 1.0, inputs[1]))


def test_outputs_are_any_tree():
    def call(self, x):
        x = nn.Dense(4, name='a')(x)
        return {'logits': nn.Dense(3, name='b')(x)[:, None, None], 'parts': (x, x.sum())}

    network, _ = check(network_of(call))
    assert [crossing.axis for crossing in network.crossings[-1]] == [0, 0, None]


def test_a_submodule_may_return_what_is_no_array():
    class Sized(nn.Module):
        def setup(self):
            self.dense = nn.Dense(4)

        def size(self):
            return 4

        def __call__(self, x):
            return self.dense(x), 'name', self.size()

    def call(self, x):
        a = Sized(name='a')
        x, _, size = a(x)
        return nn.Dense(a.size() + size, name='b')(x)

    check(network_of(call))


def test_blocks_without_variables():
    class Relu(nn.Module):
        def __call__(self, x):
            return nn.relu(x)

    network, _ = check(network_of(lambda self, x: Relu(name='b')(Relu(name='a')(x) - 1)))
    assert network.init(KEY) == {'params': {}, 'batch_stats': {}}


def test_an_end_that_is_never_reached_says_which_there_are():
    with pytest.raises(
        ValueError, match=r"'c' is never reached: .* after 'a'\. In the order of their calls these do: a, b\."
    ):
        bq.split_after(network_of(lambda self, x: nn.Dense(3, name='b')(nn.Dense(4, name='a')(x))), ['a', 'c'], (4,))


def test_a_mapped_axis_that_is_not_bound():
    def call(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, axis_name='batch')(nn.Dense(4, name='a')(x))
        return nn.Dense(4, name='b')(x)

    with pytest.raises(ValueError, match='leave axis_name out'):
        bq.split_after(network_of(call), ['a', 'b'], (4,))


class InNNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


def test_nnx_is_refused_in_one_sentence():
    identity = lambda module, x, train: x  # noqa: E731
    for module in (InNNX(nnx.Rngs(0)), nnx.bridge.to_linen(InNNX)):
        with pytest.raises(ValueError, match=r'^InNNX is an nnx.Module: this project wraps Linen modules'):
            bq.split_after(module, ['a', 'b'], (4,))
        with pytest.raises(ValueError, match=r'^InNNX is an nnx.Module'):
            bq.split_into(module, identity, [identity] * 2, identity)
    with pytest.raises(ValueError, match='not a Linen module'):
        bq.split_after(nn.Dense, ['a', 'b'], (4,))  # pyright: ignore[reportArgumentType]
    holds = network_of(lambda self, x: nn.Dense(3, name='b')(nnx.bridge.to_linen(InNNX, name='a')(x)))
    with pytest.raises(ValueError, match=r"^'a' \(InNNX\) is an nnx.Module"):
        bq.split_after(holds, ['a', 'b'], (4,))
    pieces = bq.split_into(holds, identity, [lambda module, x, train: module(x)] * 2, identity)
    with pytest.raises(ValueError, match=r'is an nnx.Module'):
        with_inputs(pieces, (4,))
