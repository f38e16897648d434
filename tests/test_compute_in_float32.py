"""Models in other float types compute the same in float32, and are fed and read as before."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_text import load, ops, parse, run

from passes.compute_in_float32 import ComputeInFloat32
from passes.fold_shapes import FoldShapes
from vmq.graph import Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.spec import Options

NET = "(float[2,3] x, float[3,4] w_a) => (float[2,4] y) { c = MatMul (x, w_a)  y = Relu (c) }"


def in_float32(graph: Graph) -> PassResult:
    result = run_passes(graph, [ComputeInFloat32()], Context(Options()))[0]
    graph.check()
    return result


def typed(text: str, kind: str, dtype: type) -> Graph:
    """A graph in another float type."""
    model = parse(text.replace("float[", f"{kind}["))
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    return Graph.load(model)


@pytest.mark.parametrize(("kind", "dtype", "loose"), [("float16", np.float16, 2e-3), ("double", np.float64, 1e-6)])
def test_edges_keep_their_type(kind: str, dtype: type, loose: float) -> None:
    graph = typed(NET, kind, dtype)
    signature = graph.signature()
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 3)).astype(dtype)}
    before = run(graph, feeds)["y"]
    result = in_float32(graph)
    assert graph.signature() == signature
    assert ops(graph) == ["Cast", "MatMul", "Relu", "Cast"]
    assert result.report == {"changed": 1, "inputs": ["x"], "outputs": ["y"]}
    assert result.notes == (f"x is {np.dtype(dtype).name} and stays so; what is between is compiled in float32",)
    after = run(graph, feeds)["y"]
    assert after.dtype == before.dtype == dtype
    np.testing.assert_allclose(after, before, rtol=loose, atol=loose)
    assert in_float32(graph).modified > 0        # the Casts at the edges are looked at again, and come out the same
    np.testing.assert_array_equal(run(graph, feeds)["y"], after)


def test_float32_is_left_alone() -> None:
    graph = load(NET)
    before = graph.to_bytes()
    assert in_float32(graph) == PassResult()
    assert graph.to_bytes() == before


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_weights_behind_a_cast(dtype: type) -> None:
    graph = load("(float[1,4] x, float[4,4] w_a) => (float[1,4] y) { w = Cast <to = 1> (w_a)  y = MatMul (x, w) }")
    stored = np.asarray(graph.value("w_a").values).astype(dtype)
    graph.value("w_a").values = stored
    run_passes(graph, [FoldShapes(), ComputeInFloat32()], Context(Options()))
    assert ops(graph) == ["MatMul"]
    np.testing.assert_array_equal(graph.nodes[0].inputs[1].values, stored.astype(np.float32))


def test_a_half_inside_of_float() -> None:
    graph = load("""(float[4] x) => (float[4] y, float[4] z) <float[4] f = {1.0, 2.0, 3.0, 4.0}> {
        k = Cast <to = 10> (f)
        h = Cast <to = 10> (x)  m = Mul (h, k)  y = Cast <to = 1> (m)  z = Cast <to = 1> (h)
    }""")
    feeds = {"x": np.array([0.5, 1.5, -2.0, 8.0], np.float32)}
    before = run(graph, feeds)
    run_passes(graph, [FoldShapes(), ComputeInFloat32()], Context(Options()))
    assert ops(graph) == ["Mul", "Cast"]             # z is x: a Cast that does nothing keeps the two apart
    for name, value in run(graph, feeds).items():
        np.testing.assert_array_equal(value, before[name])


def test_an_output_that_others_read() -> None:
    graph = typed("(float[4] x) => (float[4] y, float[4] z) { y = Relu (x)  z = Sqrt (y) }", "float16", np.float16)
    feeds = {"x": np.array([0.25, 4.0, -2.0, 9.0], np.float16)}
    in_float32(graph)
    found = run(graph, feeds)
    np.testing.assert_array_equal(found["y"], np.array([0.25, 4.0, 0.0, 9.0], np.float16))
    np.testing.assert_array_equal(found["z"], np.array([0.5, 2.0, 0.0, 3.0], np.float16))


def test_numbers_beyond_float32_become_its_largest() -> None:
    graph = load("(double[1] x) => (double[1] y) <double[1] k = {1e300}> { y = Min (x, k) }")
    in_float32(graph)
    constant, = graph.constants()
    assert constant.values == np.finfo(np.float32).max


def test_shape_arithmetic_is_done_by_then() -> None:
    """floor(100 * 0.29) is 28 in double, as the model says, and 29 in float32."""
    graph = load("""(float[1,1,100,100] x) => (float[1,1,n,n] y) <double factor = {0.29}, int64[1] zero = {0},
                    int64[1] two = {2}, int64[1] three = {3}> {
        shape = Shape (x)
        n = Gather (shape, three)
        d = Cast <to = 11> (n)
        m = Mul (d, factor)
        f = Floor (m)
        i = Cast <to = 7> (f)
        ones = Slice (shape, zero, two)
        sizes = Concat <axis = 0> (ones, i, i)
        y = Resize <mode = "nearest"> (x, , , sizes)
    }""")
    before = run(graph)["y"]
    assert before.shape == (1, 1, 28, 28)
    run_passes(graph, [FoldShapes(), ComputeInFloat32()], Context(Options()))
    assert ops(graph) == ["Resize"]
    np.testing.assert_array_equal(run(graph)["y"], before)
