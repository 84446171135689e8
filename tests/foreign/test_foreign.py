"""Networks that strangers wrote are wrapped in one call, run exactly as they do by themselves, and train at W4A4."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

import bqat_jax as bq
from bqat_jax.analysis.summary import summarize
from bqat_jax.blocks.block_network import stream_keys
from bqat_jax.transform.rules import assign_quantizers
from tests.foreign.cases import CASES, cut

KEY = jax.random.key(5)
W4A4 = {'weights': {'name': 'lsq', 'bits': 4}, 'activations': {'name': 'lsq', 'bits': 4}}
STEPS = 10
# The decoder is trained on every change; these take as long again each.
SLOW = ('bert', 'bilstm', 'convnext', 'efficientnet', 'gnn', 'mixer', 'unet', 'vae')
# Those whose parts others have too: loops, stochastic depth, squeeze and excite, graphs.
SLOW_TO_CUT = ('bilstm', 'convnext', 'efficientnet', 'gnn')
EAGERLY = 'mixer'


def run_all(network, variables, train, inputs):
    """Outputs and state of the whole, and outputs of what follows every cut."""
    bound = network.bind(variables, train=train, key=KEY)
    run, last = bound.run(inputs), len(network.blocks)
    rest = [bound.run_pieces(number + 1, last, alive) for number, alive in enumerate(run.alive)]
    return run.outputs, run.state, rest


@pytest.mark.parametrize('name', [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_TO_CUT else x for x in CASES])
def test_a_network_that_is_cut_computes_what_it_computes_by_itself(name):
    """In two compiled programs; one network eagerly too, as others are in tests/blocks."""
    case = CASES[name]
    (network, variables), inputs, equal = cut(name), case.batch(), np.testing.assert_array_equal
    if case.is_divided:
        equal = lambda got, wanted: np.testing.assert_allclose(got, wanted, atol=1e-5, rtol=1e-5)  # noqa: E731

    def run_whole(variables, inputs):
        keys = stream_keys(KEY, network.streams)
        return [
            case.apply(variables, inputs, train, rngs=keys, mutable=list(network.mutable) if train else [])
            for train in (True, False)
        ]

    def run_pieces(variables, inputs):
        return [run_all(network, variables, train, inputs) for train in (True, False)]

    for transform in (jax.jit, lambda function: function) if name == EAGERLY else (jax.jit,):
        whole, pieces = transform(run_whole)(variables, inputs), transform(run_pieces)(variables, inputs)
        for (expected, state), (outputs, own_state, rest) in zip(whole, pieces, strict=True):
            for got in (outputs, *rest):
                jax.tree.map(equal, got, expected)
            for collection, tree in state.items():
                jax.tree.map(equal, own_state[collection], tree)


@pytest.mark.parametrize('name', [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CASES])
def test_a_network_trains_with_weights_and_activations_of_four_bits(name):
    case = CASES[name]
    (network, partner), inputs = cut(name), case.batch()
    targets = case.targets(inputs)
    task = bq.get_task(case.task) if isinstance(case.task, str) else case.task
    objective = bq.Objective(task=task)
    replacement, variables = bq.replace_blocks(network, partner, [inputs], W4A4, case.plan, objective=objective)
    optimizer = optax.flatten(optax.adam(1e-2))

    def step(carry, _):
        variables, state = carry

        def loss(trained, params):
            own = variables._replace(params=trained[0], quantizers=trained[1])
            batch, context = bq.Batch(inputs, targets), bq.Context(key=KEY)
            return replacement.loss(own, {**partner, 'params': params}, batch, context)

        trained = variables.params, variables.quantizers
        (value, (collections, _)), (gradients, of_partner) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
            trained, partner['params']
        )
        updates, state = optimizer.update(gradients, state)
        trained = optax.apply_updates(trained, updates)
        return (variables._replace(params=trained[0], quantizers=trained[1], collections=collections), state), (
            value,
            [jnp.any(x != 0) for x in jax.tree.leaves(of_partner)],
        )

    @jax.jit
    def train(variables):
        state = optimizer.init((variables.params, variables.quantizers))
        return jax.lax.scan(step, (variables, state), length=STEPS)

    (trained, _), (losses, reached) = jax.device_get(train(variables))
    assert losses[-1] < 0.95 * losses[0], losses
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(trained))
    assert not np.any(reached)
    before = jax.device_get(variables.params)
    assert jax.tree.all(jax.tree.map(lambda new, old: new.size == 1 or np.any(new != old), trained.params, before))


@pytest.mark.parametrize('name', [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_TO_CUT else x for x in CASES])
def test_no_weight_goes_unmentioned(name):
    case, (network, variables) = CASES[name], cut(name)
    layers = bq.find_layers(
        network.as_function(variables, train=True, key=KEY), variables['params'], network.batch_of(2)
    )
    summary = summarize(network, variables, layers, assign_quantizers(tuple(layers.quantizable), **W4A4, rules=()))
    quantized = {row['path'] for row in summary['layers']}
    left = summary['not_quantizable']
    assert all(reason for reason in left.values())
    assert all(path.endswith(case.left) for path in left), left
    for path, x in traverse_util.flatten_dict(variables['params'], sep='/').items():
        owner, _, leaf = path.rpartition('/')
        is_vector = x.ndim < 2 or leaf in ('bias', 'scale')  # perhaps stacked
        assert is_vector or owner in quantized or path in left, path
    assert all(row['macs'] > 0 for row in summary['layers'] if layers.quantizable[row['path']].has_input)
