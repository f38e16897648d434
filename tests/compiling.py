"""What tests of passes and of compile share: a small recurrent matting network, clips, a run of the pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from tiny_recurrent import read

from passes import PIPELINE
from vmq.clips import Clip
from vmq.graph import Graph
from vmq.pipeline import Context, run_passes
from vmq.spec import Bits, Options
from vmq.synthetic import synthetic_clips

SIZE = (32, 48)

# Every kind of edge that placement decides about: residual, squeeze-excite, hardswish, a GRU, a skip from the frame.
NETWORK = """(float[1,3,32,48] src, float[1,4,32,48] r, float[8,3,3,3] w0, float[8] w0b, float[8,1,3,3] w1,
              float[8] w1b, float[4,8,1,1] w2, float[8,4,1,1] w3, float[8,8,1,1] w4, float[8] w4b,
              float[8,11,3,3] w5, float[8] w5b, float[8,8,3,3] w6, float[8] w6b, float[4,8,3,3] w7,
              float[4,8,3,3] w8, float[4] w8b)
           => (float[1,3,32,48] fgr, float[1,1,32,48] pha, float[1,4,32,48] s) {
    first = Conv <pads = [1,1,1,1]> (src, w0, w0b)
    a = HardSwish (first)
    deep = Conv <pads = [1,1,1,1], group = 8> (a, w1, w1b)
    b = Relu (deep)
    pool = GlobalAveragePool (b)
    f1 = Conv (pool, w2)
    f2 = Relu (f1)
    f3 = Conv (f2, w3)
    gate = HardSigmoid <alpha = 0.16666667> (f3)
    c = Mul (b, gate)
    point = Conv (c, w4, w4b)
    d = Add (a, point)
    joined = Concat <axis = 1> (d, src)
    mixed = Conv <pads = [1,1,1,1]> (joined, w5, w5b)
    e = Relu (mixed)
    left, x = Split <axis = 1, num_outputs = 2> (e)
    xr = Concat <axis = 1> (x, r)
    g = Conv <pads = [1,1,1,1]> (xr, w6, w6b)
    gates = Sigmoid (g)
    reset, update = Split <axis = 1, num_outputs = 2> (gates)
    kept = Mul (reset, r)
    xk = Concat <axis = 1> (x, kept)
    n = Conv <pads = [1,1,1,1]> (xk, w7)
    new = Tanh (n)
    delta = Sub (new, r)
    move = Mul (update, delta)
    s = Add (r, move)
    both = Concat <axis = 1> (left, s)
    head = Conv <pads = [1,1,1,1]> (both, w8, w8b)
    residual = Slice (head, wstart, wthree, wone)
    alpha = Slice (head, wthree, wfour, wone)
    shifted = Add (src, residual)
    fgr = Sigmoid (shifted)
    pha = Sigmoid (alpha)
}"""


def network() -> Graph:
    """The network with random weights, as a graph."""
    text = NETWORK
    for name in ("wstart", "wthree", "wfour", "wone"):
        text = text.replace("float[1,4,32,48] r,", f"float[1,4,32,48] r, int64[1] {name},", 1)
    graph = read(text)
    for name, value in (("wstart", 0), ("wthree", 3), ("wfour", 4), ("wone", 1)):
        graph.value(name).values = np.array([value])
    for constant in graph.constants():
        if constant.dtype == np.float32:
            constant.values = (0.4 * constant.values).astype(np.float32)
    return graph


def clips(count: int = 2, frames: int = 4, size: tuple[int, int] = SIZE) -> list[Clip]:
    """Small built-in clips."""
    return synthetic_clips(size, count=count, frames=frames, seed=5)


def run_to(name: str, graph: Graph, bits: str = "8", footage: Sequence[Clip] | None = None, **options: Any) -> Context:
    """Take a graph through the pipeline up to and with the pass `name`; returns the context."""
    names = [p.name for p in PIPELINE]
    context = Context(Options(bits=Bits.parse(bits), **options), clips() if footage is None else footage)
    run_passes(graph, PIPELINE[:names.index(name) + 1], context)
    return context


def rerun(name: str, graph: Graph, context: Context, **options: Any) -> Any:
    """Run one pass again on a graph, in the context of an earlier run."""
    step = next(p for p in PIPELINE if p.name == name)
    changed = dataclasses.replace(context, options=dataclasses.replace(context.options, **options))
    return run_passes(graph, [step], changed)[0]


def constants(graph: Graph) -> dict[str, NDArray[Any]]:
    """Copies of a graph's constants, by name."""
    return {c.name: np.array(c.values) for c in graph.constants()}


def changed(before: Graph, after: Graph) -> set[str]:
    """Names of the constants that differ between two graphs of the same constants."""
    old, new = constants(before), constants(after)
    assert old.keys() == new.keys()
    return {n for n, value in old.items() if not np.array_equal(value, new[n])}


def optimized_ops(graph: Graph, path: Any) -> dict[str, int]:
    """Operator counts of the graph as ONNX Runtime really runs it."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    ort.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    counts: dict[str, int] = {}
    for node in onnx.load(path).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return counts
