"""Quantizes a Flax Linen network without changing its modules: finds layers, calibrates and applies quantizers."""

from bqat_jax.transform.calibration import (
    calibrate,
    find_signed_inputs,
    init_quantizers,
    mean_of_trees,
    quantizer_shapes,
)
from bqat_jax.transform.layers import LAYER_TYPES, WEIGHT_NAME, KernelLayout, Layer, Layers, find_layers, register_layer
from bqat_jax.transform.operations import count_macs, unquantized_share
from bqat_jax.transform.preparation import (
    Prepared,
    check_unquantized,
    find_quantization,
    fit_settings,
    prepare,
    prepare_layers,
)
from bqat_jax.transform.quantization import (
    FULL_PRECISION,
    ROLES,
    LayerQuantizers,
    Quantization,
    build_quantization,
    context_of,
    rescale,
)

__all__ = [
    'FULL_PRECISION',
    'LAYER_TYPES',
    'ROLES',
    'WEIGHT_NAME',
    'KernelLayout',
    'Layer',
    'LayerQuantizers',
    'Layers',
    'Prepared',
    'Quantization',
    'build_quantization',
    'calibrate',
    'check_unquantized',
    'context_of',
    'count_macs',
    'find_layers',
    'find_quantization',
    'find_signed_inputs',
    'fit_settings',
    'init_quantizers',
    'mean_of_trees',
    'prepare',
    'prepare_layers',
    'quantizer_shapes',
    'register_layer',
    'rescale',
    'unquantized_share',
]
