"""Counts the multiply-accumulate operations of a network, layer by layer."""

import collections
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Literal, jaxprs_in_params

from bqat_jax.transform.layers import intercept_layers

# The scope in which a layer runs, as it stands in the names of its operations.
_SCOPE = re.compile(r'layer<(.*?)>')
NO_LAYER = ''


def count_macs(run: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Returns the multiply-accumulate operations of every layer that can be quantized, over all its calls.

    Convolutions and matrix products are counted where they stand in the traced program, the body of a loop as often as
    it runs; of the branches of a conditional the longest counts. The key '' is for those of no such layer, as in
    attention.

    Args:
        run: runs the network: `run(*arguments)`. Nothing is computed.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """

    program = jax.make_jaxpr(_scoped(run))(*arguments)
    return dict(+_count(program.jaxpr, NO_LAYER))  # without those that count nothing


def _scoped(run: Callable[..., Any]) -> Callable[..., Any]:
    """Runs a network with its layers in scopes of their paths."""

    def look(call, module, path, x, args, kwargs):
        with jax.named_scope(f'layer<{path}>'):
            return call(x)

    def scoped(*arguments):
        with intercept_layers(look):
            return run(*arguments)

    return scoped


def unquantized_share(run: Callable[..., Any], params: Any, *arguments: Any) -> float:
    """Returns the share of the multiply-accumulates with weights that stand in no layer that can be quantized.

    Products of two values that both depend on the inputs, as in attention, are none with weights.

    Args:
        run: runs the network: `run(params, *arguments)`. Nothing is computed.
        params: the network's 'params' collection; arrays or `jax.ShapeDtypeStruct`s.
        *arguments: the same.
    """
    program = jax.make_jaxpr(_scoped(run))(params, *arguments)
    weights = len(jax.tree.leaves(params))
    depends = [number >= weights for number in range(len(program.jaxpr.invars))]
    counts = collections.Counter()
    _count_weighted(program.jaxpr, NO_LAYER, depends, counts)
    total = counts.total()
    return counts[NO_LAYER] / total if total else 0.0


def _count_weighted(program: Any, layer: str, depends: list[bool], counts: collections.Counter, times: int = 1) -> None:
    """Adds to `counts` products with an operand that depends on no input; `depends` says which arguments do."""
    known = dict(zip(program.invars, depends, strict=True))

    def is_data(x):
        return not isinstance(x, Literal) and known.get(x, False)

    for operation in program.eqns:
        scope = _SCOPE.search(str(operation.source_info.name_stack))
        where = scope[1] if scope else layer
        given = [is_data(x) for x in operation.invars]
        if not all(given):
            counts[where] += times * _macs(operation)
        known |= dict.fromkeys(operation.outvars, any(given))
        length = operation.params['length'] if operation.primitive.name == 'scan' else 1
        parts = []
        for part in jaxprs_in_params(operation.params):
            missing = max(0, len(part.invars) - len(given))
            own = [any(given)] * missing + given[len(given) + missing - len(part.invars) :]
            parts.append(collections.Counter())
            _count_weighted(part, where, own, parts[-1], times * length)
        counts.update(max(parts, key=lambda count: count.total(), default={}))  # of branches the longest


def _count(program: Any, layer: str) -> collections.Counter:
    counts = collections.Counter()
    for operation in program.eqns:
        scope = _SCOPE.search(str(operation.source_info.name_stack))
        where = scope[1] if scope else layer
        counts[where] += _macs(operation)
        inner = [_count(part, where) for part in jaxprs_in_params(operation.params)]
        if operation.primitive.name == 'cond':
            inner = [max(inner, key=lambda count: count.total())]
        times = operation.params['length'] if operation.primitive.name == 'scan' else 1
        for part in inner:
            for path, count in part.items():
                counts[path] += times * count
    return counts


def _macs(operation: Any) -> int:
    if operation.primitive.name not in ('dot_general', 'conv_general_dilated'):
        return 0
    output = operation.outvars[0].aval.shape
    if operation.primitive.name == 'dot_general':
        (contracted, _), _ = operation.params['dimension_numbers']
        left = operation.invars[0].aval.shape
        return math.prod(output) * math.prod(left[axis] for axis in contracted)
    image, kernel = (x.aval.shape for x in operation.invars)
    outputs, inputs = (kernel[axis] for axis in operation.params['dimension_numbers'].rhs_spec[:2])
    if any(step > 1 for step in operation.params['lhs_dilation']):  # transposed: the zeros between are not counted
        return math.prod(image) * math.prod(kernel) // inputs
    return math.prod(output) * math.prod(kernel) // outputs
