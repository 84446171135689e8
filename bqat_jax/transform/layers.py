"""Finds the layers of a Flax Linen network that can be quantized from outside, and what else has weights.

A network is run on shapes alone, and every call of a layer is looked at as it happens
(`flax.linen.intercept_methods`). So it does not matter where a layer stands: it may be shared, be called more than
once, or lie inside `nn.remat`, `nn.scan` or `nn.vmap`. Where the latter two stack the parameters of many layers along
leading axes, every layer of the stack is quantized on its own.
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
    """What is known of a class of layers.

    Attributes:
        kernel: name of the parameter whose values its operation uses, output channels last if Linen does not say
            otherwise.
        has_input: whether the first argument of `__call__` is what the operation takes.
    """

    kernel: str = WEIGHT_NAME
    has_input: bool = True


# The layers whose weights, and whose input, can be quantized.
LAYER_TYPES: dict[type[nn.Module], LayerType] = {
    **dict.fromkeys((nn.Conv, nn.ConvTranspose, nn.ConvLocal, nn.Dense, nn.DenseGeneral, nn.Einsum), LayerType()),
    nn.Embed: LayerType('embedding', has_input=False),
    # The parts of `nn.OptimizedLSTMCell`, which multiplies by several kernels at once.
    DenseParams: LayerType(has_input=False),
}


def register_layer(cls: type[nn.Module], *, kernel: str = WEIGHT_NAME, quantize_input: bool = True) -> type[nn.Module]:
    """Makes a class of layers known, so that its kernel and its input are quantized; returns the class.

    Args:
        cls: a Linen module with a parameter of its own.
        kernel: name of that parameter, whose last axis is that of the output channels.
        quantize_input: whether the first argument of its `__call__` is quantized too.

    Raises:
        TypeError: for what is no class of Linen modules.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f'{cls!r} is no class of flax.linen.Module: register_layer takes one.')
    LAYER_TYPES[cls] = LayerType(kernel, quantize_input)
    return cls


def layer_class(module: Any) -> type[nn.Module] | None:
    """Returns the class by which a module is known as a layer, itself or the nearest above it; None for no layer."""
    return next((cls for cls in type(module).__mro__ if cls in LAYER_TYPES), None)


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
        weight: name of its kernel.
        has_input: whether its input can be quantized.
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
        others: path of every other parameter with two axes or more inside stacks, and why no quantizer reaches it.
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
    params = nn.meta.unbox(params)
    check_names(params)
    flat: Any = traverse_util.flatten_dict(params, sep='/')
    quantizable: dict[str, Layer] = {}
    others: dict[str, str] = {}
    kinds: dict[str, type] = {}  # of the modules that have the parameters
    smallest = {path: leaf.ndim for path, leaf in flat.items()}  # axes inside stacks

    def look(call, module, path, x, args, kwargs):
        cls: Any = layer_class(module)
        known = LAYER_TYPES[cls]
        if not path:
            raise ValueError(
                f'The network is itself a layer, a {type(module).__name__}: put it in a module that calls it.'
            )
        name, kernel = f'{path}/{known.kernel}', module.get_variable('params', known.kernel)
        if kernel is None or name not in flat:
            raise ValueError(
                f'The layer {path}, a {type(module).__name__}, has no parameter {known.kernel!r}, which '
                f'register_layer({cls.__name__}, kernel={known.kernel!r}) says.'
            )
        outer = flat[name].shape
        depth = len(outer) - kernel.ndim
        if depth < 0 or outer[depth:] != kernel.shape:
            others[name] = f'its shape is {outer} outside and {kernel.shape} inside: stacked, but not along the front'
        elif path not in quantizable:
            layout, seen = kernel_layout(module, kernel.ndim, args, kwargs), jax.ShapeDtypeStruct(x.shape, x.dtype)
            has_input = known.has_input and jnp.issubdtype(x.dtype, jnp.floating)
            kind = type(module).__name__
            quantizable[path] = Layer(kind, kernel.shape, outer[:depth], layout, seen, known.kernel, has_input)
        elif known.has_input and not quantizable[path].has_input and jnp.issubdtype(x.dtype, jnp.floating):
            seen = jax.ShapeDtypeStruct(x.shape, x.dtype)  # its first call was on integers
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
        # A function of our own: JAX does not trace one again that it has traced before, and then nothing is recorded.
        jax.eval_shape(lambda *arguments: run(*arguments), params, *arguments)
    taken = {f'{path}/{layer.weight}' for path, layer in quantizable.items()}
    for path, axes in smallest.items():
        if axes >= 2 and path not in taken and path.rpartition('/')[2] != 'bias':  # it may have two axes
            others.setdefault(path, _why_not(path, kinds.get(path), quantizable))
    return Layers(quantizable, others)


def _why_not(path: str, kind: type | None, quantizable: Mapping[str, Layer]) -> str:
    """Why no quantizer reaches the weight at a path, of a module of some class."""
    if kind is None:
        return 'its module did not run'
    owner = path.rpartition('/')[0]
    if not owner:
        return f'{kind.__name__} is the network itself: in a submodule of its own, register_layer can make it known'
    if owner in quantizable:
        return f'{kind.__name__} has one kernel, {quantizable[owner].weight!r}'
    cls = next((cls for cls in kind.__mro__ if cls in LAYER_TYPES), None)
    if cls is not None and kind.param is not cls.param:
        return f'{kind.__name__} overrides `param`, so that its operation uses other values than the parameter has'
    if cls is not None:
        if cls is kind:
            return f'the `__call__` of {kind.__name__} did not run'
        return f"{kind.__name__} has a `__call__` that does not run {cls.__name__}'s: register_layer({kind.__name__})"
    return f'{kind.__name__} is no layer that is known: register_layer({kind.__name__}, kernel=...) makes it known'


def check_names(params: Any) -> None:
    """Checks that paths of parameters can be told apart from their names.

    Raises:
        ValueError: for a name that holds a slash.
    """
    for keys in traverse_util.flatten_dict(params):
        slashed = [key for key in keys if '/' in str(key)]
        if slashed:
            raise ValueError(
                f'The name {slashed[0]!r} among the parameters holds a slash, which separates the names in a path. '
                'Give the module another name; of nn.WeightNorm take the network after its scales are multiplied in.'
            )


def intercept_layers(function: Callable[..., Any], key: Hashable = None) -> contextlib.AbstractContextManager:
    """Returns a context in which `function(call, module, path, x, args, kwargs)` replaces every call of a layer.

    `call(x)` is the layer's own call on another input; args and kwargs are the rest of its arguments. The key is equal
    for functions that do the same, see `intercept_methods`.
    """

    def interceptor(call, args, kwargs, context):
        cls = layer_class(context.module)
        # A subclass may call this class's own method, on another input: it is there that the operation happens.
        if cls is None or context.method_name != '__call__' or not is_method_of(cls, context.orig_method):
            return call(*args, **kwargs)
        if type(context.module).param is not cls.param:  # the kernel that is used is not the parameter
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
    """Returns whether a method that an interceptor sees is the `__call__` of this class, and not of a subclass."""
    own = inspect.unwrap(cls.__call__)
    return getattr(method, 'func', method) in (own, cls.__call__) or getattr(method, '__func__', None) is own


def _first_names(cls: type[nn.Module]) -> list[str]:
    """The name of the first argument of a class's `__call__`."""
    return list(inspect.signature(cls.__call__).parameters)[1:2]


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
