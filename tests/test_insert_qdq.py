"""Where Q/DQ pairs go, and that ONNX Runtime makes integer kernels of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compiling import clips, network, optimized_ops, run_to
from tiny_matting import save_pictures
from tiny_recurrent import read

import vmq
from passes.find_closures import Closures
from passes.insert_qdq import InsertQdq
from vmq.errors import OptionError
from vmq.graph import Graph
from vmq.pipeline import Context, PassResult, run_passes
from vmq.runtime import Session
from vmq.spec import Bits, Options
from vmq.targets import TARGETS


def quantizers(graph: Graph, name: str) -> list[str]:
    """Element types of the chain of quantizers behind the value `name`."""
    found, value = [], graph.value(name)
    while True:
        behind = [n for n in value.outputs if n.op == "QuantizeLinear"]
        if not behind:
            return found
        assert len(behind) == 1
        found.append(behind[0].inputs[2].dtype.name)
        value = behind[0].outputs[0].outputs[0].outputs[0]


def test_at_8_bits_every_edge_of_an_integer_kernel_has_one_quantizer():
    graph = network()
    run_to("insert_qdq", graph)
    for name in ("r", "first", "a", "b", "pool", "f2", "f3", "gate", "c", "point", "d", "joined", "e", "xr", "g",
                 "gates", "kept", "xk", "n", "new", "delta", "move", "both"):
        assert quantizers(graph, name) == ["uint8"], name
    for name in ("deep", "f1", "mixed", "head", "residual", "alpha", "shifted"):
        assert quantizers(graph, name) == [], name       # before a Relu, behind the last layer


def test_at_4_bits_layers_read_4_and_carriers_read_8():
    graph = network()
    run_to("insert_qdq", graph, "4")
    first = graph.value("first").inputs[0]                 # the first layer stays at 8 bits
    assert first.inputs[0].inputs[0].inputs[2].dtype.name == "uint8"
    assert quantizers(graph, "both") == ["uint8"]          # and the last
    assert quantizers(graph, "a") == ["uint8", "uint4"]    # read by a layer and by the residual Add
    for name in ("pool", "f2", "c", "joined", "xr", "xk"):
        assert quantizers(graph, name) == ["uint4"], name  # read by a layer alone
    for name in ("d", "kept"):
        assert quantizers(graph, name) == ["uint4"], name  # read by a Concat alone, and what it joins by such a layer
    for name in ("f3", "gate", "n", "new", "gates", "delta", "move"):
        assert quantizers(graph, name) == ["uint8"], name  # read by carriers alone
    widths = {n.inputs[1].inputs[0].inputs[2].dtype.name for n in graph.nodes if n.op == "Conv"}
    assert widths == {"int4", "int8"}


def test_what_a_mover_hands_on_is_not_rounded_twice():
    graph = network()
    run_to("insert_qdq", graph)
    split = next(n for n in graph.nodes if n.op == "Split" and n.outputs[0].name == "left")
    before = split.inputs[0].inputs[0]
    for result in split.outputs:
        behind = next(n for n in result.outputs if n.op == "QuantizeLinear")
        assert behind.inputs[1] is before.inputs[1]
        assert behind.inputs[2] is before.inputs[2]


def grid_behind(value: Any) -> tuple[Any, Any]:
    """Scale and zero point of the one quantizer behind a value."""
    write, = [n for n in value.outputs if n.op == "QuantizeLinear"]
    return write.inputs[1], write.inputs[2]


def test_what_only_a_concat_reads_has_its_grid():
    """Then the Concat moves integers: nothing is rounded a second time."""
    graph = network()
    run_to("insert_qdq", graph)
    for part, joined in (("d", "joined"), ("kept", "xk")):
        theirs, ours = grid_behind(graph.value(joined)), grid_behind(graph.value(part))
        assert ours[0] is theirs[0], part
        assert ours[1] is theirs[1], part


def test_a_float_value_is_rounded_to_the_grid_of_each_concat_that_reads_it():
    """The frame: to the Concat's grid for the Concat, and for what reads it in float not at all."""
    graph = network()
    run_to("insert_qdq", graph)
    src = graph.value("src")
    assert {r.op for r in src.outputs} == {"QuantizeLinear", "Add"}       # fgr = src + residual, in float
    writes = {r.outputs[0].outputs[0].outputs[0].outputs[0].outputs[0].name: r for r in src.outputs
              if r.op == "QuantizeLinear"}
    assert len(writes) == 2
    assert writes["joined"].inputs[1] is grid_behind(graph.value("joined"))[0]
    other = next(w for n, w in writes.items() if n != "joined")
    assert other.inputs[1] is not writes["joined"].inputs[1]


POOLED = """(float[1,4,16,16] src, float[1,4,8,8] r, float[4,4,3,3] w0, float[4,4,1,1] w1, float[1,4,1,1] w2)
            => (float[1,1,4,4] pha) {
    half = AveragePool <kernel_shape = [2,2], strides = [2,2]> (src)
    quarter = AveragePool <kernel_shape = [2,2], strides = [2,2]> (half)
    a = Conv <pads = [1,1,1,1]> (half, w0)
    b = Relu (a)
    c = AveragePool <kernel_shape = [2,2], strides = [2,2]> (b)
    d = Conv (quarter, w1)
    e = Add (c, d)
    pha = Conv (e, w2)
}"""


def test_pools_of_the_models_input_stay_float():
    """A picture is pooled in float and quantized where a layer reads it; between layers pooling works on integers."""
    graph = read(POOLED.replace("float[1,4,8,8] r, ", ""))
    placed(graph)
    assert quantizers(graph, "src") == []
    assert [r.op for r in graph.value("half").outputs] == ["AveragePool", "QuantizeLinear"]
    assert quantizers(graph, "quarter") == ["uint8"]
    assert quantizers(graph, "b") == ["uint8"]
    assert graph.value("c").inputs[0].inputs[0].inputs[0].op == "DequantizeLinear"


def test_a_state_output_keeps_its_name_behind_its_quantizer():
    graph = network()
    signature = graph.signature()
    context = run_to("insert_qdq", graph)
    assert graph.signature() == signature
    state = next(v for v in graph.outputs if v.name == "s")
    assert state.inputs[0].op == "DequantizeLinear"
    assert context.found["insert_qdq"] == {"s_before": "s"}
    for name in ("pha", "fgr"):
        assert next(v for v in graph.outputs if v.name == name).inputs[0].op == "Sigmoid"


def test_every_layer_but_the_last_becomes_an_integer_convolution(tmp_path):
    for bits in ("8", "w4a8", "4"):
        graph = network()
        run_to("lower", graph, bits)
        ops = optimized_ops(graph, tmp_path / f"{bits}.onnx")
        assert ops["QLinearConv"] == 8, ops
        assert ops.get("Conv", 0) + ops.get("FusedConv", 0) == 1, ops
        assert "Relu" not in ops


def test_layers_that_stay_wider_are_named_and_can_be_chosen():
    graph = network()
    context = run_to("insert_qdq", graph, "4", keep={"recurrent": 8, "first": 4})
    placed = {n.name: n.inputs[1].inputs[0].inputs[2].dtype.name for n in graph.nodes if n.op == "Conv"}
    gates = [n for s in context.found["find_closures"].states for n in s.nodes if n in placed]
    assert {placed[n] for n in gates} == {"int8"}
    first = next(n for n in graph.nodes if n.op == "Conv" and n.outputs[0].name == "first")
    assert placed[first.name] == "int4"
    with pytest.raises(OptionError, match=r"--keep nonsense: no such layer"):
        run_to("insert_qdq", network(), keep={"nonsense": 8})


def placed(graph: Graph) -> PassResult:
    """Place quantizers in a network without states, and run nothing before."""
    context = Context(Options(bits=Bits(8, 8)), found={"find_closures": Closures((), ())})
    graph.infer_shapes()
    return run_passes(graph, [InsertQdq()], context)[0]


def test_a_variance_stays_float():
    graph = read("""(float[1,4,8,8] x, float[4,4,3,3] w0, float[4,1,3,3] w1, float[4,4,1,1] w2, float[1,4,1,1] w3)
                    => (float[1,1,8,8] pha) {
        y = Conv <pads = [1,1,1,1]> (x, w0)
        square = Mul (y, y)
        mean_of_square = Conv <pads = [1,1,1,1], group = 4> (square, w1)
        mean = Conv <pads = [1,1,1,1], group = 4> (y, w1)
        square_of_mean = Mul (mean, mean)
        variance = Sub (mean_of_square, square_of_mean)
        z = Conv (variance, w2)
        q = Relu (z)
        pha = Conv (q, w3)
    }""")
    graph.value("w1").values = np.full((4, 1, 3, 3), 1 / 9, np.float32)
    result = placed(graph)
    for name in ("y", "square", "mean", "mean_of_square", "square_of_mean"):
        assert quantizers(graph, name) == [], name
    assert quantizers(graph, "variance") == ["uint8"]
    assert sum("stays float" in n for n in result.notes) == 2


@pytest.mark.parametrize("divided", [
    "deviation = Sqrt (more) norm = Div (off, deviation)",
    "deviation = Sqrt (more) inverse = Reciprocal (deviation) norm = Mul (off, inverse)",
    "inverse = Pow (more, half) norm = Mul (off, inverse)"])
def test_what_is_divided_by_stays_float(divided: str):
    """A LayerNormalization written out: a small variance must not be rounded to 0."""
    graph = read(f"""(float[1,4,8,8] x, float[4,4,3,3] w0, float[4,4,1,1] w1, float[1,4,1,1] w2) => (float[1,1,8,8] pha)
                     <int64[1] channels = {{1}}, float two = {{2.0}}, float tiny = {{1e-5}}, float half = {{-0.5}}> {{
        y = Conv <pads = [1,1,1,1]> (x, w0)
        mean = ReduceMean (y, channels)
        off = Sub (y, mean)
        square = Pow (off, two)
        variance = ReduceMean (square, channels)
        more = Add (variance, tiny)
        {divided}
        z = Conv (norm, w1)
        q = Relu (z)
        pha = Conv (q, w2)
    }}""")
    placed(graph)
    assert [name for name in ("square", "variance", "more") if quantizers(graph, name)] == []
    assert quantizers(graph, "off") == ([] if "Div" in divided else ["uint8"])
    assert quantizers(graph, "norm") == ["uint8"]


def test_nothing_depends_on_names():
    graph, renamed = network(), network()
    for index, node in enumerate(renamed.nodes):
        node.name = f"n{index * 7919 % 101}_{index}"
        for value in node.outputs:
            if value.name not in ("fgr", "pha", "s"):
                value.name = f"v{index * 31 % 17}_{id(value) % 1000}_{index}_{value.name[::-1]}"
    renamed._names = None
    for g in (graph, renamed):
        run_to("insert_qdq", g, "4")
    assert [n.op for n in graph.nodes] == [n.op for n in renamed.nodes]


def test_a_layer_whose_result_is_not_quantized_counts_as_last():
    """A refiner's averages stay float, so the head before them keeps 8 bits as the last layer does."""
    graph = read("""(float[1,3,8,8] src, float[4,3,3,3] w0, float[4,4,3,3] w1, float[4,1,3,3] w2, float[4,4,1,1] w3,
                     float[4,4,1,1] w4, float[1,4,1,1] w5) => (float[1,1,8,8] pha) {
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = Relu (a)
        y = Conv <pads = [1,1,1,1]> (b, w1)
        square = Mul (y, y)
        mean_of_square = Conv <pads = [1,1,1,1], group = 4> (square, w2)
        mean = Conv <pads = [1,1,1,1], group = 4> (y, w2)
        square_of_mean = Mul (mean, mean)
        variance = Sub (mean_of_square, square_of_mean)
        c = Conv (variance, w3)
        d = Relu (c)
        e = Conv (d, w4)
        f = Relu (e)
        pha = Conv (f, w5)
    }""")
    graph.value("w2").values = np.full((4, 1, 3, 3), 1 / 9, np.float32)
    run_to("insert_qdq", graph, "4", footage=[])
    widths = {n.outputs[0].name: n.inputs[1].inputs[0].inputs[2].dtype.name for n in graph.nodes
              if n.op == "Conv" and n.inputs[1].inputs}
    assert widths == {"a": "int8", "y": "int8", "c": "int4", "e": "int4", "pha": "int8"}


def test_a_distance_stays_float():
    """|a - b|^2 as aa - 2ab + bb, as a memory's similarity is computed: its products are large, it is small."""
    graph = read("""(float[1,3,8,8] src, float[4,3,3,3] w0, float[4,3,3,3] w1, float[1,4,1,1] w2)
                    => (float[1,1,8,8] pha) <float two = {2.0}, int64[3] flat = {1, 4, 64},
                    int64[4] form = {1, 4, 8, 8}> {
        x = Conv <pads = [1,1,1,1]> (src, w0)
        y = Conv <pads = [1,1,1,1]> (src, w1)
        a = Reshape (x, flat)
        b = Reshape (y, flat)
        turned = Transpose <perm = [0, 2, 1]> (a)
        squares = Mul (turned, turned)
        s = Sigmoid (b)
        aa = MatMul (squares, s)
        ab = MatMul (turned, b)
        twice = Mul (ab, two)
        d = Sub (aa, twice)
        soft = Softmax <axis = 1> (d)
        read = MatMul (a, soft)
        z = Reshape (read, form)
        pha = Conv (z, w2)
    }""")
    run_to("insert_qdq", graph)
    read_by = {n.outputs[0].name: [v.inputs[0].op for v in n.inputs] for n in graph.nodes if n.op == "MatMul"}
    assert read_by["read"] == ["DequantizeLinear", "DequantizeLinear"]      # softmax has a grid of its own
    for name in ("aa", "ab", "twice", "squares"):
        assert "QuantizeLinear" not in [n.op for n in graph.value(name).outputs]


ATTENTION = """(float[1,3,8,8] src, float[4,3,3,3] w0, float[4,3,3,3] w1, float[1,4,1,1] w2)
                => (float[1,1,8,8] pha) <float few = {0.5}, int64[3] flat = {1, 4, 64}, int64[2] flatter = {4, 4},
                int64[3] back = {1, 4, 4}, int64[4] form = {1, 4, 8, 8}> {
    x = Conv <pads = [1,1,1,1]> (src, w0)
    y = Conv <pads = [1,1,1,1]> (src, w1)
    a = Reshape (x, flat)
    b = Reshape (y, flat)
    turned = Transpose <perm = [0, 2, 1]> (b)
    scores = MatMul (a, turned)
    fewer = Mul (scores, few)
    flatly = Reshape (fewer, flatter)
    soft = Softmax <axis = -1> (flatly)
    shares = Reshape (soft, back)
    read = MatMul (shares, a)
    z = Reshape (read, form)
    pha = Conv (z, w2)
}"""


def test_softmax_reads_floats_where_its_kernel_is_wrong(tmp_path: Path):
    """So does the arithmetic that leads to nothing else; on an NPU nothing is float."""
    graph = read(ATTENTION)
    run_to("insert_qdq", graph)
    for name in ("scores", "fewer", "flatly"):
        assert quantizers(graph, name) == [], name
    assert quantizers(graph, "soft") == ["uint8"]
    assert [v.inputs[0].op for v in graph.value("scores").inputs[0].inputs] == ["DequantizeLinear"] * 2
    fused = optimized_ops(graph, tmp_path / "optimized.onnx")
    assert "QLinearSoftmax" not in fused
    assert fused["MatMulIntegerToFloat"] == 1
    graph = read(ATTENTION)
    run_to("insert_qdq", graph, target=TARGETS["qnn"])
    assert quantizers(graph, "fewer") == ["uint8"]


def test_shares_above_their_grid_are_the_same_in_integers(tmp_path: Path):
    """Footage may give what calibration never saw: the largest shares of an attention are above their grid."""
    graph = read(ATTENTION)
    frames = list(np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), np.uint8))
    save_pictures(tmp_path / "clip", frames)
    compiled = vmq.compile(graph, bits=8, recipe="mse", effort="fast", calib=[tmp_path]).graph
    quantizer = next(n for n in compiled.nodes if n.op == "Softmax").outputs[0].outputs[0]
    while quantizer.op != "QuantizeLinear":
        quantizer = quantizer.outputs[0].outputs[0]
    scale = quantizer.inputs[1]
    scale.values = np.asarray(scale.values / 8, np.float32)
    plain, integers = Session(compiled, optimize=False), Session(compiled)
    for frame in frames:
        assert np.abs(integers.step(frame)["pha"] - plain.step(frame)["pha"]).mean() < 0.03      # of 0.14


def test_layers_that_stay_float_are_said_to_be_wider():
    graph = read("""(float[1,3,8,8] src, float[4,3,3,3] w0, float[4,4,1,1] w1, float[4,8,8] w3,
                     float[8,8] w4, float[1,4,1,1] w5) => (float[1,1,8,8] pha) {
        a = Conv <pads = [1,1,1,1]> (src, w0)
        b = ConvTranspose (a, w1)
        c = MatMul (w3, b)
        d = MatMul (c, w3)
        e = MatMul (d, w4)
        pha = Conv (e, w5)
    }""")
    result = placed(graph)
    made = {n.name: n.outputs[0].name for n in graph.nodes}
    assert {made[name]: bits for name, bits in result.report["wider"].items()} == {
        "b": "float32", "c": "float32", "d": "float32"}
    assert result.report["layers"] == 3
    assert [made[note.partition(":")[0]] for note in result.notes] == ["c", "d"]
    assert all("its weight is no matrix on the right; stays float" in note for note in result.notes)


COUNTER = """(float[1,3,32,48] src, float[1] count, float[4,3,3,3] w0, float[1,4,3,3] w1)
        => (float[1,1,32,48] pha, float[1] counted) <float one = {1.0}, float[1] four = {4.0}, float[1] first = {1.0}> {
    a = Conv <pads = [1,1,1,1]> (src, w0)
    b = Relu (a)
    more = Add (count, one)
    due = Greater (count, four)
    counted = Where (due, first, more)
    c = Mul (b, counted)
    d = Conv <pads = [1,1,1,1]> (c, w1)
    pha = Sigmoid (d)
}"""


@pytest.mark.parametrize("target", ["cpu", "qnn"])
@pytest.mark.parametrize("text", [COUNTER, COUNTER.replace("counted = Where (due, first, more)", "").replace(
    "more =", "counted =").replace("due = Greater (count, four)", "")], ids=["to five", "without end"])
def test_a_state_that_counts_is_exact(text: str, target: str, tmp_path: Path):
    """Rounded to 8 bits it would stand still, or run late; what reads it as a factor may have it rounded."""
    graph = read(text)
    footage = save_pictures(tmp_path / "clip", clips(1, 4)[0].frames())
    pairs = {"count": "counted"}
    made = vmq.compile(graph, recipe="mse", effort="fast", pairs=pairs, calib=footage, target=target).graph
    exact, plain, optimized = (Session(g, optimize=o, pairs=p) for g, o, p in (
        (graph, False, pairs), (made, False, None), (made, True, None)))
    for number, frame in enumerate([*clips(1, 8)[0].frames(), *clips(1, 8)[0].frames()]):
        want = number % 5 + 1 if "Where" in text else number + 1
        assert [float(s.step(frame)["counted"][0]) for s in (exact, plain, optimized)] == [want] * 3
