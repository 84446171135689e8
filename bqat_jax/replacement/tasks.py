"""What a task is: its loss, how far two networks' outputs are apart, what evaluation counts, what checkpoints are
selected by. `task_kinds` has the tasks that ship with the project.
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
        ValueError: for a name or option that does not exist, or a value that it cannot take.
    """
    return TASKS.make(text)


class Metric(NamedTuple):
    """A number by which networks are compared.

    Attributes:
        name: in files, such as 'top1'.
        title: in tables.
        larger_is_better: the direction.
        is_fraction: whether it lies between 0 and 1 and is shown in percent.
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
    """A task; a subclass is registered by `register_task` and so a frozen dataclass, whose fields are its options.

    `loss` is all that a subclass must define. Outputs and targets are arrays or trees of arrays, with examples along
    the first axis of each; outputs may lie in float16 or bfloat16, losses are computed in float32.

    Attributes:
        name: set by the registration.
        loss_name: of the loss in the metrics of training, 'loss/<loss_name>'.
        score: the metric by which checkpoints are selected, one of `results`.
        reported: other metrics of `results` for `result.json`.
    """

    name: ClassVar[str] = ''
    loss_name: ClassVar[str] = 'task'
    score: ClassVar[Metric] = Metric('loss', 'loss', larger_is_better=False)
    reported: ClassVar[tuple[str, ...]] = ()

    @property
    def has_distance(self) -> bool:
        """Whether `distance` is defined, so that networks can be distilled."""
        return type(self).distance is not Task.distance

    @abc.abstractmethod
    def loss(self, outputs: Any, targets: Any) -> jax.Array:
        """Returns the mean loss over what counts, a float32 scalar."""

    def distance(self, student: Any, teacher: Any, targets: Any, temperature: float) -> jax.Array:
        """Returns how far the student's outputs are from the teacher's: the mean over what counts, a float32 scalar.

        It is not negative, and 0 where the two are equal.

        Args:
            student: outputs of the network that learns.
            teacher: outputs of the network that it learns from, of the same shapes.
            targets: read only for what does not count.
            temperature: of softmax and sigmoid; tasks without them leave it out.
        """
        raise ValueError(f'The task {self.name or type(self).__name__} defines no distance, so nothing is distilled.')

    def check(self, outputs: Any, targets: Any, num_classes: int | None = None) -> None:
        """Checks shapes and dtypes of outputs and targets; nothing is computed.

        Args:
            outputs: arrays or `jax.ShapeDtypeStruct`s.
            targets: arrays or `jax.ShapeDtypeStruct`s.
            num_classes: of the data; None if it is not known.

        Raises:
            ValueError: if they do not fit the task or each other.
        """
        del outputs, targets, num_classes

    def training_metrics(self, outputs: Any, targets: Any) -> Counts:
        """Returns metrics of a training batch beside the loss, float32 scalars."""
        del outputs, targets
        return {}

    def is_finite(self, outputs: Any, targets: Any) -> jax.Array:
        """Returns for every example whether its outputs are finite where they count, bool (batch,)."""
        count = next(x.shape[0] for x in jax.tree.leaves((targets, outputs)) if x.ndim > 0)
        floats = [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(x.dtype, jnp.floating)]
        # A scalar, such as a loss that the network computes, is one for all examples.
        finite = [jnp.all(jnp.isfinite(x.reshape(x.shape[0] if x.ndim else 1, -1)), axis=-1) for x in floats]
        return jnp.all(jnp.stack([jnp.ones(count, bool), *(jnp.broadcast_to(x, count) for x in finite)]), axis=0)

    def counts(self, outputs: Any, targets: Any, mask: jax.Array) -> Counts:
        """Returns sums over a batch, to be added up over batches for `results`.

        By default the loss of every example by itself: that of a batch is taken for the mean over its examples.

        Args:
            outputs: of the network.
            targets: of the batch.
            mask: bool (batch,); examples where it is false, which fill up the last batch, do not count.
        """

        leaves, structure = jax.tree.flatten((outputs, targets))
        axes = [0 if x.ndim else None for x in leaves]  # a scalar is one for all examples

        def of_one(*leaves):
            own = [x if axis is None else x[None] for x, axis in zip(leaves, axes, strict=True)]
            return self.loss(*jax.tree.unflatten(structure, own))

        losses = jax.vmap(of_one, axes)(*leaves)
        losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
        return {'loss': jnp.sum(jnp.where(mask, losses, 0.0)), 'counted': jnp.sum(mask)}

    def results(self, counts: Mapping[str, Any]) -> dict[str, float]:
        """Returns the metrics of a split, by name; NaN where nothing counts.

        Args:
            counts: the sums of `counts` over the split, NumPy arrays in int64 and float64.
        """
        return {'loss': ratio(counts['loss'], counts['counted'])}


class CustomTask(Task):
    """A task made of functions.

    Attributes:
        loss_function: `loss(outputs, targets)`, a scalar: the mean over examples.
        distance_function: `distance(student, teacher)` of two networks' outputs, a scalar; None without distillation.
    """

    name = 'custom'

    def __init__(self, loss: Callable[[Any, Any], jax.Array], distance: Callable[[Any, Any], jax.Array] | None = None):
        """Takes the loss and, where something is distilled, the distance."""
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
            f'The {what} of CustomTask has the shape {value.shape}: return its mean over the batch, a scalar.'
        )
    return value.astype(jnp.float32)


def select(outputs: Any, path: str, option: str) -> Any:
    """Returns the array of a tree of outputs at a path.

    Args:
        outputs: an array or a tree of them.
        path: keys, indices or attributes, as in 'logits', 'aux/logits' or '0'; '' if outputs are one array.
        option: of the task, for messages.

    Raises:
        ValueError: if there is no array at the path; the message lists those there are.
    """
    leaves = jax.tree_util.tree_leaves_with_path(outputs)
    by_path = {jax.tree_util.keystr(keys, simple=True, separator='/'): leaf for keys, leaf in leaves}
    if path in by_path:
        return by_path[path]
    known = ', '.join(repr(name) for name in by_path)
    if not path:
        raise ValueError(
            f"The network's outputs are a tree of the arrays {known}: say which of them the task reads, as in "
            f'{option}={next(iter(by_path), "name")!r}.'
        )
    if set(by_path) == {''}:
        raise ValueError(f"{option}={path!r}: the network's outputs are one array; leave {option} out.")
    raise ValueError(f"{option}={path!r}: the network's outputs have the arrays {known}.{suggest(path, by_path)}")


def ratio(total: Any, number: Any) -> float:
    """Returns total / number; NaN if the number is 0."""
    return float(total) / float(number) if number else float('nan')
