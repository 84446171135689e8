"""A graph network on padded graphs: nodes, their edges, and which nodes there are; one class for each graph."""

import flax.linen as nn
import jax.numpy as jnp


class GraphConv(nn.Module):
    features: int

    @nn.compact
    def __call__(self, nodes, adjacency, mask):
        degrees = jnp.maximum(adjacency.sum(-1, keepdims=True), 1)
        messages = jnp.einsum('bij,bjf->bif', adjacency, nn.Dense(self.features, name='neighbours')(nodes)) / degrees
        nodes = nn.relu(nn.Dense(self.features, name='self')(nodes) + messages)
        return nodes * mask[..., None]


class GraphNetwork(nn.Module):
    num_classes: int = 3
    width: int = 6
    layers: int = 3

    @nn.compact
    def __call__(self, nodes, adjacency, mask, train=False):
        adjacency, mask = adjacency.astype(nodes.dtype), mask.astype(nodes.dtype)
        nodes = nn.Dense(self.width, name='embed')(nodes) * mask[..., None]
        readouts = []
        for number in range(self.layers):
            nodes = GraphConv(self.width, name=f'conv{number}')(nodes, adjacency, mask)
            nodes = nn.Dropout(0.1)(nodes, deterministic=not train)
            scores = jnp.where(mask[..., None] > 0, nn.Dense(1, name=f'gate{number}')(nodes), -1e9)
            readouts += [(nodes * nn.softmax(scores, axis=1)).sum(1), nodes.sum(1) / mask.sum(1, keepdims=True)]
        return nn.Dense(self.num_classes, name='classes')(jnp.concatenate(readouts, axis=-1))
