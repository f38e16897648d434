"""Let convolutions with few output channels compute several columns at a time.

The runtime's integer convolutions fill their registers with 32 or more output channels; with 16, as at full size in
RVM, they reach half the speed. A convolution of kernel k by k that computes 16 channels of every column computes the
same numbers as one of kernel k by k+1 that computes 32 of every second column: the second 16 are the weights moved one
column on. The result, channels last, lies in memory as before:

    [N, 2C, H, W/2] -> [N, H, W/2, 2C] -> [N, H, W, C] -> [N, C, H, W]

Where there are few input channels as well, four columns at a time are faster still.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from passes.double_sizes import FIRST, LAST
from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

FEW = 16
"""Output channels that are worth packing."""
SHALLOW = 16
"""Input channels up to which four columns at a time are faster than two: there, what a kernel does besides
multiplying is most of its time."""
WIDE = 128
"""Columns of the result from which on it is worth it."""


class PackColumns(Pass):
    """Compute two or four columns at a time where a wide convolution has 16 output channels or fewer."""

    name: ClassVar[str] = "pack_columns"

    def run(self, graph: Graph, context: Context) -> PassResult:
        packed = 0
        context.found[self.name] = graph.copy()        # integer kernels give the same bits; float sums round otherwise
        for node in list(graph.nodes):
            write = _written(graph, node) if context.options.target.integer_layout else None
            if write is not None:
                _pack(graph, node, write)
                packed += 1
        if packed:
            graph.cleanup()
            graph.sort()
        return PassResult(modified=packed)


def _written(graph: Graph, node: Any) -> Any:
    """The quantizer behind a convolution that suits, perhaps behind a Relu; None where none is."""
    if node.op != "Conv" or node.attrs.get("group", 1) != 1 or len(node.outputs[0].outputs) != 1 \
            or node.attrs.get("auto_pad", "NOTSET") != "NOTSET" or any(d != 1 for d in node.attrs.get("dilations", [])):
        return None
    if not all(v.inputs and v.inputs[0].op == "DequantizeLinear" for v in node.inputs):
        return None
    weight, shape = stored_integers(node.inputs[1].inputs[0]), node.outputs[0].shape
    if weight is None or weight.ndim != 4 or weight.shape[0] > FEW or weight.shape[3] < 2 or shape is None \
            or shape[3] < WIDE or shape[3] % 2:
        return None
    reader = node.outputs[0].outputs[0]
    if reader.op == "Relu" and len(reader.outputs[0].outputs) == 1:
        reader = reader.outputs[0].outputs[0]
    floats = (node.outputs[0], reader.inputs[0])
    return reader if reader.op == "QuantizeLinear" and not any(o is v for o in graph.outputs for v in floats) else None


def stored_integers(read: Any) -> NDArray[Any] | None:
    """The constant integers behind a DequantizeLinear, perhaps behind a Cast."""
    value = read.inputs[0]
    if value.inputs and value.inputs[0].op == "Cast":
        value = value.inputs[0].inputs[0]
    return np.asarray(value.values) if isinstance(value, Constant) else None


def _pack(graph: Graph, node: Any, write: Any) -> None:
    stride = node.attrs.get("strides", [1, 1])
    count, channels, height, width = node.outputs[0].shape
    together = 4 if node.inputs[0].shape[1] <= SHALLOW and width % 4 == 0 else 2
    for index, operand in enumerate(node.inputs[1:], 1):
        read = operand.inputs[0]
        source = read.inputs[0].inputs[0] if read.inputs[0].inputs else read
        integers = np.asarray(source.inputs[0].values)
        if index == 1:
            packed = np.concatenate([np.pad(integers, [(0, 0)] * 3 + [(n * stride[1], (together - 1 - n) * stride[1])])
                                     for n in range(together)])
            node.attrs["kernel_shape"] = list(packed.shape[2:])
        else:
            packed = np.concatenate([integers] * together)
        value = graph.constant(f"{source.inputs[0].name}_packed", packed)
        if source is not read:
            value = graph.add("Cast", [value], f"{source.outputs[0].name}_packed", source.attrs, packed.shape,
                              source.outputs[0].dtype)
        parameters = [p if p.values.size == 1 else graph.constant(
            f"{p.name}_packed", np.concatenate([p.values] * together)) for p in read.inputs[1:]]
        node.inputs[index] = graph.add("DequantizeLinear", [value, *parameters], f"{operand.name}_packed", read.attrs,
                                       packed.shape)
    node.attrs["strides"] = [stride[0], together * stride[1]]
    for value in {id(v): v for v in (node.outputs[0], write.inputs[0], write.outputs[0])}.values():
        value.shape = [count, together * channels, height, width // together]
    result = write.outputs[0]
    readers = list(result.outputs)
    graph.replace_uses(result, move_columns(graph, result, channels, result.name), readers)


def move_columns(graph: Graph, value: Any, channels: int, name: str) -> Any:
    """[N, C, H, W] with so many channels, and more or fewer columns: in memory, channels last, the same numbers."""
    count, before, height, width = value.shape
    shape = [count, height, width * before // channels, channels]
    last = graph.add("Transpose", [value], f"{name}_last", {"perm": LAST}, [count, height, width, before], value.dtype)
    moved = graph.add("Reshape", [last, graph.constant("shape", np.asarray([0, 0, -1, channels], np.int64))],
                      f"{name}_moved", {}, shape, value.dtype)
    return graph.add("Transpose", [moved], f"{name}_first", {"perm": FIRST}, [shape[i] for i in FIRST], value.dtype)
