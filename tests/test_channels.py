"""Channels scaled where they are made and unscaled where they are read: no output moves, or nothing is done."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx_text import load, ops

from vmq.channels import Scaling, leaves
from vmq.graph import Graph
from vmq.shadow import Shadow

MADE = "c = Conv <pads = [1,1,1,1]> (src, w_0, w_b)"
SKIP = f"""(float[1,3,8,8] src, float[4,3,3,3] w_0, float[4] w_b, float[4,9,3,3] w_1) => (float[1,4,16,16] y)
    <float[4] factors = {{1,1,2,2}}> {{
    {MADE}  r = Relu (c)  left, right = Split <axis = 1, num_outputs = 2> (r)
    s = Sigmoid (right)  t = Concat <axis = 1> (left, s)
    up = Resize <mode = "linear"> (t, , factors)  x = Resize <mode = "linear"> (src, , factors)
    p = AveragePool <kernel_shape = [1,1]> (s)  q = Resize <mode = "linear"> (p, , factors)
    j = Concat <axis = 1> (up, q, x)
    y = Conv <pads = [1,1,1,1]> (j, w_1)
}}"""


def results(graph: Graph) -> list[np.ndarray]:
    """What a graph gives, in double precision."""
    graph = graph.copy()
    graph.infer_shapes()
    rng = np.random.default_rng(3)
    feeds = {v.name: torch.from_numpy(rng.normal(size=v.shape)) for v in graph.inputs}
    made = Shadow(graph).double().run(feeds, tuple(v.name for v in graph.outputs))
    return [v.detach().numpy() for v in made.values()]


def scaled(text: str, name: str, swish: bool = False) -> tuple[Graph, Scaling]:
    """The graph of a text with the channels of a value scaled, if that is possible; it gives what it gave."""
    graph = load(text)
    graph.infer_shapes()
    before, same = results(graph), graph.to_bytes()
    value = graph.value(name)
    scaling = Scaling(graph, value, np.linspace(0.25, 4.0, value.shape[1]), swish=swish)
    if scaling.possible:
        scaling.apply()
    assert (graph.to_bytes() == same) != scaling.possible
    for ours, theirs in zip(results(graph), before, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())
    return graph, scaling


def test_a_part_of_what_is_joined_behind_resizes() -> None:
    _, scaling = scaled(SKIP, "left")
    assert scaling.possible
    factors = scaling.factors()
    np.testing.assert_array_equal(factors["r"], [0.25, 4.0, 1.0, 1.0])
    np.testing.assert_array_equal(factors["j"], [0.25, 4.0, *7 * [1.0]])
    assert [n.outputs[0].name for n in scaling.readers] == ["y"]


def test_what_a_value_is_joined_from() -> None:
    graph = load(SKIP)
    graph.infer_shapes()
    found = {value.name: places for value, places in leaves(graph.value("j"))}
    assert found == {"left": [0, 1], "s": [2, 3], "p": [4, 5], "src": [6, 7, 8]}


def test_residuals_are_scaled_along() -> None:
    graph, scaling = scaled(f"""(float[1,3,8,8] src, float[4,3,3,3] w_0, float[4] w_b, float[6,4,1,1] w_1,
            float[6,1,3,3] w_2, float[6,6,1,1] w_3, float[4,6,1,1] w_4, float[2,4,1,1] w_5) => (float[1,2,8,8] y) {{
        {MADE}  a = Conv (c, w_1)  b = Relu (a)  d = Conv <group = 6, pads = [1,1,1,1]> (b, w_2)
        g0 = GlobalAveragePool (d)  g1 = Conv (g0, w_3)  g = HardSigmoid (g1)  e = Mul (d, g)
        f = Conv (e, w_4)  h = Add (c, f)  y = Conv (h, w_5)
    }}""", "h")
    assert scaling.possible
    assert {"c", "f", "h"} == scaling.factors().keys()
    assert ops(graph).count("Mul") == 1
    gated = Scaling(graph, graph.value("e"), np.linspace(1.0, 2.0, 6))
    assert gated.possible
    assert {n.outputs[0].name for n in gated.readers} == {"f", "g1"}


@pytest.mark.parametrize("swish", [True, False])
def test_a_hardswish_is_written_apart(swish: bool) -> None:
    graph, scaling = scaled(f"""(float[1,3,8,8] src, float[4,3,3,3] w_0, float[4] w_b, float[4,1,3,3] w_1)
            => (float[1,4,8,8] y) {{
        {MADE}  a = HardSwish (c)  y = Conv <group = 4, pads = [1,1,1,1]> (a, w_1)
    }}""", "a", swish)
    assert scaling.possible == swish
    assert sorted(ops(graph)) == ["Conv", "Conv", *(["HardSigmoid", "Mul", "Mul"] if swish else ["HardSwish"])]


@pytest.mark.parametrize(("middle", "outputs"), [
    ("a = Sigmoid (c)  y = Conv (a, w_1)", ""),
    ("a = Relu (c)  z = Sigmoid (a)  y = Conv (a, w_1)", ", float[1,4,8,8] z"),
    ("a = Relu (c)  y = Conv (a, w_1)", ", float[1,4,8,8] a"),
    ("a = Relu (c)  y = Conv (a, w_1)  z = Conv (a, w_1)", ", float[1,2,8,8] z"),
    ("a = Add (c, w_c)  y = Conv (a, w_1)", ""),
    ("c2 = Sigmoid (c)  a = Add (c, c2)  y = Conv (a, w_1)", ""),
    ("a = Mul (c, c)  y = Conv (a, w_1)", ""),
    ("a = Relu (c)  b = Softmax <axis = 1> (a)  y = Conv (b, w_1)", ""),
    ("a = Conv <pads = [1,1,1,1]> (src, w_0)  y = Conv (a, w_1)", "")],
    ids=["sigmoid", "read by a sigmoid", "an output", "shared weights behind", "a constant added", "tied to a sigmoid",
         "squared", "softmax", "shared weights before"])
def test_what_cannot_be_scaled_stays(middle: str, outputs: str) -> None:
    _, scaling = scaled(f"""(float[1,3,8,8] src, float[4,3,3,3] w_0, float[4] w_b, float[2,4,1,1] w_1,
            float[1,4,1,1] w_c) => (float[1,2,8,8] y{outputs}) {{ {MADE}  {middle} }}""", "a")
    assert not scaling.possible
