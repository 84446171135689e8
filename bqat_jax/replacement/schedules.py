"""Schedules: numbers that change over training, by name; a config has 'linear:start=0.5,end=1'."""

import abc
from typing import ClassVar

import jax
import jax.numpy as jnp

from bqat_jax.registry import Registry

SCHEDULES = Registry('schedule')
register_schedule = SCHEDULES.register


def get_schedule(text: str) -> 'Schedule':
    """Returns the schedule that a text such as 'constant' or 'cosine:start=1,end=0' describes.

    Raises:
        ValueError: for an unknown name or option, or an invalid value.
    """
    return SCHEDULES.make(text)


class Schedule(abc.ABC):
    """A number that is a monotonic function of the completed fraction of training.

    Attributes:
        name: set by `register_schedule`.
    """

    name: ClassVar[str] = ''

    @property
    @abc.abstractmethod
    def ends(self) -> tuple[float, float]:
        """The numbers at the start and at the end of training."""

    @abc.abstractmethod
    def at(self, progress: jax.Array | float) -> jax.Array:
        """Returns the number at `progress`, the completed fraction of training from 0 to 1; float32 ()."""


@register_schedule('constant')
class Constant(Schedule):
    """A constant number.

    Attributes:
        value: the number.
    """

    value: float = 1.0

    @property
    def ends(self):
        """See `Schedule`."""
        return self.value, self.value

    def at(self, progress):
        """See `Schedule.at`."""
        del progress
        return jnp.float32(self.value)


@register_schedule('linear')
class Linear(Schedule):
    """A linear change from `start` to `end`.

    Attributes:
        start: the number at the start of training.
        end: the number at the end of training.
    """

    start: float = 0.0
    end: float = 1.0

    @property
    def ends(self):
        """See `Schedule`."""
        return self.start, self.end

    def at(self, progress):
        """See `Schedule.at`."""
        share = jnp.float32(progress)
        return jnp.float32(self.start) * (1 - share) + jnp.float32(self.end) * share


@register_schedule('cosine')
class Cosine(Linear):
    """A change from `start` to `end` along half a cosine period, slow at both ends."""

    def at(self, progress):
        """See `Schedule.at`."""
        return super().at(0.5 * (1 - jnp.cos(jnp.pi * jnp.float32(progress))))


ALWAYS = Constant()
