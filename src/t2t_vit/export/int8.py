"""Quantise to int8 after training, by NNCF, with the parts of T2T-ViT that must stay in float.

The recipe is derived from the graph, not from names. Kept in float are

- the Performer's kernel attention: φ(x) = exp(w·x - |x|²/2) spans e^16 and more, and its quotient too, against the
  256 steps of int8. So every operation between a soft split's convolution and the projection after attention that lies
  before or after an exponential. (Softmax is an operation of its own, not an exponential in this sense.)
- the statistics of windows: a flat window's small variance decides what it is divided by. So every operation before
  a square root, up to the map itself.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from .runtime import need
from .signal_stack import keep_signal_stack


class Node(NamedTuple):
    """An operation of a graph: its kind, and the names of the operations whose results it takes."""

    kind: str
    inputs: list[str]


Graph = dict[str, Node]


def openvino_graph(model: Any) -> Graph:
    """Return the operations of an openvino.Model by their friendly names."""
    return {
        op.get_friendly_name(): Node(
            op.get_type_name(), [value.get_source_output().get_node().get_friendly_name() for value in op.inputs()]
        )
        for op in model.get_ordered_ops()
    }


def onnx_graph(proto: Any) -> Graph:
    """Return the operations and constants of an onnx.ModelProto."""
    makers = {tensor: node.name for node in proto.graph.node for tensor in node.output}
    graph = {tensor.name: Node('Constant', []) for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        inputs = [makers.get(tensor, tensor) for tensor in node.input]
        graph[node.name] = Node({'Conv': 'Convolution', 'Gemm': 'MatMul'}.get(node.op_type, node.op_type), inputs)
    return graph


def constants(graph: Graph) -> set[str]:
    """Return the constants, and the operations on constants only."""
    fixed = {name for name, node in graph.items() if node.kind == 'Constant'}
    for name, node in graph.items():  # in the order in which they are computed
        if node.inputs and all(value in fixed for value in node.inputs):
            fixed.add(name)
    return fixed


def kept_in_float(graph: Graph) -> list[str]:
    """Return the operations of kernel attention and of window statistics, in their order; empty without either."""
    fixed, users = constants(graph), {name: [] for name in graph}  # type: set[str], dict[str, list[str]]
    for name, node in graph.items():
        for value in node.inputs:
            users.get(value, []).append(name)

    def of(*kinds: str) -> set[str]:
        return {name for name, node in graph.items() if node.kind in kinds and name not in fixed}

    def reach(starts: Iterable[str], neighbours: Callable[[str], list[str]], ends: set[str]) -> set[str]:
        found: set[str] = set()
        stack = list(starts)
        while stack:
            name = stack.pop()
            if name in graph and name not in found | fixed | ends:
                found.add(name)
                stack += neighbours(name)
        return found

    roots, exponentials, convolutions = of('Sqrt'), of('Exp'), of('Convolution')
    weighted = {name for name in of('MatMul') if any(value in fixed for value in graph[name].inputs)}
    # from the root up to the map that is padded, and from φ up to the convolution that makes k, q and v and down to the
    # Linear
    pads = of('Pad')
    maps = {value for name in pads for value in graph[name].inputs}
    statistics = reach(roots, lambda name: graph[name].inputs, pads | maps)
    features = reach(exponentials, lambda name: graph[name].inputs, convolutions | roots)
    after = reach((user for name in exponentials for user in users[name]), users.__getitem__, weighted | of('Result'))
    return [name for name in graph if name in statistics | features | after]


@contextmanager
def quietly() -> Iterator[None]:
    """Silence NNCF's notes on its own progress."""
    logger = logging.getLogger('nncf')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@keep_signal_stack()
def quantize(model: Any, graph: Graph, images: Sequence[np.ndarray]) -> Any:
    """Return an openvino.Model or onnx.ModelProto with int8 matmuls and convolutions, calibrated on these images.

    Args:
        model: The model to quantise.
        graph: Its operations.
        images: Its inputs, in batches.
    """
    need('nncf')
    import nncf

    inputs = [value.name for value in model.graph.input] if hasattr(model, 'graph') else []  # onnx asks for names
    data = nncf.Dataset(images, (lambda image: {inputs[0]: image}) if inputs else None)
    with quietly():
        return nncf.quantize(
            model,
            data,
            subset_size=len(images),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            target_device=nncf.TargetDevice.CPU,
            advanced_parameters=nncf.AdvancedQuantizationParameters(  # its factors cost more time than the ranges gain
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
            ),
            ignored_scope=nncf.IgnoredScope(names=kept_in_float(graph), validate=False),
        )
