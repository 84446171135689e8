"""A frozen network as one safetensors file with packed codes and float32 arrays; docs/file_formats.md describes it.

Everything else is JSON under one key of the metadata, so that equal networks give equal bytes.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bqat_jax.export.codes import unpack
from bqat_jax.export.frozen import (
    INTEGER,
    LOOKUP,
    Decoding,
    Frozen,
    FrozenLayer,
    Inputs,
    Normalization,
    Weights,
)

# (major, minor); the major version is raised if an older reader would misread a file. Readers reject another one.
FORMAT_VERSION = (1, 0)
KEY = 'bqat_jax'
SUFFIX = '.safetensors'
# Prefixes of the names of arrays.
LAYERS, NORMS, FLOATS, COLLECTIONS = 'layers', 'norms', 'floats', 'collections'


def to_bytes(frozen: Frozen) -> bytes:
    """Returns the file's content.

    Raises:
        ImportError: without the package safetensors.
    """
    save = _safetensors().numpy.save
    arrays, layers = {}, {}
    for path, layer in frozen.layers.items():
        layers[path] = _describe_layer(layer)
        arrays |= {f'{LAYERS}/{path}/{name}': x for name, x in _layer_arrays(layer).items()}
    for path, (scale, bias) in frozen.norms.items():
        arrays |= {f'{NORMS}/{path}/scale': scale, f'{NORMS}/{path}/bias': bias}
    arrays |= {f'{FLOATS}/{path}': x for path, x in frozen.floats.items()}
    for name, own in frozen.collections.items():
        arrays |= {f'{COLLECTIONS}/{name}/{path}': x for path, x in own.items()}
    normalization = frozen.normalization
    facts = {
        'format_version': '.'.join(map(str, FORMAT_VERSION)),
        'network': frozen.network,
        'inputs': _describe_inputs(frozen.inputs),
        'normalization': normalization and {'mean': normalization.mean, 'std': normalization.std},
        'layers': layers,
        'norms': list(frozen.norms),
        'collections': list(frozen.collections),
    }
    plain = {name: np.asarray(x, order='C') for name, x in arrays.items()}
    facts['sha256'] = digest_of(facts, plain)
    return save(plain, metadata={KEY: _as_json(facts)})


def write_checkpoint(path: str | os.PathLike, frozen: Frozen) -> None:
    """Writes a frozen network to a file atomically.

    Args:
        path: the file, with the suffix `.safetensors`.
        frozen: the network.

    Raises:
        ValueError: for another suffix.
        ImportError: without the package safetensors.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise ValueError(f'{path}: the name of a packed file ends with {SUFFIX}, which `load` needs.')
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
    try:
        with temporary.open('wb') as file:
            file.write(to_bytes(frozen))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path: str | os.PathLike) -> Frozen:
    """Reads a frozen network from a file.

    Raises:
        ValueError: for a file of another kind, a damaged file, or another major version of the format.
        ImportError: without the package safetensors.
    """
    library = _safetensors()
    try:
        with library.safe_open(path, framework='numpy') as file:
            text = (file.metadata() or {}).get(KEY)
            arrays = {name: file.get_tensor(name) for name in file.keys()} if text else {}  # noqa: SIM118
    except library.SafetensorError as error:
        raise ValueError(f'{path} is not a safetensors file, or is damaged: {error}.') from error
    if text is None:
        raise ValueError(f'{path} holds no exported network: its metadata has no key {KEY!r}.')
    try:
        facts = json.loads(text)
        version = str(facts.get('format_version', ''))
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: its metadata is not a JSON object ({type(error).__name__}).') from error
    if version.partition('.')[0] != str(FORMAT_VERSION[0]):
        raise ValueError(
            f'{path} has the format version {version!r}, and this reader knows {FORMAT_VERSION[0]}.x. Read it with the '
            'version of bqat_jax that wrote it, or a newer one.'
        )
    try:
        if facts.pop('sha256') != digest_of(facts, arrays):
            raise ValueError('its checksum does not match its content')
        frozen = _read(facts, arrays)
        for name, layer in frozen.layers.items():
            _check_layer(name, layer)
        return frozen
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise ValueError(f'{path} is damaged: {type(error).__name__}: {error}.') from error


def digest_of(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of the facts as JSON and of every array's name, dtype, shape and bytes, sorted by name."""
    digest = hashlib.sha256(_as_json(facts).encode())
    for name in sorted(arrays):
        x = np.asarray(arrays[name], order='C')
        digest.update(f'{name} {x.dtype.str} {x.shape}'.encode())
        digest.update(x.tobytes())
    return digest.hexdigest()


def _as_json(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, separators=(',', ':'))


def _check_layer(path: str, layer: FrozenLayer) -> None:
    """Checks that the entries of a layer are consistent.

    Raises:
        ValueError: if they are not.
    """
    if layer.mode not in (INTEGER, LOOKUP):
        raise ValueError(f'the mode of {path} is {layer.mode!r}')
    parts = [part for part in (layer.weights, layer.inputs) if part is not None]
    for part in parts:
        decoding = part.decoding
        count = decoding.lower + 2**decoding.bits
        if not isinstance(decoding.lower, int) or not -(2 ** (decoding.bits - 1)) <= decoding.lower <= 0:
            raise ValueError(f'the smallest code of {path} is {decoding.lower!r}, of {decoding.bits} bits')
        if decoding.levels is not None and decoding.levels.shape[-1] > 2**decoding.bits:
            raise ValueError(f'{path} has {decoding.levels.shape[-1]} levels, of {decoding.bits} bits')
        if isinstance(part, Inputs):
            known = part.thresholds is None or part.thresholds.shape[-1] == part.upper - decoding.lower
            if not isinstance(part.upper, int) or not decoding.lower < part.upper < count or not known:
                raise ValueError(f'the largest code of the input of {path} is {part.upper!r}')
            if part.thresholds is None and part.inverse_step is None:
                raise ValueError(f'{path} has neither thresholds nor a step for its input')
    if layer.mode == INTEGER and (len(parts) < 2 or layer.rescale is None or layer.largest_kernel_sum < 1):
        raise ValueError(f'{path} is an integer layer without codes, a scale or a bound of its sums')


def _read(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Frozen:
    layers = {path: _read_layer(one, _below(arrays, f'{LAYERS}/{path}/')) for path, one in facts['layers'].items()}
    normalization = facts['normalization']
    return Frozen(
        layers=layers,
        norms={path: (arrays[f'{NORMS}/{path}/scale'], arrays[f'{NORMS}/{path}/bias']) for path in facts['norms']},
        floats=_below(arrays, f'{FLOATS}/'),
        collections={name: _below(arrays, f'{COLLECTIONS}/{name}/') for name in facts['collections']},
        inputs=_read_inputs(facts['inputs']),
        normalization=normalization and Normalization(tuple(normalization['mean']), tuple(normalization['std'])),
        network=facts['network'],
    )


def _below(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}


def _layer_arrays(layer: FrozenLayer) -> dict[str, np.ndarray]:
    arrays: dict[str, Any] = {'rescale': layer.rescale}
    if layer.weights is not None:
        arrays['weights/codes'] = layer.weights.packed
        arrays |= {f'weights/{name}': x for name, x in _decoding_arrays(layer.weights.decoding).items()}
    if layer.inputs is not None:
        arrays |= {'inputs/thresholds': layer.inputs.thresholds, 'inputs/inverse_step': layer.inputs.inverse_step}
        arrays |= {f'inputs/{name}': x for name, x in _decoding_arrays(layer.inputs.decoding).items()}
    return {name: x for name, x in arrays.items() if x is not None}


def _decoding_arrays(decoding: Decoding) -> dict[str, Any]:
    scales = {f'scale{number}': x for number, x in enumerate(decoding.scales)}
    return {'levels': decoding.levels} if decoding.levels is not None else {'shift': decoding.shift, **scales}


def _describe_layer(layer: FrozenLayer) -> dict[str, Any]:
    facts: dict[str, Any] = {'kind': layer.kind, 'weight': layer.weight, 'mode': layer.mode}
    if layer.weights is not None:
        own = layer.weights
        facts['weights'] = {**_describe_decoding(own.decoding), 'shape': own.codes.shape}
    if layer.inputs is not None:
        facts['inputs'] = {**_describe_decoding(layer.inputs.decoding), 'upper': layer.inputs.upper}
    return facts | {'largest_sum': layer.largest_sum, 'largest_kernel_sum': layer.largest_kernel_sum}


def _describe_decoding(decoding: Decoding) -> dict[str, Any]:
    return {'bits': decoding.bits, 'lower': decoding.lower, 'scales': len(decoding.scales)}


def _read_layer(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> FrozenLayer:
    weights = inputs = None
    if 'weights' in facts:
        own, decoding = facts['weights'], _read_decoding(facts['weights'], _below(arrays, 'weights/'))
        weights = Weights(unpack(arrays['weights/codes'], own['bits'], own['lower'], tuple(own['shape'])), decoding)
    if 'inputs' in facts:
        decoding = _read_decoding(facts['inputs'], _below(arrays, 'inputs/'))
        thresholds, step = arrays.get('inputs/thresholds'), arrays.get('inputs/inverse_step')
        inputs = Inputs(decoding, facts['inputs']['upper'], thresholds, step)
    named = {name: facts[name] for name in ('kind', 'weight', 'mode', 'largest_sum', 'largest_kernel_sum')}
    return FrozenLayer(**named, weights=weights, inputs=inputs, rescale=arrays.get('rescale'))


def _read_decoding(facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Decoding:
    if 'levels' in arrays:
        return Decoding(facts['bits'], facts['lower'], np.zeros((), np.float32), (), arrays['levels'])
    scales = tuple(arrays[f'scale{number}'] for number in range(facts['scales']))
    return Decoding(facts['bits'], facts['lower'], arrays['shift'], scales)


def _describe_inputs(inputs: Any) -> Any:
    """A tree of shapes and dtypes as JSON: dicts, lists, and {'shape', 'dtype'} for an array."""
    if isinstance(inputs, Mapping):
        return {'dict': {str(name): _describe_inputs(x) for name, x in inputs.items()}}
    if isinstance(inputs, tuple | list):
        return {
            type(inputs).__name__ if type(inputs) in (tuple, list) else 'tuple': list(map(_describe_inputs, inputs))
        }
    return {'shape': list(inputs.shape), 'dtype': np.dtype(inputs.dtype).name}


def _read_inputs(facts: Mapping[str, Any]) -> Any:
    if 'dict' in facts:
        return {name: _read_inputs(x) for name, x in facts['dict'].items()}
    for kind in (tuple, list):
        if kind.__name__ in facts:
            return kind(map(_read_inputs, facts[kind.__name__]))
    return jax.ShapeDtypeStruct(tuple(facts['shape']), np.dtype(facts['dtype']))


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError('The packed format needs the package safetensors: pip install safetensors.') from error
    return safetensors
