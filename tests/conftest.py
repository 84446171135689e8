"""Every test runs under the strictest settings: what they forbid is where quantization code goes wrong."""

import atexit
import os
import shutil
import tempfile

# Before jax is imported. Eight devices to share a batch, which wait for each other however busy the machine is (XLA
# ends the process after 40 seconds otherwise). Programs run for moments here: it does not pay to optimise them.
os.environ['XLA_FLAGS'] = (
    '--xla_force_host_platform_device_count=8 --xla_cpu_collective_call_terminate_timeout_seconds=600 '
    '--xla_backend_optimization_level=0 ' + os.environ.get('XLA_FLAGS', '')
)
# What one test or process has compiled the others need not.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='bqat_jax_tests_')
    atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

from pathlib import Path

import jax
import pytest

from bqat_jax.data.sources import DATASETS
from bqat_jax.networks import NETWORKS
from bqat_jax.quantizers import ESTIMATORS, QUANTIZERS
from bqat_jax.replacement import plans
from bqat_jax.replacement.plans import PLANS
from bqat_jax.replacement.schedules import SCHEDULES
from bqat_jax.replacement.tasks import TASKS

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Where processes that tests kill keep compiled programs. What one was writing then is useless, and stays.
KILLED_CACHE = f'{os.environ["JAX_COMPILATION_CACHE_DIR"]}/killed'
# XLA_FLAGS of programs that tests start: one device, and programs in the same haste.
ONE_DEVICE = '--xla_backend_optimization_level=0'
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Folder with real CIFAR-10 and full-precision weights, for measuring."""
    if not SHARED.is_dir():
        pytest.skip(f'{SHARED} with CIFAR-10 and full-precision weights is absent')
    return SHARED


@pytest.fixture
def registries(monkeypatch):
    """What a test registers is forgotten after it."""
    for registry in (DATASETS, ESTIMATORS, NETWORKS, PLANS, QUANTIZERS, SCHEDULES, TASKS):
        monkeypatch.setattr(registry, 'entries', dict(registry.entries))
    monkeypatch.setattr(plans, 'DRAWN', set(plans.DRAWN))


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory) -> str:
    """Where the digits are prepared, once for all tests."""
    return str(tmp_path_factory.mktemp('data'))
