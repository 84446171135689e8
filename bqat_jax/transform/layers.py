"""Finds the quantizable layers of a Flax Linen network, and its other weights.

The network is traced on shapes, and `flax.linen.intercept_methods` observes every call of a layer. A layer may
therefore be shared, be called more than once, or be inside `nn.remat`, `nn.scan` or `nn.vmap`. Where `nn.scan` and
`nn.vmap` stack the parameters of many layers along leading axes, every layer of the stack is quantized separately.
"""

import contextlib
import dataclasses
import inspect
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from flax.linen.recurrent import DenseParams

from bqat_jax.interception import intercept_methods

WEIGHT_NAME = 'kernel'


@dataclasses.dataclass(frozen=True)
class LayerType:
    """How layers of a class are quantized.

    Attributes:
        kernel: name of the parameter that the operation uses, output channels last unless Linen defines otherwise.
        has_input: whether the operation takes the first argument of `__call__`.
    """

    kernel: str = WEIGHT_NAME
    has_input: bool = True


# Layers whose weights and input can be quantized.
LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    **dict.fromkeys((nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Dense, nn.DenseGeneral, nn.Einsum), LayerType()),
    nn.Embed: LayerType('embedding', has_input=False),
    # Parts of `nn.OptimizedLSTMCell`, which multiplies by several kernels at once.
    DenseParams: LayerType(has_input=False),
}


def register_layer(cls: type[nn.Module], *, kernel: str = WEIGHT_NAME, quantize_input: bool = True) -> type[nn.Module]:
    """Registers a class of layers whose kernel and input are quantized, and returns the class.

    Args:
        cls: a subclass of `flax.linen.Module` that has the parameter.
        kernel: name of the parameter, whose last axis is the output channels.
        quantize_input: whether the first argument of `__call__` is quantized too.

    Raises:
        TypeError: if `cls` is not a subclass of `flax.linen.Module`.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f'{cls!r} is not a subclass of flax.linen.Module. Give register_layer such a class.')
    LAYER_TYPES[cls] = LayerType(kernel, quantize_input)
    return cls


def layer_class(module: Any) -> type[nn.Module] | None:
    """Returns the registered class of a module or its nearest registered base class; None if it is not a layer."""
    return next((cls for cls in type(module).__mro__ if cls in LAYER_TYPES), None)


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """The position of a kernel's output channels.

    Attributes:
        permutation: permutation of the kernel's axes that moves the output channels to the end.
        outputs: number of output-channel axes.
        is_matrix: whether quantizers see the kernel reshaped to a matrix (inputs, outputs).
    """

    permutation: tuple[int, ...]
    outputs: int = 1
    is_matrix: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether quantizers see the kernel unchanged."""
        return not self.is_matrix and self.permutation == tuple(range(len(self.permutation)))

    def to_channels_last(self, kernel: jax.Array) -> jax.Array:
        """Returns the kernel in the layout of quantizers, output channels last."""
        kernel = kernel if self.is_plain else jnp.transpose(kernel, self.permutation)
        if not self.is_matrix:
            return kernel
        return kernel.reshape(-1, math.prod(kernel.shape[kernel.ndim - self.outputs :]))

    def from_channels_last(self, kernel: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns the kernel in the layout of its layer, in `shape`."""
        if self.is_plain:
            return kernel
        kernel = kernel.reshape([shape[axis] for axis in self.permutation])
        return jnp.transpose(kernel, [self.permutation.index(axis) for axis in range(len(shape))])


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that can be quantized.

    Attributes:
        kind: class name, such as 'Conv'.
        kernel: shape of the kernel within one call.
        stack: leading axes along which the parameters of several such layers are stacked; () for a single layer.
        layout: the position of the kernel's output channels.
        input: shape and dtype of the input of the first call.
        weight: name of the kernel parameter.
        has_input: whether the input can be quantized.
    """

    kind: str
    kernel: tuple[int, ...]
    stack: tuple[int, ...]
    layout: KernelLayout
    input: jax.ShapeDtypeStruct
    weight: str = WEIGHT_NAME
    has_input: bool = True

    @property
    def is_plain(self) -> bool:
        """Whether this is a single layer whose kernel has its output channels last."""
        return not self.stack and self.layout.is_plain

    @property
    def weights(self) -> tuple[int, ...]:
        """Shape of the kernel in the layout of quantizers."""
        return jax.eval_shape(self.layout.to_channels_last, jax.ShapeDtypeStruct(self.kernel, jnp.float32)).shape


@dataclasses.dataclass(frozen=True)
class Layers:
    """The result of `find_layers`.

    Attributes:
        quantizable: layers by path, in the order of their first calls.
        others: for the path of every other parameter with at least two axes inside stacks, why it is not quantized.
    """

    quantizable: Mapping[str, Layer]
    others: Mapping[str, str]


def find_layers(run: Callable[..., Any], params: Any, *arguments: Any) -> Layers:
    """Returns the layers that can be quantized, and the other weights.

    Args:
        run: `run(params, *arguments)` runs the network. It is only traced.
        params: the network's 'params' collection; arrays or `jax.ShapeDtypeStruct`s.
        *arguments: trees of arrays or `jax.ShapeDtypeStruct`s; the first has examples along its first axis.
    """
    params = nn.meta.unbox(params)
    check_names(params)
    flat: Any = traverse_util.flatten_dict(params, sep='/')
    quantizable: dict[str, Layer] = {}
    others: dict[str, str] = {}
    kinds: dict[str, type] = {}  # parameter path to the class of its module
    smallest = {path: leaf.ndim for path, leaf in flat.items()}  # number of axes inside stacks

    def look(call, module, path, x, args, kwargs):
        cls: Any = layer_class(module)
        known = LAYER_TYPES[cls]
        if not path:
            raise ValueError(
                f'The network is itself a layer, a {type(module).__name__}. Wrap it in a module that calls it.'
            )
        name, kernel = f'{path}/{known.kernel}', module.get_variable('params', known.kernel)
        if kernel is None or name not in flat:
            raise ValueError(
                f'The layer {path}, a {type(module).__name__}, has no parameter {known.kernel!r}, the kernel of '
                f'register_layer({cls.__name__}, kernel={known.kernel!r}).'
            )
        outer = flat[name].shape
        depth = len(outer) - kernel.ndim
        if depth < 0 or outer[depth:] != kernel.shape:
            others[name] = f'its shape is {outer} outside and {kernel.shape} inside: not stacked along leading axes'
        elif path not in quantizable:
            layout, seen = kernel_layout(module, kernel.ndim, args, kwargs), jax.ShapeDtypeStruct(x.shape, x.dtype)
            has_input = known.has_input and jnp.issubdtype(x.dtype, jnp.floating)
            kind = type(module).__name__
            quantizable[path] = Layer(kind, kernel.shape, outer[:depth], layout, seen, known.kernel, has_input)
        elif known.has_input and not quantizable[path].has_input and jnp.issubdtype(x.dtype, jnp.floating):
            seen = jax.ShapeDtypeStruct(x.shape, x.dtype)  # The first call had integer inputs.
            quantizable[path] = dataclasses.replace(quantizable[path], input=seen, has_input=True)
        return call(x)

    def record(call, args, kwargs, context):
        if context.module.scope is not None:
            prefix = '/'.join(context.module.path)
            for key, value in context.module.variables.get('params', {}).items():
                name = f'{prefix}/{key}' if prefix else key
                if name in smallest and hasattr(value, 'ndim'):
                    smallest[name] = min(smallest[name], value.ndim)
                    kinds[name] = type(context.module)
        return call(*args, **kwargs)

    with intercept_methods(record), intercept_layers(look):
        # A new function, because JAX does not retrace a known one and then nothing would be recorded.
        jax.eval_shape(lambda *arguments: run(*arguments), params, *arguments)
    taken = {f'{path}/{layer.weight}' for path, layer in quantizable.items()}
    for path, axes in smallest.items():
        if axes >= 2 and path not in taken and path.rpartition('/')[2] != 'bias':  # A bias may have two axes.
            others.setdefault(path, _why_not(path, kinds.get(path), quantizable))
    return Layers(quantizable, others)


def _why_not(path: str, kind: type | None, quantizable: Mapping[str, Layer]) -> str:
    """Returns why the weight at `path`, of a module of class `kind`, is not quantized."""
    if kind is None:
        return 'its module did not run'
    owner = path.rpartition('/')[0]
    if not owner:
        return f'{kind.__name__} is the network itself; move the weight to a submodule and use register_layer'
    if owner in quantizable:
        return f'{kind.__name__} has one kernel, {quantizable[owner].weight!r}'
    cls = next((cls for cls in kind.__mro__ if cls in LAYER_TYPES), None)
    if cls is not None and kind.param is not cls.param:
        return f'{kind.__name__} overrides `param`, so its operation does not use the values of the parameter'
    if cls is not None:
        if cls is kind:
            return f'the `__call__` of {kind.__name__} did not run'
        return f'{kind.__name__}.__call__ does not run that of {cls.__name__}; use register_layer({kind.__name__})'
    return f'{kind.__name__} is not a registered layer; use register_layer({kind.__name__}, kernel=...)'


def check_names(params: Any) -> None:
    """Checks that no parameter or module name contains a slash.

    Raises:
        ValueError: for a name that contains a slash.
    """
    for keys in traverse_util.flatten_dict(params):
        slashed = [key for key in keys if '/' in str(key)]
        if slashed:
            raise ValueError(
                f'The parameter name {slashed[0]!r} contains a slash, which separates the names in a path. Rename the '
                'module; for nn.WeightNorm, multiply its scales into the kernels first.'
            )


def intercept_layers(function: Callable[..., Any], key: Hashable = None) -> contextlib.AbstractContextManager:
    """Returns a context in which `function(call, module, path, x, args, kwargs)` replaces every call of a layer.

    `call(x)` calls the layer on an input x; args and kwargs are its other arguments. `key` is the key of
    `intercept_methods`.
    """

    def interceptor(call, args, kwargs, context):
        cls = layer_class(context.module)
        # A subclass may call the registered class's method on another input; the operation happens there.
        if cls is None or context.method_name != '__call__' or not is_method_of(cls, context.orig_method):
            return call(*args, **kwargs)
        if type(context.module).param is not cls.param:  # The operation does not use the parameter itself.
            return call(*args, **kwargs)
        name = next((key for key in _first_names(cls) if key in kwargs), None)
        rest = {key: value for key, value in kwargs.items() if args or key != name}
        x, others = (args[0], args[1:]) if args else (kwargs[name], ())
        if not hasattr(x, 'dtype'):
            return call(*args, **kwargs)

        def call_on(x):
            return call(x, *others, **rest)

        return function(call_on, context.module, '/'.join(context.module.path), x, others, rest)

    return intercept_methods(interceptor, key)


def is_method_of(cls: type[nn.Module], method: Any) -> bool:
    """Returns whether an intercepted method is the `__call__` of this class and not of a subclass."""
    own = inspect.unwrap(cls.__call__)
    return getattr(method, 'func', method) in (own, cls.__call__) or getattr(method, '__func__', None) is own


def _first_names(cls: type[nn.Module]) -> list[str]:
    """Returns the name of the first argument of a class's `__call__`, in a list."""
    return list(inspect.signature(cls.__call__).parameters)[1:2]


def kernel_layout(module: Any, ndim: int, args: Any = (), kwargs: Any = None) -> KernelLayout:
    """Returns the position of the output channels in a layer's kernel.

    Args:
        module: the layer.
        ndim: number of axes of the kernel.
        args: positional arguments of the call after the input.
        kwargs: keyword arguments of the call.
    """
    axes = tuple(range(ndim))
    if isinstance(module, nn.ConvTranspose) and module.transpose_kernel:
        return KernelLayout((*axes[:-2], axes[-1], axes[-2]))
    if isinstance(module, nn.DenseGeneral):
        features = module.features
        outputs = 1 if isinstance(features, int) else len(features)
        return KernelLayout(axes, outputs, is_matrix=ndim != 2)
    if isinstance(module, nn.Einsum):
        left, kernel, out = einsum_terms(module, args, kwargs)
        is_output = [letter in out and letter not in left for letter in kernel]
        permutation = tuple(sorted(axes, key=lambda axis: is_output[axis]))
        return KernelLayout(permutation, sum(is_output), is_matrix=True)
    return KernelLayout(axes)


def einsum_terms(module: Any, args: Any, kwargs: Any) -> tuple[str, str, str]:
    """Returns the letters of input, kernel and output of an `nn.Einsum`; an ellipsis is kept as '...'."""
    equation = args[0] if args else (kwargs or {}).get('einsum_str')
    left, _, out = (equation or module.einsum_str).replace(' ', '').partition('->')
    left, kernel = left.split(',')
    return left, kernel, out
