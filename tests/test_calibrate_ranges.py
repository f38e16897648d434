"""Ranges come from clips run recurrently, and fit what the tensors really take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compiling import SIZE, clips, network, run_to
from tiny_recurrent import read

from passes import calibrate_ranges
from vmq.clips import Clip
from vmq.errors import PassError
from vmq.graph import Graph
from vmq.pipeline import Context
from vmq.quant import FUNCTIONS
from vmq.runtime import Session
from vmq.spec import Options


def quantizer(graph: Graph, name: str) -> Any:
    return next(n for n in graph.value(name).outputs if n.op == "QuantizeLinear")


def number(value: Any) -> float:
    return float(np.asarray(value.values))


def test_video_frames_keep_their_steps():
    """1/255 in 12 bits: every 8-bit value is still a step of its own."""
    graph = network()
    run_to("calibrate_ranges", graph, "4")
    node = graph.value("first").inputs[0].inputs[0].inputs[0]           # what the first layer reads
    scale = number(node.inputs[1])
    assert scale == pytest.approx(1 / 255, rel=2**-12)
    assert number(node.inputs[2]) == 0
    levels = np.arange(256, dtype=np.float32) / np.float32(255)
    assert np.array_equal(np.rint(levels / np.float32(scale)), np.arange(256))


def test_scales_are_short():
    """12 significant bits: steps times scale, their differences and quarters are exact in float32."""
    graph = network()
    run_to("calibrate_ranges", graph)
    scales = np.concatenate([np.ravel(n.inputs[1].values) for n in graph.nodes if n.op == "QuantizeLinear"])
    assert len(np.unique(scales)) > 20
    parts = np.frexp(scales)[0] * 2**12
    assert np.array_equal(parts, np.rint(parts))


def test_one_range_holds_all_that_a_concat_joins():
    """A part of small values and one of large ones share the grid of what is joined."""
    graph = read("""(float[1,3,32,48] src, float[2,3,1,1] w0, float[2,3,1,1] w1, float[1,4,1,1] w2, float[2] w0b,
                     float[2] w1b) => (float[1,1,32,48] pha) {
        a = Conv (src, w0, w0b)
        b = Conv (src, w1, w1b)
        c = Concat <axis = 1> (a, b)
        pha = Conv (c, w2)
    }""")
    for name, value, bias in (("w0", 0.1, -1.0), ("w1", 10.0, 0.0)):
        graph.value(name).values = np.full((2, 3, 1, 1), value, np.float32)
        graph.value(f"{name}b").values = np.full(2, bias, np.float32)
    run_to("calibrate_ranges", graph)
    grids = [quantizer(graph, n).inputs[1:3] for n in ("a", "b", "c")]
    assert all(g[0] is grids[0][0] and g[1] is grids[0][1] for g in grids)
    scale, zero = map(number, grids[0])
    assert -1.3 < -zero * scale < -0.6                     # the whole of a, which b does not reach
    assert 15.0 < (255 - zero) * scale < 32.0


def test_warm_states_are_seen():
    """A state that gathers up over the clip: its range is that of the last frames, not of the first."""
    text = """(float[1,3,32,48] src, float[1,3,32,48] r, float[3,3,1,1] w0, float[1,3,1,1] w1)
              => (float[1,1,32,48] pha, float[1,3,32,48] s) {
        x = Conv (src, w0)
        s = Add (x, r)
        pha = Conv (s, w1)
    }"""
    light = Clip("light", 25.0, SIZE, 8, lambda start, stop: (np.full((3, *SIZE), 255, np.uint8)
                                                              for _ in range(8)[start:stop]))
    graph = read(text)
    graph.value("w0").values = np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)
    run_to("calibrate_ranges", graph, footage=[light])
    state = quantizer(graph, "s_before")
    assert number(state.inputs[1]) * 255 == pytest.approx(8.0, rel=0.02)
    assert quantizer(graph, "r").inputs[1] is state.inputs[1]      # though what comes in goes to 7 only


def test_every_tensor_is_represented_well():
    """On the calibration frames, 8-bit rounding alone stays under a hundredth of each tensor's energy."""
    graph = network()
    context = run_to("calibrate_ranges", graph)
    assert context.reference is not None
    ends = {n.outputs[0].outputs[0].outputs[0].name: n.inputs[0].name for n in graph.nodes if n.op == "QuantizeLinear"
            and n.inputs[0].inputs and n.inputs[0].name not in context.found["insert_qdq"]
            and n.inputs[0].inputs[0].op != "Split"
            and not {r.op for r in n.outputs[0].outputs[0].outputs[0].outputs} & set(FUNCTIONS)}
    exact, ours = Session(context.reference, extra=list(ends.values())), Session(graph, extra=list(ends))
    frame = next(clips()[0].frames())
    a, b = exact.step(frame), ours.step(frame)
    assert len(ends) >= 15
    for dequantized, source in ends.items():
        x = a[source].astype(np.float64)
        assert ((x - b[dequantized]) ** 2).sum() < 0.01 * (x ** 2).sum() + 1e-9, source


def test_a_range_is_searched_through_the_function_that_reads_it():
    """What a hardswish makes 0 needs no levels: 8 bits end shortly below -3 although the layer goes to -30."""
    graph = network()
    graph.value("w0b").values = np.linspace(-30, 10, 8).astype(np.float32)
    run_to("calibrate_ranges", graph)
    node = quantizer(graph, "first")
    assert -4.0 < -number(node.inputs[2]) * number(node.inputs[1]) < -2.5


def test_the_same_seed_gives_the_same_ranges_and_frames_count():
    graphs = [network(), network()]
    for graph in graphs:
        context = run_to("calibrate_ranges", graph)
    assert graphs[0].to_bytes() == graphs[1].to_bytes()
    assert sum(len(c) for c in context.clips) == 8


@pytest.mark.parametrize(("frames", "samples", "kept"), [
    (7, 512, 7 * 73), (8, 512, 8 * 64), (8, 100, 8 * 64), (9, 512, 5 * 64), (30, 512, 8 * 64), (30, 4096, 30 * 136)])
def test_the_number_of_samples_is_bounded(frames: int, samples: int, kept: int, monkeypatch: pytest.MonkeyPatch):
    """Of long footage every k-th frame's are kept, and the extremes of all."""
    def light(start: int, stop: int | None) -> Any:
        for number in range(frames)[start:stop]:
            yield np.full((3, *SIZE), 255 if number == 1 else 100, np.uint8)

    monkeypatch.setattr(calibrate_ranges, "FRAMES", 8)
    context = Context(Options(), [Clip("light", 25.0, SIZE, frames, light)])
    seen = calibrate_ranges._observe(network(), ["src"], context, samples)["src"]
    assert seen.samples.size == kept
    assert seen.high == 1.0
    assert kept <= max(samples, 8 * 64)


def test_a_bias_too_large_for_its_steps_widens_the_weight_scale():
    graph = network()
    graph.value("w5b").values = np.full(8, 1e7, np.float32)
    graph.value("w5").values = (graph.value("w5").values * 1e-4).astype(np.float32)
    run_to("quantize_biases", graph)
    conv = next(n for n in graph.nodes if n.op == "Conv" and n.outputs[0].name == "mixed")
    steps = np.asarray(conv.inputs[2].inputs[0].inputs[0].values, np.int64)
    assert (np.abs(steps) <= 2**30).all()
    assert np.allclose(steps * np.asarray(conv.inputs[2].inputs[0].inputs[1].values, np.float64), 1e7, rtol=1e-6)


def test_nan_in_the_float_network_is_named():
    graph = network()
    graph.value("w5").values = np.full((8, 11, 3, 3), 3e38, np.float32)
    with pytest.raises(PassError, match=r"calibrate_ranges failed.*becomes NaN or infinite in frame 0.*float already"):
        run_to("calibrate_ranges", graph)


def test_no_frames_is_an_error():
    with pytest.raises(PassError, match="there are no calibration frames"):
        run_to("calibrate_ranges", network(), footage=[])


def test_progress_reaches_the_end():
    from passes import PIPELINE
    from vmq.pipeline import run_passes
    seen: list[tuple[str, float]] = []
    context = Context(Options(), clips(1, 2), progress=lambda what, share: seen.append((what, share)))
    last = [p.name for p in PIPELINE].index("calibrate_ranges")
    run_passes(network(), PIPELINE[:last + 1], context)
    assert ("running the calibration clips", 1.0) in seen
    assert ("searching ranges", 1.0) in seen


def test_no_sum_lies_between_two_steps():
    """Of two 8-bit tensors that are added, every pair: 1/2^13 of a step from a half, far more than sums round."""
    graph = read("""(float[1,3,32,48] src, float[4,3,1,1] w0, float[4,3,1,1] w1, float[4,4,1,1] w2, float[4,4,1,1] w3,
                     float[1,4,1,1] w4) => (float[1,1,32,48] pha) {
        a = Conv (src, w0)
        b = Conv (src, w1)
        c = Add (a, b)
        d = Conv (c, w2)
        e = Relu (c)
        f = Sub (d, c)
        g = Conv (e, w3)
        h = Add (f, g)
        i = Relu (h)
        pha = Conv (i, w4)
    }""")
    rng = np.random.default_rng(0)
    for name, spread in (("w0", 0.3), ("w1", 2.0), ("w2", 0.7), ("w3", 0.1), ("w4", 1.0)):
        value = graph.value(name)
        value.values = rng.normal(0, spread, value.shape).astype(np.float32)
    run_to("calibrate_ranges", graph)
    steps = np.arange(-255, 256)
    sums = [n for n in graph.nodes if n.op in ("Add", "Sub")]
    assert len(sums) == 3
    for node in sums:
        y = node.outputs[0]
        y = y.outputs[0].outputs[0] if y.outputs[0].op == "Relu" else y
        first, second, out = (number(n.inputs[1]) for n in (*(v.inputs[0] for v in node.inputs), y.outputs[0]))
        assert len({first, second, out}) == 3
        exact = np.add.outer(steps * first, steps * second) / out
        assert np.abs(np.abs(exact) % 1.0 - 0.5).min() > 0.9 * 2**-13


def test_a_small_part_of_a_sum_keeps_its_scale():
    """What is a thousandth of the sum would be one or two units of it."""
    graph = read("""(float[1,3,32,48] src, float[4,3,1,1] w0, float[4,3,1,1] w1, float[1,4,1,1] w2)
                    => (float[1,1,32,48] pha) {
        a = Conv (src, w0)
        b = Conv (src, w1)
        c = Add (a, b)
        d = Conv (b, w2)
        e = Conv (c, w2)
        pha = Add (d, e)
    }""")
    for name, value in (("w0", 100.0), ("w1", 0.001), ("w2", 1.0)):
        graph.value(name).values = np.full(graph.value(name).shape, value, np.float32)
    run_to("calibrate_ranges", graph)
    (small,) = {number(n.inputs[1]) for n in graph.nodes if n.op == "QuantizeLinear" and n.inputs[0].name == "b"}
    run = Session(graph, optimize=False, extra=["b"])
    frames = next(iter(clips())).frames(0, 4)
    top = max(float(run.step(f)["b"].max()) for f in frames)
    assert small == pytest.approx(top / 255, rel=0.2)
