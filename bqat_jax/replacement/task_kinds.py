"""Built-in tasks: classification of images, pixels and tokens, multi-label classification, regression."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bqat_jax.replacement.losses import (
    bernoulli_distillation_loss,
    cross_entropies,
    cross_entropy,
    distillation_loss,
    mean,
    tree_distance,
)
from bqat_jax.replacement.tasks import Metric, Task, ratio, register_task, select


@register_task('classification')
class Classification(Task):
    """Classification of every position: an image, a pixel, a token.

    Logits have the shape (batch, .., classes); targets are integer labels (batch, ..) or probabilities in the shape of
    the logits. The loss is the cross entropy, the distance T² · KL(teacher ‖ student) of the softmax at temperature T.
    Both are means over positions that are not ignored, or 0 if there are none. Metrics: top1, cross_entropy (in nats).

    Attributes:
        ignore: label of positions to ignore, such as padding; None ignores no position.
        logits: path of the logits in a tree of outputs, such as 'logits', 'aux/logits' or '0'; '' if the output is one
            array.
    """

    ignore: int | None = None
    logits: str = ''

    loss_name = 'cross_entropy'
    # What a label describes, and the smallest number of axes of labels.
    labelled: ClassVar[tuple[str, int]] = ('image', 1)
    score = Metric('top1', 'top-1', larger_is_better=True, is_fraction=True)

    def loss(self, outputs, targets):
        """See `Task.loss`."""
        return cross_entropy(*self._read(outputs, targets))

    def distance(self, student, teacher, targets, temperature):
        """See `Task.distance`."""
        logits, _, counted = self._read(student, targets)
        return distillation_loss(self._read(teacher, targets)[0], logits, temperature, counted)

    def training_metrics(self, outputs, targets):
        """Returns 'train_top1'; see `Task.training_metrics`."""
        logits, targets, counted = self._read(outputs, targets)
        correct = jnp.argmax(logits, axis=-1) == classes_of(targets)
        if counted is None:
            return {'train_top1': jnp.mean(correct, dtype=jnp.float32)}
        return {'train_top1': mean(correct.astype(jnp.float32), counted)}

    def is_finite(self, outputs, targets):
        """See `Task.is_finite`."""
        logits, _, _ = self._read(outputs, targets)
        return jnp.all(jnp.isfinite(logits.reshape(logits.shape[0], -1)), axis=-1)

    def counts(self, outputs, targets, mask):
        """Returns 'correct', 'counted' and 'cross_entropy'; see `Task.counts`.

        A position whose logits are not finite is not correct, and its cross entropy is infinite.
        """
        logits, targets, is_finite, counted = self._count(outputs, targets, mask)
        correct = (jnp.argmax(logits, axis=-1) == classes_of(targets)) & is_finite & counted
        losses = jnp.where(is_finite, cross_entropies(logits, targets), jnp.inf)
        total = jnp.sum(jnp.where(counted, losses, 0.0))
        return {'correct': jnp.sum(correct), 'counted': jnp.sum(counted), 'cross_entropy': total}

    def results(self, counts):
        """See `Task.results`."""
        number = counts['counted']
        return {'top1': ratio(counts['correct'], number), 'cross_entropy': ratio(counts['cross_entropy'], number)}

    def check(self, outputs, targets, num_classes=None):
        """See `Task.check`."""
        logits = select(outputs, str(self.logits), 'logits')
        _check_floats(logits, 'logits')
        _check_is_array(targets)
        what, axes = self.labelled
        if targets.ndim < axes:
            raise ValueError(
                f'The labels have the shape {targets.shape}, and the task needs one label per {what}. Use another task '
                '(config.task), or other data.'
            )
        if logits.ndim < 2:
            raise ValueError(f'The logits have the shape {logits.shape}: must be (batch, .., classes).')
        if jnp.issubdtype(targets.dtype, jnp.floating):
            _check_soft_labels(logits, targets)
            if self.ignore is not None:
                raise ValueError(
                    f'ignore={self.ignore}: the targets are probabilities ({targets.dtype}), which have no label to '
                    'ignore. Omit ignore, or give integer labels.'
                )
        elif not jnp.issubdtype(targets.dtype, jnp.integer):
            raise ValueError(f'The labels are {targets.dtype}: must be integers, or probabilities as floats.')
        elif logits.shape[:-1] != targets.shape:
            remedy = _remedy(logits.shape, targets.shape)
            raise ValueError(
                f'The logits have the shape {logits.shape} and the labels {targets.shape}: the logits must have the '
                f'shape of the labels plus a last axis for the classes.{remedy}'
            )
        elif self.ignore is not None and not _can_hold(targets.dtype, self.ignore):
            raise ValueError(f'ignore={self.ignore}: the labels are {targets.dtype}, which cannot hold it.')
        if num_classes is not None and logits.shape[-1] != num_classes:
            raise ValueError(f'The network returns {logits.shape[-1]} logits, and the data have {num_classes} classes.')

    def _read(self, outputs: Any, targets: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Returns the logits, the targets, and a mask of counted positions, None for all.

        Logits of ignored positions are set to 0, so that they cannot affect gradients, even if they are NaN.
        """
        logits = select(outputs, str(self.logits), 'logits')
        if jnp.issubdtype(targets.dtype, jnp.integer):
            targets = targets.astype(jnp.int32)
        if self.ignore is None:
            return logits, targets, None
        counted = targets != self.ignore
        return jnp.where(counted[..., None], logits, 0), jnp.where(counted, targets, 0), counted

    def _count(self, outputs: Any, targets: Any, mask: jax.Array) -> tuple[jax.Array, ...]:
        """Returns logits, targets, a mask of finite logits, and a mask of counted positions of unmasked examples."""
        logits, targets, counted = self._read(outputs, targets)
        positions = logits.shape[:-1]
        of_mask = jnp.broadcast_to(mask.reshape(-1, *(1,) * (len(positions) - 1)), positions)
        counted = of_mask if counted is None else counted & of_mask
        return logits, targets, jnp.all(jnp.isfinite(logits), axis=-1), counted


@register_task('language_model')
class LanguageModel(Classification):
    """Classification of the next byte, with checkpoints selected by bits per byte: the cross entropy divided by ln 2.

    With tokens of several bytes, the metric is bits per token.
    """

    labelled = ('token', 2)
    score = Metric('bits_per_byte', 'bits per byte', larger_is_better=False)
    reported = ('top1',)

    def training_metrics(self, outputs, targets):
        """Returns 'train_top1' and 'train_bits_per_byte'; see `Task.training_metrics`."""
        return {
            **super().training_metrics(outputs, targets),
            'train_bits_per_byte': self.loss(outputs, targets) / math.log(2),
        }

    def results(self, counts):
        """See `Task.results`."""
        metrics = super().results(counts)
        return {'bits_per_byte': metrics['cross_entropy'] / math.log(2), **metrics}


@register_task('segmentation')
class Segmentation(Classification):
    """Classification of pixels, with checkpoints selected by the mean intersection over union (Jaccard index).

    The mean is over classes that occur in labels or predictions; intersection and union are summed over the split.
    """

    labelled = ('pixel', 2)
    score = Metric('mean_iou', 'mean IoU', larger_is_better=True, is_fraction=True)
    reported = ('top1',)

    def counts(self, outputs, targets, mask):
        """Returns the sums of `Classification.counts`, and three vectors of the confusion matrix.

        'intersections' is its diagonal, 'labels' and 'predictions' are its margins. A position whose logits are not
        finite has no predicted class.
        """
        logits, labels, is_finite, counted = self._count(outputs, targets, mask)
        labels, predictions = classes_of(labels), jnp.argmax(logits, axis=-1)
        count_of = _count_classes(logits.shape[-1])
        return {
            **super().counts(outputs, targets, mask),
            'intersections': count_of(labels, counted & is_finite & (labels == predictions)),
            'labels': count_of(labels, counted),
            'predictions': count_of(predictions, counted & is_finite),
        }

    def results(self, counts):
        """See `Task.results`."""
        intersections = np.asarray(counts['intersections'])
        unions = np.asarray(counts['labels']) + np.asarray(counts['predictions']) - intersections
        occurs = unions > 0
        total = np.sum(intersections[occurs] / unions[occurs])
        return {'mean_iou': ratio(total, np.sum(occurs)), **super().results(counts)}


@register_task('multi_label')
class MultiLabel(Task):
    """Multi-label classification: targets are 0 or 1, or probabilities, in the shape of the logits.

    The loss is the cross entropy of the sigmoid, the distance T² · KL(teacher ‖ student) of Bernoulli distributions.
    Both are means over all labels. Metrics: label_accuracy, the fraction of labels whose logit has the correct sign,
    and cross_entropy.

    Attributes:
        logits: path of the logits in a tree of outputs; see `Classification`.
    """

    logits: str = ''

    loss_name = 'cross_entropy'
    score = Metric('label_accuracy', 'label accuracy', larger_is_better=True, is_fraction=True)
    reported = ('cross_entropy',)

    def loss(self, outputs, targets):
        """See `Task.loss`."""
        return jnp.mean(self._losses(outputs, targets))

    def distance(self, student, teacher, targets, temperature):
        """See `Task.distance`."""
        del targets
        return bernoulli_distillation_loss(self._select(teacher), self._select(student), temperature)

    def training_metrics(self, outputs, targets):
        """Returns 'train_label_accuracy'; see `Task.training_metrics`."""
        return {'train_label_accuracy': jnp.mean(self._correct(outputs, targets), dtype=jnp.float32)}

    def is_finite(self, outputs, targets):
        """See `Task.is_finite`."""
        return super().is_finite(self._select(outputs), targets)

    def counts(self, outputs, targets, mask):
        """Returns 'correct', 'counted' and 'cross_entropy'; see `Task.counts`."""
        logits = self._select(outputs)
        counted = jnp.broadcast_to(mask.reshape(-1, *(1,) * (logits.ndim - 1)), logits.shape)
        losses = jnp.where(jnp.isfinite(logits), self._losses(outputs, targets), jnp.inf)
        correct = self._correct(outputs, targets) & jnp.isfinite(logits) & counted
        total = jnp.sum(jnp.where(counted, losses, 0.0))
        return {'correct': jnp.sum(correct), 'counted': jnp.sum(counted), 'cross_entropy': total}

    def results(self, counts):
        """See `Task.results`."""
        number = counts['counted']
        return {
            'label_accuracy': ratio(counts['correct'], number),
            'cross_entropy': ratio(counts['cross_entropy'], number),
        }

    def check(self, outputs, targets, num_classes=None):
        """See `Task.check`."""
        logits = self._select(outputs)
        _check_floats(logits, 'logits')
        _check_is_array(targets)
        _check_soft_labels(logits, targets)
        if num_classes is not None and logits.shape[-1] != num_classes:
            raise ValueError(f'The network returns {logits.shape[-1]} logits, and the data have {num_classes} labels.')

    def _select(self, outputs: Any) -> Any:
        return select(outputs, str(self.logits), 'logits')

    def _losses(self, outputs: Any, targets: jax.Array) -> jax.Array:
        logits = self._select(outputs).astype(jnp.float32)
        return optax.sigmoid_binary_cross_entropy(logits, targets.astype(jnp.float32))

    def _correct(self, outputs: Any, targets: jax.Array) -> jax.Array:
        return (self._select(outputs) > 0) == (targets.astype(jnp.float32) > 0.5)


@register_task('regression')
class Regression(Task):
    """Regression: targets have the structure and the shapes of the outputs.

    The loss is the mean squared error over all numbers. The distance is ‖student - teacher‖² / ‖teacher‖², the mean
    over arrays if the outputs are a tree; it has no temperature. Metric: mse.

    Attributes:
        prediction: path of the array that is compared with the targets, such as 'y' or '0'; '' for all outputs.
    """

    prediction: str = ''

    loss_name = 'mse'
    score = Metric('mse', 'mean squared error', larger_is_better=False)

    def loss(self, outputs, targets):
        """See `Task.loss`."""
        errors = self._squared_errors(outputs, targets)
        return sum((jnp.sum(x) for x in errors), jnp.float32(0)) / sum(x.size for x in errors)

    def distance(self, student, teacher, targets, temperature):
        """See `Task.distance`."""
        del targets, temperature
        distance = tree_distance(self._select(student), self._select(teacher))
        assert distance is not None  # Checked by `check`.
        return distance

    def is_finite(self, outputs, targets):
        """See `Task.is_finite`."""
        return super().is_finite(self._select(outputs), targets)

    def counts(self, outputs, targets, mask):
        """Returns 'squared_error' (infinite if an output is not finite) and 'counted'; see `Task.counts`."""
        errors = [x.reshape(x.shape[0], -1) for x in self._squared_errors(outputs, targets)]
        of_example = sum((jnp.sum(x, axis=-1) for x in errors), jnp.zeros(mask.shape, jnp.float32))
        of_example = jnp.where(jnp.isfinite(of_example), of_example, jnp.inf)
        return {
            'squared_error': jnp.sum(jnp.where(mask, of_example, 0.0)),
            'counted': jnp.sum(mask) * sum(x.shape[1] for x in errors),
        }

    def results(self, counts):
        """See `Task.results`."""
        return {'mse': ratio(counts['squared_error'], counts['counted'])}

    def check(self, outputs, targets, num_classes=None):
        """See `Task.check`."""
        del num_classes
        predictions = self._select(outputs)
        structures = jax.tree.structure(predictions), jax.tree.structure(targets)
        if structures[0] != structures[1]:
            raise ValueError(
                f"The network's outputs have the structure {structures[0]} and the targets {structures[1]}: they must "
                "be equal, or prediction='name' must name the array of the outputs that the targets belong to."
            )
        for y, target in zip(jax.tree.leaves(predictions), jax.tree.leaves(targets), strict=True):
            _check_floats(y, 'outputs')
            if y.shape != target.shape:
                raise ValueError(
                    f'The outputs have the shape {y.shape} and the targets {target.shape}: they must be equal. '
                    'Reshape one of them (for a single number per example: outputs[:, 0]).'
                )

    def _select(self, outputs: Any) -> Any:
        return select(outputs, str(self.prediction), 'prediction') if str(self.prediction) else outputs

    def _squared_errors(self, outputs: Any, targets: Any) -> list[jax.Array]:
        pairs = zip(jax.tree.leaves(self._select(outputs)), jax.tree.leaves(targets), strict=True)
        return [(y.astype(jnp.float32) - target.astype(jnp.float32)) ** 2 for y, target in pairs]


CLASSIFICATION = Classification()


def classes_of(targets: jax.Array) -> jax.Array:
    """Returns integer labels unchanged, and the most likely classes of probabilities."""
    return jnp.argmax(targets, axis=-1) if jnp.issubdtype(targets.dtype, jnp.floating) else targets


def _count_classes(num_classes: int):
    """Returns a function of classes (..) and a mask, bool (..), that counts each class, int32 (classes,)."""

    def count(classes: jax.Array, counted: jax.Array) -> jax.Array:
        zeros = jnp.zeros(num_classes, jnp.int32)
        return zeros.at[classes.reshape(-1)].add(counted.reshape(-1).astype(jnp.int32))

    return count


def _can_hold(dtype: Any, value: int) -> bool:
    info = jnp.iinfo(dtype)
    return bool(info.min <= value <= info.max)


def _check_floats(array: Any, what: str) -> None:
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f'The {what} are {array.dtype}: they must be floats. Return them before any argmax or rounding.'
        )


def _check_is_array(targets: Any) -> None:
    if not hasattr(targets, 'dtype'):
        raise ValueError(
            f'The targets are a {type(targets).__name__}: this task takes one array. Choose it where batches are '
            'prepared, or use CustomTask(loss).'
        )


def _check_soft_labels(logits: Any, targets: Any) -> None:
    if logits.shape != targets.shape:
        raise ValueError(
            f'The logits have the shape {logits.shape} and the targets {targets.shape} ({targets.dtype}): with a '
            'target per class the shapes must be equal. For one label per position, give integers.'
        )


def _remedy(logits: tuple[int, ...], labels: tuple[int, ...]) -> str:
    """Returns how to fix logits that do not fit their labels, or ''."""
    without_ones = (logits[0], *(size for size in logits[1:-1] if size != 1))
    if len(logits) > len(labels) + 1 and without_ones == labels:
        return (
            ' Remove the axes of size 1 before the classes at the end of the network, as in '
            'x.reshape(x.shape[0], -1), or average over them.'
        )
    if len(logits) == len(labels) + 1 and (logits[0], *logits[2:]) == labels:
        return ' The classes are on axis 1: move them, as in jnp.moveaxis(x, 1, -1).'
    if len(labels) > 1 and labels[-1] == 1 and logits[:-1] == labels[:-1]:
        return ' Remove the last axis of the labels: labels[..., 0].'
    return ''
