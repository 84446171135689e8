"""A phase of training and the shapes of its state."""

import dataclasses
from typing import Any

import jax

from bqat_jax.distributed.replicas import Replicas
from bqat_jax.experiment.streams import Stream
from bqat_jax.replacement.paths import Variables
from bqat_jax.storage import Place
from bqat_jax.training.optimizer import OptimizerSpec, make_optimizer
from bqat_jax.training.spec import TrainSpec
from bqat_jax.training.state import init_state


@dataclasses.dataclass(frozen=True)
class Phase:
    """One phase of a run.

    Attributes:
        name: 'pretrain' or 'train'.
        stream: the stream of its random numbers.
        spec: the training.
        optimizer: its optimizer.
        partner: the frozen partner's variables, or None.
        shapes: shapes and dtypes of the variables of one network and its quantizers.
        directory: folder of its checkpoints.
        replicas: the networks that are trained in parallel.
    """

    name: str
    stream: Stream
    spec: TrainSpec
    optimizer: OptimizerSpec
    partner: Any
    shapes: Variables
    directory: Place
    replicas: Replicas

    @property
    def state_shapes(self) -> Any:
        """Shapes, dtypes and shardings of the state."""
        optimizer, _ = make_optimizer(self.optimizer, self.spec.steps)
        shapes = jax.eval_shape(
            lambda variables: init_state(self.spec, jax.random.key(0), variables, optimizer), self.shapes
        )
        return self.replicas.stacked_shapes(shapes)
