"""The cache of compiled programs on disk, and compilation in a thread."""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from bqat_jax.errors import UserError
from bqat_jax.storage import check_reachable, place


def keep_compiled(folder: str | None) -> None:
    """Sets the folder of JAX's compilation cache; call it before anything is compiled.

    Args:
        folder: its path; `~` is the home folder. With None nothing changes, and JAX_COMPILATION_CACHE_DIR applies.

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
    # Small programs are cached too: a run compiles dozens of them before its first step.
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@contextlib.contextmanager
def compiled_beside(function: Any, *arguments: Any) -> Iterator[Callable[[], None]]:
    """Traces a jitted function in this thread and compiles it in another.

    Call the function itself afterwards: JAX uses the compiled program if the arguments have these shapes, dtypes and
    shardings, and compiles again if not.

    Args:
        function: jitted.
        *arguments: arrays, or `jax.ShapeDtypeStruct`s with shardings.

    Yields:
        A function that waits for the compilation and raises its error, if any. Leaving the context waits too, since
        XLA's compilation cannot be interrupted.
    """
    lowered = function.lower(*arguments)
    with ThreadPoolExecutor(1, 'compilation') as pool:
        compiling = pool.submit(lowered.compile)

        def wait() -> None:
            compiling.result()

        yield wait
