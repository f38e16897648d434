"""No 8-bit weight leaves the integers that the target multiplies exactly, and no other weight moves."""

from __future__ import annotations

import numpy as np
import pytest
from compiling import network, run_to

from passes.limit_weights import LimitWeights
from vmq.graph import Constant
from vmq.pipeline import run_passes
from vmq.quant import search_weight_scale
from vmq.spec import QuantSpec
from vmq.targets import TARGETS


@pytest.mark.parametrize("bits", ["8", "w4a8"])
def test_weights_beyond_the_range_are_moved_to_its_end(bits: str):
    graph = network()
    context = run_to("calibrate_network", graph, bits)
    beyond = dict[str, tuple[np.ndarray, np.ndarray]]()
    run_passes(graph, [LimitWeights()], context)
    for node in graph.nodes:
        if node.op == "QuantizeLinear" and isinstance(node.inputs[0], Constant) \
                and node.inputs[2].dtype == np.int8 and np.ndim(node.inputs[0].values) == 4:
            weight, scale = node.inputs[0], np.asarray(node.inputs[1].values)
            values = np.array(weight.values)
            values.reshape(len(values), -1)[:, 0] = -200.0 * scale
            weight.values = values
            beyond[node.name] = values.copy(), scale
    result = run_passes(graph, [LimitWeights()], context)[0]
    assert result.modified == len(beyond) > 0
    assert result.report["weights"] == sum(len(values) for values, _ in beyond.values())
    for node in graph.nodes:
        if node.name in beyond:
            values, scale = beyond[node.name]
            now = np.asarray(node.inputs[0].values)
            steps = np.rint(now.reshape(len(now), -1) / scale[:, None])
            assert steps.min() == -127
            np.testing.assert_array_equal(now.reshape(len(now), -1)[:, 1:], values.reshape(len(now), -1)[:, 1:])


def test_nothing_to_do():
    graph = network()
    context = run_to("calibrate_ranges", graph)
    run_passes(graph, [LimitWeights()], context)
    assert run_passes(graph, [LimitWeights()], context)[0].modified == 0


def test_a_narrow_range_is_searched_for():
    graph = network()
    run_to("lower", graph, target=TARGETS["cpu-avx2"])
    stored = [np.asarray(c.values) for c in graph.constants() if c.dtype == np.int8 and len(c.shape) == 4]
    assert len(stored) >= 8
    assert min(w.min() for w in stored) >= -64
    assert max(w.max() for w in stored) <= 63


def test_search_within_limits():
    weight = np.random.default_rng(0).normal(size=(4, 8, 3, 3)).astype(np.float32)
    spec = QuantSpec(8, signed=True, axis=0)
    wide, narrow = (search_weight_scale(weight, spec, limits=limits) for limits in (None, (-64, 63)))
    assert (narrow > 1.5 * wide).all()
    np.testing.assert_array_equal(search_weight_scale(weight, spec, limits=(-128, 127)), wide)
