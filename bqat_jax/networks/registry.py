"""Networks by name: how a config names them, and how a user adds one."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.registry import Names, suggest

# Name to a function `make(num_classes, *, cut, **options)`; its options are the keys of `config.network`.
NETWORKS = Names('network')
# What the caller gives a network whose function takes it, and a config cannot: see `register_network`.
CONVOLUTION = 'conv_general_dilated'


def register_network(name: str) -> Callable[[Callable], Callable]:
    """Returns a decorator by which `config.network.name` knows a function `make(num_classes, *, cut, **options)`.

    The function returns a `BlockNetwork`; its options are the keys of `config.network`. If it has a parameter
    `conv_general_dilated` it is given a convolution for its `flax.linen.Conv`s, or None for Linen's own.

    Raises:
        ValueError: if the name belongs to a function of another module.
    """
    return NETWORKS.register(name)


def make_network(
    name: str, num_classes: int, cut: str, options: Mapping[str, Any], conv_general_dilated: Callable | None = None
) -> BlockNetwork:
    """Returns the network called `name`, divided into blocks.

    Args:
        name: a registered name.
        num_classes: number of logits.
        cut: where it is divided, 'stage', 'block' or names of its parts.
        options: of the network.
        conv_general_dilated: computes its convolutions, where the network can be told; Linen's own if None.

    Raises:
        ValueError: for a name, an option or a cut that does not exist, or an option that is missing or of another type.
    """
    make = NETWORKS.get(name)
    parameters = {parameter.name: parameter for parameter in list(inspect.signature(make).parameters.values())[1:]}
    known = [key for key in parameters if key not in ('cut', CONVOLUTION)]
    for key in options:
        if key not in known:
            listed = ', '.join(known)
            raise ValueError(
                f'The network {name!r} has no option {key!r}; there are: {listed}.{suggest(key, known)} A recipe for '
                'another network sets config.network whole.'
            )
    for key in known:
        if parameters[key].default is inspect.Parameter.empty and key not in options:
            raise ValueError(f'The network {name!r} needs network.{key}.')
    for key, value in options.items():
        _check_type(name, parameters[key], value)
    given = {CONVOLUTION: conv_general_dilated} if CONVOLUTION in parameters else {}
    return make(num_classes, cut=cut, **options, **given)


def _check_type(name: str, parameter: inspect.Parameter, value: Any) -> None:
    """Checks an option by the type of its default, or by its annotation where it has none."""
    default = parameter.default
    kind = parameter.annotation if default is inspect.Parameter.empty else type(default)
    kinds = {bool: bool, int: int, float: (int, float), str: str}.get(kind)
    if kinds and not (isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))):
        raise ValueError(f'network.{parameter.name}={value!r}: of {name!r} it must be of type {kind.__name__}.')
