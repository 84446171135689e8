import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bqat_jax.distributed.replicas import Replicas
from bqat_jax.distributed.sharding import Placement, make_mesh
from bqat_jax.networks.batch_norm import batch_norm_in_groups
from bqat_jax.replacement.paths import Variables, run_backbone
from bqat_jax.training.optimizer import OptimizerSpec, make_optimizer
from bqat_jax.training.reestimation import reestimate_batch_stats
from bqat_jax.training.state import init_state
from bqat_jax.training.step import prepare_batch
from tests.training.test_step import ARRAYS, VARIABLES, make_spec

# The network's batch norms'.
MOMENTUM = 0.9


@pytest.mark.parametrize('groups', [1, 4])
def test_statistics_are_those_of_the_batches(groups):
    spec, quantizers = make_spec('prefix_sampled')
    spec = dataclasses.replace(spec, batch_norm_groups=groups)
    optimizer, _ = make_optimizer(OptimizerSpec(), 5)
    stored = jax.tree.map(lambda x: x + 7.0, VARIABLES['batch_stats'])
    variables = Variables(VARIABLES['params'], quantizers, {'batch_stats': stored})
    state = init_state(spec, jax.random.key(0), variables, optimizer)
    batches = [{'index': np.arange(start, start + 32, dtype=np.int32)} for start in (0, 64)]
    statistics = reestimate_batch_stats(spec, state, ARRAYS, batches, Replicas(1, Placement(make_mesh(1))))

    @jax.jit
    def updated(index, number):
        batch, _ = prepare_batch(spec, state.replace(step=state.step + number), ARRAYS, {'index': index})
        with batch_norm_in_groups(groups):
            return run_backbone(
                spec.replacement.network, spec.replacement.quantization, state.variables, batch.inputs, train=True
            ).collections['batch_stats']

    both = [updated(batch['index'], jnp.int32(number)) for number, batch in enumerate(batches)]
    expected = jax.tree.map(
        lambda old, a, b: ((a - MOMENTUM * old) + (b - MOMENTUM * old)) / 2 / (1 - MOMENTUM), stored, *both
    )
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3), statistics, expected)
