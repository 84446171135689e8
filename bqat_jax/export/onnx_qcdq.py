"""ONNX rules for the quantizers of qcdq.py."""

from typing import Any

import numpy as np
from jax.extend.core import jaxprs_in_params

from bqat_jax.export.onnx_graph import Graph
from bqat_jax.export.onnx_values import Constant, Dequantized, Value
from bqat_jax.export.qcdq import DEQUANTIZE_WEIGHTS, QUANTIZE_INPUT


def _quantize_input(graph: Graph, equation: Any, operands: list[Value]) -> list[Value] | None:
    x, *others = operands
    constants = [value.array for value in others if isinstance(value, Constant)]
    if len(constants) < 3 or constants[0].size != 1:
        return None
    step, lower, upper = constants
    codes, values = graph.quantizer(x, step.reshape(()), int(lower), int(upper))
    (inner,) = jaxprs_in_params(equation.params)
    for own in inner.eqns:
        if own.primitive.name == 'name' and graph.is_observed(own.params['name']):
            graph.observe(own.params['name'], graph.cast(codes, np.int32))
    return [values]


def _dequantize_weights(graph: Graph, equation: Any, operands: list[Value]) -> list[Value] | None:
    arrays = [value.array for value in operands if isinstance(value, Constant)]
    if len(arrays) < 4:
        return None
    codes, scale, lower, upper = arrays
    shape = equation.outvars[0].aval.shape
    if tuple(codes.shape) != tuple(shape) or scale.ndim not in (0, codes.ndim):
        return None
    numbers = codes.astype(np.int8 if lower < 0 else np.uint8)
    if not np.array_equal(numbers, codes) or np.any(codes < lower) or np.any(codes > upper):
        raise ValueError(f'The weights{graph.place} have codes outside {int(lower)} to {int(upper)}.')
    scale = scale.astype(np.float32).reshape(scale.shape or (1,) * codes.ndim)
    return [Dequantized(numbers, scale, int(lower), int(upper))]


# Rules by the name of the called function; a rule returns None if the call must be inlined.
NAMED = {QUANTIZE_INPUT: _quantize_input, DEQUANTIZE_WEIGHTS: _dequantize_weights}
