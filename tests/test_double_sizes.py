"""Resize by 2 as integer Adds: the same bits as the runtime's float Resize between the same quantizers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import apply, load, ops, quantized, run, run_optimized, short

from passes.double_sizes import DoubleSizes
from vmq.graph import Graph


def resize(shape: tuple[int, ...], axis: int, grids: dict[str, tuple[float, int]], follow: str = "") -> Graph:
    factors = [1.0, 1.0, 1.0, 1.0]
    factors[axis] = 2.0
    result = tuple(n * int(f) for n, f in zip(shape, factors, strict=True))
    body = f'factors = Constant <value_floats = {factors}> () y = Resize <mode = "linear"> (x, , factors)'
    graph = quantized(body + follow, {"x": shape}, {"y": result}, grids)
    graph.fold_constants()
    return graph


def noise(shape: tuple[int, ...], grid: tuple[float, int]) -> np.ndarray:  # type: ignore[type-arg]
    steps = np.random.default_rng(0).uniform(-20, 275, shape)
    return ((steps - grid[1]) * grid[0]).astype(np.float32)


scales = st.floats(0.002, 0.3).map(short)
zeros = st.integers(0, 255)


@settings(max_examples=40)
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 7), st.integers(1, 7)),
       axis=st.sampled_from([2, 3]), x=scales, zero=zeros, y=scales, to=zeros, same=st.booleans())
def test_the_same_bits(shape: tuple[int, ...], axis: int, x: float, zero: int, y: float, to: int, same: bool) -> None:
    grids = {"x": (x, zero), "y": (x, zero) if same else (y, to)}
    before, after = resize(shape, axis, grids), resize(shape, axis, grids)
    assert apply(DoubleSizes(), after).report == {"doubled": 1, "halved": 0}
    assert "Resize" not in ops(after)
    feeds = {"x_in": noise(shape, grids["x"])}
    assert np.array_equal(run(before, feeds)["y_out"], run(after, feeds)["y_out"])


@pytest.mark.parametrize("axis", [2, 3])
@pytest.mark.parametrize("sides", [(8, 6), (7, 5), (1, 6), (6, 1), (1, 1)])
def test_optimized_it_is_two_integer_adds(axis: int, sides: tuple[int, int], tmp_path: Path) -> None:
    shape = (1, 16, *sides)
    grids = {"x": (short(0.04), 100), "y": (short(0.037), 90)}
    graph = resize(shape, axis, grids)
    apply(DoubleSizes(), graph)
    feeds = {"x_in": noise(shape, grids["x"])}
    (ours,), kinds = run_optimized(graph, feeds, tmp_path / "optimized.onnx")
    assert "QLinearAdd" in kinds
    assert not kinds & {"Add", "Resize"}
    steps = np.rint((ours - run(graph, feeds)["y_out"]) / grids["y"][0])
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() < 0.01


def test_one_axis_after_the_other_needs_no_transpose_between() -> None:
    """Both axes of a picture: channels go last once and come back once."""
    shape, result = (1, 8, 5, 6), (1, 8, 10, 12)
    grids = {"x": (short(0.04), 100), "y": (short(0.04), 100)}
    body = """columns = Constant <value_floats = [1.0, 1.0, 1.0, 2.0]> ()
              rows = Constant <value_floats = [1.0, 1.0, 2.0, 1.0]> ()
              a = Resize <mode = "linear"> (x, , columns)
              a_q = QuantizeLinear (a, x_scale, x_zero) b = DequantizeLinear (a_q, x_scale, x_zero)
              y = Resize <mode = "linear"> (b, , rows)"""
    before, after = (quantized(body, {"x": shape}, {"y": result}, grids) for _ in range(2))
    for graph in (before, after):
        graph.fold_constants()
    assert apply(DoubleSizes(), after).report["doubled"] == 2
    assert ops(after).count("Transpose") == 2
    feeds = {"x_in": noise(shape, grids["x"])}
    assert np.array_equal(run(before, feeds)["y_out"], run(after, feeds)["y_out"])


def test_what_is_joined_behind_it_is_joined_channels_last() -> None:
    """Doubled, beside a picture and a constant: the Concat reads channels last, and the same bits come out."""
    text = """(float[1,8,4,6] x, float[1,3,4,12] p) => (float[1,12,4,12] out) <float s = {0.03125}, uint8 z = {100}> {
        x_q = QuantizeLinear (x, s, z)  x_d = DequantizeLinear (x_q, s, z)
        f = Constant <value_floats = [1.0, 1.0, 1.0, 2.0]> ()
        y = Resize <mode = "linear"> (x_d, , f)
        y_q = QuantizeLinear (y, s, z)
        p_q = QuantizeLinear (p, s, z)
        none = Constant <value_floats = [0.0]> ()
        fill = Constant <value_ints = [1, 1, 4, 12]> ()
        n = Expand (none, fill)
        n_q = QuantizeLinear (n, s, z)
        c = Concat <axis = 1> (y_q, p_q, n_q)
        out = DequantizeLinear (c, s, z)
    }"""
    before, after = load(text), load(text)
    for graph in (before, after):
        graph.infer_shapes()
        graph.fold_constants()
    assert apply(DoubleSizes(), after).report["doubled"] == 1
    joined = [n for n in after.nodes if n.op == "Concat" and n.attrs["axis"] == 3 and len(n.outputs[0].shape) == 4
              and n.outputs[0].shape[3] == 12]
    assert len(joined) == 1
    rng = np.random.default_rng(0)
    feeds = {v.name: rng.normal(0, 2, v.shape).astype(np.float32) for v in before.inputs}
    assert np.array_equal(run(before, feeds)["out"], run(after, feeds)["out"])


def test_what_is_read_as_float_too_stays() -> None:
    graph = resize((1, 2, 4, 4), 2, {"x": (0.04, 100), "y": (0.04, 100)})
    y = graph.value("y")
    extra = graph.add("Exp", [y], "also", {}, y.shape)
    graph.outputs.append(extra)
    before = graph.to_bytes()
    assert apply(DoubleSizes(), graph).modified == 0
    assert graph.to_bytes() == before


@pytest.mark.parametrize(("shape", "attributes", "applies"), [
    ("1,3,6,8", "kernel_shape = [2,2], strides = [2,2]", True),
    ("1,3,7,8", "kernel_shape = [2,2], strides = [2,2]", False),
    ("1,3,6,8", "kernel_shape = [2,2]", False),
    ("1,3,6,8", "kernel_shape = [2,2], strides = [2,2], pads = [1,1,1,1]", False),
    ("1,3,6,8", "kernel_shape = [3,3], strides = [2,2]", False)])
def test_pictures_are_halved_by_a_resize(shape: str, attributes: str, applies: bool) -> None:
    text = f"(float[{shape}] x) => (float[n,c,h,w] y) {{ y = AveragePool <{attributes}> (x) }}"
    before, after = load(text), load(text)
    after.infer_shapes()
    assert apply(DoubleSizes(), after).modified == applies
    assert ops(after) == ["Resize" if applies else "AveragePool"]
    feeds = {"x": np.random.default_rng(0).random([int(n) for n in shape.split(",")], np.float32)}
    np.testing.assert_allclose(run(after, feeds)["y"], run(before, feeds)["y"], rtol=0, atol=2e-7)
