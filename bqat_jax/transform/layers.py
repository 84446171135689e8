"""Finds the layers of a Flax Linen network that can be quantized from outside, and what else has weights.

A network is run on shapes alone, and every call of a layer is looked at as it happens
(`flax.linen.intercept_methods`). So it does not matter where a layer stands: it may be shared, be called more than
once, or lie inside `nn.remat`, `nn.scan` or `nn.vmap`. Where the latter two stack the parameters of many layers along
leading axes, every layer of the stack is quantized on its own.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

# The layers whose weights and input can be quantized.
LAYER_TYPES = (nn.Conv, nn.ConvTranspose, nn.Dense, nn.DenseGeneral, nn.Einsum)
WEIGHT_NAME = 'kernel'
INPUT_NAME = 'inputs'


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """Where a kernel has its output channels.

    Attributes:
        permutation: of the kernel's axes, which moves the output channels to the end.
        outputs: how many axes they are then.
        is_matrix: whether quantizers see the kernel as a matrix (inputs, outputs), and not with all its axes.
    """

    permutation: tuple[int, ...]
    outputs: int = 1
    is_matrix: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether quantizers see the kernel as it is."""
        return not self.is_matrix and self.permutation == tuple(range(len(self.permutation)))

    def to_channels_last(self, kernel: jax.Array) -> jax.Array:
        """Returns the kernel as quantizers see it, output channels last."""
        kernel = kernel if self.is_plain else jnp.transpose(kernel, self.permutation)
        if not self.is_matrix:
            return kernel
        return kernel.reshape(-1, math.prod(kernel.shape[kernel.ndim - self.outputs :]))

    def from_channels_last(self, kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns the kernel as its layer has it, in `shape`."""
        if self.is_plain:
            return kernel
        kernel = kernel.reshape([shape[axis] for axis in self.permutation])
        return jnp.transpose(kernel, [self.permutation.index(axis) for axis in range(len(shape))])


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that can be quantized.

    Attributes:
        kind: its class, such as 'Conv'.
        kernel: shape of its kernel, as one call sees it.
        stack: leading axes along which the parameters of several such layers are stacked; () for a single one.
        layout: where the kernel has its output channels.
        input: shape and dtype of the input of its first call.
    """

    kind: str
    kernel: tuple[int, ...]
    stack: tuple[int, ...]
    layout: KernelLayout
    input: jax.ShapeDtypeStruct

    @property
    def is_plain(self) -> bool:
        """Whether it is a single layer whose kernel has its output channels last."""
        return not self.stack and self.layout.is_plain

    @property
    def weights(self) -> tuple[int, ...]:
        """Shape of the kernel as quantizers see it."""
        return jax.eval_shape(self.layout.to_channels_last, jax.ShapeDtypeStruct(self.kernel, jnp.float32)).shape


@dataclasses.dataclass(frozen=True)
class Layers:
    """What `find_layers` found.

    Attributes:
        quantizable: path to layer, in the order in which they run.
        others: path of every other parameter with two axes or more, and why no quantizer reaches it.
    """

    quantizable: Mapping[str, Layer]
    others: Mapping[str, str]


def find_layers(run: Callable[..., Any], params: Any, *arguments: Any) -> Layers:
    """Returns the layers that can be quantized, and the other weights.

    Args:
        run: runs the network: `run(params, *arguments)`. Nothing is computed: shapes are enough.
        params: the network's 'params' collection; arrays or `jax.ShapeDtypeStruct`s.
        *arguments: the same, the first of them with examples along its first axis.
    """
    flat: Any = traverse_util.flatten_dict(params, sep='/')
    quantizable: dict[str, Layer] = {}
    others: dict[str, str] = {}
    smallest = {path: leaf.ndim for path, leaf in flat.items()}  # axes inside stacks

    def look(call, module, path, x, args, kwargs):
        name, kernel = f'{path}/{WEIGHT_NAME}', module.get_variable('params', WEIGHT_NAME)
        outer = flat[name].shape
        depth = len(outer) - kernel.ndim
        if depth < 0 or outer[depth:] != kernel.shape:
            others[name] = f'its shape is {outer} outside and {kernel.shape} inside: stacked, but not along the front'
        elif path not in quantizable:
            layout, seen = kernel_layout(module, kernel.ndim, args, kwargs), jax.ShapeDtypeStruct(x.shape, x.dtype)
            quantizable[path] = Layer(type(module).__name__, kernel.shape, outer[:depth], layout, seen)
        return call(x)

    def record(call, args, kwargs, context):
        if context.module.scope is not None:
            prefix = '/'.join(context.module.path)
            for key, value in context.module.variables.get('params', {}).items():
                name = f'{prefix}/{key}' if prefix else key
                if name in smallest and hasattr(value, 'ndim'):
                    smallest[name] = min(smallest[name], value.ndim)
        return call(*args, **kwargs)

    with nn.intercept_methods(record), intercept_layers(look):
        # A function of our own: JAX does not trace one again that it has traced before, and then nothing is recorded.
        jax.eval_shape(lambda *arguments: run(*arguments), params, *arguments)
    for path, axes in smallest.items():
        if axes >= 2 and path.removesuffix(f'/{WEIGHT_NAME}') not in quantizable:
            kinds = ', '.join(kind.__name__ for kind in LAYER_TYPES)
            others.setdefault(path, f'it is no kernel of a layer that ran ({kinds})')
    return Layers(quantizable, others)


def intercept_layers(function: Callable[..., Any]) -> contextlib.AbstractContextManager:
    """Returns a context in which `function(call, module, path, x, args, kwargs)` replaces every call of a layer.

    `call(x)` is the layer's own call on another input; args and kwargs are the rest of its arguments.
    """

    def interceptor(call, args, kwargs, context):
        if not isinstance(context.module, LAYER_TYPES) or context.method_name != '__call__':
            return call(*args, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key != INPUT_NAME}
        x, others = (args[0], args[1:]) if args else (kwargs[INPUT_NAME], ())

        def call_on(x):
            return call(x, *others, **rest)

        return function(call_on, context.module, '/'.join(context.module.path), x, others, rest)

    return nn.intercept_methods(interceptor)


def kernel_layout(module: Any, ndim: int, args: Any = (), kwargs: Any = None) -> KernelLayout:
    """Returns where a layer's kernel of `ndim` axes has its output channels.

    Args:
        module: the layer.
        ndim: number of axes of the kernel.
        args: what it is called with beside its input.
        kwargs: the same, by keyword.
    """
    axes = tuple(range(ndim))
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return KernelLayout((*axes[:-2], axes[-1], axes[-2]))
    if isinstance(module, nn.DenseGeneral):
        features = module.features
        outputs = 1 if isinstance(features, int) else len(features)
        return KernelLayout(axes, outputs, is_matrix=ndim != 2)
    if isinstance(module, nn.Einsum):
        left, kernel, out = _einsum_terms(module, args, kwargs)
        is_output = [letter in out and letter not in left for letter in kernel]
        permutation = tuple(sorted(axes, key=lambda axis: is_output[axis]))
        return KernelLayout(permutation, sum(is_output), is_matrix=True)
    return KernelLayout(axes)


def _einsum_terms(module: Any, args: Any, kwargs: Any) -> tuple[str, str, str]:
    """The letters of input, kernel and output; what an ellipsis stands for is in none of them."""
    equation = args[0] if args else (kwargs or {}).get('einsum_str')
    left, _, out = (equation or module.einsum_str).replace(' ', '').partition('->')
    left, kernel = left.split(',')
    return left, kernel, out
