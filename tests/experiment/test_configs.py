import json

import jax
import numpy as np
import pytest
import rich.console

from benchmarks.bench import described_images
from bqat_jax.blocks.exploring import with_inputs
from bqat_jax.experiment.configuration import to_plain
from bqat_jax.experiment.setup import make_experiment
from bqat_jax.networks.registry import make_network
from bqat_jax.replacement.network_layers import find_network_layers
from bqat_jax.training.optimizer import make_optimizer
from bqat_jax.training.regularizers import Regularizers
from bqat_jax.transform.rules import assign_quantizers
from tests.conftest import ROOT
from tests.experiment.test_configuration import RECIPES, load_recipe

INPUTS = {
    'imagenet2012': (224, 224, 3),
    'digits': (8, 8, 1),
    'digits_segmentation': (16, 16, 1),
    'python_bytes': jax.ShapeDtypeStruct((64,), np.int32),
}


@pytest.fixture(scope='module', params=RECIPES, ids=lambda path: path.stem)
def config(request):
    return load_recipe(request.param).get_config(None)


def find_quantizable(config):
    """The layers of a recipe's network, on images of its dataset's size; nothing is computed."""
    options = {key: value for key, value in config.network.items() if key != 'name'}
    network = make_network(config.network.name, 10, config.replacement.cut, options)
    network = with_inputs(network, INPUTS.get(config.data.name, (32, 32, 3)))
    return find_network_layers(network, jax.eval_shape(network.init, jax.random.key(0))).quantizable


def assign(config, layers):
    return assign_quantizers(tuple(layers), config.quant.weights, config.quant.activations, config.quant.rules)


def test_the_recipe_is_json(config):
    plain = to_plain(config)
    assert json.loads(json.dumps(plain)) == plain


def test_every_rule_is_of_a_layer_of_the_network(config):
    layers = find_quantizable(config)
    # A rule that applies to nothing is refused, and so is what cannot be done about oscillations.
    settings = assign(config, layers)
    regularizers = Regularizers(**config.quant.oscillations)
    for path, layer in settings.items():
        regularizers.check(path, layer.weights.make(of_weights=True, signed=True), layers[path])
    first, *others, last = (layer.weights.bits for layer in settings.values())
    assert (first, last) == (8, 8)
    assert set(others) == {config.quant.weights.bits}


def test_the_recipe_is_an_experiment(config, tmp_path):
    """On one device, its dataset described and not read."""
    images, console = described_images(config.data.name), rich.console.Console(quiet=True)
    experiment = make_experiment(config, tmp_path, console, images=images, devices=jax.devices()[:1])
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


def test_depthwise_layers_may_have_bits_of_their_own():
    config = load_recipe(ROOT / 'configs' / 'imagenet_mobilenet_v2.py').get_config('bits=4,depthwise=6')
    settings = assign(config, find_quantizable(config))
    assert {layer.weights.bits for path, layer in settings.items() if '/depthwise/' in path} == {6}
    assert {layer.activations.bits for path, layer in settings.items() if '/project/' in path} == {4}
