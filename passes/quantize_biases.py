"""Round biases to the steps in which an integer convolution adds them up.

    b' = q * (activation scale * weight scale),  q = round(b / (activation scale * weight scale)) as int32

The bias becomes a DequantizeLinear of int32: still a float value in the graph, and what the integer kernel adds.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from passes.calibrate_ranges import quantized_layers
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult


class QuantizeBiases(Pass):
    """Turn biases of quantized layers into int32 with scale activation x weight."""

    name: ClassVar[str] = "quantize_biases"

    def run(self, graph: Graph, context: Context) -> PassResult:
        count = 0
        for layer, activation, weight in list(quantized_layers(graph)):
            bias = layer.inputs[2]
            scales = [np.asarray(dq.inputs[1].values, np.float32) for dq in (activation, weight)]
            scale = scales[0] * scales[1]
            steps = np.rint(np.asarray(bias.values, np.float64) / scale)
            limits = np.iinfo(np.int32)
            integers = np.clip(steps, limits.min, limits.max).astype(np.int32)
            layer.inputs[2] = graph.add("DequantizeLinear", [
                graph.constant(f"{bias.name}_int32", integers), graph.constant("scale", scale)],
                f"{bias.name}_dq", {"axis": 0}, bias.shape)
            count += 1
        graph.sort()
        return PassResult(modified=count, report={"biases": count})
