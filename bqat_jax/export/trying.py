"""Tries a frozen network: compares every layer on codes with the layer on values.

A module may use its parameters in any way: transform them before a layer, share them, call a layer with another
equation, replace its product. So every candidate for an integer layer or an affine batch norm is run both ways on
random examples; one that differs stays as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.blocks.block_network import PARAMS, BlockNetwork
from bqat_jax.export.frozen import INTEGER, Frozen
from bqat_jax.export.inference import SLOT, Program, arrays_of, is_batch_norm, normalize_affine
from bqat_jax.export.operations import LinearCall, decode, encode
from bqat_jax.interception import intercept_methods
from bqat_jax.replacement.paths import Variables
from bqat_jax.transform.layers import intercept_layers
from bqat_jax.transform.tagging import run_and_collect, tag

# A batch size that is unlikely to equal a dimension of the network.
EXAMPLES = 5
# Largest difference from rounding, relative to the largest output.
TOLERANCE = 1e-4
LARGEST_NUMBER = 7


def find_wrong(frozen: Frozen, network: BlockNetwork, variables: Variables) -> tuple[set[str], set[str]]:
    """Returns the paths of layers whose outputs differ on codes, and of batch norms that are not affine.

    Args:
        frozen: the frozen network to try.
        network: the network that was frozen.
        variables: the trained arrays.
    """
    program, paths, failed = Program(frozen, network), list[str](), set[str]()

    def compare(path, x, expected, compute):
        try:
            got = compute()
        except Exception:  # a module that fails on codes still runs on values
            failed.add(path)
            return
        if got.shape != expected.shape:
            failed.add(path)
            return
        gap, size = jnp.max(jnp.abs(got - expected)), jnp.max(jnp.abs(expected))
        if path not in paths:
            paths.append(path)
        tag(paths.index(path), [gap, size])

    def try_layer(call, module, path, x, args, kwargs):
        layer = frozen.layers.get(path)
        if layer is None or layer.inputs is None:
            return call(x)
        slot: Any = module.get_variable(PARAMS, SLOT)
        codes = encode(layer.inputs, slot['inputs'], x)
        y = call(decode(layer.inputs.decoding, slot['inputs'], codes).astype(x.dtype))
        if layer.mode == INTEGER:
            own = LinearCall(module, slot['kernel'], args, kwargs)
            compare(path, x, y, lambda: program.run_integer(own, layer, slot, codes))
        return y

    def try_norm(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if is_batch_norm(context) and '/'.join(context.module.path) in frozen.norms:
            x = args[0] if args else kwargs['x']
            compare('/'.join(context.module.path), x, y, lambda: normalize_affine(context.module, x).astype(y.dtype))
        return y

    def run(arrays, collections, params, inputs):
        own = program.variables(arrays)
        own = {**own, **collections, PARAMS: _joined(own[PARAMS], params)}
        with intercept_methods(try_norm), intercept_layers(try_layer):
            return network.apply(own, inputs, train=False)[0]

    arguments = (arrays_of(frozen), variables.collections, variables.params, _draw(network))
    try:
        # In float32: accelerators multiply in fewer bits by default.
        with jax.default_matmul_precision('highest'):
            tried = jax.jit(lambda *arguments: run_and_collect(run, *arguments)[1])
            collected = jax.device_get(tried(*arguments))
    except Exception:  # a module may reject arrays beside its parameters
        return set(frozen.layers), set(frozen.norms)
    for number, path in enumerate(paths):
        for gap, size in collected.get(number, ()):
            if not np.all(np.asarray(gap) <= TOLERANCE * np.asarray(size) + np.finfo(np.float32).tiny):
                failed.add(path)
    return failed & frozen.layers.keys(), failed & frozen.norms.keys()


def _joined(own: Any, params: Any) -> Any:
    """The frozen network's parameters, completed by trained ones, such as those of batch norms."""
    if not isinstance(own, dict):
        return own
    missing = {name: x for name, x in params.items() if name not in own} if isinstance(params, dict) else {}
    return {name: _joined(x, params.get(name)) if isinstance(params, dict) else x for name, x in own.items()} | missing


def _draw(network: BlockNetwork) -> Any:
    """A random batch of inputs."""
    generator = np.random.default_rng(0)

    def draw(x):
        if x.dtype == jnp.bool_:
            return generator.random(x.shape) < 0.5
        if jnp.issubdtype(x.dtype, jnp.integer):
            return generator.integers(0, LARGEST_NUMBER, x.shape).astype(x.dtype)
        return generator.normal(size=x.shape).astype(x.dtype)

    return jax.tree.map(draw, network.batch_of(EXAMPLES))
