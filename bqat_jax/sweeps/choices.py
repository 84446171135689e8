"""Extends the grid of choices by one step if the best choice is at its edge."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from bqat_jax.experiment.keys import is_within, range_of
from bqat_jax.sweeps.definition import Overrides

# Significant digits of an added value, which is also part of a folder name.
DIGITS = 6


def beyond(candidates: Sequence[Overrides], chosen: Overrides) -> dict[str, Any] | None:
    """Returns the candidate one step beyond the edge at which `chosen` is.

    The grid must be a line: all candidates share their keys, and the values that differ are positive numbers that rise
    or fall together. For every key the step is the ratio of the grid at that edge.

    Args:
        candidates: all overrides, in any order.
        chosen: one of them.

    Returns:
        The overrides; None if `chosen` is not at an edge, the grid is not a line, or a value would leave its range.
    """
    if len(candidates) < 2 or any(set(one) != set(chosen) for one in candidates):
        return None
    varying = [key for key in chosen if any(one[key] != chosen[key] for one in candidates)]
    if not varying or not all(_is_positive(one[key]) for one in candidates for key in varying):
        return None
    ordered = sorted(candidates, key=lambda one: one[varying[0]])
    if not all(_is_monotone([one[key] for one in ordered]) for key in varying):
        return None
    if chosen == ordered[0]:
        neighbour = ordered[1]
    elif chosen == ordered[-1]:
        neighbour = ordered[-2]
    else:
        return None
    added = dict(chosen)
    for key in varying:
        value = chosen[key] * chosen[key] / neighbour[key]
        added[key] = round(value) if isinstance(chosen[key], int) else float(f'{value:.{DIGITS}g}')
        if added[key] == chosen[key] or not is_within(added[key], range_of(key)):
            return None
    return added


def is_added(row: Mapping[str, Any], choice: Overrides) -> bool:
    """Returns whether a choice in a method's row of `sweep.json` was added to the sweep's grid."""
    return any(one.get('added', False) and one['overrides'] == dict(choice) for one in row.get('choices', ()))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _is_monotone(values: Sequence[float]) -> bool:
    pairs = list(itertools.pairwise(values))
    return all(a < b for a, b in pairs) or all(a > b for a, b in pairs)
