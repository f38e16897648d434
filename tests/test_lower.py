"""Lowering changes containers and not one bit of the result."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from compiling import clips, network, optimized_ops, rerun, run_to
from tiny_recurrent import read

from vmq.errors import ModelError
from vmq.graph import Graph
from vmq.runtime import STATES_KEY, Session


@pytest.mark.parametrize("bits", ["8", "w4a8", "w8a4", "4"])
@pytest.mark.parametrize("container", ["int4cast", "int8", "int4"])
def test_same_bits_out(bits: str, container: str):
    before, after = network(), network()
    run_to("quantize_biases", before, bits)
    run_to("lower", after, bits, container=container)
    one, two = Session(before, optimize=False), Session(Graph.load(after.to_bytes()), optimize=False)
    for frame in clips(1, 4)[0].frames():
        a, b = one.step(frame), two.step(frame)
        for name, values in a.items():
            assert np.array_equal(b[name], values), name


@pytest.mark.parametrize(("container", "stored"), [("int4cast", "int4"), ("int8", "int8"), ("int4", "int4")])
def test_weights_are_stored_as_asked(container: str, stored: str):
    graph = network()
    run_to("lower", graph, "4", container=container)
    assert not any(n.op == "QuantizeLinear" and not n.inputs[0].inputs and n.inputs[0].name not in ("src", "r")
                   for n in graph.nodes)
    kinds = {c.dtype.name for c in graph.constants() if len(c.shape or ()) == 4 and c.shape[0] > 1}
    assert stored in kinds
    assert ("Cast" in {n.op for n in graph.nodes}) == (container == "int4cast")


def test_a_model_without_layers_is_refused():
    with pytest.raises(ModelError, match="nothing in the model can be quantized: it has no Conv, Gemm, MatMul"):
        run_to("lower", read("""(float[1,3,32,48] src) => (float[1,1,32,48] pha) {
            red, pha, blue = Split <axis = 1, num_outputs = 3> (src)
        }"""))


def test_a_4_bit_activation_never_leaves_its_16_levels():
    graph = network()
    run_to("lower", graph, "4")
    clipped = [n.outputs[0].name for n in graph.nodes if n.op == "Clip"]
    assert len(clipped) >= 5
    session = Session(graph, extra=clipped, optimize=False)
    for frame in clips(1, 2)[0].frames():
        outputs = session.step(frame)
        for name in clipped:
            assert outputs[name].dtype == np.uint8
            assert outputs[name].max() <= 15


def test_4_bits_in_the_cast_container_run_in_integers_and_the_textbook_form_does_not(tmp_path):
    counts = {}
    for container in ("int4cast", "int4"):
        graph = network()
        run_to("lower", graph, "4", container=container)
        counts[container] = optimized_ops(graph, tmp_path / f"{container}.onnx").get("QLinearConv", 0)
    assert counts["int4cast"] == 8
    assert counts["int4"] < 8


def clipped_network(low: float, high: float) -> Graph:
    return read(f"""(float[1,3,32,48] src, float[8,3,3,3] w0, float[8,8,3,3] w1, float[1,8,3,3] w2)
                   => (float[1,1,32,48] pha) <float low = {{{low}}}, float high = {{{high}}}> {{
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = Clip (a, low, high)
        c = Conv <pads = [1,1,1,1]> (b, w1)
        d = Clip (c, low, high)
        e = Conv <pads = [1,1,1,1]> (d, w2)
        pha = Sigmoid (e)
    }}""")


@pytest.mark.parametrize("bits", ["8", "w4a8", "4"])
@pytest.mark.parametrize(("low", "high"), [(0.0, 0.5), (0.0, 1e6), (-0.25, 0.5), (0.25, 0.5)])
def test_a_clip_becomes_saturation(bits: str, low: float, high: float, tmp_path: Path):
    """The same bits, and integer convolutions: also with a grid that is wider than the Clip, as learning makes it."""
    for wider in (1.0, 1.5):
        graph = clipped_network(low, high)
        context = run_to("correct_biases", graph, bits)
        for name in ("b", "d"):
            quantizer, = graph.value(name).outputs
            assert quantizer.op == "QuantizeLinear"
            quantizer.inputs[1].values = np.asarray(quantizer.inputs[1].values * np.float32(wider))
        rerun("quantize_biases", graph, context)
        before = graph.copy()
        rerun("lower", graph, context)
        assert not any(n.op == "Clip" and n.outputs[0].dtype == np.float32 for n in graph.nodes)
        one, two = Session(before, optimize=False), Session(graph, optimize=False)
        for frame in clips(1, 2)[0].frames():
            np.testing.assert_array_equal(one.step(frame)["pha"], two.step(frame)["pha"])
        assert optimized_ops(graph, tmp_path / "optimized.onnx")["QLinearConv"] == 2


def test_metadata_say_what_was_done():
    graph = network()
    run_to("lower", graph, "4", keep={"recurrent": 8})
    metadata = Graph.load(graph.to_bytes()).metadata
    assert json.loads(metadata[STATES_KEY]) == {"r": "s"}
    options = json.loads(metadata["vmq.options"])
    assert options["bits"] == "W4A4"
    assert options["keep"] == {"recurrent": 8}
    assert metadata["vmq.minimum_onnxruntime"] == "1.24"
    assert json.loads(metadata["vmq.calibration"])[0]["frames"] == 4
