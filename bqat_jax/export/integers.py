"""Computes the integer-valued products of a traced program on integers: int8 if they fit, with int32 sums.

Arrays of integers in float32 are marked. Operations that only move elements keep the mark; a convolution or matrix
product of two marked operands is computed on integers, and its sums are cast to float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Literal, Var, jaxprs_in_params

from bqat_jax.jaxprs import consts_of, run_operation, scan_arguments

MARK = 'bqat_jax_whole:'
LARGEST_INT8 = 127
PRODUCTS = ('conv_general_dilated', 'dot_general')
# Operations whose result consists of elements of their first operand.
MOVES = (
    'reshape',
    'transpose',
    'squeeze',
    'broadcast_in_dim',
    'convert_element_type',
    'copy',
    'name',
    'rev',
    'slice',
    'stop_gradient',
)
CALLS = (
    'jit',
    'pjit',
    'closed_call',
    'core_call',
    'remat2',
    'checkpoint',
    'remat',
    'custom_jvp_call',
    'custom_vjp_call',
    'custom_vjp_call_jaxpr',
)
# The largest magnitude of integers; None for other arrays.
Bound = int | None


def mark_whole(x: jax.Array, largest: int) -> jax.Array:
    """Returns x, float32, marked as integers of at most this magnitude."""
    return checkpoint_name(x, f'{MARK}{largest}')


def as_integers(run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `run` with products of marked arrays computed on integers."""

    def integer_run(*arguments: Any) -> Any:
        program, shapes = jax.make_jaxpr(run, return_shape=True)(*arguments)
        leaves = jax.tree.leaves(arguments)
        results, _ = _evaluate(program.jaxpr, program.consts, leaves, [None] * len(leaves))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return integer_run


def _evaluate(
    program: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], bounds: Sequence[Bound]
) -> tuple[list[Any], list[Bound]]:
    """Evaluates a program; returns its results and their bounds."""
    values: dict[Var, Any] = dict(zip([*program.constvars, *program.invars], [*consts, *arguments], strict=True))
    known: dict[Var, Bound] = dict(zip(program.invars, bounds, strict=True))

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    def bound_of(x):
        return None if isinstance(x, Literal) else known.get(x)

    for operation in program.eqns:
        given, own = [read(x) for x in operation.invars], [bound_of(x) for x in operation.invars]
        kind = operation.primitive.name
        name = operation.params['name'] if kind == 'name' else ''
        of_results: Sequence[Bound] = [None] * len(operation.outvars)
        if kind in PRODUCTS and None not in own:
            results = [_product(operation, given, own)]
        elif kind in CALLS and _fits(operation, given):
            inner = next(iter(jaxprs_in_params(operation.params)))
            results, of_results = _evaluate(inner, consts_of(operation), given, own)
        elif kind == 'scan':
            results = _scan(operation, given, own)
        else:
            results = run_operation(program, operation, given)
            if name.startswith(MARK):
                of_results = [int(name.removeprefix(MARK))]
            elif kind in MOVES:
                of_results = own[:1]
        values |= dict(zip(operation.outvars, results, strict=True))
        known |= dict(zip(operation.outvars, of_results, strict=True))
    return [read(x) for x in program.outvars], [bound_of(x) for x in program.outvars]


def _fits(operation: Any, given: Sequence[Any]) -> bool:
    programs = list(jaxprs_in_params(operation.params))
    return bool(programs) and len(programs[0].invars) == len(given)


def _product(operation: Any, given: Sequence[Any], bounds: Sequence[Any]) -> jax.Array:
    """A convolution or matrix product on integers."""
    dtype = jnp.int8 if max(bounds) <= LARGEST_INT8 else jnp.int32
    params = {**operation.params, 'preferred_element_type': jnp.dtype(jnp.int32), 'precision': None}
    sums = operation.primitive.bind(*(x.astype(dtype) for x in given), **params)
    return sums.astype(operation.outvars[0].aval.dtype)


def _scan(operation: Any, given: Sequence[Any], bounds: Sequence[Bound]) -> list[Any]:
    (inner,) = jaxprs_in_params(operation.params)
    constant, carry, stacked = scan_arguments(operation, given)
    # Carries may hold anything after the first iteration.
    own = [*bounds[: len(constant)], *[None] * len(carry), *bounds[len(constant) + len(carry) :]]

    def body(carry, slices):
        results, _ = _evaluate(inner, consts_of(operation), [*constant, *carry, *slices], own)
        return results[: len(carry)], results[len(carry) :]

    options = {key: operation.params[key] for key in ('length', 'reverse')}
    carry, gathered = jax.lax.scan(body, carry, stacked, **options)
    return [*carry, *gathered]
