"""Write a 1x1 convolution whose result stays float as a product of matrices: the model's last layer.

Between a DequantizeLinear and no quantizer a Conv runs in float, on channels first: all of the last large tensor is
transposed and made floats of before. A Gemm of quantized operands is an integer kernel that gives floats:

    Y[n, o] = sum_c X[n, c] W[c, o] + b[o]        n goes over pixels, channels last, as convolutions leave them

The runtime multiplies 16 columns at a time, so in wide pictures several pixels stand in a row, their weights on a
diagonal of blocks. Sums of integers are exact; what was rounded in float is not any more.
"""

from __future__ import annotations

from math import gcd
from typing import Any, ClassVar

import numpy as np

from passes.double_sizes import FIRST, LAST
from passes.pack_columns import WIDE, stored_integers
from vmq.graph import Graph
from vmq.layers import nodes_behind
from vmq.pipeline import Context, Pass, PassResult

COLUMNS = 16
"""Columns that the runtime multiplies at a time."""


class MultiplyPixels(Pass):
    """Multiply pixels by the weights of a 1x1 convolution in integers where its result stays float."""

    name: ClassVar[str] = "multiply_pixels"

    def run(self, graph: Graph, context: Context) -> PassResult:
        found = [n for n in graph.nodes if _suits(n)] if context.options.target.integer_layout else []
        if found:
            context.found.setdefault("float_sums", graph.copy())    # what follows rounds its sums once
            for node in found:
                _multiply(graph, node)
            graph.cleanup()
            graph.sort()
        return PassResult(modified=len(found))


def _suits(node: Any) -> bool:
    if node.op != "Conv" or node.attrs.get("group", 1) != 1 or any(d != 1 for d in node.attrs.get("strides", [])) \
            or any(node.attrs.get("pads", [])) or node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
        return False
    if not all(v.inputs and v.inputs[0].op == "DequantizeLinear" for v in node.inputs):
        return False
    weight, shape = stored_integers(node.inputs[1].inputs[0]), node.outputs[0].shape
    data = node.inputs[0].inputs[0]
    return weight is not None and weight.ndim == 4 and weight.shape[2:] == (1, 1) \
        and data.inputs[2].dtype == np.uint8 and all(v.inputs[0].inputs[0].dtype == t for v, t in zip(
            node.inputs[1:], (np.int8, np.int32), strict=False)) \
        and all(isinstance(d, int) for d in shape or ["?"]) and stays_float(node.outputs[0])


def stays_float(value: Any) -> bool:
    """True where nothing quantizes what a value becomes: a sum rounded otherwise changes no integer."""
    return all(n.op != "QuantizeLinear" for n in nodes_behind(value))


def _multiply(graph: Graph, node: Any) -> None:
    read, y = node.inputs[0].inputs[0], node.outputs[0]
    count, channels, height, width = node.inputs[0].shape
    results, pixels = y.shape[1], count * height * width
    together = gcd(max(1, COLUMNS // results), pixels) if width >= WIDE else 1
    last = graph.add("Transpose", [read.inputs[0]], f"{node.name}_last", {"perm": LAST},
                     [count, height, width, channels], np.uint8)
    rows = _reshape(graph, last, [pixels // together, together * channels])
    operands = [graph.add("DequantizeLinear", [rows, *read.inputs[1:]], f"{rows.name}_dq", {}, rows.shape)]
    for operand in node.inputs[1:]:
        source = operand.inputs[0]
        integers, cast = source.inputs[0], None
        if integers.inputs:
            cast = integers.inputs[0]
            integers = cast.inputs[0]
        values = np.asarray(integers.values)
        if values.ndim > 1:
            blocks = np.zeros((together, channels, together, results), values.dtype)
            blocks[np.arange(together), :, np.arange(together)] = values[:, :, 0, 0].T
            values, axis = blocks.reshape(together * channels, together * results), 1
        else:
            values, axis = np.tile(values, together), 0
        value = graph.constant(f"{integers.name}_pixels", values)
        if cast is not None:
            value = graph.add("Cast", [value], f"{cast.outputs[0].name}_pixels", cast.attrs, values.shape, np.int8)
        parameters = [p if p.values.ndim == 0 else graph.constant(f"{p.name}_pixels", np.tile(p.values, together))
                      for p in source.inputs[1:]]
        operands.append(graph.add("DequantizeLinear", [value, *parameters], f"{operand.name}_pixels", {"axis": axis},
                                  values.shape))
    product = graph.add("Gemm", operands, f"{node.name}_rows", {}, [pixels // together, together * results])
    apart = _reshape(graph, product, [count, height, width, results])
    name = node.name
    graph.remove(node)
    product.inputs[0].name = name
    graph.add("Transpose", [apart], y, {"perm": FIRST})


def _reshape(graph: Graph, value: Any, shape: list[int]) -> Any:
    return graph.add("Reshape", [value, graph.constant("shape", np.asarray(shape, np.int64))], f"{value.name}_rows", {},
                     shape, value.dtype)
