"""Write hard activations that an exporter took apart as the one operator they are.

    HardSigmoid(x) = clip(x + 3, 0, 6) / 6        HardSwish(x) = x * HardSigmoid(x)

The official RVM file multiplies x by its HardSigmoid; older exporters write out Add, Clip, Mul and Div. As one
operator there is one edge to quantize behind the convolution instead of three to five, and its range can be
searched through the function that reads it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

SLOPE, OFFSET = 1.0 / 6.0, 0.5
"""alpha and beta of the HardSigmoid in HardSwish."""


class FuseHardswish(Pass):
    """Turn x * HardSigmoid(x), x * clip(x + 3, 0, 6) / 6 and clip(x + 3, 0, 6) / 6 into single operators."""

    name: ClassVar[str] = "fuse_hardswish"

    def run(self, graph: Graph, context: Context) -> PassResult:
        counts = {"HardSigmoid": 0, "HardSwish": 0}
        for node in list(graph.nodes):
            found = _match(node)
            if found is None:
                continue
            op, x = found
            attrs = {"alpha": SLOPE, "beta": OFFSET} if op == "HardSigmoid" else {}
            result = node.outputs[0]
            fused = graph.add(op, [x], f"{result.name}_fused", attrs, result.shape, result.dtype)
            graph.replace_uses(result, fused)
            counts[op] += 1
        if sum(counts.values()):
            graph.cleanup()
            graph.sort()
        return PassResult(modified=sum(counts.values()), report=counts)


def _match(node: Any) -> tuple[str, Any] | None:
    """The operator that a Mul or Div ends, and what it reads."""
    if node.op == "Mul" and not any(isinstance(v, Constant) for v in node.inputs):
        for x, gate in (node.inputs, reversed(node.inputs)):
            if _hard_sigmoid(gate) is x:
                return "HardSwish", x
    scaled = _divided_by_6(node)
    if scaled is None:
        return None
    inner = _relu6_of_x_plus_3(scaled)
    if inner is not None:
        return "HardSigmoid", inner
    product = _producer(scaled, "Mul")
    if product is not None:
        for x, gate in (product.inputs, reversed(product.inputs)):
            if _relu6_of_x_plus_3(gate) is x:
                return "HardSwish", x
    return None


def _hard_sigmoid(value: Any) -> Any:
    """x, when `value` is HardSigmoid(x) with the slope of HardSwish."""
    node = _producer(value, "HardSigmoid")
    if node is None or not np.isclose(node.attrs.get("alpha", 0.2), SLOPE, rtol=1e-4) \
            or node.attrs.get("beta", 0.5) != OFFSET:
        return None
    return node.inputs[0]


def _relu6_of_x_plus_3(value: Any) -> Any:
    """x, when `value` is clip(x + 3, 0, 6)."""
    clip = _producer(value, "Clip")
    if clip is None or len(clip.inputs) < 3 or [_number(v) for v in clip.inputs[1:3]] != [0.0, 6.0]:
        return None
    add = _producer(clip.inputs[0], "Add")
    if add is None:
        return None
    for x, shift in (add.inputs, reversed(add.inputs)):
        if _number(shift) == 3.0:
            return x
    return None


def _divided_by_6(node: Any) -> Any:
    """v, when the node computes v / 6."""
    if node.op == "Div" and _number(node.inputs[1]) == 6.0:
        return node.inputs[0]
    if node.op == "Mul":
        for value, factor in (node.inputs, reversed(node.inputs)):
            number = _number(factor)
            if number is not None and np.isclose(number, SLOPE, rtol=1e-4):
                return value
    return None


def _producer(value: Any, op: str) -> Any:
    return value.inputs[0] if value.inputs and value.inputs[0].op == op else None


def _number(value: Any) -> float | None:
    """The number that a constant of one element holds."""
    return float(np.asarray(value.values).ravel()[0]) if isinstance(value, Constant) and \
        np.asarray(value.values).size == 1 else None
