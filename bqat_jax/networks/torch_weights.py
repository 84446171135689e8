"""Reads PyTorch `state_dict` files into Linen variables, by a table of name rules for each family of networks."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from bqat_jax.errors import UserError

# (pattern of a PyTorch name, our path); the first pattern that matches the whole name counts.
# Names as in akamaster/pytorch_resnet_cifar10; 'module.' is what torch.nn.DataParallel puts in front.
_BATCH_NORM = (('weight', 'params', 'scale'), ('bias', 'params', 'bias'))
_STATISTICS = (('running_mean', 'batch_stats', 'mean'), ('running_var', 'batch_stats', 'var'))


def _norm_rules(torch_name: str, path: str) -> list[tuple[str, str]]:
    return [
        (rf'{torch_name}\.{ending}', rf'{collection}/{path}/{name}')
        for ending, collection, name in _BATCH_NORM + _STATISTICS
    ]


_BLOCK, _BLOCK_PATH = r'layer(\d+)\.(\d+)\.', r'stage\1_block{\2+1}'

CIFAR_RESNET_RULES: tuple[tuple[str, str], ...] = (
    (r'conv1\.weight', 'params/stem/conv/kernel'),
    *_norm_rules('bn1', 'stem/norm'),
    (rf'{_BLOCK}conv([12])\.weight', rf'params/{_BLOCK_PATH}/conv\3/kernel'),
    *_norm_rules(rf'{_BLOCK}bn([12])', rf'{_BLOCK_PATH}/norm\3'),
    (rf'{_BLOCK}shortcut\.0\.weight', rf'params/{_BLOCK_PATH}/shortcut_conv/kernel'),
    *_norm_rules(rf'{_BLOCK}shortcut\.1', rf'{_BLOCK_PATH}/shortcut_norm'),
    (r'(?:linear|fc)\.weight', 'params/head/dense/kernel'),
    (r'(?:linear|fc)\.bias', 'params/head/dense/bias'),
)

NAME_RULES = {'cifar_resnet': CIFAR_RESNET_RULES}


def read_state_dict(file: str | Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a PyTorch file: a `state_dict`, or a dict that holds one under 'state_dict'.

    The file is read with `weights_only=True`, so that it cannot run code; a 'module.' prefix is taken off.

    Raises:
        UserError: if torch is not installed, or the file is missing or holds something else.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f'{file} is a PyTorch file, and reading it needs PyTorch, which is not installed here. '
            'Install it (pip install torch) or take a partner from a workdir (--config.partner.workdir=DIR).'
        ) from error
    if not Path(file).is_file():
        raise UserError(f'partner.torch_file={str(file)!r}: there is no such file.')
    try:
        loaded = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is damaged or holds more than weights
        raise UserError(f'{file} could not be read as PyTorch weights: {error}') from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get('state_dict'), Mapping):
        loaded = loaded['state_dict']
    if not isinstance(loaded, Mapping) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise UserError(f'{file} holds no state_dict: expected names and tensors, or a dict with them as "state_dict".')
    return {str(name).removeprefix('module.'): value.float().numpy() for name, value in loaded.items()}


def import_state_dict(
    arrays: Mapping[str, np.ndarray], rules: Sequence[tuple[str, str]], template: Any
) -> dict[str, Any]:
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
    wanted: Any = traverse_util.flatten_dict(template, sep='/')
    found: dict[str, np.ndarray] = {}
    problems = []
    for name, array in arrays.items():
        if name.endswith('num_batches_tracked'):
            continue
        path = _translate(name, rules)
        if path is None or path not in wanted:
            problems.append(f'unexpected: {name} {array.shape}')
            continue
        if path.endswith('/kernel'):
            array = array.transpose((2, 3, 1, 0) if array.ndim == 4 else tuple(reversed(range(array.ndim))))
        if array.shape != wanted[path].shape:
            problems.append(f'misshapen: {name} gives {path} {array.shape}, the network has {wanted[path].shape}')
        elif not np.all(np.isfinite(array)):
            problems.append(f'not finite: {name}')
        found[path] = np.asarray(array, np.float32)
    problems += [f'missing: {path} {wanted[path].shape}' for path in wanted if path not in found]
    if problems:
        listed = '\n  '.join(problems)
        raise UserError(f'The PyTorch weights do not fit the network ({len(problems)} differences):\n  {listed}')
    return traverse_util.unflatten_dict({path: found[path] for path in wanted}, sep='/')


def _translate(name: str, rules: Sequence[tuple[str, str]]) -> str | None:
    for pattern, path in rules:
        match = re.fullmatch(pattern, name)
        if match:
            # PyTorch counts blocks from 0, we from 1: {\2+1} in a rule is group 2 plus one.
            path = re.sub(r'\{\\(\d)\+1\}', lambda one, match=match: str(int(match[int(one[1])]) + 1), path)
            return match.expand(path)
    return None
