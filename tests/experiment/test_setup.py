"""From a config to an experiment."""

import jax
import jax.numpy as jnp
import pytest
import rich.console

from benchmarks.bench import described_images
from bqat_jax.experiment.setup import make_experiment
from tests.conftest import ROOT
from tests.experiment.test_configuration import load_recipe
from tests.programs import count_operations


@pytest.mark.parametrize('devices', [1, 8])
def test_only_programs_for_one_device_have_convolutions_of_our_own(devices, tmp_path):
    """With several, XLA's CPU devices could wait for each other for ever; see `bqat_jax.networks.convolution`."""
    config = load_recipe(ROOT / 'configs' / 'digits.py').get_config()
    config.network.width, config.mesh.data = 4, devices
    console = rich.console.Console(quiet=True)
    experiment = make_experiment(config, tmp_path, console, images=described_images('digits'))
    network = experiment.network
    variables = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), experiment.shapes)

    def logits(params):
        return network.as_function(variables, train=False)(params, jnp.zeros((2, 8, 8, 1)))[0]

    count = count_operations(jax.make_jaxpr(logits)(variables['params']).jaxpr, 'custom_vjp_call')
    assert (count == 7) if devices == 1 else (count == 0)  # a ResNet-8 with shortcut A has seven convolutions
