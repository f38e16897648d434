"""ONNX operators in torch: a table from operator to a builder that reads a node's attributes once.

    run = OPS["Conv"](Call(...));   y = run(x, weight, bias)

A builder takes the attributes it understands out of the `Call`; one that is left over, or has a value that torch has
no match for, is refused by name. What `run` takes are the node's inputs in order (None for one left out), and it
returns its outputs. Values that describe shapes (axes, sizes, pads) are read on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, inf, prod
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from vmq.errors import ModelError
from vmq.interpolation import resize

Run = Callable[..., Any]
"""Inputs to the output, or to the list of outputs."""

OPS: dict[str, Callable[[Call], Run]] = {}
"""The table."""

HOST_INPUTS: frozenset[str] = frozenset({
    "ConstantOfShape", "CumSum", "Expand", "OneHot", "Pad", "Range", "Reshape", "Resize", "Slice", "Split", "Squeeze",
    "Tile", "TopK", "Unsqueeze", "Upsample", *(f"Reduce{what}" for what in ("L1", "L2", "LogSum", "LogSumExp", "Max",
                                                                         "Mean", "Min", "Prod", "Sum", "SumSquare"))})
"""Operators whose further inputs only describe shapes: they need not be where the data are."""

_TYPES: dict[str, torch.dtype] = {
    "float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int64": torch.int64, "int32": torch.int32, "int16": torch.int16, "int8": torch.int8, "uint8": torch.uint8,
    "bool": torch.bool, "int4": torch.int8, "uint4": torch.uint8, "uint16": torch.int32}


class Call:
    """A node as a builder sees it.

    Attributes:
        op, name: of the node, for messages.
        opset: version of the operator set, which decides what defaults and inputs mean.
        outputs: how many outputs somebody reads, counted up to the last of them.
    """

    def __init__(self, op: str, name: str, attrs: dict[str, Any], opset: int, outputs: int = 1) -> None:
        self.op, self.name, self.opset, self.outputs = op, name, opset, outputs
        self._attrs = dict(attrs)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of an attribute, which counts as understood."""
        value = self._attrs.pop(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def expect(self, name: str, default: Any, *allowed: Any) -> Any:
        """As `take`, refusing values other than the default and `allowed`."""
        value = self.take(name, default)
        if value != default and value not in allowed:
            self.refuse(f"{name} {value!r}")
        return value

    def refuse(self, what: str) -> NoReturn:
        """Raise ModelError: the node has `what`, which is not supported."""
        raise ModelError(f"node {self.name!r} ({self.op}, opset {self.opset}): {what} is not supported by the "
                         "differentiable shadow; export the model without it")

    def build(self) -> Run:
        """The function that computes this node.

        Raises:
            ModelError: the operator, or an attribute of it, is not supported.
        """
        if self.op not in OPS:
            self.refuse("this operator")
        run = OPS[self.op](self)
        for name, value in self._attrs.items():
            self.refuse(f"attribute {name} {value!r}")
        return run


def torch_type(dtype: Any) -> torch.dtype:
    """The torch type that carries a numpy type (4-bit integers ride in 8 bits, uint16 in int32).

    Raises:
        KeyError: there is none.
    """
    return _TYPES[np.dtype(dtype).name]


def to_tensor(array: Any) -> Tensor:
    """A tensor of its own with an array's values."""
    array = np.asarray(array)
    if array.dtype in (ml_dtypes.int4, ml_dtypes.uint4):
        array = array.astype(np.int8 if array.dtype == ml_dtypes.int4 else np.uint8)
    elif array.dtype == np.uint16:
        array = array.astype(np.int32)
    return torch.from_numpy(np.array(array, order="C"))


def _op(*names: str) -> Callable[[Callable[[Call], Run]], Callable[[Call], Run]]:
    def add(builder: Callable[[Call], Run]) -> Callable[[Call], Run]:
        OPS.update(dict.fromkeys(names, builder))
        return builder
    return add


def _plain(run: Any) -> Callable[[Call], Run]:
    return lambda _: run


def _ints(tensor: Tensor) -> list[int]:
    values: list[int] = tensor.reshape(-1).tolist()
    return values


# -- elementwise ------------------------------------------------------------------------------------


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _fold(combine: Run) -> Run:
    def run(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = combine(first, other)
        return first
    return run


OPS |= {name: _plain(run) for name, run in {
    "Abs": torch.abs, "Add": torch.add, "And": torch.logical_and, "Ceil": torch.ceil, "Cos": torch.cos,
    "Div": _divide, "Equal": torch.eq, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "Greater": torch.gt,
    "GreaterOrEqual": torch.ge, "HardSwish": F.hardswish, "Identity": lambda x: x, "IsNaN": torch.isnan,
    "Less": torch.lt, "LessOrEqual": torch.le, "Log": torch.log, "Max": _fold(torch.maximum),
    "Mean": lambda *xs: _fold(torch.add)(*xs) / len(xs), "Min": _fold(torch.minimum), "Mish": F.mish,
    "Mul": torch.mul, "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or,
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype), "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Sub": torch.sub, "Sum": _fold(torch.add), "Tanh": torch.tanh,
    "Where": torch.where, "Xor": torch.logical_xor,
    "MatMul": torch.matmul, "Size": lambda x: torch.tensor(x.numel()),
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True),
    "Expand": lambda x, shape: x.expand(np.broadcast_shapes(x.shape, tuple(_ints(shape)))),
    "Tile": lambda x, repeats: x.repeat(_ints(repeats)),
    "Range": lambda start, end, step: torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype),
}.items()}


@_op("Clip")
def _clip(call: Call) -> Run:
    low, high = call.take("min"), call.take("max")

    def run(x: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
        lower, upper = low if least is None else least.item(), high if most is None else most.item()
        return x if lower is None and upper is None else torch.clamp(x, lower, upper)
    return run


@_op("Dropout")
def _dropout(call: Call) -> Run:
    call.take("ratio"), call.take("seed")
    if call.outputs > 1:
        call.refuse("its mask")

    def run(x: Tensor, _ratio: Tensor | None = None, training: Tensor | None = None) -> Tensor:
        if training is not None and training.item():
            call.refuse("training_mode")
        return x
    return run


@_op("Elu", "LeakyRelu", "HardSigmoid", "Celu", "ThresholdedRelu")
def _with_alpha(call: Call) -> Run:
    default = {"LeakyRelu": 0.01, "HardSigmoid": 0.2}.get(call.op, 1.0)
    alpha = call.take("alpha", default)
    if call.op == "HardSigmoid":
        beta = call.take("beta", 0.5)
        if abs(alpha - 1 / 6) < 1e-7 and beta == 0.5:
            return F.hardsigmoid                      # the same in one pass
        return lambda x: (x * alpha + beta).clamp(0.0, 1.0)
    return {"Elu": lambda x: F.elu(x, alpha), "LeakyRelu": lambda x: F.leaky_relu(x, alpha),
            "Celu": lambda x: F.celu(x, alpha), "ThresholdedRelu": lambda x: torch.where(x > alpha, x, 0.0)}[call.op]


@_op("Gelu")
def _gelu(call: Call) -> Run:
    kind = call.expect("approximate", "none", "tanh")
    return lambda x: F.gelu(x, approximate=kind)


@_op("Mod")
def _mod(call: Call) -> Run:
    return torch.fmod if call.take("fmod", 0) else torch.remainder


@_op("Cast")
def _cast(call: Call) -> Run:
    kind = onnx.helper.tensor_dtype_to_np_dtype(call.take("to"))
    call.take("saturate"), call.take("round_mode")    # for 8-bit floats, which are refused
    if kind.name not in _TYPES or kind.name in ("int4", "uint4"):
        call.refuse(f"type {kind.name}")
    return lambda x: x.to(_TYPES[kind.name])


@_op("CastLike")
def _cast_like(call: Call) -> Run:
    call.take("saturate"), call.take("round_mode")
    return lambda x, like: x.to(like.dtype)


@_op("Softmax", "LogSoftmax")
def _softmax(call: Call) -> Run:
    axis = call.take("axis", -1 if call.opset >= 13 else 1)
    function = torch.softmax if call.op == "Softmax" else torch.log_softmax
    if call.opset >= 13:
        return lambda x: function(x, axis)
    return lambda x: function(_matrix(x, axis), 1).reshape(x.shape)   # over all axes from this one on


def _matrix(x: Tensor, axis: int) -> Tensor:
    axis += x.ndim if axis < 0 else 0
    return x.reshape(prod(x.shape[:axis]), -1)


# -- layers -----------------------------------------------------------------------------------------

_CONVS = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


def _same_pads(kind: str, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
               dilations: Sequence[int]) -> list[int]:
    """Pads (begins, then ends) for auto_pad SAME_UPPER or SAME_LOWER."""
    totals = [max(0, (ceil(n / s) - 1) * s + (k - 1) * d + 1 - n)
              for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)]
    small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
    return small + large if kind == "SAME_UPPER" else large + small


def _torch_pads(pads: Sequence[int]) -> list[int]:
    """Pads in ONNX's order (begins, then ends) in that of `F.pad` (last axis first)."""
    half = len(pads) // 2
    return [n for i in reversed(range(half)) for n in (pads[i], pads[half + i])]


class _Window:
    """The attributes that convolutions and pools share."""

    def __init__(self, call: Call) -> None:
        self.kernel = call.take("kernel_shape")
        self.auto = call.expect("auto_pad", "NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")
        self._strides, self._dilations = call.take("strides"), call.take("dilations")
        self._pads = call.take("pads")

    def over(self, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Strides, dilations and pads (begins, then ends) for this input."""
        rank = len(kernel)
        strides, dilations = self._strides or [1] * rank, self._dilations or [1] * rank
        if self.auto.startswith("SAME"):
            return strides, dilations, _same_pads(self.auto, x.shape[2:], kernel, strides, dilations)
        return strides, dilations, (self._pads if self.auto == "NOTSET" else None) or [0] * (2 * rank)


@_op("Conv")
def _conv(call: Call) -> Run:
    window, group = _Window(call), call.take("group", 1)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        strides, dilations, pads = window.over(x, weight.shape[2:])
        half = len(strides)
        if pads[:half] != pads[half:]:
            x, pads = F.pad(x, _torch_pads(pads)), [0] * half
        return _CONVS[weight.ndim - 3](x, weight, bias, strides, pads[:half], dilations, group)
    return run


@_op("ConvTranspose")
def _conv_transpose(call: Call) -> Run:
    window, group, more = _Window(call), call.take("group", 1), call.take("output_padding")
    if window.auto.startswith("SAME"):
        call.refuse(f"auto_pad {window.auto!r}")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        strides, dilations, pads = window.over(x, weight.shape[2:])
        half = len(strides)
        even = pads[:half] == pads[half:]
        y = _TRANSPOSED[weight.ndim - 3](
            x, weight, bias, strides, pads[:half] if even else 0, more or 0, group, dilations)
        return y if even else F.pad(y, _torch_pads([-n for n in pads]))
    return run


def _fits(pads: Sequence[int], kernel: Sequence[int], up: bool, call: Call) -> bool:
    """Whether torch's pools take these pads; if not, they are put on by hand, which leaves no edge to round up to."""
    half = len(kernel)
    fits = list(pads[:half]) == list(pads[half:]) and all(p <= k // 2 for p, k in zip(pads, kernel, strict=False))
    if up and not fits:
        call.refuse(f"ceil_mode with pads {list(pads)} for a window of {list(kernel)}")
    return fits


@_op("MaxPool")
def _max_pool(call: Call) -> Run:
    window, up = _Window(call), bool(call.take("ceil_mode", 0))
    call.expect("storage_order", 0)
    if call.outputs > 1:
        call.refuse("its second output")

    def run(x: Tensor) -> Tensor:
        strides, dilations, pads = window.over(x, window.kernel)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[x.ndim - 3]
        if _fits(pads, window.kernel, up, call):
            return pool(x, window.kernel, strides, pads[:len(strides)], dilations, up)
        return pool(F.pad(x, _torch_pads(pads), value=-inf), window.kernel, strides, 0, dilations)
    return run


@_op("AveragePool")
def _average_pool(call: Call) -> Run:
    window, up = _Window(call), bool(call.take("ceil_mode", 0))
    whole = bool(call.take("count_include_pad", 0))

    def run(x: Tensor) -> Tensor:
        strides, dilations, pads = window.over(x, window.kernel)
        if any(d != 1 for d in dilations):
            call.refuse(f"dilations {dilations}")
        pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[x.ndim - 3]
        if _fits(pads, window.kernel, up, call):
            return pool(x, window.kernel, strides, pads[:len(strides)], up, whole)
        mean = pool(F.pad(x, _torch_pads(pads)), window.kernel, strides)
        if whole:
            return mean
        return mean / pool(F.pad(torch.ones_like(x[:1, :1]), _torch_pads(pads)), window.kernel, strides)
    return run


@_op("BatchNormalization")
def _batch_norm(call: Call) -> Run:
    eps = call.take("epsilon", 1e-5)
    call.take("momentum"), call.take("spatial"), call.expect("training_mode", 0)
    if call.outputs > 1:
        call.refuse("its statistics as outputs")
    return lambda x, scale, bias, mean, var: F.batch_norm(x, mean, var, scale, bias, False, 0.0, eps)


@_op("InstanceNormalization")
def _instance_norm(call: Call) -> Run:
    eps = call.take("epsilon", 1e-5)
    return lambda x, scale, bias: F.instance_norm(x, None, None, scale, bias, True, 0.0, eps)


@_op("GroupNormalization")
def _group_norm(call: Call) -> Run:
    eps, groups = call.take("epsilon", 1e-5), call.take("num_groups")
    call.take("stash_type")

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if call.opset < 21:                           # one scale a group, not one a channel
            scale, bias = (t.repeat_interleave(x.shape[1] // groups) for t in (scale, bias))
        return F.group_norm(x, groups, scale, bias, eps)
    return run


@_op("LayerNormalization")
def _layer_norm(call: Call) -> Run:
    axis, eps = call.take("axis", -1), call.take("epsilon", 1e-5)
    call.expect("stash_type", 1)
    if call.outputs > 1:
        call.refuse("its mean or deviation as outputs")

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[axis:]
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return F.layer_norm(x, shape, scale, bias, eps)
        y = F.layer_norm(x, shape, eps=eps) * scale
        return y if bias is None else y + bias
    return run


@_op("Gemm")
def _gemm(call: Call) -> Run:
    alpha, beta = call.take("alpha", 1.0), call.take("beta", 1.0)
    turn_a, turn_b = call.take("transA", 0), call.take("transB", 0)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.T if turn_a else a, b.T if turn_b else b
        return (a @ b) * alpha if c is None else torch.addmm(c, a, b, beta=beta, alpha=alpha)
    return run


@_op("Einsum")
def _einsum(call: Call) -> Run:
    equation = call.take("equation")
    return lambda *xs: torch.einsum(equation, *xs)


@_op("GridSample")
def _grid_sample(call: Call) -> Run:
    names = {"linear": "bilinear", "cubic": "bicubic"}
    mode = call.expect("mode", "bilinear" if call.opset < 20 else "linear", "bilinear", "nearest", "linear", "bicubic",
                       "cubic")
    padding, align = call.take("padding_mode", "zeros"), bool(call.take("align_corners", 0))
    return lambda x, grid: F.grid_sample(x, grid, names.get(mode, mode), padding, align)


# -- reductions -------------------------------------------------------------------------------------

_REDUCTIONS: dict[str, Run] = {
    "Sum": torch.sum, "Mean": torch.mean, "Max": torch.amax, "Min": torch.amin,
    "Prod": lambda x, axes, keepdim: _each_axis(torch.prod, x, axes, keepdim),
    "L1": lambda x, axes, keepdim: x.abs().sum(axes, keepdim), "SumSquare": lambda x, *a: torch.sum(x * x, *a),
    "L2": lambda x, axes, keepdim: (x * x).sum(axes, keepdim).sqrt(), "LogSumExp": torch.logsumexp,
    "LogSum": lambda x, axes, keepdim: x.sum(axes, keepdim).log()}


def _each_axis(reduce: Run, x: Tensor, axes: Sequence[int], keepdim: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = reduce(x, axis, keepdim)
    return x


@_op(*(f"Reduce{what}" for what in _REDUCTIONS))
def _reduce(call: Call) -> Run:
    fixed, keep = call.take("axes"), bool(call.take("keepdims", 1))
    nothing = call.take("noop_with_empty_axes", 0)
    function = _REDUCTIONS[call.op.removeprefix("Reduce")]

    def run(x: Tensor, chosen: Tensor | None = None) -> Tensor:
        axes = fixed if chosen is None else _ints(chosen)
        if not axes and nothing:
            return x
        return function(x, tuple(axes or range(x.ndim)), keep)
    return run


@_op("ArgMax", "ArgMin")
def _arg(call: Call) -> Run:
    axis, keep = call.take("axis", 0), bool(call.take("keepdims", 1))
    last = call.take("select_last_index", 0)
    largest = call.op == "ArgMax"

    def run(x: Tensor) -> Tensor:
        best = x.amax(axis, keepdim=True) if largest else x.amin(axis, keepdim=True)
        hits = (x == best).to(torch.uint8)            # torch's own argmax returns any of several
        if last:
            found = x.shape[axis] - 1 - hits.flip(axis).argmax(axis, keepdim=keep)
        else:
            found = hits.argmax(axis, keepdim=keep)
        return found
    return run


@_op("TopK")
def _top_k(call: Call) -> Run:
    axis, largest = call.take("axis", -1), bool(call.take("largest", 1))
    call.expect("sorted", 1, 0)

    def run(x: Tensor, k: Tensor) -> list[Tensor]:
        values, places = x.sort(dim=axis, descending=largest, stable=True)
        count = int(k.item())
        return [values.narrow(axis, 0, count), places.narrow(axis, 0, count)]
    return run


@_op("CumSum")
def _cum_sum(call: Call) -> Run:
    exclusive, reverse = call.take("exclusive", 0), call.take("reverse", 0)

    def run(x: Tensor, along: Tensor) -> Tensor:
        axis = int(along.item())
        x = x.flip(axis) if reverse else x
        y = x.cumsum(axis, dtype=x.dtype)
        y = y - x if exclusive and not x.is_floating_point() else y
        if exclusive and x.is_floating_point():
            y = torch.cat((torch.zeros_like(x.narrow(axis, 0, 1)), y.narrow(axis, 0, x.shape[axis] - 1)), axis)
        return y.flip(axis) if reverse else y
    return run


# -- shapes -----------------------------------------------------------------------------------------


@_op("Shape")
def _shape(call: Call) -> Run:
    start, end = call.take("start", 0), call.take("end")
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@_op("ConstantOfShape")
def _constant_of_shape(call: Call) -> Run:
    value = call.take("value")
    fill = to_tensor(np.zeros(1, np.float32) if value is None else getattr(value, "values", value)).reshape(())
    return lambda shape: fill.expand(_ints(shape))


@_op("Reshape")
def _reshape(call: Call) -> Run:
    literal = call.take("allowzero", 0)

    def run(x: Tensor, shape: Tensor) -> Tensor:
        return x.reshape([x.shape[i] if n == 0 and not literal else n for i, n in enumerate(_ints(shape))])
    return run


@_op("Flatten")
def _flatten(call: Call) -> Run:
    axis = call.take("axis", 1)
    return lambda x: _matrix(x, axis)


@_op("Transpose")
def _transpose(call: Call) -> Run:
    order = call.take("perm")
    return lambda x: x.permute(order or tuple(reversed(range(x.ndim))))


@_op("Squeeze", "Unsqueeze")
def _squeeze(call: Call) -> Run:
    fixed, drop = call.take("axes"), call.op == "Squeeze"

    def run(x: Tensor, chosen: Tensor | None = None) -> Tensor:
        axes = fixed if chosen is None else _ints(chosen)
        if drop:
            return x.squeeze(tuple(range(x.ndim)) if axes is None else tuple(axes))
        for axis in sorted(a % (x.ndim + len(axes)) for a in axes):
            x = x.unsqueeze(axis)
        return x
    return run


@_op("Concat")
def _concat(call: Call) -> Run:
    axis = call.take("axis")

    def run(*xs: Tensor) -> Tensor:
        batch = max(x.shape[0] for x in xs) if axis % xs[0].dim() else 0
        # A graph for one frame may be run on a batch of them: its constants serve every frame.
        return torch.cat([x.expand(batch, *x.shape[1:]) if batch > x.shape[0] == 1 else x for x in xs], axis)
    return run


@_op("Split")
def _split(call: Call) -> Run:
    axis, fixed = call.take("axis", 0), call.take("split")
    parts = call.take("num_outputs", call.outputs)

    def run(x: Tensor, chosen: Tensor | None = None) -> list[Tensor]:
        sizes = fixed if chosen is None else _ints(chosen)
        return list(torch.split(x, sizes or ceil(x.shape[axis] / parts), axis))
    return run


_OPEN_ENDS = (2**31 - 1, 2**63 - 1)     # as far as it goes, in either direction: so ONNX Runtime reads them


@_op("Slice")
def _slice(_: Call) -> Run:
    def run(x: Tensor, *given: Tensor) -> Tensor:
        starts, ends, *rest = (None if g is None else _ints(g) for g in given)
        assert starts is not None
        assert ends is not None
        axes, steps = (*rest, None, None)[:2]
        for i, axis in enumerate(axes or range(len(starts))):
            end = None if ends[i] in _OPEN_ENDS else ends[i]
            start, end, step = slice(starts[i], end, steps[i] if steps else 1).indices(x.shape[axis])
            if step == 1:
                x = x.narrow(axis, start, max(0, end - start))
            else:
                x = x.index_select(axis, torch.arange(start, max(start, end) if step > 0 else min(start, end), step,
                                                      device=x.device))
        return x
    return run


@_op("Pad")
def _pad(call: Call) -> Run:
    mode = call.expect("mode", "constant", "reflect", "edge", "wrap")

    def run(x: Tensor, pads: Tensor, value: Tensor | None = None, chosen: Tensor | None = None) -> Tensor:
        amounts = _ints(pads)
        axes = [a % x.ndim for a in _ints(chosen)] if chosen is not None else list(range(x.ndim))
        half = len(amounts) // 2
        both = dict(zip(axes, zip(amounts[:half], amounts[half:], strict=True), strict=True))
        if mode == "constant":
            fill = 0 if value is None else value.item()
            return F.pad(x, [n for axis in reversed(range(x.ndim)) for n in both.get(axis, (0, 0))], value=fill)
        for axis, (before, after) in both.items():
            if before or after:
                place, last = torch.arange(-before, x.shape[axis] + after, device=x.device), x.shape[axis] - 1
                place = {"edge": lambda p, n: p.clamp(0, n), "wrap": lambda p, n: p % (n + 1),
                         "reflect": lambda p, n: n - (p % (2 * n) - n).abs() if n else p * 0}[mode](place, last)
                x = x.index_select(axis, place)
        return x
    return run


@_op("Gather")
def _gather(call: Call) -> Run:
    axis = call.take("axis", 0)

    def run(x: Tensor, places: Tensor) -> Tensor:
        found = x.index_select(axis, _from_the_end(places.reshape(-1), x.shape[axis]))
        before = axis % x.ndim
        return found.reshape([*x.shape[:before], *places.shape, *x.shape[before + 1:]])
    return run


def _from_the_end(places: Tensor, size: int) -> Tensor:
    places = places.long()
    return torch.where(places < 0, places + size, places)


@_op("GatherElements")
def _gather_elements(call: Call) -> Run:
    axis = call.take("axis", 0)
    return lambda x, places: x.gather(axis, _from_the_end(places, x.shape[axis]))


@_op("GatherND")
def _gather_nd(call: Call) -> Run:
    batch = call.take("batch_dims", 0)

    def run(x: Tensor, places: Tensor) -> Tensor:
        lead = [torch.arange(n, device=x.device).reshape([-1] + [1] * (places.ndim - 2 - i))
                for i, n in enumerate(x.shape[:batch])]
        return x[(*lead, *places.long().unbind(-1))]
    return run


@_op("ScatterND")
def _scatter_nd(call: Call) -> Run:
    call.expect("reduction", "none")
    return lambda x, places, updates: x.index_put(tuple(places.long().unbind(-1)), updates)


@_op("ScatterElements")
def _scatter_elements(call: Call) -> Run:
    axis = call.take("axis", 0)
    call.expect("reduction", "none")
    return lambda x, places, updates: x.scatter(axis, _from_the_end(places, x.shape[axis]), updates)


@_op("OneHot")
def _one_hot(call: Call) -> Run:
    axis = call.take("axis", -1)

    def run(places: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        count = int(depth.item())
        hit = _from_the_end(places, count).unsqueeze(axis)
        steps = torch.arange(count, device=places.device).reshape([-1] + [1] * (hit.ndim - 1 - axis % hit.ndim))
        return torch.where(hit == steps, values[1].to(hit.device), values[0].to(hit.device))
    return run


@_op("Trilu")
def _trilu(call: Call) -> Run:
    keep = torch.triu if call.take("upper", 1) else torch.tril
    return lambda x, k=None: keep(x, 0 if k is None else int(k.item()))


@_op("DepthToSpace")
def _depth_to_space(call: Call) -> Run:
    block, mode = call.take("blocksize"), call.expect("mode", "DCR", "CRD")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if mode == "CRD":
            return F.pixel_shuffle(x, block)
        blocks = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return blocks.reshape(n, -1, h * block, w * block)
    return run


@_op("SpaceToDepth")
def _space_to_depth(call: Call) -> Run:
    block = call.take("blocksize")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        blocks = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return blocks.reshape(n, -1, h // block, w // block)
    return run


# -- resize -----------------------------------------------------------------------------------------


@_op("Upsample")
def _upsample(call: Call) -> Run:
    mode = call.expect("mode", "nearest", "linear")
    return lambda x, scales: resize(x, scales.tolist(), None, mode, "asymmetric", "floor", -0.75, False)


@_op("Resize")
def _resize(call: Call) -> Run:
    mode = call.expect("mode", "nearest", "linear", "cubic")
    where = call.expect("coordinate_transformation_mode", "half_pixel", "pytorch_half_pixel", "align_corners",
                        "asymmetric")
    nearest = call.expect("nearest_mode", "round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
    steepness, inner = call.take("cubic_coeff_a", -0.75), bool(call.take("exclude_outside", 0))
    chosen = call.take("axes")
    call.expect("antialias", 0), call.expect("keep_aspect_ratio_policy", "stretch")
    call.take("extrapolation_value")                  # of tf_crop_and_resize, which is refused

    def run(x: Tensor, _roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        axes = [a % x.ndim for a in chosen] if chosen is not None else list(range(x.ndim))
        whole: list[int] = list(x.shape)
        factors = [1.0] * x.ndim
        for i, axis in enumerate(axes):
            if scales is not None and scales.numel():
                factors[axis] = float(scales[i])
                whole[axis] = floor(np.float32(factors[axis]) * np.float32(x.shape[axis]))
            else:
                assert sizes is not None
                whole[axis] = int(sizes[i])
                factors[axis] = whole[axis] / x.shape[axis]
        return resize(x, factors, whole, mode, where, nearest, steepness, inner)
    return run
