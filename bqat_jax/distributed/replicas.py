"""Several seeds side by side: one program trains them all, spread over the devices there are.

Every array of the state, and every batch, has a leading axis with one entry for each replica. Replicas share the
partner, the data on the device, and what a plan draws: so a `lax.cond` on the draw stays one.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bqat_jax.distributed.processes import put_batch
from bqat_jax.distributed.sharding import BATCH_AXES, Placement, over_batch, replicated

# On their way to the devices, or there, before a step needs them.
PREFETCH_BATCHES = 2


@dataclasses.dataclass(frozen=True)
class Replicas:
    """How many runs there are, and the devices they share.

    Attributes:
        count: 1 for a single run, whose arrays have no axis for it, and whose batch is split over the devices.
        placement: where the arrays of a single run lie. Several runs are spread over the devices, each whole; `count`
            is then a multiple of their number.
    """

    count: int
    placement: Placement

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.placement.mesh

    @property
    def evaluation_sharding(self) -> NamedSharding:
        """Where a batch lies that every replica sees."""
        return over_batch(self.mesh) if self.count == 1 else replicated(self.mesh)

    @property
    def take_turns(self) -> bool:
        """Whether the replicas of a device run one after another within a step.

        On CPUs and GPUs they do, as convolutions with a kernel for each replica are slow there: two replicas of a
        ResNet-20 took 4 times as long as one on a CPU (JAX 0.10.2), 8.0 ms in turns and 9.5 together on an H100, and
        eight 26.4 either way, together with twelve times the memory (JAX 0.11.2). TPUs were not measured.
        """
        return self.mesh.devices.flat[0].platform in ('cpu', 'gpu')

    def over(self, function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
        """Returns the function of one replica as one of all; `in_axes` says which arguments have the leading axis."""
        if self.count == 1:
            return function
        if not self.take_turns:
            return jax.vmap(function, in_axes=tuple(in_axes))

        def run(*arguments):
            own = {number: arguments[number] for number, axis in enumerate(in_axes) if axis is not None}

            def run_one(own):
                return function(*(own.get(number, shared) for number, shared in enumerate(arguments)))

            return jax.lax.map(run_one, own)

        return run

    def jit(
        self, function: Callable[..., Any], in_axes: Sequence[int | None], donate_argnums: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """Returns a function of all replicas jitted.

        Args:
            function: takes and returns arrays of all replicas that one device has, as `over` makes it.
            in_axes: 0 for arguments with the leading axis, None for those that all replicas share.
            donate_argnums: arguments that it donates.
        """
        if self.count == 1 and self.placement.shards:

            def placed(*arguments):
                return self.placement.constrain(function(*arguments))

            return jax.jit(placed, donate_argnums=donate_argnums)
        if self.count == 1:
            # Left to itself XLA may hand a state back in another layout; pinned, it is donated in place.
            return jax.jit(function, donate_argnums=donate_argnums, out_shardings=replicated(self.mesh))
        specs = tuple(PartitionSpec() if axis is None else PartitionSpec(BATCH_AXES) for axis in in_axes)
        # Each device has whole replicas, so nothing crosses between them.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(BATCH_AXES), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate_argnums)

    def stack(self, trees: Sequence[Any]) -> Any:
        """Returns one tree from one for each replica."""
        if self.count == 1:
            return trees[0]
        return jax.device_put(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees), over_batch(self.mesh))

    def first(self, tree: Any) -> Any:
        """Returns the arrays of the first replica, on all devices."""
        if self.count == 1:
            return tree
        return jax.device_put(jax.tree.map(lambda x: x[0], tree), replicated(self.mesh))

    def batches(self, readings: Sequence[Iterator[Any]]) -> Iterator[Any]:
        """Yields batches on the devices, from a reading for each replica; of several processes from one's own rows."""
        waiting: collections.deque[Any] = collections.deque()
        for parts in zip(*readings, strict=True):
            batch = parts[0] if self.count == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
            waiting.append(put_batch(batch, over_batch(self.mesh)))  # which goes on while steps run
            if len(waiting) > PREFETCH_BATCHES:
                yield waiting.popleft()
        yield from waiting

    def stacked_shapes(self, shapes: Any) -> Any:
        """Returns shapes and dtypes of one replica's arrays as those of all, with their sharding."""
        if self.count == 1:
            shardings = self.placement.shardings(shapes)
            return jax.tree.map(
                lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, shardings
            )
        sharding = over_batch(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((self.count, *x.shape), x.dtype, sharding=sharding), shapes)


def values_of(metric: Any) -> list[float]:
    """Returns the values of a metric on the host, one for each replica."""
    return np.asarray(metric).reshape(-1).tolist()
