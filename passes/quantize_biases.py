"""Round biases to the steps in which an integer convolution adds them up.

    b' = q * (activation scale * weight scale),  q = round(b / (activation scale * weight scale)) as int32

A bias too large for int32 in those steps gets wider ones: the scale of that weight channel grows. The bias
becomes a DequantizeLinear of int32: still a float value in the graph, and what the integer kernel adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

LARGEST_BIAS = 2.0**30
"""Weight scales are widened until the bias, in steps of activation scale x weight scale, stays below this."""


class QuantizeBiases(Pass):
    """Turn biases of quantized layers into int32 with scale activation x weight."""

    name: ClassVar[str] = "quantize_biases"

    def run(self, graph: Graph, context: Context) -> PassResult:
        count, widened = 0, _widen(graph)
        for layer, activation, weight in list(_layers(graph)):
            bias = layer.inputs[2]
            scales = [np.asarray(dq.inputs[1].values, np.float32) for dq in (activation, weight)]
            scale = scales[0] * scales[1]
            integers = np.rint(np.asarray(bias.values, np.float64) / scale).astype(np.int32)
            layer.inputs[2] = graph.add("DequantizeLinear", [
                graph.constant(f"{bias.name}_int32", integers), graph.constant("scale", scale)],
                f"{bias.name}_dq", {"axis": 0}, bias.shape)
            count += 1
        graph.sort()
        return PassResult(modified=count, report={"biases": count, "weight_channels_widened": widened})


def _widen(graph: Graph) -> int:
    """Widen the scale of weight channels whose bias would not fit into int32; returns how many channels."""
    widened = 0
    for layer, activation, weight in _layers(graph):
        bias = np.abs(np.asarray(layer.inputs[2].values, np.float64))
        scale = np.asarray(weight.inputs[1].values)
        least = bias / (LARGEST_BIAS * float(np.asarray(activation.inputs[1].values)))
        if (scale < least).any():
            widened += int((scale < least).sum())
            weight.inputs[1].values = np.maximum(scale, least).astype(np.float32)
    return widened


def _layers(graph: Graph) -> Iterator[tuple[Any, Any, Any]]:
    """Layers with a constant float bias and both operands dequantized: (layer, activation's DQ, weight's DQ)."""
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm") and len(node.inputs) > 2 and isinstance(node.inputs[2], Constant):
            pairs = [v.inputs[0] for v in node.inputs[:2] if v.inputs and v.inputs[0].op == "DequantizeLinear"]
            if len(pairs) == 2:
                yield node, pairs[0], pairs[1]
