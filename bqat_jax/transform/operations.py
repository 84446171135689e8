"""Counts the multiply-accumulate operations of a network, layer by layer."""

import collections
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Literal, jaxprs_in_params

from bqat_jax.transform.layers import intercept_layers

# The named scope of a layer, part of the names of its operations.
_SCOPE = re.compile(r'layer<(.*?)>')
NO_LAYER = ''
# What a value depends on: the inputs, or weights that are not quantized.
DATA, UNREACHED = 'data', 'unreached'


def count_macs(run: Callable[..., Any], *arguments: Any) -> dict[str, int]:
    """Returns the multiply-accumulate operations of every quantizable layer, over all its calls.

    Convolutions and matrix products of the traced program are counted. A loop's body is multiplied by its length; a
    conditional contributes its largest branch. The key '' holds operations outside quantizable layers, such as those of
    attention.

    Args:
        run: `run(*arguments)` runs the network. It is only traced.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """

    def look(call, module, path, x, args, kwargs):
        with jax.named_scope(f'layer<{path}>'):
            return call(x)

    with intercept_layers(look):
        program = jax.make_jaxpr(lambda *arguments: run(*arguments))(*arguments)
    return dict(+_count(program.jaxpr, NO_LAYER))  # `+` drops zero counts.


def unquantized_share(run: Callable[..., Any], others: Iterable[str], params: Any, *arguments: Any) -> float:
    """Returns the share of the multiply-accumulates with weights that are not quantized.

    Products of two values that both depend on the inputs, as in attention, are not counted.

    Args:
        run: `run(params, *arguments)` runs the network. It is only traced.
        others: paths of the weights that are not quantized.
        params: the network's 'params' collection; arrays or `jax.ShapeDtypeStruct`s.
        *arguments: arrays or `jax.ShapeDtypeStruct`s.
    """
    others = set(others)
    if not others:
        return 0.0
    program = jax.make_jaxpr(lambda *arguments: run(*arguments))(params, *arguments)
    paths = [jax.tree_util.keystr(keys, simple=True, separator='/') for keys, _ in jax.tree.leaves_with_path(params)]
    kinds = [{UNREACHED} if path in others else set() for path in paths]
    kinds += [{DATA}] * (len(program.jaxpr.invars) - len(kinds))
    counts = collections.Counter()
    _count_weighted(program.jaxpr, kinds, counts)
    return counts[UNREACHED] / counts.total() if counts else 0.0


def _count_weighted(program: Any, kinds: Sequence[set[str]], counts: collections.Counter, times: int = 1) -> None:
    """Adds to `counts` the products of data and weights; `kinds` has the dependencies of the program's arguments."""
    known = dict(zip(program.invars, kinds, strict=True))

    def depends(x):
        return set() if isinstance(x, Literal) else known.get(x, set())

    for operation in program.eqns:
        given = [depends(x) for x in operation.invars]
        weights = [kind for kind in given if DATA not in kind]
        if weights and any(DATA in kind for kind in given):
            counts[UNREACHED if any(UNREACHED in kind for kind in weights) else 'reached'] += times * _macs(operation)
        everything = set().union(*given)
        known |= dict.fromkeys(operation.outvars, everything)
        length = operation.params['length'] if operation.primitive.name == 'scan' else 1
        parts = []
        for part in jaxprs_in_params(operation.params):
            missing = max(0, len(part.invars) - len(given))
            own = [everything] * missing + given[len(given) + missing - len(part.invars) :]
            parts.append(collections.Counter())
            _count_weighted(part, own, parts[-1], times * length)
        counts.update(max(parts, key=lambda count: count.total(), default={}))  # The largest branch.


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
    if any(step > 1 for step in operation.params['lhs_dilation']):  # Transposed: inserted zeros are not counted.
        return math.prod(image) * math.prod(kernel) // inputs
    return math.prod(output) * math.prod(kernel) // outputs
