"""Columns together: the integer kernels give the same bits; fewer channels than 17 become two or four times as many."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx_text import apply, load, ops, run_optimized

from passes.lower import INT8
from passes.pack_columns import PackColumns
from vmq.graph import Graph


def layer(kernel: tuple[int, int] = (3, 3), *, strides: tuple[int, int] = (1, 1),
          pads: tuple[int, int, int, int] = (1, 1, 1, 1), channels: int = 4, filters: int = 16, narrow: bool = False,
          relu: bool = False, bias: bool = True, columns: int = 128, extra: str = "", group: int = 1) -> Graph:
    """A lowered convolution whose result has `columns` columns."""
    dilation = 2 if "dilations" in extra else 1
    width = (columns - 1) * strides[1] + dilation * (kernel[1] - 1) + 1 - pads[1] - pads[3]
    height = 6 * strides[0] + kernel[0]
    rng = np.random.default_rng(0)
    shape = f"{filters}, {channels // group}, {kernel[0]}, {kernel[1]}"
    operands = "x_d, w_w, w_b" if bias else "x_d, w_w"
    graph = load(f"""(float[1,{channels},{height},{width}] x, float[{shape}] w_w, float[{filters}] w_b)
            => (float[n,f,h,w] out)
        <float s = {{0.05}}, uint8 z = {{{110}}}, float s2 = {{0.125}}, uint8 z2 = {{{0 if relu else 120}}}> {{
        x_q = QuantizeLinear (x, s, z)  x_d = DequantizeLinear (x_q, s, z)
        c = Conv <pads = {list(pads)}, strides = {list(strides)}, group = {group} {extra}> ({operands})
        {"r = Relu (c)" if relu else ""}
        y = QuantizeLinear ({"r" if relu else "c"}, s2, z2)
        out = DequantizeLinear (y, s2, z2)
    }}""")
    conv = next(n for n in graph.nodes if n.op == "Conv")
    weight = conv.inputs[1]
    steps = rng.integers(-7, 8, weight.shape)
    value = graph.constant("steps", steps.astype(ml_dtypes.int4 if narrow else np.int8))
    if narrow:
        value = graph.add("Cast", [value], "wide", {"to": INT8}, weight.shape, np.int8)
    scale = rng.uniform(0.02, 0.05, filters).astype(np.float32)
    conv.inputs[1] = graph.add("DequantizeLinear", [
        value, graph.constant("scale", scale), graph.constant("zero", np.zeros(filters, np.int8))], "weight",
        {"axis": 0}, weight.shape)
    if bias:
        conv.inputs[2] = graph.add("DequantizeLinear", [
            graph.constant("bias", rng.integers(-2000, 2000, filters).astype(np.int32)),
            graph.constant("bias_scale", scale * np.float32(0.05))], "b", {"axis": 0}, [filters])
    graph.sort()
    graph.infer_shapes()
    return graph


def check(graph: Graph, tmp_path: Path, together: int = 4) -> None:
    """Packed, the integer kernels give the same bits."""
    before = graph.copy()
    conv = next(n for n in graph.nodes if n.op == "Conv")
    filters, width = conv.inputs[1].shape[0], conv.outputs[0].shape[3]
    assert apply(PackColumns(), graph).modified == 1
    assert conv.inputs[1].shape[0] == together * filters
    assert conv.outputs[0].shape[3] == width // together
    shape = graph.inputs[0].shape
    feeds = {"x": np.random.default_rng(1).uniform(-6, 8, shape).astype(np.float32)}
    (one,), theirs = run_optimized(before, feeds, tmp_path / "before.onnx")
    (other,), ours = run_optimized(graph, feeds, tmp_path / "after.onnx")
    assert "QLinearConv" in theirs & ours
    assert not ours & {"Conv", "FusedConv", "Relu", "Cast"}
    assert one.shape == other.shape
    assert len(np.unique(one)) > 30
    assert np.array_equal(one, other)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (4, 4), (5, 5), (1, 3)])
def test_the_same_bits(kernel: tuple[int, int], strides: tuple[int, int], tmp_path: Path) -> None:
    check(layer(kernel, strides=strides), tmp_path)


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 0, 0, 1), (0, 2, 1, 1), (2, 2, 2, 2), (0, 1, 0, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_even_and_odd_pads(pads: tuple[int, int, int, int], strides: tuple[int, int], tmp_path: Path) -> None:
    check(layer(pads=pads, strides=strides), tmp_path)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
@pytest.mark.parametrize(("channels", "columns", "together"), [(16, 128, 4), (20, 128, 2), (36, 132, 2), (4, 130, 2)])
def test_deep_ones_and_odd_halves_take_two(channels: int, columns: int, together: int, strides: tuple[int, int],
                                           tmp_path: Path) -> None:
    check(layer(channels=channels, columns=columns, strides=strides), tmp_path, together)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_containers_relu_and_bias(narrow: bool, relu: bool, bias: bool, tmp_path: Path) -> None:
    graph = layer(narrow=narrow, relu=relu, bias=bias, filters=5)
    check(graph, tmp_path)
    stored = [c.dtype.name for c in graph.constants() if len(c.shape or ()) == 4]
    assert stored == ["int4" if narrow else "int8"]


@pytest.mark.parametrize("options", [
    {"columns": 129}, {"columns": 126}, {"filters": 17}, {"filters": 16, "group": 4}, {"filters": 4, "group": 4},
    {"extra": ", dilations = [2,2]"}, {"kernel": (3, 1)}, {"kernel": (1, 1)}],
    ids=["odd width", "few columns", "17 channels", "groups", "depthwise", "dilations", "3x1", "1x1"])
def test_others_stay(options: dict[str, object]) -> None:
    graph = layer(**options)  # type: ignore[arg-type]
    before = graph.to_bytes()
    assert apply(PackColumns(), graph).modified == 0
    assert graph.to_bytes() == before


def test_a_result_that_others_read_in_float_stays() -> None:
    graph = layer()
    c = graph.value("c")
    graph.outputs.append(graph.add("Exp", [c], "also", {}, c.shape))
    before = graph.to_bytes()
    assert apply(PackColumns(), graph).modified == 0
    assert graph.to_bytes() == before


def test_a_result_that_is_a_models_output_stays() -> None:
    graph = layer()
    graph.outputs.append(graph.value("c"))
    before = graph.to_bytes()
    assert apply(PackColumns(), graph).modified == 0
    assert graph.to_bytes() == before


def test_all_readers_get_the_columns_in_order(tmp_path: Path) -> None:
    """Integers that two dequantizers read."""
    graph = layer()
    y = graph.value("y")
    again = graph.add("DequantizeLinear", [y, *graph.value("out").inputs[0].inputs[1:]], "again", {}, y.shape)
    graph.outputs.append(again)
    before = graph.copy()
    assert apply(PackColumns(), graph).modified == 1
    assert ops(graph).count("Transpose") == 2
    feeds = {"x": np.random.default_rng(1).uniform(-6, 8, graph.inputs[0].shape).astype(np.float32)}
    for one, other in zip(*(run_optimized(g, feeds, tmp_path / "m.onnx")[0] for g in (before, graph)), strict=True):
        assert np.array_equal(one, other)
