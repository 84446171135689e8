"""Checks that an argument is a network, and that it matches a frozen network."""

from typing import Any

from flax import traverse_util

from bqat_jax.blocks.block_network import PARAMS, BlockNetwork
from bqat_jax.export.frozen import Frozen

MOST_NAMED = 3


def check_network(network: Any) -> None:
    """Checks that a network is a `BlockNetwork` that knows its inputs.

    Raises:
        TypeError: for another object, such as a module.
        ValueError: for a network without inputs.
    """
    if not isinstance(network, BlockNetwork):
        raise TypeError(
            f'network is a {type(network).__name__}, and export takes a BlockNetwork. Use replacement.network of '
            'replace_blocks, or the result of bq.split_after(module, ends, inputs).'
        )
    network.batch_of(1)


def check_fits(frozen: Frozen, network: BlockNetwork) -> None:
    """Checks that the parameters of a network and a frozen one have equal paths and shapes.

    Raises:
        ValueError: naming parameters that differ.
    """
    flat: Any = traverse_util.flatten_dict(network.shapes()[PARAMS], sep='/')
    wanted = {path: tuple(x.shape) for path, x in flat.items()}
    given = {path: x.shape for path, x in frozen.floats.items()}
    for layer in frozen.layers.values():
        if layer.weights is not None:
            given[layer.weight] = layer.weights.codes.shape
    for path, (scale, bias) in frozen.norms.items():  # a frozen norm has both, even if the layer has not
        given |= {
            f'{path}/{name}': x.shape for name, x in (('scale', scale), ('bias', bias)) if f'{path}/{name}' in wanted
        }
    missing, unknown = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    differ = [
        f'{path} {given[path]} -> {wanted[path]}' for path in given if given[path] != wanted.get(path, given[path])
    ]
    for names, what in (
        (missing, 'the network has parameters that the exported one lacks'),
        (unknown, 'the exported one has parameters that the network lacks'),
        (differ, 'shapes differ (exported -> network)'),
    ):
        if names:
            more = f' and {len(names) - MOST_NAMED} more' if len(names) > MOST_NAMED else ''
            raise ValueError(
                f'The exported network is not this one: {what}: {", ".join(names[:MOST_NAMED])}{more}. Use the '
                'network that was exported, or the file that belongs to this one.'
            )
