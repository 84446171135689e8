"""Converts PyTorch weights to Linen variables by the rules of `name_rules`; `torch_files` reads the files."""

import dataclasses
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from bqat_jax.errors import UserError
from bqat_jax.networks.name_rules import NAME_RULES, Rule
from bqat_jax.networks.torch_files import StateDict, read_state_dict
from bqat_jax.networks.torch_names import Translation, find_prefix, is_counter

__all__ = ['NAME_RULES', 'Difference', 'StateDict', 'WeightsMismatch', 'import_state_dict', 'read_state_dict']

SHOWN = 4  # number of differences of a kind that the message shows
NEAR = 0.8  # smallest similarity, from 0 to 1, of a suggested name


@dataclasses.dataclass(frozen=True)
class Difference:
    """One mismatch between weights and a network.

    Attributes:
        kind: 'missing', 'unexpected', 'misshapen', 'twice', 'not finite', 'negative' or 'not floating point'.
        name: PyTorch name without the common prefix, or ''.
        path: path of our variable, or ''.
        text: description of the mismatch.
        near: suggested PyTorch name, or ''; only set for differences that the message shows.
    """

    kind: str
    name: str
    path: str
    text: str
    near: str = ''

    def __str__(self) -> str:
        return f'{self.kind}: {self.text}{f" (did you mean {self.near}?)" if self.near else ""}'


class WeightsMismatch(UserError):
    """Raised for PyTorch weights that do not fit a network; the message shows the first differences of each kind.

    Attributes:
        differences: all differences.
    """

    def __init__(self, differences: Sequence[Difference]):
        self.differences = tuple(differences)
        kinds: dict[str, list[Difference]] = {}
        for one in self.differences:
            kinds.setdefault(one.kind, []).append(one)
        counts = ', '.join(f'{len(group)} {kind}' for kind, group in kinds.items())
        lines = [f'The PyTorch weights do not fit the network ({len(self.differences)} differences: {counts}):']
        for kind, group in kinds.items():
            lines += [str(one) for one in group[:SHOWN]]
            lines += [f'{kind}: and {len(group) - SHOWN} more'] if len(group) > SHOWN else []
        super().__init__('\n  '.join(lines))

    def report(self) -> str:
        """Returns all differences, one per line."""
        return ''.join(f'{one}\n' for one in self.differences)


def import_state_dict(
    arrays: Mapping[str, np.ndarray], rules: Sequence[Rule], template: Any, *, without: Collection[str] = ()
) -> dict[str, Any]:
    """Returns variables with the values of a PyTorch `state_dict`.

    Kernels are transposed from PyTorch's layout (output, input, height, width) to Linen's (height, width, input,
    output), dense weights from (output, input) to (input, output). Prefixes of wrappers are removed, see
    `torch_names.find_prefix`. Counters are ignored.

    Args:
        arrays: arrays by PyTorch name.
        rules: the family's name rules, from `NAME_RULES`.
        template: the network's variables, or their shapes; the result has this structure.
        without: paths such as 'params/head/dense/kernel' to omit, also from the result.

    Raises:
        WeightsMismatch: if names are missing or unexpected, shapes differ, or values are not floating point, not finite
            or negative variances.
    """
    translation = Translation.of(rules)
    prefix = find_prefix(arrays, translation)
    shapes: Any = traverse_util.flatten_dict(template, sep='/')
    wanted = {path: shape.shape for path, shape in shapes.items() if path not in without}
    values: dict[str, np.ndarray] = {}
    differences: list[Difference] = []
    for name, array in ((name.removeprefix(prefix), array) for name, array in arrays.items()):
        if is_counter(name):
            continue
        paths = translation.paths(name)
        if not paths or any(path not in shapes for path in paths):
            differences.append(Difference('unexpected', name, '', f'{name} {array.shape}'))
            continue
        for path, part in zip(paths, _split(array, len(paths)), strict=True):
            if path in without:
                continue
            value = _to_linen(path, part)
            differences += _check(name, path, value, wanted[path])
            if path in values:
                differences.append(Difference('twice', name, path, f'{name} and another name both give {path}'))
            values[path] = value
    absent = [path for path in wanted if path not in values]
    differences += [Difference('missing', '', path, f'{path} {wanted[path]}') for path in absent]
    if differences:
        raise WeightsMismatch(_with_near_names(differences, translation.names(absent)))
    # A collection without leaves, such as a transformer's batch_stats, has no path.
    empty = {collection: {} for collection in template}
    converted = {path: np.asarray(values[path], np.float32) for path in wanted}
    return {**empty, **traverse_util.unflatten_dict(converted, sep='/')}


def _check(name: str, path: str, value: np.ndarray, shape: tuple[int, ...]) -> list[Difference]:
    """Returns the differences between a value and the variable at a path."""
    differences = []
    if value.shape != shape:
        text = f'{name} gives {path} {value.shape}, the network has {shape}'
        differences.append(Difference('misshapen', name, path, text))
    if not jnp.issubdtype(value.dtype, jnp.floating):
        text = f'{name} is {value.dtype}; if these are codes of quantized weights, dequantize them before saving'
        return [*differences, Difference('not floating point', name, path, text)]
    if not np.all(np.isfinite(value)):
        text = f'{name} has {np.sum(~np.isfinite(value))} NaN or infinite of {value.size} values'
        differences.append(Difference('not finite', name, path, text))
    if _is_variance(path) and np.any(value < 0):
        text = f'{name} is a variance, and its smallest value is {np.nanmin(value):g}'
        differences.append(Difference('negative', name, path, text))
    return differences


def _is_variance(path: str) -> bool:
    """Returns whether the variable at a path is the variance of a batch norm."""
    return path.startswith('batch_stats/') and path.endswith('/var')


def _with_near_names(differences: Sequence[Difference], possible: Sequence[str]) -> list[Difference]:
    """Returns the differences with suggestions for the first few unexpected names; the comparison is slow."""
    result, left = [], SHOWN
    for one in differences:
        if one.kind == 'unexpected' and left:
            near = difflib.get_close_matches(one.name, possible, n=1, cutoff=NEAR)
            one, left = dataclasses.replace(one, near=near[0] if near else ''), left - 1
        result.append(one)
    return result


def _split(array: np.ndarray, number: int) -> list[np.ndarray]:
    """Returns parts along the first axis; uneven parts are reported by their shapes."""
    return [array] if number == 1 else np.array_split(array, number)


def _to_linen(path: str, array: np.ndarray) -> np.ndarray:
    if not path.endswith('/kernel'):
        return array
    return array.transpose((2, 3, 1, 0) if array.ndim == 4 else tuple(reversed(range(array.ndim))))
