"""Translates PyTorch's names of parameters by the rules of `name_rules`, and takes off the prefixes of wrappers."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from bqat_jax.networks.name_rules import Rule

# torch.nn.DataParallel and DistributedDataParallel, torch.compile, and modules that hold the network.
PREFIXES = ('module.', '_orig_mod.', 'model.', 'backbone.')
# Last part of the names that count something: of batch norm; of torch.optim.swa_utils.AveragedModel.
COUNTERS = ('num_batches_tracked', 'n_averaged')
# What stands in a path for a group of the pattern: its text, or that number plus one.
_REFERENCE = re.compile(r'\\(\d)|\{\\(\d)\+1\}')
_GROUP = re.compile(r'\((?!\?)[^()]*\)')
_ALTERNATIVES = re.compile(r'\(\?:([^()|]*)(?:\|[^()]*)?\)\??')


def is_counter(name: str) -> bool:
    """Returns whether a name is that of a counter, which is no part of the network."""
    return name.rpartition('.')[2] in COUNTERS


@dataclasses.dataclass(frozen=True)
class Translation:
    """Name rules, compiled once: a family has more patterns than `re` remembers.

    Attributes:
        rules: pattern of a PyTorch name, and our paths.
    """

    rules: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]

    @staticmethod
    def of(rules: Sequence[Rule]) -> 'Translation':
        """Returns the translation by the rules of a family."""
        return Translation(
            tuple((re.compile(pattern), (paths,) if isinstance(paths, str) else paths) for pattern, paths in rules)
        )

    def paths(self, name: str) -> tuple[str, ...]:
        """Returns our paths for a PyTorch name; none if no rule knows it."""
        for pattern, paths in self.rules:
            match = pattern.fullmatch(name)
            if match:
                return tuple(_expand(path, match) for path in paths)
        return ()

    def names(self, paths: Iterable[str]) -> list[str]:
        """Returns PyTorch names that give our paths, as many for a path as there are rules that can be written out."""
        inverse = [
            (_template_pattern(template), template, pattern.pattern)
            for pattern, templates in self.rules
            for template in templates
        ]
        names = []
        for path in paths:
            for template_pattern, template, pattern in inverse:
                match = template_pattern.fullmatch(path)
                name = None if match is None else _write_out(pattern, _values(template, match))
                if name is not None and path in self.paths(name):
                    names.append(name)
        return names


def find_prefix(names: Iterable[str], translation: Translation) -> str:
    """Returns what to take off the names: one of `PREFIXES` or several, that all of them but counters begin with.

    Of the possible ones that after which the rules know most names; of equals the shortest. So names that the rules
    know as they are lose nothing.

    Args:
        names: PyTorch's.
        translation: of the network.
    """
    names = [name for name in names if not is_counter(name)]
    known, prefix = {}, ''
    while names and prefix not in known:
        known[prefix] = sum(bool(translation.paths(name[len(prefix) :])) for name in names)
        longer = [prefix + more for more in PREFIXES]
        prefix = next((start for start in longer if all(name.startswith(start) for name in names)), prefix)
    return max(known, key=lambda start: known[start], default='')


def _expand(path: str, match: re.Match[str]) -> str:
    """A path with its references replaced."""

    def value(reference: re.Match[str]) -> str:
        return match[int(reference[1])] if reference[1] else str(int(match[int(reference[2])]) + 1)

    return _REFERENCE.sub(value, path)


def _template_pattern(template: str) -> re.Pattern[str]:
    """What matches the paths that a template gives."""
    literals = _REFERENCE.split(template)[:: _REFERENCE.groups + 1]
    return re.compile(r'(\d+)'.join(map(re.escape, literals)))


def _values(template: str, match: re.Match[str]) -> dict[int, str]:
    """The groups of a PyTorch name with which a template gives the path that was matched."""
    return {
        int(one[1] or one[2]): text if one[1] else str(int(text) - 1)
        for one, text in zip(_REFERENCE.finditer(template), match.groups(), strict=True)
    }


def _write_out(pattern: str, values: dict[int, str]) -> str | None:
    """A name that a pattern of literals, groups and simple alternatives may match; None for another pattern."""
    groups = iter(range(1, 10))
    name = _GROUP.sub(lambda _: values.get(next(groups), ''), pattern)
    name = _ALTERNATIVES.sub(lambda found: found[1], name).replace('\\.', '.')
    return name if re.fullmatch(pattern, name) else None
