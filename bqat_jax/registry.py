"""Names for classes, and text such as 'ewgs:delta=0.1' to objects: how a config names estimators and quantizers."""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator
from typing import Any


class Registry:
    """Frozen dataclasses by name; their fields that have defaults and are not fixed by the caller are options.

    Attributes:
        kind: what they are, for messages, such as 'gradient estimator'.
    """

    def __init__(self, kind: str, fixed: tuple[str, ...] = ()):
        self.kind = kind
        self._fixed = fixed
        self._classes: dict[str, type] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._classes)

    def register(self, name: str) -> Callable[[type], type]:
        """Returns a class decorator that makes the class a frozen dataclass and known by `name`.

        Raises:
            ValueError: if the name has a colon or comma, or belongs to a class of another module.
        """
        if not name or set(name) & set(':,= '):
            raise ValueError(f'{name!r} cannot name a {self.kind}: it must not be empty or hold any of ":,= ".')

        def decorate(cls: Any) -> Any:
            known = self._classes.get(name)
            if known is not None and known.__module__ != cls.__module__:
                where = f'{known.__module__}.{known.__qualname__}'
                raise ValueError(f'There is a {self.kind} {name!r} already, {where}; take another name.')
            cls = dataclasses.dataclass(frozen=True)(cls)
            cls.name = name
            self._classes[name] = cls
            return cls

        return decorate

    def get(self, name: str) -> Any:
        """Returns the class called `name`.

        Raises:
            ValueError: if there is none; the message lists those there are, and the nearest.
        """
        if name not in self._classes:
            raise ValueError(
                f'There is no {self.kind} {name!r}; there are: {", ".join(self._classes)}.{_nearest(name, self)}'
            )
        return self._classes[name]

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
                raise ValueError(f'The {self.kind} {name!r} has no option {key!r}; {what}.{_nearest(key, fields)}')
            kind = type(fields[key])
            try:
                given[key] = {'true': True, 'false': False}[value.lower()] if kind is bool else kind(value)
                if kind is float and not math.isfinite(given[key]):
                    raise ValueError(f'{value} is not finite')
            except (ValueError, KeyError) as error:
                raise ValueError(
                    f'{key}={value!r} of the {self.kind} {name!r} is not understood; write it as in '
                    f'{name}:{key}={str(fields[key]).lower()}{"" if separator else " (with a value)"}.'
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


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f' Did you mean {near[0]!r}?' if near else ''
