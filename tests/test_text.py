"""The text form is stable, and equal exactly when the graphs are."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from onnx_text import load

from vmq.graph import Graph
from vmq.text import diff_graphs, format_graph

SOURCE = """(float[1,3,h,8] x, float state) => (float[1,2,n,m] y, float[2] c)
        <float[2,3,1,1] w = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float k = {0.1}, float[2] c = {-0.5, 0.25}> {
    a = Conv <strides = [2, 2], auto_pad = "SAME_UPPER", group = 1> (x, w)
    b = Clip (a, , k)
    l, r = Split <axis = 1, num_outputs = 2> (b)
    d = LeakyRelu <alpha = 0.2> (l)
    e = Concat <axis = 1> (d, r)
    y = Mul (e, state)
}"""
GOLDEN = """\
opset 21
in  x: float32[1,3,h,8]
in  state: float32[]
%a = Conv(%x, float32[2,3,1,1]#24ae2dfe8df5) auto_pad=SAME_UPPER group=1 strides=[2, 2]
%b = Clip(%a, _, float32[]{0.100000001})
%l, %r = Split(%b) axis=1 num_outputs=2
%d = LeakyRelu(%l) alpha=0.200000003
%e = Concat(%d, %r) axis=1
%y = Mul(%e, %state)
out y: float32[1,2,n,m]
out c: float32[2] = float32[2]{-0.5, 0.25}
"""


def test_golden_text() -> None:
    assert format_graph(load(SOURCE)) == GOLDEN


def test_equal_graphs_have_equal_text() -> None:
    graph = load(SOURCE)
    assert format_graph(graph.copy()) == format_graph(graph) == format_graph(load(SOURCE))
    assert diff_graphs(format_graph(graph), format_graph(load(SOURCE))) == ""
    for node in graph.nodes:        # names of nodes and constants are for people
        node.name += "_renamed"
    for constant in list(graph.constants())[:2]:
        constant.name += "_renamed"
    assert format_graph(graph) == GOLDEN


def weight(graph: Graph) -> None:
    values = graph.nodes[0].inputs[1].values.copy()
    values.ravel()[-1] = np.nextafter(values.ravel()[-1], np.float32(0))
    graph.nodes[0].inputs[1].values = values


def small(graph: Graph) -> None:
    graph.nodes[1].inputs[2].values = np.nextafter(np.float32(0.1), np.float32(0)).reshape(())


def kind(graph: Graph) -> None:
    graph.nodes[0].inputs[1].values = graph.nodes[0].inputs[1].values.astype(np.float64)


def shape(graph: Graph) -> None:
    graph.nodes[0].inputs[1].values = graph.nodes[0].inputs[1].values.reshape(3, 2, 1, 1)


def output(graph: Graph) -> None:
    graph.outputs[1].values = np.array([-0.5, 0.5], np.float32)


def attribute(graph: Graph) -> None:
    graph.nodes[3].attrs["alpha"] = float(np.nextafter(np.float32(0.2), np.float32(1)))


def operands(graph: Graph) -> None:
    inputs = graph.nodes[4].inputs
    graph.nodes[4].inputs = [inputs[1], inputs[0]]


def operator(graph: Graph) -> None:
    graph.nodes[5].op = "Add"


def free_dimension(graph: Graph) -> None:
    graph.inputs[0].shape = [1, 3, 8, 8]


@pytest.mark.parametrize("change", [weight, small, kind, shape, output, attribute, operands, operator, free_dimension])
def test_any_change_shows(change: Callable[[Graph], None]) -> None:
    graph = load(SOURCE)
    change(graph)
    text = format_graph(graph)
    assert text != GOLDEN
    assert text.count("\n") == GOLDEN.count("\n")
    changed = [line[0] for line in diff_graphs(GOLDEN, text).splitlines()[2:] if line[0] in "+-"]
    assert changed == ["-", "+"]        # the line that it was, and the line that it is


def test_numbers_that_differ_in_the_last_place() -> None:
    for dtype in (np.float64, np.float32, np.float16):
        one = np.array([1 / 3], dtype)
        texts = set()
        for value in (one, np.nextafter(one, dtype(1)), -one, one * 0, -one * 0):
            graph = load("(float[1] x) => (float[1] y) { y = Relu (x) }")
            graph.outputs.append(graph.add("Identity", [graph.constant("c", value)], "c2", dtype=dtype))
            texts.add(format_graph(graph))
        assert len(texts) == 5


@pytest.mark.parametrize("size", [3, 9])
@pytest.mark.parametrize(("dtype", "name"), [(ml_dtypes.int4, "int4"), (ml_dtypes.uint4, "uint4"), (np.int8, "int8")])
def test_integers(dtype: type, name: str, size: int) -> None:
    values = (np.arange(size) % 8).astype(dtype)
    graph = load("(float[3] x) => (float[3] y) { y = Relu (x) }")
    graph.outputs.append(graph.add("Cast", [graph.constant("q", values)], "c", {"to": 1}, shape=[size]))
    text = format_graph(graph)
    assert text == format_graph(graph.copy())
    assert (f"Cast({name}[3]{{0, 1, 2}}) to=1" in text) == (size == 3)
    graph.value("q").values = (np.arange(size)[::-1] % 8).astype(dtype)
    assert format_graph(graph) != text


def test_diff_is_empty_only_for_equal_texts() -> None:
    assert diff_graphs("a\nb\n", "a\nb\n") == ""
    assert diff_graphs("a\nb\n", "a\nc\n") == "--- before\n+++ after\n@@ -2 +2 @@\n-b\n+c\n"
