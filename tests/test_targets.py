"""The table of targets is consistent, and placement and lowering follow its rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compiling import clips, network, run_to

from passes.lower import MINIMUM_RUNTIME
from vmq.errors import OptionError
from vmq.graph import Constant, Graph
from vmq.runtime import Session
from vmq.spec import Options
from vmq.targets import TARGETS


def is_float(value: Any) -> bool:
    return not isinstance(value, Constant) and (value.dtype is None or value.dtype == np.float32)


def test_targets_name_each_operator_once():
    for name, target in TARGETS.items():
        assert target.name == name
        groups = [set(target.compute), target.carriers, target.movers, target.absorbed]
        assert sum(map(len, groups)) == len(set().union(*groups))
    with pytest.raises(TypeError):
        TARGETS["mine"] = TARGETS["cpu"]  # type: ignore[index]


def test_rows_hold_known_words():
    for target in TARGETS.values():
        assert set(target.containers) <= set(MINIMUM_RUNTIME)
        assert target.saturates in ("uint8", "float")
        assert target.wide in (None, 16)
        assert Options(target=target).container == target.containers[0]
    with pytest.raises(OptionError, match="--container int4 is not known for --target openvino; give one of int4cast"):
        Options(target=TARGETS["openvino"], container="int4")


@pytest.mark.parametrize("name", ["qnn", "openvino"])
@pytest.mark.parametrize("bits", ["8", "w4a8", "4"])
def test_same_bits_out(name: str, bits: str):
    before, after = network(), network()
    run_to("quantize_biases", before, bits, target=TARGETS[name])
    run_to("lower", after, bits, target=TARGETS[name])
    assert after.signature() == network().signature()
    one, two = Session(before, optimize=False), Session(Graph.load(after.to_bytes()), optimize=False)
    for frame in clips(1, 3)[0].frames():
        a, b = one.step(frame), two.step(frame)
        for output, values in a.items():
            assert np.array_equal(b[output], values), output


@pytest.mark.parametrize("bits", ["8", "w4a8", "4"])
def test_nothing_stays_float_on_an_npu(bits: str):
    """Every float value but inputs comes out of a DequantizeLinear or goes into a QuantizeLinear alone (or a Relu)."""
    graph = network()
    run_to("lower", graph, bits, target=TARGETS["qnn"])
    for node in graph.nodes:
        for value in node.outputs:
            if is_float(value) and node.op not in {"DequantizeLinear", "Expand"}:
                assert {r.op for r in value.outputs} in ({"QuantizeLinear"}, {"Relu"}), (node.op, value.name)
                assert not any(o is value for o in graph.outputs), value.name
    assert {v.inputs[0].op for v in graph.outputs} == {"DequantizeLinear"}


def test_16_bits_follow_the_last_layer_and_its_operand():
    graph = network()
    run_to("insert_qdq", graph, target=TARGETS["qnn"])
    for output, dtype in (("pha", np.uint16), ("fgr", np.uint16), ("s", np.uint8)):
        value = next(o for o in graph.outputs if o.name == output)
        assert value.inputs[0].inputs[2].dtype == dtype, output
    heads = [n for n in graph.nodes if n.op == "Conv" and n.inputs[0].inputs[0].inputs[2].dtype == np.uint16]
    assert [n.inputs[1].inputs[0].inputs[2].dtype for n in heads] == [np.int8]       # one layer, weights of 8 bits
    for node in (n for n in graph.nodes if n.op == "Conv"):      # no layer reads one width and writes another
        result = node.outputs[0]
        while result.outputs[0].op != "QuantizeLinear":
            result = result.outputs[0].outputs[0]
        widths = {node.inputs[0].inputs[0].inputs[2].dtype, result.outputs[0].inputs[2].dtype}
        assert len(widths) == 1, node.name


def test_4_bits_saturate_in_float_where_integers_cannot_be_clipped():
    graph = network()
    run_to("lower", graph, "4", target=TARGETS["qnn"])
    clips_ = [n for n in graph.nodes if n.op == "Clip"]
    assert len(clips_) >= 5
    assert all(is_float(n.inputs[0]) and n.inputs[0].inputs[0].op == "DequantizeLinear" for n in clips_)
    levels = [n.outputs[0].outputs[0].outputs[0].name for n in clips_]
    session = Session(graph, extra=levels, optimize=False)
    for frame in clips(1, 2)[0].frames():
        outputs = session.step(frame)
        for name in levels:
            assert outputs[name].dtype == np.uint8
            assert outputs[name].max() <= 15


def test_an_absorbed_function_leaves_no_quantizer_behind_the_layer():
    graph = network()
    run_to("insert_qdq", graph, target=TARGETS["openvino"])
    swish = next(n for n in graph.nodes if n.op == "HardSwish")
    assert swish.inputs[0].inputs[0].op == "Conv"
    assert [r.op for r in swish.outputs[0].outputs] == ["QuantizeLinear"]
