"""Reads PyTorch weights, `state_dict` or safetensors files, into Linen variables by the tables of `name_rules`."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from bqat_jax.errors import UserError
from bqat_jax.networks.name_rules import NAME_RULES, Rule

__all__ = ['NAME_RULES', 'import_state_dict', 'read_state_dict']

SAFETENSORS = '.safetensors'
# Where training programs keep the state_dict in a file that holds more; DeiT's call it 'model'.
INNER_KEYS = ('state_dict', 'model')
COUNTER = 'num_batches_tracked'  # of batch norm; not every file has it


def read_state_dict(file: str | Path) -> dict[str, np.ndarray]:
    """Returns the float32 arrays of a file of PyTorch weights by name.

    A `.safetensors` file, or one of torch.save with a `state_dict`, or with a dict that holds one under 'state_dict' or
    'model'. The latter is read with `weights_only=True`, so that it cannot run code. A 'module.' prefix, as
    torch.nn.DataParallel puts it, is taken off.

    Raises:
        UserError: if the package that reads it is not installed, or the file is missing or holds something else.
    """
    if not Path(file).is_file():
        raise UserError(f'partner.torch_file={str(file)!r}: there is no such file.')
    arrays = _read_safetensors(file) if Path(file).suffix == SAFETENSORS else _read_torch(file)
    return {name.removeprefix('module.'): array for name, array in arrays.items()}


def _read_torch(file: str | Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{file} is a PyTorch file, and reading it needs PyTorch, which is not installed here. Install it (pip '
            'install torch), take a .safetensors file or a partner from a workdir (--config.partner.workdir=DIR).'
        ) from error
    try:
        loaded = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is damaged or holds more than weights
        raise UserError(f'{file} could not be read as PyTorch weights: {error}') from error
    for key in INNER_KEYS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(
            f'{file} holds no state_dict: expected names and tensors, or a dict with them as '
            f'{" or ".join(map(repr, INNER_KEYS))}.'
        )
    return {str(name): value.float().numpy() for name, value in loaded.items()}


def _read_safetensors(file: str | Path) -> dict[str, np.ndarray]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise UserError(
            f'{file} is a safetensors file, and reading it needs a package that is not installed here. '
            'Install it (pip install safetensors).'
        ) from error
    try:
        # It knows bfloat16 through ml_dtypes, which JAX depends on: no PyTorch is needed.
        return {name: np.asarray(array, np.float32) for name, array in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f'{file} could not be read as safetensors: {error}') from error


def import_state_dict(arrays: Mapping[str, np.ndarray], rules: Sequence[Rule], template: Any) -> dict[str, Any]:
    """Returns variables with the values of a PyTorch `state_dict`.

    Kernels are transposed from PyTorch's layout (output, input, height, width) to Linen's (height, width, input,
    output), dense weights from (output, input) to (input, output). Counters (`num_batches_tracked`) are left out.

    Args:
        arrays: PyTorch name to array.
        rules: the family's name rules, from `NAME_RULES`.
        template: the network's variables, or their shapes; the result has its structure.

    Raises:
        UserError: if names are missing or unexpected, shapes differ or values are not finite; all of them are listed.
    """
    # Compiled once: a family has more patterns than `re` remembers.
    compiled = [(re.compile(pattern), (paths,) if isinstance(paths, str) else paths) for pattern, paths in rules]
    wanted: Any = traverse_util.flatten_dict(template, sep='/')
    values: dict[str, np.ndarray] = {}
    problems = []
    for name, array in arrays.items():
        if name.endswith(COUNTER):
            continue
        paths = _translate(name, compiled)
        if not paths or any(path not in wanted for path in paths):
            problems.append(f'unexpected: {name} {array.shape}')
            continue
        if not np.all(np.isfinite(array)):
            problems.append(f'not finite: {name}')
        for path, part in zip(paths, _split(array, len(paths)), strict=True):
            value = _to_linen(path, part)
            if path in values:
                problems.append(f'twice: {name} gives {path}, and so does another')
            elif value.shape != wanted[path].shape:
                problems.append(f'misshapen: {name} gives {path} {value.shape}, the network has {wanted[path].shape}')
            values[path] = np.asarray(value, np.float32)
    problems += [f'missing: {path} {wanted[path].shape}' for path in wanted if path not in values]
    if problems:
        listed = '\n  '.join(problems)
        raise UserError(f'The PyTorch weights do not fit the network ({len(problems)} differences):\n  {listed}')
    # A collection without a leaf, as a transformer's batch_stats, has no path.
    empty = {collection: {} for collection in template}
    return {**empty, **traverse_util.unflatten_dict({path: values[path] for path in wanted}, sep='/')}


def _split(array: np.ndarray, number: int) -> list[np.ndarray]:
    """Parts along the first axis; they are uneven if it does not divide, which their shapes then show."""
    return [array] if number == 1 else np.array_split(array, number)


def _to_linen(path: str, array: np.ndarray) -> np.ndarray:
    if not path.endswith('/kernel'):
        return array
    return array.transpose((2, 3, 1, 0) if array.ndim == 4 else tuple(reversed(range(array.ndim))))


def _translate(name: str, rules: Sequence[tuple[re.Pattern, tuple[str, ...]]]) -> tuple[str, ...]:
    """Our paths for a PyTorch name; none if no rule knows it."""
    for pattern, paths in rules:
        match = pattern.fullmatch(name)
        if match:
            return tuple(_expand(path, match) for path in paths)
    return ()


def _expand(path: str, match: re.Match) -> str:
    return match.expand(re.sub(r'\{\\(\d)\+1\}', lambda one: str(int(match[int(one[1])]) + 1), path))
