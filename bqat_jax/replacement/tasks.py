"""The task interface: loss, distance between the outputs of two networks, metrics, and the selection of checkpoints.

`task_kinds` has the built-in tasks.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bqat_jax.registry import Registry, suggest

TASKS = Registry('task')
register_task = TASKS.register

Counts = dict[str, jax.Array]


def get_task(text: str) -> 'Task':
    """Returns the task that a text such as 'classification' or 'language_model:ignore=-1' describes.

    Raises:
        ValueError: for an unknown name or option, or an invalid value.
    """
    return TASKS.make(text)


class Metric(NamedTuple):
    """A metric by which networks are compared.

    Attributes:
        name: name in files, such as 'top1'.
        title: name in tables.
        larger_is_better: whether larger values are better.
        is_fraction: whether values lie between 0 and 1 and are shown in percent.
    """

    name: str
    title: str
    larger_is_better: bool
    is_fraction: bool = False

    def rank(self, value: float) -> float:
        """Returns a number that is larger for a better value; minus infinity for NaN."""
        if value != value:
            return float('-inf')
        return value if self.larger_is_better else -value


class Task(abc.ABC):
    """A task; `register_task` registers a subclass and makes it a frozen dataclass, whose fields are its options.

    A subclass must define `loss` only. Outputs and targets are arrays or trees of arrays, with examples along the first
    axis of each; outputs may be float16 or bfloat16, losses are computed in float32.

    Attributes:
        name: set by `register_task`.
        loss_name: name of the loss in training metrics, 'loss/<loss_name>'.
        score: the metric of `results` by which checkpoints are selected.
        reported: other metrics of `results` for `result.json`.
    """

    name: ClassVar[str] = ''
    loss_name: ClassVar[str] = 'task'
    score: ClassVar[Metric] = Metric('loss', 'loss', larger_is_better=False)
    reported: ClassVar[tuple[str, ...]] = ()

    @property
    def has_distance(self) -> bool:
        """Whether `distance` is defined, which distillation needs."""
        return type(self).distance is not Task.distance

    @abc.abstractmethod
    def loss(self, outputs: Any, targets: Any) -> jax.Array:
        """Returns the mean loss over counted targets, a float32 scalar."""

    def distance(self, student: Any, teacher: Any, targets: Any, temperature: float) -> jax.Array:
        """Returns the mean distance of the student's from the teacher's outputs over counted targets, a float32 scalar.

        It is nonnegative, and 0 for equal outputs.

        Args:
            student: outputs of the network in training.
            teacher: outputs of the teacher, in the shapes of the student's.
            targets: only determine what is ignored.
            temperature: temperature of softmax or sigmoid; other tasks ignore it.
        """
        raise ValueError(
            f'The task {self.name or type(self).__name__} defines no distance, so it does not support distillation.'
        )

    def check(self, outputs: Any, targets: Any, num_classes: int | None = None) -> None:
        """Checks shapes and dtypes of outputs and targets; nothing is computed.

        Args:
            outputs: arrays or `jax.ShapeDtypeStruct`s.
            targets: arrays or `jax.ShapeDtypeStruct`s.
            num_classes: number of classes of the data; None if unknown.

        Raises:
            ValueError: if they do not fit the task or each other.
        """
        del outputs, targets, num_classes

    def training_metrics(self, outputs: Any, targets: Any) -> Counts:
        """Returns additional metrics of a training batch, float32 scalars."""
        del outputs, targets
        return {}

    def is_finite(self, outputs: Any, targets: Any) -> jax.Array:
        """Returns for every example whether its outputs are finite where they are counted, bool (batch,)."""
        count = next(x.shape[0] for x in jax.tree.leaves((targets, outputs)) if x.ndim > 0)
        floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
        # A scalar, such as a loss that the network computes, applies to all examples.
        finite = [jnp.all(jnp.isfinite(x.reshape(x.shape[0] if x.ndim else 1, -1)), axis=-1) for x in floats]
        return jnp.all(jnp.stack([jnp.ones(count, bool), *(jnp.broadcast_to(x, count) for x in finite)]), axis=0)

    def counts(self, outputs: Any, targets: Any, mask: jax.Array) -> Counts:
        """Returns sums over a batch, to be added over batches for `results`.

        By default the losses of single examples are summed; the loss of a batch is taken to be the mean over examples.

        Args:
            outputs: outputs of the network.
            targets: targets of the batch.
            mask: bool (batch,); False for padding examples of the last batch, which are ignored.
        """

        leaves, structure = jax.tree.flatten((outputs, targets))
        axes = [0 if x.ndim else None for x in leaves]  # A scalar applies to all examples.

        def of_one(*leaves):
            own = [x if axis is None else x[None] for x, axis in zip(leaves, axes, strict=True)]
            return self.loss(*jax.tree.unflatten(structure, own))

        losses = jax.vmap(of_one, axes)(*leaves)
        losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
        return {'loss': jnp.sum(jnp.where(mask, losses, 0.0)), 'counted': jnp.sum(mask)}

    def results(self, counts: Mapping[str, Any]) -> dict[str, float]:
        """Returns the metrics of a split by name; NaN if nothing is counted.

        Args:
            counts: the sums of `counts` over the split, NumPy arrays in int64 and float64.
        """
        return {'loss': ratio(counts['loss'], counts['counted'])}


class CustomTask(Task):
    """A task defined by functions.

    Attributes:
        loss_function: `loss(outputs, targets)`, a scalar: the mean over examples.
        distance_function: `distance(student, teacher)` of two networks' outputs, a scalar; None without distillation.
    """

    name = 'custom'

    def __init__(self, loss: Callable[[Any, Any], jax.Array], distance: Callable[[Any, Any], jax.Array] | None = None):
        """Initializes the task from the loss and, for distillation, the distance."""
        self.loss_function, self.distance_function = loss, distance

    @property
    def has_distance(self) -> bool:
        """See `Task.has_distance`."""
        return self.distance_function is not None

    def loss(self, outputs: Any, targets: Any) -> jax.Array:
        """See `Task.loss`."""
        return _scalar(self.loss_function(outputs, targets), 'loss')

    def distance(self, student: Any, teacher: Any, targets: Any, temperature: float) -> jax.Array:
        """See `Task.distance`; neither targets nor temperature are read."""
        if self.distance_function is None:
            return super().distance(student, teacher, targets, temperature)
        return _scalar(self.distance_function(student, teacher), 'distance')


def _scalar(value: Any, what: str) -> jax.Array:
    value = jnp.asarray(value)
    if value.shape:
        raise ValueError(
            f'The {what} of CustomTask has the shape {value.shape}: must be a scalar. Return the mean over the batch.'
        )
    return value.astype(jnp.float32)


def select(outputs: Any, path: str, option: str) -> Any:
    """Returns the array of a tree of outputs at a path.

    Args:
        outputs: an array or a tree of arrays.
        path: keys, indices or attributes, such as 'logits', 'aux/logits' or '0'; '' if the output is one array.
        option: the task's option for the path, for error messages.

    Raises:
        ValueError: if there is no array at the path; the message lists the paths.
    """
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    by_path = {jax.tree_util.keystr(keys, simple=True, separator='/'): leaf for keys, leaf in leaves}
    if path in by_path:
        return by_path[path]
    known = ', '.join(repr(name) for name in by_path)
    if not path:
        raise ValueError(
            f"The network's outputs are a tree of the arrays {known}. Choose the one that the task reads, as in "
            f'{option}={next(iter(by_path), "name")!r}.'
        )
    if set(by_path) == {''}:
        raise ValueError(f"{option}={path!r}: the network's output is one array. Omit {option}.")
    raise ValueError(f"{option}={path!r}: the network's outputs have the arrays {known}.{suggest(path, by_path)}")


def ratio(total: Any, number: Any) -> float:
    """Returns total / number; NaN if the number is 0."""
    return float(total) / float(number) if number else float('nan')
