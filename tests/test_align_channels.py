"""Concats in front of convolutions get a multiple of four channels, and no value changes."""

from __future__ import annotations

import numpy as np
import pytest
from compiling import clips, network, optimized_ops, run_to
from onnx_text import run
from tiny_recurrent import read

from passes.align_channels import AlignChannels
from vmq.graph import Graph
from vmq.pipeline import Context, run_passes
from vmq.runtime import Session
from vmq.spec import Options


def test_a_concat_of_11_becomes_one_of_12_and_nothing_else_changes():
    before, graph = network(), network()
    before.infer_shapes()
    graph.infer_shapes()
    result = run_passes(graph, [AlignChannels()], Context(Options()))[0]
    assert result.report == {"concats": 2, "depthwise": 0}          # the picture is one of them
    conv = graph.value("joined").outputs[0]
    assert conv.inputs[1].shape == (8, 12, 3, 3)
    assert graph.value("xr").inputs[0].inputs[-1].name == "r"      # 8 channels: as it was
    one, two = Session(before, optimize=False), Session(graph, optimize=False)
    for frame in clips(1, 3)[0].frames():
        a, b = one.step(frame), two.step(frame)
        for name, values in a.items():
            assert np.abs(b[name] - values).max() < 1e-5, name
    assert len(graph.to_bytes()) < len(before.to_bytes()) + 2000    # the zeros are not in the file


def test_a_picture_of_three_channels_becomes_one_of_four():
    """In front of convolutions alone: what else reads the picture reads it as it was."""
    graph = network()
    graph.infer_shapes()
    run_passes(graph, [AlignChannels()], Context(Options()))
    first = graph.value("first").inputs[0]
    assert first.inputs[0].shape == [1, 4, 32, 48]
    assert first.inputs[0].inputs[0].op == "Concat"
    assert first.inputs[1].shape[1] == 4
    assert not np.asarray(first.inputs[1].values)[:, 3].any()
    assert list(graph.value("src").shape) == [1, 3, 32, 48]
    assert {r.op for r in graph.value("src").outputs} == {"Concat", "Add"}


RESIDUAL = """(float[1,4,12,16] x, float[24,4,1,1] w0, float[24] w0b, float[24,1,5,5] w1, float[24] w1b,
               float[6,24,1,1] w2, float[6] w2b, float[24,6,1,1] w3, float[24] w3b, float[8,24,1,1] w4, float[8] w4b,
               float[40,8,1,1] w5, float[40] w5b, float[40,1,3,3] w6, float[8,40,1,1] w7, float[8] w7b)
           => (float[1,8,6,8] y) {
    a = Conv (x, w0, w0b)
    b = HardSwish (a)
    c = Conv <group = 24, pads = [2,2,2,2], strides = [2,2]> (b, w1, w1b)
    d = HardSwish (c)
    pool = GlobalAveragePool (d)
    e = Conv (pool, w2, w2b)
    f = Relu (e)
    g = Conv (f, w3, w3b)
    gate = HardSigmoid <alpha = 0.16666667> (g)
    h = Mul (d, gate)
    i = Conv (h, w4, w4b)
    j = Conv (i, w5, w5b)
    k = Relu (j)
    l = Conv <group = 40, pads = [1,1,1,1]> (k, w6)
    m = Relu (l)
    n = Conv (m, w7, w7b)
    y = Add (i, n)
}"""


def aligned(text: str) -> tuple[Graph, Graph, int]:
    """A graph before and after, with shapes, and how many depthwise convolutions were widened."""
    before, after = read(text), read(text)
    for graph in (before, after):
        graph.infer_shapes()
    result = run_passes(after, [AlignChannels()], Context(Options()))[0]
    return before, after, result.report["depthwise"]


def test_depthwise_convolutions_get_a_multiple_of_16():
    before, after, widened = aligned(RESIDUAL)
    assert widened == 2
    depthwise = [n for n in after.nodes if n.op == "Conv" and n.attrs.get("group", 1) > 1]
    assert [n.attrs["group"] for n in depthwise] == [32, 48]
    assert [n.inputs[1].shape for n in depthwise] == [(32, 1, 5, 5), (48, 1, 3, 3)]
    assert after.value("gate").shape[1] == after.value("h").shape[1] == 32
    assert after.value("i").shape[1] == 8                             # what is between the blocks stays
    one, other = (run(g)["y"] for g in (before, after))
    assert np.abs(one - other).max() <= 1e-6 * np.abs(one).max()
    stale = {v.name: list(v.shape) for v in after.values() if v.shape is not None and v.inputs}
    after.infer_shapes()
    assert {v.name: list(v.shape) for v in after.values() if v.name in stale} == stale      # shapes were kept right


def test_two_depthwise_convolutions_in_a_row_are_widened_together():
    text = """(float[1,4,8,8] x, float[24,4,1,1] w0, float[24,1,3,3] w1, float[24,1,3,3] w2, float[8,24,1,1] w3)
              => (float[1,8,8,8] y) {
        a = Conv (x, w0)
        b = Conv <group = 24, pads = [1,1,1,1]> (a, w1)
        c = LeakyRelu (b)
        d = Conv <group = 24, pads = [1,1,1,1]> (c, w2)
        e = Add (d, a)
        y = Conv (e, w3)
    }"""
    before, after, widened = aligned(text)
    assert widened == 1
    assert [n.attrs["group"] for n in after.nodes if n.op == "Conv" and n.attrs.get("group", 1) > 1] == [32, 32]
    one, other = (run(g)["y"] for g in (before, after))
    assert np.abs(one - other).max() <= 1e-6 * np.abs(one).max()


@pytest.mark.parametrize(("old", "new"), [
    ("(float[1,8,6,8] y)", "(float[1,8,6,8] y, float[1,24,6,8] h)"),             # a value is the model's output
    ("d = HardSwish (c)", "d = Softmax <axis = 1> (c)"),                         # an operator that mixes channels
    ("h = Mul (d, gate)", "t = Mul (d, gate) h = DepthToSpace <blocksize = 1> (t)"),    # one that is not known
], ids=["output", "softmax", "unknown"])
def test_where_channels_are_shared_with_what_cannot_widen_all_stays(old: str, new: str):
    assert old in RESIDUAL
    before, after, widened = aligned(RESIDUAL.replace(old, new))
    assert widened == 1                                                 # the other block is widened
    assert [n.attrs["group"] for n in after.nodes if n.op == "Conv" and n.attrs.get("group", 1) > 1] == [24, 48]
    for name, values in run(before).items():
        assert np.abs(run(after)[name] - values).max() <= 1e-6 * max(1.0, np.abs(values).max())


def test_a_state_that_a_depthwise_convolution_reads_stays():
    """The model's own channels are its users'."""
    _, after, widened = aligned("""(float[1,24,8,8] x, float[24,1,3,3] w0, float[8,24,1,1] w1) => (float[1,8,8,8] y) {
        a = Conv <group = 24, pads = [1,1,1,1]> (x, w0)
        y = Conv (a, w1)
    }""")
    assert widened == 0
    assert after.nodes[0].attrs["group"] == 24


def test_the_zeros_are_ready_integers_at_run_time(tmp_path):
    graph = network()
    run_to("lower", graph)
    assert "Expand" not in optimized_ops(graph, tmp_path / "optimized.onnx")


def test_where_another_reader_counts_the_channels_all_stays():
    graph = read("""(float[1,4,8,8] src, float[3,4,1,1] w0, float[3,7,1,1] w1, float[1,7,1,1] w2)
                    => (float[1,1,8,8] pha, float[1,7,8,8] both) {
        a = Conv (src, w0)
        both = Concat <axis = 1> (a, src)
        b = Conv (both, w1)
        c = Concat <axis = 1> (b, src)
        d = Relu (c)
        pha = Conv (d, w2)
    }""")
    graph.infer_shapes()
    before = graph.to_bytes()
    assert run_passes(graph, [AlignChannels()], Context(Options()))[0].modified == 0
    assert graph.to_bytes() == before
