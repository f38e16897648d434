"""The long run tells a state that grows from one that stays, and says after how many frames all is quiet again."""

from __future__ import annotations

import json
import re
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


def test_a_network_that_gives_nan(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    exact, ours = model(tmp_path / "float.onnx", limit=0), model(tmp_path / "ours.onnx")
    broken = onnx.load(ours)
    next(i for i in broken.graph.initializer if i.name == "least").CopyFrom(
        onnx.numpy_helper.from_array(np.float32(np.nan), "least"))
    onnx.save(broken, ours)
    assert long_run.main([exact, ours, "--frames", "256", "-q"]) == 1
    said = capsys.readouterr().out
    assert "PROBLEM: alpha is NaN or infinite from frame 0 on" in said
    assert re.search(r"frames to recover after cut .*float \d.*, quantized unknown \(NaN\)", said)


def test_nobody_is_away_in_own_footage(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for number in range(3):
        for part in ("com", "pha"):
            (tmp_path / "set" / part).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(tmp_path / "set" / part / f"{number}.png"), np.full((*SIZE, 3), 50 + number, np.uint8))
    exact, ours = model(tmp_path / "float.onnx", limit=0), model(tmp_path / "ours.onnx")
    for more, events in ((["--clips", str(tmp_path / "set")], {"cut", "flash", "black"}), ([], set(long_run.EVENTS))):
        assert long_run.main([exact, ours, "--frames", "256", "--json", *more]) == 0
        assert set(json.loads(capsys.readouterr().out)["recovery"]) == events


FREE = """<ir_version: 10, opset_import: ["": 21]> tiny (float[1,3,32,48] src, float[a,b,c,d] last, float[1] ratio)
    => (float[1,1,32,48] pha, float[a,b,e,f] next)
    <int64[1] one = {1}, float[2] ones = {1.0, 1.0}, float half = {0.5}> {
    mean = ReduceMean <keepdims = 1> (src, one)
    scales = Concat <axis = 0> (ones, ratio, ratio)
    small = Resize <mode = "linear"> (mean, , scales)
    old = Mul (last, half)
    next = Add (small, old)
    top = ReduceMax <keepdims = 1> (next)
    pha = Mul (mean, top)
}"""


def test_a_model_bound_to_a_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Beside a float one that takes any: the option says which; without it, or with another, a clear line."""
    free, bound = onnx.parser.parse_model(FREE), onnx.parser.parse_model(FREE)
    onnx.helper.set_model_props(free, {"vmq.states": json.dumps({"last": "next"})})
    onnx.helper.set_model_props(bound, {"vmq.states": json.dumps({"last": "next"})})
    bound.graph.input.remove(bound.graph.input[2])
    bound.graph.initializer.append(onnx.numpy_helper.from_array(np.full(1, 0.5, np.float32), "ratio"))
    for side, size in zip(bound.graph.input[1].type.tensor_type.shape.dim, (1, 1, 16, 24), strict=True):
        side.dim_value = size
    onnx.save(free, tmp_path / "float.onnx")
    onnx.save(bound, tmp_path / "ours.onnx")
    command = [str(tmp_path / "float.onnx"), str(tmp_path / "ours.onnx"), "--frames", "256", "-q"]
    assert long_run.main([*command, "--downsample-ratio", "0.5"]) == 0
    assert "no drift" in capsys.readouterr().out
    assert long_run.main(command) == 2
    said = capsys.readouterr().err
    assert "error: state last is 1x1x16x24 in " in said
    assert "float.onnx; give the --downsample-ratio that the first is compiled for" in said
    assert said.count("\n") == 1


def test_what_cannot_be_run_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours = model(tmp_path / "ours.onnx")
    assert long_run.main([ours, ours, "--frames", "200"]) == 2
    assert "give at least two cycles" in capsys.readouterr().err
    assert long_run.main([ours, ours, "--frames", "256", "--downsample-ratio", "0.5"]) == 2
    assert "no model has an input for a downsample ratio" in capsys.readouterr().err
    assert long_run.main([ours, str(tmp_path / "none.onnx")]) == 2
    assert "does not exist" in capsys.readouterr().err
