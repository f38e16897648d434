"""No 8-bit weight leaves the integers that kernels multiply exactly, and no other weight moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compiling import network, run_to
from onnx_text import load

from passes.limit_weights import LARGEST, PAIR, LimitWeights, pair_reach
from vmq.graph import Constant, Graph
from vmq.layers import summed_pairs
from vmq.pipeline import Context, run_passes
from vmq.quant import search_weight_scale
from vmq.spec import Options, QuantSpec
from vmq.targets import TARGETS


def layer(rows: Any, op: str = "Conv") -> Graph:
    """A layer whose weight, in steps of 1, is `rows`."""
    rows = np.asarray(rows)
    shape = ",".join(map(str, rows.shape))
    data = ",".join(str(float(n)) for n in rows.ravel())
    channels = rows.shape[1] if op == "Conv" else rows.shape[0]
    given = f"1,{channels},4,4" if op == "Conv" else f"4,{channels}"
    outputs = rows.shape[0] if op == "Conv" else rows.shape[1]
    ones, zeros = (",".join([n] * outputs) for n in ("1", "0"))
    axis = 0 if op == "Conv" else 1
    dims = "a,b,c,d" if op == "Conv" else "a,b"
    return load(f"""(float[{given}] x) => (float[{dims}] y)
        <float[{shape}] w = {{{data}}}, float[{outputs}] s = {{{ones}}}, int8[{outputs}] z = {{{zeros}}}> {{
            q = QuantizeLinear <axis = {axis}> (w, s, z)
            d = DequantizeLinear <axis = {axis}> (q, s, z)
            y = {op} (x, d)
        }}""")


def limited(graph: Graph, target: str = "cpu") -> tuple[np.ndarray, dict[str, Any]]:
    graph.infer_shapes()
    result = run_passes(graph, [LimitWeights()], Context(Options(target=TARGETS[target])))[0]
    node = next(n for n in graph.nodes if n.op == "QuantizeLinear")
    return np.asarray(node.inputs[0].values), result.report


def test_the_larger_of_two_neighbours_gives_way():
    rows = np.array([[100, 40, -20, -120, 127, -127, 64, 64]])[:, :, None, None]
    found, report = limited(layer(rows))
    assert found.ravel().tolist() == [88, 40, -20, -108, 127, -127, 64, 64]
    assert report["weights"] == 2


def test_neighbours_are_channels_of_one_tap():
    weight = np.zeros((1, 2, 1, 2), np.float32)
    weight[0, 0] = 127.0                                    # two taps of one channel are not added to each other
    assert limited(layer(weight))[1]["weights"] == 0
    weight[0, :, 0, 0] = 127.0
    found, _ = limited(layer(weight))
    assert sorted(found[0, :, 0, 0]) == [1.0, 127.0]


def test_all_are_neighbours_where_channels_are_odd():
    weight = np.zeros((1, 3, 1, 2), np.float32)
    weight[0, 2, 0, 0] = weight[0, 0, 0, 1] = 100.0         # last channel of a tap, first one of the next
    assert sorted(limited(layer(weight))[0].ravel())[-2:] == [28.0, 100.0]


def test_rows_of_a_matrix():
    weight = np.array([[100, 1], [100, 2], [100, 3], [1, 4]])
    found, _ = limited(layer(weight, "MatMul"))
    assert sorted(found[:2, 0]) == [28.0, 100.0]
    np.testing.assert_array_equal(found[2:], weight[2:])


@pytest.mark.parametrize("target", ["qnn", "openvino"])
def test_other_targets_only_lose_their_smallest(target: str):
    rows = np.array([[127, 127, -128, -128]])[:, :, None, None]
    assert limited(layer(rows), target)[0].ravel().tolist() == [127, 127, -127, -127]


def test_depthwise_convolutions_add_one_product_at_a_time():
    rows = np.full((4, 1, 2, 2), 127)
    graph = load("""(float[1,4,4,4] x) => (float[a,b,c,d] y)
        <float[4,1,2,2] w = {127,127,127,127,127,127,127,127,127,127,127,127,127,127,127,127},
         float[4] s = {1,1,1,1}, int8[4] z = {0,0,0,0}> {
            q = QuantizeLinear <axis = 0> (w, s, z)
            d = DequantizeLinear <axis = 0> (q, s, z)
            y = Conv <group = 4> (x, d)
        }""")
    np.testing.assert_array_equal(limited(graph)[0], rows)


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
            values = np.zeros_like(weight.values)
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
            assert steps.min() == -LARGEST
            np.testing.assert_array_equal(now.reshape(len(now), -1)[:, 1:], values.reshape(len(now), -1)[:, 1:])


def test_nothing_to_do():
    graph = network()
    context = run_to("calibrate_ranges", graph)
    assert run_passes(graph, [LimitWeights()], context)[0].modified == 0


@pytest.mark.parametrize("bits", ["8", "w4a8"])
def test_scales_leave_room_for_pairs(bits: str):
    """Ranges alone leave next to nothing to move, and no sum of two products leaves 16 bits in the emitted file."""
    graph = network()
    run_to("lower", graph, bits)
    layers = [n for n in graph.nodes if n.op == "Conv" and n.inputs[1].inputs[0].inputs[0].dtype == np.int8
              and isinstance(n.inputs[1].inputs[0].inputs[0], Constant)]
    assert layers
    for node in layers:
        pairs = summed_pairs(node)
        if pairs is not None:
            stored = np.asarray(node.inputs[1].inputs[0].inputs[0].values).astype(np.int32)
            assert pair_reach(stored, pairs).max() <= PAIR


def test_search_within_limits():
    weight = np.random.default_rng(0).normal(size=(4, 8, 3, 3)).astype(np.float32)
    spec = QuantSpec(8, signed=True, axis=0)
    wide, narrow = (search_weight_scale(weight, spec, limits=limits) for limits in (None, (-64, 63)))
    assert (narrow > 1.5 * wide).all()
    np.testing.assert_array_equal(search_weight_scale(weight, spec, limits=(-128, 127)), wide)
