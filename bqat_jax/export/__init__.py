"""What was trained, outside of the program: packed weights and inference that gives the same answers."""

from bqat_jax.export.checkpoint import read_checkpoint, write_checkpoint
from bqat_jax.export.freezing import freeze
from bqat_jax.export.frozen import Frozen, Normalization
from bqat_jax.export.inference import logits_function
from bqat_jax.export.loading import Exported, load
from bqat_jax.export.stablehlo import export_stablehlo

__all__ = [
    'Exported',
    'Frozen',
    'Normalization',
    'export_stablehlo',
    'freeze',
    'load',
    'logits_function',
    'read_checkpoint',
    'write_checkpoint',
]
