"""The checks of targets: their arguments, the closed loop they run, and how they count differences."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from compiling import SIZE, network, run_to

from vmq.targets import TARGETS

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import check_targets
import closed_loop


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    graph = network()
    run_to("lower", graph, target=TARGETS["qnn"])
    path = tmp_path_factory.mktemp("model") / "tiny.onnx"
    graph.save(path)
    return path


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("frames") / "frames.npy"
    np.save(path, np.random.default_rng(0).uniform(0, 1, (3, 3, *SIZE)).astype(np.float32))
    return path


def test_arguments():
    args = check_targets.parse(["arm", "m.onnx", "--cpu", "max", "--cpu", "cortex-a76", "--frames", "4"])
    assert (args.target, args.cpu, args.frames) == ("arm", ["max", "cortex-a76"], 4)
    assert check_targets.parse(["qnn", "m.onnx"]).soc_model == 57
    assert check_targets.parse(["openvino", "m.onnx", "--cache", "~/c"]).cache == Path.home() / "c"


@pytest.mark.parametrize("words", [[], ["toaster", "m.onnx"], ["qnn"], ["qnn", "m.onnx", "--cpu", "max"],
                                   ["arm", "m.onnx", "--frames", "0"], ["arm", "m.onnx", "--reference", "f.onnx"]])
def test_bad_arguments(words: list[str]):
    with pytest.raises(SystemExit) as error:
        check_targets.main(words)
    assert error.value.code == 2


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert check_targets.main(["qnn", str(tmp_path / "no.onnx"), "--cache", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("check_qnn: error: ")
    assert said.count("\n") == 1


def run_loop(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["closed_loop.py", *map(str, words)])
    return closed_loop.main()


def test_closed_loop_against_itself(model: Path, frames: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]):
    assert run_loop(monkeypatch, model, frames, "--reference", model) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("accepted: session in ")
    assert sum("alpha 0.00e-3 from the CPU run on average, 0.000 at most, 0.0% of 8-bit" in line for line in lines) == 3
    assert lines[-1] == "from the float network: cpu 0.00e-3, CPU 0.00e-3"


def test_a_refused_model(model: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                         capsys: pytest.CaptureFixture[str]):
    proto = onnx.load(model)
    next(n for n in proto.graph.node if n.op_type == "HardSwish").op_type = "SoftSwish"
    onnx.save(proto, tmp_path / "odd.onnx")
    assert run_loop(monkeypatch, tmp_path / "odd.onnx", frames) == closed_loop.REFUSED
    said = capsys.readouterr().out
    assert said.startswith("refused: ")
    assert "SoftSwish" in said


def test_differences_are_counted(model: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one, other = tmp_path / "one.npz", tmp_path / "other.npz"
    assert run_loop(monkeypatch, model, frames, "--record", one) == 0
    lines, count = check_targets.differences(one, one)
    assert count == 0
    assert lines[2].startswith("frame 3: 0 of 1,536 alpha values differ, by 0 8-bit steps at most; 0 of ")
    with np.load(one) as kept:
        values = {name: kept[name].copy() for name in kept.files}
    for name in ("alpha", "pha"):
        plane = values[name][1].reshape(-1)
        plane[:5] += np.float32(3 / 255)
    np.savez(other, **values)
    lines, count = check_targets.differences(one, other)
    assert count == 5
    assert lines[0].startswith("frame 1: 0 of")
    assert lines[1].startswith("frame 2: 5 of 1,536 alpha values differ, by 3 8-bit steps at most; 5 of ")


def test_operators_are_compared_on_the_same_integers(model: Path, frames: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch):
    """The parts of a model, given its own integers, give them again; a step that is off is found at its operator."""
    quantizers = check_targets.cut(model, tmp_path)
    assert {q.kind for q in quantizers.values()} >= {"Conv", "Mul"}
    assert run_loop(monkeypatch, tmp_path / "traced.onnx", frames, "--record", tmp_path / "traced.npz") == 0
    given = tmp_path / "given.npz"
    with np.load(tmp_path / "traced.npz") as traced:
        np.savez(given, **{f"{n}{check_targets.GIVEN}": traced[n] for n in quantizers})
    for parts, name in (("cut", "here"), ("floats", "floats")):
        assert run_loop(monkeypatch, tmp_path / f"{parts}.onnx", frames, "--record", tmp_path / f"{name}.npz",
                        "--given", given) == 0
    with np.load(tmp_path / "here.npz") as here, np.load(tmp_path / "traced.npz") as traced:
        assert all(np.array_equal(here[n], traced[n]) for n in quantizers)
        values = {name: here[name].copy() for name in here.files}
    name = next(n for n, q in quantizers.items() if q.kind == "Mul")
    with np.load(tmp_path / "floats.npz") as floats:
        exact = floats[quantizers[name].value] / quantizers[name].scale
    place = np.unravel_index(np.argmin(np.abs(exact % 1.0 - 0.5)), exact.shape)
    values[name][place] ^= 1
    np.savez(tmp_path / "there.npz", **values)
    lines = check_targets.apart(quantizers, tmp_path)
    (odd,) = [line for line in lines if "by 1 at most" in line]
    assert odd.startswith("Mul: 1 of ")
    assert float(odd.split("within ")[1].split()[0]) < 0.05
    assert all(": 0 of " in line for line in lines if line != odd)
