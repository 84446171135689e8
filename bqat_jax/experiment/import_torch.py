"""Imports the partner's variables from a file of PyTorch weights and reports those that do not fit."""

import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bqat_jax.distributed.processes import is_first
from bqat_jax.errors import UserError
from bqat_jax.experiment.experiment import Experiment
from bqat_jax.networks import make_network, torch_files
from bqat_jax.networks.torch_names import Translation, find_prefix
from bqat_jax.networks.torch_weights import NAME_RULES, StateDict, WeightsMismatch, import_state_dict, read_state_dict
from bqat_jax.storage import KeptArrays, fetched, place, write_text

# The file of a workdir that lists all differences of the last import.
REPORT = 'partner_import.txt'


def import_torch(experiment: Experiment) -> tuple[dict[str, Any], str]:
    """Returns the variables in `partner.torch_file` and a description of their source.

    With `partner.new_head` the classifier's variables are left out.

    Raises:
        UserError: if the file cannot be read or does not fit the network; `REPORT` then lists all differences.
    """
    source = experiment.partner_source
    file, name = source.torch_file, source.network_name
    assert file is not None
    if name not in NAME_RULES:
        raise UserError(
            f'partner.torch_file={file!r}: there are no rules for the PyTorch names of the network {name!r}, only for '
            f'{", ".join(NAME_RULES)}. Train the partner here, or add rules to '
            'bqat_jax.networks.name_rules.NAME_RULES in a plugin.'
        )
    rules, read = NAME_RULES[name], _read(file, source.torch_key, experiment.data.kept)
    without = find_classifier(experiment) if source.new_head else ()
    try:
        variables = import_state_dict(read.arrays, rules, experiment.shapes, without=without)
    except WeightsMismatch as error:
        raise _reported(experiment, file, error) from error
    if is_first():
        (experiment.workdir / REPORT).unlink(missing_ok=True)
    prefix = find_prefix(read.arrays, Translation.of(rules))
    taken_off = f', names without {prefix!r}' if prefix else ''
    return variables, f'PyTorch file {PurePosixPath(file).name}{read.describe()}{taken_off}'


def _read(file: str, key: str | None, kept: KeptArrays | None) -> StateDict:
    """Reads the weights in a file, which may be in a bucket."""
    try:
        with fetched(place(file, 'partner.torch_file')) as local:
            try:
                return read_state_dict(local, key) if kept is None else read_kept(kept, local, key)
            except UserError as error:
                raise UserError(str(error).replace(str(local), file)) from error
    except FileNotFoundError as error:
        raise UserError(f'partner.torch_file={file!r}: there is no such file. Check the path.') from error


def read_kept(kept: KeptArrays, file: Path, key: str | None) -> StateDict:
    """Reads a file as `read_state_dict` does, through a cache: PyTorch is not loaded for a cached file.

    Args:
        kept: the cache; its key is a hash of the file's content.
        file: a local file of weights.
        key: the argument of `read_state_dict`.

    Raises:
        UserError: as `read_state_dict`.
    """
    if not file.is_file():
        return read_state_dict(file, key)  # it raises the error
    with file.open('rb') as stream:
        content = hashlib.file_digest(stream, 'sha256').hexdigest()
    program = hashlib.sha256(Path(torch_files.__file__).read_bytes()).hexdigest()

    def read():
        read = read_state_dict(file, key)
        rest = json.dumps([read.entry, read.others, read.ignored]).encode()
        return {'rest': np.frombuffer(rest, np.uint8), **{f'weights/{name}': x for name, x in read.arrays.items()}}

    facts = {'file': content, 'torch_key': key, 'program': program}
    arrays = kept.get('The weights of the PyTorch file', facts, read)
    entry, others, ignored = json.loads(arrays.pop('rest').tobytes())
    weights = {name.removeprefix('weights/'): x for name, x in arrays.items()}
    return StateDict(weights, entry, tuple(others), tuple(ignored))


def with_new_classifier(experiment: Experiment, fresh: dict[str, Any]) -> dict[str, Any]:
    """Returns `fresh` with all variables but the classifier's replaced by those of `partner.torch_file`.

    Raises:
        UserError: as `import_torch`.
    """
    variables, source = import_torch(experiment)
    experiment.console.print(f'The partner starts from {source}, with a new head.')
    taken = traverse_util.flatten_dict(experiment.placement.put(variables), sep='/')
    both = {**traverse_util.flatten_dict(fresh, sep='/'), **taken}
    return {**{collection: {} for collection in fresh}, **traverse_util.unflatten_dict(both, sep='/')}


def find_classifier(experiment: Experiment) -> frozenset[str]:
    """Returns the paths of the variables whose shapes differ in a network with one more class."""
    source, num_classes = experiment.partner_source, experiment.data.images.num_classes
    cut = experiment.config['replacement']['cut']
    other = make_network(source.network_name, num_classes + 1, cut, source.network_options)
    shapes: Any = jax.eval_shape(lambda: other.init(jax.random.key(0), experiment.network.inputs))
    theirs: Any = traverse_util.flatten_dict(shapes, sep='/')
    ours: Any = traverse_util.flatten_dict(experiment.shapes, sep='/')
    return frozenset(path for path, leaf in ours.items() if path not in theirs or leaf.shape != theirs[path].shape)


def _reported(experiment: Experiment, file: str, error: WeightsMismatch) -> UserError:
    """Writes all differences to a file; returns the error with a remedy."""
    path = experiment.workdir / REPORT
    if is_first():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f'partner.torch_file={file!r}\n{error.report()}')
    remedy = 'Check that the keys config.network describe the network of the file.'
    kinds, paths = {one.kind for one in error.differences}, {one.path for one in error.differences}
    if kinds <= {'misshapen', 'missing'} and paths <= find_classifier(experiment):
        remedy = (
            'Only the head differs, as with another number of classes. Use --config.partner.new_head=true to load all '
            'but the head and train the partner from there.'
        )
    return UserError(f'partner.torch_file={file!r}: {error}\n{remedy} The complete list is in {path}.')
