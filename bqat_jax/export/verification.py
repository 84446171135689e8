"""Measures by example how far an exported network agrees with the fake-quantized one."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bqat_jax.blocks.block_network import BlockNetwork
from bqat_jax.export.watching import run_watched
from bqat_jax.replacement.paths import Variables
from bqat_jax.transform import Quantization

Codes = Mapping[str, Sequence[Any]]


class Run(NamedTuple):
    """The results of a network for a batch.

    Attributes:
        outputs: a tree of arrays (batch, ..).
        codes: by layer, the codes of its input at each call, (batch, ..); None if they are not available.
    """

    outputs: Any
    codes: Codes | None


@dataclasses.dataclass(frozen=True)
class Agreement:
    """The agreement of two networks on some examples.

    Attributes:
        examples: number of examples compared.
        codes_differ: examples with a different code at the input of any layer; None if codes were not compared.
        answers_differ: examples with a different argmax at any position; None if outputs are not logits.
        difference: largest difference of an output.
        relative_difference: largest difference among examples whose codes all agree, relative to the example's largest
            output; None if codes were not compared.
    """

    examples: int = 0
    codes_differ: int | None = 0
    answers_differ: int | None = 0
    difference: float = 0.0
    relative_difference: float | None = 0.0

    def __add__(self, other: 'Agreement') -> 'Agreement':
        """Returns the agreement on the examples of both."""
        pairs = {
            field.name: (getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)
        }
        joined = {}
        for name, (one, two) in pairs.items():
            if one is None or two is None:
                joined[name] = None
            else:
                # np.maximum propagates NaN.
                joined[name] = one + two if isinstance(one, int) else float(np.maximum(one, two))
        return Agreement(**joined)


def compare(reference: Run, other: Run, mask: np.ndarray) -> Agreement:
    """Returns how far two networks agree on a batch.

    Args:
        reference: results of the one network.
        other: results of the other network.
        mask: bool (batch,), which examples to compare.

    Raises:
        ValueError: if the two have codes of different layers.
    """
    count = int(mask.sum())
    ours, theirs = (
        [np.asarray(x, np.float64)[mask].reshape(count, -1) for x in jax.tree.leaves(run.outputs)]
        for run in (reference, other)
    )
    same = [(one == two) | (np.isnan(one) & np.isnan(two)) for one, two in zip(ours, theirs, strict=True)]
    with np.errstate(invalid='ignore'):
        gaps = [
            np.where(equal, 0, np.abs(a - b)).max(1, initial=0) for equal, a, b in zip(same, ours, theirs, strict=True)
        ]
    gap = np.max(gaps, axis=0)
    size = np.max([np.abs(x).max(1, initial=0) for x in ours], axis=0)
    codes_differ = relative = None
    if reference.codes is not None and other.codes is not None:
        flipped = _flipped(reference.codes, other.codes, len(mask))[mask]
        codes_differ = int(flipped.sum())
        relative = float(np.max(np.where(flipped, 0, gap / np.where(size > 0, size, 1)), initial=0))
    return Agreement(count, codes_differ, _answers_differ(reference, other, mask), float(gap.max(initial=0)), relative)


def _answers_differ(reference: Run, other: Run, mask: np.ndarray) -> int | None:
    outputs = [jax.tree.leaves(run.outputs) for run in (reference, other)]
    if len(outputs[0]) != 1 or np.ndim(outputs[0][0]) < 2 or np.shape(outputs[0][0])[-1] < 2:
        return None
    ours, theirs = (np.argmax(np.asarray(x)[mask], axis=-1).reshape(mask.sum(), -1) for (x,) in outputs)
    return int(np.any(ours != theirs, axis=-1).sum())


def _flipped(ours: Codes, theirs: Codes, size: int) -> np.ndarray:
    """Flags for examples with a different code anywhere, bool (batch,); all if codes have no axis of examples."""
    if {path: len(calls) for path, calls in ours.items()} != {path: len(calls) for path, calls in theirs.items()}:
        raise ValueError('The two networks have codes of different layers.')
    flipped = np.zeros(size, bool)
    for path, calls in ours.items():
        for one, two in zip(calls, theirs[path], strict=True):
            differ = np.asarray(one) != np.asarray(two)
            # Examples are on the first axis, which may hold several rows per example.
            flipped |= differ.reshape(size, -1).any(1) if differ.shape[0] % size == 0 else differ.any()
    return flipped


def fake_quantized(
    network: BlockNetwork,
    quantization: Quantization,
    variables: Variables,
    prepare: Callable[[Any], Any] = lambda inputs: inputs,
) -> tuple[Callable[[Any], Any], Callable[[Any], Run]]:
    """Returns the fake-quantized network as two jitted functions: to outputs, and to outputs with codes.

    Args:
        network: the trained network.
        quantization: its quantizers.
        variables: its arrays.
        prepare: from inputs as in `Frozen.inputs` to the network's inputs.
    """

    def run(variables, inputs, watch=None):
        params = quantization.quantize_params(variables.quantizers, variables.params)
        with quantization.quantize_inputs(None if watch is None else watch.see):
            return network.apply({**variables.of_network, 'params': params}, prepare(inputs), train=False)[0]

    def run_with_codes(variables, inputs):
        return run_watched(lambda watch: run(variables, inputs, watch))

    plain, watched = jax.jit(run), jax.jit(run_with_codes)
    return lambda inputs: plain(variables, inputs), lambda inputs: Run(*watched(variables, inputs))
