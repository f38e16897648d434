"""Split channels before what is done to each alone, where tensors are still small.

RVM's refiner multiplies and adds at full size, four channels at once: the picture and its mean are joined for it,
foreground and alpha split off behind it. Channel for channel it is the same to split first:

    Split(x * a + b)  =  Split(x) * Split(a) + Split(b)        Split(Resize(a))  =  Resize(Split(a))

Where x is a Concat of just these parts, neither is needed, and a and b are split before they are resized. What goes
over a full-size tensor without computing anything is gone; every value is the same bits.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

CHANNELWISE = frozenset({"Add", "Sub", "Mul", "Div"})
SMALLER = 2
"""What is split instead has at most one in so many of the pixels."""


class SplitEarly(Pass):
    """Split channels before elementwise operators and Resize, where what is split then is smaller, or was joined."""

    name: ClassVar[str] = "split_early"

    def run(self, graph: Graph, context: Context) -> PassResult:
        moved = 0
        for node in list(graph.nodes):
            if node.op == "Split" and node.attrs.get("axis", 0) == 1 and all(
                    _is_static(v) for v in (node.inputs[0], *node.outputs)):
                parts = _Parts(graph, node)
                if parts.exist(node.inputs[0]):
                    for old, new in zip(list(node.outputs), parts.of(node.inputs[0]), strict=True):
                        graph.replace_uses(old, new)
                    moved += 1
        if moved:
            graph.cleanup()
            graph.sort()
        return PassResult(modified=moved)


class _Parts:
    """The parts that a Split gives, had without splitting anything nearly as large as what it splits."""

    def __init__(self, graph: Graph, split: Any) -> None:
        self.graph, self.whole = graph, split.inputs[0]
        self.sizes = [v.shape[1] for v in split.outputs]
        self.made: dict[int, list[Any]] = {}

    def exist(self, value: Any) -> bool:
        """Whether the parts of a value can be had."""
        if self._ends_at(value):
            return True
        node = value.inputs[0] if _is_static(value) and value.inputs else None
        if node is None or len(value.outputs) != 1 or any(o is value for o in self.graph.outputs):
            return False
        if node.op in CHANNELWISE:
            return all(self.exist(v) for v in node.inputs)
        return _resizes(node) and self.exist(node.inputs[0])

    def of(self, value: Any) -> list[Any]:
        """The parts of a value for which they `exist`."""
        if id(value) not in self.made:
            self.made[id(value)] = self._cut(value) if self._ends_at(value) else self._again(value)
        return self.made[id(value)]

    def _ends_at(self, value: Any) -> bool:
        """True for what is cut itself, or need not be: constants, one channel for all, joined parts, small tensors."""
        return isinstance(value, Constant) or (_is_static(value) and (
            value.shape[1] == 1 or self._joins(value) or SMALLER * _pixels(value) <= _pixels(self.whole)))

    def _joins(self, value: Any) -> bool:
        """True for a Concat of just these parts."""
        node = value.inputs[0] if value.inputs else None
        return node is not None and node.op == "Concat" and node.attrs["axis"] == 1 \
            and all(_is_static(v) for v in node.inputs) and [v.shape[1] for v in node.inputs] == self.sizes

    def _cut(self, value: Any) -> list[Any]:
        if isinstance(value, Constant):
            whole = np.asarray(value.values)
            if whole.ndim < 3 or whole.shape[-3] == 1:
                return [value] * len(self.sizes)
            parts = np.split(whole, np.cumsum(self.sizes)[:-1], axis=-3)
            return [self.graph.constant(f"{value.name}_part", part) for part in parts]
        if value.shape[1] == 1:
            return [value] * len(self.sizes)
        if self._joins(value):
            return list(value.inputs[0].inputs)
        shapes = self._shapes(value)
        first = self.graph.add("Split", [value, self.graph.constant("sizes", np.asarray(self.sizes, np.int64))],
                               f"{value.name}_part", {"axis": 1}, shapes[0], value.dtype)
        maker = first.inputs[0]
        maker.outputs += [type(first)(self.graph.unique(f"{value.name}_part"), dtype=first.dtype, shape=shape)
                          for shape in shapes[1:]]
        return list(maker.outputs)

    def _again(self, value: Any) -> list[Any]:
        """What makes the value, for each part."""
        node, parts = value.inputs[0], []
        operands = [self.of(v) for v in (node.inputs if node.op in CHANNELWISE else node.inputs[:1])]
        for place, shape in enumerate(self._shapes(value)):
            inputs = [o[place] for o in operands] + list(node.inputs[len(operands):])
            if node.op == "Resize" and len(inputs) == 4:
                inputs[3] = self.graph.constant("size", np.asarray(shape, np.int64))
            parts.append(self.graph.add(node.op, inputs, f"{value.name}_part", node.attrs, shape, value.dtype))
        return parts

    def _shapes(self, value: Any) -> list[list[int]]:
        return [[value.shape[0], size, *value.shape[2:]] for size in self.sizes]


def _is_static(value: Any) -> bool:
    return len(value.shape or ()) == 4 and all(isinstance(d, int) for d in value.shape)


def _pixels(value: Any) -> int:
    return int(value.shape[2] * value.shape[3])


def _resizes(node: Any) -> bool:
    """True for a Resize of height and width by constants."""
    return node.op == "Resize" and "axes" not in node.attrs and _is_static(node.inputs[0]) \
        and all(isinstance(v, Constant) for v in node.inputs[1:] if v.name) \
        and list(node.inputs[0].shape[:2]) == list(node.outputs[0].shape[:2])
