"""No format changes an answer of networks that were trained: every image of the digits, in every runtime."""

import io
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import rich.console

from bqat_jax.data.pipeline import read_whole
from bqat_jax.experiment.exporting import freeze_run
from bqat_jax.experiment.finished import open_run
from bqat_jax.export import export_stablehlo
from bqat_jax.export.inference import Program, arrays_of
from bqat_jax.export.onnx import export_onnx
from bqat_jax.export.verification import Run, compare
from bqat_jax.export.watching import Watch
from tests.conftest import ROOT
from tests.experiment.test_configs import load_recipe

pytestmark = pytest.mark.slow
SETTINGS = {
    'w2a2': {},
    'w4a4': {'weights.bits': 4, 'activations.bits': 4},
    'w3a3': {
        'weights.bits': 3,
        'activations.bits': 3,
        'weights.granularity': 'channel',
        'activations.name': 'lsq_plus',
    },
}


@pytest.fixture(scope='module')
def partner(tmp_path_factory):
    """The workdir of the first run, whose partner the others take."""
    return tmp_path_factory.mktemp('run') / 'w2a2'


@pytest.fixture(scope='module', params=SETTINGS)
def trained(request, digits_dir, partner):
    """(what is exported, all 1,797 images)."""
    workdir, config = partner.with_name(request.param), load_recipe(ROOT / 'configs' / 'digits.py').get_config(None)
    config.data.dir, config.mesh.data = digits_dir, 1
    changes = {f'quant.{name}': value for name, value in SETTINGS[request.param].items()}
    if workdir != partner:
        changes['partner.workdir'] = config.partner.workdir = str(partner)
    for name, value in SETTINGS[request.param].items():
        section, key = name.split('.')
        config.quant[section][key] = value
    flags = [f'--config.{name}={value}' for name, value in changes.items()]
    command = [
        sys.executable,
        'main.py',
        f'--workdir={workdir}',
        f'--config.data.dir={digits_dir}',
        '--config.report=false',
    ]
    command += flags
    # Optimised, as programs of tests are not, and on one device.
    subprocess.run([*command, '--config.mesh.data=1'], cwd=ROOT, env={**os.environ, 'XLA_FLAGS': ''}, check=True)
    experiment, finished = open_run(config, workdir, rich.console.Console(file=io.StringIO()))
    splits = [read_whole(split)['image'] for split in (experiment.data.images.train, experiment.data.images.test)]
    held_out = experiment.data.images.validation
    images = np.concatenate([*splits, read_whole(held_out)['image']] if len(held_out) else splits)
    assert len(images) == 1797
    return freeze_run(experiment, finished), images


def check(exported, images, run):
    """Codes, answers and outputs are those of the fake-quantized network; an image that differs has another code."""
    expected = jax.device_get(exported.reference.run_with_codes(images))
    agreement = compare(expected, jax.device_get(run(images)), np.ones(len(images), bool))
    assert agreement.examples == 1797
    assert agreement.answers_differ == 0
    assert agreement.relative_difference < 1e-5
    return agreement


@pytest.mark.parametrize('arithmetic', ['float32', 'int8'])
def test_packed_codes_change_no_answer(trained, arithmetic):
    exported, images = trained
    run = jax.jit(Program(exported.frozen, exported.network, arithmetic).run_with_codes)
    check(exported, images, lambda images: Run(*run(arrays_of(exported.frozen), images)))


def test_stablehlo_changes_no_answer(trained):
    exported, images = trained
    program = jax.export.deserialize(bytearray(export_stablehlo(exported.frozen, exported.network, with_codes=True)))
    check(exported, images, lambda images: Run(*program.call(images)))


@pytest.mark.parametrize('kind', ['onnx', 'qcdq'])
@pytest.mark.parametrize('level', ['ORT_ENABLE_ALL', 'ORT_DISABLE_ALL'])
def test_onnx_changes_no_answer(trained, level, kind):
    onnxruntime = pytest.importorskip('onnxruntime')
    exported, images = trained
    has_offsets = any(layer.inputs.decoding.shift.any() for layer in exported.frozen.layers.values())
    if kind == 'qcdq' and has_offsets:
        pytest.skip('QCDQ has no offsets')
    watch, options = Watch(), onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    model = export_onnx(exported.frozen, exported.network, qcdq=kind == 'qcdq', watch=watch)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    names = [x.name for x in session.get_outputs()]

    def run(images):
        results = dict(zip(names, session.run(names, {'input': images}), strict=True))
        return Run(results['output'], {watch.path_of(name): [results[name]] for name in names if '@' in name})

    check(exported, images, run)
