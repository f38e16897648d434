"""Concats in front of convolutions get a multiple of four channels, and no value changes."""

from __future__ import annotations

import numpy as np
from compiling import clips, network, optimized_ops, run_to
from tiny_recurrent import read

from passes.align_channels import AlignChannels
from vmq.pipeline import Context, run_passes
from vmq.runtime import Session
from vmq.spec import Options


def test_a_concat_of_11_becomes_one_of_12_and_nothing_else_changes():
    before, graph = network(), network()
    before.infer_shapes()
    graph.infer_shapes()
    result = run_passes(graph, [AlignChannels()], Context(Options()))[0]
    assert result.modified == 1
    conv = graph.value("joined").outputs[0]
    assert conv.inputs[1].shape == (8, 12, 3, 3)
    assert graph.value("xr").inputs[0].inputs[-1].name == "r"      # 8 channels: as it was
    one, two = Session(before, optimize=False), Session(graph, optimize=False)
    for frame in clips(1, 3)[0].frames():
        a, b = one.step(frame), two.step(frame)
        for name, values in a.items():
            assert np.abs(b[name] - values).max() < 1e-5, name
    assert len(graph.to_bytes()) < len(before.to_bytes()) + 2000    # the zeros are not in the file


def test_the_zeros_are_ready_integers_at_run_time(tmp_path):
    graph = network()
    run_to("lower", graph)
    assert "Expand" not in optimized_ops(graph, tmp_path / "optimized.onnx")


def test_where_another_reader_counts_the_channels_all_stays():
    graph = read("""(float[1,3,8,8] src, float[4,3,1,1] w0, float[4,7,1,1] w1, float[1,7,1,1] w2)
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
