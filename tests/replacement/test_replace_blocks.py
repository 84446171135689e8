"""What `replace_blocks` is given: forms that are the same, and mistakes that are told in words."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bqat_jax as bq
from bqat_jax.blocks.splitting import split_after
from bqat_jax.replacement.objective import Objective
from bqat_jax.replacement.plans import Plan

LSQ = {'name': 'lsq', 'bits': 2}


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Dense(8, name='first')(x))
        x = nn.relu(nn.Dense(8, name='second')(x))
        return nn.Dense(3, name='last')(x)


NETWORK = split_after(Network(), ['first', 'second'], (6,))
PARTNER = NETWORK.init(jax.random.key(0), (6,))
INPUTS = jax.random.normal(jax.random.key(1), (4, 6))
GOOD = {
    'network': NETWORK,
    'partner': PARTNER,
    'batches': [INPUTS],
    'quantizers': {'weights': LSQ, 'activations': LSQ},
    'plan': 'prefix',
}


def test_batches_may_be_an_iterator_and_weights_a_list():
    _, expected = bq.replace_blocks(**GOOD)
    replacement, variables = bq.replace_blocks(
        **{**GOOD, 'batches': iter([INPUTS]), 'plan': Plan('prefix', 2, weights=[0.5])}
    )
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    hash(replacement.plan)


def test_no_quantizer_needs_no_bits():
    replacement, _ = bq.replace_blocks(
        **{**GOOD, 'quantizers': {'weights': {'name': 'none'}, 'activations': {'name': 'none'}}}
    )
    assert list(replacement.quantization.quantizers()) == []


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'batches': INPUTS}, r'Give \[batch\]'),
        ({'batches': []}, 'at least one batch'),
        ({'quantizers': None}, 'quantizers=None'),
        ({'quantizers': {'weights': LSQ}}, 'write .*activations'),
        ({'quantizers': {'weights': 'lsq', 'activations': LSQ}}, "weights='lsq': write a dict"),
        ({'quantizers': {'weights': {'name': 'lsq'}, 'activations': LSQ}}, "no 'bits'"),
        ({'quantizers': {'weights': LSQ, 'activations': LSQ, 'rules': {'layers': 'x'}}}, 'are not a list'),
        ({'plan': None}, 'plan=None'),
        ({'plan': Plan('prefix', 3)}, r"Use Plan\('prefix', 2\)"),
        ({'partner': PARTNER['params']}, "no 'params'"),
    ],
)
def test_mistakes_are_told(change, message):
    with pytest.raises(ValueError, match=message):
        bq.replace_blocks(**{**GOOD, **change})


@pytest.mark.parametrize('returned', [7, None, (True, False), 'prefix', {'a': 1}])
def test_a_plan_that_returns_no_models_is_told(returned, registries):
    bq.register_plan('odd')(lambda num_blocks: returned)
    with pytest.raises(ValueError, match="The plan 'odd' returned"):
        bq.replace_blocks(**{**GOOD, 'plan': 'odd'})


def test_a_partner_that_is_needed_is_asked_for():
    replacement, variables = bq.replace_blocks(**GOOD)
    batch = bq.Batch(INPUTS, jnp.array([0, 1, 2, 0]))
    with pytest.raises(ValueError, match='partner=None'):
        replacement.loss(variables, None, batch, bq.Context(0.0, jax.random.key(0)))


@pytest.mark.parametrize('value', [np.nan, np.inf, -1.0])
def test_numbers_that_are_no_weights_are_refused(value):
    for make in (
        lambda: Objective(temperature=value),
        lambda: Objective(distillation=value),
        lambda: Plan('prefix', 2, weights=(value,)),
    ):
        with pytest.raises(ValueError, match=r'replacement\.'):
            make()
