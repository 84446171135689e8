"""The recipes that are no image classification, small and short: they do what the others do."""

import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from bqat_jax.data import python_bytes
from bqat_jax.distributed.preemption import Stopped
from bqat_jax.experiment import run_phase
from bqat_jax.experiment.run import diagnose_run, evaluate_run, summarize_network, train
from bqat_jax.storage import read_json
from tests.conftest import ROOT
from tests.experiment.test_configuration import load_recipe
from tests.experiment.test_run import last_state, metrics_of

RECIPES = {
    'bytes_gpt': ('bits_per_byte', {'depth': 3, 'width': 16, 'heads': 2}),
    'digits_segmentation': ('mean_iou', {'width': 4}),
}


SLOW = {'digits_segmentation'}


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """Where the data sets are prepared; instead of Python's library, of some files like it."""
    library = tmp_path_factory.mktemp('library')
    for number in range(60):
        (library / f'module{number}.py').write_text(f'# module {number}\n' + f'x = {number}\n' * 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(python_bytes, 'library_folder', lambda: library)
        yield str(tmp_path_factory.mktemp('data'))


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in RECIPES])
def recipe(request, data_dir):
    """Name, config and metric."""
    metric, network = RECIPES[request.param]
    config = load_recipe(ROOT / 'configs' / f'{request.param}.py').get_config('plan=prefix_sampled')
    config.data.dir = data_dir
    config.network.update(network)
    config.mesh.data = 1
    config.report = False
    config.train.batch_size = 16
    config.quant.calibration_batches = 1
    for phase in (config.partner, config.train):
        phase.steps = 6
    for optimizer in (config.partner.optimizer, config.optimizer):
        optimizer.warmup_steps = 1
    config.train.log_every_steps = 2
    config.checkpoint.every_steps = 2
    return request.param, config, metric


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_bit_for_bit_like_one_that_was_not(recipe, tmp_path, monkeypatch):
    name, config, metric = recipe
    expected = train(config, tmp_path / 'whole', name=name)
    read = run_phase.training_batches

    def interrupted(experiment, split, stream, replicas, start, stop):
        for number, batch in enumerate(read(experiment, split, stream, replicas, start, stop), start):
            if number == 3 and not start:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(run_phase, 'training_batches', interrupted)
    for _ in ('partner', 'train'):
        with pytest.raises(Stopped, match='after step 4 of 6'):
            train(config, tmp_path / 'broken', name=name)
    result = train(config, tmp_path / 'broken', name=name)
    (step, state), (expected_step, expected_state) = (last_state(tmp_path / run) for run in ('broken', 'whole'))
    assert step == expected_step == 6
    jax.tree.map(np.testing.assert_array_equal, state, expected_state)
    for key in (metric, f'fp_{metric}', f'validation_{metric}', 'checkpoint_step'):
        assert result[key] == expected[key] and np.isfinite(result[key])
    losses = [[entry.get('loss') for entry in metrics_of(tmp_path / run)] for run in ('broken', 'whole')]
    assert [loss for loss in losses[0] if loss] == [loss for loss in losses[1] if loss]


@pytest.mark.slow
def test_two_seeds_are_trained_evaluated_and_diagnosed(recipe, tmp_path):
    name, config, metric = recipe
    config.replacement.plan = 'bernoulli'
    config.train.replicas = config.mesh.data = 2
    result = train(config, tmp_path, name=name)
    assert set(result[f'{metric}_by_seed']) == {'0', '1'}
    assert evaluate_run(config, tmp_path)[metric] == result[metric]
    diagnosis = read_json(Path(diagnose_run(config, tmp_path)['json']))
    assert {'block 1', 'block 2'} <= set(diagnosis['features']) and diagnosis['quantizers']


@pytest.mark.slow
def test_arrays_that_devices_share_train_as_on_one(recipe, tmp_path):
    name, config, metric = recipe
    config.replacement.plan = 'prefix'
    one = train(config, tmp_path / 'one', name=name)
    config.mesh.data, config.mesh.fsdp, config.mesh.min_shard_elements = 1, 2, 0
    shared = train(config, tmp_path / 'shared', name=name)
    assert shared[metric] == pytest.approx(one[metric], rel=0.05)
    described = read_json(tmp_path / 'shared' / 'sharding_train.json')
    assert sum(entry['axis'] is not None for entry in described.values()) > 10


def test_the_summary_has_all_weights(recipe, tmp_path):
    name, config, _ = recipe
    summarize_network(config, tmp_path)
    others = read_json(tmp_path / 'summary.json')['not_quantizable']
    assert set(others) == ({'positions'} if name == 'bytes_gpt' else set())
    assert all('Decoder is the network itself' in reason for reason in others.values())
