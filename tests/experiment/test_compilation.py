"""Compiled programs on disk."""

import os
import subprocess
import sys

import jax
import pytest

from bqat_jax.errors import UserError
from bqat_jax.experiment.compilation import keep_compiled
from tests.conftest import ROOT

PROGRAM = """
import sys
import jax
from bqat_jax.experiment.compilation import keep_compiled
keep_compiled(sys.argv[1])
print(jax.jit(lambda x: 2 * x + 1)(20.0))
"""


def test_a_second_process_adds_nothing(tmp_path):
    folder = tmp_path / 'to be made'

    def run():
        command = [sys.executable, '-c', PROGRAM, str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, capture_output=True, text=True, check=True
        )
        assert float(done.stdout) == 41
        return {path.name for path in folder.iterdir() if path.name.endswith('-cache')}

    kept = run()
    assert kept and run() == kept


def test_without_a_folder_nothing_changes():
    before = jax.config.jax_compilation_cache_dir
    keep_compiled(None)
    assert jax.config.jax_compilation_cache_dir == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='compilation_cache'):
        keep_compiled(str(tmp_path / 'file' / 'folder'))
