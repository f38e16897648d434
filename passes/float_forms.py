"""Write what stays float as operators that the runtime is fast with, where sums in another order change no integer.

A guided filter brings alpha to full size in float: beside a quantized network that is most of a frame's time. The
runtime computes a Resize or a mean one value at a time, a product of matrices many at a time.

    resize     along one axis u[f i + j] = (1 - t) x[i + k] + t x[i + k + 1], k + t = (j + 1/2) / f - 1/2, 0 <= t < 1:
               f b new values are a matrix [f b, b + 2] times b old ones and a neighbour on each side, the same matrix
               for all blocks of an axis; columns first, while there are few rows
    mean       of channels: a row of 1 / C times the channels
    residual   u x + b + x = (u + 1) x + b, and the 1 is added to u before it is resized
    depthwise  convolutions of a few channels, alike and independent, are one of all their channels: the runtime moves
               channels into blocks of 16 for each; the same bits
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from passes.multiply_pixels import stays_float
from vmq.graph import Constant, Graph
from vmq.layers import nodes_behind, whole_factors
from vmq.pipeline import Context, Pass, PassResult

BLOCKS = range(16, 3, -1)
"""Values of an axis that are multiplied at a time: the largest of these that divides it."""
BLOCK = 16
"""Channels that the runtime convolves at a time in float."""
FEW = 16
"""Channels at most that are averaged by a product."""


class FloatForms(Pass):
    """Write Resizes, means, residuals and depthwise layers that stay float as the runtime is fast with them."""

    name: ClassVar[str] = "float_forms"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Leave in `context.found` the graph before floats are added up in another order."""
        joined = _join_depthwise(graph) if context.options.target.integer_layout else 0
        found = [n for n in graph.nodes if context.options.target.integer_layout
                 and (_factors(n) or _averages(n)) and stays_float(n.outputs[0])]
        if found:
            context.found.setdefault("float_sums", graph.copy())
        counts = dict.fromkeys(("Resize", "ReduceMean", "Add"), 0)
        for node in found:
            counts[node.op] += 1
            x, y = node.inputs[0], node.outputs[0]
            if node.op == "Resize":
                if _absorbs_residual(graph, node):
                    one = graph.constant("one", np.asarray(1.0, np.float32))
                    x = graph.add("Add", [x, one], f"{x.name}_plus", {}, x.shape)
                    counts["Add"] += 1
                for axis, factor in sorted(_factors(node).items(), reverse=True):
                    x = _resize(graph, x, axis, factor, node.name)
            else:
                x = _average(graph, x, node.name)
            graph.remove(node)
            x.inputs[0].outputs[0] = y
        if found:
            graph.cleanup()
            graph.sort()
        return PassResult(modified=sum(counts.values()) + joined, report={**counts, "Conv": joined})


def _factors(node: Any) -> dict[int, int]:
    """By axis, the whole numbers that a linear Resize multiplies height and width with; none where it has no blocks."""
    factors = whole_factors(node)
    return factors if all(_block(node.inputs[0].shape[axis]) for axis in factors) else {}


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


def _absorbs_residual(graph: Graph, resize: Any) -> bool:
    """Take x out of u x + b + x, u what a Resize gives; False where that is not what is computed."""
    product = _only_reader(graph, resize.outputs[0], "Mul")
    total = product and _only_reader(graph, product.outputs[0], "Add")
    last = total and _only_reader(graph, total.outputs[0], "Add")
    if not last:
        return False
    (x,) = [v for v in product.inputs if v is not resize.outputs[0]] or [None]
    if not any(v is x for v in last.inputs) or list(x.shape or ()) != list(resize.outputs[0].shape):
        return False
    graph.replace_uses(last.outputs[0], total.outputs[0])
    return True


def _join_depthwise(graph: Graph) -> int:
    """Let depthwise float convolutions that are alike, and none of which reads another, be one; how many there were."""
    alike: dict[str, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "Conv" and len(node.inputs) == 2 and isinstance(node.inputs[1], Constant) and _known(node) \
                and node.inputs[1].values.shape[:2] == (node.attrs.get("group", 1), 1) == (node.inputs[0].shape[1], 1):
            settings = {k: v for k, v in node.attrs.items() if k != "group"}
            alike.setdefault(repr((sorted(settings.items()), node.inputs[0].shape[0], node.inputs[0].shape[2:],
                                   node.inputs[1].values.shape[2:])), []).append(node)
    count = 0
    for nodes in alike.values():
        behind = {id(n) for node in nodes for n in nodes_behind(node.outputs[0])}
        nodes = [n for n in nodes if id(n) not in behind]
        sizes = [n.inputs[0].shape[1] for n in nodes]
        if len(nodes) < 2 or sum(sizes) > BLOCK:
            continue
        first = nodes[0]
        shape = [first.inputs[0].shape[0], sum(sizes), *first.inputs[0].shape[2:]]
        x = graph.add("Concat", [n.inputs[0] for n in nodes], f"{first.name}_joined", {"axis": 1}, shape)
        weight = graph.constant("weights", np.concatenate([n.inputs[1].values for n in nodes]))
        y = graph.add("Conv", [x, weight], f"{first.name}_together", {**first.attrs, "group": sum(sizes)},
                      [shape[0], sum(sizes), *first.outputs[0].shape[2:]])
        parts = [n.outputs[0] for n in nodes]
        for node in nodes:
            graph.remove(node)
        split = graph.add("Split", [y, graph.constant("sizes", np.asarray(sizes, np.int64))], parts[0], {"axis": 1})
        split.inputs[0].outputs.extend(parts[1:])
        count += len(nodes)
    if count:
        graph.sort()
    return count


def _only_reader(graph: Graph, value: Any, op: str) -> Any:
    """The node of one kind that alone reads a value, if there is one."""
    alone = len(value.outputs) == 1 and value.outputs[0].op == op and not any(o is value for o in graph.outputs)
    return value.outputs[0] if alone else None


def _resize(graph: Graph, x: Any, axis: int, factor: int, name: str) -> Any:
    """x [N,C,H,W], `factor` times as long along an axis."""
    length, shape = x.shape[axis], list(x.shape)
    block = _block(length)
    assert block is not None
    blocks = [*shape[:axis], length // block, block, *shape[axis + 1:]]
    starts = np.arange(0, length, block)[:, None]

    def taken(places: NDArray[Any]) -> Any:
        places = np.clip(places, 0, length - 1)
        return graph.add("Gather", [x, graph.constant("places", places)], f"{name}_blocks", {"axis": axis},
                         [*shape[:axis], *places.shape, *shape[axis + 1:]])

    weights = _weights(block, factor)
    if axis == 3:                              # single values are slow to gather: neighbours alone are
        parts = [taken(starts - 1), _reshape(graph, x, blocks, name), taken(starts + block)]
        joined = graph.add("Concat", parts, f"{name}_blocks", {"axis": 4}, [*blocks[:4], block + 2])
        operands = [joined, graph.constant("weights", np.ascontiguousarray(weights.T))]
    else:
        operands = [graph.constant("weights", weights), taken(starts + np.arange(-1, block + 1))]
    blocks[axis + 1] = block * factor
    product = graph.add("MatMul", operands, f"{name}_product", {}, blocks)
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
