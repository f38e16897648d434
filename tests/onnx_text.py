"""Tiny graphs written as ONNX text, and ONNX Runtime with optimizations off as the judge of what they compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray

from passes.find_closures import Closures
from vmq.graph import Graph
from vmq.pipeline import Context, Pass, PassResult, run_passes
from vmq.spec import Options


def parse(text: str, opset: int = 21, ir_version: int = 10) -> onnx.ModelProto:
    """A model from `(inputs) => (outputs) <initializers> { nodes }`.

    Inputs whose names begin with `w_` become random float initializers of their shape.
    """
    model = onnx.parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]> tiny {text}')
    rng = np.random.default_rng(0)
    for value in [v for v in model.graph.input if v.name.startswith("w_")]:
        shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
        array = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
        model.graph.input.remove(value)
    return model


def load(text: str, opset: int = 21) -> Graph:
    """As `parse`, as a Graph."""
    return Graph.load(parse(text, opset))


def run(model: Graph | onnx.ModelProto, feeds: Mapping[str, NDArray[Any]] | None = None, *, seed: int = 0,
        ) -> dict[str, NDArray[Any]]:
    """All outputs by name; without `feeds` every (static) float input gets normal noise."""
    proto = model.to_proto() if isinstance(model, Graph) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if feeds is None:
        rng = np.random.default_rng(seed)
        feeds = {i.name: rng.normal(size=i.shape).astype(np.float32) for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def run_optimized(model: Graph, feeds: Mapping[str, NDArray[Any]], path: Path) -> tuple[list[NDArray[Any]], set[str]]:
    """All outputs of the optimized model in their order, and the operators that ONNX Runtime ran; `path` is scratch."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(model.to_bytes(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds)), {n.op_type for n in onnx.load(path).graph.node}


def quantized(body: str, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]],
              grids: Mapping[str, tuple[float, int]]) -> Graph:
    """A graph in which nodes stand between uint8 quantizers, with shapes inferred.

    Args:
        body: nodes that read `inputs` and make `outputs`, and may read the numbers `one` and `two`.
        inputs, outputs: shapes by name; the model's own are `{name}_in` and `{name}_out`.
        grids: scale and zero point of every one of them, by name.
    """
    def pair(source: str, name: str, result: str) -> str:
        grid = f"{name}_scale, {name}_zero"
        return f"{name}_q = QuantizeLinear ({source}, {grid})  {result} = DequantizeLinear ({name}_q, {grid})"

    def listed(shapes: Mapping[str, Sequence[int]], suffix: str) -> str:
        return ", ".join(f"float[{','.join(map(str, s))}] {n}{suffix}" for n, s in shapes.items())

    constants = ", ".join(f"float {n}_scale = {{{scale!r}}}, uint8 {n}_zero = {{{zero}}}"
                          for n, (scale, zero) in grids.items())
    graph = load(f"""({listed(inputs, "_in")}) => ({listed(outputs, "_out")})
        <{constants}, float one = {{1}}, float two = {{2}}> {{
        {" ".join(pair(f"{n}_in", n, n) for n in inputs)}
        {body}
        {" ".join(pair(n, n, f"{n}_out") for n in outputs)}
    }}""")
    graph.infer_shapes()
    return graph


def apply(step: Pass, graph: Graph) -> PassResult:
    """Run one pass on a graph, with the invariants that hold after every pass."""
    return run_passes(graph, [step], Context(Options(), found={"find_closures": Closures((), ())}))[0]


def short(scale: float) -> float:
    """A scale in 12 significant bits, as calibration gives them."""
    part, exponent = np.frexp(scale)
    return float(np.ldexp(np.rint(np.ldexp(part, 12)), exponent - 12))


def ops(graph: Graph) -> list[str]:
    """The operators in the order of the graph."""
    return [n.op for n in graph.nodes]
