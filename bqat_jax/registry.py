"""Registries of quantizers, estimators, schedules, plans and networks, and plugins that extend them."""

import dataclasses
import difflib
import importlib.util
import math
import sys
import traceback
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from bqat_jax.errors import UserError

# Prefix of the module names of plugins.
PLUGIN = 'bqat_jax_plugin_'


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the known name closest to `name`, or '' if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f' Did you mean {near[0]!r}?' if near else ''


class Names:
    """Objects by name, in the order of their registration.

    Attributes:
        kind: kind of object for error messages, such as 'network'.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.entries: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def register(self, name: str) -> Callable[[Any], Any]:
        """Returns a decorator that registers a class or function as `name`.

        Raises:
            ValueError: if the name is empty, contains any of ':,= ', or is registered by another module.
        """
        if not name or set(name) & set(':,= '):
            raise ValueError(f'{name!r} cannot name a {self.kind}: it must not be empty or contain any of ":,= ".')

        def decorate(entry: Any) -> Any:
            known = self.entries.get(name)
            if known is not None and known.__module__ != entry.__module__:
                where = f'{known.__module__}.{known.__qualname__}'
                raise ValueError(f'The {self.kind} {name!r} is already registered, by {where}. Use another name.')
            self.entries[name] = self._complete(entry, name)
            return self.entries[name]

        return decorate

    def get(self, name: str) -> Any:
        """Returns the object registered as `name`.

        Raises:
            ValueError: if the name is not registered; the message lists the registered names and suggests one.
        """
        if name not in self.entries:
            raise ValueError(
                f'There is no {self.kind} {name!r}; there are: {", ".join(self.entries)}.{suggest(name, self)}'
            )
        return self.entries[name]

    def _complete(self, entry: Any, name: str) -> Any:
        """Returns the object to store for a registered entry."""
        del name
        return entry


class Registry(Names):
    """Frozen dataclasses by name; their fields, except those that the caller sets, are options."""

    def __init__(self, kind: str, fixed: tuple[str, ...] = ()):
        super().__init__(kind)
        self._fixed = fixed

    def make(self, text: str, **fixed: Any) -> Any:
        """Returns the object that `text` describes.

        Args:
            text: 'name' or 'name:option=value,option=value'.
            **fixed: fields that the caller sets and the text must not.

        Raises:
            ValueError: for an unknown name or option, or an invalid value.
        """
        name, _, options = text.partition(':')
        cls = self.get(name)
        fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in self._fixed}
        given = {}
        for item in filter(None, options.split(',')):
            key, separator, value = (part.strip() for part in item.partition('='))
            if key not in fields:
                what = f'its options: {", ".join(fields)}' if fields else 'it has none'
                raise ValueError(f'The {self.kind} {name!r} has no option {key!r}; {what}.{suggest(key, fields)}')
            kind: Any = _declared_kind(cls, key) if fields[key] is None else type(fields[key])
            try:
                given[key] = {'true': True, 'false': False}[value.lower()] if kind is bool else kind(value)
                if kind is float and not math.isfinite(given[key]):
                    raise ValueError(f'{value} is not finite')
            except (ValueError, KeyError) as error:
                example = str(kind() if fields[key] is None else fields[key]).lower()
                raise ValueError(
                    f'{key}={value!r} of the {self.kind} {name!r} is not understood; write it as in '
                    f'{name}:{key}={example}{"" if separator else " (with a value)"}.'
                ) from error
        return cls(**given, **fixed)

    def describe(self, instance: Any) -> str:
        """Returns the text from which `make` builds the object: its name and its non-default options."""
        options = [
            f'{field.name}={str(getattr(instance, field.name)).lower()}'
            for field in dataclasses.fields(instance)
            if field.name not in self._fixed and getattr(instance, field.name) != field.default
        ]
        return f'{instance.name}:{",".join(options)}' if options else instance.name

    def _complete(self, entry: Any, name: str) -> Any:
        cls: Any = dataclasses.dataclass(frozen=True)(entry)
        cls.name = name
        return cls


def _declared_kind(cls: type, field: str) -> Any:
    """Returns the type of an option declared as `TYPE | None`."""
    declared = typing.get_args(typing.get_type_hints(cls)[field])
    return next(kind for kind in declared if kind is not type(None))


def load_plugins(files: Iterable[Path]) -> None:
    """Runs Python files that register objects.

    A file that already ran in this process and has not changed since is skipped.

    Raises:
        UserError: if a file does not exist or fails.
    """
    for file in files:
        if not file.is_file():
            raise UserError(f'plugins: there is no file {file}. Give the path of a Python file.')
        stamp = (str(file.resolve()), file.stat().st_mtime_ns)
        # Two files may have the same name.
        name = f'{PLUGIN}{file.stem}_{zlib.crc32(stamp[0].encode()):08x}'
        if getattr(sys.modules.get(name), 'stamp', None) != stamp:
            vars(run_file(file, name, 'plugin'))['stamp'] = stamp


def loaded_plugins() -> list[str]:
    """Returns the paths of the plugins that ran in this process."""
    return [module.stamp[0] for name, module in list(sys.modules.items()) if name.startswith(PLUGIN)]


def place_in_plugins(error: BaseException) -> str | None:
    """Returns text that names the innermost plugin line of an error's traceback, or None if there is none."""
    loaded, lines = loaded_plugins(), traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if str(Path(line.filename).resolve()) in loaded]
    return f'The plugin {own[-1].filename}, line {own[-1].lineno},' if own else None


def run_file(file: Path, name: str, kind: str) -> ModuleType:
    """Runs a user's Python file as the module `name`.

    Args:
        file: an existing file.
        name: module name, under which the file's classes are looked up.
        kind: kind of file for error messages, such as 'plugin'.

    Raises:
        UserError: if the file name does not end in .py, or the file fails.
    """
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f'The {kind} {file} is not a Python file: its name must end in .py.')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f'The {kind} {file} failed: {type(error).__name__}: {error}') from error
    return module
