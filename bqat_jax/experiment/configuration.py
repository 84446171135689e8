"""Configs: their keys, the argument after the colon, durations, and what may change when a run is resumed."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import ml_collections
from ml_collections import config_dict

from bqat_jax.errors import UserError
from bqat_jax.experiment.keys import BY_NAME, KEYS, MOST_STEPS, NETWORK, SEED, Key, in_words, is_within, range_of
from bqat_jax.registry import suggest
from bqat_jax.storage import Place, damaged, local_copy, place

# An ml_collections.ConfigDict; type checkers cannot know its keys.
Config: TypeAlias = Any


def base_config() -> Config:
    """Returns a config with every key of `bqat_jax.experiment.keys` at its default."""
    config: Config = ml_collections.ConfigDict()
    for key in KEYS:
        *sections, name = key.name.split('.')
        section = config
        for part in sections:
            if part not in section:
                section[part] = ml_collections.ConfigDict()
            section = section[part]
        section[name] = config_dict.placeholder(key.kind) if key.may_be_unset else copy.deepcopy(key.default)
    return config


def parse_argument(argument: str | None, **defaults: Any) -> Config:
    """Parses the text after the colon of `--config=file.py:bits=2,plan=prefix`.

    Args:
        argument: 'key=value,key=value', or None.
        **defaults: all keys with their default values; the type of a default is the type of its key.

    Raises:
        UserError: for an unknown key, with a suggestion, or a value of another type.
    """
    values: Config = ml_collections.ConfigDict(defaults)
    for item in filter(None, (argument or '').split(',')):
        key, separator, text = item.partition('=')
        if key not in defaults:
            raise UserError(
                f'The config has no argument {key!r}; it takes: {", ".join(defaults)}.{suggest(key, defaults)}'
            )
        if not separator:
            raise UserError(f'The config argument {key!r} has no value. Write {key}={defaults[key]}.')
        kind = type(defaults[key])
        try:
            values[key] = {'true': True, 'false': False}[text.lower()] if kind is bool else kind(text)
        except (ValueError, KeyError) as error:
            raise UserError(f'The config argument {key}={text!r} is not of type {kind.__name__}.') from error
    return values


def duration(config: Config, name: str, epoch: float) -> int:
    """Returns a duration in steps: `<name>steps` if set, else `<name>epochs` times the steps per epoch.

    Args:
        config: the complete config.
        name: prefix of both keys, such as 'train.' or 'optimizer.warmup_'.
        epoch: steps per epoch.

    Raises:
        UserError: for a duration of more than `MOST_STEPS` steps.
    """
    section, start = section_of(config, name)
    steps, epochs = section[f'{start}steps'], section[f'{start}epochs']
    if steps is not None:
        return steps
    if not epochs * epoch <= MOST_STEPS:
        raise UserError(
            f'{name}epochs={epochs:g}: with {epoch:g} steps per epoch these are {epochs * epoch:g} steps; the most is '
            f'{MOST_STEPS}.'
        )
    return round(epochs * epoch)


def check_values(config: Config) -> None:
    """Checks that a config has every key and no other, each with a value of its type and range.

    Raises:
        UserError: naming the key, its value and what it must be.
    """
    values = dict(leaves(config))
    for name in [name for name in values if name not in BY_NAME and not name.startswith(NETWORK)]:
        raise UserError(f'The recipe sets {name}, which is not a key of the config.{suggest(name, BY_NAME)}')
    needed = [name for name in BY_NAME if not name.startswith(NETWORK) or name == f'{NETWORK}name']
    for name in [name for name in needed if name not in values]:
        raise UserError(f'The recipe has no {name}. Start from base_config() and keep its keys.')
    for name, value in values.items():
        _check_value(name, value)
    steps = tuple(config.profile_steps)
    if len(steps) != 2 or steps[0] > steps[1]:
        raise UserError(
            f'profile_steps={steps}: must be the first and the last step to record, counted from 1, such as (11, 13).'
        )
    last = config.seed + config.train.replicas - 1
    if not is_within(last, SEED):
        raise UserError(
            f'seed={config.seed}, train.replicas={config.train.replicas}: the last seed is {last}; it must be '
            f'{in_words(SEED)}.'
        )


def _check_value(name: str, value: Any) -> None:
    key = BY_NAME.get(name)
    if key is not None and not _is_of_type(value, key):
        unset = ', or None' if key.may_be_unset else ''
        what = 'a tuple' if key.kind is tuple else f'of type {key.kind.__name__}'
        what += f' like {key.default}' if key.kind is tuple and key.default and not key.may_be_unset else ''
        raise UserError(f'{name}={value!r}: it must be {what}{unset}.')
    for number in value if isinstance(value, tuple | list) else (value,):
        if isinstance(number, int | float) and not is_within(number, range_of(name)):
            raise UserError(f'{name}={value!r}: it must be {in_words(range_of(name))}.')


def _is_of_type(value: Any, key: Key) -> bool:
    if value is None:
        return key.may_be_unset
    if key.kind is tuple:
        of = float if key.may_be_unset or not key.default else type(key.default[0])
        return isinstance(value, tuple | list) and (not key.range or all(_is_number(number, of) for number in value))
    return _is_number(value, key.kind) if key.kind in (int, float) else isinstance(value, key.kind)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)


def leaves(config: Config, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Yields the dotted names of all keys of a config, with their values."""
    for key in config:
        if isinstance(config[key], ml_collections.ConfigDict):
            yield from leaves(config[key], f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', config[key]


def section_of(config: Config, name: str) -> tuple[Config, str]:
    """Returns the section that a dotted name leads to, and the last part of the name.

    Raises:
        KeyError: if there is no such section.
        AttributeError: if there is none but one with a similar name; ml_collections raises it.
        TypeError: if a part of the name is not a section.
    """
    *sections, last = name.split('.')
    for section in sections:
        config = config[section]
    return config, last


def plugin_files(config: Config) -> tuple[Place, ...]:
    """Returns the paths that `config.plugins` names.

    Raises:
        UserError: for a path that `bqat_jax.storage.place` rejects.
    """
    return tuple(place(part.strip(), 'plugins') for part in (config.plugins or '').split(',') if part.strip())


def local_files(files: Iterable[Place]) -> list[Path]:
    """Returns local paths of plugins, with copies of those in buckets.

    Raises:
        UserError: for a file that does not exist.
    """
    local = []
    for file in files:
        try:
            local.append(local_copy(file))
        except FileNotFoundError as error:
            raise UserError(f'plugins: there is no file {file}. Use the path of a Python file.') from error
    return local


def to_plain(value: Any) -> Any:
    """Returns a config as JSON: nested dicts, lists and numbers."""
    if isinstance(value, ml_collections.ConfigDict):
        return {key: to_plain(value[key]) for key in sorted(value.keys())}
    return json.loads(json.dumps(value))


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> list[str]:
    """Returns the dotted keys at which two plain configs differ, each as 'key: old -> new'."""
    changes = changed_values(old, new, prefix)
    return [f'{key}: {json.dumps(before)} -> {json.dumps(after)}' for key, before, after in changes]


def changed_values(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = '') -> list[tuple[str, Any, Any]]:
    """Returns the dotted keys at which two plain configs differ, each with both values; None for a missing one."""
    changes = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes += changed_values(before, after, f'{prefix}{key}.')
        elif before != after or (key in old) != (key in new):
            changes.append((f'{prefix}{key}', before, after))
    return changes


def check_resumable(old: Mapping[str, Any], new: Mapping[str, Any], workdir: Place) -> None:
    """Checks that a run of config `old` can resume with config `new`.

    A key that did not exist when the workdir was made has its default, which stands for the earlier behaviour.

    Raises:
        UserError: if a key differs that the result depends on; all such keys are named.
    """
    unsafe = []
    for change in changed_keys(completed(old, workdir), new):
        name = change.partition(':')[0]
        if name not in BY_NAME and not name.startswith(NETWORK):
            raise UserError(
                f'{workdir} was made with the key {name}, which this version of bqat_jax does not have. Use the '
                'version that its environment.json names, or another --workdir.'
            )
        if name not in BY_NAME or not BY_NAME[name].may_change:
            unsafe.append(change)
    if unsafe:
        listed = '\n  '.join(unsafe)
        raise UserError(
            f'{workdir} was made with a different config (there -> now):\n  {listed}\n'
            'Use another --workdir, or the values that it was made with. '
            f'These keys may change: {", ".join(key.name for key in KEYS if key.may_change)}.{_hint(unsafe, workdir)}'
        )


def _hint(changes: list[str], workdir: Place) -> str:
    """A further remedy if the duration or the bits of training differ."""
    if any(change.startswith(('train.steps', 'train.epochs', 'quant.')) for change in changes):
        return f' To train its network further, use another --workdir with --config.init.workdir={workdir}.'
    return ''


def completed(plain: Mapping[str, Any], workdir: Place) -> dict[str, Any]:
    """Returns a workdir's plain config with missing keys at their defaults; the network's options are left alone.

    Raises:
        UserError: if `plain` is not a config.
    """
    config = json.loads(json.dumps(plain))
    for key in KEYS:
        if not key.name.startswith(NETWORK):
            *sections, last = key.name.split('.')
            section = config
            for name in sections:
                section = section.setdefault(name, {})
                if not isinstance(section, dict):
                    raise damaged(workdir / 'config.json', f'{name} is not a section')
            section.setdefault(last, None if key.may_be_unset else to_plain(key.default))
    return config
