"""Write what has no integer kernel as operators that have one, between the quantizers that stand around it.

A DequantizeLinear may read integers with another scale and zero point than they were written with. That costs nothing
at run time, and turns into integer kernels what would else run in float between a DQ and a Q:

    hardsigmoid(x) = sat(a x + b)         Mul by a, written with scale 1/256 and zero point 256 b: uint8 saturates
                                          where the function does; b comes back as it is read with zero point 0
    hardswish(x)   = x * hardsigmoid(x)
    tanh(x)        = 2 sigmoid(2x) - 1    Sigmoid of the same integers read with twice the scale; its result, written
                                          with scale 1/256, is read with scale 1/128 and zero point 128
    c - x          = c + (-x)             Mul by -1, exact in integers; c moves the zero point it is read with
    a - b          = a + (-b)
    resize by 2    one axis after the other, rounded between (passes/double_sizes.py writes each as two Adds); columns
                   are read with a scale 1 + 2^-11 times as large, rows with one 1 - 2^-11 times

The sums of a resize, 3/4 a + 1/4 b, lie in the middle between two steps once in four, and integer kernels round such
halves to even on x86 and otherwise on Arm. With these scales no sum is a half: those of columns go away from zero and
those of rows towards it, everywhere.

These stand in the graph before anything is learned: what is learned is learned for what will run.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from vmq.graph import Constant, Graph
from vmq.layers import doubled_axes, float_source
from vmq.pipeline import Context, Pass, PassResult

STEPS = 256
"""Steps of a function whose values lie between 0 and 1."""
OFF_HALF = 2.0 ** -11
"""By how much of itself a scale is moved: half a step by more than sums round, 255 steps by less than a quarter."""


class IntegerForms(Pass):
    """Write hard activations, Tanh, Sub and Resize by 2 as operators with integer kernels."""

    name: ClassVar[str] = "integer_forms"

    def run(self, graph: Graph, context: Context) -> PassResult:
        counts: dict[str, int] = {}
        for node in sorted(graph.nodes, key=lambda n: not _moves_scale(n)):    # before others copy that scale
            form = _FORMS.get(node.op) if node.op in context.options.target.forms else None
            if form is not None and form(graph, node):
                counts[node.op] = counts.get(node.op, 0) + 1
        if counts:
            graph.cleanup()
            graph.sort()
        return PassResult(modified=sum(counts.values()), report=counts)


def _hard_sigmoid(graph: Graph, node: Any) -> bool:
    """y = sat(alpha x + beta)."""
    read = _read(node.inputs[0])
    slope, offset = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
    if read is None or not 0.0 <= offset <= 1.0 or slope <= 0.0:
        return False
    _hand_on(graph, node, _gate(graph, node.inputs[0], slope, offset))
    return True


def _hard_swish(graph: Graph, node: Any) -> bool:
    """y = x * sat(x / 6 + 1 / 2)."""
    x = node.inputs[0]
    if _read(x) is None:
        return False
    node.op, node.inputs = "Mul", [x, _gate(graph, x, 1.0 / 6.0, 0.5)]
    return True


def _gate(graph: Graph, x: Any, slope: float, offset: float) -> Any:
    """sat(slope x + offset); where x is a product with a constant, that takes the slope in."""
    whole = _product(x)
    if whole is None:
        factor = _number(graph, slope)
    else:
        x, numbers = whole
        values = slope * np.asarray(numbers.values, np.float64)
        value, scale = graph.constant("slope", values.astype(np.float32)), float(values.max()) / 255.0
        factor = _dequantize(graph, _quantize(graph, value, scale, 0), scale, 0)
    product = graph.add("Mul", [x, factor], f"{x.name}_slope", shape=x.shape)
    written = _quantize(graph, product, 1.0 / STEPS, min(255, round(STEPS * offset)))
    return _dequantize(graph, written, 1.0 / STEPS, 0)


def _product(value: Any) -> tuple[Any, Any] | None:
    """A dequantized value and a positive constant whose product a value is that one node reads; None if it is none."""
    read = _read(value)
    write = read.inputs[0].inputs[0] if read is not None and read.inputs[0].inputs else None
    node = write.inputs[0].inputs[0] if write is not None and write.op == "QuantizeLinear" and write.inputs[0].inputs \
        else None
    if node is None or node.op != "Mul" or any(len(v.outputs) != 1 for v in (value, read.inputs[0], node.outputs[0])):
        return None
    numbers = float_source(node.inputs[1])
    return (node.inputs[0], numbers) if isinstance(numbers, Constant) and (numbers.values > 0.0).all() else None


def _tanh(graph: Graph, node: Any) -> bool:
    """y = 2 sigmoid(2 x) - 1."""
    read = _read(node.inputs[0])
    if read is None:
        return False
    twice = _dequantize(graph, read.inputs[0], 2.0 * _scale(read), _zero(read))
    result = graph.add("Sigmoid", [twice], f"{twice.name}_sigmoid", shape=twice.shape)
    _hand_on(graph, node, _dequantize(graph, _quantize(graph, result, 1.0 / STEPS, 0), 2.0 / STEPS, STEPS // 2))
    return True


def _sub(graph: Graph, node: Any) -> bool:
    """y = c - x with c one number, or y = a - b."""
    first, second = node.inputs
    read = _read(second)
    if read is None:
        return False
    constant = _one_number(first)
    if constant is None and _read(first) is None:
        return False
    if constant is not None:
        # the integer 255 - q, which -x is written as, is c - x if it is read with zero point 255 - zero - c / scale
        scale, zero = _scale(read), _zero(read)
        count = min(np.floor(constant / scale * (1.0 + 1e-6)), 255 - zero)
        if constant <= 0.0 or count < 1:
            return False
        if abs(count * scale - constant) > 1e-6 * constant:
            if any(r.op == "Mul" and _one_number(r.inputs[1]) == -1.0 for r in second.outputs):
                return False                   # another number has its steps already
            read.inputs[1].values = np.asarray(constant / count, np.float32)
    scale, zero = _scale(read), _zero(read)
    opposite = graph.add("Mul", [second, _number(graph, -1.0)], f"{second.name}_opposite", shape=second.shape)
    written = _quantize(graph, opposite, scale, 255 - zero)
    if constant is None:
        node.op, node.inputs = "Add", [first, _dequantize(graph, written, scale, 255 - zero)]
    else:
        _hand_on(graph, node, _dequantize(graph, written, scale, 255 - zero - round(constant / scale)))
    return True


def _moves_scale(node: Any) -> bool:
    """True for `c - x`, which fits the scale of x to c."""
    return node.op == "Sub" and _one_number(node.inputs[0]) is not None


def _resize(graph: Graph, node: Any) -> bool:
    """Columns, then rows, rounded between on the grid of what comes in; halves away from zero, then towards it."""
    x, y = node.inputs[0], node.outputs[0]
    read, axes = _read(x), doubled_axes(node)
    if read is None or not axes:
        return False
    integers, scale, zero = read.inputs[0], _scale(read), _zero(read)

    def inputs(integers: Any, axis: int) -> list[Any]:
        values = np.ones(4, np.float32)
        values[axis] = 2.0
        seen = _dequantize(graph, integers, scale * (1.0 + OFF_HALF if axis == 3 else 1.0 - OFF_HALF), zero)
        return [seen, Constant("", np.zeros(0, np.float32)), graph.constant("factors", values)]

    node.attrs.pop("coordinate_transformation_mode", None)      # half_pixel: where sides are doubled, they are the same
    if axes == (2, 3):
        columns = graph.add("Resize", inputs(integers, 3), f"{y.name}_columns", node.attrs, [*x.shape[:3], y.shape[3]])
        integers = _quantize(graph, columns, scale, zero)
    node.inputs = inputs(integers, axes[0])
    return True


_FORMS = {"HardSigmoid": _hard_sigmoid, "HardSwish": _hard_swish, "Tanh": _tanh, "Sub": _sub, "Resize": _resize}


def _read(value: Any) -> Any:
    """The DequantizeLinear of uint8 that gives a value, if it is one."""
    node = value.inputs[0] if value.inputs else None
    if node is None or node.op != "DequantizeLinear" or np.dtype(node.inputs[2].dtype) != np.uint8 \
            or node.inputs[1].values.size > 1:
        return None
    return node


def _hand_on(graph: Graph, node: Any, result: Any) -> None:
    """Let a dequantized value stand for a node's result, without the 8-bit quantizers that follow it."""
    y, maker, name = node.outputs[0], result.inputs[0], node.name
    graph.remove(node)
    maker.outputs[0], maker.name = y, name     # it takes over y and the node's name: it stands for the same
    for quantize in [r for r in y.outputs if r.op == "QuantizeLinear" and np.dtype(r.inputs[2].dtype) == np.uint8]:
        for dequantize in list(quantize.outputs[0].outputs):
            graph.replace_uses(dequantize.outputs[0], y)
    y.shape = y.shape or result.shape


def _quantize(graph: Graph, value: Any, scale: float, zero: int) -> Any:
    return graph.add("QuantizeLinear", [value, *_parameters(graph, scale, zero)], f"{value.name}_q", {}, value.shape,
                     np.uint8)


def _dequantize(graph: Graph, integers: Any, scale: float, zero: int) -> Any:
    return graph.add("DequantizeLinear", [integers, *_parameters(graph, scale, zero)], f"{integers.name}_dq", {},
                     integers.shape)


def _parameters(graph: Graph, scale: float, zero: int) -> list[Any]:
    return [graph.constant("scale", np.asarray(scale, np.float32)), graph.constant("zero", np.asarray(zero, np.uint8))]


def _number(graph: Graph, number: float) -> Any:
    """A quantized constant of one element, exact."""
    zero = 0 if number > 0.0 else 1            # -1 is the integer 0 under zero point 1
    scale = number / 255.0 if number > 0.0 else -number
    value = graph.constant("number", np.asarray(number, np.float32))
    return _dequantize(graph, _quantize(graph, value, scale, zero), scale, zero)


def _one_number(value: Any) -> float | None:
    return float(np.asarray(value.values).ravel()[0]) if isinstance(value, Constant) and value.values.size == 1 \
        else _one_number(value.inputs[0].inputs[0]) if value.inputs and value.inputs[0].op in (
            "QuantizeLinear", "DequantizeLinear") else None


def _scale(read: Any) -> float:
    return float(np.asarray(read.inputs[1].values).ravel()[0])


def _zero(read: Any) -> int:
    return int(np.asarray(read.inputs[2].values).ravel()[0])
