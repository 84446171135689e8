"""Models of ONNX in tests: built, run and compared with JAX. Only for tests that know that onnxruntime is there."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnxruntime

from bqat_jax.export.onnx_model import OnnxOptions
from bqat_jax.export.onnx_program import build_model

(BATCH,) = jax.export.symbolic_shape('b')


def evaluate(model, inputs, optimised=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])
    names = [x.name for x in session.get_inputs()]
    return session.run(None, {name: x for name, x in zip(names, inputs, strict=True) if name in names})


def operations(model):
    return [node.op_type for node in model.graph.node]


def build(function, inputs, arrays=(), symbolic=False, **options):
    """A model of function(*arrays, *inputs)."""
    shapes = [jax.ShapeDtypeStruct(((BATCH,) if symbolic else x.shape[:1]) + x.shape[1:], x.dtype) for x in inputs]
    model = build_model(lambda arrays, inputs: function(*arrays, *inputs), arrays, shapes, OnnxOptions(**options))
    onnx.checker.check_model(model, full_check=True)
    return model


def check(function, inputs, arrays=(), tolerance=0.0, symbolics=(False, True), **options):
    """Compares the model of function(*arrays, *inputs) with JAX, with and without optimisation."""
    wanted = jax.tree.leaves(function(*map(jnp.asarray, (*arrays, *inputs))))
    for symbolic in symbolics:
        model = build(function, inputs, arrays, symbolic, **options)
        for optimised in (False, True):
            results = evaluate(model, inputs, optimised)
            assert len(results) == len(wanted)
            for result, own in zip(results, wanted, strict=True):
                assert result.dtype == own.dtype and result.shape == own.shape
                np.testing.assert_allclose(result, own, rtol=tolerance, atol=tolerance)
    return model


def initializers(model):
    return {x.name: x for x in model.graph.initializer}


def kinds(model):
    """Names of the types of initializers."""
    return [onnx.TensorProto.DataType.Name(x.data_type) for x in model.graph.initializer]
