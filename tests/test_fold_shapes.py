"""Shape arithmetic becomes constants, no-ops go; what only looks like a no-op stays; the signature never moves."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_text import load, ops, run

from passes.fold_shapes import FoldShapes
from vmq.graph import Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.spec import Options


def fold(graph: Graph) -> PassResult:
    return run_passes(graph, [FoldShapes()], Context(Options()))[0]


def check(graph: Graph, left: list[str]) -> PassResult:
    """Fold; the same bits come out, `left` are the operators that stay, and a second time nothing happens."""
    signature, before, count = graph.signature(), run(graph), len(graph.nodes)
    result = fold(graph)
    assert ops(graph) == left
    assert result.modified == count - len(left)
    assert graph.signature() == signature
    for name, value in run(graph).items():
        np.testing.assert_array_equal(value, before[name])
    again = graph.to_bytes()
    assert fold(graph).modified == 0
    assert graph.to_bytes() == again
    return result


def test_shape_arithmetic_of_a_resize() -> None:
    graph = load("""(float[1,3,6,8] x, float[1,3,3,4] z) => (float[1,3,6,8] y)
            <int64[1] from = {2}, int64[1] to = {4}, int64[1] first = {0}, int64[1] two = {2}, float half = {0.5}> {
        size = Shape (x)
        hw = Slice (size, from, to)
        zs = Shape (z)
        nc = Slice (zs, first, two)
        all = Concat <axis = 0> (nc, hw)
        up = Resize <mode = "linear"> (z, , , all)
        k = Cast <to = 1> (hw)
        l = Mul (k, half)
        m = ReduceSum <keepdims = 0> (l)
        s = Mul (up, m)
        y = Add (s, x)
    }""")
    result = check(graph, ["Resize", "Mul", "Add"])
    assert result.report == {"folded": 8, "no_ops": 0}
    assert sorted(c.values.tolist() for c in graph.constants() if c.values.ndim) == [[1, 3, 6, 8]]


NO_OPS = {
    "Identity": "b = Identity (a)",
    "Dropout": "b = Dropout (a)",
    "Dropout with a mask that nobody reads": "b, mask = Dropout (a, ratio)",
    "Dropout not in training": "b = Dropout (a, ratio, no)",
    "Concat of one": "b = Concat <axis = 1> (a)",
    "Cast to the same type": "b = Cast <to = 1> (a)",
    "Transpose that moves nothing": "b = Transpose <perm = [0,1,2,3]> (a)",
    "Slice that cuts nothing": "b = Slice (a, starts, ends, axes)",
    "Slice with steps of one": "b = Slice (a, starts, ends, axes, ones)",
    "Expand that widens nothing": "b = Expand (a, row)",
    "Reshape to the same": "b = Reshape (a, same)",
    "Tile once": "b = Tile (a, once)",
    "Pad of nothing": "b = Pad (a, nothing)",
    "Resize by scales of one": 'b = Resize <mode = "linear"> (a, , unit)',
    "Resize to the same size": 'b = Resize <mode = "nearest"> (a, , , same)',
    "Resize cubic": 'b = Resize <mode = "cubic", coordinate_transformation_mode = "align_corners"> (a, , , same)',
}
NOT_QUITE = {
    "Concat of two": "c = Concat <axis = 0> (a, a)  b = Slice (c, starts0, ends0, axes0)",
    "Cast there and back": "c = Cast <to = 7> (a)  b = Cast <to = 1> (c)",
    "Transpose": "b = Transpose <perm = [0,1,3,2]> (a)",
    "Slice backwards": "b = Slice (a, last, before, axes2, minus)",
    "Slice that cuts": "c = Slice (a, starts1, ends1, axes)  b = Concat <axis = 2> (c, c)",
    "Expand": "c = ReduceMax (a, axes2)  b = Expand (c, same)",
    "Reshape": "c = Reshape (a, flat)  d = Relu (c)  b = Reshape (d, same)",
    "Pad and cut": "b = Pad (a, shift)",
    "Resize that rounds down to the same size": 'b = Resize <mode = "linear"> (a, , nearly)',
}
CONSTANTS = """float ratio = {0.5}, bool no = {0}, int64[1] starts = {0}, int64[1] ends = {9223372036854775807},
    int64[1] axes = {2}, int64[1] ones = {1}, int64[1] row = {4}, int64[4] same = {1, 2, 4, 4},
    int64[4] once = {1, 1, 1, 1}, int64[8] nothing = {0, 0, 0, 0, 0, 0, 0, 0}, float[4] unit = {1.0, 1.0, 1.0, 1.0},
    int64[1] starts0 = {0}, int64[1] ends0 = {1}, int64[1] axes0 = {0}, int64[1] last = {-1},
    int64[1] before = {-9223372036854775807}, int64[1] axes2 = {3}, int64[1] minus = {-1}, int64[1] starts1 = {1},
    int64[1] ends1 = {3}, int64[2] flat = {2, 16}, int64[8] shift = {0, 0, 1, 0, 0, 0, -1, 0},
    float[4] nearly = {1.0, 1.0, 1.2, 1.2}"""


def around(inner: str) -> Graph:
    return load(f"""(float[1,2,4,4] x) => (float[1,2,4,4] y) <{CONSTANTS}> {{
        a = Neg (x)  {inner}  y = Exp (b) }}""")


@pytest.mark.parametrize("kind", NO_OPS)
def test_no_ops_go(kind: str) -> None:
    result = check(around(NO_OPS[kind]), ["Neg", "Exp"])
    assert result.report["no_ops"] + result.report["folded"] == 1


@pytest.mark.parametrize("kind", NOT_QUITE)
def test_what_only_looks_like_one_stays(kind: str) -> None:
    graph = around(NOT_QUITE[kind])
    before = graph.to_bytes()
    assert check(graph, ops(graph)).modified == 0
    assert graph.to_bytes() == before


def test_dropout_in_training_and_dropout_whose_mask_is_an_output_stay() -> None:
    for constants, nodes, outputs in (
            ("float ratio = {0.5}, bool yes = {1}", "b = Dropout <seed = 1> (a, ratio, yes)", ""),
            ("float ratio = {0.5}", "b, mask = Dropout (a, ratio)", ", bool[4] mask")):
        graph = load(f"(float[4] x) => (float[4] y{outputs}) <{constants}> {{ a = Neg (x)  {nodes}  y = Exp (b) }}")
        before = graph.to_bytes()
        assert fold(graph).modified == 0
        assert graph.to_bytes() == before


def test_a_free_dimension_is_no_proof() -> None:
    graph = load("(float[1,h] x, int64[2] s) => (float[1,h] y) { a = Neg (x)  b = Reshape (a, s)  y = Exp (b) }")
    assert fold(graph).modified == 0


def test_chains_of_no_ops_and_unread_branches() -> None:
    graph = load("""(float[1,2,4,4] x, float[4] unread) => (float[1,2,4,4] y) {
        a = Identity (x)  b = Cast <to = 1> (a)  c = Identity (b)  dead = Neg (unread)  y = Exp (c) }""")
    check(graph, ["Exp"])
    assert [v.name for v in graph.inputs] == ["x", "unread"]


def test_no_op_before_an_output() -> None:
    check(load("(float[4] x) => (float[4] y) { a = Neg (x)  y = Identity (a) }"), ["Neg"])
    check(load("(float[4] x) => (float[4] y, float[4] z) { a = Neg (x)  y = Identity (a)  z = Exp (a) }"),
          ["Neg", "Exp"])


@pytest.mark.parametrize("text", [
    "(float[4] x) => (float[4] y) { y = Identity (x) }",
    "(float[4] x) => (float[4] y, float[4] z) { y = Neg (x)  z = Identity (y) }",
    "(float[4] x) => (float[4] y, float[4] z) { y = Identity (x)  z = Identity (x) }",
])
def test_outputs_that_are_an_input_or_each_other_stay(text: str) -> None:
    graph = load(text)
    before = graph.to_bytes()
    check(graph, ops(graph))
    assert graph.to_bytes() == before


def test_two_outputs_of_one_value() -> None:
    check(load("(float[4] x) => (float[4] y, float[4] z) { a = Neg (x)  y = Identity (a)  z = Identity (a) }"),
          ["Neg", "Identity"])


def test_outputs_that_become_constants_stay_outputs() -> None:
    graph = load("""(float[2,3] x) => (float[2,3] y, int64[2] s, int64[2] t) {
        y = Neg (x)  s = Shape (x)  t = Add (s, s) }""")
    check(graph, ["Neg"])
    assert run(Graph.load(graph.to_bytes()))["t"].tolist() == [4, 6]


def test_nothing_to_do_leaves_the_object_as_it_is() -> None:
    graph = load("(float[4] x) => (float[4] y) { a = Neg (x)  y = Exp (a) }")
    nodes = list(graph.nodes)
    assert fold(graph) == PassResult()
    assert all(a is b for a, b in zip(graph.nodes, nodes, strict=True))
