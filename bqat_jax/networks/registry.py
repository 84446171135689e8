"""The registry of networks."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.registry import Names, suggest

# Functions `make(num_classes, *, cut, **options)` by name; the options are the keys of `config.network`.
NETWORKS = Names('network')
# An argument that the program passes, not the config; see `register_network`.
CONVOLUTION = 'conv_general_dilated'


def register_network(name: str) -> Callable[[Callable], Callable]:
    """Returns a decorator that registers a function `make(num_classes, *, cut, **options)` for `config.network.name`.

    The function returns a `BlockNetwork`; its options are the keys of `config.network`. A parameter
    `conv_general_dilated` receives a convolution for `flax.linen.Conv`, or None for Linen's default.

    Raises:
        ValueError: if another module registered the name.
    """
    return NETWORKS.register(name)


def make_network(
    name: str, num_classes: int, cut: str, options: Mapping[str, Any], conv_general_dilated: Callable | None = None
) -> BlockNetwork:
    """Returns the network `name`, divided into blocks.

    Args:
        name: a registered name.
        num_classes: number of logits.
        cut: 'stage', 'block' or names of the network's parts.
        options: options of the network.
        conv_general_dilated: computes the convolutions, if the network has the parameter; None for Linen's default.

    Raises:
        ValueError: for an unknown name, option or cut, or an option that is missing or of another type.
    """
    make = NETWORKS.get(name)
    parameters = {parameter.name: parameter for parameter in list(inspect.signature(make).parameters.values())[1:]}
    known = [key for key in parameters if key not in ('cut', CONVOLUTION)]
    for key in options:
        if key not in known:
            listed = ', '.join(known)
            raise ValueError(
                f'The network {name!r} has no option {key!r}; there are: {listed}.{suggest(key, known)} A recipe for '
                'another network must replace config.network.'
            )
    for key in known:
        if parameters[key].default is inspect.Parameter.empty and key not in options:
            raise ValueError(f'The network {name!r} needs network.{key}.')
    for key, value in options.items():
        _check_type(name, parameters[key], value)
    given = {CONVOLUTION: conv_general_dilated} if CONVOLUTION in parameters else {}
    return make(num_classes, cut=cut, **options, **given)


def _check_type(name: str, parameter: inspect.Parameter, value: Any) -> None:
    """Checks the type of an option against its default, or against its annotation if it has no default."""
    default = parameter.default
    kind = parameter.annotation if default is inspect.Parameter.empty else type(default)
    kinds = {bool: bool, int: int, float: (int, float), str: str}.get(kind)
    if kinds and not (isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))):
        raise ValueError(f'network.{parameter.name}={value!r}: must be of type {kind.__name__} for {name!r}.')
