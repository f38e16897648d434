"""Floats in forms that the runtime is fast with: the same up to the rounding of their sums."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_text import apply, load, ops, run

from passes.find_closures import Closures
from passes.float_forms import FloatForms
from passes.multiply_pixels import MultiplyPixels
from vmq.graph import Graph
from vmq.pipeline import Context, run_passes
from vmq.spec import Options
from vmq.targets import TARGETS

EPS = 2.0**-23
SHAPE = (1, 3, 12, 20)


def resize(shape: tuple[int, ...], factors: tuple[float, float], attributes: str = 'mode = "linear"',
           follow: str = "y = Neg (u)", sizes: bool = False) -> Graph:
    result = [*shape[:2], *(int(n * f) for n, f in zip(shape[2:], factors, strict=True))]
    inputs = f"f = Constant <value_ints = {result}> () u = Resize <{attributes}> (x, , , f)" if sizes else \
        f"f = Constant <value_floats = {[1.0, 1.0, *map(float, factors)]}> () u = Resize <{attributes}> (x, , f)"
    graph = load(f"(float[{','.join(map(str, shape))}] x) => (float[n,c,h,w] y) {{ {inputs} {follow} }}")
    graph.infer_shapes()
    graph.fold_constants()
    return graph


def noise(shape: tuple[int, ...]) -> np.ndarray:  # type: ignore[type-arg]
    return np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)


@settings(max_examples=60)
@given(shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(4, 40), st.integers(4, 40)),
       factors=st.tuples(st.integers(1, 9), st.integers(1, 9)), sizes=st.booleans(),
       mode=st.sampled_from(["half_pixel", "pytorch_half_pixel"]))
def test_a_resize_gives_the_same(shape: tuple[int, ...], factors: tuple[int, int], sizes: bool, mode: str) -> None:
    before = resize(shape, factors, f'mode = "linear", coordinate_transformation_mode = "{mode}"', sizes=sizes)
    after = before.copy()
    after.infer_shapes()
    applies = factors != (1, 1) and all(f == 1 or any(n % b == 0 for b in range(4, 17))
                                        for n, f in zip(shape[2:], factors, strict=True))
    assert apply(FloatForms(), after).modified == applies
    assert ("Resize" in ops(after)) != applies
    x = noise(shape)
    want, got = run(before, {"x": x})["y"], run(after, {"x": x})["y"]
    places = max(shape[2:]) if any(f & (f - 1) for f in factors) else 0       # the operator rounds places to float32
    assert np.abs(got - want).max() <= (4 + places) * EPS * np.abs(x).max()


@pytest.mark.parametrize("text", ["u = ReduceMean <keepdims = 1> (x, a)", "u = ReduceMean (x, a)"])
@pytest.mark.parametrize("axis", [1, -3])
def test_a_mean_of_channels_gives_the_same(text: str, axis: int) -> None:
    before = load(f"(float[2,3,12,20] x) => (float[2,1,12,20] y) <int64[1] a = {{{axis}}}> {{ {text} y = Neg (u) }}")
    before.infer_shapes()
    after = before.copy()
    after.infer_shapes()
    assert apply(FloatForms(), after).report == {"Resize": 0, "ReduceMean": 1, "Add": 0, "Conv": 0}
    x = noise((2, 3, 12, 20))
    assert np.abs(run(after, {"x": x})["y"] - run(before, {"x": x})["y"]).max() <= 4 * EPS * np.abs(x).max()


RESIDUAL = """(float[1,3,4,6] a, float[1,3,4,6] b, float[1,3,8,12] x) => (float[1,3,8,12] y)
    <float[4] f = {1, 1, 2, 2}> {
    u = Resize <mode = "linear"> (a, , f)
    v = Resize <mode = "linear"> (b, , f)
    m = Mul (u, x)
    t = Add (m, v)
    y = Add (t, x)
}"""


def test_a_residual_goes_into_what_is_resized() -> None:
    before, after = load(RESIDUAL), load(RESIDUAL)
    after.infer_shapes()
    assert apply(FloatForms(), after).report == {"Resize": 2, "ReduceMean": 0, "Add": 1, "Conv": 0}
    assert [list(n.outputs[0].shape)[2:] for n in after.nodes if n.op == "Add"] == [[4, 6], [8, 12]]
    feeds = {v.name: noise(tuple(v.shape)) for v in before.inputs}
    want, got = run(before, feeds)["y"], run(after, feeds)["y"]
    assert np.abs(got - want).max() <= 4 * EPS * np.abs(want).max()


@pytest.mark.parametrize(("old", "new"), [
    ("y = Add (t, x)", "z = Neg (x) y = Add (t, z)"),                         # something else is added
    ("y = Add (t, x)", "z = Add (t, x) y = Sub (z, t)"),                      # the sum without it is read, too
    ("m = Mul (u, x)", "w = Neg (u) n = Mul (u, x) m = Add (n, w)"),          # and what is resized
])
def test_other_sums_stay(old: str, new: str) -> None:
    graph = load(RESIDUAL.replace(old, new))
    graph.infer_shapes()
    assert apply(FloatForms(), graph).report["Add"] == 0
    before = load(RESIDUAL.replace(old, new))
    feeds = {v.name: noise(tuple(v.shape)) for v in before.inputs}
    want, got = run(before, feeds)["y"], run(graph, feeds)["y"]
    assert np.abs(got - want).max() <= 4 * EPS * np.abs(want).max()


BOXES = """(float[1,4,9,12] x, float[1,4,9,12] y) => (float[1,4,9,12] out)
    <float[4,1,3,3] w = {WEIGHTS}, float[4,1,3,3] v = {WEIGHTS}> {
    a = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w)
    b = Conv <group = 4, pads = [1, 1, 1, 1]> (y, v)
    xy = Mul (x, y)
    c = Conv <group = 4, pads = [1, 1, 1, 1]> (xy, w)
    m = Mul (a, b)
    out = Sub (c, m)
}""".replace("WEIGHTS", ",".join(str(n % 7 / 8) for n in range(36)))


def test_depthwise_layers_that_are_alike_become_one() -> None:
    before, after = load(BOXES), load(BOXES)
    after.infer_shapes()
    assert apply(FloatForms(), after).report["Conv"] == 3
    assert ops(after).count("Conv") == 1
    feeds = {v.name: noise(tuple(v.shape)) for v in before.inputs}
    assert np.array_equal(run(after, feeds)["out"], run(before, feeds)["out"])


@pytest.mark.parametrize(("old", "new", "joined"), [
    ("b = Conv <group = 4, pads = [1, 1, 1, 1]> (y, v)", "b = Conv <group = 4, pads = [1, 1, 1, 1]> (a, v)", 2),
    ("b = Conv <group = 4, pads = [1, 1, 1, 1]> (y, v)",
     "b = Conv <group = 4, pads = [2, 2, 2, 2], dilations = [2, 2]> (y, v)", 2),
    ("xy = Mul (x, y)", "xy = Mul (a, b)", 2),                                # c reads what a and b give
])
def test_only_independent_layers_that_are_alike_become_one(old: str, new: str, joined: int) -> None:
    before, after = (load(BOXES.replace(old, new)) for _ in range(2))
    after.infer_shapes()
    assert apply(FloatForms(), after).report["Conv"] == joined
    feeds = {v.name: noise(tuple(v.shape)) for v in before.inputs}
    assert np.array_equal(run(after, feeds)["out"], run(before, feeds)["out"])


def test_more_channels_than_a_block_stay_apart() -> None:
    text = BOXES.replace("4,9,12", "8,9,12").replace("[4,1,3,3]", "[8,1,3,3]").replace("group = 4", "group = 8")
    weights = ",".join(str(n % 7 / 8) for n in range(36))
    graph = load(text.replace(weights, ",".join(str(n % 7 / 8) for n in range(72))))
    graph.infer_shapes()
    assert apply(FloatForms(), graph).report["Conv"] == 0


@pytest.mark.parametrize("graph", [
    resize(SHAPE, (2, 2), 'mode = "nearest"'),
    resize(SHAPE, (2, 2), 'mode = "cubic"'),
    resize(SHAPE, (2, 2), 'mode = "linear", coordinate_transformation_mode = "align_corners"'),
    resize(SHAPE, (2, 2), 'mode = "linear", coordinate_transformation_mode = "asymmetric"'),
    resize(SHAPE, (0.5, 0.5)),
    resize(SHAPE, (1.5, 2)),
    resize((1, 3, 17, 20), (2, 2)),                       # a prime number of rows
    load("(float[1,3,12,20] x) => (float[1,3,1,1] y) <int64[2] a = {2, 3}> { y = ReduceMean (x, a) }"),
    load("(float[1,3,12,20] x) => (float[1,12,20] y) <int64[1] a = {1}> { y = ReduceMean <keepdims = 0> (x, a) }"),
    load("(float[1,64,12,20] x) => (float[1,1,12,20] y) <int64[1] a = {1}> { y = ReduceMean (x, a) }"),
    load("(float[n,3,h,w] x) => (float[n,1,h,w] y) <int64[1] a = {1}> { y = ReduceMean (x, a) }"),
], ids=lambda g: g.nodes[0].op)
def test_others_stay(graph: Graph) -> None:
    graph.infer_shapes()
    before = graph.to_bytes()
    assert apply(FloatForms(), graph).modified == 0
    assert graph.to_bytes() == before


def test_what_is_quantized_later_stays() -> None:
    """A sum rounded otherwise could fall on the other side of a half."""
    graph = resize(SHAPE, (2, 2), follow="s = Constant <value_float = 0.5> () z = Constant <value = uint8 {3}> () "
                                         "n = Neg (u) q = QuantizeLinear (n, s, z) y = DequantizeLinear (q, s, z)")
    assert apply(FloatForms(), graph).modified == 0


def test_other_targets_keep_their_operators() -> None:
    graph = resize(SHAPE, (2, 2))
    context = Context(Options(target=TARGETS["qnn"]), found={"find_closures": Closures((), ())})
    assert run_passes(graph, [FloatForms()], context)[0].modified == 0


def test_verify_is_given_the_graph_before_any_sum_moved() -> None:
    graph = resize(SHAPE, (2, 2))
    context = Context(Options(), found={"find_closures": Closures((), ())})
    run_passes(graph, [FloatForms(), MultiplyPixels()], context)
    assert ops(context.found["float_sums"]) == ["Resize", "Neg"]
