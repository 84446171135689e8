"""Compiled programs kept on disk, so that the next start need not compile them again; compilation beside other work."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from bqat_jax.errors import UserError
from bqat_jax.storage import check_reachable, place


def keep_compiled(folder: str | None) -> None:
    """Makes JAX keep what it compiles in a folder, and look there first; to be called before anything is compiled.

    Args:
        folder: where; `~` is the home folder. With None nothing changes, and JAX_COMPILATION_CACHE_DIR still counts.

    Raises:
        UserError: if the folder cannot be made.
    """
    if folder is None:
        return
    path = place(folder, 'compilation_cache')
    check_reachable(path, 'compilation_cache')
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'compilation_cache={folder!r}: the folder cannot be made ({error}).') from error
    jax.config.update('jax_compilation_cache_dir', str(path))
    # However quickly compiled and however small: a run compiles dozens of small programs before its first step.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@contextlib.contextmanager
def compiled_beside(function: Any, *arguments: Any) -> Iterator[Callable[[], None]]:
    """Within it a jitted function is compiled in a thread; it is traced before, in this one.

    The function itself is called as ever: where its arguments have these shapes, dtypes and shardings, JAX has the
    compiled program at hand, and else it compiles it when it is called.

    Args:
        function: jitted.
        *arguments: arrays, or `jax.ShapeDtypeStruct`s with shardings.

    Yields:
        A function that waits for the compilation, and raises what it raised. Leaving waits too, as a thread within XLA
        cannot be stopped.
    """
    lowered = function.lower(*arguments)
    with ThreadPoolExecutor(1, 'compilation') as pool:
        compiling = pool.submit(lowered.compile)

        def wait() -> None:
            compiling.result()

        yield wait
