"""Whole runs on the digits, shortened."""

import collections
import json
import os
import shutil
import signal

import jax
import ml_collections
import numpy as np
import pytest

from bqat_jax.distributed.preemption import Stopped
from bqat_jax.errors import UserError
from bqat_jax.experiment import reading as experiment_reading
from bqat_jax.experiment import run_phase
from bqat_jax.experiment.checkpoints import Checkpoints
from bqat_jax.experiment.run import diagnose_run, evaluate_run, import_partner, summarize_network, train
from bqat_jax.experiment.streams import Stream
from bqat_jax.storage import read_json, write_json
from bqat_jax.training.evaluation import Evaluation
from tests.conftest import ROOT
from tests.experiment.test_configuration import load_recipe

DIGITS = load_recipe(ROOT / 'configs' / 'digits.py')


def shortened(digits_dir):
    """The digits recipe, small and short."""
    config = DIGITS.get_config()
    config.data.dir = digits_dir
    config.network.width = 4
    config.report = False  # tests/report has one
    config.mesh.data = 1  # of the devices that tests have: eight wait for each other on two cores
    config.train.steps, config.train.batch_size, config.train.log_every_steps = 12, 32, 4
    config.partner.steps = 12
    config.partner.optimizer.warmup_steps = 2
    config.checkpoint.every_steps = 4
    return config


@pytest.fixture
def config(digits_dir):
    return shortened(digits_dir)


@pytest.fixture(scope='module')
def whole(digits_dir, tmp_path_factory):
    """A finished run: its config, workdir and result, and the numbers of the examples that it was trained on."""
    config, workdir = shortened(digits_dir), tmp_path_factory.mktemp('run')
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_examples(patch)
        result = train(config, workdir, name='digits', overrides={'train.steps': 12})
    return config, workdir, result, np.concatenate(seen[Stream.TRAINING])


@pytest.fixture
def finished(whole):
    """The same without the numbers."""
    return whole[:3]


@pytest.fixture
def plain(finished, config):
    """The config of a run that costs least: without teacher, MP models and validation, with the partner of another."""
    config.partner.workdir = str(finished[1])
    config.replacement.plan, config.replacement.distillation = 'none', 0.0
    config.data.validation_fraction = 0.0
    return config


def watch_examples(patch, on_batch=lambda number: None):
    """Returns lists of the numbers of examples in each batch that is read from now on, by what they are read for."""
    read, seen = run_phase.training_batches, collections.defaultdict(list)

    def watched(experiment, split, stream, replicas, start, stop):
        for number, batch in enumerate(read(experiment, split, stream, replicas, start, stop), start):
            seen[stream].append(np.asarray(batch['index']))
            on_batch(number)
            yield batch

    patch.setattr(run_phase, 'training_batches', watched)
    return seen


def last_state(workdir):
    """The arrays of the newest checkpoint, by path."""
    with Checkpoints(workdir / 'checkpoints', keep=2, has_scores=True, read_only=True) as checkpoints:
        step = checkpoints.latest_step
        tree = checkpoints._manager.restore(step)['state']

    def plain(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if is_key else leaf)

    return step, jax.tree.map(plain, tree)


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_leaves_what_the_readme_says(finished):
    _config, workdir, result = finished
    assert json.loads((workdir / 'result.json').read_text()) == result
    for key in ('fp_top1', 'top1', 'weight_bits', 'activation_bits', 'plan', 'seed', 'steps', 'seconds'):
        assert key in result
    assert result['examples_evaluated'] == 360 and result['steps'] == 12
    assert 0 <= result['top1'] <= 1 and 0 <= result['fp_top1'] <= 1
    assert json.loads((workdir / 'config.json').read_text())['train']['steps'] == 12
    environment = json.loads((workdir / 'environment.json').read_text())
    assert environment['overrides'] == {'train.steps': 12} and environment['versions']['jax'] == jax.__version__
    quantizers = json.loads((workdir / 'quantizers.json').read_text())
    assert quantizers['stem/conv']['activations'] == {
        'name': 'lsq', 'bits': 8, 'signed': True, 'granularity': 'tensor', 'estimator': 'identity',
    }  # fmt: skip
    assert quantizers['stage2_block1/conv1']['activations']['signed'] is False
    assert quantizers['head/dense']['weights']['bits'] == 8
    assert list((workdir / 'tensorboard').rglob('events*')) and (workdir / 'checkpoints' / '12').is_dir()
    logged = [entry for entry in metrics_of(workdir) if entry['phase'] == 'train' and 'loss' in entry]
    assert [entry['step'] for entry in logged] == [4, 8, 12]
    losses = {'loss/cross_entropy', 'loss/distillation', 'loss/path1_cross_entropy', 'loss/path2_distillation'}
    assert losses | {'learning_rate', 'l2_gradients', 'l2_params', 'l2_updates', 'examples_per_second'} <= set(
        logged[-1]
    )


def test_evaluating_gives_the_same_numbers(finished):
    config, workdir, result = finished
    evaluation = evaluate_run(config, workdir)
    for key in ('top1', 'fp_top1', 'examples_evaluated', 'checkpoint_step'):
        assert evaluation[key] == result[key]
    assert json.loads((workdir / 'evaluation.json').read_text()) == evaluation


def test_running_a_finished_run_again_changes_nothing(finished):
    config, workdir, result = finished
    before = metrics_of(workdir)
    assert train(config, workdir, name='digits') == result
    assert metrics_of(workdir) == before


def test_another_config_is_refused(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    other.optimizer.learning_rate = 0.5
    for function in (lambda: train(other, workdir, name='digits'), lambda: evaluate_run(other, workdir)):
        with pytest.raises(UserError, match=r'optimizer.learning_rate: 0.02 -> 0.5'):
            function()


def test_a_config_that_failed_before_it_left_anything_may_be_corrected(finished, config, tmp_path):
    config.partner.workdir = str(tmp_path / 'absent')
    with pytest.raises(UserError, match='no finished partner'):
        train(config, tmp_path / 'run', name='digits')
    assert (tmp_path / 'run' / 'config.json').exists()
    config.partner.workdir, config.train.steps = str(finished[1]), 0
    result = train(config, tmp_path / 'run', name='digits')  # the calibrated network
    assert result['checkpoint_step'] == 0 and result['examples_evaluated'] == 360


def test_the_partner_of_another_run_is_taken_with_its_normalisation(finished, config, tmp_path):
    _, workdir, result = finished
    config.partner.workdir = str(workdir)
    config.data.mean, config.train.steps = (0.0,), 0
    taken = train(config, tmp_path / 'run', name='digits')
    assert taken['fp_top1'] == result['fp_top1'] and taken['partner'] == f'workdir {workdir}'
    assert not any(entry['phase'] == 'pretrain' for entry in metrics_of(tmp_path / 'run'))
    config.network.width = 8
    with pytest.raises(UserError, match='width: 4 -> 8'):
        train(config, tmp_path / 'other', name='digits')


@pytest.mark.slow
def test_streamed_data_gives_the_same_run(finished, config, tmp_path):
    _, workdir, _ = finished
    config.partner.workdir = str(workdir)
    config.data.on_device = False
    train(config, tmp_path / 'run', name='digits')
    (step, streamed), (expected_step, expected) = last_state(tmp_path / 'run'), last_state(workdir)
    assert step == expected_step == 12
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), streamed, expected)


def test_plain_qat_needs_no_teacher_and_without_a_validation_split_the_last_checkpoint_counts(plain, tmp_path):
    result = train(plain, tmp_path / 'run', name='digits')
    assert result['checkpoint_step'] == 12 and 'validation_top1' not in result
    logged = [entry for entry in metrics_of(tmp_path / 'run') if 'loss' in entry]
    assert len(logged) == 3 and all(not any('distillation' in name for name in entry) for entry in logged)


def test_a_loss_that_is_not_finite_stops_the_run(plain, tmp_path):
    plain.optimizer.learning_rate = 1e30
    with pytest.raises(UserError) as error:
        train(plain, tmp_path / 'run', name='digits')
    message = str(error.value)
    assert 'NaN or infinite in step' in message and 'last good checkpoint is that of step 0' in message
    assert 'clip_norm' in message
    assert [path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir()] == ['0']


def test_parameters_that_are_not_finite_are_no_good_checkpoint(plain, tmp_path):
    """The loss of the only step is finite, and its update is not."""
    plain.optimizer.learning_rate, plain.train.steps = 1e38, 1
    with pytest.raises(UserError, match=r'a parameter became NaN or infinite in step 1 .* is that of step 0'):
        train(plain, tmp_path / 'run', name='digits')
    assert not (tmp_path / 'run' / 'result.json').exists()


def test_images_that_overflow_the_network_count_as_wrong_and_are_told(finished, config, tmp_path, monkeypatch):
    """What a checkpoint of finite parameters can still do in bfloat16, or after statistics were estimated anew."""
    _, workdir, _ = finished
    monkeypatch.setattr(
        experiment_reading, 'evaluate', lambda step, batches, task: (Evaluation({'top1': 0.5}, 360, 7),)
    )
    result = evaluate_run(config, workdir)
    assert result['logits_not_finite'] == 14  # of the network and of its partner


@pytest.mark.slow
def test_a_network_starts_from_that_of_another_run_with_other_bits(finished, config, tmp_path):
    _, workdir, result = finished
    config.init.workdir = str(workdir)
    config.quant.weights.bits = 4
    config.train.steps = 0
    started = train(config, tmp_path / 'other bits', name='digits')
    assert started['init'] == str(workdir) and started['partner'] == f'workdir {workdir}'
    config.quant.weights.bits, config.init.quantizers = 2, 'keep'
    kept = train(config, tmp_path / 'kept', name='digits')
    assert kept['top1'] == result['top1'] and kept['checkpoint_step'] == 0
    config.quant.weights.bits = 3
    with pytest.raises(UserError, match=r"init.quantizers='keep'.*conv1.weights.bits: 2 -> 3"):
        train(config, tmp_path / 'refused', name='digits')


def test_what_a_network_can_not_start_from_is_told(finished, config, tmp_path):
    config.partner.workdir = str(finished[1])
    config.init.workdir = str(tmp_path / 'absent')
    with pytest.raises(UserError, match='absent holds no run'):
        train(config, tmp_path / 'run', name='digits')
    config.init.quantizers = 'kept'
    with pytest.raises(UserError, match=r"init.quantizers='kept': it must be 'calibrate' or 'keep'"):
        train(config, tmp_path / 'other', name='digits')


def test_a_workdir_from_before_a_key_came_is_resumed(finished, config, tmp_path):
    _, workdir, result = finished
    shutil.copytree(workdir, tmp_path / 'run')
    known = read_json(tmp_path / 'run' / 'config.json')
    del known['init'], known['quant']['reestimation_batches']
    write_json(tmp_path / 'run' / 'config.json', known)
    assert train(config, tmp_path / 'run', name='digits') == result


@pytest.mark.parametrize(
    ('file', 'text', 'message'),
    [
        ('config.json', '{"train": 3}', 'train is not a section'),
        ('config.json', '[]', 'holds a list'),
        ('environment.json', '{"versions": 3}', "entry 'versions'"),
        ('environment.json', '{"versions": {}, "numerics": 3}', "entry 'numerics'"),
        ('quantizers.json', '{"stem/conv": 3}', 'whether the inputs of stem/conv are signed'),
        ('quantizers.json', '{}', 'does not say'),
        ('partner/partner.json', '{"network": 7}', "entry 'network'"),
    ],
)
def test_files_of_a_run_that_were_changed_are_told(finished, config, tmp_path, file, text, message):
    shutil.copytree(finished[1], tmp_path / 'run', ignore=shutil.ignore_patterns('tensorboard'))
    (tmp_path / 'run' / file).write_text(text)
    with pytest.raises(UserError, match=f'{file} is damaged.*{message}'):
        evaluate_run(config, tmp_path / 'run')


def test_a_network_that_no_memory_holds_is_told_before_it_is_made(config, tmp_path):
    config.network.width = 100000
    assert summarize_network(config, tmp_path / 'summary')['parameters'] > 1e12
    with pytest.raises(UserError, match=r'GB of parameters on each device'):
        train(config, tmp_path / 'run', name='digits')


def test_a_file_where_checkpoints_go_is_told(finished, config, tmp_path):
    config.partner.workdir = str(finished[1])
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'checkpoints').write_text('')
    with pytest.raises(UserError, match='checkpoints is a file'):
        train(config, tmp_path / 'run', name='digits')


def test_a_workdir_of_an_older_version_is_refused_by_its_version(finished, config, tmp_path):
    shutil.copytree(finished[1], tmp_path / 'run')
    environment = read_json(tmp_path / 'run' / 'environment.json')
    environment['versions']['bqat_jax'] = '0.1.0'
    write_json(tmp_path / 'run' / 'environment.json', environment)
    with pytest.raises(UserError, match=r'made by bqat_jax 0\.1\.0'):
        train(config, tmp_path / 'run', name='digits')


@pytest.mark.slow
def test_oscillating_weights_are_dampened_frozen_and_their_statistics_estimated_anew(plain, tmp_path):
    config = plain
    config.quant.oscillations.dampening, config.quant.oscillations.freezing = 0.1, True
    config.quant.oscillations.freezing_momentum, config.quant.oscillations.freezing_first_threshold = 0.5, 0.2
    config.quant.reestimation_batches = 2
    config.optimizer.learning_rate = 0.2
    result = train(config, tmp_path / 'run', name='digits')
    logged = [entry for entry in metrics_of(tmp_path / 'run') if 'loss' in entry]
    frozen = [entry['frozen_weights'] for entry in logged]
    assert frozen == sorted(frozen) and 0 < frozen[-1] < 1 and 0 <= logged[0]['oscillating_weights'] <= 1
    assert logged[0]['loss/dampening'] >= 0 and logged[-1]['loss/dampening'] > 0
    assert evaluate_run(config, tmp_path / 'run')['top1'] == result['top1']
    config.quant.reestimation_batches = 0
    with pytest.raises(UserError, match='reestimation_batches: 2 -> 0'):
        evaluate_run(config, tmp_path / 'run')


def test_a_layer_that_does_not_suit_its_quantizer_is_named(config, finished, tmp_path):
    config.partner.workdir = str(finished[1])
    config.quant.activations.name = 'n2uq'
    config.quant.rules = ()
    with pytest.raises(UserError, match=r'Layer stem/conv: The quantizer .n2uq.*outputs start at zero'):
        train(config, tmp_path / 'run', name='digits')


@pytest.mark.parametrize(
    ('key', 'value', 'message'),
    [
        ('replacement.plan', 'prefx', 'none, prefix, single'),
        ('data.train_split', 'train[:80', r"data\.train_split='train\[:80' is not a split"),
        ('data.train_split', 'test', '360 examples are in both'),
        ('data.value_range', (1.0, 0.0), r'data\.value_range=\(1\.0, 0\.0\)'),
        ('data.mean', (77.9,), 'at least 0 and at most 1'),
        ('replacement.cut', 'layer', 'stage, block'),
        ('replacement.cut', 'stage2_block1,stage1_block1', 'in this order'),
        ('replacement.probability', 'liner', "Did you mean 'linear'"),
        ('replacement.weights_schedule', 'constant:value=-1', 'negative'),
        ('replacement.path_teaching', -1.0, 'path_teaching'),
        ('train.replicas', 0, 'train.replicas=0'),
        ('diagnosis.batches', 1, 'diagnosis.batches=1'),
        ('data.train_examples', 0, 'train_examples=0'),
        ('data.train_examples', 1438, '1 to 1437'),
        ('replacement.weights', 'half', 'halving, uniform, mean'),
        ('replacement.temperature', 0.0, 'temperature'),
        ('network.depth', 9, '6n'),
        ('network.name', 'resnett', 'cifar_resnet'),
        ('quant.weights.bits', 9, 'bits=9'),
        ('quant.weights.name', 'lsqq', 'lsqq'),
        ('quant.activations.estimator', 'ste', 'identity'),
        ('quant.weights.estimator', 'ewgs:delt=1', "Did you mean 'delta'"),
        ('quant.weights.estimator', 'reste', 'two levels'),
        ('quant.weights.name', 'sawbb', "Did you mean 'sawb'"),
        ('quant.weights.rescale', 'sat', 'constant'),
        ('quant.activations.name', 'sawb', 'depend on its batch'),
        ('quant.trace.batches', 0, 'quant.trace.batches=0'),
        ('quant.oscillations.dampening', -1.0, 'quant.oscillations.dampening=-1.0'),
        ('quant.reestimation_batches', -1, 'reestimation_batches'),
        ('optimizer.name', 'adam', 'sgd, adamw'),
        ('partner.optimizer.name', 'adam', 'sgd, adamw'),
        ('network.shortcut', 'C', 'A, B'),
        ('network.dtype', 'float16', 'bfloat16'),
        ('plugins', 'absent.py', r'there is no file .*absent\.py'),
        ('quant.rules', ({'layers': 'stm/conv', 'weights': 'none'},), 'stem/conv'),
        ('data.mean', (0.1, 0.2), '1 channels'),
        ('data.name', 'digitz', 'no dataset'),
        ('train.batch_size', 0, 'batch_size=0'),
        ('train.batch_size', 12, '8 devices'),
        ('mesh.data', 9, '8 devices'),
        ('mesh.fsdp', 9, 'mesh.fsdp=9'),
        ('mesh.rules', ({'path': '.*', 'axis': 'widest'},), 'widest'),
        ('train.microbatches', 3, '8 devices in train.microbatches=3 parts'),
        ('train.batch_norm_groups', 5, 'does not divide the 32 images'),
        ('quant.calibration_batches', 0, 'calibration_batches'),
        ('partner.torch_file', 'absent.th', 'absent.th'),
        ('partner.workdir', 'absent', 'no finished partner'),
    ],
)
def test_values_that_cannot_work_are_refused_before_training(config, tmp_path, key, value, message):
    config.mesh.data = -1  # all devices: some of the messages are about them
    *sections, name = key.split('.')
    target = config
    for section in sections:
        target = target[section]
    target[name] = value
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / 'run', name='digits')


def test_one_partner_only(config, tmp_path):
    config.partner.workdir, config.partner.torch_file = 'a', 'b'
    with pytest.raises(UserError, match='both set'):
        train(config, tmp_path / 'run', name='digits')


def test_an_imported_partner_is_evaluated_and_trained_from(config, finished, tmp_path):
    torch = pytest.importorskip('torch', reason='PyTorch, which reads the weights, is not installed')
    _, workdir, first = finished
    with pytest.raises(UserError, match='nothing to import'):
        import_partner(config, tmp_path / 'run', name='digits')
    assert not (tmp_path / 'run').exists()
    config.partner.workdir = str(workdir)
    result = import_partner(config, tmp_path / 'run', name='digits')
    assert result['fp_top1'] == first['fp_top1'] and result['examples_evaluated'] == 360
    assert train(config, tmp_path / 'run', name='digits')['top1'] == first['top1']
    config.partner.workdir = None
    torch.save({'conv1.weight': torch.zeros(4, 1, 3, 3)}, tmp_path / 'weights.pth')
    config.partner.torch_file = str(tmp_path / 'weights.pth')
    with pytest.raises(UserError, match='36 missing'):
        import_partner(config, tmp_path / 'other', name='digits')


def test_the_summary_counts_what_there_is(config, tmp_path):
    totals = summarize_network(config, tmp_path)
    summary = read_json(tmp_path / 'summary.json')
    assert summary['totals'] == totals and summary['not_quantizable'] == {}
    rows = {row['path']: row for row in summary['layers']}
    assert [row['block'] for row in summary['layers']][:2] == ['block 1', 'block 1']
    assert rows['head/dense']['block'] == 'head'
    stem = rows['stem/conv']
    assert stem['kernel'] == [3, 3, 1, 4] and stem['parameters'] == 36 and stem['macs'] == 64 * 36
    assert stem['bitops'] == stem['macs'] * 8 * 8 and stem['weights'] == 'lsq 8 bits'
    assert rows['stage1_block1/conv1']['bitops'] == rows['stage1_block1/conv1']['macs'] * 2 * 2
    quantized = sum(row['parameters'] for row in rows.values()) - 10  # the dense layer's bias
    kernels_at_8 = 36 + 16 * 10
    expected = (totals['parameters'] - quantized) * 4 + kernels_at_8 + (quantized - kernels_at_8) / 4
    assert totals['bytes'] == expected and totals['bytes_full_precision'] == 4 * totals['parameters']


@pytest.mark.slow
def test_a_network_of_the_users_runs_by_its_name(config, tmp_path, registries):
    plugin = tmp_path / 'mine.py'
    plugin.write_text(
        'from bqat_jax.blocks.splitting import split_after\n'
        'from bqat_jax.networks.registry import register_network\n'
        'from tests.blocks.outside import Network\n'
        "@register_network('mine')\n"
        "def mine(num_classes, *, size=8, cut='block'):\n"
        "    return split_after(Network(num_classes), ['layer0', 'layer1', 'layer2'], (size, size, 1))\n"
    )
    config.plugins = str(plugin)
    config.replacement.plan, config.replacement.distillation = 'none', 0.0
    config.network = ml_collections.ConfigDict({'name': 'mine'})
    config.quant.rules = ({'layers': 'Conv_0', 'weights': {'bits': 8}, 'activations': {'bits': 8}},)
    result = train(config, tmp_path / 'run', name='digits')
    assert 0 <= result['top1'] <= 1
    config.partner.torch_file = str(plugin)
    with pytest.raises(UserError, match="PyTorch names of the network 'mine'"):
        import_partner(config, tmp_path / 'other', name='digits')
    config.network = ml_collections.ConfigDict({'name': 'mine', 'sise': 8})
    with pytest.raises(UserError, match="Did you mean 'size'"):
        train(config, tmp_path / 'third', name='digits')


def test_a_plugin_that_raises_is_named_with_its_line(config, tmp_path, registries):
    plugin = tmp_path / 'mine.py'
    plugin.write_text(
        "import bqat_jax as bq\n@bq.register_plan('broken')\ndef broken(num_blocks):\n    return {}['nothing']\n"
    )
    config.plugins, config.replacement.plan = str(plugin), 'broken'
    with pytest.raises(UserError, match=r"The plugin .*mine\.py, line 4, raised KeyError: 'nothing'"):
        train(config, tmp_path / 'run', name='digits')


def test_there_must_be_something_to_evaluate(config, tmp_path):
    with pytest.raises(UserError, match='holds no run'):
        evaluate_run(config, tmp_path)


def test_a_workdir_in_use_is_refused(config, tmp_path):
    from bqat_jax.storage import held

    with held(tmp_path, 60), pytest.raises(UserError, match='in use'):
        train(config, tmp_path, name='digits')


@pytest.mark.slow
def test_the_shared_resnet20_is_as_good_as_in_pytorch(shared_data, tmp_path):
    """91.73 % of the 10,000 test images, as measured with PyTorch; see the data's README."""
    pytest.importorskip('torch', reason='PyTorch, which reads the weights, is not installed')
    config = load_recipe(ROOT / 'configs' / 'cifar10_resnet20.py').get_config()
    config.data.dir = str(shared_data / 'tfds')
    config.partner.torch_file = str(shared_data / 'weights' / 'cifar10_resnet20_optionA.th')
    config.data.on_device = False
    config.train.steps, config.optimizer.warmup_epochs = 0, 0.0
    config.quant.calibration_batches = 1
    result = train(config, tmp_path / 'run', name='cifar10_resnet20')
    assert result['examples_evaluated'] == 10000
    assert result['fp_top1'] == pytest.approx(0.9173, abs=0.0002)


@pytest.mark.slow
def test_a_run_of_two_seeds_gives_both_results(plain, tmp_path):
    config = plain
    config.train.replicas = config.mesh.data = 2
    config.quant.reestimation_batches = 1
    both = train(config, tmp_path / 'both', name='digits')
    again = evaluate_run(config, tmp_path / 'both')
    assert again['top1_by_seed'] == both['top1_by_seed'] and again['top1'] == both['top1']
    config.train.replicas = config.mesh.data = 1
    config.seed = 1
    alone = train(config, tmp_path / 'alone', name='digits')
    # 12 steps of a 2-bit network may drift apart by a few of 360 images.
    assert both['top1_by_seed']['1'] == pytest.approx(alone['top1'], abs=0.03)
    assert set(both['top1_by_seed']) == {'0', '1'}
    assert both['top1'] == pytest.approx(np.mean(list(both['top1_by_seed'].values())))
    assert both['top1_std'] == pytest.approx(np.std(list(both['top1_by_seed'].values()), ddof=1))


def test_replicas_that_devices_cannot_share_are_refused(config, tmp_path):
    config.train.replicas = 3
    config.mesh.data = 2
    with pytest.raises(UserError, match=r'train.replicas=3 cannot be split over 2 devices'):
        train(config, tmp_path, name='digits')


def test_a_run_goes_on_with_fewer_devices_at_the_next_example(config, whole, tmp_path, monkeypatch):
    _, partner, expected, order = whole
    config.partner.workdir = str(partner)

    def stop(number):
        if number == 4 and config.mesh.data == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    seen = watch_examples(monkeypatch, stop)
    config.mesh.data = 4
    with pytest.raises(Stopped, match='after step 5 of 12'):
        train(config, tmp_path / 'run', name='digits')
    config.mesh.data, config.mesh.fsdp, config.mesh.min_shard_elements = 2, 2, 0
    result = train(config, tmp_path / 'run', name='digits')
    assert len(seen[Stream.TRAINING]) == 12
    np.testing.assert_array_equal(np.concatenate(seen[Stream.TRAINING]), order)
    assert len(set(order.tolist())) == len(order)  # all of one epoch
    assert result['top1'] == pytest.approx(expected['top1'], abs=0.1)
    described = json.loads((tmp_path / 'run' / 'sharding_train.json').read_text())
    assert 'params/network/stage3_block1/conv1/kernel' in described


@pytest.mark.slow
def test_a_checkpoint_is_diagnosed_and_training_too(config, finished, tmp_path):
    config.partner.workdir, config.replacement.plan = str(finished[1]), 'none'
    config.diagnosis.every_steps, config.diagnosis.batches, config.diagnosis.samples = 8, 2, 2
    config.diagnosis.oscillation_steps = 3
    result = train(config, tmp_path / 'run', name='digits')
    folder = tmp_path / 'run' / 'diagnosis'
    assert sorted(path.name for path in folder.iterdir()) == ['step_8.json', 'step_8.png']
    files = diagnose_run(config, tmp_path / 'run')
    diagnosis = json.loads((folder / f'step_{result["checkpoint_step"]}.json').read_text())
    assert files['json'] == str(folder / f'step_{result["checkpoint_step"]}.json')
    assert list(diagnosis['features']) == ['block 1', 'block 2', 'block 3']
    assert (
        set(diagnosis['gradients']['full']['layers']) == set(diagnosis['quantizers']) == set(diagnosis['oscillating'])
    )
    measures = diagnosis['gradients']['lp']['blocks']['block 2']
    assert -1 <= measures['cosine_to_smoothed'] <= 1 and measures['variance'] > 0
    assert (folder / 'step_8.png').read_bytes().startswith(b'\x89PNG')
