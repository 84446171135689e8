"""Records the codes of layers' inputs while a network runs."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from bqat_jax.transform.tagging import TAG, run_and_collect, tag


@dataclasses.dataclass(frozen=True)
class Watch:
    """A record of the layers seen during a trace, which fills it in.

    Attributes:
        numbers: the number of every recorded layer by path.
        axes: the rank of its codes inside of loops, by path.
    """

    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    axes: dict[str, int] = dataclasses.field(default_factory=dict)

    def see(self, path: str, codes: jax.Array) -> None:
        """Tags the codes of a layer's input in the traced program."""
        self.label(path, codes.ndim)
        tag(self.numbers[path], [codes])

    def label(self, path: str, ndim: int) -> str:
        """Returns the name with which `checkpoint_name` marks codes in the way of `see`."""
        self.axes[path] = ndim
        return f'{TAG}{self.numbers.setdefault(path, len(self.numbers))}:0:1'

    def path_of(self, label: str) -> str:
        """Returns the path of the layer whose codes have a label."""
        number = int(label.removeprefix(TAG).partition(':')[0])
        return next(path for path, own in self.numbers.items() if own == number)


def run_watched(run: Callable[[Watch], Any]) -> tuple[Any, dict[str, list[jax.Array]]]:
    """Runs a network and records the codes of its layers' inputs.

    Args:
        run: runs the network, whose layers call `Watch.see`.

    Returns:
        The outputs, and by layer path the codes at each call, (batch, ..).
    """
    watch = Watch()
    outputs, collected = run_and_collect(lambda: run(watch))
    by_path: dict[str, list[jax.Array]] = {}
    for path, number in watch.numbers.items():
        by_path[path], axes = [], watch.axes[path]
        for (codes,) in collected[number]:  # a loop stacks its iterations along leading axes
            shape = codes.shape[codes.ndim - axes :]
            by_path[path] += [*codes.reshape(-1, *shape)] if codes.ndim > axes else [codes]
    return outputs, by_path
