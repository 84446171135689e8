"""The mesh of devices and the sharding of arrays.

The mesh has two axes, and a batch is sharded over both. Parameters are replicated over 'data'. Over 'fsdp' each large
array is sharded (fully sharded data parallelism, ZeRO's third stage, arXiv 1910.02054): a device keeps its shards of
parameters, optimizer state and partner, and gathers a complete array when a step needs it.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bqat_jax.errors import UserError

DATA_AXIS, FSDP_AXIS = 'data', 'fsdp'
BATCH_AXES = (DATA_AXIS, FSDP_AXIS)
# Values of a rule in place of the number of an axis.
LARGEST, NONE = 'largest', 'none'


def make_mesh(data: int, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes 'data' and 'fsdp' over the first data × fsdp devices, grouped by process.

    Args:
        data: size of the axis 'data'; -1 to use all devices.
        fsdp: size of the axis 'fsdp', the number of shards of large arrays; shards of an array are on neighbours.
        devices: available devices; JAX's if None.

    Raises:
        UserError: if there are too few devices, or, with several processes, if some would be unused.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id)
    )
    if fsdp < 1 or len(devices) < fsdp:
        raise UserError(f'mesh.fsdp={fsdp}: there are {len(devices)} devices. Use 1 to {len(devices)}.')
    count = len(devices) // fsdp if data == -1 else data
    if not 1 <= count <= len(devices) // fsdp:
        raise UserError(
            f'mesh.data={data}, mesh.fsdp={fsdp}: there are {len(devices)} devices, and the product must not exceed '
            'that. Use mesh.data=-1 for all devices.'
        )
    if jax.process_count() > 1 and count * fsdp < len(devices):
        raise UserError(
            f'mesh.data={data}, mesh.fsdp={fsdp} use {count * fsdp} of {len(devices)} devices; several processes must '
            'use all of them.'
        )
    return Mesh(np.array(devices[: count * fsdp]).reshape(count, fsdp), BATCH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on all devices."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of an array's first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


@dataclasses.dataclass(frozen=True)
class Rule:
    """The axis along which arrays are sharded.

    Attributes:
        path: a regular expression that must match the full path of a parameter, such as 'head/dense/kernel'. It also
            applies to arrays that belong to the parameter, such as its momentum, whose longer paths end with it.
        axis: its number; 'largest' for the largest axis that can be split evenly, the last one if there are several;
            'none' to replicate the array.

    Raises:
        ValueError: for another axis, or an invalid regular expression.
    """

    path: str
    axis: int | str

    def __post_init__(self):
        try:
            re.compile(self.path)
        except re.error as error:
            raise ValueError(f'mesh.rules: {self.path!r} is not a regular expression ({error}).') from error
        if self.axis not in (LARGEST, NONE) and not isinstance(self.axis, int):
            raise ValueError(
                f"mesh.rules: axis={self.axis!r} of {self.path!r}: must be a number, '{LARGEST}' or '{NONE}'."
            )

    def matches(self, path: str) -> bool:
        """Returns whether it applies to the array at a path."""
        return re.fullmatch(f'(?:.*/)?(?:{self.path})', path) is not None


# The rule for arrays that no other rule matches.
LAST_RULE = Rule('.*', LARGEST)


@dataclasses.dataclass(frozen=True)
class Placement:
    """The sharding of arrays over 'fsdp' by path rules; arrays that are not sharded are replicated.

    Attributes:
        mesh: the devices.
        rules: rules, of which the first that matches applies, then `LAST_RULE`.
        min_shard_elements: smaller arrays are replicated.
    """

    mesh: Mesh
    rules: tuple[Rule, ...] = ()
    min_shard_elements: int = 0

    @property
    def parts(self) -> int:
        """The number of shards of large arrays."""
        return self.mesh.shape[FSDP_AXIS]

    @property
    def shards(self) -> bool:
        """Whether any array can be sharded over 'fsdp'."""
        return self.parts > 1

    def axis(self, path: str, shape: Sequence[int]) -> int | None:
        """Returns the axis along which the array at a path is sharded, or None.

        Raises:
            UserError: if a rule names an axis that the array does not have, or that cannot be split evenly.
        """
        parts = self.parts
        if parts == 1 or int(np.prod(shape)) < self.min_shard_elements or not shape:
            return None
        rule = self.rule(path)
        if rule.axis == NONE:
            return None
        if rule.axis == LARGEST:
            even = [axis for axis, size in enumerate(shape) if size % parts == 0]
            return max(even, key=lambda axis: (shape[axis], axis), default=None)
        axis = int(rule.axis)
        if not -len(shape) <= axis < len(shape) or shape[axis] % parts:
            raise UserError(
                f'mesh.rules: {path} has shape {tuple(shape)}, whose axis {axis} cannot be split into {parts} parts.'
            )
        return axis % len(shape)

    def rule(self, path: str) -> Rule:
        """Returns the rule that applies to the array at a path."""
        return next((rule for rule in self.rules if rule.matches(path)), LAST_RULE)

    def sharding(self, path: str, shape: Sequence[int]) -> NamedSharding:
        """Returns the sharding of the array at a path."""
        axis = self.axis(path, shape)
        spec = PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, FSDP_AXIS)
        return NamedSharding(self.mesh, spec)

    def shardings(self, tree: Any) -> Any:
        """Returns the shardings of a tree of arrays or shapes."""
        return jax.tree_util.tree_map_with_path(lambda keys, x: self.sharding(_path(keys), x.shape), tree)

    def put(self, tree: Any) -> Any:
        """Puts a tree of arrays on the devices with these shardings."""
        return jax.device_put(tree, self.shardings(tree))

    def constrain(self, tree: Any) -> Any:
        """Constrains a tree of traced arrays to these shardings."""
        return jax.lax.with_sharding_constraint(tree, self.shardings(tree))

    def gather(self, tree: Any) -> Any:
        """Gathers a tree of traced float arrays on every device; their gradients are reduce-scattered."""
        if not self.shards:
            return tree
        whole = replicated(self.mesh)
        return jax.tree.map(lambda x, split: _gather(whole, split, x), tree, self.shardings(tree))

    def describe(self, tree: Any) -> dict[str, dict[str, Any]]:
        """Returns shape, axis and rule of every sharded array of a tree, as JSON."""
        description = {}
        for path, x in leaves_with_paths(tree):
            axis = self.axis(path, x.shape)
            if axis is not None:
                description[path] = {'shape': list(x.shape), 'axis': axis, 'rule': self.rule(path).path}
        return description


def parse_rules(rules: Sequence[Mapping[str, Any]]) -> tuple[Rule, ...]:
    """Returns the rules of a config, each {'path': regular expression, 'axis': number, 'largest' or 'none'}.

    Raises:
        ValueError: for a rule with other keys or invalid values.
    """
    for rule in rules:
        if set(rule) != {'path', 'axis'}:
            raise ValueError(f"mesh.rules: a rule has the keys 'path' and 'axis', and this one has {sorted(rule)}.")
    return tuple(Rule(rule['path'], rule['axis']) for rule in rules)


def rules_of_names(specs: Mapping[str, Any], shapes: Mapping[str, Any], parts: int) -> tuple[Rule, ...]:
    """Returns rules for parameters whose axes are named, as by `flax.linen.with_partitioning`.

    A parameter is sharded along the first named axis that can be split into `parts` parts.

    Args:
        specs: a `PartitionSpec` by path.
        shapes: arrays or shapes of these parameters, by path.
        parts: number of shards.
    """
    rules = []
    for path, spec in specs.items():
        even = [axis for axis, name in enumerate(spec) if name is not None and shapes[path].shape[axis] % parts == 0]
        if even:
            rules.append(Rule(re.escape(path), even[0]))
    return tuple(rules)


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """Returns the leaves of a tree with their paths as text, such as 'params/network/stem/conv/kernel'."""
    return [(_path(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator='/')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(whole: NamedSharding, split: NamedSharding, x: jax.Array) -> jax.Array:
    """Gathers an array on every device; its gradient is summed over the devices with a reduce-scatter."""
    del split
    return jax.lax.with_sharding_constraint(x, whole)


def _gather_forward(whole, split, x):
    return _gather(whole, split, x), None


def _gather_backward(whole, split, residuals, cotangent):
    del whole, residuals
    return (jax.lax.with_sharding_constraint(cotangent, split),)


_gather.defvjp(_gather_forward, _gather_backward)
