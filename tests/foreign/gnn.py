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
            readouts.append((nodes.sum(1) / mask.sum(1, keepdims=True), nodes.max(1)))
        graph = jnp.concatenate([x for pair in readouts for x in pair], axis=-1)
        return nn.Dense(self.num_classes, name='classes')(graph)
