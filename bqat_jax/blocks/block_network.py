"""What block replacement needs to know of a network: that it is a stem, blocks and a head, run one after another."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

# A collection of variables in which `run` may carry something out of a lifted transformation.
CARRIED = 'carried'


def run_submodules(module: Any, x: Any, names: Sequence[str], train: bool) -> Any:
    """Runs a module's submodules called `names`, one after another, each as `submodule(x, train)`."""
    for name in names:
        x = getattr(module, name)(x, train)
    return x


@dataclasses.dataclass(frozen=True)
class BlockNetwork:
    """A network cut into stem, blocks and head.

    Each of them is one part of the network or several that run one after another; where the cuts lie does not change a
    parameter's name.

    Attributes:
        module: the Linen module.
        stem: names of the parts before the first block.
        blocks: for each block the names of its parts.
        head: names of the parts after the last block; they give the logits.
        run: `run(module, x, names, train)` runs the parts called `names` of the bound module on x.
    """

    module: nn.Module
    stem: tuple[str, ...]
    blocks: tuple[tuple[str, ...], ...]
    head: tuple[str, ...]
    run: Callable[[Any, Any, Sequence[str], bool], Any] = run_submodules

    @property
    def segments(self) -> tuple[tuple[str, ...], ...]:
        """The blocks as they are replaced: the stem belongs to the first."""
        return (self.stem + self.blocks[0], *self.blocks[1:])

    @property
    def names(self) -> tuple[str, ...]:
        """All parts, in order."""
        return sum(self.segments, ()) + self.head

    def init(self, key: jax.Array, image_shape: Sequence[int]) -> dict[str, Any]:
        """Returns fresh variables, 'params' and 'batch_stats', for images of shape (height, width, channels).

        Raises:
            ValueError: if the network has variables of other kinds.
        """
        images = jax.ShapeDtypeStruct((1, *image_shape), 'float32')
        variables: Any = self.module.lazy_init(
            key, images, method=lambda module, x: self.run(module, x, self.names, False)
        )
        unknown = [name for name in variables if name not in ('params', 'batch_stats', CARRIED)]
        if unknown:
            raise ValueError(
                f'The network has variables in {", ".join(unknown)}: block replacement knows what to do with '
                "'params' and 'batch_stats' alone."
            )
        return {'params': variables['params'], 'batch_stats': variables.get('batch_stats', {})}

    def apply(
        self, variables: Any, x: Any, names: Sequence[str], *, train: bool, key: jax.Array | None = None
    ) -> tuple[Any, Any]:
        """Runs the parts called `names`.

        Args:
            variables: the network's variables.
            x: what enters the first of them.
            names: which to run, in order.
            train: with batch statistics, or else with the stored ones.
            key: of dropout, for a network that has it.

        Returns:
            The output, and the network's 'batch_stats', those of these parts updated when `train`.
        """

        def run(module, x):
            return self.run(module, x, tuple(names), train)

        # Pieces that run on their own draw differently.
        rngs = None if key is None else {'dropout': jax.random.fold_in(key, self.names.index(names[0]))}
        mutable = ['batch_stats', CARRIED] if train else [CARRIED]
        output, updated = self.module.apply(variables, x, method=run, mutable=mutable, rngs=rngs)
        return output, updated.get('batch_stats', variables.get('batch_stats', {}))

    def as_function(
        self, variables: Any, *, train: bool, key: jax.Array | None = None
    ) -> Callable[[Any, Any], tuple[Any, Any]]:
        """Returns `run(params, x)`, the whole network with other parameters; arguments and output as `apply`."""

        def run(params, x):
            return self.apply({'batch_stats': {}, **variables, 'params': params}, x, self.names, train=train, key=key)

        return run
