"""Balancing changes no value, and makes 4-bit activations fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiling import clips, network, rerun, run_to
from tiny_recurrent import read

from vmq.graph import Graph
from vmq.quant import dequantize, quantize
from vmq.recipe import Recipe
from vmq.runtime import Session
from vmq.shadow import Shadow
from vmq.spec import QuantSpec

BALANCED = Recipe("balanced", balance=True)

# A pointwise conv with channels of very different size, a Relu, a depthwise conv, a Relu, a pointwise conv.
INVERTED = """(float[1,3,32,48] src, float[8,3,1,1] w0, float[8] w0b, float[16,1,3,3] w1, float[1,16,1,1] w2)
              => (float[1,1,32,48] pha) {
    a = Conv (src, w0, w0b)
    b = Relu (a)
    c = Conv <group = 8, pads = [1,1,1,1]> (b, w1)
    d = Relu (c)
    pha = Conv (d, w2)
}"""


def uneven(graph: Graph, name: str, factor: float = 4.0) -> None:
    """Make the channels that a constant computes very different in size."""
    constant = graph.value(name)
    scales = np.geomspace(1.0 / factor, factor, constant.values.shape[0])
    constant.values = (constant.values * scales.reshape([-1] + [1] * (constant.values.ndim - 1))).astype(np.float32)


def outputs(graph: Graph) -> list[np.ndarray]:
    session = Session(graph, optimize=False)
    return [values for frame in clips()[0].frames() for values in session.step(frame).values()]


def exact_outputs(graph: Graph) -> list[np.ndarray]:
    """In double precision, frame after frame."""
    graph = graph.copy()
    graph.infer_shapes()
    shadow, names = Shadow(graph).double(), tuple(v.name for v in graph.outputs)
    state = {v.name: torch.zeros(v.shape, dtype=torch.float64) for v in graph.inputs if v.name != "src"}
    found = []
    for frame in clips()[0].frames():
        made = shadow.run({"src": torch.from_numpy(frame[None] / 255.0), **state}, names)
        state = dict.fromkeys(state, made.get("s"))
        found += [v.detach().numpy() for v in made.values()]
    return found


def reach(graph: Graph, name: str) -> np.ndarray:
    """Largest value of each channel over the frames."""
    session = Session(graph, extra=[name])
    return np.max([session.step(f)[name].max((0, 2, 3)) for f in clips()[0].frames()], axis=0)


@pytest.mark.parametrize("text", ["inverted", "network"])
def test_no_value_changes(text: str) -> None:
    graph = network() if text == "network" else read(INVERTED)
    if text == "network":
        uneven(graph, "w0", 30.0)
    before = graph.copy()
    run_to("balance_channels", graph, "4", recipe=BALANCED)
    assert graph.to_bytes() != before.to_bytes()
    for ours, theirs in zip(exact_outputs(graph), exact_outputs(before), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_channels_in_front_of_a_depthwise_convolution_become_alike() -> None:
    graph = read(INVERTED)
    uneven(graph, "w0")
    graph.value("w0b").values = np.abs(graph.value("w0b").values)
    before = reach(graph, "b")
    run_to("balance_channels", graph, "4", recipe=BALANCED)
    after = reach(graph, "b")
    assert before.max() / before.min() > 5.0
    assert after.max() / after.min() < 1.3
    assert [n.op for n in graph.nodes if n.op not in ("Expand", "Concat")] == ["Conv", "Relu", "Conv", "Relu", "Conv"]


def test_where_it_goes() -> None:
    graph = network()
    uneven(graph, "w0", 30.0)
    context = run_to("equalize", graph, "4", recipe=BALANCED)
    report = rerun("balance_channels", graph, context).report
    # What the first conv makes, through its hardswish and the residual; what the depthwise one makes, through pooling
    # and gate; the layer behind the pooling; what is joined with the frame; and with the state. The gated product,
    # which two layers want otherwise, once more in its gate; the gated state, which a Concat reads, by a Mul.
    assert report == {"folded": 5, "gated": 1, "inserted": 1}
    assert [n.op for n in graph.nodes].count("HardSigmoid") == 2
    for node in graph.nodes:
        if node.op == "Mul" and any("balance" in v.name and not v.inputs for v in node.inputs):
            factors = np.asarray(node.inputs[1].values)
            spec = QuantSpec(8, signed=False)
            scale = np.float32(factors.max() / 255.0)
            np.testing.assert_allclose(dequantize(quantize(factors, scale, 0, spec), scale, 0), factors, rtol=1e-6)


def test_no_operator_more_at_8_bits() -> None:
    for bits in ("8", "w4a8"):
        graph = network()
        uneven(graph, "w0", 30.0)
        before = exact_outputs(graph)
        report = rerun("balance_channels", graph, run_to("equalize", graph, bits, recipe=BALANCED)).report
        assert report == {"folded": 5, "gated": 0, "inserted": 0}
        for ours, theirs in zip(exact_outputs(graph), before, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6 * np.abs(theirs).max())


def test_nothing_unasked() -> None:
    graph = network()
    context = run_to("equalize", graph, "4", recipe=Recipe("plain"))
    before = graph.to_bytes()
    assert rerun("balance_channels", graph, context).modified == 0
    assert graph.to_bytes() == before


def test_four_bits_lose_less() -> None:
    """Over several networks: one rounding more or less decides much in one."""
    errors = []
    for recipe in (Recipe("plain"), BALANCED):
        for factor in (8.0, 12.0, 16.0, 24.0, 32.0):
            graph = read(INVERTED)
            uneven(graph, "w0", factor)
            uneven(graph, "w1", 1.0 / factor)              # what is small in b counts as much in c
            float_alpha = [o.copy() for o in outputs(graph)]
            run_to("correct_biases", graph, "4", recipe=recipe)
            errors.append(np.mean([np.abs(a - b).mean() for a, b in zip(outputs(graph), float_alpha, strict=True)]))
    assert np.mean(errors[5:]) < 0.3 * np.mean(errors[:5])


def test_shared_weights_stay() -> None:
    graph = read(INVERTED.replace("pha = Conv (d, w2)", "e = Conv (src, w0, w0b)\n    f = Concat <axis = 1> (d, e)\n"
                                  "    pha = Conv (f, w3)").replace("float[1,16,1,1] w2", "float[1,24,1,1] w3"))
    uneven(graph, "w0")
    before = graph.value("w0").values.copy()
    want = outputs(graph)
    run_to("balance_channels", graph, "4", recipe=BALANCED)
    np.testing.assert_array_equal(graph.value("w0_aligned").values[:, :3], before)
    for ours, theirs in zip(outputs(graph), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())


def test_a_hardswish_apart_costs_no_operator_more() -> None:
    """Its gate takes the factors in: as many integer kernels as without."""
    counts = []
    for recipe in (Recipe("plain"), BALANCED):
        graph = network()
        uneven(graph, "w0", 30.0)
        run_to("lower", graph, "4", recipe=recipe)
        ops = [n.op for n in graph.nodes]
        assert "HardSigmoid" not in ops
        counts.append(ops.count("Mul"))
    assert counts[1] == counts[0] + 2                      # the gated and the inserted one of test_where_it_goes


def test_what_a_hardswish_makes_0_gets_no_levels() -> None:
    """Below -3 times a channel's factor; the channels' factors differ."""
    graph = network()
    uneven(graph, "w0", 30.0)
    context = run_to("calibrate_ranges", graph, "4", recipe=BALANCED)
    assert context.reference is not None
    node = next(n for n in graph.nodes if n.op == "QuantizeLinear" and n.inputs[0].name == "first")
    unscaled = next(n for n in context.reference.nodes if n.outputs[0].name == "first_unscaled")
    step, zero = float(node.inputs[1].values), int(node.inputs[2].values)
    ends = -3.0 / np.asarray(unscaled.inputs[1].values).ravel()
    session = Session(context.reference, extra=["first"])
    lows = np.min([session.step(f)["first"].min((0, 2, 3)) for clip in clips() for f in clip.frames()], axis=0)
    assert (lows < ends - 5 * step).any()                  # some go further down
    assert -zero * step >= np.maximum(ends, lows).min() - step
