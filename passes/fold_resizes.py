"""Let a convolution take over the columns of the Resize by 2 in front of it.

Along a row a linear Resize by 2 gives columns that lie a quarter of the way between old ones,

    u[2i] = 3/4 x[i] + 1/4 x[i-1]        u[2i+1] = 3/4 x[i] + 1/4 x[i+1]        x repeated beyond its ends

and a convolution of u is therefore one of x, with other weights for even and odd columns. It computes both at a time,
as the runtime's integer kernels like where output channels are few (passes/pack_columns.py); u, twice as wide as x, is
never made, nor rounded. What is joined to u, a picture, stands with two of its columns in the channels. The result lies
in memory as before, channels last:

    [N, 2C, H, W/2] -> [N, H, W/2, 2C] -> [N, H, W, C] -> [N, C, H, W]

The outermost two columns on each side see the padding and x's repeated end, and have convolutions of their own. Rows
are resized as they were. The float network computes the same numbers as before, up to the order of its sums.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from passes.pack_columns import FEW, move_columns
from vmq.graph import Constant, Graph
from vmq.layers import doubled_axes
from vmq.pipeline import Context, Pass, PassResult

PICTURE = 4
"""Channels that may be joined to what is resized: their weights are multiplied by zeros for the most part."""


class FoldResizes(Pass):
    """Fold the columns of a Resize by 2 into the convolution behind it, where that has 16 output channels or fewer."""

    name: ClassVar[str] = "fold_resizes"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Leave in `context.found`, for each new convolution, the name of the one that it is a part of.

        The report is that of find_closures, with the new nodes in it.
        """
        target = context.options.target
        if not target.integer_layout or "Resize" not in target.forms:
            return PassResult()
        folded, places, report = 0, dict[str, str](), dict[str, Any]()
        for node in list(graph.nodes):
            parts = _resized_parts(graph, node)
            if parts is not None:
                known = {n.name for n in graph.nodes}
                name = node.name
                _fold(graph, node, *parts)
                places |= {n.name: name for n in graph.nodes if n.name not in known}
                folded += 1
        if folded:
            graph.cleanup()
            graph.sort()
            context.found[self.name] = {n.name: places[n.name] for n in graph.nodes
                                        if n.op == "Conv" and n.name in places}
            if (closures := context.found.get("find_closures")) is not None:
                context.found["find_closures"] = closures = closures.with_new(graph, places)
                report = closures.to_json()
        return PassResult(modified=folded, report=report)


def _resized_parts(graph: Graph, conv: Any) -> tuple[Any, list[Any]] | None:
    """The Resize in front of a convolution that suits, and what is joined to its result; None where none is."""
    if conv.op != "Conv" or not all(isinstance(v, Constant) for v in conv.inputs[1:]) or not _is_plain(conv):
        return None
    value, others = conv.inputs[0], list[Any]()
    before = value.inputs[0] if value.inputs else None
    if before is not None and before.op == "Concat" and before.attrs["axis"] == 1 and _read_once(graph, value):
        value, *others = before.inputs
    resize = value.inputs[0] if value.inputs else None
    if resize is None or doubled_axes(resize) != (2, 3) or not _read_once(graph, value) \
            or any(isinstance(v, Constant) or len(v.shape or ()) != 4 for v in others) \
            or sum(v.shape[1] for v in others) > PICTURE or resize.inputs[0].shape[3] < 4:
        return None
    return resize, others


def _is_plain(conv: Any) -> bool:
    """True for a convolution three columns wide that keeps height and width, of few output channels."""
    weight = conv.inputs[1].values
    return weight.ndim == 4 and weight.shape[0] <= FEW and weight.shape[3] == 3 \
        and conv.attrs.get("group", 1) == 1 and conv.attrs.get("auto_pad", "NOTSET") == "NOTSET" \
        and all(n == 1 for name in ("strides", "dilations") for n in conv.attrs.get(name, [])) \
        and list(conv.attrs.get("pads", [0] * 4))[1::2] == [1, 1]


def _read_once(graph: Graph, value: Any) -> bool:
    return len(value.outputs) == 1 and not any(o is value for o in graph.outputs)


def _fold(graph: Graph, conv: Any, resize: Any, others: list[Any]) -> None:
    x, y = resize.inputs[0], conv.outputs[0]
    count, channels, height, width = x.shape
    resize.attrs = {"mode": "linear"}
    resize.inputs = [x, Constant("", np.zeros(0, np.float32)),
                     graph.constant("factors", np.asarray([1.0, 1.0, 2.0, 1.0], np.float32))]
    rows = resize.outputs[0]
    rows.shape = [count, channels, 2 * height, width]
    joined = rows
    if others:
        parts = [rows, *(move_columns(graph, v, 2 * v.shape[1], v.name) for v in others)]
        joined = graph.add("Concat", parts, f"{rows.name}_joined", {"axis": 1},
                           [count, sum(p.shape[1] for p in parts), *rows.shape[2:]])
    weight = np.asarray(conv.inputs[1].values, np.float64)
    sizes = [v.shape[1] for v in others]
    pads = list(conv.attrs["pads"])
    relu = y.outputs[0] if _read_once(graph, y) and y.outputs[0].op == "Relu" else None
    result = relu.outputs[0] if relu is not None else y
    tall = y.shape[2]

    def columns(side: int, reads: Any, wide: int) -> Any:
        """What one convolution gives: the left end (-1), the middle (0), or the right end (1)."""
        values = _weights(weight, channels, sizes, side).astype(np.float32)
        bias = [graph.constant(f"{b.name}_twice", np.tile(np.asarray(b.values), 2)) for b in conv.inputs[2:]]
        attrs = {"kernel_shape": list(values.shape[2:]), "pads": [pads[0], 0, pads[2], 0]}
        made = graph.add("Conv", [reads, graph.constant(f"{conv.inputs[1].name}_columns", values), *bias],
                         f"{y.name}_columns", attrs, [count, values.shape[0], tall, wide])
        return made if relu is None else graph.add("Relu", [made], f"{result.name}_columns", {}, made.shape)

    ends = [_cut(graph, joined, 0, 2), _cut(graph, joined, width - 2, width)]
    together = [columns(-1, ends[0], 1), columns(0, joined, width - 2), columns(1, ends[1], 1)]
    middle = together[1].inputs[0] if relu is None else together[1].inputs[0].inputs[0].inputs[0]
    whole = graph.add("Concat", together, f"{result.name}_joined", {"axis": 3},
                      [count, 2 * weight.shape[0], tall, width])
    apart = move_columns(graph, whole, weight.shape[0], result.name)
    graph.replace_uses(result, apart)
    name = conv.name
    graph.remove(conv)
    middle.name = name                      # it stands for the same layer


def _cut(graph: Graph, value: Any, first: int, last: int) -> Any:
    """Columns of a value; those at its end are counted from there, so that other widths follow."""
    width = value.shape[3]
    ends = [first - width, 2**31 - 1] if first else [first, last]
    numbers = [graph.constant("columns", np.asarray([n], np.int64)) for n in (*ends, 3)]
    return graph.add("Slice", [value, *numbers], f"{value.name}_end", {}, [*value.shape[:3], last - first])


def _weights(weight: NDArray[np.float64], channels: int, others: list[int], side: int) -> NDArray[np.float64]:
    """Weights [2C, channels + 2 others, k, 3 or 2] for both columns of a pair.

    Args:
        weight: of a convolution [C, channels + others, k, 3] of what is resized and what is joined to it.
        channels: of what is resized.
        others: channels of each value that is joined to it.
        side: -1 and 1 for the outermost pair on the left and right, which reads two columns of x; 0 for those between.
    """
    filters, _, tall, _ = weight.shape
    first = {-1: 0, 0: -1, 1: -1}[side]            # of the columns that are read, beside that of the pair
    count = 3 if side == 0 else 2
    made = np.zeros((2 * filters, channels + 2 * sum(others), tall, count))
    for phase in (0, 1):
        rows = made[phase * filters:(phase + 1) * filters]
        for tap in (-1, 0, 1):
            column, half = divmod(phase + tap, 2)
            if not first <= column < first + count:
                continue                           # padding
            taken = weight[:, :, :, tap + 1]
            far = min(max(column + 2 * half - 1, first), first + count - 1) if side else column + 2 * half - 1
            rows[:, :channels, :, column - first] += 0.75 * taken[:, :channels]
            rows[:, :channels, :, far - first] += 0.25 * taken[:, :channels]
            place = start = channels
            for size in others:
                into = place + half * size
                rows[:, into:into + size, :, column - first] += taken[:, start:start + size]
                place, start = place + 2 * size, start + size
    return made
