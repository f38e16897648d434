"""Folding changes the weights and nothing else: every match is compared in ONNX Runtime, every non-match says why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from onnx_text import load, ops, parse, run

from models import rvm
from passes.fold_batchnorm import FoldBatchnorm
from vmq.graph import Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.spec import Options

STATS = "float[{c}] w_gamma, float[{c}] w_beta, float[{c}] w_mean, float[{c}] w_var"


def fold(graph: Graph) -> PassResult:
    return run_passes(graph, [FoldBatchnorm()], Context(Options()))[0]


def with_norm(text: str, channels: int = 4) -> Graph:
    """A graph whose `{stats}` are statistics of BatchNormalization; about half of the gammas are negative."""
    model = parse(text.replace("{stats}", STATS.format(c=channels)))
    for tensor in model.graph.initializer:
        if tensor.name == "w_var":
            tensor.CopyFrom(numpy_helper.from_array(np.abs(numpy_helper.to_array(tensor)) + 0.1, "w_var"))
        if tensor.name == "w_gamma":
            assert (numpy_helper.to_array(tensor) < 0).any()
    return with_shapes(Graph.load(model))


def with_shapes(graph: Graph) -> Graph:
    graph.infer_shapes()
    return graph


def check_fold(graph: Graph, **report: int) -> None:
    signature, before = graph.signature(), [run(graph, seed=s) for s in range(3)]
    result = fold(graph)
    assert result.report == {"batchnorms": 0, "input_scalings": 0} | report
    assert result.modified == sum(report.values())
    assert result.notes == ()
    assert graph.signature() == signature
    for seed, wanted in enumerate(before):
        for name, value in run(graph, seed=seed).items():
            np.testing.assert_allclose(value, wanted[name], rtol=1e-5, atol=2e-6 * np.abs(wanted[name]).max())
    assert fold(graph).modified == 0


def check_left(graph: Graph, why: str | None) -> None:
    before = graph.to_bytes()
    result = fold(graph)
    assert result.modified == 0
    assert graph.to_bytes() == before
    if why is None:
        assert result.notes == ()
    else:
        (note,) = result.notes
        assert why in note
        assert note.startswith(next(n.name for n in graph.nodes if n.op == "BatchNormalization") + ": ")


NORM = "BatchNormalization <epsilon = 0.01> (c, w_gamma, w_beta, w_mean, w_var)"


@pytest.mark.parametrize("layer", [
    ("float[1,3,6,7]", "float[4,3,3,3] w", "Conv <pads = [1,1,1,1]> (x, w_w)"),
    ("float[1,3,6,7]", "float[4,3,3,3] w, float[4] w_b", "Conv <strides = [2,1]> (x, w_w, w_b)"),
    ("float[2,6,5,5]", "float[4,3,3,3] w, float[4] w_b", "Conv <group = 2> (x, w_w, w_b)"),
    ("float[1,4,5,5]", "float[4,1,3,3] w", "Conv <group = 4, pads = [2,2,2,2], dilations = [2,2]> (x, w_w)"),
    ("float[1,3,9]", "float[4,3,3] w", "Conv (x, w_w)"),
    ("float[1,3,4,4]", "float[4,3,1,1] w", "Conv (x, w_w, )"),
    ("float[1,3,5,5]", "float[3,4,2,2] w, float[4] w_b", "ConvTranspose <strides = [2,2]> (x, w_w, w_b)"),
    ("float[1,6,5,5]", "float[6,2,3,3] w, float[4] w_b", "ConvTranspose <group = 2> (x, w_w, w_b)"),
    ("float[1,4,5,5]", "float[4,1,3,3] w", "ConvTranspose <group = 4> (x, w_w)"),
    ("float[5,3]", "float[3,4] w, float[4] w_b", "Gemm (x, w_w, w_b)"),
    ("float[5,3]", "float[3,4] w, float[1,4] w_b", "Gemm (x, w_w, w_b)"),
    ("float[5,3]", "float[3,4] w, float[1] w_b", "Gemm (x, w_w, w_b)"),
    ("float[5,3]", "float[4,3] w", "Gemm <transB = 1> (x, w_w)"),
    ("float[3,5]", "float[3,4] w, float[4] w_b", "Gemm <transA = 1> (x, w_w, w_b)"),
], ids=lambda layer: f"{layer[2]} {layer[1]}".replace(" ", ""))
def test_norm_after_a_layer(layer: tuple[str, str, str]) -> None:
    given, weights, node = layer
    graph = with_norm(f"({given} x, {weights.replace(' w', ' w_w', 1)}, {{stats}}) => (float[?] y) {{"
                      f" c = {node}  y = {NORM} }}".replace("[?]", "[" + ",".join("nabc"[:given.count(",") + 1]) + "]"))
    check_fold(graph, batchnorms=1)
    assert len(graph.nodes) == 1
    assert len(graph.nodes[0].inputs) == 3


def test_two_layers_that_share_a_weight() -> None:
    graph = with_norm(f"""(float[1,4,5,5] x, float[4,4,1,1] w_w, {{stats}}) => (float[1,4,5,5] y, float[1,4,5,5] z) {{
        c = Conv (x, w_w)  n = {NORM}  y = Relu (n)  z = Conv (y, w_w) }}""")
    check_fold(graph, batchnorms=1)
    assert ops(graph) == ["Conv", "Relu", "Conv"]


def test_two_norms_in_a_row_and_statistics_shared() -> None:
    graph = with_norm(f"""(float[1,4,5,5] x, float[4,4,1,1] w_w, {{stats}}) => (float[1,4,5,5] y) {{
        c = Conv (x, w_w)  n = {NORM}  y = {NORM.replace("(c,", "(n,")} }}""")
    check_fold(graph, batchnorms=2)


SLICES = "int64[1] zero = {{0}}, int64[1] split = {{{0}}}, int64[1] end = {{9223372036854775807}}, " \
    "int64[1] axis = {{1}}"


@pytest.mark.parametrize("layer", [
    "Conv <group = 2> (x, w_w, w_b)", "ConvTranspose (x, w_t, w_b)"])
@pytest.mark.parametrize("cut", [
    "l, r = Split <axis = 1> (c, parts)",
    "l = Slice (c, zero, split, axis) r = Slice (c, split, end, axis)",
    "r = Slice (c, split, end, axis, one) l = Slice (c, zero, split, axis, one)"])
@pytest.mark.parametrize("first", [True, False])
def test_norm_of_some_channels(layer: str, cut: str, first: bool) -> None:
    """As IBNorm does it: half of a convolution's channels have a BatchNormalization, the others something else."""
    normed, other = ("l", "r") if first else ("r", "l")
    graph = with_norm(f"""(float[1,4,5,5] x, float[6,2,1,1] w_w, float[4,6,1,1] w_t, float[6] w_b, {{stats}})
            => (float[1,6,5,5] y) <int64[2] parts = {{{"4, 2" if first else "2, 4"}}}, int64[1] one = {{1}},
                {SLICES.format(4 if first else 2)}> {{
        c = {layer}
        {cut}
        n = BatchNormalization ({normed}, w_gamma, w_beta, w_mean, w_var)
        m = Tanh ({other})
        y = Concat <axis = 1> ({"n, m" if first else "m, n"})
    }}""")
    check_fold(graph, batchnorms=1)
    assert "BatchNormalization" not in ops(graph)


@pytest.mark.parametrize("other", ["Slice (c, zero, three, axis)", "Relu (c)", "Slice (c, zero, three, height)"])
def test_norm_of_channels_that_are_read_elsewhere_too(other: str) -> None:
    graph = with_norm(f"""(float[1,4,5,5] x, float[6,4,1,1] w_w, {{stats}}) => (float[1,4,5,5] y, float[a,b,c,d] z)
            <int64[1] three = {{3}}, int64[1] height = {{2}}, {SLICES.format(2)}> {{
        c = Conv (x, w_w)
        r = Slice (c, split, end, axis)
        y = BatchNormalization (r, w_gamma, w_beta, w_mean, w_var)
        z = {other}
    }}""")
    check_left(graph, "not cut off its own")


NON_MATCHES = {
    "does not follow a convolution but an input":
        f"(float[1,4,5,5] c, {{stats}}) => (float[1,4,5,5] y) {{ y = {NORM} }}",
    "does not follow a convolution but Relu":
        f"(float[1,4,5,5] x, {{stats}}) => (float[1,4,5,5] y) {{ c = Relu (x)  y = {NORM} }}",
    "read elsewhere too": f"""(float[1,4,5,5] x, float[4,4,1,1] w_w, {{stats}}) => (float[1,4,5,5] y, float[1,4,5,5] z)
        {{ c = Conv (x, w_w)  y = {NORM}  z = Relu (c) }}""",
    "is read elsewhere": f"""(float[1,4,5,5] x, float[4,4,1,1] w_w, {{stats}}) => (float[1,4,5,5] y, float[1,4,5,5] c)
        {{ c = Conv (x, w_w)  y = {NORM} }}""",
    "computed, not constant": f"""(float[1,4,5,5] x, float[4,4,1,1] k, {{stats}}) => (float[1,4,5,5] y)
        {{ c = Conv (x, k)  y = {NORM} }}""",
    "not constant": f"""(float[1,4,5,5] x, float[4] b, float[4,4,1,1] w_w, {{stats}}) => (float[1,4,5,5] y)
        {{ c = Conv (x, w_w, b)  y = {NORM} }}""",
    "statistics of the batch": """(float[1,4,5,5] x, float[4,4,1,1] w_w, {stats}) => (float[1,4,5,5] y)
        { c = Conv (x, w_w)  y, m, v = BatchNormalization <training_mode = 1> (c, w_gamma, w_beta, w_mean, w_var) }""",
    "factors of its own": f"""(float[5,3] x, float[3,4] w_w, {{stats}}) => (float[5,4] y)
        {{ c = Gemm <alpha = 0.5> (x, w_w)  y = {NORM} }}""",
    "has factors": f"""(float[5,3] x, float[3,4] w_w, float[4] w_b, {{stats}}) => (float[5,4] y)
        {{ c = Gemm <beta = 2.0> (x, w_w, w_b)  y = {NORM} }}""",
    "row to row": f"""(float[4,3] x, float[3,4] w_w, float[4,1] w_b, {{stats}}) => (float[4,4] y)
        {{ c = Gemm (x, w_w, w_b)  y = {NORM} }}""",
}


@pytest.mark.parametrize("why", NON_MATCHES)
def test_norms_that_stay(why: str) -> None:
    check_left(with_norm(NON_MATCHES[why]), why)


SCALES = {
    "one number": "float k = {0.25}",
    "one number of rank 1": "float[1] k = {-3.0}",
    "one number of rank 4": "float[1,1,1,1] k = {3.0}",
    "a number a channel": "float[1,4,1,1] k = {0.25, -2.0, 3.0, 0.1}",
    "without the batch": "float[4,1,1] k = {0.25, -2.0, 3.0, 0.1}",
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("node", ["Div (x, k)", "Mul (x, k)", "Mul (k, x)"])
def test_scaling_before_convolutions(scale: str, node: str) -> None:
    graph = with_shapes(load(f"""(
            float[1,4,5,5] x, float[2,4,3,3] w_a, float[4,2,1,1] w_b, float[4,1,3,3] w_c, float[4] w_d)
            => (float[1,2,5,5] a, float[1,4,5,5] b, float[1,4,5,5] c) <{SCALES[scale]}> {{
        s = {node}
        a = Conv <pads = [1,1,1,1]> (s, w_a)
        b = Conv <group = 2> (s, w_b, w_d)
        c = Conv <group = 4, auto_pad = "SAME_UPPER"> (s, w_c)
    }}"""))
    check_fold(graph, input_scalings=1)
    assert ops(graph) == ["Conv", "Conv", "Conv"]


def test_scaling_of_one_dimension() -> None:
    graph = with_shapes(load("""(float[1,2,9] x, float[3,2,3] w_a) => (float[1,3,7] y) <float[2,1] k = {2.0, 5.0}> {
        s = Div (x, k)  y = Conv (s, w_a) }"""))
    check_fold(graph, input_scalings=1)


def test_normalisation_of_a_frame_loses_its_division_only() -> None:
    graph = with_shapes(load("""(float[1,3,6,6] x, float[4,3,3,3] w_a) => (float[1,4,3,3] y)
        <float[1,3,1,1] mean = {0.485, 0.456, 0.406}, float[1,3,1,1] std = {0.229, 0.224, 0.225}> {
        m = Sub (x, mean)  s = Div (m, std)  y = Conv <pads = [1,1,1,1], strides = [2,2]> (s, w_a) }"""))
    check_fold(graph, input_scalings=1)
    assert ops(graph) == ["Sub", "Conv"]


@pytest.mark.parametrize(("inner", "constant"), [
    ("s = Mul (x, k)  y = Conv (s, w_a)", "float[1,1,1,4] k = {1.0, 2.0, 3.0, 4.0}"),       # a number a column
    ("s = Mul (x, k)  y = Conv (s, w_a)", "float[4] k = {1.0, 2.0, 3.0, 4.0}"),             # the same
    ("s = Div (x, k)  y = Conv (s, w_a)", "float[1,4,1,1] k = {1.0, 0.0, 3.0, 4.0}"),       # division by zero
    ("s = Div (k, x)  y = Conv (s, w_a)", "float k = {2.0}"),                               # 1 / x
    ("s = Mul (x, x)  y = Conv (s, w_a)", "float k = {2.0}"),
    ("s = Mul (x, k)  y = Relu (s)", "float k = {2.0}"),
    ("s = Mul (x, k)  t = Conv (s, w_a)  y = Add (t, s)", "float k = {2.0}"),               # one reader is no conv
    ("s = Mul (x, k)  z = Relu (x)  y = Conv (z, s)", "float k = {2.0}"),                   # it is the weight
    ("y = Mul (x, k)", "float k = {2.0}"),                                                  # it is the output
    ("o = ReduceMean (x, a)  s = Mul (o, k)  y = Conv (s, w_a)",                            # it makes the channels
     "float[1,4,1,1] k = {1.0, 2.0, 3.0, 4.0}, int64[1] a = {1}"),
])
def test_scalings_that_stay(inner: str, constant: str) -> None:
    graph = with_shapes(load(f"""(float[4,4,4,4] x, float[4,4,1,1] w_a) => (float[4,4,h,w] y)
        <{constant}> {{ {inner} }}"""))
    run(graph)
    check_left(graph, None)


def test_scaling_whose_result_is_an_output_too() -> None:
    check_left(load("""(float[1,4,4,4] x, float[4,4,1,1] w_a) => (float[1,4,4,4] y, float[1,4,4,4] s)
        <float k = {2.0}> { s = Mul (x, k)  y = Conv (s, w_a) }"""), None)


def test_rvm_with_its_52_norms(tmp_path: Path) -> None:
    """Random weights and statistics, a third of the gammas negative: none left, alpha moves by less than 1e-4."""
    model = rvm.build(seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                size = module.weight.shape
                sign = 1.0 - 2.0 * (torch.rand(size, generator=generator) < 1 / 3).float()
                module.weight.copy_(sign * (0.5 + torch.rand(size, generator=generator)))
                module.bias.copy_(0.2 * torch.randn(size, generator=generator))
                module.running_mean.copy_(0.1 * torch.randn(size, generator=generator))
                module.running_var.copy_(0.2 + torch.rand(size, generator=generator))
    rvm.export(model, tmp_path / "rvm.onnx", size=(96, 128), keep_bn=True)
    graph = with_shapes(Graph.load(tmp_path / "rvm.onnx"))
    rng = np.random.default_rng(0)
    feeds = {v.name: np.zeros(v.shape, np.float32) for v in graph.inputs}
    feeds["src"] = rng.random((1, 3, 96, 128), dtype=np.float32)
    before = run(graph, feeds)
    assert ops(graph).count("BatchNormalization") == 52
    assert before["pha"].std() > 0.01
    result = fold(graph)
    assert result.report == {"batchnorms": 52, "input_scalings": 1}
    assert result.notes == ()
    assert "BatchNormalization" not in ops(graph)
    for _ in range(2):      # the second frame on the states that the first one left
        after = run(graph, feeds)
        assert np.abs(after["pha"] - before["pha"]).max() < 1e-4
        for name in ("r1", "r2", "r3", "r4"):
            np.testing.assert_allclose(after[f"{name}o"], before[f"{name}o"], atol=1e-4)
            feeds[f"{name}i"] = before[f"{name}o"]
        before = run(Graph.load(tmp_path / "rvm.onnx"), feeds)
