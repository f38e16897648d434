"""Move integers, not floats: what only moves values stands before the DequantizeLinear, not behind it.

    DQ -> Split -> Q -> DQ  =  Split -> DQ        the same scale and zero point throughout
    DQ, DQ -> Concat -> Q   =  Concat             where the joined share one grid

No value changes, nothing is rounded to where it already lies, and the runtime has fewer nodes to fuse. What does go
from one grid to another is multiplied by 1 on the way: an integer kernel, where a bare DQ and Q run in float.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.layers import same_grid
from vmq.pipeline import Context, Pass, PassResult


class MoveIntegers(Pass):
    """Let movers and Concats work on integers; drop quantizers that change nothing."""

    name: ClassVar[str] = "move_integers"

    def run(self, graph: Graph, context: Context) -> PassResult:
        target = context.options.target
        if not target.integer_layout:
            return PassResult()
        moved = dropped = multiplied = 0
        for node in list(graph.nodes):
            if node.op in target.movers:
                moved += _move(graph, node, node.inputs[:1])
            elif node.op == "Concat":
                moved += _move(graph, node, node.inputs)
            elif node.op == "QuantizeLinear":
                dropped += _requantizes_nothing(graph, node)
                multiplied += _multiply_by_1(graph, node)
            elif node.op == "Clip":
                dropped += _clips_nothing(graph, node, target.movers)
        graph.cleanup()
        graph.sort()
        return PassResult(modified=moved + dropped + multiplied,
                          report={"moved": moved, "dropped": dropped, "multiplied by 1": multiplied})


def _move(graph: Graph, node: Any, values: list[Any]) -> bool:
    """Put a mover in front of the DequantizeLinear that it reads."""
    reads: list[Any] = [v.inputs[0] if v.inputs else None for v in values]
    first = reads[0]
    if first is None or not all(r is not None and r.op == "DequantizeLinear" and r.inputs[1].values.size == 1
                                and same_grid(r, first) for r in reads):
        return False
    for index, read in enumerate(reads):
        node.inputs[index] = read.inputs[0]
    dtype = np.dtype(first.inputs[2].dtype)
    for index, result in enumerate(list(node.outputs)):
        integers = type(result)(graph.unique(f"{result.name}_integers"), dtype=dtype, shape=result.shape)
        node.outputs[index] = integers
        graph.add("DequantizeLinear", [integers, *first.inputs[1:]], result)
    return True


def _requantizes_nothing(graph: Graph, node: Any) -> bool:
    """Let the readers of a quantizer read the integers that a DequantizeLinear of the same grid made floats of."""
    read = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if read is None or read.op != "DequantizeLinear" or not same_grid(read, node):
        return False
    graph.replace_uses(node.outputs[0], read.inputs[0])
    return True


def _multiply_by_1(graph: Graph, node: Any) -> bool:
    """Put a Mul by 1 between the DequantizeLinear of one grid of uint8 and the quantizer of another."""
    read = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if read is None or read.op != "DequantizeLinear" or not read.inputs[0].inputs or same_grid(read, node) or not all(
            len(n.inputs) == 3 and n.inputs[1].values.size == 1 and n.inputs[2].dtype == np.uint8
            for n in (read, node)):
        return False
    one = graph.add("DequantizeLinear", [graph.constant("one", np.asarray([255], np.uint8)),
                                         graph.constant("scale", np.asarray(1.0 / 255.0, np.float32)),
                                         graph.constant("zero", np.asarray(0, np.uint8))], "one_dq", {}, [1])
    value = node.inputs[0]
    node.inputs[0] = graph.add("Mul", [value, one], f"{value.name}_once", {}, value.shape)
    return True


def _clips_nothing(graph: Graph, node: Any, movers: frozenset[str]) -> bool:
    """Leave out a Clip of integers that went through the same Clip before they were moved."""
    todo, limits = [node.inputs[0]], node.inputs[1:]
    while todo:
        value = todo.pop()
        maker = value.inputs[0] if value.inputs else None
        if maker is None:
            return False
        if maker.op in movers:
            todo.append(maker.inputs[0])
        elif maker.op == "Concat":
            todo += maker.inputs
        elif maker.op != "Clip" or not _equal(maker.inputs[1:], limits):
            return False
    graph.replace_uses(node.outputs[0], node.inputs[0])
    return True


def _equal(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        isinstance(a, Constant) and isinstance(b, Constant) and np.array_equal(a.values, b.values)
        for a, b in zip(one, other, strict=True))
