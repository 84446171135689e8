"""Flax's method interceptors, in force also where JAX has traced a program before.

JAX traces a jitted function once for arguments of the same shapes, and `nn.jit` does so for all instances of a class.
An interceptor would see nothing of the later calls, and what an earlier one changed would stay. Here whatever follows
the beginning of an interceptor, or of a call within it, has a key of its own in JAX's caches.
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
    """Returns a context for functions that call no module: JAX's caches serve them as they do outside interceptors.

    Without it every function of `jax.numpy` is traced again in every layer.
    """
    return _KEY(None)


@contextlib.contextmanager
def intercept_methods(interceptor: Interceptor, key: Hashable = None) -> Iterator[None]:
    """Within it `interceptor(call, args, kwargs, context)` replaces every call of a module's method.

    Args:
        interceptor: as `flax.linen.intercept_methods` takes it.
        key: equal for interceptors that do the same, which may then share programs; by default none does.
    """
    key, numbers = object() if key is None else key, itertools.count()

    def intercept(call, args, kwargs, context):
        # It stays until the call around this one ends: Flax enters the programs of `nn.jit` between two calls.
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
