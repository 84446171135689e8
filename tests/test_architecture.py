"""Imports go one way: what each package of the project may import."""

import ast
import sys

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / 'bqat_jax'
# The packages of the library, then those of the program, and what each may import of the others. Modules beside them
# count as packages; all may import `errors`.
LIBRARY = {
    'registry': set(),
    'quantizers': {'registry'},
    'interception': set(),
    'jaxprs': set(),
    'transform': {'quantizers', 'interception', 'jaxprs', 'registry'},
    'blocks': {'interception', 'jaxprs'},
    'networks': {'blocks', 'interception', 'registry'},
    'replacement': {'transform', 'blocks', 'quantizers', 'registry'},
    'distributed': set(),
    'export': {'replacement', 'transform', 'blocks', 'networks', 'quantizers', 'interception', 'jaxprs', 'registry'},
    'training': {'replacement', 'distributed', 'transform', 'blocks', 'networks', 'quantizers'},
}
BELOW = set(LIBRARY)
PROGRAM = {
    'storage': {'distributed'},
    'data': {'replacement', 'registry', 'storage'},
    'analysis': BELOW | {'storage'},
    'report': BELOW | {'analysis'},
    'experiment': BELOW | {'analysis', 'report', 'data', 'storage', '__init__'},
    'sweeps': {'experiment', 'report', 'replacement', 'distributed', 'registry', 'storage'},
}
FACE = {'__init__': BELOW - {'training', 'distributed', 'registry', 'export', 'jaxprs'}}
ARROWS = {**LIBRARY, **PROGRAM, **FACE}
# What the library needs to be installed, and what it reads files with if that is there.
LIBRARY_PACKAGES = {'jax', 'flax', 'optax', 'numpy'}
OPTIONAL = {
    'networks/torch_files.py': {'torch', 'safetensors'},
    'export/checkpoint.py': {'safetensors'},
    'export/loading.py': {'onnxruntime'},
    'export/__main__.py': {'PIL'},
    **{f'export/onnx{part}.py': {'onnx'} for part in ('', '_graph', '_model', '_program')},
}


def modules():
    return [pytest.param(path, id=str(path.relative_to(PACKAGE))) for path in sorted(PACKAGE.rglob('*.py'))]


def package_of(path):
    first, *rest = path.relative_to(PACKAGE).parts
    return first if rest else first.removesuffix('.py')


def imports(path):
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: imports are absolute'
            yield node.module or ''


def packages_of(path):
    """The other packages that a file imports."""
    for name in imports(path):
        first, *rest = name.split('.')
        if first == 'bqat_jax':
            other = rest[0] if rest else '__init__'
            if other not in (package_of(path), 'errors'):
                yield other


@pytest.mark.parametrize('path', modules())
def test_imports_go_one_way(path):
    if package_of(path) != 'errors':
        assert set(packages_of(path)) <= ARROWS[package_of(path)]


def test_the_arrows_make_no_circle():
    left = {name: others - {'__init__'} for name, others in ARROWS.items() if name != '__init__'}
    while left:
        free = {name for name, others in left.items() if not others & set(left)}
        assert free, f'a circle: {left}'
        left = {name: others for name, others in left.items() if name not in free}


def test_nothing_in_the_library_imports_the_program():
    for name, others in {**LIBRARY, **FACE}.items():
        assert not others & set(PROGRAM), name


@pytest.mark.parametrize('path', modules())
def test_the_library_needs_few_packages(path):
    """The quantizers only jax and numpy, so that anyone can lift them out."""
    outside = {name.split('.')[0] for name in imports(path)} - sys.stdlib_module_names - {'bqat_jax'}
    if package_of(path) == 'quantizers':
        assert outside <= {'jax', 'numpy'}
    elif package_of(path) not in PROGRAM:
        assert outside <= LIBRARY_PACKAGES | OPTIONAL.get(str(path.relative_to(PACKAGE)), set())


def test_the_architecture_page_names_every_package():
    page = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    for name in {*LIBRARY, *PROGRAM} - {'registry', 'interception', 'jaxprs'}:
        assert f'  {name}/' in page, name
