"""Tiny graphs written as ONNX text, and ONNX Runtime with optimizations off as the judge of what they compute."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx.parser
import onnxruntime as ort
from numpy.typing import NDArray

from vmq.graph import Graph


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


def ops(graph: Graph) -> list[str]:
    """The operators in the order of the graph."""
    return [n.op for n in graph.nodes]
