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


def run_seeds(spec, quantizers, seeds, devices, program=None):
    """Trains seeds in one program; returns the losses, (steps, seeds), and the last state."""
    replicas = Replicas(len(seeds), Placement(make_mesh(devices)))
    optimizer, learning_rate = make_optimizer(OptimizerSpec(learning_rate=0.01, quantizers=Rates(0.01)), STEPS)

    def make(variables, key):
        return init_state(spec, key, variables, optimizer)

    def begin(seed):
        # Quantizers of their own, keys of their own.
        own = jax.tree.map(lambda x: x * (1 + 0.01 * seed), quantizers)
        return Variables(VARIABLES['params'], own, other_collections(VARIABLES)), jax.random.key(seed)

    def read(seed):
        rng = np.random.default_rng(seed)
        return iter([{'index': rng.integers(0, 256, 32).astype(np.int32)} for _ in range(STEPS)])

    axes = (0, 0)
    state = replicas.jit(replicas.over(make, axes), axes)(*replicas.stack([begin(seed) for seed in seeds]))
    step = make_train_step(spec, optimizer, learning_rate, replicas)
    partner, arrays = jax.device_put((VARIABLES, ARRAYS), replicated(replicas.mesh))
    losses = []
    for batch in replicas.batches([read(seed) for seed in seeds]):
        if program is not None and not losses:
            program.append(step.lower(state, partner, arrays, batch).compile().as_text())
        state, metrics = step(state, partner, arrays, batch)
        losses.append(np.asarray(metrics['loss']).reshape(-1))
    return np.array(losses), state


@pytest.fixture(params=[True, False], ids=['in turns', 'as one'])
def turns(request, monkeypatch):
    """As on a CPU, and as on other platforms."""
    monkeypatch.setattr(Replicas, 'take_turns', request.param)


@pytest.mark.usefixtures('turns')
@pytest.mark.parametrize(('plan', 'quantized'), [('prefix', True), ('bernoulli', False)])
def test_a_replica_is_the_same_seed_alone(plan, quantized):
    """Two replicas on each of two devices, 20 steps."""
    spec, quantizers = make_spec(plan, bits=8)
    if not quantized:
        spec, quantizers = in_full_precision(spec), {}
    alone = np.concatenate([run_seeds(spec, quantizers, [seed], 1)[0] for seed in (0, 3)], axis=1)
    together, state = run_seeds(spec, quantizers, [0, 1, 2, 3], 2)
    assert len(jax.tree.leaves(state.params)[0].sharding.device_set) == 2
    apart = np.abs(together[:, [0, 3]] / alone - 1)
    # Sums in another order carry a value over a rounding threshold now and then; from there quantized runs drift apart.
    assert apart[:3].max() < 1e-4 and apart.max() < (2e-2 if quantized else 1e-3)
    assert np.abs(together[:, 1] / alone[:, 0] - 1).max() > 1e-2  # another seed is another run


def test_replicas_take_turns_on_a_cpu():
    assert Replicas(2, Placement(make_mesh(1))).take_turns


@pytest.mark.usefixtures('turns')
@pytest.mark.parametrize('devices', [1, 2])
def test_what_is_drawn_stays_a_conditional_side_by_side(devices):
    spec, quantizers = make_spec('prefix_sampled')
    programs: list[str] = []
    run_seeds(spec, quantizers, [0, 1], devices, programs)
    assert programs[0].count(' conditional(') == 2  # of three blocks one is drawn; forward and backward
