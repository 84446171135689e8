import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.bench import make_bench
from benchmarks.step import PLANS, change_config, expected_units, table
from tests.conftest import ONE_DEVICE, ROOT
from tests.experiment.test_configuration import load_recipe


def recipe():
    config = load_recipe(ROOT / 'configs' / 'digits.py').get_config()
    config.network.width, config.train.batch_size, config.mesh.data = 4, 16, 1
    return config


@pytest.mark.parametrize(
    'variant', ['fp', 'lsq', 'recipe', 'distillation', 'bf16:lsq', 'estimator:dsq', 'replicas:2', *PLANS]
)
def test_every_variant_is_a_config_that_works(variant):
    config = change_config(recipe(), variant)
    bench = make_bench(config, with_arrays=False)
    assert (bench.partner is None) == (variant in ('fp', 'lsq', 'bf16:lsq', 'estimator:dsq', 'replicas:2'))
    assert bool(bench.phase.spec.replacement.quantization.layers) == (variant != 'fp')


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match='lsqq'):
        change_config(recipe(), 'lsqq')


def test_units_are_those_of_the_docs():
    assert [expected_units(name, 3) for name in ('fp', 'lsq', 'distillation', 'prefix', 'prefix_sampled')] == [
        3,
        3,
        4,
        6,
        5,
    ]
    assert expected_units('replicas:4', 3) == 12 and expected_units('bernoulli', 3) is None


def test_the_table_compares_with_the_first():
    measured = {
        'fp': {'seconds': [1.0, 2.0, 3.0], 'images': 10, 'resident': 2**20, 'flops': 4e9, 'ceiling': 8e9},
        'prefix': {'seconds': [8.0, 8.0, 8.0], 'images': 10, 'resident': 2**20, 'blocks': 3},
    }
    first, second = table(measured).splitlines()[2:]
    assert first.startswith('| fp | 2000.0 | 1000.0-3000.0 | 5 | 1.00 | 1.00 | 1.00 |') and first.endswith(
        '| 2 | 25 % |'
    )
    assert second.startswith('| prefix | 8000.0 | 8000.0-8000.0 | 1 | 4.00 | 2.00 | 2.00 |')


@pytest.mark.slow
def test_a_short_measurement(tmp_path):
    flags = ['--config=configs/digits.py', '--config.network.width=4', '--config.train.batch_size=16']
    command = [sys.executable, '-m', 'benchmarks.step', *flags, '--variants=fp,lsq', '--turns=2', '--steps=1']
    subprocess.run(
        [*command, f'--output={tmp_path}/measured.json'],
        cwd=ROOT, env={'XLA_FLAGS': ONE_DEVICE, 'JAX_PLATFORMS': 'cpu'}, check=True, timeout=300,
    )  # fmt: skip
    measured = json.loads((tmp_path / 'measured.json').read_text())
    assert list(measured) == ['fp', 'lsq'] and all(len(one['seconds']) == 2 for one in measured.values())
    assert (tmp_path / 'measured.md').read_text().count('\n') == 4


def test_pytorchs_step_is_lsqs():
    torch = pytest.importorskip('torch', reason='PyTorch, which the step is written in, is not installed')
    from benchmarks.torch_step import FakeQuantize, Step
    from bqat_jax.quantizers import LSQ

    v = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    tensor, step = torch.tensor(v, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    out = FakeQuantize.apply(tensor, step, -2, 1, 1 / np.sqrt(20))
    out.sum().backward()
    import jax

    quantizer = LSQ(bits=2)
    y, pullback = jax.vjp(lambda q, v: quantizer.fake_quantize(q, v), {'step_size': np.float32(0.3)}, v)
    of_parameters, of_v = pullback(np.ones_like(v))
    np.testing.assert_allclose(out.detach().numpy(), y, rtol=1e-6)
    np.testing.assert_allclose(tensor.grad.numpy(), of_v, rtol=1e-6)
    np.testing.assert_allclose(step.grad.numpy(), of_parameters['step_size'], rtol=1e-4)
    assert np.isfinite(Step(8, 4, 2, 4)(2))
