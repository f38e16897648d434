"""Round biases to the steps in which an integer convolution adds them up.

    b' = q * (activation scale * weight scale),  q = round(b / (activation scale * weight scale)) as int32

A bias too large for int32 in those steps gets wider ones: the scale of that weight channel grows. The bias
becomes a DequantizeLinear of int32: still a float value in the graph, and what the integer kernel adds.

Scales are final here. One that a Resize by 2 reads with moves by 2^-13 of itself if a sum would else lie so close to
the middle between two steps of the result, on a grid of its own, that it rounds as the order of additions wants it
(passes/double_sizes.py adds in another one than the runtime).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.layers import doubled_axes
from vmq.pipeline import Context, Pass, PassResult
from vmq.spec import QuantSpec

LARGEST_BIAS = 2.0**30
"""Weight scales are widened until the bias, in steps of activation scale x weight scale, stays below this."""

ROUNDING = 2.0 ** -21
"""By how much of their size sums of two products, as multiples of a step, may be off in float32."""
MOVE, MOVES = 2.0 ** -13, 8
"""By how much of itself a scale is moved, at most so often: half a step by far more than sums round, 255 steps by a
quarter of one at most."""


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
        moved = sum(_move_off_halves(graph, node) for node in graph.nodes)
        return PassResult(modified=count + moved, report={"biases": count, "weight_channels_widened": widened})


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


def _move_off_halves(graph: Graph, node: Any) -> bool:
    """Move the scale that a Resize by 2 reads with if a sum is all but half a step; returns whether it has moved."""
    read, readers = node.inputs[0].inputs[:1] if node.op == "Resize" else [], node.outputs[0].outputs
    if not read or not doubled_axes(node) or read[0].op != "DequantizeLinear" or read[0].inputs[1].values.size > 1 \
            or len(read[0].outputs[0].outputs) > 1 or [r.op for r in readers] != ["QuantizeLinear"]:
        return False
    first = scale = np.float32(np.asarray(read[0].inputs[1].values).ravel()[0])
    for move in range(1, MOVES + 1):
        if not _near_half(read[0], readers[0], float(scale)):
            break
        scale = np.float32(first * (1.0 + move * MOVE))
    if scale != first:
        read[0].inputs[1] = graph.constant("scale", np.full_like(np.asarray(read[0].inputs[1].values), scale))
    return bool(scale != first)


def _near_half(read: Any, write: Any, scale: float) -> bool:
    """True where 3/4 a + 1/4 b, of integers read with this scale, may round either way on the grid of the result."""
    spec, source = (QuantSpec.of(n.inputs[2].dtype) for n in (write, read))
    step, to, zero = (float(np.asarray(v.values).ravel()[0]) for v in (*write.inputs[1:3], read.inputs[2]))
    steps = (np.arange(source.qmin, source.qmax + 1) - zero) * scale / step
    near, far = 0.75 * steps[:, None], 0.25 * steps
    below = np.floor(near + far)                    # of the two steps that a sum lies between
    inside = (below + to >= spec.qmin) & (below + to < spec.qmax)
    return bool((inside & (np.abs(near + far - below - 0.5) <= ROUNDING * (np.abs(near) + np.abs(far)))).any())


def _layers(graph: Graph) -> Iterator[tuple[Any, Any, Any]]:
    """Layers with a constant float bias and both operands dequantized: (layer, activation's DQ, weight's DQ)."""
    for node in graph.nodes:
        if node.op in ("Conv", "Gemm") and len(node.inputs) > 2 and isinstance(node.inputs[2], Constant):
            pairs = [v.inputs[0] for v in node.inputs[:2] if v.inputs and v.inputs[0].op == "DequantizeLinear"]
            if len(pairs) == 2:
                yield node, pairs[0], pairs[1]
