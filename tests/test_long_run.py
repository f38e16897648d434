"""The long run tells a state that grows from one that stays, and says after how many frames all is quiet again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx.parser
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import long_run

SIZE = (32, 48)


def model(path: Path, growth: float = 0.0, slow: float = 0.5, limit: float = 2.0) -> str:
    """Alpha is a running mean of the frame plus a counter, which should stay at 0.3.

    The mean is kept in 8 bits of 0 to `limit`, or as it is where that is 0.
    """
    state = """q = QuantizeLinear (mixed, scale, zero)
                next = DequantizeLinear (q, scale, zero)""" if limit else "next = Identity (mixed)"
    network = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 21]> tiny (
            float[1,3,32,48] src, float[1,1,32,48] last, float[1,1,1,2] count
        ) => (float[1,1,32,48] pha, float[1,1,32,48] next, float[1,1,1,2] more)
        <int64[1] channels = {{1}}, int64[1] wide = {{3}}, float slow = {{{slow}}}, float fast = {{{1 - slow}}},
         float growth = {{{growth}}}, float least = {{0.3}}, float scale = {{{max(limit, 1) / 255}}},
         uint8 zero = {{0}}> {{
            mean = ReduceMean <keepdims = 1> (src, channels)
            a = Mul (mean, fast)
            b = Mul (last, slow)
            mixed = Add (a, b)
            {state}
            c = Add (count, growth)
            more = Max (c, least)
            single = ReduceMean <keepdims = 1> (more, wide)
            pha = Mul (next, single)
        }}""")
    onnx.helper.set_model_props(network, {"vmq.states": json.dumps({"last": "next", "count": "more"})})
    onnx.save(network, path)
    return str(path)


def test_a_network_that_stays_with_its_float_self(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exact, ours = model(tmp_path / "float.onnx", limit=0), model(tmp_path / "ours.onnx")
    assert long_run.main([exact, ours, "--frames", "600", "--plot", str(tmp_path / "errors.png"), "-q"]) == 0
    said = capsys.readouterr().out
    assert "600 frames: 4.7 cycles of 1 x 128 frames" in said
    assert "no drift" in said
    assert "PROBLEM" not in said
    picture = cv2.imread(str(tmp_path / "errors.png"))
    assert picture.shape[0] > 3 * 150                      # alpha and two states
    assert (picture == 0).any()


def test_a_state_that_grows_a_little_with_every_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exact, ours = model(tmp_path / "float.onnx", limit=0), model(tmp_path / "ours.onnx", growth=1e-5)
    assert long_run.main([exact, ours, "--frames", "600", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [p.partition(":")[0] for p in found["problems"]] == ["alpha drifts", "state count drifts"]
    assert found["trends"]["count"]["rise_per_1000_frames"] == pytest.approx(1e-2 / 0.3, rel=5e-3)
    assert not found["trends"]["last"]["drifts"]


def test_a_state_of_too_small_a_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exact, ours = model(tmp_path / "float.onnx", limit=0), model(tmp_path / "ours.onnx", limit=1)
    narrow = onnx.load(ours)
    next(i for i in narrow.graph.initializer if i.name == "scale").CopyFrom(
        onnx.numpy_helper.from_array(np.float32(0.4 / 255), "scale"))
    onnx.save(narrow, ours)
    assert long_run.main([exact, ours, "--frames", "300", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "state last saturates" in " ".join(found["problems"])
    assert found["saturated"]["last"]["quantized"] > 0.2


def test_recovery_is_counted_in_frames():
    """Errors of 2 in quiet frames; 10 during events, and for one and for four frames after them."""
    places = np.tile(np.arange(long_run.SCENE), 2)
    truth = np.full((2, places.size), 2.0)
    for network, late in enumerate((1, 4)):
        for first, end in long_run.EVENTS.values():
            truth[network, (places >= first) & (places < end + late)] = 10.0
    run = long_run.LongRun(places.size, places.size // 2, 1, truth[0], None, truth, places)
    assert run.recovery() == {event: [[1, 1], [4, 4]] for event in long_run.EVENTS}


def test_what_cannot_be_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours = model(tmp_path / "ours.onnx")
    assert long_run.main([ours, ours, "--frames", "200"]) == 2
    assert "give at least two cycles" in capsys.readouterr().err
    assert long_run.main([ours, str(tmp_path / "none.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err
