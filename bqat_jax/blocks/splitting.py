"""Cuts a user's own Linen module into blocks, without a change to it."""

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
    """Returns a module divided after the submodules called `ends`.

    A block reaches from the end of the one before, or from the input, to the output of its submodule in `ends`; the
    head is what follows. It does not matter whether the submodules are made in `setup` or in a compact method, nor what
    stands between them, nor what passes by a cut: all of it is carried over.

    Args:
        module: the module, called as `module(x)` or `module(x, train=...)`.
        ends: paths of the submodules in the order of their calls, such as 'layer1' or 'encoder/layer1'; one that is
            called more than once may stand there as often. 'layers[3]' is the fourth iteration of an `nn.scan`.
        inputs: shapes and dtypes of one example without the batch axis, a tree of `jax.ShapeDtypeStruct` or arrays; a
            tuple of inputs is given to the module as arguments, a dict by keyword. (height, width, channels) alone
            stands for an array of float32.
        call: `call(module, inputs, train)` calls the bound module and returns its outputs; by default all arguments
            and fields that say whether it is trained are found by their names.

    Raises:
        ValueError: if a submodule does not run, a cut cannot be there, or nothing says whether the module is trained
            though it has batch norm or dropout; for fewer than two ends; or for a module that is not Linen.
    """
    check_linen(module)
    if isinstance(ends, str):
        raise ValueError(f'ends={ends!r}: give a list of paths, [{ends!r}, ...].')
    network = BlockNetwork(module, tuple(ends), call or make_call(module))
    if call is None and not has_switch(module):
        check_switch(dataclasses.replace(network, inputs=describe_inputs(inputs)))
    network = with_inputs(network, inputs)
    if call is None:
        check_acts(network)
    return network


def split_into(module: nn.Module, stem: Piece, blocks: Sequence[Piece], head: Piece) -> BlockNetwork:
    """Returns a module divided into pieces that are given as functions `piece(module, x, train)` of the bound module.

    Args:
        module: the module; one that makes its submodules in `setup`, so that functions can call them.
        stem: from inputs to what enters the first block.
        blocks: one function each; at least two.
        head: from what leaves the last block to outputs.

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
