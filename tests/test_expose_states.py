"""States that stay integers between frames: the same mattes, bit for bit, as with float states."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_recurrent
from compiling import clips, network, rerun, run_to
from tiny_recurrent import read

from vmq import cli
from vmq.errors import ModelError, OptionError
from vmq.graph import Graph
from vmq.quant import dequantize
from vmq.runtime import GRIDS_KEY, Session
from vmq.spec import Options


def pair(bits: str = "8") -> tuple[Graph, Graph]:
    """A network compiled with float and with integer states; verification finds the same of both."""
    graphs, reports = [], []
    for state in ("float32", "uint8"):
        graph = network()
        context = run_to("expose_states", graph, bits, state=state)
        reports.append(rerun("verify", graph, context).report)
        graphs.append(graph)
    assert reports[0]["MAD_to_float"] == reports[1]["MAD_to_float"]
    assert reports[0]["states"] == reports[1]["states"]
    assert reports[1]["states"]
    return graphs[0], graphs[1]


def same_alphas(loose: Graph, exposed: Graph, frames: list[np.ndarray], *, optimize: bool) -> None:
    """Alpha over a clip is the same, and so are the states, but for their form."""
    one, two = Session(loose, optimize=optimize, threads=1), Session(exposed, optimize=optimize, threads=1)
    grids = json.loads(exposed.metadata[GRIDS_KEY])
    one.reset()
    two.reset()
    for frame in frames:
        ours, theirs = one.step(frame), two.step(frame)
        assert np.array_equal(one.alpha_of(ours), two.alpha_of(theirs))
        for p in two.state_pairs:
            grid = grids[p.input]
            assert theirs[p.output].dtype == np.uint8
            assert np.array_equal(theirs[p.output], two.encode({p.input: ours[p.output]})[p.input])
            assert np.array_equal(ours[p.output], dequantize(theirs[p.output], grid["scale"], grid["zero_point"]))


@pytest.mark.parametrize("bits", ["8", "w4a8", "4"])
@pytest.mark.parametrize("optimize", [True, False])
def test_the_same_bits_as_with_float_states(bits: str, optimize: bool) -> None:
    loose, exposed = pair(bits)
    assert {v.name: np.dtype(v.dtype).name for v in (*exposed.inputs, *exposed.outputs)} == {
        "src": "float32", "r": "uint8", "fgr": "float32", "pha": "float32", "s": "uint8"}
    assert [v.name for v in exposed.inputs] == [v.name for v in loose.inputs]
    assert len([n for n in loose.nodes if n.op == "QuantizeLinear"]) == \
        1 + len([n for n in exposed.nodes if n.op == "QuantizeLinear"])
    same_alphas(loose, exposed, list(clips(1, 6)[0].frames()), optimize=optimize)


def test_the_first_state_is_the_zero_point() -> None:
    _, exposed = pair()
    grid = json.loads(Graph.load(exposed.to_bytes()).metadata[GRIDS_KEY])["r"]
    assert 0 < grid["zero_point"] < 255
    session = Session(exposed, threads=1)
    assert session.state["r"].dtype == np.uint8
    assert (session.state["r"] == grid["zero_point"]).all()
    list(session.alphas(clips()[0].frames()))
    assert len(np.unique(session.state["r"])) > 8
    session.reset()
    assert (session.state["r"] == grid["zero_point"]).all()


@pytest.mark.parametrize("keep", [{}, {"first": 4}])
def test_states_of_an_lstm(keep: dict[str, int]) -> None:
    """h is read by a convolution alone, at 8 bits or at 4, where it goes out on another grid; c by products."""
    graphs = [read(tiny_recurrent.LSTM.replace("8,8]", "32,48]")) for _ in range(2)]
    for graph, state in zip(graphs, ("float32", "uint8"), strict=True):
        run_to("verify", graph, "4", keep=keep, state=state)
    assert set(json.loads(graphs[1].metadata[GRIDS_KEY])) == {"h", "c"}
    clipped = [n for n in graphs[1].value("h").outputs if n.op == "Clip"]
    assert len(clipped) == len(keep)
    one, two = (Session(graph, optimize=False, threads=1) for graph in graphs)
    for frame in clips(1, 5)[0].frames():
        assert np.array_equal(one.alpha_of(one.step(frame)), two.alpha_of(two.step(frame)))


def test_float_states_are_one_grid_out_and_in() -> None:
    graph = network()
    run_to("lower", graph)
    (entry,) = graph.value("r").outputs
    (leave,) = graph.value("s").inputs
    assert entry.inputs[1] is leave.inputs[1]
    assert entry.inputs[2] is leave.inputs[2]
    assert GRIDS_KEY not in graph.metadata


def test_an_alpha_that_is_fed_back_stays_float() -> None:
    graph = read(tiny_recurrent.LAST_ALPHA.replace("8,8]", "32,48]"))
    context = run_to("expose_states", graph, state="uint8")
    assert GRIDS_KEY not in graph.metadata
    assert context.found["find_closures"].states
    assert np.dtype(graph.value("pha").dtype) == np.float32


def test_a_state_that_is_not_quantized_stays_float() -> None:
    graph = read("""(float[1,3,32,48] src, float[1,1,32,48] r, float[1,3,1,1] w0)
                    => (float[1,1,32,48] pha, float[1,1,32,48] s) {
        x = Conv (src, w0)
        y = Exp (r)
        s = Max (x, y)
        pha = Sigmoid (x)
    }""")
    run_to("verify", graph, state="uint8")
    assert GRIDS_KEY not in graph.metadata
    assert np.dtype(graph.value("r").dtype) == np.float32


def test_nothing_happens_without_being_asked() -> None:
    graph = network()
    context = run_to("expose_states", graph)
    before = graph.to_bytes()
    assert rerun("expose_states", graph, context).modified == 0
    assert graph.to_bytes() == before


def test_the_command_line_handles_such_states_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network().save(tmp_path / "m.onnx")
    made = {}
    for state in ("float32", "uint8"):
        made[state] = str(tmp_path / f"{state}.onnx")
        assert cli.main(["compile", str(tmp_path / "m.onnx"), "--recipe", "mse", "--effort", "fast", "--state", state,
                         "-o", made[state], "-q", "--dump", str(tmp_path / state)]) == 0
    assert cli.main(["bench", made["float32"], made["uint8"], "--runs", "1", "--threads", "1", "--json", "-q"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert rows[made["uint8"]]["qdq_nodes"] == rows[made["float32"]]["qdq_nodes"] - 2
    assert cli.main(["inspect", str(tmp_path / "uint8"), "--json", "-q"]) == 0
    passes = json.loads(capsys.readouterr().out)["passes"]
    *_, (_, before), (name, after), (_, last) = [
        (p["name"], p["alpha_MAD"]) for p in passes if p["alpha_MAD"] is not None]
    assert name == "expose_states"
    assert last == after == before


def test_damaged_metadata() -> None:
    _, exposed = pair()
    for text in ("[", "3", '{"r": 1}', '{"x": {"scale": 1.0, "zero_point": 1}}',
                 '{"r": {"scale": 0, "zero_point": 1}}', "[" * 100_000):
        exposed.metadata[GRIDS_KEY] = text
        with pytest.raises(ModelError, match=r"metadata vmq\.quantized_states is damaged"):
            Session(exposed)


def test_the_option_is_checked() -> None:
    with pytest.raises(OptionError, match="--state int8 is not known; give one of float32, uint8"):
        Options(state="int8")


def test_the_four_states_of_rvm(tmp_path: Path) -> None:
    from models import rvm

    rvm.export(rvm.build("mobilenetv3", seed=1), tmp_path / "rvm.onnx", size=(64, 96))
    loose = Graph.load(tmp_path / "rvm.onnx")
    context = run_to("expose_states", loose, "8", clips(1, 2, (64, 96)))
    result = rerun("expose_states", exposed := loose.copy(), context, state="uint8")
    assert result.modified == 4
    assert result.notes == ()
    assert set(json.loads(exposed.metadata[GRIDS_KEY])) == {"r1i", "r2i", "r3i", "r4i"}
    same_alphas(loose, exposed, list(clips(1, 4, (64, 96))[0].frames()), optimize=True)
