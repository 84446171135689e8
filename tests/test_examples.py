"""The example notebooks run as they are."""

import base64

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'examples').glob('*.ipynb'))


@pytest.mark.slow
@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path, monkeypatch, tmp_path):
    nbclient = pytest.importorskip('nbclient', reason='nbclient, which runs notebooks, is not installed')
    nbformat = pytest.importorskip('nbformat', reason='nbformat, which reads notebooks, is not installed')
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells), 'notebooks are kept without what they print'
    for name, value in {
        'XLA_FLAGS': '',  # optimised, as its loops are long
        'PYTHONPATH': str(ROOT),
        'IPYTHONDIR': str(tmp_path),
        'JUPYTER_CONFIG_DIR': str(tmp_path),
        'JUPYTER_PLATFORM_DIRS': '1',
    }.items():
        monkeypatch.setenv(name, value)
    done = nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute(cwd=str(tmp_path))
    outputs = [output for cell in done.cells if cell.cell_type == 'code' for output in cell.outputs]
    text = ''.join(output.text for output in outputs if output.output_type == 'stream' and output.name == 'stdout')
    accuracies = [float(word.strip(',')) for word in text.split() if word.strip(',').startswith('0.')]
    assert len(accuracies) == 3 and min(accuracies) > 0.9, text
    (picture,) = [output.data['image/png'] for output in outputs if 'image/png' in output.get('data', {})]
    assert base64.b64decode(picture).startswith(b'\x89PNG')
