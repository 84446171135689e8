"""Traces of steps, in a run and alone."""

import gzip
import json

import pytest
import rich.console

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import base_config
from bqat_jax.experiment.profiling import FOLDER
from bqat_jax.experiment.run import train
from bqat_jax.experiment.setup import make_experiment
from tests.experiment.test_run import shortened


def traced_steps(folder):
    (file,) = folder.rglob('*.trace.json.gz')
    events = json.loads(gzip.decompress(file.read_bytes()))['traceEvents']
    return {int(event['args']['step_num']) for event in events if event.get('name') == 'train'}


@pytest.mark.slow
def test_a_run_leaves_a_trace_of_the_steps_asked_for(digits_dir, tmp_path):
    config = shortened(digits_dir)
    config.profile, config.profile_steps = True, (2, 3)
    config.replacement.plan, config.replacement.distillation = 'none', 0.0
    config.partner.optimizer.warmup_steps, config.partner.steps = 0, 2
    train(config, tmp_path, name='digits', overrides={})
    assert traced_steps(tmp_path / FOLDER / 'train') == {2, 3}
    assert traced_steps(tmp_path / FOLDER / 'pretrain') == {2}  # a phase that ends earlier


@pytest.mark.parametrize('steps', [(3,), (0, 2), (4, 3), (1, 2, 3)])
def test_steps_that_are_none(steps, tmp_path):
    config = base_config()
    config.profile_steps = steps
    with pytest.raises(UserError, match='profile_steps'):
        make_experiment(config, tmp_path, rich.console.Console(quiet=True))
