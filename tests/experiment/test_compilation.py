"""Compiled programs on disk; the step is compiled beside other work, and once."""

import io
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
import rich.console

from bqat_jax.blocks.block_network import other_collections
from bqat_jax.errors import UserError
from bqat_jax.experiment.compilation import compiled_beside, keep_compiled
from bqat_jax.experiment.low_precision import low_precision_phase
from bqat_jax.experiment.partner import Partner
from bqat_jax.experiment.reading import Data, load_split, training_batches
from bqat_jax.experiment.run_phase import compiled_step, initial_state
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.replacement.paths import Variables
from bqat_jax.transform import build_quantization, quantizer_shapes
from tests.conftest import ROOT
from tests.experiment.test_configuration import load_recipe

PROGRAM = """
import sys
import jax
from bqat_jax.experiment.compilation import keep_compiled
keep_compiled(sys.argv[1])
print(jax.jit(lambda x: 2 * x + 1)(20.0))
"""


def test_a_second_process_adds_nothing(tmp_path):
    folder = tmp_path / 'to be made'

    def run():
        command = [sys.executable, '-c', PROGRAM, str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True
        )
        assert float(done.stdout) == 41
        return {path.name for path in folder.iterdir() if path.name.endswith('-cache')}

    kept = run()
    assert kept and run() == kept


def test_without_a_folder_nothing_changes():
    before = jax.config.jax_compilation_cache_dir
    keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='compilation_cache'):
        keep_compiled(str(tmp_path / 'file' / 'folder'))


@pytest.fixture
def compilations(caplog):
    """What this thread says that it lowers and compiles."""
    logger = logging.getLogger('jax._src.interpreters.pxla')
    with caplog.at_level(logging.WARNING, logger.name), jax.log_compiles():
        yield caplog


def test_a_function_that_was_compiled_beside_is_not_compiled_again(compilations):
    @jax.jit
    def doubled(x):
        return x + x

    x = jnp.ones(3)
    with compiled_beside(doubled, jax.ShapeDtypeStruct(x.shape, x.dtype)) as wait:
        wait()
        assert doubled(x).tolist() == [2, 2, 2]
    assert compilations.text.count('Compiling jit(doubled)') == 1
    assert 'Finished XLA compilation of jit(doubled)' not in compilations.text  # it was another thread that did it


def test_what_compilation_raises_is_raised_where_it_is_waited_for():
    class Lowered:
        def lower(self):
            return self

        def compile(self):
            raise MemoryError('too large')

    with compiled_beside(Lowered()) as wait, pytest.raises(MemoryError, match='too large'):
        wait()
    with compiled_beside(Lowered()):
        pass  # who does not wait is not told


@pytest.mark.parametrize(
    'keys',
    [
        {},
        pytest.param({'train.replicas': 2, 'data.on_device': False}, marks=pytest.mark.slow),
        pytest.param({'mesh.fsdp': 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_first_step_finds_its_program_compiled(digits_dir, tmp_path, compilations, keys):
    config = load_recipe(ROOT / 'configs' / 'digits.py').get_config()
    config.data.dir, config.network.width, config.train.batch_size, config.mesh.data = digits_dir, 2, 8, 1
    config.mesh.min_shard_elements, config.replacement.plan = 0, 'none'
    config.update_from_flattened_dict(keys)
    experiment = make_experiment(config, tmp_path, rich.console.Console(file=io.StringIO()))
    signed = dict.fromkeys(experiment.layers.quantizable, False)
    quantization = build_quantization(experiment.layers.quantizable, experiment.quantizers, signed)
    single = experiment.placement.put(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), experiment.shapes))
    phase = low_precision_phase(
        experiment, Partner(single, {'mean': config.data.mean, 'std': config.data.std}), quantization
    )
    shapes = quantizer_shapes(quantization, experiment.shapes['params'])
    quantizers = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    data = Data(load_split(experiment, experiment.data.images.train), None)
    with compiled_step(experiment, phase, data) as step:
        start = Variables(single['params'], quantizers, other_collections(single))
        state = initial_state(experiment, phase, lambda _: start)
        batch = next(training_batches(experiment, data.train, phase.stream, phase.replicas, 0, 1))
        _, metrics = step(state, batch)
        jax.block_until_ready(metrics)
    # Where arrays are sharded the function that makes the state has the name of the step.
    name, others = ('placed', 1) if experiment.placement.shards else ('steps', 0)
    assert compilations.text.count(f'Compiling jit({name})') == 1 + others
    assert compilations.text.count(f'Finished XLA compilation of jit({name})') == others
