"""The definition of a sweep: settings × methods × seeds, and the choices for a method's constants."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, section_of
from bqat_jax.registry import run_file
from bqat_jax.storage import local_copy, place

Overrides = Mapping[str, Any]
NAME = re.compile(r'[A-Za-z0-9][A-Za-z0-9 _.+,-]*')


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs to compare. Overrides are keys of the config, such as 'replacement.plan', with their values.

    Attributes:
        methods: overrides of each method, by name.
        seeds: consecutive seeds, which all methods share.
        baseline: the method that the others are compared with, seed by seed.
        settings: overrides of each setting, by name; methods are compared within a setting.
        choices: overrides to choose from, separately for every method in every setting: the one with the best mean
            validation score over `choice_seeds` is used. Empty to run methods as they are.
        choice_seeds: consecutive seeds, disjoint from `seeds`.

    Raises:
        ValueError: for a sweep that cannot be run.
    """

    methods: Mapping[str, Overrides]
    seeds: Sequence[int]
    baseline: str
    settings: Mapping[str, Overrides] = dataclasses.field(default_factory=lambda: {'all': {}})
    choices: Sequence[Overrides] = ()
    choice_seeds: Sequence[int] = ()

    def __post_init__(self):
        if self.baseline not in self.methods:
            raise ValueError(f'baseline={self.baseline!r}: it must be one of {", ".join(self.methods)}.')
        for name in (*self.methods, *self.settings):
            if not NAME.fullmatch(name):
                raise ValueError(f'{name!r} cannot name a method or a setting: it must be valid as a folder name.')
        for field in ('seeds', 'choice_seeds'):
            seeds = list(getattr(self, field))
            if seeds and seeds != list(range(seeds[0], seeds[0] + len(seeds))):
                raise ValueError(f'{field}={seeds}: they must be consecutive.')
        if not self.seeds or not self.settings:
            raise ValueError('A sweep needs at least one seed and one setting.')
        if self.choices and not self.choice_seeds:
            raise ValueError('choices need choice_seeds.')
        if set(self.seeds) & set(self.choice_seeds):
            raise ValueError(f'choice_seeds={list(self.choice_seeds)}: must not overlap with seeds.')


def load_sweep(file: str | None) -> Sweep:
    """Returns the sweep from `get_sweep()` in a Python file.

    Raises:
        UserError: if the file does not exist, or does not return a sweep.
    """
    if not file:
        raise UserError('Which sweep? Use --config.sweep=configs/sweeps/NAME.py.')
    path = place(file, 'sweep')
    if not path.is_file() or path.suffix != '.py':
        raise UserError(f'sweep={file!r}: there is no such Python file.')
    path = local_copy(path)
    module = run_file(path, f'bqat_jax_sweep_{path.stem}', 'sweep')
    try:
        sweep = module.get_sweep()
    except Exception as error:
        raise UserError(f'The sweep {file} failed: {type(error).__name__}: {error}') from error
    if not isinstance(sweep, Sweep):
        raise UserError(f'The sweep {file}: get_sweep() returned a {type(sweep).__name__}, not a Sweep.')
    return sweep


def override(config: Config, *changes: Overrides) -> Config:
    """Returns a copy of a config with some keys changed.

    Raises:
        UserError: for a key that the config does not have, or a value of another type.
    """
    config = config.copy_and_resolve_references()
    config.lock()
    for overrides in changes:
        for key, value in overrides.items():
            try:
                section, last = section_of(config, key)
                if last not in section:
                    raise KeyError(key)
                section[last] = value
            except (KeyError, AttributeError, TypeError) as error:
                raise UserError(f'The sweep sets {key}={value!r}, which the config does not accept: {error}') from error
    return config
