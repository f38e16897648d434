"""What a frame costs in arithmetic: multiply-adds, and the widths they are done at.

Over all Conv, Gemm and MatMul of a graph, and their integer forms, with n multiply-adds at w weight and a activation
bits (32 for float32) each:

    BOPs     sum n * w * a                            (van Baalen et al., Bayesian Bits, NeurIPS 2020)
    GFLOPs   sum n / mean(32 / w, 32 / a) / 1e9       (as PTQ4VM counts)

Channels and columns of zeros that were added for the kernels' sake count like others: the processor multiplies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from vmq.graph import Constant, Graph
from vmq.runtime import Session

OPERANDS: Mapping[str, tuple[int, int]] = {
    "Conv": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1), "ConvInteger": (0, 1), "MatMulInteger": (0, 1),
    "QLinearConv": (0, 3), "QLinearMatMul": (0, 3)}
"""Operators that multiply and add, and which of their inputs are activation and weight."""


@dataclass(frozen=True)
class Cost:
    """What one frame takes: multiply-adds, bit operations, and GFLOPs as the paper counts them."""

    multiply_adds: int
    bops: int
    gflops: float


def cost_of(graph: Graph) -> Cost:
    """Count a graph's arithmetic; the operands' shapes must be known (see `fill_shapes`)."""
    parts = [(_per_node(n), *(_bits(n.inputs[k]) for k in OPERANDS[n.op])) for n in graph.nodes if n.op in OPERANDS]
    return Cost(multiply_adds=sum(n for n, _, _ in parts), bops=sum(n * a * w for n, a, w in parts),
                gflops=sum(n / saving(w, a) for n, a, w in parts) / 1e9)


def saving(weights: int, activations: int) -> float:
    """How many times cheaper the paper counts a multiply-add at these widths than in float32."""
    return (32 / weights + 32 / activations) / 2


def fill_shapes(graph: Graph, session: Session, frame: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    """Find the shapes of all operands: from the graph, or where sizes are free by running a frame.

    Args:
        graph: gets the shapes.
        session: of the same graph; says what is fed beside the frame.
        frame: float32 [1,3,H,W].

    Raises:
        ModelError: the shapes contradict each other, or the model does not run at this size.
    """
    graph.infer_shapes()
    values = [v for n in graph.nodes if n.op in OPERANDS for v in (*(n.inputs[k] for k in OPERANDS[n.op]), *n.outputs)]
    loose = {v.name: v for v in values if v.shape is None or not all(isinstance(d, int) for d in v.shape)}
    if loose:
        runner = Session(graph, optimize=False, downsample_ratio=session.downsample_ratio, extra=list(loose),
                         pairs={p.input: p.output for p in session.state_pairs})
        found = {**runner.feeds(frame), **runner.feed(frame)}
        for name, value in loose.items():
            value.shape = list(found[name].shape)


def _per_node(node: Any) -> int:
    activation, weight = (node.inputs[k].shape for k in OPERANDS[node.op])
    results = prod(node.outputs[0].shape)
    if "Conv" in node.op:
        return results * prod(weight[1:])
    return results * activation[-2 if node.op == "Gemm" and node.attrs.get("transA") else -1]


def _bits(value: Any) -> int:
    """Width of the integers that stand for a value, or of its float type where none do."""
    while value.inputs and value.inputs[0].op in ("DequantizeLinear", "Cast"):
        value = value.inputs[0].inputs[0]
    if isinstance(value, Constant) and value.dtype == np.int8:      # 4-bit weights may be stored as INT8
        return 4 if np.min(value.values) >= -8 and np.max(value.values) <= 7 else 8
    made = value.inputs[0] if value.inputs else None
    if made is not None and made.op == "Clip" and np.dtype(value.dtype).kind in "ui":
        low, high = (int(limit.values) for limit in made.inputs[1:3])
        return (high - low).bit_length()
    name = np.dtype(value.dtype or np.float32).name
    return 4 if name.endswith("int4") else 8 * np.dtype(value.dtype or np.float32).itemsize
