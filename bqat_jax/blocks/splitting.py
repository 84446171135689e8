"""Divides any Linen module into blocks without changing it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn

from bqat_jax.blocks.block_network import BlockNetwork, describe_inputs
from bqat_jax.blocks.exploring import check_acts, check_switch, with_inputs
from bqat_jax.blocks.linen import check_linen
from bqat_jax.blocks.program import mark
from bqat_jax.blocks.switch import Call, has_switch, make_call

Piece = Callable[[Any, Any, bool], Any]


def split_after(module: nn.Module, ends: Sequence[str], inputs: Any, call: Call | None = None) -> BlockNetwork:
    """Returns a module divided after the submodules `ends`.

    A block starts at the end of the previous block, or at the input, and ends at the output of its submodule in `ends`.
    The head follows the last block. Submodules may be created in `setup` or in a compact method. Everything that
    crosses a cut is carried over it, including operations between submodules and shortcuts.

    Args:
        module: the module, called as `module(x)` or `module(x, train=...)`.
        ends: paths of the submodules in the order of their calls, such as 'layer1' or 'encoder/layer1'; a submodule
            with several calls may be listed several times. 'layers[3]' is the fourth iteration of an `nn.scan`.
        inputs: shapes and dtypes of one example without the batch axis, a tree of `jax.ShapeDtypeStruct` or arrays; a
            tuple is passed as positional arguments, a dict as keyword arguments. A plain (height, width, channels)
            means one float32 array.
        call: `call(module, inputs, train)` calls the bound module and returns its outputs; by default, arguments and
            fields that switch between training and evaluation are recognized by name.

    Raises:
        ValueError: if a submodule does not run, a cut is impossible there, or the module has batch norm or dropout but
            no recognized training switch; for fewer than two ends; or for a module that is not Linen.
    """
    check_linen(module)
    if isinstance(ends, str):
        raise ValueError(f'ends={ends!r}: must be a list. Give a list of paths, [{ends!r}, ...].')
    network = BlockNetwork(module, tuple(ends), call or make_call(module))
    if call is None and not has_switch(module):
        check_switch(dataclasses.replace(network, inputs=describe_inputs(inputs)))
    network = with_inputs(network, inputs)
    if call is None:
        check_acts(network)
    return network


def split_into(module: nn.Module, stem: Piece, blocks: Sequence[Piece], head: Piece) -> BlockNetwork:
    """Returns a module divided into functions `piece(module, x, train)` of the bound module.

    Args:
        module: a module that creates its submodules in `setup`, so that the functions can call them.
        stem: maps the inputs to the input of the first block.
        blocks: one function per block; at least two.
        head: maps the output of the last block to the outputs.

    Raises:
        ValueError: for fewer than two blocks, or for a module that is not Linen.
    """
    check_linen(module)
    names = tuple(f'block{number}' for number in range(1, len(blocks) + 1))

    def call(module, inputs, train):
        x = stem(module, inputs, train)
        for name, block in zip(names, blocks, strict=True):
            x = mark(block(module, x, train), f':{name}')
        return head(module, x, train)

    return BlockNetwork(module, tuple(f':{name}' for name in names), call)
