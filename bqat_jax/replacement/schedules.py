"""Schedules: numbers that change over training, by name; a config writes 'linear:start=0.5,end=1'."""

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
        ValueError: for a name or option that does not exist, or a value that it cannot take.
    """
    return SCHEDULES.make(text)


class Schedule(abc.ABC):
    """A number that depends on the fraction of training that is done; it rises or falls all the way.

    Attributes:
        name: set by the registration.
    """

    name: ClassVar[str] = ''

    @property
    @abc.abstractmethod
    def ends(self) -> tuple[float, float]:
        """The number at the beginning and at the end of training."""

    @abc.abstractmethod
    def at(self, progress: jax.Array | float) -> jax.Array:
        """Returns the number when the fraction `progress` of training, 0 to 1, is done; float32 ()."""


@register_schedule('constant')
class Constant(Schedule):
    """The same number all the time.

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
    """From `start` to `end` in a straight line.

    Attributes:
        start: the number at the beginning.
        end: the number at the end.
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
    """From `start` to `end` along half a period of a cosine: slowly at first and at last."""

    def at(self, progress):
        """See `Schedule.at`."""
        return super().at(0.5 * (1 - jnp.cos(jnp.pi * jnp.float32(progress))))


ALWAYS = Constant()
