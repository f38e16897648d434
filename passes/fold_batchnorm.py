"""Fold what scales and shifts channels into the convolution beside it.

BatchNormalization after Conv, ConvTranspose or Gemm, with k = gamma / sqrt(variance + epsilon):

    W' = k * W        b' = k * (b - mean) + beta

which may be that of some channels alone, cut off by a Split or Slice (the others have k = 1 and keep their bias);
and division by a constant before a convolution (input normalisation by a standard deviation): W' = W / std.
A factor a channel needs the shapes of values to be known, as bind_shapes leaves them.
The subtraction of a mean stays: zero padding stands for the value 0, not for the mean.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph
from vmq.pipeline import Context, Pass, PassResult


class FoldBatchnorm(Pass):
    """Fold BatchNormalization into the convolution before it, and input scaling into the one after it."""

    name: ClassVar[str] = "fold_batchnorm"

    def run(self, graph: Graph, context: Context) -> PassResult:
        norms = scalings = 0
        notes: list[str] = []
        for node in list(graph.nodes):
            if node.op == "BatchNormalization":
                why_not = _fold_norm(graph, node)
                norms += not why_not
                if why_not:
                    notes.append(f"{node.name}: {why_not}")
            elif node.op in ("Div", "Mul") and _fold_scaling(graph, node):
                scalings += 1
        return PassResult(modified=norms + scalings, notes=tuple(notes),
                          report={"batchnorms": norms, "input_scalings": scalings})


def _fold_norm(graph: Graph, norm: Any) -> str:
    """Fold one BatchNormalization; returns why it cannot be, or nothing."""
    value = norm.inputs[0]
    if len(value.outputs) != 1 or any(o is value for o in graph.outputs):
        return f"what it reads, {value.name}, is read elsewhere too; left as it is"
    whole, first = _cut_from(value)
    layer = whole.inputs[0] if whole.inputs else None
    if layer is None or layer.op not in ("Conv", "ConvTranspose", "Gemm"):
        return f"it does not follow a convolution but {layer.op if layer else 'an input'}; left as it is"
    if whole is not value and not _cut_only(graph, whole, value):
        return f"other channels of {layer.name} are not cut off its own; left as it is"
    if not all(isinstance(v, Constant) for v in (*layer.inputs[1:], *norm.inputs[1:]) if v.name):
        return "weight or statistics are computed, not constant; left as it is"
    if norm.attrs.get("training_mode", 0):
        return "it normalises by the statistics of the batch (a training export); left as it is"
    gamma, beta, mean, variance = (np.asarray(v.values, np.float64) for v in norm.inputs[1:5])
    factor = gamma / np.sqrt(variance + norm.attrs.get("epsilon", 1e-5))
    shift = beta - factor * mean
    weight = np.asarray(layer.inputs[1].values, np.float64)
    biased = len(layer.inputs) > 2 and layer.inputs[2].name
    bias = np.asarray(layer.inputs[2].values, np.float64) if biased else np.zeros(1)
    if whole is not value:                       # the other channels stay as they are
        channels = (whole.shape or [0, 0])[1]
        after = channels - first - len(factor)
        factor = np.pad(factor, (first, after), constant_values=1.0)
        shift = np.pad(shift, (first, after))
    if layer.op == "Gemm":
        if layer.attrs.get("beta", 1.0) != 1.0 or layer.attrs.get("alpha", 1.0) != 1.0:
            return f"{layer.name} has factors of its own; left as it is"
        if any(d != 1 for d in bias.shape[:-1]):
            return f"the bias of {layer.name} differs from row to row; left as it is"
        scaled = weight * (factor[:, None] if layer.attrs.get("transB", 0) else factor[None, :])
    elif layer.op == "ConvTranspose":
        groups = layer.attrs.get("group", 1)
        scaled = (weight.reshape(groups, -1, *weight.shape[1:])
                  * factor.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
    else:
        scaled = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    _set_weights(graph, layer, scaled, factor * bias.reshape(-1) + shift)
    graph.replace_uses(norm.outputs[0], value)
    graph.remove(norm)
    return ""


def _cut_from(value: Any) -> tuple[Any, int]:
    """The value that a Split or Slice of channels cut `value` from, and the first channel; or itself and 0."""
    node = value.inputs[0] if value.inputs else None
    source = node.inputs[0] if node is not None and node.inputs else None
    shape, cut = list(getattr(source, "shape", None) or []), list(value.shape or [])
    if node is None or len(shape) < 2 or not all(isinstance(d, int) for d in (*shape, *cut)) \
            or shape[:1] + shape[2:] != cut[:1] + cut[2:]:
        return value, 0
    if node.op == "Split":
        place = next(k for k, v in enumerate(node.outputs) if v is value)
        before = [(v.shape or [0, 0])[1] for v in node.outputs[:place]]
        return (source, sum(before)) if all(isinstance(d, int) for d in before) else (value, 0)
    given = [np.asarray(v.values).tolist() if isinstance(v, Constant) else [] for v in node.inputs[1:]]
    if node.op == "Slice" and len(given) >= 3 and all(len(g) == 1 for g in given):
        (start,), (_,), (axis,), (step,) = (*given, [1])[:4]
        if axis % len(shape) == 1 and step == 1:
            return source, start % shape[1] if start < 0 else min(start, shape[1])
    return value, 0


def _cut_only(graph: Graph, whole: Any, value: Any) -> bool:
    """Whether `whole` is only cut into channels, and no other part of it holds channels of `value`."""
    if any(o is whole for o in graph.outputs):
        return False
    _, first = _cut_from(value)
    last = first + value.shape[1]
    for node in whole.outputs:
        for part in node.outputs:
            source, begin = _cut_from(part)
            overlaps = begin < last and first < begin + (part.shape or [0, 0])[1]
            if source is not whole or (part is not value and overlaps):
                return False
    return True


def _fold_scaling(graph: Graph, node: Any) -> bool:
    """Fold x / std or x * k in front of convolutions that all take it as their input; True when done."""
    value, other = node.inputs
    if node.op == "Mul" and isinstance(value, Constant):
        value, other = other, value
    readers, result = list(node.outputs[0].outputs), node.outputs[0]
    if not isinstance(other, Constant) or isinstance(value, Constant) or not readers \
            or any(o is result for o in graph.outputs):
        return False
    for reader in readers:
        if reader.op != "Conv" or not isinstance(reader.inputs[1], Constant) \
                or any(v is result for v in reader.inputs[1:]):
            return False
    rank = np.asarray(readers[0].inputs[1].values).ndim
    factor = np.asarray(other.values, np.float64)
    if factor.size != 1 and (factor.ndim not in (rank - 1, rank) or factor.size != factor.shape[-rank + 1]
                             or (value.shape or [])[1:2] != [factor.size]):
        return False                     # anything but one number a channel, [C,1,1] or [1,C,1,1]
    if node.op == "Div" and not factor.all():
        return False
    factor = 1.0 / factor.reshape(-1) if node.op == "Div" else factor.reshape(-1)
    for reader in readers:
        weight = np.asarray(reader.inputs[1].values, np.float64)     # [out, in / groups, ...]
        groups, per_group = reader.attrs.get("group", 1), weight.shape[1]
        by_input = np.broadcast_to(factor, (groups * per_group,)).reshape(groups, 1, per_group)
        by_weight = np.broadcast_to(by_input, (groups, weight.shape[0] // groups, per_group))
        _set_weights(graph, reader, weight * by_weight.reshape(weight.shape[0], per_group, *[1] * (rank - 2)), None)
    graph.replace_uses(result, value)
    graph.remove(node)
    return True


def _set_weights(graph: Graph, layer: Any, weight: NDArray[np.float64], bias: NDArray[np.float64] | None) -> None:
    """Give a layer new constants of its own (other layers may share the old ones)."""
    layer.inputs[1] = graph.constant(f"{layer.inputs[1].name}_folded", weight.astype(np.float32))
    if bias is not None:
        fresh = graph.constant(f"{layer.name}_bias_folded", bias.astype(np.float32))
        layer.inputs = [*layer.inputs[:2], fresh]
