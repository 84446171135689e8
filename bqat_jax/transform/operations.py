"""Counts the multiply-accumulate operations of a network, layer by layer."""

import collections
import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

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

    def look(call, module, path, x, args, kwargs):
        with jax.named_scope(f'layer<{path}>'):
            return call(x)

    with intercept_layers(look):
        program = jax.make_jaxpr(lambda *arguments: run(*arguments))(*arguments)
    return dict(+_count(program.jaxpr, NO_LAYER))  # without those that count nothing


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
