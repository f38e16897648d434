"""The last layer as a product of matrices: an integer kernel that gives the floats that exact sums give."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx_text import apply, load, ops, run, run_optimized

from passes.lower import INT8
from passes.multiply_pixels import MultiplyPixels
from vmq.graph import Graph
from vmq.pipeline import Context, run_passes
from vmq.spec import Options
from vmq.targets import TARGETS

SCALE, ZERO = 0.03125, 17


def layer(results: int = 4, *, channels: int = 16, sides: tuple[int, int] = (3, 128), count: int = 1, bias: bool = True,
          per_channel: bool = True, narrow: bool = False, attributes: str = "", kernel: int = 1, group: int = 1,
          follow: str = "y = Sigmoid (c)") -> Graph:
    """A lowered 1x1 convolution whose result is read as floats."""
    rng = np.random.default_rng(0)
    operands = "x_d, w_w, w_b" if bias else "x_d, w_w"
    graph = load(f"""(float[{count},{channels},{sides[0]},{sides[1]}] x,
             float[{results},{channels // group},{kernel},{kernel}] w_w, float[{results}] w_b) => (float[n,f,h,w] y)
        <float s = {{{SCALE}}}, uint8 z = {{{ZERO}}}, float s2 = {{0.125}}> {{
        x_q = QuantizeLinear (x, s, z)  x_d = DequantizeLinear (x_q, s, z)
        c = Conv <group = {group} {attributes}> ({operands})
        {follow}
    }}""")
    conv = next(n for n in graph.nodes if n.op == "Conv")
    weight = conv.inputs[1]
    steps = rng.integers(-7, 8, weight.shape) if narrow else rng.integers(-64, 65, weight.shape)
    value = graph.constant("steps", steps.astype(ml_dtypes.int4 if narrow else np.int8))
    if narrow:
        value = graph.add("Cast", [value], "wide", {"to": INT8}, weight.shape, np.int8)
    scale = rng.uniform(0.002, 0.005, results).astype(np.float32) if per_channel else np.float32(0.004)
    conv.inputs[1] = graph.add("DequantizeLinear", [
        value, graph.constant("scale", scale), graph.constant("zero", np.zeros(np.shape(scale), np.int8))], "weight",
        {"axis": 0}, weight.shape)
    if bias:
        conv.inputs[2] = graph.add("DequantizeLinear", [
            graph.constant("bias", rng.integers(-2000, 2000, results).astype(np.int32)),
            graph.constant("bias_scale", scale * np.float32(SCALE))], "b", {"axis": 0}, [results])
    graph.sort()
    graph.infer_shapes()
    return graph


def exact(graph: Graph, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """sigmoid(W x + b) of the quantized x, W and b, in double precision."""
    conv = next(n for n in graph.nodes if n.op == "Conv")
    seen = (np.clip(np.rint(x / SCALE) + ZERO, 0, 255) - ZERO) * SCALE
    operands = []
    for operand in conv.inputs[1:]:
        read = operand.inputs[0]
        source = read.inputs[0].inputs[0].inputs[0] if read.inputs[0].inputs else read.inputs[0]
        values = np.asarray(source.values).astype(np.float64)
        scale = np.asarray(read.inputs[1].values, np.float64)
        operands.append(values * scale.reshape(-1, *[1] * (values.ndim - 1)))
    result = np.einsum("nchw,oc->nohw", seen.astype(np.float64), operands[0][:, :, 0, 0])
    if len(operands) > 1:
        result += operands[1][None, :, None, None]
    return 1.0 / (1.0 + np.exp(-result))


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
def test_an_integer_kernel_gives_floats(per_channel: bool, bias: bool, narrow: bool, tmp_path: Path) -> None:
    graph = layer(per_channel=per_channel, bias=bias, narrow=narrow)
    check(graph, tmp_path)
    assert [c.dtype.name for c in graph.constants() if c.dtype.name in ("int4", "int8") and c.values.ndim > 1] == [
        "int4" if narrow else "int8"]


@pytest.mark.parametrize("sides", [(6, 8), (1, 1), (3, 128), (2, 130), (1, 131)])
@pytest.mark.parametrize(("results", "channels", "count"), [(4, 16, 1), (1, 3, 1), (3, 5, 2), (16, 8, 1), (20, 40, 3)])
def test_shapes(results: int, channels: int, count: int, sides: tuple[int, int], tmp_path: Path) -> None:
    check(layer(results, channels=channels, count=count, sides=sides), tmp_path)


def check(graph: Graph, tmp_path: Path) -> None:
    before = graph.copy()
    assert apply(MultiplyPixels(), graph).modified == 1
    assert "Conv" not in ops(graph)
    shape = graph.inputs[0].shape
    x = np.random.default_rng(1).uniform(-1, 8, shape).astype(np.float32)
    wanted = exact(before, x)
    (got,), kinds = run_optimized(graph, {"x": x}, tmp_path / "after.onnx")
    assert "QGemm" in kinds
    assert not kinds & {"Conv", "FusedConv", "Gemm", "FusedGemm", "DequantizeLinear", "Cast"}
    assert got.shape == wanted.shape
    assert np.abs(wanted - 0.5).max() > 0.05
    assert np.abs(got - wanted).max() < 1e-6
    assert np.abs(run(graph, {"x": x})["y"] - run(before, {"x": x})["y"]).max() < 1e-5


@pytest.mark.parametrize("options", [
    {"kernel": 3}, {"attributes": ", strides = [2,2]"}, {"attributes": ", pads = [1,0,0,0]"}, {"group": 4},
    {"attributes": ', auto_pad = "SAME_UPPER"'},
    {"follow": "q = QuantizeLinear (c, s2, z) y = DequantizeLinear (q, s2, z)"},
    {"follow": "a = Abs (c) q = QuantizeLinear (a, s2, z) y = DequantizeLinear (q, s2, z)"}],
    ids=["3x3", "strides", "pads", "groups", "auto_pad", "quantized", "quantized later"])
def test_others_stay(options: dict[str, object]) -> None:
    graph = layer(**options)  # type: ignore[arg-type]
    before = graph.to_bytes()
    assert apply(MultiplyPixels(), graph).modified == 0
    assert graph.to_bytes() == before


def test_float_weights_stay() -> None:
    graph = load(f"""(float[1,16,6,8] x, float[4,16,1,1] w_w) => (float[1,4,6,8] y)
        <float s = {{{SCALE}}}, uint8 z = {{{ZERO}}}> {{
        x_q = QuantizeLinear (x, s, z)  x_d = DequantizeLinear (x_q, s, z)  y = Conv (x_d, w_w) }}""")
    graph.infer_shapes()
    assert apply(MultiplyPixels(), graph).modified == 0


@pytest.mark.parametrize("target", ["qnn", "openvino"])
def test_other_targets_keep_the_convolution(target: str) -> None:
    graph = layer()
    result, = run_passes(graph, [MultiplyPixels()], Context(Options(target=TARGETS[target])))
    assert result.modified == 0
