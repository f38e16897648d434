"""What kind of layer a multiply-add node is, from topology and types: first, last, depthwise, pooled, recurrent."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from vmq.graph import Constant, Graph
from vmq.targets import Target


def compute_nodes(graph: Graph, target: Target) -> list[Any]:
    """Multiply-add nodes that can be quantized: their weight is a constant, or they multiply two activations."""
    return [n for n in graph.nodes if n.op in target.compute
            and (isinstance(weight_of(n, target), Constant) or n.op == "MatMul")]


def weight_of(node: Any, target: Target) -> Any:
    """The weight input of a multiply-add node (a Constant, unless it multiplies two activations)."""
    return node.inputs[target.compute[node.op].weight]


def weight_axis(node: Any) -> int:
    """The axis of a layer's weight that counts output channels."""
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return 0
    return int(np.asarray(node.inputs[1].values).ndim) - 1


def kinds_of(graph: Graph, target: Target, state_outputs: Collection[str], recurrent: Collection[str],
             ) -> dict[str, set[str]]:
    """The kinds of each multiply-add node, by node name.

    Args:
        graph: with static shapes.
        target: says which nodes are multiply-adds.
        state_outputs: names of the outputs that are recurrent states.
        recurrent: names of nodes inside recurrent closures.
    """
    layers = {id(n) for n in compute_nodes(graph, target)}
    above: set[int] = set()        # nodes with a layer among their ancestors
    for node in graph.nodes:
        producers = [p for v in node.inputs for p in v.inputs]
        if any(id(p) in layers or id(p) in above for p in producers):
            above.add(id(node))
    tail = tail_nodes(graph, target, state_outputs)
    kinds: dict[str, set[str]] = {}
    for node in graph.nodes:
        if id(node) not in layers:
            continue
        kind: set[str] = set()
        if id(node) not in above:
            kind.add("first")
        readers = list(node.outputs[0].outputs)
        if node.outputs[0].name not in state_outputs and all(r.name in tail for r in readers):
            kind.add("last")
        weight = weight_of(node, target)
        if node.op == "Conv" and node.attrs.get("group", 1) == weight.shape[0] > 1:
            kind.add("depthwise")
        if node.op == "Conv" and node.inputs[0].shape and all(d == 1 for d in node.inputs[0].shape[2:]):
            kind.add("pooled")
        if node.name in recurrent:
            kind.add("recurrent")
        kinds[node.name] = kind
    return kinds


def tail_nodes(graph: Graph, target: Target, state_outputs: Collection[str]) -> set[str]:
    """Names of nodes after the last layer: only model outputs that are no states depend on them."""
    layers = {id(n) for n in compute_nodes(graph, target)}
    inner: set[int] = set()        # nodes that a layer or a state output depends on
    for node in reversed(graph.nodes):
        if any(v.name in state_outputs for v in node.outputs) \
                or any(id(r) in layers or id(r) in inner for v in node.outputs for r in v.outputs):
            inner.add(id(node))
    return {n.name for n in graph.nodes if id(n) not in inner and id(n) not in layers}


def float_source(value: Any) -> Any:
    """The float value that a value of a quantized graph stands for: through the Q/DQ pairs before it."""
    while value.inputs and value.inputs[0].op in ("QuantizeLinear", "DequantizeLinear"):
        value = value.inputs[0].inputs[0]
    return value
