"""Give convolutions as many channels as the runtime's integer kernels take at a time, by channels of zeros.

ONNX Runtime's integer convolutions take four input channels at a time, its depthwise ones sixteen; with 35 instead of
36, RVM's most expensive one is about five times slower, and a depthwise one of 72 takes twice the time of one of 80.
The picture and all four of RVM's decoder concats, which end in it, are one channel short. A channel of zeros under
weights of zero changes no value. In front of a concat it is written as an Expand of one number, which the runtime
computes once at load; around depthwise convolutions it is rows of zeros in the weights that make the channels and
columns of zeros in those that read them, with everything between as it was.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult

MULTIPLE = 4
"""Input channels that an integer convolution takes at a time."""
DEPTHWISE = 16
"""Channels that a depthwise one takes at a time."""
CHANNELWISE = frozenset({"Relu", "LeakyRelu", "HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Clip", "Mul", "Add",
                         "GlobalAveragePool"})
"""Operators that treat every channel alike and on its own; a Clip's bounds are no channels."""


class AlignChannels(Pass):
    """Add channels of zeros: to a multiple of four for pictures and concats, of sixteen around depthwise layers."""

    name: ClassVar[str] = "align_channels"

    def run(self, graph: Graph, context: Context) -> PassResult:
        if not context.options.target.integer_layout:
            return PassResult()
        made: dict[tuple[int, int, int], Any] = {}    # constants before and after: what was shared stays shared
        for node in list(graph.nodes):
            if node.op == "Conv" and _takes_channels(node, node.inputs[0]):
                _join_nothing(graph, node.inputs[0])
        concats = sum(_widen_concat(graph, n, made) for n in list(graph.nodes) if n.op == "Concat")
        groups = sum(_widen_depthwise(graph, n, made) for n in list(graph.nodes) if _is_depthwise(n))
        if concats + groups:
            graph.sort()
        return PassResult(modified=concats + groups, report={"concats": concats, "depthwise": groups})


def _join_nothing(graph: Graph, value: Any) -> None:
    """Put a Concat of nothing else behind a picture of few channels that convolutions read."""
    shape = list(value.shape or [])
    if len(shape) == 4 and all(isinstance(d, int) for d in shape) and shape[1] < MULTIPLE and _is_picture(value):
        readers = [r for r in value.outputs if _takes_channels(r, value)]
        graph.replace_uses(value, graph.add("Concat", [value], f"{value.name}_aligned", {"axis": 1}, shape), readers)


def _is_picture(value: Any) -> bool:
    """True for what is made of a model input and constants, operator by operator: scaled, shifted, resized."""
    while value.inputs:
        node = value.inputs[0]
        data = [v for v in node.inputs if v.name and not isinstance(v, Constant)]
        if len(data) != 1 or node.op in ("Conv", "ConvTranspose"):
            return False
        value = data[0]
    return not isinstance(value, Constant)


def _widen_concat(graph: Graph, concat: Any, made: dict[tuple[int, int, int], Any]) -> bool:
    """Widen a Concat in front of convolutions."""
    joined = concat.outputs[0]
    shape: list[Any] = list(joined.shape or [])
    if concat.attrs.get("axis") != 1 or len(shape) != 4 or not all(isinstance(d, int) for d in shape) \
            or shape[1] % MULTIPLE == 0 or any(o is joined for o in graph.outputs) or not joined.outputs \
            or not all(_takes_channels(reader, joined) for reader in joined.outputs):
        return False
    missing = -shape[1] % MULTIPLE
    fill = [shape[0], missing, *shape[2:]]
    zeros = graph.add("Expand", [graph.constant("nothing", np.zeros((1, 1, 1, 1), np.float32)),
                                 graph.constant("fill", np.asarray(fill, np.int64))], "zeros", shape=fill)
    concat.inputs.append(zeros)
    joined.shape = [shape[0], shape[1] + missing, *shape[2:]]
    for reader in joined.outputs:
        _pad(graph, reader, 1, 1, missing, made)
    return True


def _widen_depthwise(graph: Graph, node: Any, made: dict[tuple[int, int, int], Any]) -> bool:
    """Widen all that shares its channels with a depthwise convolution, from the layers that make them on."""
    channels = node.inputs[1].shape[0]
    missing = -channels % DEPTHWISE
    if not missing or missing > channels // 2:         # more zeros than they are worth
        return False
    shared: dict[int, Any] = {}
    makers, readers, groups = dict[int, Any](), dict[int, Any](), dict[int, Any]()
    todo = [node.inputs[0], node.outputs[0]]
    while todo:
        value = todo.pop()
        if id(value) in shared:
            continue
        if isinstance(value, Constant) or not value.inputs or any(o is value for o in graph.outputs) \
                or len(value.shape or ()) != 4 or value.shape[1] != channels:
            return False
        shared[id(value)] = value
        for other in (*value.inputs, *value.outputs):
            if _is_depthwise(other):
                groups[id(other)] = other
                todo += [other.inputs[0], other.outputs[0]]
            elif other.op in CHANNELWISE:
                todo += [v for v in other.inputs[:1 if other.op == "Clip" else None] if v.name] + list(other.outputs)
            elif _takes_channels(other, value):
                readers[id(other)] = other
            elif other is value.inputs[0] and _makes_channels(other):
                makers[id(other)] = other
            else:
                return False
    for maker in (*makers.values(), *groups.values()):
        for index in range(1, len(maker.inputs)):
            _pad(graph, maker, index, 0, missing, made)
    for group in groups.values():
        group.attrs["group"] = channels + missing
    for reader in readers.values():
        _pad(graph, reader, 1, 1, missing, made)
    for value in shared.values():
        value.shape = [value.shape[0], channels + missing, *value.shape[2:]]
    return True


def _pad(graph: Graph, node: Any, index: int, axis: int, missing: int, made: dict[tuple[int, int, int], Any]) -> None:
    """Add zeros at the end of an axis of a constant that a node reads."""
    constant = node.inputs[index]
    key = (id(constant), axis, missing)
    if key not in made:
        values = np.asarray(constant.values)
        widths = [(0, missing if a == axis else 0) for a in range(values.ndim)]
        made[key] = constant, graph.constant(f"{constant.name}_aligned", np.pad(values, widths))
    node.inputs[index] = made[key][1]


def _is_depthwise(node: Any) -> bool:
    return node.op == "Conv" and all(isinstance(v, Constant) for v in node.inputs[1:]) \
        and node.attrs.get("group", 1) == node.inputs[1].shape[0] > 1


def _takes_channels(node: Any, value: Any) -> bool:
    """True for an ordinary convolution of `value` whose weight can be widened."""
    return node.op == "Conv" and node.inputs[0] is value and node.attrs.get("group", 1) == 1 \
        and isinstance(node.inputs[1], Constant) and all(v is not value for v in node.inputs[1:])


def _makes_channels(node: Any) -> bool:
    """True for an ordinary convolution that can make more channels."""
    return node.op == "Conv" and node.attrs.get("group", 1) == 1 \
        and all(isinstance(v, Constant) for v in node.inputs[1:])
