"""Keep 8-bit weights within the integers that the target multiplies exactly.

    w' = clip(w, low * scale, high * scale)

Some kernels add two products of 8-bit integers in 16 bits, which saturate at 32,767. Arm's do with -128 * -128 twice,
x86 without VNNI with 255 * 127 twice: 127 instead of 128 steps, or 64 instead of 128, keep the sum within. Ranges are
searched with these ends in mind; only weights that the search or learning left beyond them are moved.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult


class LimitWeights(Pass):
    """Clip 8-bit weights to the integers that the target multiplies exactly."""

    name: ClassVar[str] = "limit_weights"

    def run(self, graph: Graph, context: Context) -> PassResult:
        low, high = context.options.target.weight_range
        clipped = tensors = 0
        for node in [n for n in graph.nodes if n.op == "QuantizeLinear" and isinstance(n.inputs[0], Constant)
                     and n.inputs[2].dtype == np.int8]:
            count = _clip(graph, node, low, high)
            clipped += count
            tensors += bool(count)
        return PassResult(modified=tensors, report={"weights": clipped, "range": [low, high]})


def _clip(graph: Graph, node: Any, low: int, high: int) -> int:
    """Clip the constant that a quantizer reads; returns how many values changed their integer."""
    weight, scale = (np.asarray(v.values) for v in node.inputs[:2])
    if scale.ndim:
        shape = [1] * weight.ndim
        shape[node.attrs["axis"]] = -1
        scale = scale.reshape(shape)
    steps = np.rint(weight / scale)
    outside = (steps < low) | (steps > high)
    if outside.any():
        values = np.where(outside, np.clip(steps, low, high) * scale, weight).astype(np.float32)
        node.inputs[0] = graph.constant(f"{node.inputs[0].name}_limited", values)
    return int(outside.sum())
