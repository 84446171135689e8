"""Traces a network on shapes to determine its random streams, its collections and the values that cross its cuts."""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
from flax import errors

from bqat_jax.blocks.block_network import (
    BATCH_STATS,
    PARAMS,
    BlockNetwork,
    Crossing,
    check_alike,
    describe_inputs,
    short,
)
from bqat_jax.blocks.linen import check_called
from bqat_jax.blocks.program import Program
from bqat_jax.blocks.switch import EVALUATE_NAMES, SWITCHED, TRAIN_NAMES
from bqat_jax.interception import intercept_methods

_STREAM = re.compile(r'needs PRNG for "(.*?)"')


def with_inputs(network: BlockNetwork, inputs: Any) -> BlockNetwork:
    """Returns the network for inputs of the shapes of one example; the network is only traced.

    Args:
        network: a network, with or without inputs.
        inputs: a tree of shapes and dtypes without the batch axis, `jax.ShapeDtypeStruct`s or arrays; a plain shape,
            such as (32, 32, 3), means one float32 array.

    Raises:
        ValueError: if the network does not run on the inputs, cannot be cut at its blocks, has other inputs already, or
            contains an `nnx.Module`.
    """
    return explore(network, inputs)[0]


def explore(network: BlockNetwork, inputs: Any) -> tuple[BlockNetwork, dict[str, Any]]:
    """Returns the network of `with_inputs`, and shapes and dtypes of its variables; arguments as `with_inputs`."""
    inputs = describe_inputs(inputs)
    if network.inputs is not None:
        if network.inputs != inputs:
            raise ValueError(
                f'The network was made for inputs like {short(network.inputs)}, and these are like {short(inputs)} '
                '(shapes without the batch axis). Make the network for these inputs.'
            )
        return network, network.shapes()
    network = dataclasses.replace(network, inputs=inputs)
    key = jax.eval_shape(lambda: jax.random.key(0))
    try:
        with check_called():
            variables = network.shapes()
        collections = tuple(name for name in variables if name != PARAMS)
        network, training = _trace_training(dataclasses.replace(network, mutable=collections), variables, key)
        network = dataclasses.replace(network, mutable=_find_mutable(variables, training))
        small, large = (network.trace(variables, key, train=False, size=size) for size in (2, 3))
        network = dataclasses.replace(network, crossings=_find_crossings(network, small, large))
        check_alike(network, training, 2, 'in training')
    except (errors.ScopeParamNotFoundError, errors.ScopeCollectionNotFound, errors.ScopeVariableNotFoundError) as error:
        raise ValueError(
            f'In training the network asks for a variable that initialization in evaluation did not make ({error}). '
            'Make all variables in both, such as those of a head that is only used in training.'
        ) from error
    except NameError as error:
        if 'axis name' not in str(error):
            raise
        raise ValueError(
            f'The network asks for a mapped axis ({error}), which only pmap or vmap bind. A network sees the complete '
            'batch here, even if it is sharded over devices: leave axis_name out.'
        ) from error
    return network, variables


def _trace_training(network: BlockNetwork, variables: Any, key: Any) -> tuple[BlockNetwork, Program]:
    """Returns the network with the random streams that it asks for, and its program in training."""
    network = dataclasses.replace(network, streams=())
    while True:
        try:
            return network, network.trace(variables, key, train=True, size=2)
        except errors.InvalidRngError as error:
            match = _STREAM.search(str(error))
            if match is None or match[1] in network.streams:
                raise
            network = dataclasses.replace(network, streams=(*network.streams, match[1]))


def _find_mutable(variables: Any, training: Program) -> tuple[str, ...]:
    """Returns the names of the batch statistics and of the other collections that training changes."""
    changed = [BATCH_STATS]
    for name, (shapes, is_same) in training.describe_state().items():
        if jax.tree.map(lambda x: (x.shape, x.dtype), variables[name]) != shapes:
            raise ValueError(
                f'The collection {name!r} has another structure after a step than before, as with `sow`, so it cannot '
                "be carried. Sow into 'intermediates', or return the values as outputs."
            )
        if not is_same and name not in changed:
            changed.append(name)
    return tuple(changed)


def _find_crossings(network: BlockNetwork, small: Program, large: Program) -> tuple[tuple[Crossing, ...], ...]:
    """Returns the values that cross every cut, and the outputs, from programs for batches of two and of three."""
    names = (*(f'The cut after {block!r}' for block in network.blocks), 'The network')
    crossings = []
    shapes = zip(names, small.crossing_shapes(), large.crossing_shapes(), small.are_shared(), strict=True)
    for name, twos, threes, shared in shapes:
        if len(twos) != len(threes):
            raise ValueError(f'{name} carries {len(twos)} arrays for two examples and {len(threes)} for three.')
        described = [_crossing(name, *pair) for pair in zip(twos, threes, strict=True)]
        crossings.append(tuple(crossing._replace(is_shared=x) for crossing, x in zip(described, shared, strict=True)))
    return tuple(crossings)


def _crossing(name: str, two: Any, three: Any) -> Crossing:
    (shape, dtype), (larger, _) = two, three
    axes = [axis for axis, (a, b) in enumerate(zip(shape, larger, strict=True)) if a != b]
    if len(axes) > 1 or any(3 * shape[axis] != 2 * larger[axis] for axis in axes):
        raise ValueError(
            f'{name} carries an array of shape {list(shape)} for two examples and {list(larger)} for three: it must '
            'have one batch axis. Cut elsewhere.'
        )
    axis = axes[0] if axes else None
    return Crossing(tuple(n // 2 if number == axis else n for number, n in enumerate(shape)), dtype, axis, False)


def check_switch(network: BlockNetwork) -> None:
    """Checks that a network without a training switch does not need one; its inputs must be known.

    Raises:
        ValueError: if it contains batch norms or dropouts; the message names the first.
    """
    seen = []

    def interceptor(call, args, kwargs, context):
        module = context.module
        if isinstance(module, SWITCHED) and not (isinstance(module, nn.Dropout) and module.rate == 0):
            seen.append('/'.join(module.path) + f' ({type(module).__name__})')
        return call(*args, **kwargs)

    with intercept_methods(interceptor):
        network.shapes()
    if seen:
        raise ValueError(
            f'The network has {seen[0]}, which differs between training and evaluation, but no training switch: no '
            f'argument of __call__ and no field is called {", ".join(TRAIN_NAMES)}, or, with the opposite meaning, '
            f'{", ".join(EVALUATE_NAMES)}. Give call=lambda module, inputs, train: ... .'
        )


def check_acts(network: BlockNetwork) -> None:
    """Checks that the recognized training switch reaches the modules that need it; the inputs must be known.

    Raises:
        ValueError: if all batch norms and dropouts run in training as in evaluation.
    """
    seen: dict[str, bool] = {}

    def interceptor(call, args, kwargs, context):
        module = context.module
        if isinstance(module, SWITCHED) and context.method_name == '__call__':
            name = 'use_running_average' if isinstance(module, nn.BatchNorm) else 'deterministic'
            given = kwargs.get(name, args[1] if len(args) > 1 else None)
            acts = not (getattr(module, name) if given is None else given)
            if isinstance(module, nn.BatchNorm) or module.rate > 0:
                seen['/'.join(module.path) + f' ({type(module).__name__})'] = acts
        return call(*args, **kwargs)

    def run(variables, inputs):
        with intercept_methods(interceptor):
            return network.apply(variables, inputs, train=True, key=jax.random.key(0))

    jax.eval_shape(run, network.shapes(), network.batch_of(2))
    if seen and not any(seen.values()):
        raise ValueError(
            f'In training {next(iter(seen))} behaves as in evaluation: the training switch that was recognized by name '
            'does not reach it. Give call=lambda module, inputs, train: ... that sets all switches of the network.'
        )
