"""What only moves values moves integers: the same bits come out, with fewer nodes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_text import apply, load, ops, run, run_optimized

from passes.move_integers import MoveIntegers

QDQ = "{0}_q = QuantizeLinear ({0}, s, z)  {0}_d = DequantizeLinear ({0}_q, s, z)"
GRID = "float s = {0.037}, uint8 z = {117}, float s2 = {0.021}, uint8 z2 = {3}, uint8 low = {0}, uint8 high = {15}"


def pair(*names: str) -> str:
    return " ".join(QDQ.format(n) for n in names)


SPLIT = f"""(float[1,6,5,7] x) => (float[1,3,5,7] a_d, float[1,3,5,7] b_d) <{GRID}> {{
    {pair("x")}
    a, b = Split <axis = 1, num_outputs = 2> (x_d)
    {pair("a", "b")}
}}"""
CHAIN = f"""(float[1,6,4,8] x) => (float[1,3,8,4] d_d) <{GRID}, int64[1] begin = {{2}}, int64[1] end = {{5}},
        int64[1] axis = {{1}}, int64[4] shape = {{1, 3, 8, 4}}> {{
    {pair("x")}
    a = Slice (x_d, begin, end, axis)
    {pair("a")}
    b = Transpose <perm = [0,1,3,2]> (a_d)
    {pair("b")}
    c = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (b_d)
    {pair("c")}
    d = Reshape (c_d, shape)
    {pair("d")}
}}"""
CONCAT = f"""(float[1,2,5,7] x, float[1,3,5,7] y) => (float[1,5,5,7] c_d) <{GRID}> {{
    {pair("x", "y")}
    c = Concat <axis = 1> (x_d, y_d)
    {pair("c")}
}}"""


def noise(text: str, seed: int = 0) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    rng = np.random.default_rng(seed)
    return {v.name: rng.normal(0, 3, v.shape).astype(np.float32) for v in load(text).inputs}


@pytest.mark.parametrize(("text", "quantizers", "reads"), [(SPLIT, 1, 2), (CHAIN, 1, 1), (CONCAT, 2, 1)],
                         ids=["split", "chain", "concat"])
def test_the_same_bits_with_fewer_nodes(text: str, quantizers: int, reads: int, tmp_path: Path) -> None:
    before, after = load(text), load(text)
    for graph in (before, after):
        graph.infer_shapes()
    result = apply(MoveIntegers(), after)
    assert result.modified == sum(result.report.values())
    assert result.report["multiplied by 1"] == 0
    assert ops(after).count("QuantizeLinear") == quantizers < ops(before).count("QuantizeLinear")
    assert ops(after).count("DequantizeLinear") == reads
    feeds = noise(text)
    for one, other in zip(run(before, feeds).values(), run(after, feeds).values(), strict=True):
        assert np.array_equal(one, other)
    theirs, ours = (run_optimized(g, feeds, tmp_path / "optimized.onnx")[0] for g in (before, after))
    for one, other in zip(theirs, ours, strict=True):
        assert np.array_equal(one, other)
    again = after.to_bytes()
    assert apply(MoveIntegers(), after).modified == 0              # all is done at once
    assert after.to_bytes() == again


def test_a_narrow_tensor_is_clipped_once() -> None:
    """4 bits as uint8 with a Clip, before a Split and behind it."""
    text = f"""(float[1,6,5,7] x) => (float[1,3,5,7] a_d, float[1,3,5,7] b_d) <{GRID}> {{
        x_q = QuantizeLinear (x, s, z2)  x_c = Clip (x_q, low, high)  x_d = DequantizeLinear (x_c, s, z2)
        a, b = Split <axis = 1, num_outputs = 2> (x_d)
        a_q = QuantizeLinear (a, s, z2)  a_c = Clip (a_q, low, high)  a_d = DequantizeLinear (a_c, s, z2)
        b_q = QuantizeLinear (b, s, z2)  b_c = Clip (b_q, low, high)  b_d = DequantizeLinear (b_c, s, z2)
    }}"""
    before, after = load(text), load(text)
    after.infer_shapes()
    assert apply(MoveIntegers(), after).modified == 5
    assert sorted(ops(after)) == ["Clip", "DequantizeLinear", "DequantizeLinear", "QuantizeLinear", "Split"]
    feeds = noise(text)
    for name, values in run(before, feeds).items():
        assert np.array_equal(run(after, feeds)[name], values)
        assert values.max() == np.float32(12) * np.float32(0.037)    # it does saturate


def test_another_clip_stays() -> None:
    text = f"""(float[1,6,5,7] x) => (float[1,6,5,7] y) <{GRID}, uint8 higher = {{200}}> {{
        q = QuantizeLinear (x, s, z)  a = Clip (q, low, higher)  b = Clip (a, low, high)
        y = DequantizeLinear (b, s, z)
    }}"""
    graph = load(text)
    before = graph.to_bytes()
    assert apply(MoveIntegers(), graph).modified == 0
    assert graph.to_bytes() == before


@pytest.mark.parametrize("text", [
    CONCAT.replace("y_d = DequantizeLinear (y_q, s, z)", "y_d = DequantizeLinear (y_q, s2, z2)"),
    f"""(float[1,6,5,7] x) => (float[1,6,5,7] y) <{GRID}> {{
        {pair("x")}
        r = Relu (x_d)  y_q = QuantizeLinear (r, s, z)  y = DequantizeLinear (y_q, s, z)
    }}""",
    "(float[1,6,5,7] x) => (float[1,6,7,5] y) { y = Transpose <perm = [0,1,3,2]> (x) }",
], ids=["concat of different grids", "relu between", "float"])
def test_nothing_to_do_leaves_the_graph_as_it_is(text: str) -> None:
    graph = load(text)
    graph.infer_shapes()
    before, nodes = graph.to_bytes(), list(graph.nodes)
    assert apply(MoveIntegers(), graph).modified == 0
    assert graph.to_bytes() == before
    assert all(a is b for a, b in zip(graph.nodes, nodes, strict=True))


def test_from_grid_to_grid_an_integer_kernel_goes(tmp_path: Path) -> None:
    """Without the Mul by 1 the runtime would dequantize and quantize in float; the bits stay the same."""
    text = f"""(float[1,6,5,7] x) => (float[1,6,5,7] y) <{GRID}> {{
        {pair("x")}
        y_q = QuantizeLinear (x_d, s2, z2)  y = DequantizeLinear (y_q, s2, z2)
    }}"""
    before, after = load(text), load(text)
    after.infer_shapes()
    assert apply(MoveIntegers(), after).report == {"moved": 0, "dropped": 0, "multiplied by 1": 1}
    feeds = noise(text)
    plain = run(before, feeds)["y"]
    assert np.array_equal(run(after, feeds)["y"], plain)
    (ours,), kinds = run_optimized(after, feeds, tmp_path / "optimized.onnx")
    assert kinds == {"QuantizeLinear", "QLinearMul", "DequantizeLinear"}
    steps = np.rint((ours - plain) / 0.021)
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() < 0.02


def test_a_reader_of_floats_keeps_them() -> None:
    """What a Split makes goes to an integer kernel and to a float one: both get what they got."""
    text = f"""(float[1,6,5,7] x) => (float[1,3,5,7] y, float[1,3,5,7] a_d, float[1,3,5,7] b_d) <{GRID}> {{
        {pair("x")}
        a, b = Split <axis = 1, num_outputs = 2> (x_d)
        y = Exp (a)
        {pair("a", "b")}
    }}"""
    before, after = load(text), load(text)
    after.infer_shapes()
    assert apply(MoveIntegers(), after).modified == 3
    feeds = noise(text)
    for name, values in run(before, feeds).items():
        assert np.array_equal(run(after, feeds)[name], values), name
