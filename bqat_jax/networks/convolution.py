"""A convolution whose kernel's gradient is quick on CPUs too."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

LAYOUT = ('NHWC', 'HWIO', 'NHWC')


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Returns `jax.lax.conv_general_dilated` of the same arguments; for `flax.linen.Conv(conv_general_dilated=...)`.

    XLA for CPUs computes the gradient of a small kernel as a convolution with a window as large as the image, at a
    fraction of the speed of the convolution itself. Where the stride is 1 and channels are neither grouped nor pixels
    spread, we take `kernel_gradient` on a CPU. On other platforms nothing changes, nor where one process has several
    (virtual) CPU devices: such devices wait for each other in collectives, and with loops between these we have seen
    them wait for ever (JAX 0.10.2).

    Like the estimators, it defines no forward-mode derivative.

    Args:
        lhs: images (batch, height, width, channels).
        rhs: kernel (height, width, channels, features).
        window_strides: of the convolution.
        padding: 'SAME', 'VALID', or pixels before and after for height and width.
        **options: the others of `jax.lax.conv_general_dilated`.
    """
    plain = functools.partial(jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options)
    if jax.device_count() > 1 or not _is_simple(lhs, rhs, window_strides, **options):
        return plain(lhs, rhs)
    sides = padding
    if isinstance(padding, str):
        sides = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding)

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
            cpu=lambda x, kernel, gradient: kernel_gradient(x, gradient, sides).astype(kernel.dtype),
            default=gradient_of_plain,
        )
        return of_x, of_kernel

    convolve.defvjp(forward, backward)
    return convolve(lhs, rhs)


def kernel_gradient(x: jax.Array, gradient: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Returns the gradient of a convolution's kernel at stride 1, a matrix product for each of its entries.

    Entry (i, j) is the sum over images and pixels (r, c) of x[r + i, c + j] gradient[r, c]. With the gradient padded by
    zeros to the size of the padded x, and pixels in one row, (r + i, c + j) lies i · width + j behind (r, c): every
    entry is a product of two contiguous pieces, and no patches are copied together. What is read over the end of a row
    or an image meets a zero. The loop keeps XLA from computing the padding anew for every entry.

    Args:
        x: input (batch, height, width, channels).
        gradient: of the output (batch, rows, columns, features).
        padding: pixels before and after for height and width.

    Returns:
        float32 (kernel height, kernel width, channels, features).
    """
    (top, bottom), (left, right) = padding
    _, rows, columns, features = gradient.shape
    height, width, channels = x.shape[1] + top + bottom, x.shape[2] + left + right, x.shape[3]
    kernel_height, kernel_width = height - rows + 1, width - columns + 1
    reach = (kernel_height - 1) * width + kernel_width - 1
    spare = -(-reach // (height * width))  # images behind the last
    x = jnp.pad(x, ((0, spare), (top, bottom), (left, right), (0, 0))).reshape(-1, channels)
    gradient = jnp.pad(gradient, ((0, 0), (0, height - rows), (0, width - columns), (0, 0))).reshape(-1, features)

    def entry(offset):
        seen = jax.lax.dynamic_slice_in_dim(x, offset, len(gradient))
        return jax.lax.dot_general(seen, gradient, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    offsets = [i * width + j for i in range(kernel_height) for j in range(kernel_width)]
    found = jax.lax.map(entry, jnp.asarray(offsets))
    return found.reshape(kernel_height, kernel_width, channels, features)


def _is_simple(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
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
    spread = any(size != 1 for sizes in (window_strides, lhs_dilation or (), rhs_dilation or ()) for size in sizes)
    return not spread and layout == jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
