"""Verification finds what lowering must not do, and says how a closed loop behaves."""

from __future__ import annotations

import numpy as np
import pytest
from compiling import network, rerun, run_to

import passes.verify
from vmq.errors import PassError


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
    assert result.notes == ()


def test_one_changed_scale_is_found():
    graph = network()
    context = run_to("lower", graph)
    scale = next(n for n in graph.nodes if n.op == "QuantizeLinear").inputs[1]
    scale.values = np.asarray(scale.values * np.float32(1.01))
    with pytest.raises(PassError, match=r"output \w+ of the emitted model differs from the graph before lowering"):
        rerun("verify", graph, context)


def test_a_collapse_is_said_loudly(monkeypatch: pytest.MonkeyPatch):
    graph = network()
    context = run_to("lower", graph)
    monkeypatch.setattr(passes.verify, "_loops", lambda *_: {
        "closed": 90.0, "closed_first": 36.0, "closed_last": 148.0, "open": 8.4, "frames": 40.0})
    note, = rerun("verify", graph, context).notes
    assert "recurrent collapse" in note
    assert "36.0" in note
    assert "148.0" in note
    assert "8.4" in note


def test_a_state_that_drifts_is_seen_in_closed_loop_alone():
    """With a state quantizer that always rounds up a little, open loop stays right and closed loop drifts."""
    from compiling import SIZE
    from tiny_recurrent import read

    from vmq.clips import Clip
    graph = read("""(float[1,3,32,48] src, float[1,1,32,48] r, float[1,3,1,1] w0, float[1,1,1,1] w1)
                    => (float[1,1,32,48] pha, float[1,1,32,48] s) {
        x = Conv (src, w0)
        s = Add (x, r)
        pha = Conv (s, w1)
    }""")
    graph.value("w0").values = np.full((1, 3, 1, 1), 0.004, np.float32)
    graph.value("w1").values = np.ones((1, 1, 1, 1), np.float32)
    grey = Clip("grey", 25.0, SIZE, 40, lambda start, stop: (np.full((3, *SIZE), 200, np.uint8)
                                                             for _ in range(40)[start:stop]))
    context = run_to("lower", graph, footage=[grey])
    state = next(n for n in graph.value("s_before").outputs if n.op == "QuantizeLinear")
    state.inputs[1].values = np.asarray(state.inputs[1].values * np.float32(1.7))
    before = context.found["lower"]
    twin = next(n for n in before.value("s_before").outputs if n.op == "QuantizeLinear")
    twin.inputs[1].values = state.inputs[1].values
    result = rerun("verify", graph, context)
    loops = result.report["MAD_to_float"]
    assert loops["closed_last"] > 3 * loops["open"]
    assert "recurrent collapse" in " ".join(result.notes)
