"""Tags values anywhere in a program, including loops, branches and inner programs, and collects them.

A tag is a named identity in the traced program (a jaxpr). The evaluation inlines inner programs. A loop returns the
tagged values of all iterations along a leading axis. A branch of a conditional that is not taken returns -1 for
integers and zero for other values.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap
from jax.extend.core import Jaxpr, Literal, Var, jaxprs_in_params

from bqat_jax.jaxprs import consts_of, run_operation, scan_arguments

TAG = 'bqat_jax_tag:'
Collected = dict[int, list[list[jax.Array]]]


def tag(number: int, values: Sequence[jax.Array]) -> None:
    """Tags arrays as one record of number `number`; under `vmap`, the mapped axis becomes their first axis."""
    count = len(values)

    def mark(*values: jax.Array) -> list[jax.Array]:
        return [checkpoint_name(x, f'{TAG}{number}:{place}:{count}') for place, x in enumerate(values)]

    marked = custom_vmap(mark)

    @marked.def_vmap
    def _over(size, is_mapped, *values):
        whole = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, mapped in zip(values, is_mapped, strict=True)
        ]
        return marked(*whole), [True] * count

    marked(*values)


def collect_tagged(run: Callable[..., Any], *arguments: Any) -> Collected:
    """Returns the tagged values of `run(*arguments)`: for each number a list of records, each a list of arrays.

    Raises:
        ValueError: for a tag within a loop of unknown length (`while_loop`).
    """
    return run_and_collect(run, *arguments)[1]


def run_and_collect(run: Callable[..., Any], *arguments: Any) -> tuple[Any, Collected]:
    """Returns the results and the tagged values of `run(*arguments)`; see `collect_tagged`."""
    program, shapes = jax.make_jaxpr(run, return_shape=True)(*arguments)
    results, collected = _evaluate(program.jaxpr, program.consts, jax.tree.leaves(arguments))
    return jax.tree.unflatten(jax.tree.structure(shapes), results), collected


def _has_tags(program: Jaxpr) -> bool:
    return any(
        _name(operation) is not None or any(map(_has_tags, jaxprs_in_params(operation.params)))
        for operation in program.eqns
    )


def _name(operation: Any) -> str | None:
    name = operation.params['name'] if operation.primitive.name == 'name' else ''
    return name.removeprefix(TAG) if name.startswith(TAG) else None


def _evaluate(program: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> tuple[list[Any], Collected]:
    """Returns the results and the tagged values of a program."""
    values: dict[Var, Any] = dict(zip([*program.constvars, *program.invars], [*consts, *arguments], strict=True))
    collected: Collected = {}
    sightings: dict[str, list[Any]] = {}

    def read(x):
        return x.val if isinstance(x, Literal) else values[x]

    for operation in program.eqns:
        given, name = [read(x) for x in operation.invars], _name(operation)
        if name is not None:
            number, place, count = map(int, name.split(':'))
            own = sightings.setdefault(f'{number}:{count}', [])
            own.append(given[0])
            if place == count - 1:
                collected.setdefault(number, []).append(list(own))
                own.clear()
            results = given
        elif any(map(_has_tags, jaxprs_in_params(operation.params))):
            results, inner = _evaluate_inner(operation, given)
            for number, own in inner.items():
                collected.setdefault(number, []).extend(own)
        else:
            results = run_operation(program, operation, given)
        values |= dict(zip(operation.outvars, results, strict=True))
    return [read(x) for x in program.outvars], collected


def _evaluate_inner(operation: Any, given: list[Any]) -> tuple[list[Any], Collected]:
    kind = operation.primitive.name
    if kind == 'scan':
        return _scan(operation, given)
    if kind == 'cond':
        return _conditional(operation, given)
    programs = list(jaxprs_in_params(operation.params))
    if kind == 'while' or len(programs[0].invars) != len(given):
        raise ValueError(
            f'A layer with a quantized input is within {kind!r}, where its input cannot be observed. Keep the input in '
            "full precision by a rule in quant.rules, {'layers': ..., 'activations': 'none'}."
        )
    return _evaluate(programs[0], consts_of(operation), given)


def _scan(operation: Any, given: list[Any]) -> tuple[list[Any], Collected]:
    """Runs a loop that also returns the tagged values of every iteration."""
    (inner,) = jaxprs_in_params(operation.params)
    constant, carry, stacked = scan_arguments(operation, given)
    carries = len(carry)

    def body(carry, own):
        results, collected = _evaluate(inner, consts_of(operation), [*constant, *carry, *own])
        return results[:carries], (results[carries:], collected)

    options = {key: operation.params[key] for key in ('length', 'reverse')}
    carry, (gathered, collected) = jax.lax.scan(body, carry, stacked, **options)
    return [*carry, *gathered], collected


def _conditional(operation: Any, given: list[Any]) -> tuple[list[Any], Collected]:
    """Runs a conditional in which every branch returns the tagged values of all branches."""
    branches = operation.params['branches']

    def run(branch):
        return lambda arguments: _evaluate(branch.jaxpr, branch.consts, arguments)

    shapes = [jax.eval_shape(run(branch), given[1:])[1] for branch in branches]

    def blank(x):
        return jnp.full(x.shape, -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0, x.dtype)

    def whole(place, branch):
        def with_blanks(arguments):
            results, own = run(branch)(arguments)
            return results, [own if n == place else jax.tree.map(blank, tree) for n, tree in enumerate(shapes)]

        return with_blanks

    results, of_branches = jax.lax.switch(
        given[0], [whole(place, branch) for place, branch in enumerate(branches)], given[1:]
    )
    collected: Collected = {}
    for own in of_branches:
        for number, sightings in own.items():
            collected.setdefault(number, []).extend(sightings)
    return results, collected
