"""Random small networks of all kinds of parts, cut at random places, compute what they compute by themselves."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bqat_jax import split_after
from bqat_jax.blocks.block_network import stream_keys
from tests.foreign.cases import array, draw_variables

BATCH, LENGTH, WIDTH, DEPTH = 3, 4, 4, 3  # of sequences, and of scans
KEY = jax.random.key(7)
QUICK: dict[str, Any] = {
    'deadline': None,
    'derandomize': True,
    'database': None,
    'suppress_health_check': list(HealthCheck),
}


class Residual(nn.Module):
    """An iteration of a scan: dropout, and a carry of two parts."""

    @nn.compact
    def __call__(self, carry, mask, train):
        x, total = carry
        y = nn.Dropout(0.3)(nn.relu(nn.Dense(WIDTH)(x)), deterministic=not train)
        return (x + y * mask[..., None], total + y.mean()), y.mean((1, 2))


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, mask, train):
        layers = nn.scan(
            Residual,
            variable_axes={'params': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=DEPTH,
        )
        (x, total), means = layers(name='layers')((x, jnp.float32(0)), mask, train)
        return x + total + means.T.sum(1)[:, None, None]


class DropPath(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return x * jax.random.bernoulli(self.make_rng('drop_path'), 0.7, (x.shape[0], 1, 1)) if train else x


def run_part(kind, name, x, mask, train):
    """One part of a network, from (batch, length, width) to the same."""
    if kind == 'dense':
        return nn.gelu(nn.Dense(WIDTH, name=name)(x))
    if kind == 'conv':
        return nn.Conv(WIDTH, (3,), name=name)(x)
    if kind == 'attention':
        attend = nn.MultiHeadDotProductAttention(2, dropout_rate=0.2, deterministic=not train, name=name)
        return attend(x, mask=nn.make_attention_mask(mask, mask))
    if kind == 'recurrent':
        return nn.RNN(nn.GRUCell(WIDTH), name=name)(x, seq_lengths=mask.sum(1))
    if kind == 'scan':
        return Scanned(name=name)(x, mask, train)
    if kind == 'batch norm':
        return nn.BatchNorm(use_running_average=not train, name=name)(x)
    if kind == 'drop path':
        return DropPath(name=name)(x, train)
    return nn.Dropout(0.4, name=name)(x, deterministic=not train)


KINDS = ('dense', 'conv', 'attention', 'recurrent', 'scan', 'batch norm', 'drop path', 'dropout')


class Network(nn.Module):
    """Parts, each with an earlier value that is added behind it; two more inputs: a mask, and what is added at last.

    Attributes:
        parts: kind, and the number of the earlier value or None.
    """

    parts: tuple

    @nn.compact
    def __call__(self, x, mask, late, train=False):
        seen = [x]
        for number, (kind, shortcut) in enumerate(self.parts):
            x = run_part(kind, f'part{number}', x, mask, train)
            if shortcut is not None:
                x = x + seen[shortcut]
            seen.append(x)
        pooled = (x * mask[..., None]).sum(1) + late
        return {'logits': nn.Dense(2, name='head')(pooled), 'kept': (seen[len(seen) // 2], mask)}


@st.composite
def networks(draw):
    """A network and where it is cut."""
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=3, max_size=5, unique=True))
    parts = tuple((kind, draw(st.none() | st.integers(0, number))) for number, kind in enumerate(kinds))
    cuts = sorted(draw(st.sets(st.integers(0, len(parts) - 1), min_size=2, max_size=3)))
    ends = []
    for number in cuts:
        within = parts[number][0] == 'scan' and draw(st.booleans())
        ends.append(f'part{number}/layers[{draw(st.integers(0, DEPTH - 1))}]' if within else f'part{number}')
    return Network(parts), tuple(ends)


def make_inputs():
    generator = np.random.default_rng(1)
    mask = np.arange(LENGTH) < np.array([2, 4, 3])[:, None]
    x, late = generator.normal(size=(BATCH, LENGTH, WIDTH)), generator.normal(size=(BATCH, WIDTH))
    return jnp.asarray(x, jnp.float32), jnp.asarray(mask), jnp.asarray(late, jnp.float32)


def check(module, ends, transform, is_exact):
    """Compares a network that is cut with itself, both run as `transform` says."""
    inputs = make_inputs()
    network = split_after(module, ends, jax.tree.map(lambda x: array(*x.shape[1:], dtype=x.dtype), inputs))
    variables, last = draw_variables(network), len(ends)

    def equal(got, expected):
        np.testing.assert_allclose(got, expected, rtol=0 if is_exact else 1e-5, atol=0 if is_exact else 1e-5)

    def run_whole(variables, inputs):
        rngs = stream_keys(KEY, network.streams)
        return [
            module.apply(variables, *inputs, train=train, rngs=rngs, mutable=list(network.mutable) if train else [])
            for train in (True, False)
        ]

    def run_cut(variables, inputs):
        runs = []
        for train in (True, False):
            bound = network.bind(variables, train=train, key=KEY)
            run = bound.run(inputs)
            rest = [bound.run_pieces(number + 1, last, alive) for number, alive in enumerate(run.alive)]
            by_one = run.alive[0]
            for number in range(1, last + 1):
                by_one = bound.run_pieces(number, number, by_one)
            runs.append((run.outputs, run.state, [*rest, by_one]))
        return runs

    whole, cut = transform(run_whole)(variables, inputs), transform(run_cut)(variables, inputs)
    for (expected, updated), (outputs, state, rest) in zip(whole, cut, strict=True):
        for got in (outputs, *rest):
            jax.tree.map(equal, got, expected)
        for name, tree in updated.items():
            jax.tree.map(equal, state[name], tree)


def check_eagerly(case):
    module, ends = case
    check(module, ends, lambda function: function, is_exact=not any('[' in end for end in ends))


@settings(max_examples=2, **QUICK)
@given(networks())
def test_a_random_network_that_is_cut_equals_itself(case):
    check_eagerly(case)


@pytest.mark.slow
@settings(max_examples=20, **QUICK)
@given(networks())
def test_many_random_networks_that_are_cut_equal_themselves(case):
    check_eagerly(case)


@settings(max_examples=1, **QUICK)
@given(networks())
def test_a_random_network_that_is_cut_equals_itself_when_compiled(case):
    check_compiled(case)


@pytest.mark.slow
@settings(max_examples=10, **QUICK)
@given(networks())
def test_many_random_networks_that_are_cut_equal_themselves_when_compiled(case):
    check_compiled(case)


def check_compiled(case):
    def compile_quickly(function):
        return jax.jit(function, compiler_options={'xla_backend_optimization_level': 0})

    check(*case, compile_quickly, is_exact=False)
