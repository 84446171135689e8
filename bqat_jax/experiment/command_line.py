"""The command line: the recipe and the keys set on it; a mistyped key is rejected with a suggestion."""

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_collections

from bqat_jax.errors import UserError
from bqat_jax.experiment.configuration import Config, leaves, section_of
from bqat_jax.experiment.keys import BY_NAME
from bqat_jax.registry import run_file, suggest

FLAG = 'config'
OVERRIDE = re.compile(rf'--?(no)?{FLAG}\.(?P<name>[^=]*)(?P<value>=.*)?', re.DOTALL)
UNSET = 'None'


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A command line whose recipe is loaded.

    Attributes:
        recipe: its file.
        config: the config that its `get_config` returned.
        argv: the arguments without the recipe and without those that unset keys.
        unset: names of the keys that are unset.
    """

    recipe: Path
    config: Config
    argv: list[str]
    unset: tuple[str, ...]


def read_command_line(argv: list[str], default: Path) -> CommandLine:
    """Loads the recipe that the arguments name, and checks that it has the keys that they set.

    Args:
        argv: the program's name and its arguments, flag files expanded.
        default: the recipe if the arguments name none.

    Raises:
        UserError: for a recipe that cannot be loaded or a key that it does not have.
    """
    recipe, rest = _take_recipe(argv, default)
    file, config = load_recipe(recipe)
    kept, unset = rest[:1], dict[str, None]()
    arguments = iter(rest[1:])
    for argument in arguments:
        match = OVERRIDE.fullmatch(argument)
        if match is None:
            kept.append(argument)
            continue
        _check_key(config, match['name'])
        section, key = section_of(config, match['name'])
        if match['value'] is None and match[1] is None and not isinstance(section[key], bool):
            argument = f'{argument}={next(arguments, "")}'  # --config.KEY VALUE
        unset.pop(match['name'], None)  # the last occurrence wins
        if argument.partition('=')[2] == UNSET and _value_may_be_unset(match['name']):
            kept = [other for other in kept if not _sets(other, match['name'])]
            unset[match['name']] = None
        else:
            kept.append(argument)
    return CommandLine(file, config, kept, tuple(unset))


def load_recipe(text: str) -> tuple[Path, Config]:
    """Returns the file and the config of a recipe, `FILE.py` or `FILE.py:key=value,key=value`.

    Raises:
        UserError: if the file is missing or fails, or gives no config.
    """
    name, separator, argument = text.partition(':')
    file = Path(name)
    if not name or not file.is_file():
        raise UserError(
            f'--{FLAG}={text!r}: there is no file {name!r}. Use a recipe, such as configs/digits.py:bits=2.'
        )
    module = run_file(file, f'bqat_jax_recipe_{file.stem}', 'recipe')
    if not callable(getattr(module, 'get_config', None)):
        raise UserError(f'--{FLAG}={text!r}: the file has no function get_config(argument) that returns a config.')
    try:
        config = module.get_config(argument) if separator else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'The recipe {file} failed: {type(error).__name__}: {error}') from error
    if not isinstance(config, ml_collections.ConfigDict):
        raise UserError(f'The recipe {file}: get_config() returned a {type(config).__name__}, not a ConfigDict.')
    return file, config


def unset(config: Config, names: Iterable[str]) -> None:
    """Sets keys to None."""
    for name in names:
        section, key = section_of(config, name)
        section[key] = None


def _take_recipe(argv: list[str], default: Path) -> tuple[str, list[str]]:
    """The last recipe named, and the other arguments."""
    recipe, rest = str(default), []
    arguments = iter(argv)
    for argument in arguments:
        if argument in (f'-{FLAG}', f'--{FLAG}'):
            recipe = next(arguments, '')
        elif argument.startswith((f'-{FLAG}=', f'--{FLAG}=')):
            recipe = argument.partition('=')[2]
        else:
            rest.append(argument)
    return recipe, rest


def _check_key(config: Config, name: str) -> None:
    known = [key for key, _ in leaves(config)]
    if name in known:
        return
    section: Any = config
    above = ''
    for part in name.split('.'):
        if not isinstance(section, ml_collections.ConfigDict):
            raise UserError(f'The config has no key {name!r}: {above} is a value and has no keys.')
        if part not in section:
            where = f' in config.{above}' if above else ''
            raise UserError(
                f'The config has no key {name!r}: there is no {part!r}{where}.{_hint(part, section, known)}'
            )
        section, above = section[part], f'{above}.{part}' if above else part
    raise UserError(
        f'config.{name} is a section of the config. Set its keys one by one: {", ".join(sorted(section.keys()))}.'
    )


def _hint(part: str, section: Config, known: list[str]) -> str:
    """A suggestion for a part of a name that a section does not have."""
    begun = [key for key in section if part and (key.startswith(part) or part.startswith(key))]
    elsewhere = [key for key in known if key.rpartition('.')[2] == part]
    if begun or elsewhere:
        return f' Did you mean {(begun or elsewhere)[0]!r}?'
    return suggest(part, section) or ' docs/configuration.md lists all keys.'


def _value_may_be_unset(name: str) -> bool:
    return name in BY_NAME and BY_NAME[name].may_be_unset


def _sets(argument: str, name: str) -> bool:
    match = OVERRIDE.fullmatch(argument)
    return match is not None and match['name'] == name
