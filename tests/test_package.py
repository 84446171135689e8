"""The package: what it needs to be installed, and that the library works with that alone."""

import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import bqat_jax
from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
# What the program has besides; the library must do without.
PROGRAM_PACKAGES = ('tensorflow_datasets', 'grain', 'ml_collections', 'sklearn', 'tensorboardX', 'array_record')


def test_requirements_are_those_of_the_package():
    lines = (ROOT / 'requirements.txt').read_text(encoding='utf-8').splitlines()
    wanted = {line.partition('#')[0].strip() for line in lines} - {''}
    assert wanted == {*PROJECT['dependencies'], *PROJECT['optional-dependencies']['train']}


def test_every_public_name_is_there():
    assert bqat_jax.__version__
    for name in bqat_jax.__all__:
        assert getattr(bqat_jax, name).__module__.startswith('bqat_jax.'), name


def test_the_library_loads_nothing_of_the_program():
    code = f'import sys, bqat_jax; print([name for name in {PROGRAM_PACKAGES!r} if name in sys.modules])'
    loaded = subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert loaded.stdout.strip() == '[]'


@pytest.mark.slow
def test_the_wheel_with_its_own_requirements_runs_the_snippets(tmp_path):
    """In a fresh environment; it needs a package index."""
    source = tmp_path / 'source'  # a copy: setuptools builds beside what it builds
    shutil.copytree(ROOT / 'bqat_jax', source / 'bqat_jax', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('pyproject.toml', 'README.md', 'LICENSE'):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', str(tmp_path), str(source)]
    wheel = subprocess.run(command, capture_output=True, text=True, check=False)
    if wheel.returncode and 'No matching distribution' in wheel.stderr:
        pytest.skip('there is no package index to build with')
    assert wheel.returncode == 0, wheel.stderr
    (file,) = tmp_path.glob('bqat_jax-*.whl')
    subprocess.run([sys.executable, '-m', 'venv', str(tmp_path / 'fresh')], check=True)
    python = str(tmp_path / 'fresh' / 'bin' / 'python')
    subprocess.run([python, '-m', 'pip', 'install', '-q', str(file)], check=True, timeout=900)
    page = (ROOT / 'docs' / 'wrap_your_network.md').read_text(encoding='utf-8')
    (tmp_path / 'snippets.py').write_text('\n'.join(re.findall(r'^```python\n(.*?)^```', page, re.S | re.M)))
    absent = f'import importlib.util as u; assert not any(u.find_spec(name) for name in {PROGRAM_PACKAGES!r})'
    typed = 'import bqat_jax, pathlib; assert (pathlib.Path(bqat_jax.__file__).parent / "py.typed").is_file()'
    for arguments in (['-c', absent], ['-c', typed], ['snippets.py']):
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr
