"""Functions without an integer kernel: what is written for them is near them, and runs in integers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx_text import apply, load, ops, quantized, run, run_optimized, short

from passes.double_sizes import DoubleSizes
from passes.integer_forms import IntegerForms
from passes.lower import Lower
from passes.move_integers import MoveIntegers
from vmq.graph import Graph
from vmq.shadow import Shadow

pytestmark = pytest.mark.usefixtures("one_thread")

Array = NDArray[np.float64]
SHAPE = (1, 4, 6, 8)
FINE = 1.0001
"""A bound in steps, with room for the rounding of float32."""

scales = st.floats(0.002, 0.2).map(short)
zeros = st.integers(0, 255)
shapes = st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
quick = settings(max_examples=15)


def noise(shape: tuple[int, ...], grid: tuple[float, int], seed: int = 0) -> NDArray[np.float32]:
    """Values over a whole grid and a little beyond."""
    scale, zero = grid
    steps = np.random.default_rng(seed).uniform(-20, 275, shape)
    return ((steps - zero) * scale).astype(np.float32)


def on_grid(x: NDArray[Any], grid: tuple[float, int]) -> Array:
    """What quantizing and reading back makes of x."""
    return (integers(x, grid) - grid[1]) * float(np.float32(grid[0]))


def integers(x: NDArray[Any], grid: tuple[float, int]) -> Array:
    return np.clip(np.rint(np.asarray(x, np.float64) / float(np.float32(grid[0]))) + grid[1], 0, 255)


def rewritten(graph: Graph) -> Graph:
    assert apply(IntegerForms(), graph).modified >= 1
    return graph


def one(graph: Graph, feeds: Mapping[str, NDArray[Any]]) -> Array:
    return next(iter(run(graph, feeds).values())).astype(np.float64)


def hard_sigmoid(x: Array, alpha: float, beta: float = 0.5) -> Array:
    return np.clip(alpha * x + beta, 0.0, 1.0)


# -- values --------------------------------------------------------------------------------------------


@quick
@given(alpha=st.floats(0.02, 2.0), beta=st.sampled_from([0.0, 0.25, 0.5, 0.4, 1.0]), scale=scales, zero=zeros,
       shape=shapes)
def test_hardsigmoid_is_within_a_step_and_a_half(alpha: float, beta: float, scale: float, zero: int,
                                                 shape: tuple[int, ...]) -> None:
    """Half a step is rounding, one the top, which is 255/256; an odd offset costs half more."""
    grid = (scale, zero)
    graph = rewritten(quantized(f"y = HardSigmoid <alpha = {alpha!r}, beta = {beta!r}> (x)", {"x": shape}, {"y": shape},
                                {"x": grid, "y": (1 / 255, 0)}))
    assert "HardSigmoid" not in ops(graph)
    x = noise(shape, grid)
    got, wanted = one(graph, {"x_in": x}), hard_sigmoid(on_grid(x, grid), alpha, beta)
    assert np.abs(got - wanted).max() <= (1.5 if beta != 0.4 else 2.0) * FINE / 255
    assert (got[alpha * on_grid(x, grid) + beta >= 1.0 + 1 / 256] == 255 / 256).all()
    assert (got[alpha * on_grid(x, grid) + beta <= -1 / 256] == 0.0).all()


@quick
@given(scale=scales, zero=zeros, out=scales, shape=shapes)
def test_hardswish_is_x_times_its_gate(scale: float, zero: int, out: float, shape: tuple[int, ...]) -> None:
    grid, coarse = (scale, zero), (out, 40)
    graph = rewritten(quantized("y = HardSwish (x)", {"x": shape}, {"y": shape}, {"x": grid, "y": coarse}))
    assert "HardSwish" not in ops(graph)
    x = noise(shape, grid)
    seen = on_grid(x, grid)
    exact = np.clip(seen * hard_sigmoid(seen, 1 / 6), -40 * out, 215 * out)
    assert (np.abs(one(graph, {"x_in": x}) - exact) <= (0.5 * out + np.abs(seen) * 1.5 / 255) * FINE + 1e-6).all()


@quick
@given(scale=scales, zero=zeros, shape=shapes)
def test_tanh_is_within_one_step(scale: float, zero: int, shape: tuple[int, ...]) -> None:
    grid = (scale, zero)
    graph = rewritten(quantized("y = Tanh (x)", {"x": shape}, {"y": shape}, {"x": grid, "y": (1 / 127, 128)}))
    assert "Tanh" not in ops(graph)
    x = noise(shape, grid)
    off = np.abs(one(graph, {"x_in": x}) - np.tanh(on_grid(x, grid)))
    assert off.max() <= FINE / 128
    assert off[on_grid(x, grid) < 2.0].max(initial=0.0) <= 0.5 * FINE / 128 + 1e-6     # below the top half a step


@quick
@given(scale=scales, zero=st.integers(0, 200), number=st.sampled_from(["one", "two"]), shape=shapes)
def test_a_number_minus_x_is_exact(scale: float, zero: int, number: str, shape: tuple[int, ...]) -> None:
    """The scale of x moves a little so that the number is a whole count of steps; then nothing is rounded."""
    value = {"one": 1.0, "two": 2.0}[number]
    graph = rewritten(quantized(f"y = Sub ({number}, x)", {"x": shape}, {"y": shape}, {"x": (scale, zero),
                                                                                       "y": (1 / 64, 9)}))
    assert "Sub" not in ops(graph)
    write = next(n for n in graph.nodes if n.op == "QuantizeLinear" and n.inputs[0].name == "x_in")
    grid = (float(np.asarray(write.inputs[1].values)), zero)
    assert round(value / grid[0]) == pytest.approx(value / grid[0], rel=1e-6)
    x = noise(shape, grid)
    np.testing.assert_allclose(one(graph, {"x_in": x}), value - on_grid(x, grid), rtol=0, atol=1e-5 * max(
        value, 255 * grid[0]))


@quick
@given(a=scales, b=scales, za=zeros, zb=zeros, out=scales, shape=shapes)
def test_a_difference_gives_the_same_bits(a: float, b: float, za: int, zb: int, out: float,
                                          shape: tuple[int, ...]) -> None:
    grids = {"a": (a, za), "b": (b, zb), "y": (out, 100)}
    before, after = (quantized("y = Sub (a, b)", {"a": shape, "b": shape}, {"y": shape}, grids) for _ in range(2))
    assert "Sub" not in ops(rewritten(after))
    feeds = {"a_in": noise(shape, grids["a"]), "b_in": noise(shape, grids["b"], 1)}
    assert np.array_equal(one(before, feeds), one(after, feeds))


def doubled(x: Array, axis: int) -> Array:
    """Linear between pixels' centres, one axis, from its definition."""
    first, last = x.take([0], axis), x.take([-1], axis)
    before = np.concatenate([first, x.take(range(x.shape[axis] - 1), axis)], axis)
    after = np.concatenate([x.take(range(1, x.shape[axis]), axis), last], axis)
    pair = np.stack([0.75 * x + 0.25 * before, 0.75 * x + 0.25 * after], axis + 1)
    return pair.reshape([n * 2 if i == axis else n for i, n in enumerate(x.shape)])


@quick
@given(scale=scales, zero=zeros, out=scales, shape=shapes, mode=st.sampled_from(["half_pixel", "pytorch_half_pixel"]))
def test_a_resize_by_2_is_rounded_once_an_axis(scale: float, zero: int, out: float, shape: tuple[int, ...],
                                               mode: str) -> None:
    if mode == "pytorch_half_pixel" and 1 in shape[2:]:
        shape = (*shape[:2], 2, 2)
    grids = {"x": (scale, zero), "y": (out, 128)}
    graph = rewritten(resize(shape, (2, 2), grids, f'mode = "linear", coordinate_transformation_mode = "{mode}"'))
    x = noise(shape, grids["x"])
    sums = doubled(integers(x, grids["x"]) - zero, 3)
    columns = np.clip(away_from_zero(sums) + zero, 0, 255) - zero
    exact = doubled(columns, 2) * (scale * (1 - 2.0**-11))
    off = np.abs(one(graph, {"x_in": x}) - np.clip(exact, -128 * out, 127 * out))
    assert off.max() <= 0.5 * out * FINE


def away_from_zero(x: Array) -> Array:
    """To the nearest integer, halves away from zero."""
    return np.sign(x) * np.floor(np.abs(x) + 0.5)


@pytest.mark.parametrize("zero", [0, 97, 255])
@pytest.mark.parametrize("axis", [2, 3])
def test_no_sum_of_a_resize_is_near_a_half(axis: int, zero: int) -> None:
    """Every pair of 8-bit values: the nearest, and far enough from a half for any kernel's float sums."""
    grid = (short(0.0371), zero)
    factors = (2, 1) if axis == 2 else (1, 2)
    shape = (256, 256, 2, 1) if axis == 2 else (256, 256, 1, 2)
    graph = rewritten(resize(shape, factors, {"x": grid, "y": grid}, 'mode = "linear"'))
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256)), -1) - zero
    x = (pairs * grid[0]).astype(np.float32).reshape(shape)
    (seen,) = [n.inputs[0].inputs[0] for n in graph.nodes if n.op == "Resize"]
    moved = float(seen.inputs[1].values) / grid[0]
    sums = doubled(pairs.reshape(shape).astype(float), axis)
    assert np.abs(np.abs(sums * moved % 1.0 - 0.5)).min() > 2e-4
    want = away_from_zero(sums) if axis == 3 else np.sign(sums) * np.ceil(np.abs(sums) - 0.5)
    assert np.array_equal(np.rint(one(graph, {"x_in": x}) / grid[0]), np.clip(want, -zero, 255 - zero))


def test_a_scale_that_is_not_quite_2_stays() -> None:
    """2.05 x 7 rounds down to 14 as well, but other places are read."""
    graph = resize((1, 2, 7, 7), (2, 2), {"x": (0.04, 120), "y": (0.04, 120)}, 'mode = "linear"')
    node = next(n for n in graph.nodes if n.op == "Resize")
    node.inputs[2].values = np.asarray([1.0, 1.0, 2.05, 2.0], np.float32)
    assert apply(IntegerForms(), graph).report.get("Resize", 0) == 0


@pytest.mark.parametrize("axis", [2, 3])
def test_a_resize_of_one_axis_is_rounded_once(axis: int) -> None:
    grids = {"x": (short(0.04), 120), "y": (short(0.03), 128)}
    factors = (2, 1) if axis == 2 else (1, 2)
    graph = rewritten(resize(SHAPE, factors, grids, 'mode = "linear", coordinate_transformation_mode = "half_pixel"'))
    assert ops(graph).count("Resize") == 1
    x = noise(SHAPE, grids["x"])
    moved = 1 + 2.0**-11 if axis == 3 else 1 - 2.0**-11
    exact = doubled(integers(x, grids["x"]) - 120, axis) * (grids["x"][0] * moved)
    off = np.abs(one(graph, {"x_in": x}) - np.clip(exact, -128 * grids["y"][0], 127 * grids["y"][0]))
    assert off.max() <= 0.5 * grids["y"][0] * FINE


def resize(shape: tuple[int, ...], factors: tuple[int, int], grids: Mapping[str, tuple[float, int]],
           attributes: str) -> Graph:
    """A Resize between quantizers."""
    result = (*shape[:2], shape[2] * factors[0], shape[3] * factors[1])
    graph = quantized(f"""factors = Constant <value_floats = [1.0, 1.0, {factors[0]}.0, {factors[1]}.0]> ()
                          y = Resize <{attributes}> (x, , factors)""", {"x": shape}, {"y": result}, grids)
    graph.fold_constants()
    return graph


# -- the shadow and the integer kernels ----------------------------------------------------------------

BODIES = {
    "HardSigmoid": "y = HardSigmoid <alpha = 0.16666667> (x)",
    "HardSwish": "y = HardSwish (x)",
    "Tanh": "y = Tanh (x)",
    "Sub": "y = Sub (one, x)",
    "Sub of two": "y = Sub (z, x)",
    "Resize": """factors = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> ()
                 y = Resize <mode = "linear"> (x, , factors)""",
}
KERNELS = {"HardSigmoid": {"QLinearMul"}, "HardSwish": {"QLinearMul"}, "Tanh": {"QLinearSigmoid"},
           "Sub": {"QLinearMul"}, "Sub of two": {"QLinearMul", "QLinearAdd"}, "Resize": {"QLinearAdd"}}


def formed(name: str) -> Graph:
    """A form, read by an Add so that what follows it is an integer kernel too."""
    result = (*SHAPE[:2], 12, 16) if name == "Resize" else SHAPE
    graph = quantized(f"{BODIES[name]} y_q = QuantizeLinear (y, y_scale, y_zero) "
                      "read = DequantizeLinear (y_q, y_scale, y_zero) w = Add (read, v)",
                      {"x": SHAPE, "z": SHAPE, "v": result}, {"w": result},
                      {"x": (short(0.04), 120), "z": (short(0.03), 90), "v": (short(0.01), 9), "w": (short(0.05), 128),
                       "y": (short(0.03), 100)})
    graph.fold_constants()
    return rewritten(graph)


def feeds_of(graph: Graph) -> dict[str, NDArray[np.float32]]:
    return {v.name: noise(tuple(v.shape), (0.04, 120), seed) for seed, v in enumerate(graph.inputs)}


@pytest.mark.parametrize("name", BODIES)
def test_the_shadow_computes_the_same(name: str) -> None:
    graph = formed(name)
    feeds = feeds_of(graph)
    with torch.no_grad():
        ours = Shadow(graph)({n: torch.from_numpy(v) for n, v in feeds.items()})
    for output, values in run(graph, feeds).items():
        np.testing.assert_allclose(ours[output].numpy(), values, rtol=0, atol=2e-6 * np.abs(values).max())


@pytest.mark.parametrize("name", BODIES)
def test_it_runs_in_integers(name: str, tmp_path: Path) -> None:
    graph = formed(name)
    feeds = feeds_of(graph)
    plain = run(graph, feeds)["w_out"]
    for step in (*([Lower()] if "Mul" in ops(graph) else []), MoveIntegers(), DoubleSizes()):
        apply(step, graph)
    (ours,), kinds = run_optimized(graph, feeds, tmp_path / "optimized.onnx")
    assert not kinds & {"HardSigmoid", "HardSwish", "Tanh", "Sub", "Resize", "Sigmoid", "Mul", "Add"}, kinds
    assert KERNELS[name] <= kinds, kinds
    steps = np.rint((ours - plain) / short(0.05))
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() < 0.02


def test_gradients_of_integers_that_are_read_with_another_scale() -> None:
    """y = (clip(round(x / s) + z) - z2) * s2, straight through the rounding: by x, by both scales, by z."""
    graph = load("""(float[6] x) => (float[6] y) <float s = {0.5}, uint8 z = {10}, float s2 = {0.125}, uint8 z2 = {3}> {
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, s2, z2)
    }""")
    shadow = Shadow(graph)
    learned = [shadow.parameter(n).requires_grad_() for n in ("s", "z", "s2")]
    x = torch.tensor([-9.0, -1.3, 0.0, 0.9, 70.4, 200.0], requires_grad=True)
    y = shadow({"x": x})["y"]
    q = torch.tensor([0.0, 7.0, 10.0, 12.0, 151.0, 255.0])
    assert torch.equal(y, (q - 3) * 0.125)
    weights = torch.tensor([1.0, 2.0, 3.0, 5.0, 7.0, 11.0])
    (y * weights).sum().backward()
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weights * inside * 0.125 / 0.5)
    wanted = [(weights * inside * -x.detach() / 0.5**2 * 0.125).sum(), (weights * inside * 0.125).sum(),
              (weights * (q - 3)).sum()]
    for parameter, value in zip(learned, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, value.reshape(parameter.shape))


# -- what stays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [
    "y = HardSigmoid <beta = 1.2> (x)", "y = HardSigmoid <beta = -0.1> (x)", "y = HardSigmoid <alpha = -0.2> (x)",
    "y = Sub (x, one)", "a = Neg (one) y = Sub (a, x)", "a = Abs (x) y = Tanh (a)", "a = Abs (x) y = HardSwish (a)"])
def test_what_has_no_form_stays(body: str) -> None:
    graph = quantized(body, {"x": SHAPE}, {"y": SHAPE}, {"x": (0.04, 120), "y": (0.04, 120)})
    graph.fold_constants()
    before = graph.to_bytes()
    assert apply(IntegerForms(), graph).modified == 0
    assert graph.to_bytes() == before


@pytest.mark.parametrize(("factors", "attributes"), [
    ((3, 3), 'mode = "linear"'), ((4, 1), 'mode = "linear"'), ((2, 2), 'mode = "nearest"'),
    ((2, 2), 'mode = "linear", coordinate_transformation_mode = "align_corners"'),
    ((2, 2), 'mode = "linear", coordinate_transformation_mode = "asymmetric"'), ((2, 2), 'mode = "cubic"')])
def test_other_resizes_stay(factors: tuple[int, int], attributes: str) -> None:
    graph = resize(SHAPE, factors, {"x": (0.04, 120), "y": (0.04, 120)}, attributes)
    before = graph.to_bytes()
    assert apply(IntegerForms(), graph).modified == 0
    assert graph.to_bytes() == before


def test_a_result_that_is_the_models_output_needs_no_identity() -> None:
    graph = rewritten(quantized("y = Tanh (x)", {"x": SHAPE}, {"y": SHAPE}, {"x": (0.04, 120), "y": (0.04, 120)}))
    assert "Identity" not in ops(graph)
    assert [v.name for v in graph.outputs] == ["y_out"]


def test_numbers_that_share_an_x_do_not_move_its_steps_apart() -> None:
    """1 - x and 2 - x of one x, and its tanh: whatever is done to the scale of x, every reader sees the same x."""
    graph = rewritten(quantized("t = Tanh (x) a = Sub (one, x) b = Sub (two, x)", {"x": SHAPE},
                                {"t": SHAPE, "a": SHAPE, "b": SHAPE},
                                {"x": (short(0.0033), 0), "a": (0.02, 60), "b": (0.02, 60), "t": (1 / 127, 128)}))
    assert ops(graph).count("Sub") == 1                   # no steps fit both numbers: the second stays
    x = np.random.default_rng(0).uniform(0, 0.8, SHAPE).astype(np.float32)
    got = run(graph, {"x_in": x})
    assert np.abs(got["a_out"] - (1 - x)).max() < 0.02
    assert np.abs(got["b_out"] - (2 - x)).max() < 0.02
    assert np.abs(got["t_out"] - np.tanh(x)).max() < 0.02
