"""A user's own estimators and quantizers: Python files, run before the config is resolved."""

import importlib.util
import sys
import zlib
from pathlib import Path

from bqat_jax.errors import UserError


def load_plugins(text: str | None) -> tuple[Path, ...]:
    """Runs the files that `config.plugins` names, so that what they register can be named in the config.

    A file that has been run in this process, and has not changed since, is not run again.

    Args:
        text: paths, separated by commas; or None.

    Returns:
        The files.

    Raises:
        UserError: for a file that is not there, or fails.
    """
    files = tuple(Path(part.strip()) for part in (text or '').split(',') if part.strip())
    for file in files:
        if not file.is_file():
            raise UserError(f'plugins={text!r}: there is no file {file}. Give the path of a Python file.')
        stamp = (str(file.resolve()), file.stat().st_mtime_ns)
        # Two files may have the same name.
        name = f'bqat_jax_plugin_{file.stem}_{zlib.crc32(stamp[0].encode()):08x}'
        if getattr(sys.modules.get(name), 'stamp', None) == stamp:
            continue
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise UserError(f'plugins={text!r}: {file} is not a Python file; its name must end in .py.')
        module = importlib.util.module_from_spec(spec)
        # Registered under its name, as dataclasses look up the module of a class.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UserError(f'The plugin {file} failed: {type(error).__name__}: {error}') from error
        vars(module)['stamp'] = stamp
    return files
