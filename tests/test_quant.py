"""The arithmetic is ONNX Runtime's, bit for bit; the searches beat min-max and come close to brute force."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from vmq.quant import SMALLEST_SCALE, dequantize, quantize, scale_of_range, search_range, search_weight_scale
from vmq.spec import QuantSpec

SPECS = [QuantSpec(8, signed=False), QuantSpec(8, signed=True), QuantSpec(4, signed=False), QuantSpec(4, signed=True)]
U8, U4, I8, I4 = SPECS[0], SPECS[2], SPECS[1], SPECS[3]
TYPES = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "uint4": TensorProto.UINT4, "int4": TensorProto.INT4}
ids = [s.dtype.name for s in SPECS]


@cache
def judge(kind: str, axis: int | None, dequantizes: bool) -> ort.InferenceSession:
    """ONNX Runtime's QuantizeLinear, or DequantizeLinear, from and to int32 or float so that numpy can read it."""
    nodes = [helper.make_node("Cast", ["z32"], ["z"], to=TYPES[kind])]
    attributes = {} if axis is None else {"axis": axis}
    if dequantizes:
        nodes += [helper.make_node("Cast", ["x"], ["q"], to=TYPES[kind]),
                  helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes)]
    else:
        nodes += [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
                  helper.make_node("Cast", ["q"], ["y"], to=TensorProto.INT32)]
    kinds = (TensorProto.INT32, TensorProto.FLOAT) if dequantizes else (TensorProto.FLOAT, TensorProto.INT32)
    graph = helper.make_graph(nodes, "judge", [
        helper.make_tensor_value_info("x", kinds[0], None), helper.make_tensor_value_info("s", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("z32", TensorProto.INT32, None),
    ], [helper.make_tensor_value_info("y", kinds[1], None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def judged(x: NDArray[Any], scale: NDArray[np.float32], zero: NDArray[np.int32], spec: QuantSpec, *,
           back: bool = False) -> NDArray[Any]:
    return judge(spec.dtype.name, spec.axis, back).run(None, {"x": x, "s": scale, "z32": zero})[0]


def agree(x: NDArray[np.float32], scale: NDArray[np.float32], zero: NDArray[np.int32], spec: QuantSpec) -> None:
    if spec.bits == 4:      # beyond 2^31 steps ONNX Runtime 1.31 wraps around at 4 bits, against ONNX's definition
        x = np.clip(x, -1e9 * float(scale), 1e9 * float(scale)).astype(np.float32) if scale.ndim == 0 else x
    found = quantize(x, scale, zero, spec)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, judged(x, scale, zero, spec))
    values = dequantize(found, scale, zero, spec.axis)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.int32), judged(found, scale, zero, spec, back=True).view(np.int32))


NUMBERS = st.one_of(st.floats(width=32, allow_nan=False, allow_infinity=False),
                    st.floats(-300, 300, width=32), st.integers(-600, 600).map(lambda n: n / 2))


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@settings(max_examples=150)
@given(values=st.lists(NUMBERS, min_size=1, max_size=40), data=st.data())
def test_per_tensor_as_in_onnx_runtime(spec: QuantSpec, values: list[float], data: st.DataObject) -> None:
    scale = data.draw(st.one_of(st.floats(2.0**-40, 2.0**40, width=32), st.integers(-20, 20).map(lambda n: 2.0**n)))
    zero = data.draw(st.integers(spec.qmin, spec.qmax))
    agree(np.array(values, np.float32), np.array(scale, np.float32), np.array(zero, np.int32), spec)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
def test_ties_ends_and_denormals_as_in_onnx_runtime(spec: QuantSpec) -> None:
    halves = np.arange(-1200, 1201).astype(np.float32) / 2
    x = np.concatenate([halves, np.nextafter(halves, np.float32(np.inf)), np.nextafter(halves, np.float32(-np.inf)),
                        np.array([0.0, -0.0, 3e38, -3e38, 1e-45, -1e-45, 1e-39, 1e30], np.float32)])
    for zero in range(spec.qmin, spec.qmax + 1, 1 if spec.bits == 4 else 17):
        for scale in (1.0, 0.5, 2.0, 1 / 255, 0.1, 1e-10):
            s = np.array(scale, np.float32)
            agree(x, s, np.array(zero, np.int32), spec)
            scaled = (x.astype(np.float64) * scale).clip(-3e38, 3e38).astype(np.float32)
            agree(scaled, s, np.array(zero, np.int32), spec)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spec", SPECS, ids=ids)
@settings(max_examples=25)
@given(seed=st.integers(0, 1 << 30))
def test_per_axis_as_in_onnx_runtime(spec: QuantSpec, axis: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = rng.integers(1, 6, 3)
    x = (rng.normal(size=shape) * 10.0 ** rng.uniform(-3, 5, shape)).astype(np.float32)
    scale = (10.0 ** rng.uniform(-4, 2, shape[axis])).astype(np.float32)
    zero = rng.integers(spec.qmin, spec.qmax + 1, shape[axis]).astype(np.int32)
    agree(x, scale, zero, QuantSpec(spec.bits, spec.signed, axis))


# -- ranges -------------------------------------------------------------------------------------------------


FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@pytest.mark.parametrize("spec", SPECS, ids=ids)
@settings(max_examples=200)
@given(low=FINITE, high=FINITE)
def test_scale_of_range(spec: QuantSpec, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    scale, zero = scale_of_range(low, high, spec)
    assert scale.shape == zero.shape == ()
    assert scale.dtype == np.float32
    assert np.isfinite(scale)
    assert scale >= np.float32(SMALLEST_SCALE)
    assert spec.qmin <= zero <= spec.qmax
    assert quantize(np.zeros(1, np.float32), scale, zero, spec)[0] == zero      # zero is on the grid, exactly
    if low >= 0:
        assert zero == spec.qmin
    if high <= 0 and -low > 1e-20:
        assert zero == spec.qmax
    for end in (low, high):     # the grid reaches both ends, but for half a step
        back = dequantize(quantize(np.array([end]), scale, zero, spec), scale, zero)[0]
        assert abs(float(back) - end) <= 0.501 * float(scale) + 1e-6 * abs(end)


def test_many_ranges_at_once() -> None:
    low, high = np.array([-1.0, 0.0, -3.0, 0.5]), np.array([1.0, 2.0, -1.0, 0.75])
    scales, zeros = scale_of_range(low, high, U8)
    for i in range(4):
        assert (scales[i], zeros[i]) == scale_of_range(low[i], high[i], U8)


def loss(x: NDArray[Any], scale: Any, zero: Any, spec: QuantSpec, norm: float = 2.4) -> float:
    error = np.abs(dequantize(quantize(x, scale, zero, spec), scale, zero, spec.axis).astype(np.float64) - x)
    return float((error**norm).sum())


def samples(kind: str, size: int = 4000, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    x = {"normal": lambda: rng.normal(size=size), "laplace": lambda: rng.laplace(size=size),
         "outliers": lambda: np.append(rng.normal(size=size), [40, -25]), "relu": lambda: rng.normal(size=size).clip(0),
         "hardswish": lambda: (y := rng.normal(size=size) * 3) * np.clip(y / 6 + 0.5, 0, 1),
         "negative": lambda: -rng.gamma(2, size=size), "shifted": lambda: rng.normal(3, 1, size)}[kind]()
    return x.astype(np.float32)


KINDS = ["normal", "laplace", "outliers", "relu", "hardswish", "negative", "shifted"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [U8, U4], ids=["uint8", "uint4"])
def test_search_beats_min_max(kind: str, spec: QuantSpec) -> None:
    x = samples(kind)
    low, high = float(x.min()), float(x.max())
    scale, zero = search_range(x, low, high, spec)
    assert scale.shape == zero.shape == ()
    assert (scale.dtype, zero.dtype) == (np.float32, np.int32)
    x = np.append(x, np.array([low, high], np.float32))       # the search counts the ends once more
    found, plain = loss(x, scale, zero, spec), loss(x, *scale_of_range(low, high, spec), spec)
    assert found <= plain * 1.001
    if spec.bits == 4 and kind not in ("shifted",):
        assert found < 0.9 * plain
    if kind in ("relu",):
        assert zero == 0
    if kind == "negative":
        assert zero == spec.qmax


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [2.0, 2.4, 4.0])
def test_search_comes_close_to_brute_force(kind: str, norm: float) -> None:
    """All 16 zero points with 400 scales each: the least loss is at most 3% lower."""
    x = samples(kind, 500, seed=1)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale, zero = search_range(x, low, high, U4, norm=norm)
    x = np.append(x, np.array([low, high], np.float32))       # the search counts the ends once more
    found = loss(x, scale, zero, U4, norm)
    full = (high - low) / 15
    least = min(loss(x, np.float32(s), np.int32(z), U4, norm) for z in range(16)
                for s in np.linspace(0.1, 1.5, 400) * full)
    assert found <= 1.03 * least


def test_video_levels_are_met_exactly() -> None:
    levels = (np.arange(256).astype(np.float32) / np.float32(255))
    rng = np.random.default_rng(0)
    for x in (levels, np.concatenate([levels, rng.integers(0, 256, 5000) / np.float32(255)]).astype(np.float32),
              levels[rng.integers(0, 256, (3, 40, 40))]):
        scale, zero = search_range(x, 0.0, 1.0, U8)
        assert scale == np.float32(1 / 255)
        assert zero == 0
        q = quantize(x, scale, zero, U8)
        np.testing.assert_array_equal(q, np.rint(x * 255))
        np.testing.assert_allclose(dequantize(q, scale, zero), x, rtol=1.2e-7, atol=0)     # one last place


@settings(max_examples=60)
@given(exponent=st.integers(-37, 37), kind=st.sampled_from(KINDS), bits=st.sampled_from([4, 8]))
def test_search_knows_no_units(exponent: int, kind: str, bits: int) -> None:
    """Data times a power of two: the same range, times it; no overflow, no underflow."""
    spec = QuantSpec(bits, signed=False)
    x, factor = samples(kind, 300), np.float32(2.0) ** np.int32(exponent * 2)
    scale, zero = search_range(x, float(x.min()), float(x.max()), spec)
    y = x * factor
    assert search_range(y, float(y.min()), float(y.max()), spec) == (scale * factor, zero)


@pytest.mark.parametrize("spec", [U8, U4], ids=["uint8", "uint4"])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-30, 1e-20, 0.7, 1.0, 1e20, 1e38, 3.4e38])
@pytest.mark.parametrize("sign", [1, -1])
def test_constant_data(value: float, sign: int, spec: QuantSpec) -> None:
    x = np.full((2, 3), sign * value, np.float32)
    scale, zero = search_range(x, float(x.min()), float(x.max()), spec)
    assert np.isfinite(scale)
    assert scale > 0
    back = dequantize(quantize(x, scale, zero, spec), scale, zero)
    np.testing.assert_allclose(back, x, rtol=1e-6, atol=spec.qmax * SMALLEST_SCALE)


@pytest.mark.parametrize("spec", [U8, U4], ids=["uint8", "uint4"])
def test_huge_two_sided_data(spec: QuantSpec) -> None:
    x = np.random.default_rng(0).uniform(-3e38, 3e38, 5000).astype(np.float32)
    scale, zero = search_range(x, float(x.min()), float(x.max()), spec)
    back = dequantize(quantize(x, scale, zero, spec), scale, zero)
    assert np.isfinite(back).all()
    assert np.abs(back / scale - x / scale).max() < 1.5


@settings(max_examples=100)
@given(values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50), extra=st.floats(0, 1e6),
       bits=st.sampled_from([4, 8]))
def test_any_data_get_a_sound_grid(values: list[float], extra: float, bits: int) -> None:
    spec, x = QuantSpec(bits, signed=False), np.array(values, np.float32)
    low, high = float(x.min()), float(x.max()) + extra
    scale, zero = search_range(x, low, high, spec, steps=20)
    assert np.isfinite(scale)
    assert scale >= np.float32(SMALLEST_SCALE)
    assert 0 <= zero <= spec.qmax
    assert quantize(np.zeros(1), scale, zero, spec)[0] == zero
    if low >= 0:
        assert zero == 0


def test_many_samples_are_searched_on_a_histogram() -> None:
    x = samples("outliers", 60_000)
    scale, zero = search_range(x, float(x.min()), float(x.max()), U4)
    few = x[np.random.default_rng(0).permutation(len(x))[:2000]]
    exact = search_range(few, float(x.min()), float(x.max()), U4)      # few distinct values: no histogram
    assert loss(x, scale, zero, U4) <= 1.02 * loss(x, *exact, U4)
    again = search_range(x[::-1].reshape(-1, 2), float(x.min()), float(x.max()), U4)
    assert again == (scale, zero)                                      # neither order nor shape matters


# -- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "axis"), [((6, 16, 3, 3), 0), ((64, 5), 1), ((6, 64), 0)])
def test_weight_scales_come_close_to_brute_force(bits: int, shape: tuple[int, ...], axis: int) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_t(3, size=shape) * np.exp(rng.normal(size=shape[axis])).reshape(
        [-1 if i == axis else 1 for i in range(len(shape))])).astype(np.float32)
    spec = QuantSpec(bits, signed=True, axis=axis)
    scale = search_weight_scale(weight, spec)
    assert scale.shape == (shape[axis],)
    assert scale.dtype == np.float32
    for row, s in zip(np.moveaxis(weight, axis, 0), scale, strict=True):
        flat = QuantSpec(bits, signed=True)
        full = np.abs(row).max() / flat.qmax
        found = loss(row, s, 0, flat)
        assert found <= loss(row, np.float32(full), 0, flat) * 1.0001
        least = min(loss(row, np.float32(t), 0, flat) for t in np.linspace(0.05, 1.2, 3000) * full)
        assert found <= (1.02 if bits == 4 else 1.8) * least


def test_weight_scale_of_a_whole_tensor() -> None:
    weight = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    scale = search_weight_scale(weight, I4)
    assert scale.shape == ()
    assert scale == search_weight_scale(weight.reshape(1, -1), QuantSpec(4, signed=True, axis=0))[0]


@settings(max_examples=30)
@given(order=st.permutations(range(6)), bits=st.sampled_from([4, 8]))
def test_weight_scales_follow_their_channels(order: list[int], bits: int) -> None:
    weight = np.random.default_rng(1).normal(size=(6, 3, 3, 3)).astype(np.float32)
    spec = QuantSpec(bits, signed=True, axis=0)
    np.testing.assert_array_equal(search_weight_scale(weight[order], spec), search_weight_scale(weight, spec)[order])


@settings(max_examples=40)
@given(exponents=st.lists(st.integers(-70, 100), min_size=4, max_size=4))
def test_weight_scales_know_no_units(exponents: list[int]) -> None:
    weight = np.random.default_rng(2).normal(size=(4, 9)).astype(np.float32)
    factor = (2.0 ** np.array(exponents)).astype(np.float32)
    spec = QuantSpec(4, signed=True, axis=0)
    np.testing.assert_array_equal(search_weight_scale(weight * factor[:, None], spec),
                                  search_weight_scale(weight, spec) * factor)


def test_weights_of_zeros_constants_and_extremes() -> None:
    weight = np.array([[0, 0], [3, 3], [-3, -3], [1e-45, 0], [3e38, -3e38], [0, 1e-30]], np.float32)
    scale = search_weight_scale(weight, QuantSpec(8, signed=True, axis=0))
    assert scale[0] == 1.0
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    back = dequantize(quantize(weight, scale, np.zeros(6, np.int32), QuantSpec(8, signed=True, axis=0)), scale, 0, 0)
    np.testing.assert_allclose(back, weight, rtol=1e-5, atol=SMALLEST_SCALE)


@settings(max_examples=50)
@given(seed=st.integers(0, 1 << 30), bits=st.sampled_from([4, 8]))
def test_grid_values_survive(seed: int, bits: int) -> None:
    """What is on a grid already gets that grid, and no error."""
    rng = np.random.default_rng(seed)
    spec = QuantSpec(bits, signed=True, axis=0)
    q = rng.integers(spec.qmin + 1, spec.qmax + 1, (3, 40))
    q[:, 0] = spec.qmax
    assume((q != 0).any())
    scale = (2.0 ** rng.integers(-6, 4, 3)).astype(np.float32)
    weight = (q * scale[:, None]).astype(np.float32)
    np.testing.assert_array_equal(search_weight_scale(weight, spec), scale)
