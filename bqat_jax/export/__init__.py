"""Exports trained networks: packed weights, and inference on codes that agrees with the trained network.

frozen = freeze(replacement.network, replacement.quantization, variables)      # plain arrays
write_checkpoint('model.safetensors', frozen)                                  # packed codes
content = export_stablehlo(frozen, replacement.network)                        # bytes: CPU, GPU and TPU
model = export_onnx(frozen, replacement.network)                               # an onnx.ModelProto
logits = load('model.safetensors', network=replacement.network)(images)
"""

from bqat_jax.export.checkpoint import read_checkpoint, write_checkpoint
from bqat_jax.export.freezing import freeze
from bqat_jax.export.frozen import Frozen, Normalization
from bqat_jax.export.inference import logits_function
from bqat_jax.export.loading import Exported, load
from bqat_jax.export.onnx import export_onnx
from bqat_jax.export.stablehlo import export_stablehlo

__all__ = [
    'Exported',
    'Frozen',
    'Normalization',
    'export_onnx',
    'export_stablehlo',
    'freeze',
    'load',
    'logits_function',
    'read_checkpoint',
    'write_checkpoint',
]
