"""Trains or evaluates a low-precision network by block replacement; see README.md."""

import errno
import logging
import re
import sys
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from bqat_jax.distributed.preemption import Stopped
from bqat_jax.distributed.processes import initialize
from bqat_jax.errors import UserError
from bqat_jax.experiment.compilation import keep_compiled
from bqat_jax.experiment.run import diagnose_run, evaluate_run, import_partner, summarize_network, train

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
DEFAULT_CONFIG = Path(__file__).resolve().parent / 'configs' / 'digits.py'


def define_flags() -> None:
    """Defines the flags; the config's own are read from the command line at once.

    Raises:
        UserError: for a key that the config does not have.
    """
    try:
        config_flags.DEFINE_config_file(
            'config',
            str(DEFAULT_CONFIG),
            'Recipe, with arguments after a colon: configs/digits.py:bits=2,plan=prefix',
        )
    except AttributeError as error:  # ml_collections names the key, and one that is like it if there is one
        named = re.search(r"""instead of "(\w+)"|^"?'(\w+)'"?$""", str(error))
        if named is None:
            raise
        near = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f'Did you mean "{near[1]}"?' if near else 'bqat_jax/experiment/configuration.py lists all keys.'
        raise UserError(f'The config has no key {named[1] or named[2]!r}. {hint}') from error
    flags.DEFINE_string('workdir', None, 'Where the run goes; runs/<config name> if not given. Run again to continue.')
    flags.DEFINE_enum('mode', 'train', ['train', 'evaluate', 'import', 'summary', 'diagnose', 'sweep'], 'What to do.')


def main(argv: list[str]) -> None:
    """Dispatches on --mode."""
    if len(argv) > 1:
        raise UserError(f'{" ".join(argv[1:])!r} is not understood; write flags as --name=value.')
    config = flags.FLAGS.config
    initialize(config.distributed)
    keep_compiled(config.compilation_cache)
    name = config_flags.get_config_filename(flags.FLAGS['config']).partition(':')[0]
    workdir = Path(flags.FLAGS.workdir or Path('runs') / Path(name).stem)
    record = {'name': Path(name).stem, 'overrides': config_flags.get_override_values(flags.FLAGS['config'])}
    if flags.FLAGS.mode == 'train':
        result = train(config, workdir, **record)
    elif flags.FLAGS.mode == 'import':
        result = import_partner(config, workdir, **record)
    elif flags.FLAGS.mode == 'summary':
        result = summarize_network(config, workdir)
    elif flags.FLAGS.mode == 'diagnose':
        result = diagnose_run(config, workdir)
    elif flags.FLAGS.mode == 'sweep':
        # Only here: its plots take a second to load.
        from bqat_jax.sweeps.execution import run_sweep

        result = run_sweep(config, workdir, name=record['name'])
    else:
        result = evaluate_run(config, workdir)
    print('\n'.join(f'{key}: {value}' for key, value in result.items()))


def explain(error: Exception) -> str | None:
    """Returns what went wrong with flags or config in plain words, or None if it is no mistake of the user's."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if 'UserError: ' in text:  # raised in a recipe; ml_collections hands on its whole traceback as text
        return text.rpartition('UserError: ')[2].strip()
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return f'{text}. Make room or take another --workdir; run the same command again to go on.'
    if isinstance(error, flags.Error) or text.startswith('Configuration is not available'):
        return text
    return None


def run() -> None:
    """Runs main; a mistake that the user can mend is told in plain words, without a traceback."""
    # Our own words are shown; of the libraries' only errors: they warn of folders that are merely not there yet.
    absl_logging.set_verbosity(absl_logging.ERROR)
    # What failed in a thread of Orbax's is raised in ours too.
    logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    ours = logging.getLogger('bqat_jax')
    ours.setLevel(logging.INFO)
    ours.propagate = False
    ours.addHandler(logging.StreamHandler())
    try:
        define_flags()
        app.run(main, flags_parser=flags.FLAGS)
    except Stopped as stopped:
        print(stopped)
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        sys.exit(f'Error: {explanation}')


if __name__ == '__main__':
    run()
