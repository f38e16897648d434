"""Write integers the way the runtime is fast with them. No value changes: the same bits come out.

Weights leave their float form (W -> Q -> DQ) for a container:

    int4cast   INT4 constant -> Cast to INT8 -> DQ    an eighth of the size; the Cast is folded at load
    int8       INT8 constant -> DQ                    for runtimes that cannot cast INT4
    int4       INT4 constant -> DQ                    the textbook form; ONNX Runtime's CPU kernels run it in float

A 4-bit activation becomes a uint8 tensor on the 4-bit grid: Q to uint8, Clip(0, 15), DQ. The kernels that take
uint8 stay fused, and the values are exactly the 4-bit ones. Where the target knows no Clip of integers, the float
value is clipped between two Q/DQ pairs, to the ends of the 4-bit grid: the same values. A
Clip in front of a quantizer becomes the saturation of its integers.
"""

from __future__ import annotations

import json
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from vmq import __version__
from vmq.graph import Constant, Graph
from vmq.layers import clip_limits
from vmq.pipeline import Context, Pass, PassResult
from vmq.quant import quantize
from vmq.runtime import STATES_KEY
from vmq.spec import QuantSpec

INT8 = 3
"""TensorProto.INT8, as Cast's attribute `to` says it."""
MINIMUM_RUNTIME = {"int4cast": "1.24", "int8": "1.20", "int4": "1.20"}
"""Oldest ONNX Runtime that loads each container."""


class Lower(Pass):
    """Store weights as integers, 4-bit activations as uint8 with a Clip to 16 levels; write the metadata."""

    name: ClassVar[str] = "lower"

    def run(self, graph: Graph, context: Context) -> PassResult:
        context.found["lower"] = graph.copy()       # what the emitted model is verified against
        container, weights, activations = context.options.container, 0, 0
        levels = [graph.constant("limit", np.asarray(n, np.uint8)) for n in (0, 15)]
        for node in list(graph.nodes):
            if node.op != "QuantizeLinear":
                continue
            spec = QuantSpec.of(node.inputs[2].dtype, node.attrs.get("axis"))
            if isinstance(node.inputs[0], Constant):
                _store(graph, node, spec, container)
                weights += 1
            elif spec.bits == 4:
                _saturate(graph, node, context.options.target.saturates, levels)
                activations += 1
        clips = _clip_integers(graph) if "Clip" in context.options.target.absorbed else 0
        graph.cleanup()
        graph.sort()
        narrow = any(c.dtype == np.dtype(ml_dtypes.int4) for c in graph.constants())
        graph.metadata.update(_metadata(context, container if narrow else "int8"))
        return PassResult(modified=weights + activations + clips, report={
            "weights": weights, "saturated_activations": activations, "clips": clips,
            "container": container if narrow else "int8"})


def _clip_integers(graph: Graph) -> int:
    """Clip what a quantizer gives instead of what it reads: where saturation does the same, nothing is left to do.

        Q(clip(x, a, b)) = clip(Q(x), Q(a), Q(b))        as Q never falls

    Returns how many. The kernel in front of the Clip has the quantizer to fuse with.
    """
    moved = 0
    for node in [n for n in graph.nodes if n.op == "QuantizeLinear" and not isinstance(n.inputs[0], Constant)]:
        if len(node.inputs[0].inputs) != 1 or len(node.inputs[0].outputs) != 1:
            continue
        clip = node.inputs[0].inputs[0]
        ends = clip_limits(clip)
        if ends is None or any(o is node.inputs[0] for o in graph.outputs):
            continue
        result, readers = node.outputs[0], list(node.outputs[0].outputs)
        spec = QuantSpec.of(node.inputs[2].dtype)
        low, high = quantize(np.asarray(ends, np.float32), np.asarray(node.inputs[1].values),
                             np.asarray(node.inputs[2].values).astype(np.int32), spec)
        node.inputs[0] = clip.inputs[0]
        moved += 1
        after = clip_limits(readers[0]) if len(readers) == 1 else None        # that of a 4-bit grid
        least, most = after or (spec.qmin, spec.qmax)
        if low > least or high < most:
            limits = [graph.constant("limit", np.asarray(n).astype(spec.dtype)) for n in (low, high)]
            clipped = graph.add("Clip", [result, *limits], f"{result.name}_clip", {}, result.shape, spec.dtype)
            for reader in readers:
                reader.inputs[0] = clipped
    return moved


def _store(graph: Graph, node: Any, spec: QuantSpec, container: str) -> None:
    """Replace a constant's Q by the integers it gives; 4-bit constants are weights, and so signed."""
    constant, scale, zero = node.inputs
    integers = quantize(np.asarray(constant.values), np.asarray(scale.values),
                        np.asarray(zero.values).astype(np.int32), spec)
    result, readers = node.outputs[0], list(node.outputs[0].outputs)
    if spec.bits == 8 or container == "int4":
        stored = graph.constant(result.name, integers.astype(spec.dtype))
    else:
        stored = graph.constant(result.name, integers.astype(spec.dtype if container == "int4cast" else np.int8))
        zeros = graph.constant("zero", np.asarray(zero.values).astype(np.int8))
        for reader in readers:
            reader.inputs[2] = zeros
        if container == "int4cast":
            stored = graph.add("Cast", [stored], f"{result.name}_cast", {"to": INT8}, constant.shape, np.int8)
    for reader in readers:
        reader.inputs[0] = stored
    graph.remove(node)


def _saturate(graph: Graph, node: Any, kind: str, levels: list[Any]) -> None:
    """Move a 4-bit activation quantizer onto uint8, clipped to the first and last of the 4-bit grid's levels."""
    result, readers = node.outputs[0], list(node.outputs[0].outputs)
    scale, narrow = node.inputs[1:3]
    zero = graph.constant("zero", np.asarray(narrow.values).astype(np.uint8))
    node.inputs[2] = zero
    result.dtype = np.dtype(np.uint8)
    if kind == "float":
        step, middle = np.asarray(scale.values), np.asarray(narrow.values).astype(np.float32)
        limits = [graph.constant("limit", np.asarray((n.values.astype(np.float32) - middle) * step)) for n in levels]
        value = graph.add("DequantizeLinear", [result, scale, zero], f"{result.name}_wide", {}, result.shape)
        value = graph.add("Clip", [value, *limits], f"{result.name}_clip", {}, result.shape)
        clipped = graph.add("QuantizeLinear", [value, scale, zero], f"{result.name}_narrow", {}, result.shape, np.uint8)
    else:
        clipped = graph.add("Clip", [result, *levels], f"{result.name}_clip", {}, result.shape, np.uint8)
    for reader in readers:
        reader.inputs[0] = clipped
        reader.inputs[2] = zero


def _metadata(context: Context, container: str) -> dict[str, str]:
    options = context.options
    closures = context.found["find_closures"]
    said = {key: value for key, value in options.describe().items() if value not in (None, {})}
    chosen = {c.name: c.to_json() for c in context.found.get("choose_bits", ())}
    return {
        **({"vmq.closures": json.dumps(chosen)} if chosen else {}),
        STATES_KEY: json.dumps({s.pair.input: s.pair.output for s in closures.states}),
        "vmq.version": __version__,
        "vmq.options": json.dumps(said | {"container": container}, sort_keys=True),
        "vmq.calibration": json.dumps([{"clip": c.name, "frames": len(c)} for c in context.clips]),
        "vmq.minimum_onnxruntime": MINIMUM_RUNTIME[container],
    }
