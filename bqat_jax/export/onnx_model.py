"""Assembles an ONNX model from the parts of its graph."""

import dataclasses
import types
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import helper

from bqat_jax.export.onnx_values import Tensor, dimension_name

# The oldest IR version that supports an opset.
FORMATS = {21: 10, 22: 10, 23: 11, 24: 12, 25: 13}


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """Options of a model.

    Attributes:
        opset: version of the ONNX operators, 21 to 25.
        observed: prefix of the names, given by `checkpoint_name`, of values that become outputs; '' for none.
        metadata: metadata of the model.
        describes_all: whether shapes and dtypes of all intermediate values are written, which some tools need.
    """

    opset: int = 21
    observed: str = ''
    metadata: Mapping[str, str] = dataclasses.field(default_factory=lambda: types.MappingProxyType({}))
    describes_all: bool = True

    def __post_init__(self):
        if self.opset not in FORMATS:
            raise ValueError(f'opset={self.opset}: ONNX export writes opsets {min(FORMATS)} to {max(FORMATS)}.')


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a graph.

    Attributes:
        inputs: inputs of the graph.
        nodes: nodes in execution order; may include some that no output depends on.
        initializers: initializers by name.
        tensors: shapes and dtypes of inputs and nodes' outputs by name.
    """

    inputs: Sequence[Tensor]
    nodes: Sequence[onnx.NodeProto]
    initializers: Mapping[str, onnx.TensorProto]
    tensors: Mapping[str, Tensor]


def finish_model(options: OnnxOptions, parts: Parts, results: Sequence[tuple[str, Tensor]]) -> onnx.ModelProto:
    """Returns a model without nodes and initializers that no output depends on.

    Args:
        options: options of the model.
        parts: parts of its graph; the nodes are renamed in place.
        results: names and values of the outputs.
    """
    names = _output_names(parts.nodes, results)
    for node in parts.nodes:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    # A result that is an input, an initializer or already an output is copied.
    copied = [(names.get(x.name, x.name), name) for name, x in results if names.get(x.name) != name]
    copies = [helper.make_node('Identity', [source], [name], name=f'Identity_{name}') for source, name in copied]
    nodes, needed = _prune([*parts.nodes, *copies], [name for name, _ in results])
    inner = {name for node in nodes for name in node.output} - {name for name, _ in results}
    graph = helper.make_graph(
        nodes,
        'bqat_jax',
        [_describe(x.name, x) for x in parts.inputs],
        [_describe(name, x) for name, x in results],
        [x for name, x in parts.initializers.items() if name in needed],
        value_info=[_describe(name, x) for name, x in parts.tensors.items() if name in inner and options.describes_all],
    )
    opsets = [helper.make_opsetid('', options.opset)]
    model = helper.make_model(graph, producer_name='bqat_jax', opset_imports=opsets, ir_version=FORMATS[options.opset])
    helper.set_model_props(model, dict(options.metadata))
    return model


def _output_names(nodes: Sequence[onnx.NodeProto], results: Sequence[tuple[str, Tensor]]) -> dict[str, str]:
    """The names of the model's outputs by the names of the nodes' outputs."""
    made, names = {name for node in nodes for name in node.output}, {}
    for name, value in results:
        if value.name in made:
            names.setdefault(value.name, name)
    return names


def _prune(nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that outputs depend on, and the names that they read."""
    needed, kept = set(outputs), []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            kept.append(node)
            needed.update(node.input)
    return kept[::-1], needed


def _describe(name: str, value: Tensor) -> onnx.ValueInfoProto:
    shape: list[Any] = [size if isinstance(size, int) else dimension_name(size) for size in value.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)
