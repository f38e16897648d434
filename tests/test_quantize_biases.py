"""Biases lie on the steps in which integer convolutions add."""

from __future__ import annotations

import numpy as np
import pytest
from compiling import network, run_to
from onnx_text import apply, load, ops, run

from passes.double_sizes import DoubleSizes
from passes.quantize_biases import MOVE, QuantizeBiases
from vmq.recipe import Recipe


def test_biases_move_by_half_a_step_at_most_and_become_int32():
    before, graph = network(), network()
    run_to("correct_biases", before)
    run_to("quantize_biases", graph)
    floats = {n.name: np.asarray(n.inputs[2].values) for n in before.nodes if n.op == "Conv" and len(n.inputs) > 2}
    assert len(floats) == 9
    for node in graph.nodes:
        if node.name not in floats:
            continue
        dequantize = node.inputs[2].inputs[0]
        assert dequantize.op == "DequantizeLinear"
        integers, scale = (np.asarray(v.values) for v in dequantize.inputs)
        assert integers.dtype == np.int32
        activation, weight = (np.asarray(v.inputs[0].inputs[1].values) for v in node.inputs[:2])
        assert np.array_equal(scale, activation * weight)     # bit for bit: what the kernel uses
        assert (np.abs(integers * scale.astype(np.float64) - floats[node.name]) <= 0.5001 * scale).all()


def test_layers_without_bias_are_left_alone():
    graph = network()
    run_to("quantize_biases", graph, recipe=Recipe("plain", correct_biases=False))
    assert sum(n.op == "Conv" and len(n.inputs) == 2 for n in graph.nodes) == 3


@pytest.mark.parametrize(("scale", "moves"), [(0.09, True), (0.09 * 1.0000002, True), (0.09 * 1.00001, False),
                                              (0.0901, False)])
@pytest.mark.parametrize("kind", ["uint8", "uint4"])
def test_scales_of_a_resize_move_off_halves(scale: float, moves: bool, kind: str):
    """0.03 (3 a + b) / 4 lies in the middle between two steps of 0.09 for some a and b, up to rounding."""
    graph = load(f"""(float[1,4,5,6] x) => (float[1,4,5,12] out)
            <float s = {{0.03}}, float t = {{{scale}}}, uint8 z = {{0}}, {kind} low = {{0}}> {{
        x_q = QuantizeLinear (x, s, z)  x_d = DequantizeLinear (x_q, s, z)
        f = Constant <value_floats = [1.0, 1.0, 1.0, 2.0]> ()
        y = Resize <mode = "linear"> (x_d, , f)
        y_q = QuantizeLinear (y, t, low)  out = DequantizeLinear (y_q, t, low)
    }}""")
    graph.infer_shapes()
    graph.fold_constants()
    assert apply(QuantizeBiases(), graph).modified == moves
    read, write = graph.value("x_d").inputs[0], graph.value("x_q").inputs[0]
    assert float(write.inputs[1].values) == np.float32(0.03)
    assert float(read.inputs[1].values) / np.float32(0.03) == pytest.approx(1.0 + MOVE * moves, abs=1e-6)
    if kind == "uint8":
        doubled = graph.copy()
        doubled.infer_shapes()
        assert apply(DoubleSizes(), doubled).report["doubled"] == 1
        assert "Resize" not in ops(doubled)
        feeds = {"x": np.random.default_rng(0).uniform(0.0, 8.0, (1, 4, 5, 6)).astype(np.float32)}
        assert np.array_equal(run(graph, feeds)["out"], run(doubled, feeds)["out"])
