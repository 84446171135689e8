"""Names for quantizers, estimators, schedules, plans and networks; a user's own files that register more of them."""

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

# What the modules of plugins are called, before their own name.
PLUGIN = 'bqat_jax_plugin_'


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns ' Did you mean ...?' with the known name that is most like `name`, or '' if none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f' Did you mean {near[0]!r}?' if near else ''


class Names:
    """Objects by name, in the order of their registration.

    Attributes:
        kind: what they are, for messages, such as 'network'.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.entries: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def register(self, name: str) -> Callable[[Any], Any]:
        """Returns a decorator that makes a class or function known by `name`.

        Raises:
            ValueError: if the name is empty or holds any of ':,= ', or belongs to an object of another module.
        """
        if not name or set(name) & set(':,= '):
            raise ValueError(f'{name!r} cannot name a {self.kind}: it must not be empty or hold any of ":,= ".')

        def decorate(entry: Any) -> Any:
            known = self.entries.get(name)
            if known is not None and known.__module__ != entry.__module__:
                where = f'{known.__module__}.{known.__qualname__}'
                raise ValueError(f'There is a {self.kind} {name!r} already, {where}; take another name.')
            self.entries[name] = self._complete(entry, name)
            return self.entries[name]

        return decorate

    def get(self, name: str) -> Any:
        """Returns the object called `name`.

        Raises:
            ValueError: if there is none; the message lists the names there are, and the nearest.
        """
        if name not in self.entries:
            raise ValueError(
                f'There is no {self.kind} {name!r}; there are: {", ".join(self.entries)}.{suggest(name, self)}'
            )
        return self.entries[name]

    def _complete(self, entry: Any, name: str) -> Any:
        """What is kept for an object that is registered."""
        del name
        return entry


class Registry(Names):
    """Frozen dataclasses by name; their fields that have defaults and are not fixed by the caller are options."""

    def __init__(self, kind: str, fixed: tuple[str, ...] = ()):
        super().__init__(kind)
        self._fixed = fixed

    def make(self, text: str, **fixed: Any) -> Any:
        """Returns the object that `text` describes.

        Args:
            text: 'name' or 'name:option=value,option=value'.
            **fixed: fields that the caller gives, and that the text cannot.

        Raises:
            ValueError: for a name or option that does not exist, or a value that it cannot take.
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
        """Returns the text that `make` makes the object from: its name and the options that are not the default."""
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
    """The type of an option that is declared as `int | None`, and is None by default: int."""
    declared = typing.get_args(typing.get_type_hints(cls)[field])
    return next(kind for kind in declared if kind is not type(None))


def load_plugins(files: Iterable[Path]) -> None:
    """Runs a user's files, so that what they register can be named.

    A file that has been run in this process, and has not changed since, is not run again.

    Args:
        files: Python files.

    Raises:
        UserError: for a file that is not there, or fails.
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
    """Returns the paths of the plugins that were run in this process."""
    return [module.stamp[0] for name, module in list(sys.modules.items()) if name.startswith(PLUGIN)]


def place_in_plugins(error: BaseException) -> str | None:
    """Returns the innermost line of a plugin in an error's traceback, in words; None if no plugin has part in it."""
    loaded, lines = loaded_plugins(), traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if str(Path(line.filename).resolve()) in loaded]
    return f'The plugin {own[-1].filename}, line {own[-1].lineno},' if own else None


def run_file(file: Path, name: str, kind: str) -> ModuleType:
    """Runs a Python file of the user's as the module `name`.

    Args:
        file: it is there.
        name: of the module; classes that the file defines are looked up under it.
        kind: what the file is, for messages.

    Raises:
        UserError: if its name does not end in .py, or it fails.
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
