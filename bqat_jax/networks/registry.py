"""Networks by name: how a config names them, and how a user adds one."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from bqat_jax.blocks.block_network import CutNetwork
from bqat_jax.networks.cifar_resnet import cifar_resnet
from bqat_jax.networks.mobilenet_v2 import mobilenet_v2
from bqat_jax.networks.resnet import resnet
from bqat_jax.networks.vgg_small import vgg_small
from bqat_jax.networks.vit import vit

Make = Callable[..., CutNetwork]
# Name to a function `make(num_classes, *, cut, **options)`; its options are the keys of `config.network`.
NETWORKS: dict[str, Make] = {
    'cifar_resnet': cifar_resnet,
    'mobilenet_v2': mobilenet_v2,
    'resnet': resnet,
    'vgg_small': vgg_small,
    'vit': vit,
}


def register_network(name: str) -> Callable[[Make], Make]:
    """Returns a decorator by which `config.network.name` knows a function `make(num_classes, *, cut, **options)`.

    Raises:
        ValueError: if the name belongs to a function of another module.
    """

    def decorate(make: Make) -> Make:
        known = NETWORKS.get(name)
        if known is not None and known.__module__ != make.__module__:
            raise ValueError(f'There is a network {name!r} already, in {known.__module__}; take another name.')
        NETWORKS[name] = make
        return make

    return decorate


def make_network(name: str, num_classes: int, cut: str, options: Mapping[str, Any]) -> CutNetwork:
    """Returns the network called `name`, cut into blocks.

    Raises:
        ValueError: for a name, an option or a cut that does not exist, or an option that is missing.
    """
    if name not in NETWORKS:
        raise ValueError(f'network.name={name!r}: it must be one of {", ".join(NETWORKS)}.')
    parameters = list(inspect.signature(NETWORKS[name]).parameters.values())[1:]
    known = [parameter.name for parameter in parameters if parameter.name != 'cut']
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f' Did you mean {near[0]!r}?' if near else ''
            raise ValueError(f'The network {name!r} has no option {key!r}; there are: {", ".join(known)}.{hint}')
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in (*options, 'cut'):
            raise ValueError(f'The network {name!r} needs network.{parameter.name}.')
    return NETWORKS[name](num_classes, cut=cut, **options)
