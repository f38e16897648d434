"""What a node is to the quantizer, from topology and types: a layer of some kind, a carrier of integers, neither."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.graph import Constant, Graph
from vmq.targets import Target


def compute_nodes(graph: Graph, target: Target) -> list[Any]:
    """Multiply-add nodes that can be quantized: their weight is a constant, or they multiply two activations.

    The weight of a MatMul is a matrix on the right: kernels take one scale per column of that alone.
    """
    return [n for n in graph.nodes if n.op in target.compute and _can_be_quantized(n, target)]


def _can_be_quantized(node: Any, target: Target) -> bool:
    weight = weight_of(node, target)
    if node.op != "MatMul":
        return isinstance(weight, Constant)
    return weight.values.ndim == 2 if isinstance(weight, Constant) else not isinstance(node.inputs[0], Constant)


def weight_of(node: Any, target: Target) -> Any:
    """The weight input of a multiply-add node (a Constant, unless it multiplies two activations)."""
    return node.inputs[target.compute[node.op].weight]


def weight_axis(node: Any) -> int:
    """The axis of a layer's weight that counts output channels."""
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return 0
    return len(node.inputs[1].shape) - 1


def summed_pairs(node: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Places in a layer's weight, as [outputs, pairs] of its flat indices, whose products a kernel may add in 16 bits.

    These are neighbours in the order in which integer kernels multiply: channels last, from an even one on. With
    an odd number of channels what lies beside what changes with the layout: then all neighbours are pairs.
    None for depthwise convolutions, which add one product at a time.
    """
    shape = node.inputs[1].shape
    if node.op == "Conv" and node.attrs.get("group", 1) > 1 and shape[1] == 1:
        return None
    places = np.moveaxis(np.arange(np.prod(shape)).reshape(shape), weight_axis(node), 0)
    if node.op == "Conv":
        places = np.moveaxis(places, 1, -1)
    apart = 1 if node.op == "Conv" and shape[1] % 2 else 2
    rows = places.reshape(len(places), -1)
    return rows[:, :-1:apart], rows[:, 1::apart]


def clip_limits(node: Any) -> tuple[float, float] | None:
    """The ends of a Clip, infinite where it has none; None when they are computed, or it is no Clip."""
    ends = [-np.inf, np.inf]
    if node.op != "Clip":
        return None
    for index, value in enumerate(node.inputs[1:3]):
        if value.name and not isinstance(value, Constant):
            return None
        if value.name:
            ends[index] = float(np.asarray(value.values))
    return ends[0], ends[1]


KEEPS_SIGN = frozenset({"QuantizeLinear", "DequantizeLinear", "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
                        "Transpose", "Slice", "Split", "MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool"})
"""What they make of values that are never negative, is never negative."""


def never_negative(value: Any) -> bool:
    """True for what a Relu, a sigmoid or a Clip at 0 or above makes, rounded, moved, pooled or joined as it may be."""
    if not value.inputs:
        return False
    node = value.inputs[0]
    limits = clip_limits(node)
    if node.op == "Concat":
        return all(map(never_negative, node.inputs))
    if node.op in KEEPS_SIGN:
        return never_negative(node.inputs[0])
    return node.op in ("Relu", "Sigmoid", "HardSigmoid") or (limits is not None and limits[0] >= 0.0)


def kinds_of(graph: Graph, target: Target, state_outputs: Collection[str], recurrent: Collection[str],
             ) -> dict[str, set[str]]:
    """The kinds of each multiply-add node, by node name.

    Args:
        graph: with static shapes.
        target: says which nodes are multiply-adds.
        state_outputs: names of the outputs that are recurrent states.
        recurrent: names of nodes inside recurrent closures.
    """
    layers = {id(n) for n in compute_nodes(graph, target)}
    above: set[int] = set()        # nodes with a layer among their ancestors
    for node in graph.nodes:
        producers = [p for v in node.inputs for p in v.inputs]
        if any(id(p) in layers or id(p) in above for p in producers):
            above.add(id(node))
    tail = tail_nodes(graph, target, state_outputs)
    kinds: dict[str, set[str]] = {}
    for node in graph.nodes:
        if id(node) not in layers:
            continue
        kind: set[str] = set()
        if id(node) not in above:
            kind.add("first")
        readers = list(node.outputs[0].outputs)
        if node.outputs[0].name not in state_outputs and all(r.name in tail for r in readers):
            kind.add("last")
        weight = weight_of(node, target)
        if node.op == "Conv" and node.attrs.get("group", 1) == weight.shape[0] > 1:
            kind.add("depthwise")
        if node.op == "Conv" and node.inputs[0].shape and all(d == 1 for d in node.inputs[0].shape[2:]):
            kind.add("pooled")
        if node.name in recurrent:
            kind.add("recurrent")
        kinds[node.name] = kind
    return kinds


def tail_nodes(graph: Graph, target: Target, state_outputs: Collection[str]) -> set[str]:
    """Names of nodes after the last layer: only model outputs that are no states depend on them."""
    layers = {id(n) for n in compute_nodes(graph, target)}
    inner: set[int] = set()        # nodes that a layer or a state output depends on
    for node in reversed(graph.nodes):
        if any(v.name in state_outputs for v in node.outputs) \
                or any(id(r) in layers or id(r) in inner for v in node.outputs for r in v.outputs):
            inner.add(id(node))
    return {n.name for n in graph.nodes if id(n) not in inner and id(n) not in layers}


def carries(node: Any, target: Target) -> bool:
    """True for a node that works on uint8, by a kernel of its own or in a form that passes/integer_forms.py gives it.

    Pooling of what is no integer yet stays float: a picture is pooled faster so.
    """
    if node.op in target.pools:
        maker = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        return maker is not None and (maker.op not in target.pools or carries(maker, target))
    return node.op in target.carriers or (node.op in target.forms and _has_form(node))


def _has_form(node: Any) -> bool:
    first, *others = node.inputs
    if node.op == "Resize":
        return bool(doubled_axes(node))
    if node.op == "HardSigmoid":
        return bool(node.attrs.get("alpha", 0.2) > 0.0 and 0.0 <= node.attrs.get("beta", 0.5) <= 1.0)
    if node.op == "Sub":
        return not isinstance(others[0], Constant) and (
            not isinstance(first, Constant) or (first.values.size == 1 and float(first.values.ravel()[0]) > 0.0))
    return True


def dead_below(x: Any) -> NDArray[np.float32] | None:
    """The values below which x * hardsigmoid(c x) is 0, [1,C,1,1], where nothing else reads x; c one number a channel.

    What is below needs no levels.
    """
    scaled = [r for r in x.outputs if r.op == "Mul" and isinstance(r.inputs[1], Constant)]
    gates = [g for r in scaled for g in r.outputs[0].outputs if g.op == "HardSigmoid"]
    if len(x.outputs) != 2 or len(gates) != 1 or not any(r.op == "Mul" and gates[0].outputs[0] in list(r.inputs)
                                                         for r in x.outputs):
        return None
    end = gates[0].attrs.get("beta", 0.5) / gates[0].attrs.get("alpha", 0.2)
    return np.asarray(-end / scaled[0].inputs[1].values, np.float32)


def whole_factors(node: Any) -> dict[int, int]:
    """By axis, 2 for height and 3 for width, the whole number that a Resize of pictures makes it longer by, linear
    between pixels' centres; none where it does anything else.
    """
    if node.op != "Resize" or node.attrs.get("mode", "nearest") != "linear" or node.attrs.get("antialias", 0) \
            or "axes" in node.attrs or node.attrs.get("coordinate_transformation_mode", "half_pixel") not in (
                "half_pixel", "pytorch_half_pixel"):
        return {}
    x, y = node.inputs[0].shape, node.outputs[0].shape
    if x is None or y is None or len(x) != 4 or not all(isinstance(d, int) for d in (*x, *y)):
        return {}
    scales = [after / before for after, before in zip(y, x, strict=True)]
    said = node.inputs[2] if len(node.inputs) == 3 else None        # scales; else sizes, which are the result's
    if said is not None and not (isinstance(said, Constant) and [float(s) for s in said.values] == scales):
        return {}
    factors = {axis: int(scale) for axis, scale in enumerate(scales) if scale != 1.0}
    return factors if all(axis >= 2 and factor == scales[axis] >= 2 for axis, factor in factors.items()) else {}


def doubled_axes(node: Any) -> tuple[int, ...]:
    """The axes that a linear Resize of pictures makes twice as long; none where it does anything else."""
    factors = whole_factors(node)
    return tuple(factors) if set(factors.values()) == {2} else ()


def nodes_behind(value: Any) -> list[Any]:
    """All nodes that need a value, directly or through others."""
    todo, found, seen = [value], list[Any](), set[int]()
    while todo:
        for reader in todo.pop().outputs:
            if id(reader) not in seen:
                seen.add(id(reader))
                found.append(reader)
                todo += reader.outputs
    return found


def float_source(value: Any) -> Any:
    """The float value that a value of a quantized graph stands for: through the Q/DQ pairs before it.

    Integers that are read with another scale or zero point than they were written with stand for themselves.
    """
    while value.inputs:
        node = value.inputs[0]
        if node.op == "DequantizeLinear" and not (node.inputs[0].inputs and same_grid(node.inputs[0].inputs[0], node)):
            break
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            break
        value = node.inputs[0]
    return value


def same_grid(one: Any, other: Any) -> bool:
    """True for two Q or DQ nodes with the same scale and zero point."""
    return one.op in ("QuantizeLinear", "DequantizeLinear") and all(
        a is b or (isinstance(a, Constant) and isinstance(b, Constant) and a.dtype == b.dtype
                   and np.array_equal(np.asarray(a.values), np.asarray(b.values)))
        for a, b in zip(one.inputs[1:], other.inputs[1:], strict=True))


def quantizer_of(dequantize: Any) -> tuple[Any, tuple[int, int] | None] | None:
    """The QuantizeLinear that a DequantizeLinear undoes, and the limits of a Clip between them."""
    source = dequantize.inputs[0].inputs
    limits = None
    if source and source[0].op == "Clip" and all(isinstance(v, Constant) for v in source[0].inputs[1:]):
        bounds = [int(np.asarray(v.values)) for v in source[0].inputs[1:]]
        if len(bounds) == 2:
            limits = (bounds[0], bounds[1])
            source = source[0].inputs[0].inputs
    if not source or source[0].op != "QuantizeLinear":
        return None
    quantize = source[0]
    if len(quantize.inputs) != len(dequantize.inputs) or not all(
            isinstance(a, Constant) and isinstance(b, Constant) and a.dtype == b.dtype
            and np.array_equal(np.asarray(a.values), np.asarray(b.values))
            for a, b in zip(quantize.inputs[1:], dequantize.inputs[1:], strict=True)):
        return None
    if quantize.attrs.get("axis", 1) != dequantize.attrs.get("axis", 1) and quantize.inputs[1].values.size > 1:
        return None
    return quantize, limits


def written_by(dequantize: Any) -> Any:
    """The QuantizeLinear of a whole tensor whose integers a DequantizeLinear reads in another way; None if none is."""
    quantize = dequantize.inputs[0].inputs[0] if dequantize.inputs[0].inputs else None
    if quantize is None or quantize.op != "QuantizeLinear" or quantizer_of(dequantize) is not None \
            or not all(len(n.inputs) == 3 and n.inputs[1].values.size == 1 for n in (quantize, dequantize)):
        return None
    return quantize


def homes(graph: Graph, blocks: Sequence[Collection[str]]) -> dict[str, int]:
    """The block that each node of a quantized graph belongs to, by the node's name.

    A quantizer stands behind what makes its value; those of weights, frames and states with their first reader, and
    so do the parts of which passes/integer_forms.py makes an operator.

    Args:
        graph: quantized, sorted.
        blocks: names of each block's nodes in the float graph, in topological order.
    """
    own = {name: index for index, nodes in enumerate(blocks) for name in nodes}
    home = dict(own)
    for node in graph.nodes:
        producers = node.inputs[0].inputs if node.inputs else []
        if node.name not in own and producers and producers[0].name in home and (
                node.op == "QuantizeLinear" or (node.op == "DequantizeLinear" and same_grid(producers[0], node))):
            home[node.name] = home[producers[0].name]
    for node in reversed(graph.nodes):
        if node.name not in home:
            readers = [home[r.name] for o in node.outputs for r in o.outputs if r.name in home]
            home[node.name] = min(readers, default=len(blocks) - 1)
    return home
