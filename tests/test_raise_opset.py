"""Older models reach opset 21 and compute the same; newer ones stay as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_text import load, parse, run

from models import rvm
from passes.raise_opset import RaiseOpset
from vmq.errors import PassError
from vmq.graph import OPSET, Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.spec import Options


def raise_opset(graph: Graph) -> PassResult:
    return run_passes(graph, [RaiseOpset()], Context(Options()))[0]


# What changed its form on the way: Split, Squeeze, Unsqueeze and ReduceSum got inputs for attributes in 13,
# ReduceMean and Split again in 18, BatchNormalization changed in 14 and 15, Resize in 13, 18 and 19.
BEFORE_13 = """(float[1,4,6,8] x, float[4,4,3,3] w_a, float[4] w_g, float[4] w_b, float[4] w_m)
        => (float[1,2,12,16] y, float[1,4] z, float[1,4,6,8] s)
        <float[4] var = {0.5, 1.0, 2.0, 3.0}, float[4] scales = {1.0, 1.0, 2.0, 2.0},
         float[8] roi = {0., 0., 0., 0., 1., 1., 1., 1.},
         float low = {0.0}, float high = {6.0}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}> {
    p = Pad (x, pads, low)
    c = Conv (p, w_a)
    n = BatchNormalization (c, w_g, w_b, w_m, var)
    r = Clip (n, low, high)
    a, b = Split <axis = 1, split = [2, 2]> (r)
    y = Resize <mode = "linear", coordinate_transformation_mode = "pytorch_half_pixel"> (a, roi, scales)
    m = ReduceMean <axes = [2, 3], keepdims = 1> (r)
    q = Squeeze <axes = [2, 3]> (m)
    z = HardSigmoid <alpha = 0.1666667, beta = 0.5> (q)
    t = ReduceSum <axes = [1], keepdims = 1> (r)
    s = Add (r, t)
}"""
FROM_13 = (BEFORE_13.replace("Split <axis = 1, split = [2, 2]> (r)", "Split <axis = 1> (r, two)")
           .replace("Squeeze <axes = [2, 3]> (m)", "Squeeze (m, hw)")
           .replace("ReduceSum <axes = [1], keepdims = 1> (r)", "ReduceSum <keepdims = 1> (r, one)")
           .replace("<float[4] var", "<int64[2] two = {2, 2}, int64[2] hw = {2, 3}, int64[1] one = {1}, float[4] var"))


@pytest.mark.parametrize("opset", [11, 12, 13, 17])
def test_same_outputs(opset: int) -> None:
    model = parse(BEFORE_13 if opset < 13 else FROM_13, opset)
    model.metadata_props.add(key="author", value="nobody")
    graph = Graph.load(model)
    before, signature = run(graph), graph.signature()
    result = raise_opset(graph)
    assert graph.opset == OPSET
    assert result.modified > 0
    assert result.report == {"from": opset, "to": OPSET}
    assert graph.signature() == signature
    assert graph.metadata == {"author": "nobody"}
    for name, value in run(graph).items():
        np.testing.assert_allclose(value, before[name], rtol=1e-6, atol=1e-6)
    assert raise_opset(graph).modified == 0


@pytest.mark.parametrize("opset", [11, 12])
def test_softmax_of_the_old_meaning(opset: int) -> None:
    """Before 13 it ran over all axes from `axis` on."""
    graph = load("(float[2,3,4] x) => (float[2,3,4] y) { y = Softmax <axis = 1> (x) }", opset)
    before = run(graph)["y"]
    np.testing.assert_allclose(before.sum(axis=(1, 2)), 1, rtol=1e-6)
    raise_opset(graph)
    np.testing.assert_allclose(run(graph)["y"], before, rtol=1e-6)


def test_split_into_equal_parts() -> None:
    for opset in (11, 13, 17):
        graph = load("(float[1,4] x) => (float[1,2] a, float[1,2] b) { a, b = Split <axis = 1> (x) }", opset)
        before = run(graph)
        raise_opset(graph)
        for name, value in run(graph).items():
            np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("opset", [21, 22])
def test_new_enough(opset: int) -> None:
    graph = load("(float[4] x) => (float[4] y) { y = Relu (x) }", opset)
    before = graph.to_bytes()
    assert raise_opset(graph) == PassResult()
    assert graph.to_bytes() == before
    assert graph.opset == opset


def test_what_cannot_be_converted() -> None:
    graph = load("""(float[1,1,2,2] x) => (float[1,1,4,4] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}> {
        y = Upsample <mode = "nearest"> (x, s) }""", 9)
    try:
        raise_opset(graph)
    except PassError as error:
        assert "opset 9 cannot be converted to 21" in str(error)  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert run(graph, {"x": np.ones((1, 1, 2, 2), np.float32)})["y"].shape == (1, 1, 4, 4)


def test_rvm_of_opset_12(tmp_path: Path) -> None:
    rvm.export(rvm.build(refiner="fast"), tmp_path / "rvm.onnx", dynamic=True)
    graph = Graph.load(tmp_path / "rvm.onnx")
    feeds = {v.name: np.zeros((1, 1, 1, 1), np.float32) for v in graph.inputs}
    feeds["src"] = np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    feeds["downsample_ratio"] = np.array([0.5], np.float32)
    before = run(graph, feeds)
    assert raise_opset(graph).report["from"] == 12
    for name, value in run(graph, feeds).items():
        np.testing.assert_allclose(value, before[name], atol=2e-6)
