"""Resize by 2 in integers. Along one axis every new value lies between two old ones, a quarter of the way:

    y[2i] = 3/4 x[i] + 1/4 x[i-1]        y[2i+1] = 3/4 x[i] + 1/4 x[i+1]        x repeated beyond its ends

and the sum of two tensors that are read with 3/4 and 1/4 of their scale is an integer Add, many times faster than
the runtime's Resize. Each of the two is a Gather of x, on [N,H,W,C], as the convolutions around it have it, so that
rows and pixels are copied whole. The same bits come out: passes/integer_forms.py and, for results on a grid of
their own, passes/quantize_biases.py chose scales with which no sum is a half.

Where pictures in float are halved by AveragePool, a linear Resize by 1/2 computes the same in half the time.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

LAST, FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
"""Permutations that move channels last, and back."""


class DoubleSizes(Pass):
    """Write a Resize by 2 between 8-bit quantizers as integer Adds, and AveragePool by 2 in float as Resize."""

    name: ClassVar[str] = "double_sizes"

    def run(self, graph: Graph, context: Context) -> PassResult:
        doubled = halved = 0
        for node in list(graph.nodes) if context.options.target.integer_layout else ():
            axis = _doubled_axis(node)
            if axis is not None:
                _double(graph, node, axis)
                doubled += 1
            elif _halves(node):
                factors = graph.constant("factors", np.asarray([1.0, 1.0, 0.5, 0.5], np.float32))
                node.op, node.attrs = "Resize", {"mode": "linear"}
                node.inputs = [node.inputs[0], Constant("", np.zeros(0, np.float32)), factors]
                halved += 1
        if doubled:
            graph.sort()
            for node in [n for n in graph.nodes if n.op == "Concat" and n.attrs["axis"] == 1]:
                _join_last(graph, node)
            graph.sort()
            _join_transposes(graph)
        return PassResult(modified=doubled + halved, report={"doubled": doubled, "halved": halved})


def _doubled_axis(node: Any) -> int | None:
    """2 or 3 where a node is a linear Resize by 2 along that axis of a picture, between uint8 quantizers."""
    if node.op != "Resize" or node.attrs.get("mode") != "linear" or len(node.inputs) < 3 \
            or not isinstance(node.inputs[2], Constant) \
            or node.attrs.get("coordinate_transformation_mode", "half_pixel") != "half_pixel":
        return None
    read, readers = node.inputs[0].inputs, node.outputs[0].outputs
    if not read or read[0].op != "DequantizeLinear" or np.dtype(read[0].inputs[2].dtype) != np.uint8 \
            or len(readers) != 1 or readers[0].op != "QuantizeLinear":
        return None
    return {(1.0, 1.0, 2.0, 1.0): 2, (1.0, 1.0, 1.0, 2.0): 3}.get(tuple(np.asarray(node.inputs[2].values).tolist()))


def _halves(node: Any) -> bool:
    """True for an AveragePool that halves a picture in float, of even height and width."""
    shape, attrs = node.inputs[0].shape, node.attrs
    return node.op == "AveragePool" and attrs.get("kernel_shape") == attrs.get("strides") == [2, 2] \
        and not any(attrs.get("pads", [])) and attrs.get("auto_pad", "NOTSET") == "NOTSET" \
        and all(d == 1 for d in attrs.get("dilations", [])) and len(shape) == 4 and not any(d % 2 for d in shape[2:]) \
        and not (node.inputs[0].inputs and node.inputs[0].inputs[0].op == "DequantizeLinear")


def _double(graph: Graph, node: Any, axis: int) -> None:
    read, write = node.inputs[0].inputs[0], node.outputs[0].outputs[0]
    count, channels, *sides = read.inputs[0].shape
    x = graph.add("Transpose", [read.inputs[0]], f"{node.name}_last", {"perm": LAST}, [count, *sides, channels],
                  np.uint8)
    place, length = axis - 1, sides[axis - 2]
    doubled = [*x.shape[:place], 2 * length, *x.shape[place + 1:]]
    near, side = np.divmod(np.arange(2 * length, dtype=np.int32), 2)
    far = np.clip(near + 2 * side - 1, 0, length - 1).astype(np.int32)
    scale = np.asarray(read.inputs[1].values, np.float32)
    terms = []
    for taken, part in ((near, 0.75), (far, 0.25)):
        integers = graph.add("Gather", [x, graph.constant("places", taken)], f"{node.name}_taken", {"axis": place},
                             doubled, np.uint8)
        terms.append(graph.add("DequantizeLinear", [
            integers, graph.constant("scale", scale * np.float32(part)), read.inputs[2]], f"{integers.name}_dq", {},
            doubled))
    total = graph.add("Add", terms, f"{node.name}_sum", {}, doubled)
    y = graph.add("QuantizeLinear", [total, *write.inputs[1:]], f"{node.name}_q", {}, doubled, np.uint8)
    written = write.outputs[0]
    if [r.op for r in written.outputs] == ["Clip"]:
        limits, written = written.outputs[0].inputs[1:], written.outputs[0].outputs[0]
        y = graph.add("Clip", [y, *limits], f"{node.name}_clip", {}, doubled, np.uint8)
    result = graph.add("Transpose", [y], f"{node.name}_first", {"perm": FIRST}, node.outputs[0].shape, np.uint8)
    graph.replace_uses(written, result)


def _join_last(graph: Graph, node: Any) -> None:
    """Join channels last where one part has them last already; parts that come from pictures are joined before."""
    def is_last(value: Any) -> bool:
        return bool(value.inputs) and value.inputs[0].op == "Transpose" and value.inputs[0].attrs["perm"] == FIRST

    if not any(map(is_last, node.inputs)):
        return
    parts: list[Any] = []
    plain = list[Any]()
    for value in [*node.inputs, None]:
        if value is not None and _is_plain(value):
            plain.append(value)
            continue
        if plain:
            shape = [*plain[0].shape[:1], sum(v.shape[1] for v in plain), *plain[0].shape[2:]]
            parts.append(plain[0] if len(plain) == 1 else graph.add(
                "Concat", plain, f"{node.name}_plain", {"axis": 1}, shape, np.uint8))
            plain = []
        if value is not None:
            parts.append(value)
    last = [graph.add("Transpose", [v], f"{node.name}_last", {"perm": LAST}, [v.shape[i] for i in LAST], np.uint8)
            for v in parts]
    y = node.outputs[0]
    joined = graph.add("Concat", last, f"{node.name}_joined", {"axis": 3}, [y.shape[i] for i in LAST], np.uint8)
    graph.replace_uses(y, graph.add("Transpose", [joined], f"{node.name}_first", {"perm": FIRST}, y.shape, np.uint8))


def _is_plain(value: Any) -> bool:
    """True for what is made of the model's inputs or constants without a layer between."""
    while value.inputs:
        node = value.inputs[0]
        if node.op not in ("QuantizeLinear", "DequantizeLinear", "AveragePool", "Expand"):
            return False
        value = node.inputs[0]
    return True


def _join_transposes(graph: Graph) -> None:
    """Drop pairs of Transposes that undo each other."""
    for node in list(graph.nodes):
        before = node.inputs[0].inputs[0] if node.op == "Transpose" and node.inputs[0].inputs else None
        if before is not None and before.op == "Transpose" \
                and [before.attrs["perm"][i] for i in node.attrs["perm"]] == sorted(node.attrs["perm"]):
            graph.replace_uses(node.outputs[0], before.inputs[0])
    graph.cleanup()
