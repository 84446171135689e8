"""Checks that modules are Linen modules: their calls can be intercepted, those of NNX modules cannot."""

import contextlib
from typing import Any

import flax.linen as nn

from bqat_jax.interception import intercept_methods

REMEDY = 'this project wraps Linen modules. Write the module with flax.linen.'


def check_linen(module: Any) -> None:
    """Checks that a module is a Linen module.

    Raises:
        ValueError: for an `nnx.Module`, including one wrapped by `nnx.bridge.to_linen`, or any other object.
    """
    if _is_nnx(module):
        raise ValueError(f'{_name(module)} is an nnx.Module: {REMEDY}')
    if not isinstance(module, nn.Module):
        raise ValueError(f'module={module!r}: not a Linen module. Give an instance of a subclass of flax.linen.Module.')


def check_called() -> contextlib.AbstractContextManager:
    """Returns a context in which the call of a module that wraps an `nnx.Module` raises ValueError."""

    def interceptor(call, args, kwargs, context):
        if _is_nnx(context.module):
            path = '/'.join(context.module.path)
            raise ValueError(f'{path!r} ({_name(context.module)}) is an nnx.Module: {REMEDY}')
        return call(*args, **kwargs)

    return intercept_methods(interceptor)


def _is_nnx(module: Any) -> bool:
    """Checks by name, because `flax.nnx` is slow to import."""
    return any(kind.__module__.startswith('flax.nnx.') for kind in type(module).__mro__)


def _name(module: Any) -> str:
    inner = module.nnx_class if isinstance(module, nn.Module) else type(module)  # `to_linen` stores the class.
    return getattr(inner, '__name__', str(inner))
