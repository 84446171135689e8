"""Trains or evaluates a low-precision network by block replacement; see README.md."""

import errno
import logging
import re
import sys
import tempfile
import traceback
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

try:
    import jax  # noqa: F401
except ValueError as problem:  # JAX rejects the value of an environment variable
    sys.exit(f'Error: {problem}. Unset the variable, or give it a value that JAX accepts.')

from bqat_jax.distributed.preemption import Stopped
from bqat_jax.distributed.processes import initialize
from bqat_jax.errors import UserError
from bqat_jax.experiment.command_line import CommandLine, read_command_line, unset
from bqat_jax.experiment.compilation import keep_compiled
from bqat_jax.registry import loaded_plugins, place_in_plugins
from bqat_jax.storage import address_in, is_of_bucket, place, set_patience
from bqat_jax.storage import explain as explain_bucket

MODES = ('train', 'evaluate', 'import', 'summary', 'diagnose', 'export', 'report', 'sweep')
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# A failed write raises them without a file name.
DISK_ERRORS = (*FULL, errno.EROFS, errno.EIO, errno.ESTALE)
DEFAULT_RECIPE = Path(__file__).resolve().parent / 'configs' / 'digits.py'


def define_flags(argv: list[str]) -> CommandLine:
    """Defines the flags; those of the config are read from the command line here.

    Raises:
        UserError: for a recipe that cannot be loaded, or a key that it does not have.
    """
    given = read_command_line(flags.FLAGS.read_flags_from_files(argv, force_gnu=False), DEFAULT_RECIPE)
    text = 'Recipe, with arguments after a colon: configs/digits.py:bits=2,plan=prefix'
    config_flags.DEFINE_config_dict('config', given.config, text, sys_argv=given.argv)
    flags.DEFINE_string('workdir', None, 'Folder of the run; runs/<recipe> by default. Run again to resume.')
    flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
    return given


def main(argv: list[str], given: CommandLine) -> None:
    """Dispatches on --mode."""
    if len(argv) > 1:
        raise UserError(f'{" ".join(argv[1:])!r} is not understood. Write flags as --name=value.')
    # Imported here: --help and a mistyped flag should not wait a second for these modules.
    from bqat_jax.experiment import run as runs
    from bqat_jax.experiment.environment import check_processes

    config, mode, name = flags.FLAGS.config, flags.FLAGS.mode, given.recipe.stem
    unset(config, given.unset)
    set_patience(config.storage.patience)
    initialize(config.distributed)
    check_processes(config, mode)
    keep_compiled(config.compilation_cache)
    workdir = place(Path('runs') / name if flags.FLAGS.workdir is None else flags.FLAGS.workdir, '--workdir')
    changes = {**config_flags.get_override_values(flags.FLAGS['config']), **dict.fromkeys(given.unset)}
    record = {'name': name, 'overrides': changes}
    if mode == 'train':
        result = runs.train(config, workdir, **record)
    elif mode == 'import':
        result = runs.import_partner(config, workdir, **record)
    elif mode == 'summary':
        result = runs.summarize_network(config, workdir)
    elif mode == 'diagnose':
        result = runs.diagnose_run(config, workdir)
    elif mode == 'export':
        from bqat_jax.experiment.exporting import export_run

        result = export_run(config, workdir)
    elif mode == 'report':
        from bqat_jax.sweeps.reporting import report

        result = report(config, workdir)
    elif mode == 'sweep':
        from bqat_jax.sweeps.execution import run_sweep

        result = run_sweep(config, workdir, name=name)
    else:
        result = runs.evaluate_run(config, workdir)
    print('\n'.join(f'{key}: {value}' for key, value in result.items()))


def explain(error: Exception) -> str | None:
    """Returns a message for an error that the user can fix, or None for another."""
    text = str(error)
    if isinstance(error, UserError | flags.Error):
        return text
    if isinstance(error, OSError) and (error.filename is not None or error.errno in DISK_ERRORS):
        remedy = 'Free some space' if error.errno in FULL else 'Use a path that can be read and written'
        return f'{text}. {remedy}; run the same command again to resume.'
    bucket = address_in(error) or named_bucket(sys.argv[1:])
    if bucket is not None and is_of_bucket(error):
        return f'A request to a bucket failed: {explain_bucket(error, bucket)}'
    if isinstance(error, MemoryError) or 'RESOURCE_EXHAUSTED' in text:
        return (
            f'The memory is full ({text.partition(chr(10))[0][:300]}). Use smaller batches (train.batch_size), run '
            'them in parts (train.microbatches), recompute blocks (network.remat), shard arrays over devices '
            '(mesh.fsdp), or leave the images on the host (data.on_device=false). Saved checkpoints are kept.'
        )
    return explain_with_plugins(error) if loaded_plugins() else None


def named_bucket(argv: list[str]) -> str | None:
    """Returns the first address in a bucket that a command line names; None if there is none."""
    match = re.search(r'(gs|s3)://[^\s,]+', ' '.join(argv))
    return match and match[0]


def explain_with_plugins(error: Exception) -> str:
    """Returns a message for an error that a plugin may have caused; the traceback goes to a file."""
    where = place_in_plugins(error) or f'With the plugins {", ".join(loaded_plugins())} the program'
    with tempfile.NamedTemporaryFile('w', prefix='bqat_jax_', suffix='.txt', delete=False) as file:
        file.write(''.join(traceback.format_exception(error)))
    what = f'{type(error).__name__}: {str(error).partition(chr(10))[0]}'
    return f'{where} raised {what}. The traceback is in {file.name}.'


def run() -> None:
    """Runs main; an error that the user can fix is printed without a traceback."""
    # Only this program's messages are shown: libraries warn of folders that do not exist yet, and their errors are
    # raised here anyway.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    ours = logging.getLogger('bqat_jax')
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(logging.StreamHandler())
    try:
        given = define_flags(sys.argv)
        app.run(lambda argv: main(argv, given), argv=given.argv, flags_parser=flags.FLAGS)
    except Stopped as stopped:
        print(stopped)
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        sys.exit(f'Error: {explanation}')


if __name__ == '__main__':
    run()
