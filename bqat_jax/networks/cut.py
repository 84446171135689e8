"""What block replacement needs to know of a network: that it is a stem, blocks and a head, run one after another."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class CutNetwork:
    """A network cut into stem, blocks and head.

    The module owns named submodules that run one after another, and a method `run(x, names, train)` that runs those
    named. The pieces are runs of such names; where the cuts lie does not change a parameter's name.

    Attributes:
        module: the Linen module.
        stem: names of the submodules before the first block.
        blocks: for each block the names of its submodules.
        head: names of the submodules after the last block; they give the logits.
    """

    module: Any  # nn.Module does not declare `run`
    stem: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        """The blocks as they are replaced: the stem belongs to the first."""
        return (self.stem + self.blocks[0], *self.blocks[1:])

    @property
    def names(self) -> tuple[str, ...]:
        """All submodules, in order."""
        return sum(self.segments, ()) + self.head

    def init(self, key: jax.Array, image_shape: Sequence[int]) -> dict[str, Any]:
        """Returns fresh variables, 'params' and 'batch_stats', for images of shape (height, width, channels)."""
        images = jax.ShapeDtypeStruct((1, *image_shape), 'float32')
        return self.module.lazy_init(key, images, self.names, train=False, method='run')

    def apply(self, variables: Any, x: jax.Array, names: Sequence[str], *, train: bool) -> tuple[jax.Array, Any]:
        """Runs the submodules called `names`.

        Args:
            variables: the network's variables.
            x: what enters the first of them.
            names: which to run, in order.
            train: with batch statistics, or else with the stored ones.

        Returns:
            The output, and the 'batch_stats' of those submodules, updated when `train`.
        """
        mine = {
            collection: {name: values[name] for name in names if name in values}
            for collection, values in variables.items()
        }
        if not train:
            return self.module.apply(mine, x, tuple(names), train=False, method='run'), mine.get('batch_stats', {})
        output, updated = self.module.apply(mine, x, tuple(names), train=True, method='run', mutable=['batch_stats'])
        return output, updated.get('batch_stats', {})
