"""Write linear Resizes of floats, and means of their channels, as products of matrices.

A guided filter brings alpha to full size in float: beside a quantized network that is most of a frame's time. The
runtime computes a Resize and a mean one value at a time, a product of matrices many at a time. Along one axis

    u[f i + j] = (1 - t) x[i + k] + t x[i + k + 1]        k + t = (j + 1/2) / f - 1/2,  0 <= t < 1

so f b new values are a matrix [f b, b + 2] times b old ones and a neighbour on each side: one small matrix for all
blocks of an axis. Columns first, while there are few rows. Sums are those of the operators up to their own rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from passes.multiply_pixels import stays_float
from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

BLOCKS = range(16, 3, -1)
"""Values of an axis that are multiplied at a time: the largest of these that divides it."""
FEW = 16
"""Channels at most that are averaged by a product."""
SAID = {"mode", "coordinate_transformation_mode", "nearest_mode", "cubic_coeff_a"}
"""Attributes of a linear Resize that say nothing more of it."""


class MultiplyRows(Pass):
    """Write linear Resizes by whole factors and means of channels as products of matrices, where they stay float."""

    name: ClassVar[str] = "multiply_rows"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Leave in `context.found` the graph before floats are added up in another order."""
        found = [n for n in graph.nodes if context.options.target.integer_layout and (_factors(n) or _averages(n))
                 and stays_float(n.outputs[0])]
        if found:
            context.found.setdefault("float_sums", graph.copy())
        resized = sum(n.op == "Resize" for n in found)
        for node in found:
            x, y = node.inputs[0], node.outputs[0]
            if node.op == "ReduceMean":
                x = _average(graph, x, node.name)
            else:
                for axis, factor in sorted(_factors(node).items(), reverse=True):
                    x = _resize(graph, x, axis, factor, node.name)
            graph.remove(node)
            x.inputs[0].outputs[0] = y
        graph.sort()
        return PassResult(modified=len(found), report={"Resize": resized, "ReduceMean": len(found) - resized})


def _factors(node: Any) -> dict[int, int]:
    """By axis, the whole numbers that a linear Resize multiplies height and width with; none if it is another."""
    if node.op != "Resize" or node.attrs.get("mode") != "linear" or set(node.attrs) - SAID or not _known(node):
        return {}
    before, after = node.inputs[0].shape, node.outputs[0].shape
    scales = [n / o for n, o in zip(after, before, strict=True)]
    factors = {axis: int(scales[axis]) for axis in (2, 3) if scales[axis] != 1.0}
    how = node.attrs.get("coordinate_transformation_mode", "half_pixel")
    if not factors or scales[:2] != [1.0, 1.0] or any(s < 1.0 or s % 1.0 for s in scales) \
            or any(_block(before[axis]) is None for axis in factors) \
            or not (how == "half_pixel" or (how == "pytorch_half_pixel" and min(after[2:]) > 1)):
        return {}
    if len(node.inputs) == 3:                  # scales; sizes, where given instead, are the result's
        said = node.inputs[2]
        return factors if isinstance(said, Constant) and [float(s) for s in said.values] == scales else {}
    return factors


def _averages(node: Any) -> bool:
    """True for a mean over the channels of a picture."""
    if node.op != "ReduceMean" or not _known(node) or node.attrs.get("keepdims", 1) != 1:
        return False
    axes = node.inputs[1].values.tolist() if len(node.inputs) > 1 and isinstance(node.inputs[1], Constant) \
        else node.attrs.get("axes")
    return axes in ([1], [-3]) and node.inputs[0].shape[1] <= FEW


def _known(node: Any) -> bool:
    """Whether the sizes of the picture that a node reads, and of what it gives, are known."""
    return all(len(v.shape or ()) == 4 and all(isinstance(d, int) for d in v.shape)
               for v in (node.inputs[0], node.outputs[0]))


def _block(length: int) -> int | None:
    return next((b for b in BLOCKS if length % b == 0), None)


def _resize(graph: Graph, x: Any, axis: int, factor: int, name: str) -> Any:
    """x [N,C,H,W], `factor` times as long along an axis."""
    length, shape = x.shape[axis], list(x.shape)
    block = _block(length)
    assert block is not None
    count = length // block
    near = np.arange(0, length, block)[:, None] + np.arange(-1, block + 1)
    places = graph.constant("places", np.clip(near, 0, length - 1))
    matrix = _weights(block, factor)
    parts = [*shape[:axis], count, block + 2, *shape[axis + 1:]]
    taken = graph.add("Gather", [x, places], f"{name}_blocks", {"axis": axis}, parts)
    operands = [taken, graph.constant("weights", np.ascontiguousarray(matrix.T))] if axis == 3 else [
        graph.constant("weights", matrix), taken]
    parts[axis + 1] = block * factor
    product = graph.add("MatMul", operands, f"{name}_product", {}, parts)
    return _reshape(graph, product, [*shape[:axis], length * factor, *shape[axis + 1:]], name)


def _weights(block: int, factor: int) -> NDArray[np.float32]:
    """[factor * block, block + 2]: what each new value takes of the old ones and of one neighbour on either side."""
    places = (np.arange(block * factor) + 0.5) / factor + 0.5
    first = np.floor(places).astype(int)
    matrix = np.zeros((block * factor, block + 2))
    rows = np.arange(len(places))
    matrix[rows, first], matrix[rows, first + 1] = 1 - (places - first), places - first
    return matrix.astype(np.float32)


def _average(graph: Graph, x: Any, name: str) -> Any:
    count, channels, height, width = x.shape
    rows = _reshape(graph, x, [count, channels, height * width], name)
    weights = graph.constant("weights", np.full((1, channels), 1 / channels, np.float32))
    product = graph.add("MatMul", [weights, rows], f"{name}_product", {}, [count, 1, height * width])
    return _reshape(graph, product, [count, 1, height, width], name)


def _reshape(graph: Graph, value: Any, shape: Sequence[int], name: str) -> Any:
    return graph.add("Reshape", [value, graph.constant("shape", np.asarray(shape, np.int64))], f"{name}_rows", {},
                     list(shape))
