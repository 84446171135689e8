"""A convolution whose gradients are also fast on CPUs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bqat_jax.interception import without_modules

LAYOUT = ('NHWC', 'HWIO', 'NHWC')
# Size of the matrix of patches in `kernel_gradient`; matrix and gradient should fit into a core's cache. With 2 MiB of
# cache per core, a step of ResNet-20 took 462 ms with 0.65 MB, 451 to 486 with 0.16 to 1.3 MB, and 637 with 5 MB (JAX
# 0.12.0.1; seven runs on a shared machine).
COLUMN_BYTES = 650_000


def conv_general_dilated(
    lhs: jax.Array, rhs: jax.Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> jax.Array:
    """Returns `jax.lax.conv_general_dilated` of its arguments, for programs that run on one device.

    On CPUs, XLA computes the gradient of a small kernel as a convolution with a window as large as the image, at a
    fraction of the speed of the convolution itself. Inside a branch of a `lax.cond`, it computes the gradient of an
    image with a transposed kernel, for which it has no fast code there (13 times slower, JAX 0.10.2). On a CPU, this
    function uses `kernel_gradient` and `input_gradient` for convolutions without groups and dilation. On other
    platforms it changes nothing. Programs on several (virtual) CPU devices must use JAX's function: the devices wait
    for each other in collectives, and with loops between collectives we have seen deadlocks (JAX 0.10.2).

    Like the estimators, the function has no forward-mode derivative.

    Args:
        lhs: images (batch, height, width, channels).
        rhs: kernel (height, width, channels, features).
        window_strides: strides of the convolution.
        padding: 'SAME', 'VALID', or pixels before and after for height and width.
        **options: other options of `jax.lax.conv_general_dilated`.
    """
    plain = functools.partial(jax.lax.conv_general_dilated, window_strides=window_strides, padding=padding, **options)
    if not _is_simple(lhs, rhs, **options):
        return plain(lhs, rhs)
    sides = padding
    if isinstance(padding, str):
        sides = jax.lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)

    def gradients_of_plain(x, kernel, gradient):
        return jax.vjp(plain, x, kernel)[1](gradient)

    def gradients_on_cpu(x, kernel, gradient):
        # Otherwise XLA computes the producer of the gradient, such as batch norm's, within both of its readers.
        gradient = jax.lax.optimization_barrier(gradient)
        of_x = input_gradient(x.shape, kernel, gradient, sides, window_strides, **options)
        of_kernel = kernel_gradient(x, gradient, sides, kernel.shape[:2], window_strides)
        return of_x, of_kernel.astype(kernel.dtype)

    @jax.custom_vjp
    def convolve(x, kernel):
        return plain(x, kernel)

    def forward(x, kernel):
        return plain(x, kernel), (x, kernel)

    def backward(saved, gradient):
        return jax.lax.platform_dependent(*saved, gradient, cpu=gradients_on_cpu, default=gradients_of_plain)

    convolve.defvjp(forward, backward)
    with without_modules():
        return convolve(lhs, rhs)


def input_gradient(
    shape: Sequence[int],
    kernel: jax.Array,
    gradient: jax.Array,
    padding: Sequence[tuple[int, int]],
    strides: Sequence[int] = (1, 1),
    **options: Any,
) -> jax.Array:
    """Returns the gradient of a convolution's input: the output's, dilated and convolved with the flipped kernel.

    The kernel is flipped and its channels are swapped in a separate array, so that the rest is a plain convolution.

    Args:
        shape: shape of the input (batch, height, width, channels).
        kernel: kernel (height, width, channels, features).
        gradient: gradient of the output (batch, rows, columns, features).
        padding: pixels before and after for height and width.
        strides: strides of the convolution, for height and width.
        **options: other options of the convolution, such as its precision.
    """
    sides = []
    for size, window, rows, stride, (before, _) in zip(
        shape[1:3], kernel.shape[:2], gradient.shape[1:3], strides, padding, strict=True
    ):
        first = window - 1 - before
        sides.append((first, size + window - 1 - (stride * (rows - 1) + 1) - first))
    turned = jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)
    options = {**options, 'lhs_dilation': strides}
    return jax.lax.conv_general_dilated(gradient, turned, (1, 1), sides, **options)


def kernel_gradient(
    x: jax.Array,
    gradient: jax.Array,
    padding: Sequence[tuple[int, int]],
    window: Sequence[int],
    strides: Sequence[int] = (1, 1),
) -> jax.Array:
    """Returns the gradient of a convolution's kernel as matrix products, a few images at a time.

    Entry (i, j) of the kernel multiplies pixel (i + r · stride, j + c · stride) of the padded images for pixel (r, c)
    of the output. A matrix holds these pixels for all entries (im2col); its product with the output's gradient is the
    sum over pixels. The matrix has few enough images to fit into a processor's cache.

    Args:
        x: input (batch, height, width, channels).
        gradient: gradient of the output (batch, rows, columns, features).
        padding: pixels before and after for height and width.
        window: height and width of the kernel.
        strides: strides of the convolution, for height and width.

    Returns:
        float32 (window height, window width, channels, features).
    """
    batch, rows, columns, features = gradient.shape
    channels = x.shape[3]
    entries = window[0] * window[1] * channels
    images = max(1, min(batch, COLUMN_BYTES // (rows * columns * entries * x.dtype.itemsize)))
    parts = -(-batch // images)
    spare = parts * images - batch  # number of zero images, which do not change the sum
    if spare:
        x, gradient = (jnp.pad(v, ((0, spare), (0, 0), (0, 0), (0, 0))) for v in (x, gradient))
    x = x.reshape(parts, images, *x.shape[1:])
    gradient = gradient.reshape(parts, -1, features)
    reach = (strides[0] * (rows - 1) + 1, strides[1] * (columns - 1) + 1)

    def add(total, part):
        x, gradient = part
        # Padded inside the loop: before it, XLA would fuse the producer of x into the padding, which is slow.
        x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
        seen = [
            x[:, i : i + reach[0] : strides[0], j : j + reach[1] : strides[1]]
            for i in range(window[0])
            for j in range(window[1])
        ]
        matrix = jnp.concatenate(seen, axis=-1).reshape(-1, entries)
        # Transposed separately: XLA uses its fast library only for products of plain matrices.
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
    """Returns whether `kernel_gradient` and `input_gradient` support a convolution."""
    if lhs.ndim != 4 or feature_group_count * batch_group_count != 1:
        return False
    layout = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    spread = any(size != 1 for sizes in (lhs_dilation or (), rhs_dilation or ()) for size in sizes)
    return not spread and layout == jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, LAYOUT)
