"""A convolution whose kernel's gradient is quick on CPUs too."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# Size of what `kernel_gradient` lays side by side at once. On one CPU with 2 MiB of cache for each core, 5 MB were as
# good as any from 2 to 5 MB, and 10 MB worse.
COLUMN_BYTES = 5_000_000


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Returns `jax.lax.conv_general_dilated` of the same arguments; for `flax.linen.Conv(conv_general_dilated=...)`.

    XLA for CPUs computes the gradient of a small kernel as a convolution with a window as large as the image, at a
    fraction of the speed of the convolution itself. Where channels are neither grouped nor pixels spread, we take
    `kernel_gradient` on a CPU. On other platforms nothing changes, nor where one process has several (virtual) CPU
    devices: such devices wait for each other in collectives, and with loops between these we have seen them wait for
    ever (JAX 0.10.2).

    Like the estimators, it defines no forward-mode derivative.

    Args:
        lhs: images (batch, height, width, channels).
        rhs: kernel (height, width, channels, features).
        window_strides: of the convolution.
        padding: 'SAME', 'VALID', or pixels before and after for height and width.
        **options: the others of `jax.lax.conv_general_dilated`.
    """
    plain = functools.partial(jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options)
    if jax.device_count() > 1 or not _is_simple(lhs, rhs, **options):
        return plain(lhs, rhs)
    sides = padding
    if isinstance(padding, str):
        sides = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)

    def gradient_of_plain(x, kernel, gradient):
        return jax.vjp(lambda kernel: plain(x, kernel), kernel)[1](gradient)[0]

    @jax.custom_vjp
    def convolve(x, kernel):
        return plain(x, kernel)

    def forward(x, kernel):
        return plain(x, kernel), (x, kernel)

    def backward(saved, gradient):
        x, kernel = saved
        (of_x,) = jax.vjp(lambda x: plain(x, kernel), x)[1](gradient)
        of_kernel = jax.lax.platform_dependent(
            x,
            kernel,
            gradient,
            cpu=lambda x, kernel, gradient: kernel_gradient(
                x, gradient, sides, kernel.shape[:2], window_strides
            ).astype(kernel.dtype),
            default=gradient_of_plain,
        )
        return of_x, of_kernel

    convolve.defvjp(forward, backward)
    return convolve(lhs, rhs)


def kernel_gradient(
    x: jax.Array,
    gradient: jax.Array,
    padding: Sequence[tuple[int, int]],
    window: Sequence[int],
    strides: Sequence[int] = (1, 1),
) -> jax.Array:
    """Returns the gradient of a convolution's kernel as products of matrices, a few images at a time.

    Entry (i, j) of the kernel meets pixel (i + r · stride, j + c · stride) of the padded images for pixel (r, c) of the
    output. What all entries meet stands side by side in one matrix, whose product with the output's gradient is the
    sum over pixels. It is made for so few images at once that it stays in a processor's cache.

    Args:
        x: input (batch, height, width, channels).
        gradient: of the output (batch, rows, columns, features).
        padding: pixels before and after for height and width.
        window: height and width of the kernel.
        strides: of the convolution, for height and width.

    Returns:
        float32 (window height, window width, channels, features).
    """
    batch, rows, columns, features = gradient.shape
    channels = x.shape[3]
    entries = window[0] * window[1] * channels
    images = max(1, min(batch, COLUMN_BYTES // (rows * columns * entries * x.dtype.itemsize)))
    parts = -(-batch // images)
    spare = parts * images - batch  # images of zeros, which add nothing
    if spare:
        x, gradient = (jnp.pad(v, ((0, spare), (0, 0), (0, 0), (0, 0))) for v in (x, gradient))
    x = x.reshape(parts, images, *x.shape[1:])
    gradient = gradient.reshape(parts, -1, features)
    reach = (strides[0] * (rows - 1) + 1, strides[1] * (columns - 1) + 1)

    def add(total, part):
        x, gradient = part
        # Padded here: before the loop XLA would fuse whatever made x into the padding, which is slow.
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        seen = [
            x[:, i : i + reach[0] : strides[0], j : j + reach[1] : strides[1]]
            for i in range(window[0])
            for j in range(window[1])
        ]
        matrix = jnp.concatenate(seen, axis=-1).reshape(-1, entries)
        # Transposed by itself: XLA hands only products of plain matrices to its quick library.
        turned = jax.lax.optimization_barrier(gradient.T)
        return total + jnp.matmul(turned, matrix, preferred_element_type=jnp.float32), None

    total, _ = jax.lax.scan(add, jnp.zeros((features, entries), jnp.float32), (x, gradient))
    return total.T.reshape(*window, channels, features)


def _is_simple(
    lhs: jax.Array,
    rhs: jax.Array,
    *,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    **_: Any,
) -> bool:
    """Whether `kernel_gradient` holds for a convolution, and pays."""
    if lhs.ndim != 4 or rhs.shape[0] * rhs.shape[1] == 1 or feature_group_count * batch_group_count != 1:
        return False
    layout = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    spread = any(size != 1 for sizes in (lhs_dilation or (), rhs_dilation or ()) for size in sizes)
    return not spread and layout == jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
