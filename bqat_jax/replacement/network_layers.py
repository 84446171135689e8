"""The layers of a network that is divided into blocks, found on shapes alone."""

from typing import Any

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.transform import Layers, find_layers


def find_network_layers(network: BlockNetwork, variables: Any) -> Layers:
    """Returns the layers of a network that knows its inputs; nothing is computed.

    Args:
        network: the network.
        variables: its variables, or their shapes.
    """
    return find_layers(_run(network), variables['params'], network.batch_of(1), variables)


def blocks_of_layers(network: BlockNetwork, variables: Any) -> dict[str, str]:
    """Returns 'block 1', ... or 'head' for the path of every module; arguments as `find_network_layers`.

    One that runs in several of them, as the stack of an `nn.scan` that is cut between its iterations, has the first and
    the last: 'block 1 - head'.
    """
    pieces = network.trace(variables, None, train=False, size=1).modules()
    labels = [*(f'block {number}' for number in range(1, len(pieces))), 'head']
    blocks = {}
    for path in set().union(*pieces):
        own = [label for label, paths in zip(labels, pieces, strict=True) if path in paths]
        blocks[path] = own[0] if len(own) == 1 else f'{own[0]} - {own[-1]}'
    return blocks


def _run(network: BlockNetwork):
    def run(params, x, variables):
        return network.apply({**variables, 'params': params}, x, train=False)[0]

    return run
