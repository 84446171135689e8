"""The networks of this folder as a table: how each is divided into blocks, and how its own code is called."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bqat_jax import BlockNetwork, CustomTask, Task, split_after
from tests.foreign import bert, bilstm, convnext, decoder, efficientnet, gnn, mixer, unet, vae

BATCH = 4
Call = Callable[[Any, Any, bool], Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A network.

    Attributes:
        module: as its user makes it.
        ends: behind which submodules it is cut.
        example: one input, without the batch axis.
        direct: how its user calls it, `direct(module, inputs, train)`.
        task: what it is trained for.
        targets: from inputs to those of the task.
        left: endings of the paths of all weights that stay in full precision.
        is_divided: whether an `nn.scan` is cut between iterations; then XLA sums in another order.
        field: a field of the module that says whether it is trained.
        plan: by which it is trained.
    """

    module: Any
    ends: tuple[str, ...]
    example: Any
    direct: Call
    task: str | Task = 'classification'
    targets: Callable[[Any], Any] = lambda inputs: jnp.arange(BATCH) % 2
    left: tuple[str, ...] = ()
    is_divided: bool = False
    field: str | None = None
    plan: str = 'prefix'

    def split(self) -> BlockNetwork:
        """Divides the network, as its user would."""
        return split_after(self.module, self.ends, self.example)

    def apply(self, variables: Any, inputs: Any, train: bool, **options: Any) -> Any:
        """Runs the module itself, without this project."""
        module = self.module.clone(**{self.field: train}) if self.field else self.module
        return module.apply(variables, inputs, method=lambda own, x: self.direct(own, x, train), **options)

    def batch(self, seed: int = 0) -> Any:
        """Returns a batch of inputs."""
        return jax.tree.map(lambda x: _fill(x, seed), self.example)


def _fill(x: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    generator, shape = np.random.default_rng(seed), (BATCH, *x.shape)
    if x.dtype == jnp.bool_ and len(x.shape) == 2:  # edges
        return jnp.asarray(generator.random(shape) < 0.5)
    if x.dtype == jnp.bool_:  # padding behind the first half
        return jnp.asarray(np.arange(x.shape[0]) < x.shape[0] // 2 + np.arange(BATCH)[:, None])
    if x.dtype == jnp.int32:  # tokens, or lengths
        return jnp.asarray(generator.integers(1, 7, shape), jnp.int32)
    return jnp.asarray(generator.normal(size=shape), jnp.float32)


def draw_variables(network: BlockNetwork) -> Any:
    """Returns variables drawn by NumPy, so that nothing is compiled; statistics and biases are not trivial."""
    generator = np.random.default_rng(0)

    def draw(path, x):
        size = np.sqrt(max(1, np.prod(x.shape[:-1], dtype=int)))
        value = generator.normal(size=x.shape) / size
        name = path[-1].key
        value = 1 + 0.1 * value if name == 'scale' else 1 + np.abs(value) if name == 'var' else value
        return jnp.asarray(value, x.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(network.init, jax.random.key(0)))


def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Describes an array."""
    return jax.ShapeDtypeStruct(shape, dtype)


@functools.cache
def cut(name: str) -> tuple[BlockNetwork, Any]:
    """Returns a network of the table, divided, and variables of it."""
    network = CASES[name].split()
    return network, draw_variables(network)


IMAGE = array(8, 8, 3)
CASES = {
    'bert': Case(
        bert.Bert(),
        ('layers_0', 'layers_1'),
        {'input_ids': array(6, dtype=jnp.int32), 'attention_mask': array(6, dtype=jnp.bool_)},
        lambda module, x, train: module(x['input_ids'], x['attention_mask'], deterministic=not train),
        left=('position_embeddings',),
    ),
    'decoder': Case(
        decoder.Decoder(),
        ('layers[0]', 'layers[1]'),
        array(6, dtype=jnp.int32),
        lambda module, x, train: module(x, deterministic=not train),
        task='language_model',
        targets=lambda tokens: jnp.roll(tokens, -1, axis=1),
        is_divided=True,
        plan='prefix_sampled',
    ),
    'bilstm': Case(
        bilstm.Tagger(),
        ('lstm0', 'lstm1'),
        (array(6, dtype=jnp.int32), array(dtype=jnp.int32)),
        lambda module, x, train: module(*x),
        task='classification:ignore=-1',
        targets=lambda inputs: jnp.where(jnp.arange(6)[None] < inputs[1][:, None], inputs[0] % 2, -1),
        field='training',
    ),
    'unet': Case(
        unet.UNet(),
        ('down0', 'bottleneck'),
        IMAGE,
        lambda module, x, train: module(x, train=train),
        task='segmentation',
        targets=lambda image: (image[..., 0] > 0).astype(jnp.int32),
        plan='prefix_sampled',
    ),
    'convnext': Case(
        convnext.ConvNeXt(),
        ('stage0_block0', 'stage1_block0'),
        IMAGE,
        lambda module, x, train: module(x, train),
    ),
    'efficientnet': Case(
        efficientnet.EfficientNet(),
        ('blocks_0', 'blocks_1'),
        IMAGE,
        lambda module, x, train: module(x, is_training=train),
        plan='prefix_sampled',
    ),
    'mixer': Case(
        mixer.Mixer(),
        ('block0', 'block1/token_mixing'),
        IMAGE,
        lambda module, x, train: module(x),
    ),
    'gnn': Case(
        gnn.GraphNetwork(),
        ('conv0', 'conv1', 'conv2'),
        {'nodes': array(5, 3), 'adjacency': array(5, 5, dtype=jnp.bool_), 'mask': array(5, dtype=jnp.bool_)},
        lambda module, x, train: module(x['nodes'], x['adjacency'], x['mask'], train=train),
        plan='prefix_sampled',
    ),
    'vae': Case(
        vae.VAE(),
        ('encoder', 'bridge'),
        IMAGE,
        lambda module, x, train: module(x, train),
        task=CustomTask(vae.vae_loss, lambda student, teacher: jnp.mean((student['mean'] - teacher['mean']) ** 2)),
        targets=lambda image: image,
    ),
}
