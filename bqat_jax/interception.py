"""Flax method interceptors that also apply to programs that JAX has already traced.

JAX traces a jitted function once per argument shapes, and `nn.jit` once for all instances of a class. A plain
interceptor would miss the later calls, and the changes of an earlier interceptor would persist. Here every interceptor,
and every call within it, has a separate key in JAX's caches.
"""

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import flax.linen as nn
import jax

_KEY = jax.make_user_context(None)
Interceptor = Callable[[Callable[..., Any], Any, Any, Any], Any]


def without_modules() -> contextlib.AbstractContextManager:
    """Returns a context for functions that call no module, in which JAX's caches work as outside interceptors.

    Without it, every `jax.numpy` function is traced again in every layer.
    """
    return _KEY(None)


@contextlib.contextmanager
def intercept_methods(interceptor: Interceptor, key: Hashable = None) -> Iterator[None]:
    """Replaces every call of a module's method by `interceptor(call, args, kwargs, context)` inside the context.

    Args:
        interceptor: a function for `flax.linen.intercept_methods`.
        key: interceptors with equal keys share traced programs, so they must behave identically. None: no sharing.
    """
    key, numbers = object() if key is None else key, itertools.count()

    def intercept(call, args, kwargs, context):
        # The key stays until the enclosing call ends: Flax enters the programs of `nn.jit` between two calls.
        running[-1].enter_context(_KEY((key, next(numbers))))
        with contextlib.ExitStack() as own:
            running.append(own)
            try:
                return interceptor(call, args, kwargs, context)
            finally:
                running.pop()

    with contextlib.ExitStack() as outermost:
        running = [outermost]
        outermost.enter_context(_KEY((key, None)))
        with nn.intercept_methods(intercept):
            yield
