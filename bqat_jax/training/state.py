"""The training state."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from bqat_jax.replacement.paths import Variables
from bqat_jax.training.spec import NETWORK, QUANTIZERS, TrainSpec


@struct.dataclass
class TrainState:
    """Everything that a training step updates.

    Attributes:
        step: int32, number of completed steps.
        key: random key of the phase; step t uses `fold_in(key, t)`.
        params: {'network': parameters of the network, 'quantizers': parameters of the quantizers}.
        collections: the network's other collections of variables, {'batch_stats': ...}.
        opt_state: the optimizer's state.
        strengths: {layer path: {role: strength}} for quantizers whose estimator needs one; see `strengths`.
        trackers: {layer path: tracker} of weights that may be frozen; see `regularizers`.
        first_bad_step: int32, the first step with a non-finite loss, or with a non-finite parameter or other variable
            after it; -1 for none. It is kept on the device, so that the loop need not wait for every loss.
    """

    step: jax.Array
    key: jax.Array
    params: Any
    collections: Any
    opt_state: Any
    strengths: Any
    trackers: Any
    first_bad_step: jax.Array

    @property
    def variables(self) -> Variables:
        """The variables of the network and its quantizers."""
        return variables_of(self.params, self.collections)


def variables_of(params: Any, collections: Any) -> Variables:
    """Returns parameters {'network': ..., 'quantizers': ...} and other collections as `Variables`."""
    return Variables(params[NETWORK], params[QUANTIZERS], collections)


def floats_of(tree: Any) -> list[jax.Array]:
    """Returns the floating-point leaves of a tree."""
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]


def init_state(
    spec: TrainSpec, key: jax.Array, variables: Variables, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state before the first step, with the variables `variables`."""
    strengths: dict[str, dict[str, jax.Array]] = {}
    for path, role, quantizer in spec.replacement.quantization.quantizers():
        if quantizer.estimator.needs_strength:
            strengths.setdefault(path, {})[role] = jnp.float32(0)
    params = {NETWORK: variables.params, QUANTIZERS: variables.quantizers}
    return TrainState(
        step=jnp.int32(0),
        key=key,
        params=params,
        collections=variables.collections,
        opt_state=optimizer.init(params),
        strengths=strengths,
        trackers=spec.regularizers.init_trackers(spec.replacement.quantization, variables),
        first_bad_step=jnp.int32(-1),
    )
