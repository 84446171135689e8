"""Traces a config's network on shapes, once for all experiments of a process that share it."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.blocks.exploring import explore
from bqat_jax.networks import make_network
from bqat_jax.networks.registry import NETWORKS
from bqat_jax.replacement.network_layers import find_network_layers, network_unquantized_share
from bqat_jax.transform import LAYER_TYPES, Layers


@dataclasses.dataclass(frozen=True)
class ExploredNetwork:
    """A network with its inputs' shapes, and the results of tracing it; no array is computed.

    Attributes:
        network: the network.
        shapes: shapes of its variables, by collection.
        layers: its quantizable layers and its other weights.
        unquantized_share: share of its multiply-accumulates with weights that no quantizer reaches.
        outputs: shapes of its outputs in evaluation, for one example.
    """

    network: BlockNetwork
    shapes: Any
    layers: Layers
    unquantized_share: float
    outputs: Any


def explore_network(
    name: str, num_classes: int, cut: str, options: Mapping[str, Any], convolution: Callable | None, inputs: Any
) -> ExploredNetwork:
    """Makes a network and traces it on the shapes of its inputs; results are cached.

    Tracing takes seconds, and the runs of a sweep share one network.

    Args:
        name: as of `make_network`.
        num_classes: as of `make_network`.
        cut: as of `make_network`.
        options: as of `make_network`.
        convolution: as of `make_network`.
        inputs: shapes of one example, as of `with_inputs`.

    Raises:
        ValueError: as `make_network` and `with_inputs` do.
    """
    # The registries' entries are part of the cache key: a plugin may have changed them.
    registered = (NETWORKS.get(name), *LAYER_TYPES.items())
    arguments = (registered, name, num_classes, cut, convolution, inputs)
    try:
        hash((arguments, *options.values()))
    except TypeError:  # options with lists and trees of inputs cannot be cached
        return _explore(*arguments, **options)
    return _explore_once(*arguments, **options)


def _explore(
    registered: Any, name: str, num_classes: int, cut: str, convolution: Callable | None, inputs: Any, /, **options: Any
) -> ExploredNetwork:
    """`explore_network` without its cache; `registered` holds the registries' entries, as part of the cache key."""
    del registered
    network, shapes = explore(make_network(name, num_classes, cut, options, convolution), inputs)
    layers = find_network_layers(network, shapes)
    share = network_unquantized_share(network, shapes, layers)

    def outputs(variables, inputs):
        return network.apply(variables, inputs, train=False)[0]

    return ExploredNetwork(network, shapes, layers, share, jax.eval_shape(outputs, shapes, network.batch_of(1)))


# Typed: depth=20 is valid and depth=20.0 is not.
_explore_once = functools.lru_cache(maxsize=8, typed=True)(_explore)
