"""Biases lie on the steps in which integer convolutions add."""

from __future__ import annotations

import numpy as np
from compiling import network, run_to

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
