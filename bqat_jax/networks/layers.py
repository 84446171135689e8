"""Layers with the conventions of PyTorch, for compatibility with its weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from bqat_jax.interception import without_modules
from bqat_jax.networks.batch_norm import BatchNorm

# PyTorch's defaults, which most public weights use; Linen's momentum is 1 minus PyTorch's.
BATCH_NORM_MOMENTUM = 0.9
BATCH_NORM_EPSILON = 1e-5


DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class Computation:
    """The dtype and the convolution of a network's layers.

    Attributes:
        dtype: dtype of activations; parameters are float32.
        conv_general_dilated: computes the convolutions; None for Linen's default, that of `jax.lax`.
    """

    dtype: Any = jnp.float32
    conv_general_dilated: Callable[..., jax.Array] | None = None


FLOAT32 = Computation()


def traced_once(init: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Returns an initializer, `init(key, shape, dtype)`, that JAX traces once per shape.

    To compare shapes, Flax traces the initializer of every parameter whenever a network is traced: for a ResNet-20,
    almost half of the tracing time.
    """
    jitted = jax.jit(init, static_argnums=(1, 2))

    def initialize(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        with without_modules():
            return jitted(key, tuple(shape), dtype)

    return initialize


KAIMING = traced_once(nn.initializers.kaiming_normal())


def computation(dtype: str, conv_general_dilated: Callable[..., jax.Array] | None) -> Computation:
    """Returns the computation in the dtype 'float32' or 'bfloat16'.

    Raises:
        ValueError: for another name.
    """
    if dtype not in DTYPES:
        raise ValueError(f'dtype={dtype!r}: must be one of {", ".join(DTYPES)}.')
    return Computation(jnp.dtype(dtype), conv_general_dilated)


def block_class(cls: type[nn.Module], remat: bool) -> Any:
    """Returns the class of a block; with `remat` it recomputes its activations in the backward pass to save memory."""
    return nn.remat(cls, static_argnums=(2,)) if remat else cls


def conv(
    computation: Computation,
    features: int,
    kernel: int,
    stride: int,
    name: str,
    **options: Any,
) -> nn.Conv:
    """Returns a square convolution without bias.

    Kernels are initialized with Kaiming's normal distribution. Padding is kernel // 2 pixels per side, as in PyTorch.

    Args:
        computation: dtype and convolution.
        features: output channels.
        kernel: size of the kernel, odd.
        stride: stride of the convolution.
        name: name of the layer.
        **options: other fields of `nn.Conv`, such as `padding='SAME'`, which pads only one side of an even-sized image
            at stride 2, as in TensorFlow.
    """
    both = (kernel // 2, kernel // 2)
    given = {
        'padding': (both, both),
        'use_bias': False,
        'kernel_init': KAIMING,
        'dtype': computation.dtype,
        'conv_general_dilated': computation.conv_general_dilated,
    }
    return nn.Conv(features, (kernel, kernel), strides=stride, name=name, **{**given, **options})


def depthwise_init(key: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Returns depthwise kernels from Kaiming's normal distribution over the fan-out of a group, as in PyTorch."""
    return jax.random.normal(key, shape, dtype) * jnp.sqrt(jnp.asarray(2 / (shape[0] * shape[1]), dtype))


def batch_norm(
    computation: Computation,
    train: bool,
    name: str,
    *,
    momentum: float = BATCH_NORM_MOMENTUM,
    epsilon: float = BATCH_NORM_EPSILON,
) -> Callable[[jax.Array], jax.Array]:
    """Returns a batch norm over all axes but the last.

    It always computes in float32: XLA fuses the casts, and Linen's batch norm does not run in bfloat16 with strict
    dtype promotion.

    Args:
        computation: determines the dtype of the output.
        train: True for batch statistics, False for the stored ones.
        name: name of the layer.
        momentum: weight of the stored statistics in an update.
        epsilon: added to the variance.
    """

    def normalize(x: jax.Array) -> jax.Array:
        norm = BatchNorm(
            use_running_average=not train, momentum=momentum, epsilon=epsilon, dtype=jnp.float32, name=name
        )
        return norm(x.astype(jnp.float32)).astype(computation.dtype)

    return normalize
