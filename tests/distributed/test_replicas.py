"""Seeds side by side are the same as one after another."""

import jax
import numpy as np
import pytest

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.distributed.replicas import Replicas
from bqat_jax.distributed.sharding import Placement, make_mesh, replicated
from bqat_jax.replacement.paths import Variables
from bqat_jax.training.optimizer import OptimizerSpec, Rates, make_optimizer
from bqat_jax.training.state import init_state
from bqat_jax.training.step import make_train_step
from tests.training.test_step import ARRAYS, VARIABLES, in_full_precision, make_spec

STEPS = 20


def compile_seeds(spec, count, devices):
    """Returns replicas with what makes their state and with their step."""
    replicas = Replicas(count, Placement(make_mesh(devices)))
    optimizer, learning_rate = make_optimizer(OptimizerSpec(learning_rate=0.01, quantizers=Rates(0.01)), STEPS)

    def make(variables, key):
        return init_state(spec, key, variables, optimizer)

    axes = (0, 0)
    step = make_train_step(spec, optimizer, learning_rate, replicas)
    return replicas, replicas.jit(replicas.over(make, axes), axes), step


def begin(replicas, make, quantizers, seeds):
    """Returns state, partner and arrays of seeds, and the batches that they are trained on."""

    def variables(seed):
        # Quantizers of their own, keys of their own.
        own = jax.tree.map(lambda x: x * (1 + 0.01 * seed), quantizers)
        return Variables(VARIABLES['params'], own, other_collections(VARIABLES)), jax.random.key(seed)

    def read(seed):
        rng = np.random.default_rng(seed)
        return iter([{'index': rng.integers(0, 256, 32).astype(np.int32)} for _ in range(STEPS)])

    state = make(*replicas.stack([variables(seed) for seed in seeds]))
    partner, arrays = jax.device_put((VARIABLES, ARRAYS), replicated(replicas.mesh))
    return state, partner, arrays, replicas.batches([read(seed) for seed in seeds])


def run_seeds(compiled, quantizers, seeds):
    """Trains seeds in one program; returns the losses, (steps, seeds), and the last state."""
    replicas, make, step = compiled
    state, partner, arrays, batches = begin(replicas, make, quantizers, seeds)
    losses = []
    for batch in batches:
        state, metrics = step(state, partner, arrays, batch)
        losses.append(np.asarray(metrics['loss']).reshape(-1))
    return np.array(losses), state


TURNS, AS_ONE = True, False  # as on a CPU, and as on other platforms


@pytest.mark.parametrize(
    ('turns', 'plan', 'quantized'),
    [
        (TURNS, 'bernoulli', False),
        pytest.param(AS_ONE, 'prefix', True, marks=pytest.mark.slow),
        pytest.param(TURNS, 'prefix', True, marks=pytest.mark.slow),
        pytest.param(AS_ONE, 'bernoulli', False, marks=pytest.mark.slow),
    ],
)
def test_a_replica_is_the_same_seed_alone(monkeypatch, turns, plan, quantized):
    """Two replicas on each of two devices, 20 steps."""
    monkeypatch.setattr(Replicas, 'take_turns', turns)
    spec, quantizers = make_spec(plan, bits=8)
    if not quantized:
        spec, quantizers = in_full_precision(spec), {}
    single = compile_seeds(spec, 1, 1)
    alone = np.concatenate([run_seeds(single, quantizers, [seed])[0] for seed in (0, 3)], axis=1)
    together, state = run_seeds(compile_seeds(spec, 4, 2), quantizers, [0, 1, 2, 3])
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 2
    apart = np.abs(together[:, [0, 3]] / alone - 1)
    # Sums in another order carry a value over a rounding threshold now and then; from there quantized runs drift apart.
    assert apart[:3].max() < 1e-4 and apart.max() < (2e-2 if quantized else 1e-3)
    assert np.abs(together[:, 1] / alone[:, 0] - 1).max() > 1e-2  # another seed is another run


def test_replicas_take_turns_on_a_cpu():
    assert Replicas(2, Placement(make_mesh(1))).take_turns


@pytest.mark.slow
@pytest.mark.parametrize('turns', [TURNS, AS_ONE])
@pytest.mark.parametrize('devices', [1, 2])
def test_what_is_drawn_stays_a_conditional_side_by_side(monkeypatch, devices, turns):
    monkeypatch.setattr(Replicas, 'take_turns', turns)
    spec, quantizers = make_spec('prefix_sampled')
    replicas, make, step = compile_seeds(spec, 2, devices)
    *arguments, batches = begin(replicas, make, quantizers, [0, 1])
    program = step.lower(*arguments, next(iter(batches))).compile().as_text()
    assert program.count(' conditional(') == 2  # of three blocks one is drawn; forward and backward
