"""Bad models are refused in one line that names the node or weight; good ones stay as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_text import load, parse

from passes.check_input import CheckInput
from vmq.errors import ModelError
from vmq.graph import Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.spec import Options

NET = "(float[1,3,4,4] x, float[3,3,3,3] w_a) => (float[1,3,2,2] y) { c = Conv (x, w_a)  y = Relu (c) }"


def check(graph: Graph) -> PassResult:
    return run_passes(graph, [CheckInput()], Context(Options()))[0]


def refused(graph: Graph) -> str:
    with pytest.raises(ModelError) as error:
        check(graph)
    assert "\n" not in str(error.value)
    return str(error.value)


def with_weight(values: np.ndarray) -> Graph:  # type: ignore[type-arg]
    model = parse(NET)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w_a"))
    return Graph.load(model)


def test_a_good_model() -> None:
    graph = load(NET)
    before = graph.to_bytes()
    result = check(graph)
    assert result.modified == 0
    assert result.report == {"nodes": 2, "ops": {"Conv": 1, "Relu": 1}}
    assert graph.to_bytes() == before


def test_weights_stored_as_typed_data() -> None:
    """Reading them must not count as a change."""
    values = np.arange(81, dtype=np.float32)
    model = parse(NET)
    model.graph.initializer[0].CopyFrom(onnx.helper.make_tensor("w_a", onnx.TensorProto.FLOAT, [3, 3, 3, 3], values))
    assert check(Graph.load(model)).modified == 0


@pytest.mark.parametrize("node", [
    "q = QuantizeLinear (x, s, z)  y = DequantizeLinear (q, s, z)",
    "q, a, b = DynamicQuantizeLinear (x)  y = Cast <to = 1> (q)",
])
def test_quantized_already(node: str) -> None:
    graph = load(f"(float[4] x) => (float[4] y) <float s = {{0.1}}, uint8 z = {{0}}> {{ {node} }}")
    message = refused(graph)
    assert message.startswith("the model is quantized already: node ")
    assert graph.nodes[0].name in message
    assert graph.nodes[0].op in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(value: float) -> None:
    weight = np.zeros((3, 3, 3, 3), np.float32)
    weight.ravel()[[5, 80]] = value
    graph = with_weight(weight)
    message = refused(graph)
    assert "'w_a'" in message
    assert "holds 2 values that are NaN or infinite" in message
    assert graph.nodes[0].name in message


def test_other_float_types_are_looked_at_as_well() -> None:
    half = parse(NET.replace("float[", "float16["))
    for tensor in half.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    assert check(Graph.load(half)).modified == 0
    half.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.full((3, 3, 3, 3), np.inf, np.float16), "w_a"))
    assert "holds 81 values that are NaN or infinite" in refused(Graph.load(half))
