"""The layers of a network that is divided into blocks, found on shapes alone."""

from collections.abc import Sequence
from typing import Any

import jax

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.transform import Layers, find_layers


def find_network_layers(network: BlockNetwork, variables: Any, image_shape: Sequence[int]) -> Layers:
    """Returns the layers of a network for images of shape (height, width, channels); nothing is computed.

    Args:
        network: the network.
        variables: its variables, or their shapes.
        image_shape: of one example.
    """
    return find_layers(_run(network, network.names), variables['params'], _batch_of_one(image_shape), variables)


def blocks_of_layers(network: BlockNetwork, variables: Any, image_shape: Sequence[int]) -> dict[str, str]:
    """Returns 'stem', 'block 1', ... or 'head' for the path of every layer; arguments as `find_network_layers`."""
    blocks: dict[str, str] = {}
    x: Any = _batch_of_one(image_shape)
    for number, names in enumerate((network.stem, *network.blocks, network.head)):
        label = {0: 'stem', len(network.blocks) + 1: 'head'}.get(number, f'block {number}')
        if names:
            run = _run(network, names)
            for path in find_layers(run, variables['params'], x, variables).quantizable:
                blocks.setdefault(path, label)
            x = jax.eval_shape(run, variables['params'], x, variables)
    return blocks


def _run(network: BlockNetwork, names: Sequence[str]):
    def run(params, x, variables):
        return network.apply({**variables, 'params': params}, x, names, train=False)[0]

    return run


def _batch_of_one(image_shape: Sequence[int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *image_shape), 'float32')
