"""Multiply-adds counted by hand, and the widths they are done at, on graphs as they are before and after lowering."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from compiling import SIZE, network, run_to
from onnx_text import parse

from vmq.cost import cost_of, fill_shapes, saving
from vmq.graph import Graph
from vmq.runtime import Session

FRAME = np.zeros((1, 3, *SIZE), np.float32)
PLANE = SIZE[0] * SIZE[1]
FIRST, LAST = PLANE * 8 * 27, PLANE * 4 * 8 * 9
BETWEEN = PLANE * (8 * 9 + 8 * 8 + 8 * 11 * 9 + 8 * 8 * 9 + 4 * 8 * 9) + 2 * 8 * 4
"""Multiply-adds of the tests' network: first layer, last layer, the others."""


def test_multiply_adds_by_hand() -> None:
    graph = Graph.load(parse("""(float[1,3,8,10] x, float[6,3,3,3] w, float[6,1,3,3] d, float[5,20] m, float[4,5] g)
                         => (float[1,6,4,20] y, float[4,20] z) {
        a = Conv <pads = [1,1,1,1], strides = [2,2]> (x, w)
        b = Conv <pads = [1,1,1,1], group = 6> (a, d)
        r = Relu (b)
        y = MatMul (r, m)
        z = Gemm (g, m)
    }"""))
    graph.infer_shapes()
    adds = 6 * 4 * 5 * (3 * 9) + 6 * 4 * 5 * 9 + 6 * 4 * 20 * 5 + 4 * 20 * 5
    cost = cost_of(graph)
    assert cost.multiply_adds == adds
    assert cost.bops == adds * 32 * 32
    assert cost.gflops == pytest.approx(adds / 1e9)


@pytest.mark.parametrize(("bits", "weights", "activations"), [("8", 8, 8), ("w4a8", 4, 8), ("4", 4, 4)])
@pytest.mark.parametrize("container", ["int4cast", "int8", "int4"])
def test_widths_of_an_emitted_model(bits: str, weights: int, activations: int, container: str) -> None:
    """First and last layer stay at 8 bits; zero channels make the picture's 3 channels 4, the decoder's 11 twelve."""
    graph = network()
    run_to("lower", graph, bits, container=container)
    fill_shapes(graph, Session(graph), FRAME)
    cost, between, first = cost_of(graph), BETWEEN + PLANE * 8 * 9, FIRST * 4 // 3
    assert cost.multiply_adds == first + LAST + between
    assert cost.bops == (first + LAST) * 64 + between * weights * activations
    assert cost.gflops * 1e9 == pytest.approx((first + LAST) / 4 + between / saving(weights, activations))


def test_widths_before_lowering_are_the_same() -> None:
    graph = network()
    run_to("calibrate_ranges", graph, "4")
    graph.infer_shapes()
    before = cost_of(graph)
    run_to("lower", lowered := network(), "4")
    lowered.infer_shapes()
    assert before == cost_of(lowered)


def test_integer_operators() -> None:
    graph = Graph.load(parse("""(uint8[1,4,6,6] x) => (uint8[1,2,6,6] y)
        <float s = {1.0}, uint8 z = {0}, int8 k = {0}, int8[2,4,1,1] w = {9,1,1,1,1,1,1,1}> {
        y = QLinearConv (x, s, z, w, s, k, s, z)
    }"""))
    graph.infer_shapes()
    assert cost_of(graph).bops == 36 * 2 * 4 * 64


def test_free_sizes_are_found_by_running() -> None:
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]> m (float[1, 3, h, w] src)
        => (float[1, 1, a, b] pha) <float[1, 3, 1, 1] w0 = {1.0, 1.0, 1.0}, int64[1] two = {2}, int64[1] big = {99},
            float[0] none = {}> {
        shape = Shape (src)
        plane = Slice (shape, two, big)
        one = Constant <value_ints = [1, 3]> ()
        full = Concat <axis = 0> (one, plane)
        same = Resize (src, none, none, full)
        pha = Conv (same, w0)
    }""")
    graph = Graph.load(model)
    fill_shapes(graph, Session(graph), FRAME)
    assert cost_of(graph).multiply_adds == 3 * PLANE
