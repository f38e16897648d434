"""Equalization changes weights and biases, never a result; what it would change, it leaves alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from compiling import clips, network
from onnx_text import load, run

from models import rvm
from passes.equalize import VALUES, Equalize
from passes.fold_batchnorm import FoldBatchnorm
from vmq.graph import Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.recipe import Recipe
from vmq.runtime import Session
from vmq.spec import Options


def context(footage=(), on: bool = True) -> Context:
    recipe = dataclasses.replace(Recipe.load("mse"), equalize=on)
    return Context(Options(recipe=recipe), footage)


def equalize(graph: Graph, footage=()) -> PassResult:
    return run_passes(graph, [Equalize()], context(footage))[0]


def spread(graph: Graph) -> Graph:
    """Ranges of channels apart by up to 10,000 on the way out and on the way in, half of the biases far from 0."""
    rng = np.random.default_rng(1)
    for node in graph.nodes:
        for constant in node.inputs[1:]:
            values = constant.values
            for axis in range(min(values.ndim, 2)):
                shape = [-1 if i == axis else 1 for i in range(values.ndim)]
                values = values * 10.0 ** rng.uniform(-1, 1, values.shape[axis]).reshape(shape)
            constant.values = values.astype(np.float32)
    return graph


def ranges(node, side: str) -> np.ndarray:
    """Largest |weight| of each channel, counted from the operator's definition one weight at a time."""
    weight, groups = node.inputs[1].values, node.attrs.get("group", 1)
    if node.op == "Gemm":
        weight = weight if node.attrs.get("transB", 0) else weight.T
    by_row = (side == "out") == (node.op != "ConvTranspose")
    rows, columns = weight.shape[:2]            # columns are counted within a group
    found = np.zeros(rows if by_row else columns * groups)
    for row in range(rows):
        for column in range(columns):
            channel = row if by_row else row // (rows // groups) * columns + column
            found[channel] = max(found[channel], np.abs(weight[row, column]).max())
    return found


def check(graph: Graph, pairs: int, layers: int, footage=()) -> PassResult:
    """All results as they were, the second run finds nothing to do; `pairs` counts, `layers` change."""
    signature, before = graph.signature(), [run(graph, seed=s) for s in range(3)]
    result = equalize(graph, footage)
    assert result.report["pairs"] == pairs
    assert result.modified == layers
    assert graph.signature() == signature
    for seed, wanted in enumerate(before):
        for name, value in run(graph, seed=seed).items():
            assert wanted[name].std() > 0
            np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=1e-5 * np.abs(wanted[name]).max())
    after = graph.to_bytes()
    assert equalize(graph, footage).modified == 0
    assert graph.to_bytes() == after
    return result


PAIRS = {
    "conv, nothing between": ("float[1,3,8,8]", "float[6,3,3,3] w_a, float[6] w_b, float[4,6,3,3] w_c", """
        a = Conv <pads = [1,1,1,1]> (x, w_a, w_b)  y = Conv <strides = [2,2]> (a, w_c)"""),
    "relu, the second biased": ("float[1,3,8,8]", "float[6,3,3,3] w_a, float[4,6,1,1] w_c, float[4] w_d", """
        a = Conv (x, w_a)  r = Relu (a)  y = Conv (r, w_c, w_d)"""),
    "leaky relu and poolings": ("float[1,3,8,8]", "float[6,3,1,1] w_a, float[6] w_b, float[4,6,3,3] w_c", """
        a = Conv (x, w_a, w_b)  l = LeakyRelu <alpha = 0.2> (a)
        p = MaxPool <kernel_shape = [3,3], pads = [1,1,1,1]> (l)
        q = AveragePool <kernel_shape = [2,2], pads = [1,1,1,1]> (p)  y = Conv (q, w_c)"""),
    "second grouped": ("float[1,3,8,8]", "float[6,3,3,3] w_a, float[6] w_b, float[4,3,3,3] w_c", """
        a = Conv (x, w_a, w_b)  r = Relu (a)  y = Conv <group = 2> (r, w_c)"""),
    "both grouped, in different ways": ("float[1,6,8,8]", "float[12,2,3,3] w_a, float[12] w_b, float[4,6,1,1] w_c", """
        a = Conv <group = 3> (x, w_a, w_b)  r = Relu (a)  y = Conv <group = 2> (r, w_c)"""),
    "depthwise with two results a channel": ("float[1,3,8,8]", "float[4,3,1,1] w_a, float[8,1,3,3] w_c", """
        a = Conv (x, w_a)  y = Conv <group = 4, pads = [1,1,1,1]> (a, w_c)"""),
    "transposed first": ("float[1,4,5,5]", "float[4,3,2,2] w_a, float[6] w_b, float[2,6,1,1] w_c", """
        a = ConvTranspose <strides = [2,2], group = 2> (x, w_a, w_b)  r = Relu (a)  y = Conv (r, w_c)"""),
    "transposed second": ("float[1,3,5,5]", "float[4,3,3,3] w_a, float[4,2,3,3] w_c, float[4] w_d", """
        a = Conv (x, w_a)  r = Relu (a)  y = ConvTranspose <group = 2> (r, w_c, w_d)"""),
    "one dimension": ("float[1,3,9]", "float[6,3,3] w_a, float[6] w_b, float[4,6,3] w_c", """
        a = Conv (x, w_a, w_b)  r = Relu (a)  y = Conv (r, w_c)"""),
    "gemm": ("float[5,3]", "float[3,6] w_a, float[1,6] w_b, float[4,6] w_c, float[4] w_d", """
        a = Gemm (x, w_a, w_b)  r = Relu (a)  y = Gemm <transB = 1> (r, w_c, w_d)"""),
    "gemm of a transposed input, one bias for all": ("float[3,5]", "float[6,3] w_a, float[1] w_b, float[6,4] w_c", """
        a = Gemm <transA = 1, transB = 1> (x, w_a, w_b)  r = Relu (a)  y = Gemm (r, w_c)"""),
}


def graph_of(given: str, weights: str, nodes: str, spread_out: bool = True) -> Graph:
    result = {4: "[n,c,h,w]", 3: "[n,c,w]", 2: "[n,c]"}[given.count(",") + 1]
    graph = load(f"({given} x, {weights}) => (float{result} y) {{ {nodes} }}")
    return spread(graph) if spread_out else graph


@pytest.mark.parametrize("what", PAIRS)
def test_a_pair(what: str) -> None:
    graph = graph_of(*PAIRS[what])
    first, second = graph.nodes[0], graph.nodes[-1]
    assert np.abs(np.log(ranges(first, "out") / ranges(second, "in"))).max() > 0.3
    product = ranges(first, "out") * ranges(second, "in")
    result = check(graph, pairs=1, layers=2)
    assert result.report == {"pairs": 1, "rounds": 1, "absorbed_channels": 0}
    np.testing.assert_allclose(ranges(first, "out"), ranges(second, "in"), rtol=1e-5)
    np.testing.assert_allclose(ranges(first, "out"), np.sqrt(product), rtol=1e-5)


def test_pointwise_depthwise_pointwise() -> None:
    """Both sides of the depthwise layer agree, at the cube root of the three ranges' product."""
    graph = graph_of("float[1,3,8,8]", """float[6,3,1,1] w_a, float[6] w_b, float[6,1,3,3] w_c, float[6] w_d,
                     float[4,6,1,1] w_e""", """a = Conv (x, w_a, w_b)  r = Relu (a)
        d = Conv <group = 6, pads = [1,1,1,1]> (r, w_c, w_d)  s = Relu (d)  y = Conv (s, w_e)""")
    first, depthwise, last = (n for n in graph.nodes if n.op == "Conv")
    product = ranges(first, "out") * ranges(depthwise, "in") * ranges(last, "in")
    result = check(graph, pairs=2, layers=3)
    assert 3 <= result.report["rounds"] < 20
    for found in (ranges(first, "out"), ranges(depthwise, "in"), ranges(depthwise, "out"), ranges(last, "in")):
        np.testing.assert_allclose(found, np.cbrt(product), rtol=1e-3)


def test_channels_without_a_weight_stay() -> None:
    graph = graph_of(*PAIRS["relu, the second biased"])
    first, second = graph.nodes[0], graph.nodes[-1]
    for node, index in ((first, np.s_[2]), (second, np.s_[:, 4])):
        values = node.inputs[1].values.copy()
        values[index] = 0.0
        node.inputs[1].values = values
    kept, met = second.inputs[1].values[:, 2].copy(), first.inputs[1].values[4].copy()
    check(graph, pairs=1, layers=2)
    np.testing.assert_array_equal(second.inputs[1].values[:, 2], kept)
    np.testing.assert_array_equal(first.inputs[1].values[4], met)


CONV = "float[4,4,1,1] w_a, float[4,4,1,1] w_c"
LEFT = {
    "hardswish": (CONV, "a = Conv (x, w_a)  h = HardSwish (a)  y = Conv (h, w_c)"),
    "hardsigmoid": (CONV, "a = Conv (x, w_a)  h = HardSigmoid (a)  y = Conv (h, w_c)"),
    "sigmoid": (CONV, "a = Conv (x, w_a)  h = Sigmoid (a)  y = Conv (h, w_c)"),
    "tanh": (CONV, "a = Conv (x, w_a)  h = Tanh (a)  y = Conv (h, w_c)"),
    "a residual behind": (CONV, "a = Conv (x, w_a)  h = Add (a, x)  y = Conv (h, w_c)"),
    "a residual beside": (CONV, "a = Conv (x, w_a)  r = Relu (a)  h = Conv (r, w_c)  y = Add (h, r)"),
    "a concat": ("float[2,4,1,1] w_a, float[4,6,1,1] w_c", """a = Conv (x, w_a)  h = Concat <axis = 1> (a, x)
                 y = Conv (h, w_c)"""),
    "a split": ("float[4,4,1,1] w_a, float[4,2,1,1] w_c", """a = Conv (x, w_a)
                h, i = Split <axis = 1, num_outputs = 2> (a)  y = Conv (h, w_c)"""),
    "a squeeze-excite": (CONV, """a = Conv (x, w_a)  r = Relu (a)  g = GlobalAveragePool (r)  m = Mul (g, r)
                         y = Conv (m, w_c)"""),
    "the weight of two layers": ("float[4,4,1,1] w_a", "a = Conv (x, w_a)  r = Relu (a)  y = Conv (r, w_a)"),
    "the weight of a third layer": (CONV, """a = Conv (x, w_a)  r = Relu (a)  s = Conv (r, w_c)  t = Sigmoid (s)
                                    y = Conv (t, w_a)"""),
    "a computed weight": (CONV, "k = Abs (w_a)  a = Conv (x, k)  y = Conv (a, w_c)"),
}


@pytest.mark.parametrize("why", LEFT)
def test_left_alone(why: str) -> None:
    weights, nodes = LEFT[why]
    graph = graph_of("float[1,4,5,5]", weights, nodes, spread_out=False)
    before = graph.to_bytes()
    result = equalize(graph, clips())
    assert result == PassResult(report={"pairs": 0, "rounds": 0, "absorbed_channels": 0})
    assert graph.to_bytes() == before


def test_outputs_computed_weights_and_factors_of_gemm_stay() -> None:
    for text in ("""(float[1,4,5,5] x, float[4,4,1,1] w_a, float[4,4,1,1] w_c)
                    => (float[1,4,5,5] y, float[1,4,5,5] r) { a = Conv (x, w_a)  r = Relu (a)  y = Conv (r, w_c) }""",
                 """(float[4,4,1,1] x, float[1,4,5,5] z, float[4,4,1,1] w_a) => (float[1,4,5,5] y)
                    { a = Conv (x, w_a)  r = Relu (a)  y = Conv (z, r) }""",
                 """(float[4,3] x, float[3,4] w_a, float[4,2] w_c) => (float[4,2] y)
                    { a = Gemm (x, w_a)  r = Relu (a)  y = Gemm <transA = 1> (r, w_c) }""",
                 """(float[4,3] x, float[3,4] w_a, float[4,4] w_b, float[4,2] w_c) => (float[4,2] y)
                    { a = Gemm (x, w_a, w_b)  y = Gemm (a, w_c) }""",
                 """(float[4,3] x, float[3,4] w_a, float[4,2] w_c) => (float[4,2] y)
                    { a = Gemm (x, w_a)  y = Gemm <alpha = 0.5> (a, w_c) }""",
                 """(float[4,3] x, float[3,4] w_a, float[4] w_b, float[4,2] w_c) => (float[4,2] y)
                    { a = Gemm <beta = 2.0> (x, w_a, w_b)  y = Gemm (a, w_c) }"""):
        graph = load(text)
        before = graph.to_bytes()
        assert equalize(graph).report["pairs"] == 0
        assert graph.to_bytes() == before


def test_a_bias_that_two_layers_share_moves_apart() -> None:
    graph = graph_of("float[1,4,5,5]", "float[4,4,1,1] w_a, float[4] w_b, float[4,4,1,1] w_c", """
        a = Conv (x, w_a, w_b)  r = Relu (a)  y = Conv (r, w_c, w_b)""")
    check(graph, pairs=1, layers=2)


def high(nodes: str = "a = Conv (src, w_a, b)  r = Relu (a)  pha = Conv (r, w_c)") -> Graph:
    """Two layers; of the channels between them, every other is far above zero in all frames, the rest are not."""
    biases = ", ".join(["20.0, 0.1, 40.0, -9.0"] * 4)
    return load(f"""(float[1,3,40,40] src, float[16,3,1,1] w_a, float[1,16,1,1] w_c, float[16,1,1,1] w_t)
        => (float[1,1,h,w] pha) <float[16] b = {{{biases}}}> {{ {nodes} }}""")


def test_high_biases_are_absorbed() -> None:
    graph, footage = high(), clips(2, 4, (40, 40))
    before = Session(graph.copy(), optimize=False)
    result = equalize(graph, footage)
    assert result.report == {"pairs": 1, "rounds": 1, "absorbed_channels": 8}
    assert result.modified == 2
    after = Session(graph, optimize=False, extra=["a"])
    lowest, largest = np.full(16, np.inf), np.zeros(16)
    for clip in footage:
        for frame in clip.frames():
            old, new = before.step(frame), after.step(frame)
            assert np.abs(old["pha"] - new["pha"]).max() < 1e-5 * np.abs(old["pha"]).max()
            lowest, largest = np.minimum(lowest, new["a"].min((0, 2, 3))), np.maximum(largest, new["a"].max((0, 2, 3)))
    assert (lowest[::2] > 0).all()                          # nothing is cut off, with room to spare,
    assert (lowest[::2] < 0.5 * largest[::2]).all()      # and most of what all values had in common is gone
    assert graph.nodes[-1].inputs[2].values.shape == (1,)      # where there was no bias, there is one now
    again = graph.to_bytes()
    assert equalize(graph, footage).modified == 0
    assert graph.to_bytes() == again


@pytest.mark.parametrize("nodes", [
    "a = Conv (src, w_a, b)  r = Relu (a)  pha = Conv <pads = [0,0,1,0]> (r, w_c)",
    'a = Conv (src, w_a, b)  r = Relu (a)  pha = Conv <auto_pad = "SAME_UPPER"> (r, w_c)',
    "a = Conv (src, w_a, b)  r = LeakyRelu (a)  pha = Conv (r, w_c)",
    "a = Conv (src, w_a, b)  pha = Conv (a, w_c)",
    "a = Conv (src, w_a, b)  r = Relu (a)  pha = ConvTranspose (r, w_t)",
    "p = GlobalAveragePool (src)  a = Conv (p, w_a, b)  r = Relu (a)  pha = Conv (r, w_c)",
], ids=["padding", "automatic padding", "leaky relu", "no relu", "transposed", "too few values"])
def test_biases_that_stay(nodes: str) -> None:
    graph = high(nodes)
    assert equalize(graph, clips(2, 4, (40, 40))).report == {"pairs": 1, "rounds": 1, "absorbed_channels": 0}
    assert VALUES > 2 * 4      # a pooled channel has one value a frame


def test_without_clips_biases_stay() -> None:
    assert equalize(high()).report == {"pairs": 1, "rounds": 1, "absorbed_channels": 0}


def test_16_frames_at_most_are_measured_and_clips_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    step, reset = Session.step, Session.reset
    monkeypatch.setattr(Session, "step", lambda self, frame: calls.append("step") or step(self, frame))
    monkeypatch.setattr(Session, "reset", lambda self, *alpha: calls.append("reset") or reset(self, *alpha))
    for count, frames in ((1, 20), (2, 20), (9, 20), (1, 3)):
        calls.clear()
        equalize(high(), clips(count, frames, (40, 40)))
        each = ["reset", *["step"] * min(frames, 16 // min(count, 4))]
        assert calls == ["reset", *each * min(count, 4)]       # a session is born with one


def test_off_by_default_and_then_nothing_changes() -> None:
    graph = spread(load(f"(float[1,4,5,5] x, {CONV}) => (float[1,4,5,5] y) {{ a = Conv (x, w_a)  y = Conv (a, w_c) }}"))
    before, values = graph.to_bytes(), list(graph.values())
    for shared in (Context(Options(), clips()), context(clips(), on=False)):
        assert run_passes(graph, [Equalize()], shared)[0] == PassResult()
        assert graph.to_bytes() == before
        assert all(a is b for a, b in zip(graph.values(), values, strict=True))


def test_every_kind_of_edge_in_one_network() -> None:
    """Of the small matting network only the layers in its squeeze-excite are a pair."""
    graph, footage = network(), clips()
    before = Session(graph.copy(), optimize=False)
    assert equalize(graph, footage).report == {"pairs": 1, "rounds": 1, "absorbed_channels": 0}
    after = Session(graph, optimize=False)
    for frame in footage[0].frames():
        old, new = before.step(frame), after.step(frame)
        for name, values in old.items():
            assert np.abs(new[name] - values).max() < 1e-5, name


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RVM with random weights, channels of its norms apart by a factor of ten."""
    model = rvm.build(seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.mul_(10.0 ** (torch.rand(module.weight.shape, generator=generator) - 0.5))
                module.bias.copy_(0.2 * torch.randn(module.bias.shape, generator=generator))
    path = tmp_path_factory.mktemp("rvm") / "rvm.onnx"
    rvm.export(model, path, size=(96, 128), keep_bn=True)
    return path


def test_rvm_with_its_18_pairs(exported: Path) -> None:
    graph, footage = Graph.load(exported), clips(1, 3, (96, 128))
    run_passes(graph, [FoldBatchnorm()], Context(Options()))
    before = Session(graph.copy(), threads=1, optimize=False)
    result = equalize(graph, footage)
    assert result.report["pairs"] == 18
    assert result.modified == 33        # three layers are the middle of a triple
    after = Session(graph, threads=1, optimize=False)
    for frame in footage[0].frames():
        old, new = before.step(frame), after.step(frame)
        assert old["pha"].std() > 0.01
        for name, values in old.items():
            assert np.abs(new[name] - values).max() < 1e-4, name
    again = graph.to_bytes()
    assert equalize(graph, footage).modified == 0
    assert graph.to_bytes() == again
    layers = {id(n) for n in graph.nodes if n.op == "Conv"}
    matched = 0
    for first in graph.nodes:
        reader = first.outputs[0].outputs[0] if len(first.outputs[0].outputs) == 1 else None
        if id(first) in layers and reader is not None and reader.op == "Relu" and len(reader.outputs[0].outputs) == 1:
            second = reader.outputs[0].outputs[0]
            if id(second) in layers:
                np.testing.assert_allclose(ranges(first, "out"), ranges(second, "in"), rtol=1e-3)
                matched += 1
    assert matched == 18
