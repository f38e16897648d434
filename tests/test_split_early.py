"""Channels split where tensors are small: the same bits, without a Split or Concat at full size."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_text import apply, load, ops, run

from passes.split_early import SplitEarly
from vmq.graph import Graph

REFINER = """(float[1,4,3,5] a, float[1,4,3,5] b, float[1,3,12,20] src, float[1,1,12,20] mean)
    => (float[1,3,12,20] fgr, float[1,1,12,20] pha) {
    f = Constant <value_floats = [1.0, 1.0, 4.0, 4.0]> ()
    s = Constant <value_ints = [1, 4, 12, 20]> ()
    x = Concat <axis = 1> (src, mean)
    big_a = Resize <mode = "linear"> (a, , f)
    big_b = Resize <mode = "linear"> (b, , , s)
    product = Mul (big_a, x)
    sum = Add (product, big_b)
    three, one = Split <axis = 1> (sum, sizes)
    fgr = Add (three, src)
    pha = Clip (one)
}"""


def network(text: str = REFINER) -> Graph:
    graph = load(text.replace("    x = Concat", "    sizes = Constant <value_ints = [3, 1]> ()\n    x = Concat"))
    graph.fold_constants()
    graph.infer_shapes()
    return graph


def check(graph: Graph) -> Graph:
    before = graph.copy()
    assert apply(SplitEarly(), graph).modified == 1
    ours, theirs = run(graph), run(before)
    assert list(ours) == list(theirs)
    for name, values in theirs.items():
        assert np.array_equal(ours[name], values), name
    return graph


def test_the_refiner_of_rvm() -> None:
    graph = check(network())
    assert "Concat" not in ops(graph)
    assert all(n.inputs[0].shape == [1, 4, 3, 5] for n in graph.nodes if n.op == "Split")
    assert ops(graph).count("Split") == 2
    assert sorted(n.outputs[0].shape[1] for n in graph.nodes if n.op == "Resize") == [1, 1, 3, 3]


@pytest.mark.parametrize(("old", "new"), [
    ("product = Mul (big_a, x)", "c = Constant <value_floats = [2.0]> ()\n    product = Mul (c, x)"),
    ("product = Mul (big_a, x)", "product = Mul (mean, x)"),
    ("product = Mul (big_a, x)", "w = Mul (x, x)\n    product = Div (big_a, w)")],
    ids=["one number", "one channel for all", "the same operand twice, in two operators"])
def test_what_else_is_done_to_channels(old: str, new: str) -> None:
    graph = check(network(REFINER.replace(old, new)))
    assert "Concat" not in ops(graph)


def test_numbers_a_channel() -> None:
    graph = network(REFINER.replace("product = Mul (big_a, x)", "product = Mul (big_a, x)\n    more = Mul (product, k)")
                    .replace("Add (product,", "Add (more,").replace("float[1,4,3,5] a,", "float[1,4,3,5] a, "
                                                                    "float[1,4,1,1] w_k,").replace("product, k",
                                                                                                   "product, w_k"))
    check(graph)
    assert sorted(c.shape[-3] for c in graph.constants() if len(c.shape) == 4) == [1, 3]


@pytest.mark.parametrize(("old", "new"), [
    ("(src, mean)", "(mean, src)"),
    ("big_a = Resize <mode = \"linear\"> (a, , f)", "large = Resize <mode = \"linear\"> (a, , f)\n"
                                                    "    big_a = Softmax <axis = 1> (large)"),
    ("pha = Clip (one)", "e = Exp (product)\n    g = ReduceMax (e)\n    pha = Mul (one, g)"),
    ("sum = Add (product, big_b)", "sum = Relu (product)")],
    ids=["joined otherwise", "across channels", "read elsewhere", "another operator"])
def test_others_stay(old: str, new: str) -> None:
    assert old in REFINER
    graph = network(REFINER.replace(old, new))
    before = graph.to_bytes()
    assert apply(SplitEarly(), graph).modified == 0
    assert graph.to_bytes() == before


def test_a_split_behind_a_layer_stays() -> None:
    """Gates of a GRU: there is nothing smaller."""
    graph = load("""(float[1,4,6,8] x, float[4,4,1,1] w_w) => (float[1,2,6,8] p, float[1,2,6,8] q) {
        c = Conv (x, w_w)
        d = Add (c, x)
        p, q = Split <axis = 1, num_outputs = 2> (d)
    }""")
    graph.infer_shapes()
    assert apply(SplitEarly(), graph).modified == 0
