"""Kinds of layers follow from topology alone: the same after every name has changed."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_recurrent
from onnx_text import load

from vmq.graph import Graph
from vmq.layers import compute_nodes, kinds_of, tail_nodes, weight_axis, weight_of
from vmq.targets import TARGETS

CPU = TARGETS["cpu"]


def kinds(graph: Graph, states: set[str] = frozenset(), recurrent: set[str] = frozenset()) -> dict[str, set[str]]:  # type: ignore[assignment]
    """Kinds by the name of each layer's result."""
    graph.infer_shapes()
    found = kinds_of(graph, CPU, states, recurrent)
    return {n.outputs[0].name: found[n.name] for n in graph.nodes if n.name in found}


def rename(graph: Graph) -> dict[str, str]:
    """Give every value and node a meaningless name; returns {old: new} of the values."""
    new = {v.name: f"v{i * 7919 % 1009}" for i, v in enumerate(graph.values())}
    for value in list(graph.values()):
        value.name = new[value.name]
    for i, node in enumerate(graph.nodes):
        node.name = f"n{i * 7907 % 1013}"
    graph._names = None
    return new


NET = """(float[1,3,8,8] x, float[4,3,3,3] w_a, float[4,1,3,3] w_b, float[4,4,1,1] w_c, float[4,4,1,1] w_d,
          float[1,4,1,1] w_e, float[3,4,1,1] w_f) => (float[1,1,8,8] pha, float[1,3,8,8] fgr)
        <float low = {0.0}, float high = {1.0}> {
    a = Conv <pads = [1,1,1,1]> (x, w_a)
    b = Conv <pads = [1,1,1,1], group = 4> (a, w_b)
    pool = GlobalAveragePool (b)
    c = Conv (pool, w_c)
    gate = Sigmoid (c)
    gated = Mul (b, gate)
    d = Conv (gated, w_d)
    e = Conv (d, w_e)
    f = Conv (d, w_f)
    sum = Add (f, x)
    fgr = Clip (sum, low, high)
    pha = Clip (e, low, high)
}"""
EXPECTED = {"a": {"first"}, "b": {"depthwise"}, "c": {"pooled"}, "d": set(), "e": {"last"}, "f": {"last"}}


def test_a_feed_forward_net() -> None:
    graph = load(NET)
    assert kinds(graph) == EXPECTED
    assert {n.op for n in graph.nodes if n.name in tail_nodes(graph, CPU, ())} == {"Clip", "Add"}


def test_names_do_not_matter() -> None:
    graph = load(NET)
    new = rename(graph)
    assert kinds(graph) == {new[name]: kind for name, kind in EXPECTED.items()}
    assert len(tail_nodes(graph, CPU, ())) == 3


def test_a_recurrent_net() -> None:
    graph = tiny_recurrent.read(tiny_recurrent.GRU)
    closure = {n.name for n in graph.nodes if n.outputs[0].name in {"g", "gates", "reset", "kept", "c", "new", "s"}}
    wanted = {"e": {"first"}, "g": {"recurrent"}, "c": {"recurrent"}, "p": {"last"}}
    assert kinds(graph, {"s"}, closure) == wanted
    assert {n.outputs[0].name for n in graph.nodes if n.name in tail_nodes(graph, CPU, {"s"})} == {"pha"}
    assert kinds(graph, set(), closure)["c"] == {"recurrent"}       # p still comes after it
    new = rename(graph)
    closure = {n.name for n in graph.nodes if n.outputs[0].name in {new[v] for v in ("g", "reset", "c")}}
    assert kinds(graph, {new["s"]}, closure) == {new[name]: kind for name, kind in wanted.items()}


def test_a_layer_that_writes_a_state_is_not_last() -> None:
    text = """(float[1,3,8,8] x, float[1,3,8,8] h, float[3,3,1,1] w_a, float[3,3,1,1] w_b) =>
        (float[1,3,8,8] y, float[1,3,8,8] s) { i = Add (x, h)  y = Conv (i, w_a)  c = Conv (i, w_b)  s = Relu (c) }"""
    assert kinds(load(text), {"s"}) == {"y": {"first", "last"}, "c": {"first"}}
    assert kinds(load(text)) == {"y": {"first", "last"}, "c": {"first", "last"}}
    assert tail_nodes(load(text), CPU, {"s"}) == set()
    direct = load(text.replace("s = Relu (c)", "s = Identity (c)").replace("c = Conv", "c = Conv"))
    assert kinds(direct, {"s"})["c"] == {"first"}


def test_an_output_that_is_read_on_is_not_last() -> None:
    graph = load("""(float[1,3,8,8] x, float[3,3,1,1] w_a, float[3,3,1,1] w_b) => (float[1,3,8,8] y, float[1,3,8,8] z) {
        y = Conv (x, w_a)  z = Conv (y, w_b) }""")
    assert kinds(graph) == {"y": {"first"}, "z": {"last"}}


@pytest.mark.parametrize(("shape", "kind"), [
    ("float[1,4,1,1]", {"pooled"}), ("float[1,4,1,2]", set()), ("float[1,4,1]", {"pooled"}), ("float[1,4,h,1]", set())])
def test_pooled(shape: str, kind: set[str]) -> None:
    weight = "float[2,4,1]" if shape == "float[1,4,1]" else "float[2,4,1,1]"
    graph = load(f"({shape} x, {weight} w_a) => (float y) {{ c = Conv (x, w_a)  y = ReduceSum <keepdims = 0> (c) }}")
    assert kinds(graph)["c"] - {"first", "last"} == kind


def test_a_shape_that_is_not_known_is_not_pooled() -> None:
    graph = load("(float[1,4,8,8] x, float[4,4,1,1] w_a) => (float[1,4,8,8] y) { a = Relu (x)  y = Conv (a, w_a) }")
    assert graph.value("a").shape is None       # nobody inferred shapes
    assert next(iter(kinds_of(graph, CPU, (), ()).values())) == {"first", "last"}


@pytest.mark.parametrize(("weight", "group", "depthwise"), [
    ("float[4,1,3,3]", 4, True), ("float[4,2,3,3]", 2, False), ("float[4,4,3,3]", 1, False)])
def test_depthwise(weight: str, group: int, depthwise: bool) -> None:
    graph = load(f"(float[1,4,8,8] x, {weight} w_a) => (float[1,4,6,6] y) {{ y = Conv <group = {group}> (x, w_a) }}")
    assert ("depthwise" in kinds(graph)["y"]) == depthwise


def test_one_channel_is_not_depthwise() -> None:
    graph = load("(float[1,1,8,8] x, float[1,1,3,3] w_a) => (float[1,1,6,6] y) { y = Conv (x, w_a) }")
    assert kinds(graph) == {"y": {"first", "last"}}


def test_which_nodes_are_layers() -> None:
    graph = load("""(float[4,4] x, float[4,4,1,1] k, float[4,4] w_a, float[1,4,2,2] i, float[4,6] w_b, float[6,4] w_c)
            => (float[4,4] y, float[1,4,2,2] z, float[4,6] b, float[4,6] c) {
        y = MatMul (x, x)
        m = MatMul (x, w_a)
        z = Conv (i, k)
        b = Gemm (m, w_b)
        c = Gemm <transB = 1> (m, w_c)
        g = Gemm (x, m)
    }""")
    layers = {n.outputs[0].name: n for n in compute_nodes(graph, CPU)}
    assert set(layers) == {"y", "m", "b", "c"}      # a Conv or Gemm by a computed weight is none
    assert weight_of(layers["m"], CPU).name == "w_a"
    assert [weight_axis(layers[n]) for n in ("m", "b", "c")] == [1, 1, 0]
    for name in ("m", "b", "c"):
        values = np.asarray(weight_of(layers[name], CPU).values)
        assert values.shape[weight_axis(layers[name])] == (4 if name == "m" else 6)
    conv = load(NET).nodes[0]
    assert weight_axis(conv) == 0
