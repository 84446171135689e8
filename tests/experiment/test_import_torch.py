"""A partner from PyTorch weights: what is told of them, and a head that is new."""

import io

import jax
import numpy as np
import pytest
import rich.console
from flax import traverse_util

from bqat_jax.errors import UserError
from bqat_jax.experiment import import_torch as module
from bqat_jax.experiment.import_torch import REPORT, find_classifier
from bqat_jax.experiment.partner import TRAINING, find_partner, load_partner
from bqat_jax.experiment.run import import_partner, prepare_partner, train
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.experiment.streams import Stream, random_key
from tests.experiment.test_run import shortened
from tests.networks.published_names import akamaster_resnet, draw_variables, exported

torch = pytest.importorskip('torch', reason='PyTorch, which reads the weights, is not installed')

HEAD = {'params/head/dense/kernel', 'params/head/dense/bias'}


@pytest.fixture
def config(digits_dir):
    config = shortened(digits_dir)
    config.network.shortcut = 'B'
    return config


def opened(config, workdir):
    console = rich.console.Console(file=io.StringIO(), width=1000)
    return make_experiment(config, workdir, console), console.file


def save(config, tmp_path, **changes):
    """Writes a file that fits the network, but for what `changes` says of its arrays; returns our variables."""
    experiment, _ = opened(config, tmp_path)
    variables = draw_variables(experiment.shapes)
    arrays = {**exported(akamaster_resnet(1), variables), **{name.replace('__', '.'): x for name, x in changes.items()}}
    weights = {f'module.{name}': torch.tensor(array) for name, array in arrays.items() if array is not None}
    torch.save({'model': weights, 'ema': weights, 'epoch': 3}, tmp_path / 'weights.pth')
    config.partner.torch_file = str(tmp_path / 'weights.pth')
    return variables


def test_a_second_start_reads_what_the_first_kept(config, tmp_path, monkeypatch):
    variables = save(config, tmp_path)
    config.data.cache_dir = str(tmp_path / 'cache')
    first = find_partner(opened(config, tmp_path / 'first')[0])

    def read(*arguments):
        raise AssertionError('PyTorch is asked again')

    with monkeypatch.context() as patch:
        patch.setattr(module, 'read_state_dict', read)
        second = find_partner(opened(config, tmp_path / 'second')[0])
        assert first is not None and second is not None and first.facts == second.facts
        jax.tree.map(np.testing.assert_array_equal, second.variables, variables)
        config.partner.torch_key = 'ema'  # another entry was not read before
        with pytest.raises(AssertionError, match='asked again'):
            find_partner(opened(config, tmp_path / 'third')[0])
    config.partner.torch_key = None
    save(config, tmp_path, **OTHER_CLASSES)  # another file of that name is not taken for the first
    with pytest.raises(UserError, match='do not fit'):
        find_partner(opened(config, tmp_path / 'fourth')[0])


OTHER_CLASSES = {'linear__weight': np.ones((7, 16), np.float32), 'linear__bias': np.ones(7, np.float32)}


def test_what_was_taken_is_told(config, tmp_path):
    variables = save(config, tmp_path)
    experiment, said = opened(config, tmp_path / 'run')
    partner = find_partner(experiment)
    assert partner is not None
    jax.tree.map(np.testing.assert_array_equal, partner.variables, variables)
    told = "PyTorch file weights.pth, its entry 'model' (not 'ema'), names without 'module.'"
    assert partner.facts['source'] == told and f'Partner: {told}.' in said.getvalue()


def test_a_key_chooses_the_entry(config, tmp_path):
    save(config, tmp_path)
    config.partner.torch_key = 'ema'
    partner = find_partner(opened(config, tmp_path / 'run')[0])
    assert partner is not None and "its entry 'ema'," in partner.facts['source']
    config.partner.torch_key = 'emma'
    with pytest.raises(UserError, match=r"partner\.torch_key='emma'.*Did you mean 'ema'"):
        find_partner(opened(config, tmp_path / 'other')[0])


def test_all_that_does_not_fit_is_in_a_file_that_the_error_names(config, tmp_path):
    save(config, tmp_path, **{f'extra{number}__weight': np.zeros(2, np.float32) for number in range(9)})
    experiment, _ = opened(config, tmp_path / 'run')
    with pytest.raises(UserError) as error:
        find_partner(experiment)
    text, path = str(error.value), tmp_path / 'run' / REPORT
    assert f'The complete list is in {path}.' in text and config.partner.torch_file in text and 'config.network' in text
    assert 'extra8' not in text and 'unexpected: extra8.weight (2,)' in path.read_text()
    save(config, tmp_path)
    find_partner(experiment)
    assert not path.exists()  # it would speak of another file


@pytest.mark.parametrize('head', [OTHER_CLASSES, dict.fromkeys(OTHER_CLASSES)], ids=['other_classes', 'no_head'])
def test_where_only_the_head_differs_the_error_says_how_to_go_on(config, tmp_path, head):
    save(config, tmp_path, **head)
    with pytest.raises(UserError, match=r'--config\.partner\.new_head=true'):
        find_partner(opened(config, tmp_path / 'run')[0])
    save(config, tmp_path, **head, bn1__bias=np.zeros(5, np.float32))
    with pytest.raises(UserError, match=r'Check that the keys config\.network') as error:
        find_partner(opened(config, tmp_path / 'run')[0])
    assert 'new_head' not in str(error.value)


@pytest.mark.parametrize(
    ('head', 'fsdp'),
    [
        pytest.param({}, 1, marks=pytest.mark.slow, id='same'),
        pytest.param(OTHER_CLASSES, 1, marks=pytest.mark.slow, id='other'),
        pytest.param(dict.fromkeys(OTHER_CLASSES), 1, id='none'),
        pytest.param(OTHER_CLASSES, 2, marks=pytest.mark.slow, id='other, sharded'),
        pytest.param({}, 2, marks=pytest.mark.slow, id='same, sharded'),
        pytest.param(dict.fromkeys(OTHER_CLASSES), 2, marks=pytest.mark.slow, id='none, sharded'),
    ],
)
def test_with_a_new_head_training_starts_from_the_other_weights(config, tmp_path, head, fsdp):
    """Seen after no steps; the head is that of a partner that starts from nothing."""
    expected = traverse_util.flatten_dict(save(config, tmp_path, **head), sep='/')
    config.partner.new_head, config.partner.steps, config.partner.optimizer.warmup_steps = True, 0, 0
    config.mesh.data, config.mesh.fsdp, config.mesh.min_shard_elements = 1, fsdp, 0
    experiment, said = opened(config, tmp_path / 'run')
    prepare_partner(config, tmp_path / 'run', name='digits', console=experiment.console)
    partner = load_partner(experiment, tmp_path / 'run')
    assert partner is not None
    key = random_key(0, Stream.PARTNER_INIT)
    fresh = traverse_util.flatten_dict(experiment.network.init(key), sep='/')
    expected |= {path: fresh[path] for path in HEAD}
    for path, value in traverse_util.flatten_dict(partner.variables, sep='/').items():
        rtol = 1e-6 if path in HEAD else 0  # drawn by another program
        np.testing.assert_allclose(value, expected.pop(path), rtol=rtol, err_msg=path)
    assert not expected
    assert partner.facts['source'] == 'trained for 0 steps from PyTorch file weights.pth with a new head'
    assert "from PyTorch file weights.pth, its entry 'model' (not 'ema')" in said.getvalue()


@pytest.mark.slow
def test_with_a_new_head_the_partner_is_trained(config, tmp_path):
    save(config, tmp_path, **OTHER_CLASSES)
    config.partner.new_head, config.train.steps, config.partner.steps = True, 0, 4
    config.partner.optimizer.warmup_steps, config.data.validation_fraction = 0, 0.0  # the last checkpoint counts
    result = train(config, tmp_path / 'run', name='digits')
    assert result['partner'] == 'trained for 4 steps from PyTorch file weights.pth with a new head'
    partner = load_partner(opened(config, tmp_path / 'run')[0], tmp_path / 'run')
    assert partner is not None and np.any(np.asarray(partner.variables['params']['head']['dense']['bias']) != 0)


def test_with_a_new_head_the_rest_must_fit_before_data_is_read(config, tmp_path):
    save(config, tmp_path, bn1__bias=None)
    config.partner.new_head = True
    with pytest.raises(UserError, match='missing: params/stem/norm/bias'):
        find_partner(opened(config, tmp_path / 'run')[0])


def test_training_that_has_begun_goes_on_without_the_file(config, tmp_path, monkeypatch):
    save(config, tmp_path, **OTHER_CLASSES)
    config.partner.new_head = True
    experiment, _ = opened(config, tmp_path / 'run')
    read = []
    monkeypatch.setattr(module, 'read_state_dict', lambda *arguments: read.append(arguments))
    (tmp_path / 'run' / TRAINING).mkdir(parents=True)
    assert find_partner(experiment) is None and not read


def test_a_partner_with_a_new_head_is_no_partner_to_import(config, tmp_path):
    save(config, tmp_path, **OTHER_CLASSES)
    config.partner.new_head = True
    with pytest.raises(UserError, match=r'partner.new_head=True.*--mode=train'):
        import_partner(config, tmp_path / 'run', name='digits')


@pytest.mark.parametrize(('key', 'value'), [('new_head', True), ('torch_key', 'ema')])
@pytest.mark.parametrize('workdir', [None, 'runs/other'])
def test_keys_that_speak_of_a_file_need_one(config, tmp_path, key, value, workdir):
    config.partner[key], config.partner.workdir = value, workdir
    with pytest.raises(UserError, match=rf'partner.{key}={value!r}.*Set partner.torch_file'):
        opened(config, tmp_path)


def test_the_classifier_is_known_by_its_shapes(config, tmp_path, registries):
    assert find_classifier(opened(config, tmp_path)[0]) == HEAD
    (tmp_path / 'mine.py').write_text(
        'from bqat_jax.blocks.splitting import split_after\n'
        'from bqat_jax.networks.registry import register_network\n'
        'from tests.blocks.outside import Network\n'
        "@register_network('mine')\n"
        "def mine(num_classes, *, sizes, cut='block'):\n"
        '    assert isinstance(sizes, tuple)\n'
        "    return split_after(Network(num_classes), ['layer0', 'layer1', 'layer2'], (*sizes, 1))\n"
    )
    config.plugins = str(tmp_path / 'mine.py')
    del config['network']
    config.network = type(config)({'name': 'mine', 'sizes': (8, 8)})
    config.quant.rules = ()
    assert find_classifier(opened(config, tmp_path)[0]) == {'params/Dense_0/kernel', 'params/Dense_0/bias'}
