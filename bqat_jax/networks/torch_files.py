"""Reads PyTorch weights from torch.save and safetensors files, which are recognized by content."""

import dataclasses
import json
import pickle
import re
import tarfile
import warnings
import zipfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np

from bqat_jax.errors import UserError
from bqat_jax.registry import suggest

# Keys under which training programs store the state_dict. The first key with weights applies: trained weights
# precede their moving averages.
INNER_KEYS = ('state_dict', 'model_state_dict', 'model', 'net', 'state_dict_ema', 'ema')
DEPTH = 4  # largest nesting of such keys
SHOWN = 12  # number of entries that a message lists
# First bytes of other files.
OTHER_FILES = {
    b'\x89HDF': 'an HDF5 file, such as Keras writes',
    b'\x93NUMPY': 'a NumPy array',
    b'GGUF': 'a GGUF file',
    b'\x1f\x8b': 'compressed by gzip; unpack it first',
    b'version https://git-lfs': 'the pointer of Git LFS to the file; fetch it with git lfs pull',
    b'<': 'HTML or XML, such as the page of a download that failed',
    b'{': 'JSON, such as the index of weights in several files',
}
# The dtypes of the safetensors format, except those that pack several numbers into a byte.
SAFETENSORS_DTYPES: dict[str, Any] = {
    **{'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': jnp.bfloat16},
    **{'F8_E4M3': jnp.float8_e4m3fn, 'F8_E5M2': jnp.float8_e5m2, 'F8_E8M0': jnp.float8_e8m0fnu},
    **{'F8_E4M3FNUZ': jnp.float8_e4m3fnuz, 'F8_E5M2FNUZ': jnp.float8_e5m2fnuz},
    **{'I64': np.int64, 'I32': np.int32, 'I16': np.int16, 'I8': np.int8, 'BOOL': np.bool_},
    **{'U64': np.uint64, 'U32': np.uint32, 'U16': np.uint16, 'U8': np.uint8, 'C64': np.complex64},
}


@dataclasses.dataclass(frozen=True)
class StateDict:
    """A state_dict that was read.

    Attributes:
        arrays: arrays by PyTorch name; floating-point arrays are float32.
        entry: dotted key of the state_dict in the file; '' if the file is a state_dict.
        others: dotted keys of other state_dicts in the file.
        ignored: entries of the state_dict that are not arrays, each with its type.
    """

    arrays: dict[str, np.ndarray]
    entry: str = ''
    others: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def describe(self) -> str:
        """Returns which entries of the file were read and ignored, as the end of a sentence; '' if all were read."""
        others = f' (not {", ".join(map(repr, self.others))})' if self.others else ''
        ignored = f', without {_some(self.ignored)}' if self.ignored else ''
        return (f', its entry {self.entry!r}{others}' if self.entry else '') + ignored


def read_state_dict(file: str | Path, key: str | None = None) -> StateDict:
    """Returns the state_dict in a file of PyTorch weights.

    The file is a safetensors or torch.save file with any name. A torch.save file is read with `weights_only=True`, so
    that it cannot run code. A nested state_dict is searched under `INNER_KEYS`, in this order, recursively. Floating-
    point numbers are converted to float32: 8 and 16 bits exactly, 64 bits with rounding.

    Args:
        file: path of the file.
        key: dotted key of the entry to read (`partner.torch_key`); None searches under `INNER_KEYS`.

    Raises:
        UserError: if the package that reads the file is not installed, or the file is missing, damaged or of another
            kind, or has no such entry, or has tensors that cannot be converted to arrays.
    """
    kind = _find_kind(Path(file))
    loaded = _load_safetensors(file) if kind == 'safetensors' else _load_torch(file)
    tree, entry, others = _select(loaded, key, file)
    if not _holds_weights(tree):
        where = f', partner.torch_key={key!r}' if key else ''
        remedy = "save the model's state_dict() with torch.save."
        if isinstance(loaded, Mapping) and loaded:
            remedy = f'name the entry with --config.partner.torch_key, or {remedy}'
        raise UserError(
            f'{_name(file)}{where}: there is no state_dict (tensors by name), and no entry with one under '
            f'{", ".join(INNER_KEYS)}. {_contents(loaded)} {remedy[0].upper()}{remedy[1:]}'
        )
    nested = [str(name) for name, value in tree.items() if not _is_tensor(value) and _holds_tensor(value)]
    if nested:
        raise UserError(
            f'{_name(file)}: the entries {_some(nested)} hold tensors in an inner list or dict, next to tensors; a '
            'state_dict is flat. Save only the state_dict, or name its entry with --config.partner.torch_key.'
        )
    tensors = {str(name): value for name, value in tree.items() if _is_tensor(value)}
    ignored = tuple(f'{name} ({type(value).__name__})' for name, value in tree.items() if not _is_tensor(value))
    return StateDict(_to_arrays(tensors, file), entry, others, ignored)


def _name(file: str | Path) -> str:
    return f'partner.torch_file={str(file)!r}'


def _some(items: Any) -> str:
    """Returns the first items of a list as text."""
    items = list(items)
    more = f' and {len(items) - SHOWN} more' if len(items) > SHOWN else ''
    return ', '.join(items[:SHOWN]) + more


def _first_line(error: Exception) -> str:
    """Returns the first line of an error message, shortened and without a final period."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160].rstrip('. ')


def _find_kind(file: Path) -> str:
    """Returns 'safetensors' or 'torch', by the first bytes of the file."""
    if file.is_dir():
        inside = sorted(path.name for path in file.iterdir() if path.suffix in ('.safetensors', '.pt', '.pth', '.bin'))
        files = f'Give a file in it: {_some(inside)}.' if inside else 'Give a file of weights.'
        raise UserError(f'{_name(file)} is a directory. {files}')
    try:
        with file.open('rb') as stream:
            start = stream.read(512)
    except FileNotFoundError as error:
        raise UserError(f'{_name(file)}: there is no such file. Check the path.') from error
    except OSError as error:
        raise UserError(f'{_name(file)} cannot be opened ({error.strerror}). Check its permissions.') from error
    if not start:
        raise UserError(f'{_name(file)} is empty: its download or saving did not finish. Get it again.')
    # A safetensors file starts with the length of its JSON header, below 2**32. The length may look like the first
    # bytes of another kind of file, so this check comes first.
    if start[4:9] == b'\0\0\0\0{':
        return 'safetensors'
    if start.startswith((b'PK\x03\x04', b'PK\x05\x06')):
        _check_zip(file)
        return 'torch'
    if start.startswith(b'\x80'):  # a pickle
        return 'torch'
    what = next((what for magic, what in OTHER_FILES.items() if start.lstrip().startswith(magic)), None)
    if what is None and any(start) and tarfile.is_tarfile(file):
        _refuse_tar(file)
    raise UserError(
        f'{_name(file)} could not be read: it is {what or f"something else (it begins with {start[:8]!r})"}. Give a '
        'file of torch.save or a safetensors file.'
    )


def _refuse_tar(file: Path) -> NoReturn:
    with tarfile.open(file) as archive:
        names = archive.getnames()
    if not {'pickle', 'storages', 'tensors'} <= {name.removeprefix('./') for name in names}:
        raise UserError(f'{_name(file)} is a tar archive, which holds {_some(names)}. Unpack it.')
    raise UserError(
        f'{_name(file)} has the tar format of the first releases of PyTorch, which cannot be read without running code '
        'of the file. If you trust it, load it with torch.load(FILE, weights_only=False) and save its state_dict with '
        'torch.save.'
    )


def _check_zip(file: Path) -> None:
    """Checks that a zip is complete and was written by torch.save."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise UserError(
            f'{_name(file)} is a zip, as torch.save writes, but damaged or truncated. Get it again.'
        ) from error
    inside = {name.partition('/')[2] for name in names}
    if 'data.pkl' not in inside:
        raise UserError(
            f'{_name(file)} is a zip that torch.save did not write: it holds {_some(names) or "nothing"}. Unpack it if '
            'the weights are in it, or give a file of torch.save.'
        )
    if 'constants.pkl' in inside:
        raise UserError(
            f'{_name(file)} is a TorchScript program, not weights. Save only the weights: '
            'torch.save(torch.jit.load(FILE).state_dict(), NEW).'
        )


def _load_torch(file: str | Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f'{_name(file)} is a PyTorch file, and reading it needs PyTorch, which is not installed here. Install it '
            '(pip install torch), use a safetensors file or a partner from a workdir (--config.partner.workdir=DIR).'
        ) from error
    try:
        # With a path, torch.load would depend on the suffix.
        with warnings.catch_warnings(), Path(file).open('rb') as stream:
            warnings.simplefilter('ignore')  # PyTorch warns of formats that it deprecates.
            return torch.load(stream, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        _refuse_pickle(file, error)
    except Exception as error:  # torch raises many kinds of errors for a damaged file.
        raise UserError(
            f'{_name(file)} could not be read as PyTorch weights: {_first_line(error)}. Get it again, or save it again '
            'with torch.save.'
        ) from error


def _refuse_pickle(file: str | Path, error: Exception) -> NoReturn:
    """Raises a UserError that explains why a pickle cannot be read without running its code."""
    unsafe = re.search(r'GLOBAL ([\w.]+)', str(error))
    if unsafe is None:
        raise UserError(
            f'{_name(file)} could not be read: it is a pickle, but not one of torch.save, or damaged. Get it again, or '
            'save a state_dict with torch.save.'
        ) from error
    raise UserError(
        f'{_name(file)} could not be read as weights only: it holds an object {unsafe[1]}, perhaps a complete model, '
        'whose reading could run code. If you trust the file, load it with torch.load(FILE, weights_only=False) and '
        "save the model's state_dict() with torch.save."
    ) from error


def _load_safetensors(file: str | Path) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, deserialize
    except ImportError as error:
        raise UserError(
            f'{_name(file)} is a safetensors file, and reading it needs a package that is not installed here. '
            'Install it (pip install safetensors).'
        ) from error
    try:
        entries: Any = deserialize(Path(file).read_bytes())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f'{_name(file)} could not be read as safetensors: {_first_line(error)}. It is damaged or truncated. Get it '
            'again.'
        ) from error
    packed = [f'{name} ({entry["dtype"]})' for name, entry in entries if entry['dtype'] not in SAFETENSORS_DTYPES]
    if packed:
        raise UserError(
            f'{_name(file)}: these tensors are not supported, because they pack several numbers into a byte: '
            f'{_some(packed)}. Save them as float32.'
        )
    return {
        name: np.frombuffer(entry['data'], SAFETENSORS_DTYPES[entry['dtype']]).reshape(entry['shape'])
        for name, entry in entries
    }


def _is_tensor(value: Any) -> bool:
    """Returns whether a value is a PyTorch tensor or an array."""
    return hasattr(value, 'dtype') and hasattr(value, '__array__')  # A nested tensor has no shape.


def _holds_tensor(value: Any) -> bool:
    """Returns whether a value is a tensor, or a list or dict that contains one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return _is_tensor(value) or (isinstance(value, list | tuple) and any(map(_holds_tensor, value)))


def _holds_weights(value: Any, depth: int = DEPTH) -> bool:
    """Returns whether a value is a state_dict, or has one under `INNER_KEYS`."""
    if not isinstance(value, Mapping):
        return False
    inner = depth > 0 and any(_holds_weights(value.get(key), depth - 1) for key in INNER_KEYS)
    return inner or any(_is_tensor(one) for one in value.values())


def _select(loaded: Any, key: str | None, file: str | Path) -> tuple[Any, str, tuple[str, ...]]:
    """Returns the entry to read, its dotted key, and the dotted keys of alternatives."""
    tree, place, others = (_follow(loaded, key, file), [key], []) if key else (loaded, [], [])
    for depth in reversed(range(DEPTH)):
        inner = [name for name in INNER_KEYS if isinstance(tree, Mapping) and _holds_weights(tree.get(name), depth)]
        if not inner:
            break
        others += ['.'.join([*place, name]) for name in inner[1:]]
        place.append(inner[0])
        tree = tree[inner[0]]
    return tree, '.'.join(place), tuple(others)


def _follow(loaded: Any, key: str, file: str | Path) -> Any:
    """Returns the entry with a dotted key; names in the key may contain dots."""
    here, rest = loaded, key.split('.')
    while rest:
        lengths = [n for n in range(len(rest), 0, -1) if isinstance(here, Mapping) and '.'.join(rest[:n]) in here]
        if not lengths:
            near = suggest(key, _entries(loaded)) if isinstance(loaded, Mapping) else ''
            raise UserError(
                f'{_name(file)} has no entry partner.torch_key={key!r}. {_contents(loaded)}{near} Use one of these, '
                'or leave the key unset if the file is a state_dict.'
            )
        here, rest = here['.'.join(rest[: lengths[0]])], rest[lengths[0] :]
    return here


def _entries(loaded: Mapping[Any, Any]) -> dict[str, str]:
    """Returns descriptions of the entries that are not tensors by dotted key, outer entries first."""
    entries: dict[str, str] = {}
    left: deque[tuple[tuple[str, ...], Mapping[Any, Any]]] = deque([((), loaded)])
    while left and len(entries) < 10 * SHOWN:
        place, tree = left.popleft()
        for name, value in tree.items():
            if _is_tensor(value):
                continue
            key = (*place, str(name))
            tensors = sum(map(_is_tensor, value.values())) if isinstance(value, Mapping) else 0
            entries['.'.join(key)] = f'{tensors} tensors' if tensors else type(value).__name__
            if isinstance(value, Mapping) and len(key) < DEPTH:
                left.append((key, value))
    return entries


def _contents(loaded: Any) -> str:
    """Returns a sentence that describes the contents of a file."""
    if not isinstance(loaded, Mapping):
        return f'It holds one {type(loaded).__name__}.'
    tensors = sum(map(_is_tensor, loaded.values()))
    flat = [f'{tensors} tensors at the top level'] if tensors else []
    listed = _some([*flat, *(f'{json.dumps(key)} ({what})' for key, what in _entries(loaded).items())])
    return f'It has {listed}.' if listed else 'It has no entries at all.'


def _to_arrays(tensors: dict[str, Any], file: str | Path) -> dict[str, np.ndarray]:
    """Returns NumPy arrays, with floating-point arrays as float32."""
    arrays, refused = {}, []
    for name, tensor in tensors.items():
        try:
            arrays[name] = _from_torch(tensor) if hasattr(tensor, 'detach') else tensor
        except Exception as error:  # torch has many kinds of tensors and errors.
            refused.append(f'{name} ({tensor.dtype}: {_first_line(error)})')
            continue
        if jnp.issubdtype(arrays[name].dtype, jnp.floating):
            arrays[name] = arrays[name].astype(np.float32)
    if refused:
        raise UserError(
            f'{_name(file)}: these tensors are not plain arrays: {_some(refused)}. Save dense float32 tensors.'
        )
    return arrays


def _from_torch(tensor: Any) -> np.ndarray:
    """Returns the array of a tensor.

    Raises:
        TypeError: for a nested, quantized, sparse or meta tensor.
    """
    if tensor.is_nested:
        raise TypeError('nested, of rows of several lengths; call to_padded_tensor() on it')
    if tensor.is_quantized:
        raise TypeError('quantized; call dequantize() on it')
    if tensor.is_meta:
        raise TypeError('on the meta device, without values; load weights before saving')
    if 'strided' not in str(tensor.layout):
        raise TypeError('sparse; call to_dense() on it')
    return (tensor.float() if tensor.is_floating_point() else tensor).detach().numpy()
