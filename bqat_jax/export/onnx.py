"""A frozen network as an ONNX model, which runs without this project and without JAX.

There are two kinds: 'onnx' computes exact sums of codes and one product per layer; 'qcdq' has Quantize-Clip-Dequantize
before every operation, which other tools turn into integer kernels.
"""

from typing import Any

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.export.frozen import Frozen, FrozenLayer
from bqat_jax.export.inference import FLOAT32, QCDQ, Program, arrays_of
from bqat_jax.export.stablehlo import batch_of
from bqat_jax.export.watching import Watch
from bqat_jax.transform.tagging import TAG

OPSETS = (21, 25)


def export_onnx(
    frozen: Frozen,
    network: BlockNetwork,
    *,
    batch: int = 0,
    opset: int = OPSETS[0],
    qcdq: bool = False,
    watch: Watch | None = None,
) -> Any:
    """Returns the network as an `onnx.ModelProto` that `onnx.checker` accepts.

    Args:
        frozen: the network as arrays.
        network: the `BlockNetwork` that was frozen.
        batch: the batch size; 0 for any.
        opset: version of the ONNX operators, 21 to 25.
        qcdq: whether the model quantizes and dequantizes values instead of scaling sums of codes.
        watch: if set, the codes of layers' inputs become further outputs of the model, and it maps them to layers.

    Raises:
        ValueError: for an operation without a rule, or a quantizer that QCDQ cannot represent.
        ImportError: without the package onnx.
    """
    try:
        import onnx

        from bqat_jax.export.onnx_program import OnnxOptions, build_model
    except ImportError as error:
        raise ImportError('ONNX export needs the package onnx: pip install onnx onnxruntime.') from error
    if qcdq:
        check_qcdq(frozen)
    program = Program(frozen, network, QCDQ if qcdq else FLOAT32)

    def run(arrays, inputs):
        return program.run(arrays, inputs, watch)

    options = OnnxOptions(opset, '' if watch is None else TAG, describes_all=qcdq)
    model = build_model(run, arrays_of(frozen), batch_of(frozen, batch), options)
    onnx.checker.check_model(model)
    return model


def check_qcdq(frozen: Frozen) -> None:
    """Checks that every quantizer can be written as Quantize-Clip-Dequantize.

    Raises:
        ValueError: naming a layer whose quantizer cannot, and the reason.
    """
    for path, layer in frozen.layers.items():
        reason = _why_not_qcdq(layer)
        if reason:
            raise ValueError(
                f'The layer {path} cannot be written as QCDQ: {reason}. Export it to onnx or stablehlo, or train it '
                'with another quantizer, such as lsq.'
            )


def _why_not_qcdq(layer: FrozenLayer) -> str:
    inputs, weights = layer.inputs, layer.weights
    if weights is not None and not weights.decoding.is_uniform:
        return 'the values of its weights are not equidistant'
    if weights is not None and not weights.decoding.carries_whole_numbers:
        return 'its weights have an offset'
    if weights is not None and weights.decoding.has_half_shift and weights.decoding.bits == 8:
        return 'its weights have 8 bits and no level at zero, which needs 9 bits'
    if inputs is None:
        return ''
    if not inputs.decoding.is_uniform:
        return 'the values of its input are not equidistant'
    if inputs.decoding.shift.any():
        return 'its input has an offset'
    return '' if inputs.inverse_step is not None else 'the thresholds of its input are not those of rounding'
