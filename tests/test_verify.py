"""Verification finds what lowering must not do, and says how a closed loop behaves."""

from __future__ import annotations

import numpy as np
import pytest
from compiling import SIZE, network, rerun, run_to
from tiny_recurrent import read

import passes.verify
from vmq.clips import Clip
from vmq.errors import PassError
from vmq.graph import Graph
from vmq.pipeline import Context
from vmq.spec import Options


def test_a_good_model_passes_with_numbers():
    graph = network()
    context = run_to("lower", graph)
    result = rerun("verify", graph, context)
    report = result.report
    assert report["differing_from_lowered"] == 0
    assert 0.0 <= report["optimized_alpha_differs"] < 0.2
    loops = report["MAD_to_float"]
    assert 0.0 < loops["open"] < 50.0
    assert 0.0 < loops["closed"] < 50.0
    assert loops["frames"] == 8
    state = report["states"]["r"]
    assert 0.0 < state["first"] < 0.5
    assert 0.0 <= state["saturated"] < 0.1
    assert result.notes == ()


def test_one_changed_scale_is_found():
    graph = network()
    context = run_to("lower", graph)
    scale = next(n for n in graph.nodes if n.op == "QuantizeLinear").inputs[1]
    scale.values = np.asarray(scale.values * np.float32(1.01))
    with pytest.raises(PassError, match=r"output \w+ of the emitted model differs from the graph before lowering"):
        rerun("verify", graph, context)


@pytest.mark.parametrize(("one", "other", "same"), [(1e-7, 2e-7, True), (1e-5, 2e-5, False)])
def test_a_frame_without_anybody_is_not_held_to_its_own_largest_value(one: float, other: float, same: bool):
    """Alpha next to 0 everywhere: a sigmoid rounds it as if it was near 1."""
    graphs = []
    for value in (one, other):
        graph = read("(float[1,3,32,48] src, float[1,3,1,1] w0) => (float[1,1,32,48] pha) { pha = Conv (src, w0) }")
        graph.value("w0").values = np.full((1, 3, 1, 1), value / 3.0, np.float32)
        graphs.append(graph)
    white = Clip("white", 25.0, SIZE, 2, lambda start, stop: (np.full((3, *SIZE), 255, np.uint8)
                                                             for _ in range(start, stop)))
    context = Context(Options(), [white])

    def check() -> None:
        passes.verify._same_bits(*graphs, context, optimize=True, rounding=passes.verify.ROUNDING)

    if same:
        check()
    else:
        with pytest.raises(PassError, match="differs from the graph before lowering"):
            check()


def test_a_collapse_is_said_loudly(monkeypatch: pytest.MonkeyPatch):
    graph = network()
    context = run_to("lower", graph)
    monkeypatch.setattr(passes.verify, "_loops", lambda *_: ({
        "closed": 90.0, "closed_first": 36.0, "closed_last": 148.0, "open": 8.4, "frames": 40.0}, {}))
    note, = rerun("verify", graph, context).notes
    assert "recurrent collapse" in note
    assert "36.0" in note
    assert "148.0" in note
    assert "8.4" in note


def accumulator(frames: int, scale: float) -> tuple[Graph, Context]:
    """A network whose state adds up grey frames, taken up to `lower`; then its state's scale is made `scale` times."""
    graph = read("""(float[1,3,32,48] src, float[1,1,32,48] r, float[1,3,1,1] w0, float[1,1,1,1] w1)
                    => (float[1,1,32,48] pha, float[1,1,32,48] s) {
        x = Conv (src, w0)
        s = Add (x, r)
        pha = Conv (s, w1)
    }""")
    graph.value("w0").values = np.full((1, 3, 1, 1), 0.004, np.float32)
    graph.value("w1").values = np.ones((1, 1, 1, 1), np.float32)
    grey = Clip("grey", 25.0, SIZE, frames, lambda start, stop: (np.full((3, *SIZE), 200, np.uint8)
                                                                 for _ in range(frames)[start:stop]))
    context = run_to("lower", graph, footage=[grey])
    for twin in (graph, context.found["lower"]):
        for node in [n for n in twin.nodes if n.op in ("QuantizeLinear", "DequantizeLinear")]:
            if "s_before" in (node.inputs[0].name, *(v.name for n in node.inputs[0].inputs for v in n.inputs[:1])):
                node.inputs[1].values = np.asarray(node.inputs[1].values * np.float32(scale))
    return graph, context


def test_a_state_that_drifts_is_seen_in_closed_loop_alone_and_named():
    """With steps so wide that every sum is rounded the same way, open loop stays right and closed loop drifts."""
    graph, context = accumulator(40, 1.7)
    result = rerun("verify", graph, context)
    loops, state = result.report["MAD_to_float"], result.report["states"]["r"]
    assert loops["closed_last"] > 3 * loops["open"]
    assert state["last"] > 3 * state["open"]
    said = " ".join(result.notes)
    assert "recurrent collapse" in said
    assert "state r drifts" in said


def test_a_state_that_saturates_is_named():
    """A range of half of what the state comes to."""
    graph, context = accumulator(40, 0.5)
    result = rerun("verify", graph, context)
    state = result.report["states"]["r"]
    assert 0.4 < state["saturated"] < 0.9
    assert state["saturated_in_float"] < 0.06
    assert "state r saturates" in " ".join(result.notes)
