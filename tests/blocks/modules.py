"""Modules as others write them, each with something that a cut must respect."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class SetUp(nn.Module):
    """Submodules from `setup`, one list of them, dropout, and `deterministic` for evaluation."""

    def setup(self):
        self.embed = nn.Conv(6, (2, 2), (2, 2))
        self.layers = [nn.Dense(6) for _ in range(3)]
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Dense(3)

    def __call__(self, x, deterministic):
        x = self.embed(x).reshape(x.shape[0], -1, 6)
        for layer in self.layers:
            x = self.dropout(x + nn.gelu(layer(x)), deterministic=deterministic)
        return self.out(x.mean(1))


class Nested(nn.Module):
    """The blocks lie in a submodule, one of them is called twice, and one is rematerialised."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(Encoder(name='encoder')(x.reshape(x.shape[0], -1)))


class Encoder(nn.Module):
    """See `Nested`."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(5, name='first')(x))
        shared = nn.Dense(5, name='shared')
        x = nn.relu(shared(x))
        x = nn.remat(nn.Dense)(5, name='middle')(x)
        return nn.LayerNorm()(shared(x))


class Bypassed(nn.Module):
    """The input and what `a` gives are used behind the end of `b`, and so is a mask."""

    @nn.compact
    def __call__(self, x):
        mask = (x > 0).all(-1, keepdims=True)
        a = nn.Conv(3, (3, 3), name='a')(x)
        b = nn.Conv(3, (3, 3), name='b')(a)
        return nn.Dense(3)(jnp.where(mask, a, b + x).mean((1, 2)))


class Layer(nn.Module):
    """Batch norm and dropout between two products, around a shortcut."""

    @nn.compact
    def __call__(self, x, train):
        y = nn.BatchNorm(use_running_average=not train, name='norm')(nn.Dense(6, name='enter')(x))
        return x + nn.Dense(6, name='leave')(nn.Dropout(0.5)(nn.relu(y), deterministic=not train))


class Rematerialised(nn.Module):
    """Layers that are computed again in the backward pass."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name='embed')(x.reshape(x.shape[0], -1))
        for number in range(2):
            x = nn.remat(Layer, static_argnums=2)(name=f'layer{number}')(x, train)
        return nn.Dense(3, name='out')(nn.relu(x))


class Scanned(nn.Module):
    """A stack of layers by `nn.scan`, each with its own statistics, and a layer behind it."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(6, name='embed')(x.reshape(x.shape[0], -1))
        stack = nn.scan(
            Step,
            variable_axes={'params': 0, 'batch_stats': 0},
            split_rngs={'params': True, 'dropout': True},
            in_axes=nn.broadcast,
            length=4,
        )
        x, sums = stack(name='layers')(x, train)
        return nn.Dense(3, name='out')(nn.Dense(6, name='behind')(x) + sums.mean(0)[:, None])


class Step(nn.Module):
    """One iteration; it gives a sum besides what it carries on."""

    @nn.compact
    def __call__(self, x, train):
        x = Layer(name='layer')(x, train)
        return x, x.sum(-1)


class Mapped(nn.Module):
    """Every example runs by itself under `nn.vmap`, with its own dropout."""

    @nn.compact
    def __call__(self, x, train):
        over_batch = {'variable_axes': {'params': None}, 'split_rngs': {'params': False, 'dropout': True}}
        return nn.vmap(Single, in_axes=(0, None), **over_batch)(name='single')(x, train)


class Single(nn.Module):
    """What `Mapped` does with one example."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Dense(6, name='first')(x.reshape(-1)))
        x = nn.Dropout(0.5)(nn.Dense(6, name='second')(x), deterministic=not train)
        return nn.Dense(3, name='out')(x)


class Trained(nn.Module):
    """A field says whether it is trained."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        for number in range(2):
            x = nn.Conv(4, (3, 3), name=f'layer{number}')(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(x))
        return x.mean((1, 2))


class TwoSwitches(nn.Module):
    """Two arguments say whether it is trained, the one and the other way round."""

    @nn.compact
    def __call__(self, x, train=True, deterministic=True):
        for number in range(2):
            x = nn.Conv(4, (3, 3), name=f'layer{number}')(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            x = nn.Dropout(0.5)(x, deterministic=deterministic)
        return x.mean((1, 2))


class DropPath(nn.Module):
    """Leaves out residual branches by a random stream of its own."""

    @nn.compact
    def __call__(self, x, train):
        x = x.reshape(x.shape[0], -1)
        for number in range(3):
            y = nn.Dense(x.shape[-1], name=f'layer{number}')(x)
            if train:
                y = jnp.where(jax.random.bernoulli(self.make_rng('drop_path'), 0.5, (x.shape[0], 1)), y, 0.0)
            x = x + y
        return nn.Dense(3)(x)


class Collections(nn.Module):
    """The root keeps a mean of what lies between two layers; a table is constant; an integer counts steps."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name='first')(x.reshape(x.shape[0], -1))
        mean = self.variable('centers', 'mean', jnp.zeros, (4,))
        steps = self.variable('counters', 'steps', jnp.zeros, (), jnp.int32)
        table = self.variable('constants', 'table', lambda: jnp.arange(4.0))
        if train:
            mean.value = 0.5 * mean.value + 0.5 * x.mean(0)
            steps.value = steps.value + 1
        x = nn.relu(nn.Dense(4, name='second')(x - mean.value[None]))
        return nn.Dense(3)(x * table.value[None])


class Partitioned(nn.Module):
    """Its parameters lie in boxes that say how they are sharded."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'model'))
        for number in range(2):
            x = nn.relu(nn.Dense(6, kernel_init=init, name=f'layer{number}')(x))
        return x


class Tagger(nn.Module):
    """Tokens and a mask in, by keyword; logits and lengths out, both of another form than images and classes."""

    @nn.compact
    def __call__(self, tokens, mask, train):
        x = nn.Embed(7, 6, name='embed')(tokens)
        for number in range(2):
            mixed = nn.MultiHeadDotProductAttention(2, name=f'attention{number}')(x, mask=mask[:, None, None])
            x = x + nn.Dropout(0.5)(mixed, deterministic=not train)
        return {'logits': nn.Dense(3, name='out')(x), 'length': mask.sum(-1)}


class Sowing(nn.Module):
    """A loss of its own is sown."""

    @nn.compact
    def __call__(self, x):
        for number in range(2):
            x = nn.Dense(4, name=f'layer{number}')(x)
            self.sow('losses', 'penalty', (x**2).mean())
        return x.mean((1, 2))


class Unswitched(nn.Module):
    """Nothing says whether it is trained, and there is a batch norm."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name='first')(x)
        x = nn.BatchNorm(use_running_average=False, name='norm')(x)
        return nn.Conv(4, (3, 3), name='second')(x).mean((1, 2))


class OverAxis(nn.Module):
    """Its batch norms average over an axis that `pmap` binds."""

    @nn.compact
    def __call__(self, x, train):
        for number in range(2):
            x = nn.Conv(4, (3, 3), name=f'layer{number}')(x)
            x = nn.BatchNorm(use_running_average=not train, axis_name='batch')(x)
        return x.mean((1, 2))


class Conditional(nn.Module):
    """One of two layers runs."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name='first')(x)
        other, one = nn.Dense(4, name='other'), nn.Dense(4, name='one')
        x = nn.cond(x.sum() > 0, lambda module, x: one(x), lambda module, x: other(x), self, x)
        return nn.Dense(4, name='last')(x).mean((1, 2))


class TwoViews(nn.Module):
    """In training there is a second view of every image."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4, name='first')(jnp.concatenate([x, x[:, ::-1]]) if train else x)
        return nn.Dense(4, name='second')(x).mean((1, 2))


class Centered(nn.Module):
    """Its first batch says where it begins."""

    @nn.compact
    def __call__(self, x):
        for number in range(2):
            x = nn.Dense(4, name=f'layer{number}')(x)
            x = x - self.param(f'center{number}', lambda _, x=x: x.mean((0, 1, 2), keepdims=True))
        return x.mean((1, 2))
