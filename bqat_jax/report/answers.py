"""A classifier's answers on a split: its confusion matrix and its most confident wrong answers."""

import dataclasses
import heapq
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax.replacement.task_kinds import Classification, classes_of
from bqat_jax.replacement.tasks import Task, select

# The most classes for which a confusion matrix is counted.
MOST_CLASSES = 1000
# The most wrong answers that are kept.
MOST_WRONG = 24


class Unavailable(Exception):
    """A part of a report cannot be made; the message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class WrongAnswer:
    """A misclassified example.

    Attributes:
        label: its class.
        answer: the class that the network chose.
        confidence: the network's probability of its answer, 0 to 1.
        image: the stored image, (height, width, channels), uint8 from 0 to 255 or float32 from 0 to 1.
    """

    label: int
    answer: int
    confidence: float
    image: np.ndarray


@dataclasses.dataclass
class Answers:
    """Accumulated answers.

    Attributes:
        confusion: int64 (classes, classes): row label, column answer.
        examples: number of examples.
        wrong: at most `MOST_WRONG` wrong answers, see `most_confident`; empty unless examples are images with one
            label.
    """

    confusion: np.ndarray
    examples: int = 0
    wrong: list[tuple[float, int, WrongAnswer]] = dataclasses.field(default_factory=list)
    _number: Any = dataclasses.field(default_factory=itertools.count)

    def add(self, counts: Mapping[str, Any], images: Any) -> None:
        """Adds the result of `make_answer_step` for a batch.

        Args:
            counts: the result.
            images: returns the image at an index of the batch; None if there are none to show.
        """
        self.confusion += np.asarray(counts['confusion'], np.int64)
        self.examples += int(counts['examples'])
        if images is None:
            return
        confidence = np.asarray(counts['confidence'])
        for place in np.flatnonzero(np.asarray(counts['is_wrong'])):
            if len(self.wrong) == MOST_WRONG and confidence[place] <= self.wrong[0][0]:
                continue
            label, answer = (int(np.asarray(counts[name])[place]) for name in ('label', 'answer'))
            wrong = WrongAnswer(label, answer, float(confidence[place]), np.asarray(images(int(place))))
            # Of two equally confident answers the first one is kept.
            heapq.heappush(self.wrong, (wrong.confidence, -next(self._number), wrong))
            if len(self.wrong) > MOST_WRONG:
                heapq.heappop(self.wrong)

    @property
    def most_confident(self) -> list[WrongAnswer]:
        """The wrong answers, the most confident first."""
        return [wrong for _, _, wrong in sorted(self.wrong, key=lambda entry: entry[:2], reverse=True)]


def make_answer_step(task: Task, num_classes: int) -> Any:
    """Returns `step(outputs, targets, mask) -> counts`, a pure function of one batch.

    The counts are 'confusion', int32 (classes, classes), over all positions that are not ignored and have finite
    logits; 'examples'; and, if an example has one label, 'label', 'answer', 'confidence', 'is_wrong', each (batch,).

    Args:
        task: the task, which selects the logits.
        num_classes: number of classes of the data.

    Raises:
        Unavailable: for a task without classes, or with too many.
    """
    if not isinstance(task, Classification):
        raise Unavailable(f'The task {task.name} does not choose between classes.')
    if num_classes > MOST_CLASSES:
        raise Unavailable(f'There are {num_classes} classes; a matrix of more than {MOST_CLASSES} is not counted.')
    ignored, where = _options(task)

    def step(outputs, targets, mask):
        logits = select(outputs, where, 'logits').astype(jnp.float32)
        labels = classes_of(targets).astype(jnp.int32)
        counted = jnp.broadcast_to(mask.reshape(-1, *(1,) * (labels.ndim - 1)), labels.shape)
        counted = counted & jnp.all(jnp.isfinite(logits), axis=-1)
        if ignored is not None and jnp.issubdtype(targets.dtype, jnp.integer):
            counted = counted & (labels != ignored)
        answers = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        cells = jnp.where(counted, labels * num_classes + answers, 0).reshape(-1)
        confusion = jnp.zeros(num_classes**2, jnp.int32).at[cells].add(counted.reshape(-1).astype(jnp.int32))
        counts = {'confusion': confusion.reshape(num_classes, num_classes), 'examples': jnp.sum(mask)}
        if labels.ndim == 1:
            confidence = jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)
            is_wrong = counted & (labels != answers)
            counts |= {'label': labels, 'answer': answers, 'confidence': confidence, 'is_wrong': is_wrong}
        return counts

    return step


def _options(task: Classification) -> tuple[int | None, str]:
    """The ignored label, and the path of the logits."""
    return task.ignore, str(task.logits)
