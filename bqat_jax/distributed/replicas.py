"""Replicas: one program trains several seeds in parallel, distributed over the devices.

Every array of the state, and every batch, has a leading axis with one entry per replica. Replicas share the partner,
the data on the device, and the draws of a plan, so that a `lax.cond` on a draw stays a `cond`.
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

# Batches transferred ahead of the step that needs them.
PREFETCH_BATCHES = 2


@dataclasses.dataclass(frozen=True)
class Replicas:
    """A number of replicas and the devices that they share.

    Attributes:
        count: number of replicas; with 1, arrays have no axis of replicas, and the batch is sharded over the devices.
        placement: the sharding of a single replica. Several replicas are distributed over the devices, each on one;
            `count` must be a multiple of the number of devices.
    """

    count: int
    placement: Placement

    @property
    def mesh(self) -> Mesh:
        """The devices."""
        return self.placement.mesh

    @property
    def evaluation_sharding(self) -> NamedSharding:
        """The sharding of a batch that all replicas evaluate."""
        return over_batch(self.mesh) if self.count == 1 else replicated(self.mesh)

    @property
    def take_turns(self) -> bool:
        """Whether the replicas of a device run one after another within a step.

        They do on CPUs and GPUs, where convolutions with one kernel per replica are slow: two replicas of a ResNet-20
        took 4 times as long as one on a CPU (JAX 0.10.2). On an H100 they took 8.0 ms in turns and 9.5 ms together, and
        eight took 26.4 ms either way, with twelve times the memory together (JAX 0.11.2). TPUs were not measured.
        """
        return self.mesh.devices.flat[0].platform in ('cpu', 'gpu')

    def over(self, function: Callable[..., Any], in_axes: Sequence[int | None]) -> Callable[..., Any]:
        """Maps a function of one replica over all; `in_axes` says which arguments have the leading axis."""
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
        """Jits a function of all replicas.

        Args:
            function: takes and returns the arrays of a device's replicas, such as a result of `over`.
            in_axes: 0 for arguments with the leading axis, None for those that all replicas share.
            donate_argnums: arguments to donate.
        """
        if self.count == 1 and self.placement.shards:

            def placed(*arguments):
                return self.placement.constrain(function(*arguments))

            return jax.jit(placed, donate_argnums=donate_argnums)
        if self.count == 1:
            # XLA may otherwise return the state with another sharding, which prevents its donation.
            return jax.jit(function, donate_argnums=donate_argnums, out_shardings=replicated(self.mesh))
        specs = tuple(PartitionSpec() if axis is None else PartitionSpec(BATCH_AXES) for axis in in_axes)
        # A replica is on one device, so devices do not communicate.
        mapped = jax.shard_map(
            function, mesh=self.mesh, in_specs=specs, out_specs=PartitionSpec(BATCH_AXES), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donate_argnums)

    def stack(self, trees: Sequence[Any]) -> Any:
        """Stacks one tree per replica."""
        if self.count == 1:
            return trees[0]
        return jax.device_put(jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees), over_batch(self.mesh))

    def first(self, tree: Any) -> Any:
        """Returns the arrays of the first replica, on all devices."""
        if self.count == 1:
            return tree
        return jax.device_put(jax.tree.map(lambda x: x[0], tree), replicated(self.mesh))

    def batches(self, readings: Sequence[Iterator[Any]]) -> Iterator[Any]:
        """Yields batches on the devices from one iterator per replica, over this process's rows."""
        waiting: collections.deque[Any] = collections.deque()
        for parts in zip(*readings, strict=True):
            batch = parts[0] if self.count == 1 else jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
            waiting.append(put_batch(batch, over_batch(self.mesh)))  # the transfer overlaps with steps
            if len(waiting) > PREFETCH_BATCHES:
                yield waiting.popleft()
        yield from waiting

    def stacked_shapes(self, shapes: Any) -> Any:
        """Returns shapes, dtypes and shardings of all replicas' arrays from those of one replica."""
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
