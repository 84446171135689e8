"""The layers of a block network, determined on shapes."""

from typing import Any

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.transform import Layers, find_layers, unquantized_share


def find_network_layers(network: BlockNetwork, variables: Any) -> Layers:
    """Returns the layers of a network with known inputs; the network is only traced.

    Args:
        network: the network.
        variables: its variables, or their shapes.
    """
    return find_layers(_run(network), variables['params'], network.batch_of(1), variables)


def network_unquantized_share(network: BlockNetwork, variables: Any, layers: Layers) -> float:
    """Returns the share of the multiply-accumulates with weights that are not quantized.

    Args:
        network: the network.
        variables: its variables, or their shapes.
        layers: layers from `find_network_layers`.
    """
    return unquantized_share(_run(network), layers.others, variables['params'], network.batch_of(1), variables)


def blocks_of_layers(network: BlockNetwork, variables: Any, layers: Layers) -> dict[str, str]:
    """Returns 'block 1', ... or 'head' for the path of every layer; arguments as `network_unquantized_share`.

    A layer that runs in several blocks, such as the stack of an `nn.scan` cut between iterations, gets the first and
    the last: 'block 1 - head'.
    """
    pieces = network.trace(variables, None, train=False, size=1).modules()
    labels = [*(f'block {number}' for number in range(1, len(pieces))), 'head']
    blocks = {}
    for path in layers.quantizable:
        own = [label for label, paths in zip(labels, pieces, strict=True) if path in paths]
        blocks[path] = ' - '.join(dict.fromkeys((own[0], own[-1]))) if own else labels[0]
    return blocks


def _run(network: BlockNetwork):
    def run(params, x, variables):
        return network.apply({**variables, 'params': params}, x, train=False)[0]

    return run
