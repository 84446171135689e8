"""Layers as PyTorch's networks have them, so that their weights mean the same here."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.networks.batch_norm import BatchNorm
from bqat_jax.networks.convolution import conv_general_dilated

# PyTorch's defaults, with which most public weights were made; Linen counts the momentum the other way round.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5


def conv(
    features: int, kernel: int, stride: int, name: str, *, groups: int = 1, padding: Any = None, dtype: Any
) -> nn.Conv:
    """Returns a square convolution without bias.

    Args:
        features: output channels.
        kernel: size of the kernel, odd.
        stride: of the convolution.
        name: of the layer.
        groups: of channels; as many as there are for a depthwise convolution.
        padding: None for kernel // 2 pixels on each side, as in PyTorch; 'SAME', as in TensorFlow, pads only one side
            of an even-sized image at stride 2.
        dtype: of the computation; parameters are float32.
    """
    both = (kernel // 2, kernel // 2)
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=stride,
        padding=(both, both) if padding is None else padding,
        feature_group_count=groups,
        use_bias=False,
        kernel_init=nn.initializers.kaiming_normal() if groups == 1 else _depthwise_init,
        dtype=dtype,
        name=name,
        conv_general_dilated=conv_general_dilated,
    )


def _depthwise_init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Kaiming's normal distribution over the fan-out of one group, as PyTorch's networks initialise these."""
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(jnp.asarray(2 / (shape[0] * shape[1]), dtype))


def batch_norm(
    train: bool, name: str, *, dtype: Any, momentum: float = BATCH_NORM_MOMENTUM, epsilon: float = BATCH_NORM_EPSILON
) -> Callable[[jax.Array], jax.Array]:
    """Returns a batch norm over all axes but the last.

    It computes in float32 whatever the dtype: XLA fuses the casts into it, and Linen's own does not run in bfloat16
    where JAX forbids implicit promotion.

    Args:
        train: with the batch's statistics, or else with the stored ones.
        name: of the layer.
        dtype: of the output.
        momentum: the part of the stored statistics that stays.
        epsilon: added to the variance.
    """

    def normalize(x: jax.Array) -> jax.Array:
        norm = BatchNorm(
            use_running_average=not train, momentum=momentum, epsilon=epsilon, dtype=jnp.float32, name=name
        )
        return norm(x.astype(jnp.float32)).astype(dtype)

    return normalize
