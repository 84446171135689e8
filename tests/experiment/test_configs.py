import json

import jax
import pytest
import rich.console

from benchmarks.bench import described_images
from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import to_plain
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.training.optimizer import make_optimizer
from tests.conftest import ROOT
from tests.experiment.test_configuration import RECIPES, load_recipe


@pytest.fixture(scope='module', params=RECIPES, ids=lambda path: path.stem)
def config(request):
    return load_recipe(request.param).get_config(None)


@pytest.fixture(scope='module')
def experiment(config, tmp_path_factory):
    """What a recipe describes."""
    return describe(config, tmp_path_factory.mktemp('run'))


def describe(config, workdir):
    """A config's experiment on one device, its dataset described and not read."""
    images, console = described_images(config.data.name), rich.console.Console(quiet=True)
    return make_experiment(config, workdir, console, images=images, devices=jax.devices()[:1])


def test_the_recipe_is_json(config):
    plain = to_plain(config)
    assert json.loads(json.dumps(plain)) == plain


def test_rules_are_of_layers_of_the_network_and_give_the_first_and_the_last_eight_bits(config, experiment):
    """A rule that applies to nothing is refused, and so is what cannot be done about oscillations."""
    assert list(experiment.quantizers) == list(experiment.layers.quantizable)
    first, *others, last = (layer.weights.bits for layer in experiment.quantizers.values())
    assert (first, last) == (8, 8)
    assert set(others) == {config.quant.weights.bits}


def test_the_recipe_is_an_experiment(experiment):
    assert experiment.training.steps > 0 and experiment.partner.steps > 0
    for phase in (experiment.training, experiment.partner):
        make_optimizer(phase.optimizer, phase.steps)


@pytest.mark.parametrize('path', RECIPES, ids=lambda path: path.stem)
def test_bits_change_all_layers_but_the_first_and_the_last(path):
    config = load_recipe(path).get_config('bits=4,distillation=0.0')
    assert config.quant.weights.bits == 4
    assert config.quant.activations.bits == (8 if config.task == 'language_model' else 4)
    assert config.replacement.distillation == 0.0
    assert all(rule['weights']['bits'] == 8 for rule in config.quant.rules)


def test_depthwise_layers_may_have_bits_of_their_own(tmp_path):
    config = load_recipe(ROOT / 'configs' / 'imagenet_mobilenet_v2.py').get_config('bits=4,depthwise=6')
    settings = describe(config, tmp_path).quantizers
    assert {layer.weights.bits for path, layer in settings.items() if '/depthwise/' in path} == {6}
    assert {layer.activations.bits for path, layer in settings.items() if '/project/' in path} == {4}


def test_the_language_models_weights_may_be_ternary(tmp_path):
    recipe = load_recipe(ROOT / 'configs' / 'bytes_gpt.py')
    first, *others, last = describe(recipe.get_config('weights=ternary'), tmp_path).quantizers.values()
    assert {layer.weights.name for layer in others} == {'absmean_ternary'}
    assert {layer.weights.name for layer in (first, last)} == {'lsq'}
    with pytest.raises(UserError, match="weights='binary' must be lsq or ternary"):
        recipe.get_config('weights=binary')
