"""Translates PyTorch parameter names by the rules of `name_rules`, and removes prefixes of wrappers."""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from bqat_jax.networks.name_rules import Rule

# torch.nn.DataParallel and DistributedDataParallel, torch.compile, and modules that hold the network.
PREFIXES = ('module.', '_orig_mod.', 'model.', 'backbone.')
# Last part of the names of counters: of batch norm; of torch.optim.swa_utils.AveragedModel.
COUNTERS = ('num_batches_tracked', 'n_averaged')
# References in a path to a group of the pattern: its text, or its number plus one.
_REFERENCE = re.compile(r'\\(\d)|\{\\(\d)\+1\}')
_GROUP = re.compile(r'\((?!\?)[^()]*\)')
_ALTERNATIVES = re.compile(r'\(\?:([^()|]*)(?:\|[^()]*)?\)\??')


def is_counter(name: str) -> bool:
    """Returns whether a name is that of a counter, which is not part of the network."""
    return name.rpartition('.')[2] in COUNTERS


@dataclasses.dataclass(frozen=True)
class Translation:
    """Compiled name rules; a family has more patterns than the cache of `re`.

    Attributes:
        rules: pairs of the pattern of a PyTorch name and our paths.
    """

    rules: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]

    @staticmethod
    def of(rules: Sequence[Rule]) -> 'Translation':
        """Returns the translation of a family's rules."""
        return Translation(
            tuple((re.compile(pattern), (paths,) if isinstance(paths, str) else paths) for pattern, paths in rules)
        )

    def paths(self, name: str) -> tuple[str, ...]:
        """Returns our paths for a PyTorch name, or () if no rule matches."""
        for pattern, paths in self.rules:
            match = pattern.fullmatch(name)
            if match:
                return tuple(_expand(path, match) for path in paths)
        return ()

    def names(self, paths: Iterable[str]) -> list[str]:
        """Returns PyTorch names for our paths, one for every invertible rule of a path."""
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
    """Returns the prefix to remove from the names: one or more of `PREFIXES` that all names except counters start with.

    Among the possible prefixes, including '', it is the one that makes the rules match most names, and the shortest of
    equal ones. Names that match without removal are therefore unchanged.

    Args:
        names: PyTorch names.
        translation: the network's translation.
    """
    names = [name for name in names if not is_counter(name)]
    known, prefix = {}, ''
    while names and prefix not in known:
        known[prefix] = sum(bool(translation.paths(name[len(prefix) :])) for name in names)
        longer = [prefix + more for more in PREFIXES]
        prefix = next((start for start in longer if all(name.startswith(start) for name in names)), prefix)
    return max(known, key=lambda start: known[start], default='')


def _expand(path: str, match: re.Match[str]) -> str:
    """Returns a path with its references replaced."""

    def value(reference: re.Match[str]) -> str:
        return match[int(reference[1])] if reference[1] else str(int(match[int(reference[2])]) + 1)

    return _REFERENCE.sub(value, path)


def _template_pattern(template: str) -> re.Pattern[str]:
    """Returns a pattern of the paths of a template."""
    literals = _REFERENCE.split(template)[:: _REFERENCE.groups + 1]
    return re.compile(r'(\d+)'.join(map(re.escape, literals)))


def _values(template: str, match: re.Match[str]) -> dict[int, str]:
    """Returns the groups of the PyTorch name for which a template gives the matched path."""
    return {
        int(one[1] or one[2]): text if one[1] else str(int(text) - 1)
        for one, text in zip(_REFERENCE.finditer(template), match.groups(), strict=True)
    }


def _write_out(pattern: str, values: dict[int, str]) -> str | None:
    """Returns a name that matches a pattern of literals, groups and simple alternatives; None for other patterns."""
    groups = iter(range(1, 10))
    name = _GROUP.sub(lambda _: values.get(next(groups), ''), pattern)
    name = _ALTERNATIVES.sub(lambda match: match[1], name).replace('\\.', '.')
    return name if re.fullmatch(pattern, name) else None
