"""Helpers that evaluate a traced program (a jaxpr) operation by operation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.extend.core import (
    ClosedJaxpr,  # pyright: ignore[reportPrivateImportUsage]  # JAX 0.12: Jaxpr, renamed
    Jaxpr,
    Literal,
    jaxpr_as_fun,
    jaxprs_in_params,
)


class ScanArguments(NamedTuple):
    """The arguments of a scan.

    Attributes:
        constant: read by every iteration.
        carry: passed from one iteration to the next.
        stacked: each iteration reads one slice.
    """

    constant: list[Any]
    carry: list[Any]
    stacked: list[Any]


def run_operation(program: Jaxpr, operation: Any, given: Sequence[Any]) -> list[Any]:
    """Runs a single operation of a program on the values of its arguments."""
    values = {x: value for x, value in zip(operation.invars, given, strict=True) if not isinstance(x, Literal)}
    one = program.replace(
        constvars=(),
        invars=list(values),
        outvars=operation.outvars,
        eqns=[operation],
        effects=operation.effects,
        debug_info=program.debug_info.with_unknown_names(),
    )
    return list(jaxpr_as_fun(ClosedJaxpr(one, ()))(*values.values()))


def consts_of(operation: Any) -> Sequence[Any]:
    """Returns the constants of the program that an operation runs."""
    return next((x.consts for x in operation.params.values() if isinstance(x, ClosedJaxpr)), ())


def scan_arguments(operation: Any, given: Sequence[Any]) -> ScanArguments:
    """Returns the arguments of a scan, classified by shape: `scan`'s parameters differ between JAX versions."""
    (inner,) = jaxprs_in_params(operation.params)
    results: list[Sequence[Any]] = [inner.outvars, operation.outvars]
    arguments: list[Sequence[Any]] = [inner.invars, operation.invars]
    carries = sum(_axes(own) == _axes(outer) for own, outer in zip(*results, strict=True))
    slices = sum(_axes(own) < _axes(outer) for own, outer in zip(*arguments, strict=True))
    fixed = len(given) - carries - slices
    whole = list(given)
    return ScanArguments(whole[:fixed], whole[fixed : fixed + carries], whole[fixed + carries :])


def _axes(x: Any) -> int:
    return jnp.ndim(x.val) if isinstance(x, Literal) else x.aval.ndim
