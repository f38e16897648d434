"""Random matting networks, recurrent and feed-forward, whose states and closures are known because they were built.

A network is a stem, encoder layers and recurrent cells in any order, a decoder and a head. What varies: kinds of
layers (convolutions, and tokens as in transformers), of cells and of states (rank 1 to 5, handed on through Identity
and Cast, one that counts frames), opset 11 to 23, free sizes, float16 inside or everywhere, and where constants are
kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

T = TypeVar("T")
Pick = Callable[[Sequence[Any]], Any]

SIZE = (32, 48)


@dataclass
class Network:
    """A network and what is known about it.

    Attributes:
        proto: the model.
        states: its states, {input: output}.
        pairs: those of them that the graph does not tell, and so have to be given by hand.
        closures: the names of the nodes that update each state, by the name of the input.
        features: what it is made of, for messages.
    """

    proto: onnx.ModelProto
    states: dict[str, str]
    pairs: dict[str, str]
    closures: dict[str, set[str]]
    features: list[str]


@dataclass
class _Value:
    """A tensor [1, C, H / stride, W / stride], and the nodes that nothing else than its reader needs."""

    name: str
    channels: int
    stride: int = 1
    own: list[str] = field(default_factory=list)


class _Builder:
    def __init__(self, pick: Pick, seed: int, opset: int, *, dynamic: bool) -> None:
        self.pick, self.opset, self.dynamic = pick, opset, dynamic
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.states: dict[str, str] = {}
        self.pairs: dict[str, str] = {}
        self.closures: dict[str, set[str]] = {}
        self.features: list[str] = []
        self.shared: dict[tuple[int, ...], str] = {}

    # -- pieces -------------------------------------------------------------------------------------

    def op(self, kind: str, inputs: Sequence[str], outputs: int = 1, **attrs: Any) -> Any:
        number = len(self.nodes)
        names = [f"v{number}_{k}" for k in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=f"n{number}", **attrs))
        return names[0] if outputs == 1 else names

    def constant(self, values: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(values, dtype)
        return name

    def weight(self, *shape: int, fan: int, share: bool = False) -> str:
        """Random weights that keep the size of a signal; with `share`, one constant for all of a shape."""
        if share and shape in self.shared:
            self.features.append("shared")
            return self.shared[shape]
        name = self.constant(self.rng.normal(size=shape) * np.sqrt(1.5 / fan))
        if share:
            self.shared[shape] = name
        return name

    def bias(self, count: int) -> str:
        return self.constant(0.1 * self.rng.normal(size=count))

    def along(self, kind: str, value: str, axes: Sequence[int], **attrs: Any) -> str:
        """Squeeze, Unsqueeze, ReduceMean: axes are an attribute in older opsets."""
        since = 18 if kind == "ReduceMean" else 13
        if self.opset < since:
            return str(self.op(kind, [value], axes=list(axes), **attrs))
        return str(self.op(kind, [value, self.constant(axes, np.int64)], **attrs))

    def split(self, value: str, parts: int, size: int) -> list[str]:
        if self.opset < 13:
            names = self.op("Split", [value], parts, axis=1, split=[size] * parts)
        else:
            names = self.op("Split", [value, self.constant([size] * parts, np.int64)], parts, axis=1)
        return list(names)

    def conv(self, value: str, channels_in: int, channels: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1,
             group: int = 1, share: bool = False, bias: bool = True) -> str:
        fan = channels_in // group * kernel**2
        weight = self.weight(channels, channels_in // group, kernel, kernel, fan=fan, share=share)
        pad = dilation * (kernel // 2)
        return str(self.op("Conv", [value, weight, *([self.bias(channels)] if bias else [])], strides=[stride] * 2,
                           dilations=[dilation] * 2, pads=[pad] * 4, group=group, kernel_shape=[kernel] * 2))

    def norm(self, value: str, channels: int) -> str:
        self.features.append("batchnorm")
        return str(self.op("BatchNormalization", [
            value, self.constant(self.rng.uniform(0.7, 1.3, channels)), self.bias(channels), self.bias(channels),
            self.constant(self.rng.uniform(0.5, 1.5, channels))], epsilon=1e-3))

    def activation(self, value: str, channels: int) -> str:
        kind = self.pick(["Relu", "HardSwish", "Clip", "LeakyRelu", "PRelu", "Sigmoid", "Elu", "Swish"])
        self.features.append(kind)
        if kind == "HardSwish" and self.opset < 14:
            return str(self.op("Mul", [value, self.op("HardSigmoid", [value], alpha=1 / 6, beta=0.5)]))
        if kind == "Swish":
            return str(self.op("Mul", [value, self.op("Sigmoid", [value])]))
        if kind == "Clip":
            return str(self.op("Clip", [value, self.constant(0.0), self.constant(6.0)]))
        if kind == "PRelu":
            return str(self.op("PRelu", [value, self.constant(self.rng.uniform(0, 0.3, (channels, 1, 1)))]))
        return str(self.op(kind, [value]))

    # -- layers -------------------------------------------------------------------------------------

    def layer(self, x: _Value) -> _Value:
        """A layer of any kind; `own` are the nodes from its last multiply-add on."""
        kind = self.pick(["conv", "depthwise", "grouped", "dilated", "residual", "squeeze", "down", "norm", "pool",
                          "pooled", "attention", "transposed", "tokens", "tokens"])
        self.features.append(kind)
        c, stride = x.channels, x.stride
        if kind == "squeeze":
            gate = self.op("GlobalAveragePool", [x.name])
            gate = self.op("Relu", [self.conv(gate, c, 4, 1)])
            gate = self.op(self.pick(["Sigmoid", "HardSigmoid"]), [self.conv(gate, 4, c, 1)])
            return _Value(self.op("Mul", [x.name, gate]), c, stride)
        if kind in ("pool", "pooled"):
            pool = self.pick(["MaxPool", "AveragePool"])
            same = self.op(pool, [x.name], kernel_shape=[3, 3], strides=[1, 1], pads=[1, 1, 1, 1])
            return _Value(self.op("Concat", [x.name, same], axis=1), 2 * c, stride) if kind == "pool" else \
                _Value(same, c, stride)
        if kind == "attention" and not self.dynamic:
            return self.attention(x)
        if kind == "tokens":
            return self.tokens(x)
        if kind == "residual":
            y = self.op("Relu", [self.conv(x.name, c, c, share=True)])
            return _Value(self.op("Add", [x.name, self.conv(y, c, c, share=True)]), c, stride)
        if kind == "transposed" and stride > 1:
            group, kernel = self.pick([1, 2]) if c % 2 == 0 else 1, self.pick([2, 4])
            weight = self.weight(c, 6 // group, kernel, kernel, fan=c // group * (kernel // 2)**2)
            y = self.op("ConvTranspose", [x.name, weight], strides=[2, 2], kernel_shape=[kernel] * 2, group=group,
                        pads=[kernel // 2 - 1] * 4)
            return _Value(self.op("Relu", [self.norm(y, 6)]), 6, stride // 2)
        first = len(self.nodes)
        if kind == "depthwise":
            y = self.conv(self.op("Relu", [self.conv(x.name, c, c, group=c)]), c, 8, 1)
            return _Value(y, 8, stride, [self.nodes[-1].name])
        if kind == "grouped" and c % 2 == 0:
            y, channels = self.conv(x.name, c, 8, group=2, dilation=self.pick([1, 2])), 8
        elif kind == "dilated":
            y, channels = self.conv(x.name, c, 6, dilation=2), 6
        elif kind == "down" and stride < 4:
            y, channels, stride = self.conv(x.name, c, 8, stride=2), 8, 2 * stride
        else:
            y, channels = self.conv(x.name, c, 7), 7
        if kind == "norm":
            y = self.norm(y, channels)
        y = self.activation(y, channels)
        return _Value(y, channels, stride, [n.name for n in self.nodes[first:]])

    def attention(self, x: _Value) -> _Value:
        """Attention over rows: [1, C, H, W] as C x H tokens of W."""
        width = SIZE[1] // x.stride
        q, k = (self.conv(x.name, x.channels, x.channels, 1) for _ in range(2))
        turned = self.op("Transpose", [k], perm=[0, 1, 3, 2])
        scores = self.op("Mul", [self.op("MatMul", [q, turned]), self.constant(width**-0.5)])
        y = self.op("MatMul", [self.op("Softmax", [scores], axis=-1 if self.opset >= 13 else 3), x.name])
        return _Value(self.op("Add", [x.name, y]), x.channels, x.stride)

    def tokens(self, x: _Value) -> _Value:
        """A layer of a transformer: [1, C, H, W] as H x W tokens of C, normalized, a branch, a residual, and back."""
        c, kind = x.channels, self.pick(["mlp", "self attention"])
        self.features.append(kind)
        rows = self.rows(x.name, c)
        norm = self.layer_norm(rows, c)
        if kind == "mlp":
            y = self.linear(self.gelu(self.linear(norm, c, 2 * c)), 2 * c, c)
        else:
            few = self.rows(self.op("AveragePool", [x.name], kernel_shape=[8, 8], strides=[8, 8]), c)
            y = self.self_attention(norm, self.layer_norm(few, c), c)
        y = self.op("Transpose", [self.op("Add", [rows, y])], perm=[0, 2, 1])
        shape = [1, c, SIZE[0] // x.stride, SIZE[1] // x.stride]
        told = self.op("Shape", [x.name]) if self.dynamic else self.constant(shape, np.int64)
        return _Value(self.op("Reshape", [y, told]), c, x.stride)

    def rows(self, value: str, channels: int) -> str:
        """[1, C, H, W] to [1, H x W, C]."""
        flat = self.op("Reshape", [value, self.constant([1, channels, -1], np.int64)])
        return str(self.op("Transpose", [flat], perm=[0, 2, 1]))

    def linear(self, value: str, channels_in: int, channels: int) -> str:
        y = self.op("MatMul", [value, self.weight(channels_in, channels, fan=channels_in)])
        return str(self.op("Add", [self.bias(channels), y]))

    def self_attention(self, x: str, few: str, channels: int) -> str:
        """All tokens look at few of them, with one head or two."""
        heads = 2 if channels % 2 == 0 else 1
        split = [1, -1, heads, channels // heads]
        q, k, v = (self.op("Transpose", [self.op("Reshape", [self.linear(t, channels, channels),
                                                            self.constant(split, np.int64)])], perm=perm)
                   for t, perm in ((x, [0, 2, 1, 3]), (few, [0, 2, 3, 1]), (few, [0, 2, 1, 3])))
        scores = self.op("Div", [self.op("MatMul", [q, k]), self.constant((channels // heads)**0.5)])
        y = self.op("MatMul", [self.op("Softmax", [scores], axis=-1 if self.opset >= 13 else 3), v])
        y = self.op("Reshape", [self.op("Transpose", [y], perm=[0, 2, 1, 3]),
                                self.constant([1, -1, channels], np.int64)])
        return self.linear(y, channels, channels)

    def layer_norm(self, value: str, channels: int) -> str:
        """LayerNormalization over the last axis: an operator since opset 17, many before."""
        scale, bias = self.constant(self.rng.uniform(0.7, 1.3, channels)), self.bias(channels)
        if self.opset >= 17 and self.pick([True, False]):
            self.features.append("LayerNormalization")
            return str(self.op("LayerNormalization", [value, scale, bias], axis=-1, epsilon=1e-5))
        off = self.op("Sub", [value, self.along("ReduceMean", value, [-1])])
        variance = self.along("ReduceMean", self.op("Pow", [off, self.constant(2.0)]), [-1])
        deviation = self.op("Sqrt", [self.op("Add", [variance, self.constant(1e-5)])])
        return str(self.op("Add", [self.op("Mul", [self.op("Div", [off, deviation]), scale]), bias]))

    def gelu(self, value: str) -> str:
        """GELU: an operator since opset 20, several before."""
        if self.opset >= 20 and self.pick([True, False]):
            return str(self.op("Gelu", [value]))
        erf = self.op("Erf", [self.op("Div", [value, self.constant(2**0.5)])])
        return str(self.op("Mul", [self.op("Mul", [value, self.op("Add", [erf, self.constant(1.0)])]),
                                   self.constant(0.5)]))

    def joined(self, a: _Value, b: _Value) -> _Value:
        """Both, at the resolution of the first."""
        name = b.name
        if b.stride > a.stride:
            name = self.up(b.name, b.stride // a.stride)
        elif b.stride < a.stride:
            name = self.op("AveragePool", [name], kernel_shape=[a.stride // b.stride] * 2,
                           strides=[a.stride // b.stride] * 2)
        return _Value(self.op("Concat", [a.name, name], axis=1), a.channels + b.channels, a.stride)

    def up(self, value: str, factor: int) -> str:
        scales = self.constant([1, 1, factor, factor])
        roi = self.constant([]) if self.opset < 13 else ""
        how = self.pick([{"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
                         {"mode": "linear", "coordinate_transformation_mode": "half_pixel"}])
        return str(self.op("Resize", [value, roi, scales], **how))

    # -- states -------------------------------------------------------------------------------------

    def state(self, shape: Sequence[int], stride: int) -> tuple[str, Callable[[str], None], set[str]]:
        """A state of such a shape: the value to read, what to call with the new one, and the closure to fill."""
        number = len(self.states)
        name, result = f"r{number}", f"s{number}"
        closure: set[str] = set()
        self.states[name], self.closures[name] = result, closure
        way = self.pick(["plain", "identity", "half"])
        kind = TensorProto.FLOAT16 if way == "half" else TensorProto.FLOAT
        free: list[Any] = list(shape)
        if self.dynamic and len(shape) >= 4:
            free[-2:] = [f"{name}_h", f"{name}_w"] if self.expands else [f"h{stride}", f"w{stride}"]
        self.inputs.append(helper.make_tensor_value_info(name, kind, free))
        self.outputs.append(helper.make_tensor_value_info(result, kind, free))
        first = len(self.nodes)
        read = {"plain": lambda: name, "identity": lambda: self.op("Identity", [name]),
                "half": lambda: self.op("Cast", [name], to=TensorProto.FLOAT)}[way]()
        closure.update(n.name for n in self.nodes[first:])

        def write(value: str) -> None:
            attrs = {"to": TensorProto.FLOAT16} if way == "half" else {}
            node = helper.make_node("Cast" if attrs else "Identity", [value], [result], name=f"n{len(self.nodes)}",
                                    **attrs)
            self.nodes.append(node)
            closure.add(node.name)

        self.features.append(f"state {way} rank {len(shape)}")
        return read, write, closure

    def cell(self, x: _Value) -> _Value:
        """A recurrent cell behind x; what it gives stands for x from there on."""
        kind = self.pick(["gru", "gru", "lstm", "mean", "five", "vector", "number", "count", "count"])
        self.features.append(kind)
        # What feeds a cell alone, back to its first multiply-add, belongs to the closure.
        alone = bool(x.own) and self.pick([True, False])
        fed = set(x.own) if alone and not (self.dynamic and self.expands) else set()   # Shape reads it, too
        if kind in ("vector", "number"):
            return self.pooled_cell(x, number=kind == "number")
        if kind == "count":
            return self.counter(x)
        size = [SIZE[0] // x.stride, SIZE[1] // x.stride]
        c = 4
        shape = [1, c, *size] if kind != "five" else [1, 1, c, *size]
        if kind == "mean":
            shape = [1, x.channels, *size]
        h, write, closure = self.state(shape, x.stride)
        closure |= fed
        first = len(self.nodes)
        if self.dynamic and self.expands:
            h = self.expanded(h, x, len(shape))
            first = len(self.nodes) - 1
        if kind == "mean":
            decay = float(self.pick([0.5, 0.9]))
            h = self.op("Add", [self.op("Mul", [h, self.constant(decay)]),
                                self.op("Mul", [x.name, self.constant(1 - decay)])])
            closure.update(n.name for n in self.nodes[first:])
            write(h)
            return self.out(x, h, x.channels, alone)
        if kind == "lstm":
            return self.lstm(x, h, write, closure, first, alone)
        if kind == "five":
            h = self.along("Squeeze", h, [1])
        both = self.op("Concat", [x.name, h], axis=1)
        gates = self.op("Sigmoid", [self.conv(both, x.channels + c, 2 * c)])
        reset, update = self.split(gates, 2, c)
        both = self.op("Concat", [x.name, self.op("Mul", [reset, h])], axis=1)
        new = self.op("Tanh", [self.conv(both, x.channels + c, c)])
        if self.pick([True, False]):
            h = self.op("Add", [h, self.op("Mul", [update, self.op("Sub", [new, h])])])
        else:
            keep = self.op("Mul", [self.op("Sub", [self.constant(1.0), update]), h])
            h = self.op("Add", [keep, self.op("Mul", [update, new])])
        given = h
        if kind == "five":
            given = self.along("Unsqueeze", h, [1])
        closure.update(n.name for n in self.nodes[first:])
        write(given)
        return self.out(x, h, c, alone)

    def lstm(self, x: _Value, h: str, write: Callable[[str], None], closure: set[str], first: int, alone: bool,
             ) -> _Value:
        """Two states that share one closure."""
        c, size = 4, [SIZE[0] // x.stride, SIZE[1] // x.stride]
        memory, write_memory, second = self.state([1, c, *size], x.stride)
        if self.dynamic and self.expands:
            memory = self.expanded(memory, x, 4)
            second.add(self.nodes[-1].name)
            first_of_both = len(self.nodes)
            closure.add(next(n.name for n in self.nodes if n.output[0] == h))
            first = first_of_both
        first = max(first, len(self.nodes))
        both = self.op("Concat", [x.name, h], axis=1)
        gates = self.split(self.conv(both, x.channels + c, 4 * c), 4, c)
        i, f, o = (self.op("Sigmoid", [g]) for g in gates[:3])
        new = self.op("Tanh", [gates[3]])
        memory = self.op("Add", [self.op("Mul", [f, memory]), self.op("Mul", [i, new])])
        h = self.op("Mul", [o, self.op("Tanh", [memory])])
        closure.update(n.name for n in self.nodes[first:])
        write(h)
        write_memory(memory)
        whole = closure | second
        closure |= whole
        second |= whole
        return self.out(x, h, c, alone)

    def expanded(self, h: str, x: _Value, rank: int) -> str:
        """The state at the features' size, whatever it was: the last node is the Expand."""
        shape = self.op("Shape", [x.name])
        last = self.op("Slice", [shape, self.constant([2], np.int64), self.constant([4], np.int64)])
        lead = {name: v for v in self.inputs for name in [v.name]}
        source = next(n for n in (h, *(i for node in self.nodes for i in node.input if node.output[0] == h))
                      if n in lead)
        fixed = [d.dim_value for d in lead[source].type.tensor_type.shape.dim[:rank - 2]]
        target = self.op("Concat", [self.constant(fixed, np.int64), last], axis=0)
        return str(self.op("Expand", [h, target]))

    def pooled_cell(self, x: _Value, *, number: bool) -> _Value:
        """A state of rank 2 [1, C] or 1 [1] that what the frame holds on average moves, and that scales x."""
        c = x.channels
        mean = self.along("ReduceMean", x.name, [1, 2, 3] if number else [2, 3], keepdims=0)
        shape = [1] if number else [1, c]
        h, write, closure = self.state(shape, 1)
        if number:
            closure.add(self.nodes[-1 if h == f"r{len(self.states) - 1}" else -2].name)      # read by the cell alone
            first = len(self.nodes)
            h = self.op("Add", [self.op("Mul", [h, self.constant(0.5)]), self.op("Mul", [mean, self.constant(0.5)])])
            closure.update(n.name for n in self.nodes[first:])
            write(h)
            return _Value(self.op("Add", [x.name, h]), c, x.stride)
        first = len(self.nodes)
        flip = bool(self.pick([True, False]))
        both = self.op("Concat", [mean, h], axis=1)
        w = self.weight(*((c, 2 * c) if flip else (2 * c, c)), fan=2 * c)
        y = self.op("Gemm", [both, w, self.bias(c)], transB=int(flip))
        if self.pick([True, False]):
            y = self.norm(y, c)
        h = self.op("Tanh", [y])
        closure.update(n.name for n in self.nodes[first:])
        closure.add(next(n.name for n in self.nodes if n.output[0] == mean))                 # read by the cell alone
        write(h)
        scale = self.along("Unsqueeze", self.op("Sigmoid", [h]), [2, 3])
        return _Value(self.op("Mul", [x.name, scale]), c, x.stride)

    def counter(self, x: _Value) -> _Value:
        """A number [1] that counts frames, of which the first and every second go another way, or into a memory."""
        c = x.channels
        count, write, closure = self.state([1], 1)
        name = f"r{len(self.states) - 1}"
        self.pairs[name] = self.states[name]               # nothing but itself drives it
        first = len(self.nodes)
        due = self.op("Or", [self.op("Equal", [count, self.constant([0.0])]),
                             self.op("Greater", [count, self.constant([1.5])])])
        write(self.op("Where", [due, self.constant([1.0]), self.op("Add", [count, self.constant([1.0])])]))
        closure.update(n.name for n in self.nodes[first:])
        if self.pick([True, False]):
            return _Value(self.op("Where", [due, x.name, self.conv(x.name, c, c)]), c, x.stride)
        self.features.append("memory")
        memory, keep, closure = self.state([1, c, SIZE[0] // x.stride, SIZE[1] // x.stride], x.stride)
        first = len(self.nodes)
        if self.dynamic and self.expands:
            memory = self.expanded(memory, x, 4)
            first = len(self.nodes) - 1
        new = self.conv(x.name, c, c) if self.pick([True, False]) else x.name
        memory = self.op("Where", [due, new, memory])
        closure.update(n.name for n in self.nodes[first:])
        keep(memory)
        return self.out(x, memory, c, alone=False)

    def out(self, x: _Value, h: str, channels: int, alone: bool) -> _Value:
        """What a cell gives: its state alone, or joined with what fed it."""
        if alone:
            return _Value(h, channels, x.stride)
        return _Value(self.op("Concat", [x.name, h], axis=1), x.channels + channels, x.stride)

    # -- the whole ----------------------------------------------------------------------------------

    def build(self, depth: int, cells: int) -> None:
        height, width = ("height", "width") if self.dynamic else SIZE
        self.expands = bool(self.pick([True, False])) if self.dynamic else False
        if self.dynamic:
            self.features.append("free, first states 1x1" if self.expands else "free, states of one size")
        self.inputs.append(helper.make_tensor_value_info("src", TensorProto.FLOAT, [1, 3, height, width]))
        x = _Value("src", 3)
        if self.pick([True, False]):
            mean = self.constant(self.rng.uniform(0.4, 0.6, (1, 3, 1, 1)))
            x = _Value(self.op("Div", [self.op("Sub", ["src", mean]), self.constant([[[[0.25]]]])]), 3)
        x = _Value(self.op("Relu", [self.conv(x.name, 3, 8)]), 8)
        skip = x
        steps = self.pick([["layer"] * k + ["cell"] * cells + ["layer"] * (depth - k) for k in range(depth + 1)])
        for step in steps:
            x = self.layer(x) if step == "layer" else self.cell(x)
        x = self.joined(skip, x)
        head = self.conv(x.name, x.channels, 4)
        if self.opset >= 13:
            fgr, pha = self.op("Split", [head, self.constant([3, 1], np.int64)], 2, axis=1)
        else:
            fgr, pha = self.op("Split", [head], 2, axis=1, split=[3, 1])
        finish = {"sigmoid": lambda v: [v], "clip": lambda v: [v, self.constant(0.0), self.constant(1.0)]}
        way = self.pick(["sigmoid", "clip"])
        self.finish("Sigmoid" if way == "sigmoid" else "Clip", finish[way](pha), "pha", [1, 1, height, width])
        if self.pick([True, False]):
            self.features.append("foreground")
            self.finish("Add", [fgr, "src"], "fgr", [1, 3, height, width])
        if self.pick([True, False]):
            self.features.append("further output")
            self.finish("ReduceMax" if self.opset < 18 else "GlobalMaxPool", [skip.name], "most",
                        [1, 8, 1, 1], **({"axes": [2, 3]} if self.opset < 18 else {}))

    def finish(self, kind: str, inputs: Sequence[str], name: str, shape: Sequence[Any], **attrs: Any) -> None:
        self.nodes.append(helper.make_node(kind, list(inputs), [name], name=f"n{len(self.nodes)}", **attrs))
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))


@st.composite
def networks(draw: Any) -> Network:
    """Networks of any kind."""
    def pick(options: Sequence[T]) -> T:
        return draw(st.sampled_from(options))

    opset = pick([11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23])
    builder = _Builder(pick, pick(range(1000)), opset, dynamic=pick([False, False, True]))
    builder.build(pick([1, 2, 3]), pick([0, 1, 2]))
    holds = pick(["initializers", "inputs", "nodes", "external", "half weights", "half inside", "half"])
    builder.features += [f"opset {opset}", holds]
    inputs = list(builder.inputs)
    outputs = list(builder.outputs)
    if pick([True, False]):
        inputs.reverse()                               # the frame need not come first
    graph = helper.make_graph(builder.nodes, "network", inputs, outputs)
    for name, values in builder.constants.items():
        graph.initializer.append(numpy_helper.from_array(values, name))
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)],
                              ir_version=3 if holds == "inputs" else {23: 11, 22: 10, 21: 10}.get(opset, 8))
    if holds == "inputs":
        _as_inputs(proto)
    elif holds == "nodes":
        _as_nodes(proto)
    elif holds == "half weights":
        _half_weights(proto)
    elif holds.startswith("half"):
        _half(proto, edges=holds == "half")
    for name, result in builder.states.items():        # a Cast at the model's edge belongs to the state
        builder.closures[name] |= {n.name for n in proto.graph.node if n.name in (f"to_{name}", f"to_{result}")}
    for closure in builder.closures.values():          # one update of several states
        closure |= set().union(*(c for c in builder.closures.values() if c & closure))
    for cast in (n for n in proto.graph.node if n.name.startswith("widen_")):      # a weight belongs to its readers
        readers = {n.name for n in proto.graph.node if cast.output[0] in n.input}
        for closure in builder.closures.values():
            closure |= {cast.name} if readers <= closure else set()
    onnx.checker.check_model(proto)
    return Network(proto, builder.states, builder.pairs, builder.closures, builder.features)


# -- where constants are kept, and of what type they are ---------------------------------------------------


def _as_inputs(proto: onnx.ModelProto) -> None:
    """Initializers that are inputs, too: before IR version 4 they had to be."""
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))


def _as_nodes(proto: onnx.ModelProto) -> None:
    """Constant nodes in the place of initializers."""
    nodes = [helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes += list(proto.graph.node)
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _halved(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name)


def _half_weights(proto: onnx.ModelProto) -> None:
    """Weights stored in float16 behind a Cast to float32."""
    nodes = []
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            stored = _halved(tensor)
            stored.name = f"{tensor.name}_stored"
            nodes.append(helper.make_node("Cast", [stored.name], [tensor.name], to=TensorProto.FLOAT,
                                          name=f"widen_{tensor.name}"))
            tensor.CopyFrom(stored)
    nodes += list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)


def _half(proto: onnx.ModelProto, *, edges: bool) -> None:
    """Everything in float16; with `edges` inputs and outputs as well, else behind a Cast."""
    graph = proto.graph
    # scales and regions of Resize stay float32: the operator says so
    resizing = {name for n in graph.node if n.op_type == "Resize" for name in n.input[1:]}
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name not in resizing:
            tensor.CopyFrom(_halved(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    before, after = [], []
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            if edges:
                value.type.tensor_type.elem_type = TensorProto.FLOAT16
            else:
                before.append(helper.make_node("Cast", [value.name], [f"{value.name}_half"], to=TensorProto.FLOAT16,
                                                name=f"to_{value.name}"))
    renamed = {n.input[0]: n.output[0] for n in before}
    wide = {v.name for v in graph.output if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        for index, name in enumerate(node.output):
            if name in wide and not edges:
                node.output[index] = f"{name}_half"
                after.append(helper.make_node("Cast", [f"{name}_half"], [name], to=TensorProto.FLOAT,
                                              name=f"to_{name}"))
    if edges:
        for value in graph.output:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    nodes = [*before, *graph.node, *after]
    del graph.node[:]
    graph.node.extend(nodes)
