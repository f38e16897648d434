"""Every operator of the shadow's table against ONNX Runtime, optimizations off, over shapes and attributes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmq.errors import ModelError
from vmq.graph import Graph
from vmq.shadow import Shadow
from vmq.shadow_ops import OPS, Call

Draw = Callable[[Any], Any]
Array = NDArray[Any]


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Case:
    """One node: data inputs, constant inputs behind them (None: left out), attributes."""

    data: list[Array]
    constants: list[Array | None] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    opset: int = 21
    outputs: int = 1
    rtol: float = 2e-6


def model_of(op: str, case: Case) -> onnx.ModelProto:
    names = [f"x{i}" for i in range(len(case.data))]
    initializers = [onnx.numpy_helper.from_array(c, f"c{i}") for i, c in enumerate(case.constants) if c is not None]
    read = names + ["" if c is None else f"c{i}" for i, c in enumerate(case.constants)]
    results = [f"y{i}" for i in range(case.outputs)]
    node = onnx.helper.make_node(op, read, results, **case.attrs)
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
              for n, a in zip(names, case.data, strict=True)]
    outputs = [onnx.helper.make_empty_tensor_value_info(r) for r in results]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs, initializers)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", case.opset)], ir_version=10)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.type.tensor_type.elem_type = known.type.tensor_type.elem_type or onnx.TensorProto.FLOAT
    return model


def both(op: str, case: Case) -> tuple[list[Array], list[Array]]:
    """What ONNX Runtime and the shadow give."""
    model = model_of(op, case)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {f"x{i}": a for i, a in enumerate(case.data)}
    theirs = session.run(None, feeds)
    ours = Shadow(Graph.load(model))({n: torch.from_numpy(a) for n, a in feeds.items()})
    return theirs, [ours[f"y{i}"].numpy() for i in range(case.outputs)]


def compare(op: str, case: Case) -> None:
    for theirs, ours in zip(*both(op, case), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        if theirs.dtype.kind == "f":
            tolerance = case.rtol * max(1.0, float(np.abs(theirs[np.isfinite(theirs)]).max(initial=0.0)))
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
        else:
            np.testing.assert_array_equal(ours, theirs)


# -- what inputs are drawn from ------------------------------------------------------------------------


def dims(draw: Draw, low: int = 1, high: int = 4, least: int = 1, most: int = 6) -> list[int]:
    return draw(st.lists(st.integers(least, most), min_size=low, max_size=high))


def noise(draw: Draw, shape: Any, low: float | None = None, high: float = 3.0) -> Array:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if low is None:
        return np.asarray(draw(st.sampled_from([0.3, 1.0, 4.0])) * rng.normal(size=shape), np.float32)
    return np.asarray(rng.uniform(low, high, shape), np.float32)


def whole(draw: Draw, shape: Any, low: int = -9, high: int = 9, dtype: Any = np.int64) -> Array:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return np.asarray(rng.integers(low, high, shape, endpoint=True), dtype)


def int64(*values: int) -> Array:
    return np.array(values, np.int64)


def partner(draw: Draw, shape: list[int]) -> list[int]:
    """A shape that broadcasts with `shape`."""
    kept = shape[draw(st.integers(0, len(shape))):]
    return [draw(st.sampled_from([1, n])) for n in kept]


def some_axes(draw: Draw, rank: int, least: int = 1) -> list[int]:
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=least, max_size=rank, unique=True))
    return [a - rank if draw(st.booleans()) else a for a in axes]


def an_axis(draw: Draw, rank: int) -> int:
    return draw(st.integers(-rank, rank - 1))


CASES: dict[str, Callable[[Draw], Case]] = {}


def case(*names: str) -> Callable[[Any], Any]:
    def add(maker: Any) -> Any:
        for name in names:
            CASES[name] = (lambda draw, _n=name: maker(draw, _n)) if len(names) > 1 else (lambda draw: maker(draw, ""))
        return maker
    return add


@case("Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Identity", "IsNaN", "Mish", "Neg", "Relu", "Round",
      "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tanh")
def _unary(draw: Draw, op: str) -> Case:
    x = noise(draw, dims(draw, 0))
    if op == "Round":
        x = np.round(x * 2) / 2                       # with ties
    return Case([np.asarray(x, np.float32)], opset=draw(st.sampled_from([21, 22])) if op == "Mish" else 21)


@case("Log", "Sqrt", "Reciprocal")
def _positive(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw), 0.1, 9.0)])


@case("Elu", "LeakyRelu", "HardSigmoid", "Celu", "ThresholdedRelu")
def _alpha(draw: Draw, op: str) -> Case:
    attrs = draw(st.sampled_from([{}, {"alpha": 0.5}, {"alpha": float(np.float32(1 / 6))}]))
    if op == "HardSigmoid":
        attrs = attrs | draw(st.sampled_from([{}, {"beta": 0.25}, {"beta": 0.5}]))
    return Case([noise(draw, dims(draw))], attrs=attrs)


@case("Gelu")
def _gelu(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw))], attrs={"approximate": draw(st.sampled_from(["none", "tanh"]))})


@case("PRelu")
def _prelu(draw: Draw, _: str) -> Case:
    shape = dims(draw, 2)
    return Case([noise(draw, shape)], [noise(draw, draw(st.sampled_from([[1], [shape[-1]], [1] * len(shape)])))])


@case("Add", "Sub", "Mul", "Div", "Pow", "Mod", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
def _binary(draw: Draw, op: str) -> Case:
    shape = dims(draw)
    other = partner(draw, shape)
    if op == "Pow":
        x = noise(draw, shape, 0.2)
        y = draw(st.sampled_from([np.array(2, np.float32), np.array(2, np.int64), noise(draw, other, -2.0)]))
        return Case([x], [y], rtol=1e-5)
    if op in ("Mod", "Equal") or draw(st.booleans()):
        x, y = whole(draw, shape), whole(draw, other)
        return Case([x, np.where(y == 0, 3, y)], attrs=draw(st.sampled_from([{}, {"fmod": 1}])) if op == "Mod" else {})
    x, y = noise(draw, shape), noise(draw, other)
    y = np.where(np.abs(y) < 0.1, np.float32(0.5), y) if op == "Div" else y
    return Case([x, y] if draw(st.booleans()) else [y, np.where(np.abs(x) < 0.1, np.float32(0.5), x)])


@case("And", "Or", "Xor", "Not")
def _logic(draw: Draw, op: str) -> Case:
    shape = dims(draw)
    x = whole(draw, shape, 0, 1).astype(bool)
    return Case([x] if op == "Not" else [x, whole(draw, partner(draw, shape), 0, 1).astype(bool)])


@case("Max", "Min", "Sum", "Mean")
def _variadic(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    return Case([noise(draw, shape), *(noise(draw, partner(draw, shape)) for _ in range(draw(st.integers(0, 2))))])


@case("Where")
def _where(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    return Case([whole(draw, partner(draw, shape), 0, 1).astype(bool), noise(draw, shape),
                 noise(draw, partner(draw, shape))])


@case("Clip")
def _clip(draw: Draw, _: str) -> Case:
    x = noise(draw, dims(draw))
    if draw(st.booleans()):
        return Case([whole(draw, x.shape, 0, 255, np.uint8)], [np.array(3, np.uint8), np.array(15, np.uint8)])
    return Case([x], draw(st.sampled_from([[], [np.float32(-0.5)], [None, np.float32(0.5)],
                                           [np.float32(-0.5), np.float32(0.5)]])))


@case("Dropout")
def _dropout(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw))], draw(st.sampled_from([[], [np.float32(0.5)]])))


@case("Cast")
def _cast(draw: Draw, _: str) -> Case:
    if draw(st.booleans()):
        x = noise(draw, dims(draw), -90, 90)
        return Case([x], attrs={"to": draw(st.sampled_from([1, 6, 7, 9, 10, 11]))})
    return Case([whole(draw, dims(draw), 0, 100, draw(st.sampled_from([np.uint8, np.int8, np.int32, np.bool_])))],
                attrs={"to": draw(st.sampled_from([1, 2, 3, 6, 7, 9]))})


@case("CastLike")
def _cast_like(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw))], [draw(st.sampled_from([int64(0), np.zeros(1, np.float32)]))])


@case("Softmax", "LogSoftmax")
def _softmax(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    attrs = {"axis": an_axis(draw, len(shape))} if len(shape) < 2 or draw(st.booleans()) else {}
    return Case([noise(draw, shape)], attrs=attrs, opset=draw(st.sampled_from([12, 13, 21])))


def window(draw: Draw, kernel: list[int], dilated: bool = True) -> tuple[dict[str, Any], list[int]]:
    """Strides, pads and dilations, and input sizes that a window of `kernel` fits into."""
    rank = len(kernel)
    dilations = [draw(st.integers(1, 2)) for _ in kernel] if dilated else [1] * rank
    attrs: dict[str, Any] = {"strides": [draw(st.integers(1, 3)) for _ in kernel]}
    if dilated:
        attrs["dilations"] = dilations
    kind = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    if kind == "NOTSET":
        attrs["pads"] = [draw(st.integers(0, k - 1)) for k in kernel * 2]
    else:
        attrs["auto_pad"] = kind
    if kind.startswith("SAME"):                       # no dilations and no gaps: ONNX Runtime has neither
        attrs.pop("dilations", None)
        dilations = [1] * rank
        attrs["strides"] = [min(s, k) for s, k in zip(attrs["strides"], kernel, strict=True)]
    sizes = [(k - 1) * d + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilations, strict=True)]
    return attrs, sizes


@case("Conv")
def _conv(draw: Draw, _: str) -> Case:
    kernel = dims(draw, 1, 3, 1, 3)
    attrs, sizes = window(draw, kernel)
    group, inner, outer = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    weight = noise(draw, [group * outer, inner, *kernel])
    bias = [noise(draw, [group * outer])] if draw(st.booleans()) else []
    return Case([noise(draw, [draw(st.integers(1, 2)), group * inner, *sizes])], [weight, *bias],
                attrs | {"group": group, "kernel_shape": kernel}, draw(st.sampled_from([12, 21])), rtol=3e-6)


@case("ConvTranspose")
def _conv_transpose(draw: Draw, _: str) -> Case:
    kernel = dims(draw, 1, 2, 2, 3)
    strides = [draw(st.integers(1, 3)) for _ in kernel]
    pads = [draw(st.integers(0, 1)) for _ in kernel * 2]
    group = draw(st.integers(1, 2))
    attrs = {"strides": strides, "pads": pads, "group": group,
             "output_padding": [draw(st.integers(0, s - 1)) for s in strides]}
    bias = [noise(draw, [group * 2])] if draw(st.booleans()) else []
    sizes = [draw(st.integers(3, 6)) for _ in kernel]
    return Case([noise(draw, [1, group * 2, *sizes])], [noise(draw, [group * 2, 2, *kernel]), *bias], attrs, rtol=3e-6)


@case("MaxPool", "AveragePool")
def _pool(draw: Draw, op: str) -> Case:
    kernel = dims(draw, 1, 2, 1, 3)
    attrs, sizes = window(draw, kernel, dilated=op == "MaxPool")
    if op == "AveragePool":
        attrs["count_include_pad"] = draw(st.integers(0, 1))
    if "pads" in attrs and draw(st.booleans()):
        attrs["pads"] = [draw(st.integers(0, k // 2)) for k in kernel] * 2
        attrs["ceil_mode"] = 1
    return Case([noise(draw, [1, 2, *sizes])], attrs=attrs | {"kernel_shape": kernel},
                opset=draw(st.sampled_from([12, 21])))


@case("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw, 3, 5))])


@case("BatchNormalization", "InstanceNormalization", "GroupNormalization")
def _normalization(draw: Draw, op: str) -> Case:
    shape = dims(draw, 3, 4, 2)
    attrs: dict[str, Any] = draw(st.sampled_from([{}, {"epsilon": 1e-3}]))
    opset, channels = 21, shape[1]
    if op == "GroupNormalization":
        groups = draw(st.integers(1, 3))
        shape[1], attrs, channels = 2 * groups, attrs | {"num_groups": groups}, 2 * groups
    scale = [noise(draw, [channels]), noise(draw, [channels])]
    if op == "BatchNormalization":
        scale += [noise(draw, [channels]), noise(draw, [channels], 0.2)]
        opset = draw(st.sampled_from([12, 15, 21]))
    return Case([noise(draw, shape)], scale, attrs, opset, rtol=1e-5)


@case("LayerNormalization")
def _layer_normalization(draw: Draw, _: str) -> Case:
    shape = dims(draw, 2, 4, 2)
    axis = an_axis(draw, len(shape))
    inner = shape[axis:]
    bias = [noise(draw, inner)] if draw(st.booleans()) else []
    return Case([noise(draw, shape)], [noise(draw, inner), *bias], {"axis": axis, "epsilon": 1e-3}, rtol=1e-5)


@case("MatMul")
def _matmul(draw: Draw, _: str) -> Case:
    m, k, n = dims(draw, 3, 3)
    batch = dims(draw, 0, 2)
    return Case([noise(draw, [*batch, m, k]), noise(draw, [*partner(draw, batch), k, n] if batch else [k, n])])


@case("Gemm")
def _gemm(draw: Draw, _: str) -> Case:
    m, k, n = dims(draw, 3, 3)
    turn = [draw(st.integers(0, 1)) for _ in range(2)]
    bias = draw(st.sampled_from([[], [[n]], [[m, n]], [[1]], [[m, 1]]]))
    return Case([noise(draw, [k, m] if turn[0] else [m, k])],
                [noise(draw, [n, k] if turn[1] else [k, n]), *(noise(draw, b) for b in bias)],
                {"transA": turn[0], "transB": turn[1], "alpha": 0.5, "beta": 1.5})


@case("Einsum")
def _einsum(draw: Draw, _: str) -> Case:
    b, h, i, j, d = dims(draw, 5, 5)
    return Case([noise(draw, [b, h, i, d]), noise(draw, [b, h, j, d])], attrs={"equation": "bhid,bhjd->bhij"})


@case("GridSample")
def _grid_sample(draw: Draw, _: str) -> Case:
    h, w, a, b = dims(draw, 4, 4, 2)
    return Case([noise(draw, [1, 2, h, w]), noise(draw, [1, a, b, 2], -1.3, 1.3)],
                attrs={"mode": draw(st.sampled_from(["linear", "cubic"])),
                       "padding_mode": draw(st.sampled_from(["zeros", "border"])),
                       "align_corners": draw(st.integers(0, 1))}, rtol=2e-5)


RUNTIME = tuple(map(int, ort.__version__.split(".")[:2]))
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


@case(*(f"Reduce{what}" for what in REDUCTIONS))
def _reduce(draw: Draw, op: str) -> Case:
    shape = dims(draw)
    x = noise(draw, shape, 0.3) if op == "ReduceLogSum" else noise(draw, shape)
    attrs: dict[str, Any] = {"keepdims": draw(st.integers(0, 1))}
    axes = draw(st.sampled_from([None, some_axes(draw, len(shape))]))
    if draw(st.booleans()) and op != "ReduceSum":
        return Case([x], attrs=attrs if axes is None else attrs | {"axes": axes}, opset=12, rtol=1e-5)
    attrs["noop_with_empty_axes"] = draw(st.integers(0, 1)) if axes or op == "ReduceSum" else 0
    return Case([x], [] if axes is None else [int64(*axes)], attrs, 18, rtol=1e-5)


@case("ArgMax", "ArgMin")
def _arg(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    x = whole(draw, shape, 0, 3).astype(np.float32)   # with ties
    return Case([x], attrs={"axis": an_axis(draw, len(shape)), "keepdims": draw(st.integers(0, 1)),
                            "select_last_index": draw(st.integers(0, 1))})


@case("TopK")
def _top_k(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    axis = an_axis(draw, len(shape))
    x = np.random.default_rng(draw(st.integers(0, 99))).permutation(int(np.prod(shape))).reshape(shape)
    return Case([x.astype(np.float32)], [int64(draw(st.integers(1, shape[axis])))],
                {"axis": axis, "largest": draw(st.integers(0, 1))}, outputs=2)


@case("CumSum")
def _cum_sum(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    x = noise(draw, shape) if draw(st.booleans()) else whole(draw, shape)
    return Case([x], [np.array(an_axis(draw, len(shape)), np.int64)],
                {"exclusive": draw(st.integers(0, 1)), "reverse": draw(st.integers(0, 1))})


@case("Shape")
def _shape(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw))], attrs=draw(st.sampled_from([{}, {"start": 1}, {"start": -2, "end": -1}])),
                opset=15)


@case("Size")
def _size(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw))])


@case("ConstantOfShape")
def _constant_of_shape(draw: Draw, _: str) -> Case:
    value = draw(st.sampled_from([None, int64(3), np.array([0.5], np.float32), np.array([True])]))
    return Case([int64(*dims(draw))], attrs={} if value is None else {"value": onnx.numpy_helper.from_array(value)})


@case("Range")
def _range(draw: Draw, _: str) -> Case:
    if draw(st.booleans()):
        return Case([np.array(v, np.int64) for v in (draw(st.integers(-3, 3)), draw(st.integers(4, 9)), 2)])
    return Case([np.array(v, np.float32) for v in (draw(st.integers(-3, 3)), draw(st.integers(4, 9)), 0.5)])


@case("Reshape")
def _reshape(draw: Draw, _: str) -> Case:
    a, b, c = dims(draw, 3, 3)
    shape = draw(st.sampled_from([[0, -1], [a * b, c], [-1], [0, 0, 1, c], [1, a, b * c]]))
    return Case([noise(draw, [a, b, c])], [int64(*shape)])


@case("Flatten")
def _flatten(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    return Case([noise(draw, shape)], attrs={"axis": draw(st.integers(-len(shape), len(shape)))})


@case("Transpose")
def _transpose(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    order = draw(st.sampled_from([None, draw(st.permutations(range(len(shape))))]))
    return Case([noise(draw, shape)], attrs={} if order is None else {"perm": order})


@case("Squeeze", "Unsqueeze")
def _squeeze(draw: Draw, op: str) -> Case:
    shape = dims(draw, 1, 3, 2)
    axes = some_axes(draw, len(shape) + 1)
    if op == "Squeeze":
        shape = [1 if i in [a % (len(shape) + 1) for a in axes] else 2 for i in range(len(shape) + 1)]
        if draw(st.booleans()):
            return Case([noise(draw, shape)])
    elif len(axes) > 1:
        axes = axes[:1]
    if draw(st.booleans()):
        return Case([noise(draw, shape)], attrs={"axes": axes}, opset=12)
    return Case([noise(draw, shape)], [int64(*axes)])


@case("Expand")
def _expand(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    x, to = draw(st.permutations([shape, partner(draw, shape)]))
    return Case([noise(draw, x)], [int64(*to)])


@case("Tile")
def _tile(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    return Case([noise(draw, shape)], [int64(*(draw(st.integers(1, 3)) for _ in shape))])


@case("Concat")
def _concat(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    axis = an_axis(draw, len(shape))
    parts = []
    for _i in range(draw(st.integers(1, 3))):
        shape[axis] = draw(st.integers(0, 3))
        parts.append(noise(draw, shape))
    return Case(parts, attrs={"axis": axis})


@case("Split")
def _split(draw: Draw, _: str) -> Case:
    shape, sizes = dims(draw), dims(draw, 2, 3, 1, 3)
    axis = an_axis(draw, len(shape))
    form = draw(st.sampled_from(["attribute", "input", "equal", "num_outputs"]))
    shape[axis] = sum(sizes) if form != "equal" else 2 * len(sizes)
    x = noise(draw, shape)
    if form == "attribute":
        return Case([x], attrs={"axis": axis, "split": sizes}, opset=12, outputs=len(sizes))
    if form == "input":
        return Case([x], [int64(*sizes)], {"axis": axis}, outputs=len(sizes), opset=13)
    if form == "equal":
        return Case([x], attrs={"axis": axis}, outputs=len(sizes), opset=draw(st.sampled_from([12, 13])))
    count = 2                                          # the last part may be smaller
    shape[axis] = draw(st.integers(2, 7))
    return Case([noise(draw, shape)], attrs={"axis": axis, "num_outputs": count}, outputs=count)


@case("Slice")
def _slice(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    axes = some_axes(draw, len(shape))
    ends = st.sampled_from([-100, -3, -1, 0, 1, 2, 4, 2**31 - 1, 2**63 - 1])
    given = [int64(*(draw(st.integers(-5, 5)) for _ in axes)), int64(*(draw(ends) for _ in axes)), int64(*axes)]
    if draw(st.booleans()):
        given.append(int64(*(draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes)))
    return Case([noise(draw, shape)], given)


@case("Pad")
def _pad(draw: Draw, _: str) -> Case:
    shape = dims(draw, 1, 4, 3)
    mode = draw(st.sampled_from(["constant", "reflect", "edge", "wrap"]))
    axes = some_axes(draw, len(shape)) if draw(st.booleans()) else None
    count = len(shape) if axes is None else len(axes)
    pads = int64(*(draw(st.integers(-1 if mode == "constant" else 0, 2)) for _ in range(2 * count)))
    value = draw(st.sampled_from([None, np.array(0.5, np.float32)])) if mode == "constant" else None
    rest = [] if axes is None and value is None else [value]
    return Case([noise(draw, shape)], [pads, *rest, *([] if axes is None else [int64(*axes)])], {"mode": mode},
                opset=21 if axes or mode == "wrap" else draw(st.sampled_from([12, 21])))


@case("Gather")
def _gather(draw: Draw, _: str) -> Case:
    shape = dims(draw)
    axis = an_axis(draw, len(shape))
    places = whole(draw, dims(draw, 0, 2), -shape[axis], shape[axis] - 1)
    return Case([noise(draw, shape)], [np.asarray(places, draw(st.sampled_from([np.int64, np.int32])))], {"axis": axis})


@case("GatherElements", "ScatterElements")
def _elements(draw: Draw, op: str) -> Case:
    shape = dims(draw)
    axis = an_axis(draw, len(shape))
    count = draw(st.integers(1, shape[axis]))
    order = np.argsort(noise(draw, shape), axis).take(range(count), axis)
    places = np.where(whole(draw, order.shape, 0, 1) == 1, order, order - shape[axis]).astype(np.int64)
    return Case([noise(draw, shape)], [places, *([noise(draw, places.shape)] if op == "ScatterElements" else [])],
                {"axis": axis})


@case("GatherND")
def _gather_nd(draw: Draw, _: str) -> Case:
    a, b, c = dims(draw, 3, 3)
    if draw(st.booleans()):
        return Case([noise(draw, [a, b, c])], [whole(draw, [a, 2, 1], -b, b - 1)], {"batch_dims": 1})
    return Case([noise(draw, [a, b, c])], [np.stack([whole(draw, [3], 0, a - 1), whole(draw, [3], -b, b - 1)], 1)])


@case("ScatterND")
def _scatter_nd(draw: Draw, _: str) -> Case:
    a, b = dims(draw, 2, 2, 2)
    return Case([noise(draw, [a, b])], [int64(*range(a))[:2, None], noise(draw, [2, b])])


@case("OneHot")
def _one_hot(draw: Draw, _: str) -> Case:
    shape = dims(draw, 1, 2)
    return Case([whole(draw, shape, -4, 5)], [np.array(4, np.int64), np.array([0.25, 2.0], np.float32)],
                {"axis": draw(st.integers(-len(shape) - 1, len(shape)))})


@case("Trilu")
def _trilu(draw: Draw, _: str) -> Case:
    return Case([noise(draw, dims(draw, 2))], draw(st.sampled_from([[], [np.array(1, np.int64)]])),
                {"upper": draw(st.integers(0, 1))})


@case("DepthToSpace", "SpaceToDepth")
def _depth(draw: Draw, op: str) -> Case:
    n, c, h, w = dims(draw, 4, 4, 1, 3)
    if op == "SpaceToDepth":
        return Case([noise(draw, [n, c, 2 * h, 2 * w])], attrs={"blocksize": 2})
    return Case([noise(draw, [n, 4 * c, h, w])], attrs={"blocksize": 2, "mode": draw(st.sampled_from(["DCR", "CRD"]))})


@case("Resize")
def _resize(draw: Draw, _: str) -> Case:
    mode = draw(st.sampled_from(["nearest", "linear", "cubic"]))
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": draw(st.sampled_from(
        ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"]))}
    if mode == "nearest":
        attrs["nearest_mode"] = draw(st.sampled_from(["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]))
    if mode == "cubic":
        attrs |= draw(st.sampled_from([{}, {"cubic_coeff_a": -0.5}, {"exclude_outside": 1}]))
    h, w = dims(draw, 2, 2, 2, 9)
    x = noise(draw, [1, 2, h, w])
    form = draw(st.sampled_from(["scales", "sizes", "axes"]))
    if form == "axes":
        last = -1 if RUNTIME >= (1, 28) else 3          # older ones take -1 for no axis, and crash
        return Case([x], [None, None, int64(*dims(draw, 2, 2, 1, 12))], attrs | {"axes": [2, last]}, rtol=1e-5)
    if form == "scales":
        scales = [draw(st.sampled_from([0.5, 1.0, 1.5, 2.0, 2.5, 0.75, 4.0])) for _ in range(2)]
        opset = draw(st.sampled_from([12, 21]))
        roi = np.zeros(0, np.float32) if opset == 12 else None
        return Case([x], [roi, np.array([1, 1, *scales], np.float32)], attrs, opset, rtol=1e-5)
    return Case([x], [None, None, int64(1, 2, *dims(draw, 2, 2, 1, 12))], attrs, rtol=1e-5)


@case("Upsample")
def _upsample(draw: Draw, _: str) -> Case:
    h, w = dims(draw, 2, 2, 2)
    return Case([noise(draw, [1, 2, h, w])], [np.array([1, 1, 2, draw(st.sampled_from([2, 3]))], np.float32)],
                {"mode": draw(st.sampled_from(["nearest", "linear"]))}, 9, rtol=1e-5)


def test_every_operator_of_the_table_is_tested():
    assert set(CASES) == set(OPS)


@pytest.mark.parametrize("op", sorted(CASES))
def test_as_in_onnx_runtime(op: str):
    @settings(max_examples=15, derandomize=True, database=None, phases=[Phase.generate, Phase.shrink],
              suppress_health_check=list(HealthCheck))
    @given(st.composite(lambda draw: CASES[op](draw))())
    def check(drawn: Case) -> None:
        compare(op, drawn)
    check()


@pytest.mark.parametrize(("op", "attrs", "outputs", "said"), [
    ("LSTM", {}, 1, "this operator"),
    ("Resize", {"antialias": 1}, 1, "antialias 1"),
    ("Resize", {"coordinate_transformation_mode": b"tf_crop_and_resize"}, 1, "tf_crop_and_resize"),
    ("MaxPool", {"kernel_shape": [2]}, 2, "its second output"),
    ("BatchNormalization", {"training_mode": 1}, 1, "training_mode 1"),
    ("Cast", {"to": onnx.TensorProto.FLOAT8E4M3FN}, 1, "float8_e4m3fn"),
    ("ScatterND", {"reduction": "add"}, 1, "reduction 'add'"),
    ("ConvTranspose", {"auto_pad": "SAME_UPPER"}, 1, "auto_pad 'SAME_UPPER'"),
    ("Relu", {"new_in_opset_99": 7}, 1, "attribute new_in_opset_99 7"),
])
def test_refused_by_name(op: str, attrs: dict[str, Any], outputs: int, said: str):
    with pytest.raises(ModelError, match=f"node 'here' \\({op}, opset 21\\): .*{said}.* is not supported") as caught:
        Call(op, "here", attrs, 21, outputs).build()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
def test_rounding_up_behind_uneven_pads_is_refused(op: str):
    run = Call(op, "here", {"kernel_shape": [2], "strides": [2], "pads": [0, 1], "ceil_mode": 1}, 21).build()
    with pytest.raises(ModelError, match=r"node 'here' .* ceil_mode with pads \[0, 1\] for a window of \[2\]"):
        run(torch.zeros(1, 1, 8))
