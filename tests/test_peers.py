"""tools/peers runs peers in environments of their own, keeps what they gave, and makes a row of whatever fails."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
import tiny_matting as tiny

TOOLS = Path(__file__).resolve().parents[1] / "tools"
FAKE = """
import os
import frames as calibration
import onnx

def quantize(variant, model, frames, output):
    (output.parent / "asked").open("a").write(variant + "\\n")
    if variant == "refuses":
        raise ValueError("no\\n   such   operator")
    if variant == "asserts":
        assert 1 + 1 == 3
    if variant == "dies":
        os.kill(os.getpid(), 9)
    if variant == "forgets":
        return
    network = onnx.load(model)
    if variant == "reads":
        inputs = [{n: (str(v.dtype), v.shape, float(v.mean())) for n, v in f.items()} for f in calibration.load(frames)]
        reader = calibration.Reader(frames)
        assert len(reader) == len(inputs) and len(list(iter(reader.get_next, None))) == len(inputs)
        assert reader.get_next() is None
        reader.rewind()
        assert reader.get_next() is not None
        print(inputs)
    if variant == "wide":
        network.graph.output.pop()
    onnx.save(network, output)
"""
HANGS = """
import os, subprocess, sys, time

def quantize(variant, model, frames, output):
    child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    (output.parent / "children").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(60)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The tool with one peer of a few variants, whose environment is this one."""
    monkeypatch.syspath_prepend(str(TOOLS))
    before = set(sys.modules)
    module = importlib.import_module("peers")
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name in ("quantize.py", "frames.py"):
        (scripts / name).write_bytes((TOOLS / "peer_scripts" / name).read_bytes())
    (scripts / "with_fake.py").write_text(FAKE)
    monkeypatch.setattr(module, "SCRIPTS", scripts)
    monkeypatch.setattr(module, "RUNNER", scripts / "quantize.py")
    monkeypatch.setattr(module, "environment", lambda *_: Path(sys.executable))
    monkeypatch.setattr(module, "source_version", lambda: "as it is")
    variants = {"plain": "as it is", "refuses": "an | error"}
    monkeypatch.setattr(module, "PEERS", (module.Peer("Fake", "fake", ("fake==1.2",), variants),))
    yield module
    for name in set(sys.modules) - before:
        if TOOLS in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


@pytest.fixture
def quick(peers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """No model is timed, and scores are made up; the `vmq` commands that would run."""
    commands: list[list[str]] = []
    finished = importlib.import_module("comparison.bench").Finished

    def pretend(words: list[str]) -> Any:
        commands.append(words)
        if words[0] == "compile":
            if words[words.index("--bits") + 1] == "4":
                return finished(2, "", "vmq: error: too few bits\n", 1.0, 1.0)
            Path(words[-1]).write_bytes(Path(words[1]).read_bytes())
            return finished(0, "{}", "", 90.0, 1.0)
        if b"Absent" in Path(words[1]).read_bytes():
            return finished(2, "", f"vmq: error: {words[1]}: no operator Absent\n", 1.0, 1.0)
        scores = {"mean": {"MAD": 1.5, "dtSSD": 2.5}, "clips": {}, "fidelity": {"MAD": 0.25}}
        return finished(0, json.dumps({"models": {words[1]: scores}}), "", 1.0, 1.0)

    monkeypatch.setattr(peers, "run_vmq", pretend)
    monkeypatch.setattr(peers.Comparison, "timed", lambda *_, **__: None)
    return commands


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    tiny.save(tmp_path / "net.onnx")
    for kind, seed in (("calib", 0), ("eval", 5)):
        for clip in ("a", "b"):
            tiny.save_pictures(tmp_path / kind / clip / "com", tiny.frames(3, seed=seed))
            tiny.save_pictures(tmp_path / kind / clip / "pha", [f[0] for f in tiny.frames(3, seed=seed + 9)])
    return ["--model", str(tmp_path / "net.onnx"), "--calib", str(tmp_path / "calib"), "--eval",
            str(tmp_path / "eval"), "--work", str(tmp_path / "work"), "--cache", str(tmp_path / "cache"), "--runs", "2"]


def table(text: str) -> list[dict[str, str]]:
    lines = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], cells, strict=True)) for cells in lines[2:]]


def run(peers: ModuleType, variant: str, tmp_path: Path, limit: float = 60.0) -> dict[str, Any]:
    """What one variant of the fake peer gives on the tiny network, with two recorded frames."""
    tiny.save(tmp_path / "net.onnx")
    frames, out = tmp_path / "frames", tmp_path / "out"
    for folder in (frames, out):
        folder.mkdir(exist_ok=True)
    for number in range(2):
        np.savez(frames / f"{number:05}.npz", src=np.full((1, 3, 16, 24), number, np.float32),
                 last=np.zeros((1, 1, 16, 24), np.float32))
    return peers.run_peer(Path(sys.executable), "fake", variant, tmp_path / "net.onnx", frames, out / "q.onnx", limit)


# -------------------------------------------------------------------------------------------- one peer


def test_a_peer_reads_the_recorded_frames(peers: ModuleType, tmp_path: Path) -> None:
    found = run(peers, "reads", tmp_path)
    assert "error" not in found, (tmp_path / "out" / "q.log").read_text()
    assert found["versions"]["onnx"] == onnx.__version__
    assert found["versions"]["numpy"] == np.__version__
    inputs = eval((tmp_path / "out" / "q.log").read_text())
    assert inputs == [{"src": ("float32", (1, 3, 16, 24), float(n)), "last": ("float32", (1, 1, 16, 24), 0.0)}
                      for n in range(2)]
    assert (tmp_path / "out" / "q.onnx").is_file()


@pytest.mark.parametrize(("variant", "error"), [
    ("refuses", "ValueError: no such operator"),
    ("asserts", "AssertionError: (no message; with_fake.py line 11: assert 1 + 1 == 3)"),
    ("dies", "ended by signal 9 (out of memory?)"),
    ("forgets", "it ended without an error and without a model")])
def test_an_error_is_one_line(peers: ModuleType, tmp_path: Path, variant: str, error: str) -> None:
    assert run(peers, variant, tmp_path)["error"] == error


def test_a_script_that_cannot_be_imported_is_an_error(peers: ModuleType, tmp_path: Path) -> None:
    (peers.SCRIPTS / "with_fake.py").write_text("import there_is_no_such_tool\n")
    assert run(peers, "plain", tmp_path)["error"] == "ModuleNotFoundError: No module named 'there_is_no_such_tool'"


def test_the_time_limit_ends_a_peer_and_what_it_started(peers: ModuleType, tmp_path: Path) -> None:
    (peers.SCRIPTS / "with_fake.py").write_text(HANGS)
    started = time.monotonic()
    found = run(peers, "plain", tmp_path, limit=6.0)
    assert time.monotonic() - started < 40
    assert found["error"] == "not finished within 0.1 min"
    assert found["stopped"]
    for pid in map(int, (tmp_path / "out" / "children").read_text().split()):
        deadline = time.monotonic() + 10
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --------------------------------------------------------------------------------------------- names


RENAMED = """<ir_version: 8, opset_import: ["": 17]> net (float[1, 3, 4, 4] image, float[1, 1, 4, 4] state) =>
    (float[1, 1, 4, 4] pha_updated, float[1, 1, 4, 4] after) <int64[1] channels = {1}> {
    light = ReduceMean <axes = [1], keepdims = 1> (image)
    pha = Add (light, state)
    pha_updated = Identity (pha)
    after = Mul (pha, pha) }"""
REFERENCE = """<ir_version: 8, opset_import: ["": 17]> net (float[1, 3, 4, 4] src, float[1, 1, 4, 4] last) =>
    (float[1, 1, 4, 4] pha, float[1, 1, 4, 4] next) {
    light = ReduceMean <axes = [1], keepdims = 1> (src)
    pha = Add (light, last)
    next = Mul (pha, pha) }"""


def test_names_are_put_back_by_position(peers: ModuleType, tmp_path: Path) -> None:
    """Also where an inner value has the name that an output must get."""
    for name, text in (("renamed", RENAMED), ("reference", REFERENCE)):
        onnx.save(onnx.parser.parse_model(text), tmp_path / f"{name}.onnx")
    peers.mend(tmp_path / "renamed.onnx", tmp_path / "reference.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "renamed.onnx"), full_check=True)
    feeds = {"src": np.random.default_rng(0).random((1, 3, 4, 4), np.float32),
             "last": np.ones((1, 1, 4, 4), np.float32)}
    ours, theirs = (ort.InferenceSession(tmp_path / f"{name}.onnx", providers=["CPUExecutionProvider"])
                    for name in ("renamed", "reference"))
    assert [o.name for o in ours.get_outputs()] == ["pha", "next"]
    for one, other in zip(ours.run(None, feeds), theirs.run(None, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_order_of_known_names_is_kept(peers: ModuleType, tmp_path: Path) -> None:
    text = REFERENCE.replace("(float[1, 3, 4, 4] src, float[1, 1, 4, 4] last)",
                             "(float[1, 1, 4, 4] last, float[1, 3, 4, 4] image)").replace("(src)", "(image)")
    for name, network in (("q", text), ("reference", REFERENCE)):
        onnx.save(onnx.parser.parse_model(network), tmp_path / f"{name}.onnx")
    peers.mend(tmp_path / "q.onnx", tmp_path / "reference.onnx")
    mended = onnx.load(tmp_path / "q.onnx")
    assert [i.name for i in mended.graph.input] == ["last", "src"]
    assert list(mended.graph.node[0].input) == ["src"]


def test_nodes_are_sorted_and_the_standard_operators_used(peers: ModuleType, tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> net (float[1, 3, 4, 4] src, float[1, 1, 4, 4]
        last) => (float[1, 1, 4, 4] pha, float[1, 1, 4, 4] next) <float scale = {0.01}, uint8 zero = {3}> {
        light = ReduceMean <axes = [1], keepdims = 1> (src)
        whole = com.microsoft.QuantizeLinear (sum, scale, zero)
        sum = Add (light, last)
        pha = com.microsoft.DequantizeLinear (whole, scale, zero)
        next = Mul (pha, pha) }"""
    onnx.save(onnx.parser.parse_model(REFERENCE), tmp_path / "reference.onnx")
    model = onnx.parser.parse_model(text)
    onnx.save(model, tmp_path / "q.onnx")
    peers.mend(tmp_path / "q.onnx", tmp_path / "reference.onnx")
    mended = onnx.load(tmp_path / "q.onnx")
    onnx.checker.check_model(mended, full_check=True)
    assert [n.op_type for n in mended.graph.node] == ["ReduceMean", "Add", "QuantizeLinear", "DequantizeLinear", "Mul"]
    assert {n.domain for n in mended.graph.node} == {""}
    feeds = {"src": np.random.default_rng(0).random((1, 3, 4, 4), np.float32),
             "last": np.ones((1, 1, 4, 4), np.float32)}
    order = [0, 2, 1, 3, 4]
    nodes = [model.graph.node[i] for i in order]
    in_order = onnx.helper.make_model(onnx.helper.make_graph(
        nodes, "net", model.graph.input, model.graph.output, model.graph.initializer),
        opset_imports=model.opset_import, ir_version=8)
    before, after = (ort.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
                     for m in (in_order, mended))
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cycle_is_an_error(peers: ModuleType, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(REFERENCE), tmp_path / "reference.onnx")
    onnx.save(onnx.parser.parse_model(REFERENCE.replace("Add (light, last)", "Add (next, last)")), tmp_path / "q.onnx")
    with pytest.raises(peers.ModelError, match="reads what nothing before it gives"):
        peers.mend(tmp_path / "q.onnx", tmp_path / "reference.onnx")


def test_other_outputs_are_an_error(peers: ModuleType, tmp_path: Path) -> None:
    tiny.save(tmp_path / "net.onnx")
    tiny.save(tmp_path / "other.onnx", foreground=False)
    with pytest.raises(peers.ModelError, match="its outputs are not the network's: pha"):
        peers.mend(tmp_path / "other.onnx", tmp_path / "net.onnx")


def test_states_are_recorded_in_closed_loop(peers: ModuleType, tmp_path: Path) -> None:
    path = Path(tiny.save(tmp_path / "net.onnx"))
    clips = {name: tiny.frames(3, seed=seed) for seed, name in enumerate(("a", "b"))}
    for name, pictures in clips.items():
        tiny.save_pictures(tmp_path / "calib" / name, pictures)
    (tmp_path / "frames").mkdir()
    peers.record_frames(path, [tmp_path / "calib"], 256, tmp_path / "frames")
    recorded = [np.load(p) for p in sorted((tmp_path / "frames").iterdir())]
    expected = [(frame, state) for pictures in clips.values()
                for frame, state in zip(pictures, [np.zeros((16, 24)), *tiny.alphas(pictures)[:-1]], strict=True)]
    assert len(recorded) == len(expected) == 6
    for found, (frame, state) in zip(recorded, expected, strict=True):
        assert set(found.files) == {"src", "last"}
        np.testing.assert_array_equal(found["src"][0], frame.astype(np.float32) / 255)
        np.testing.assert_allclose(found["last"][0, 0], state, atol=1e-6)


# ----------------------------------------------------------------------------------------- the whole


def test_the_table(peers: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                   ) -> None:
    arguments += ["--ours", str(tmp_path / "net.onnx")]
    assert peers.main(arguments) == 0
    text, said = capsys.readouterr()
    assert text == (tmp_path / "work" / "peers.md").read_text()
    first, plain, refused, ours = table(text)
    assert (first["tool"], plain["tool"], plain["version"], plain["variant"]) == ("FP32", "Fake", "1.2", "as it is")
    assert (plain["result"], ours["result"], ours["tool"], ours["variant"]) == ("worked", "worked", "vmq", "net.onnx")
    assert plain["MAD"] == first["MAD"] == ours["MAD"] != ""
    assert float(plain["to FP32"]) == 0.0
    assert plain["speed, 1 thread"].endswith(" x")
    assert plain["speed, 2 threads"].endswith(" x")
    assert (plain["convs in int8"], plain["integer share"]) == ("0", "0%")
    assert float(plain["minutes"]) < 1
    assert ours["minutes"] == "-"
    assert (refused["variant"], refused["result"]) == ("an &#124; error", "ValueError: no such operator")
    assert refused["MAD"] == refused["MB"] == refused["speed, 1 thread"] == ""
    assert "ValueError: no such operator" in said

    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json")}
    assert peers.main(arguments) == 0                                    # nothing is computed again
    assert capsys.readouterr().out == text
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").rglob("*.json")}
    assert (tmp_path / "work" / "models" / "asked").read_text().split() == ["plain", "refuses"]

    assert peers.main([*arguments, "--retry"]) == 0
    assert (tmp_path / "work" / "models" / "asked").read_text().split() == ["plain", "refuses", "refuses"]


@pytest.mark.usefixtures("quick")
def test_an_interrupted_run_continues(peers: ModuleType, arguments: list[str], tmp_path: Path,
                                      capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments += ["--ours"]
    real = peers.run_peer

    def interrupted(*args: Any) -> Any:
        if args[2] == "refuses":
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(peers, "run_peer", interrupted)
    assert peers.main(arguments) == 130
    assert "continues" in capsys.readouterr().err
    _, plain, refused = table((tmp_path / "work" / "peers.md").read_text())
    assert (plain["result"], refused["result"]) == ("worked", "not computed")

    monkeypatch.setattr(peers, "run_peer", real)
    assert peers.main(arguments) == 0
    assert (tmp_path / "work" / "models" / "asked").read_text().split() == ["plain", "refuses"]
    assert table(capsys.readouterr().out)[2]["result"] == "ValueError: no such operator"


def test_what_decides_a_row(peers: ModuleType, arguments: list[str], tmp_path: Path) -> None:
    """A change of the script, or of the frames, makes a row anew; a longer limit only one that was stopped."""
    peers.PEERS = (peers.Peer("Fake", "fake", ("fake==1.2",), {"plain": ""}),)
    asked = tmp_path / "work" / "models" / "asked"
    for changed, times in ((lambda: None, 1), (lambda: arguments.extend(["--limit", "40"]), 1),
                           (lambda: arguments.extend(["--frames", "4"]), 2),
                           (lambda: (peers.SCRIPTS / "with_fake.py").write_text(FAKE + "\n"), 3)):
        changed()
        args = peers._parser().parse_args([*arguments, "--ours"])
        comparison = peers.Comparison(args.model, args.calib, args.frames, args.eval, args.cache, args.work,
                                      args.limit, args.effort)
        row, = peers.rows([], [], [], "fast")
        if comparison.record(row) is None:
            comparison.make(row)
        assert len(asked.read_text().split()) == times
    record = next((tmp_path / "work" / "models").glob("*.json"))
    kept = json.loads(record.read_text()) | {"stopped": True, "error": "not finished", "limit": 40.0}
    for path in (tmp_path / "work" / "models").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {k: kept[k] for k in ("stopped", "error", "limit")}))
    for limit, there in ((30.0, True), (40.0, True), (41.0, False)):
        comparison.limit = limit
        assert (comparison.record(row) is not None) is there


@pytest.mark.usefixtures("quick")
def test_an_environment_that_does_not_install(peers: ModuleType, arguments: list[str], tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
                                              ) -> None:
    asked = []

    def refuse(*args: Any) -> Path:
        asked.append(args)
        raise subprocess.CalledProcessError(1, ["pip"], stderr="looking\nERROR: No matching distribution for fake\n\n")

    monkeypatch.setattr(peers, "environment", refuse)
    assert peers.main([*arguments, "--ours"]) == 0
    assert [row["result"] for row in table(capsys.readouterr().out)[1:]] == [
        "does not install: ERROR: No matching distribution for fake"] * 2
    assert len(asked) == 1
    assert not (tmp_path / "work" / "frames").exists()


@pytest.mark.usefixtures("quick")
def test_a_model_that_does_not_run_is_a_row(peers: ModuleType, arguments: list[str], tmp_path: Path,
                                            capsys: pytest.CaptureFixture[str]) -> None:
    broken = onnx.parser.parse_model(REFERENCE.replace("Mul (pha, pha)", "Absent (pha)"))
    onnx.save(broken, tmp_path / "broken.onnx")
    peers.PEERS = ()
    assert peers.main([*arguments, "--ours", str(tmp_path / "broken.onnx")]) == 0
    first, row = table(capsys.readouterr().out)
    assert (first["MAD"], first["dtSSD"], first["to FP32"]) == ("1.50", "2.50", "0.25")
    assert row["result"] == "does not run: no operator Absent"
    assert row["MB"] == "0.00"
    assert row["MAD"] == row["speed, 1 thread"] == ""


def test_vmq_compiles_beside_them(peers: ModuleType, arguments: list[str], quick: list[list[str]],
                                  capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peers.PEERS = ()
    assert peers.main([*arguments, "--bits", "w4a8", "4", "--effort", "fast"]) == 0
    made, failed = table(capsys.readouterr().out)[1:]
    assert (made["tool"], made["variant"], made["minutes"]) == ("vmq", "W4A8, --effort fast", "1.5")
    assert (failed["variant"], failed["result"]) == ("W4A4, --effort fast", "too few bits")
    compiled = quick[1]
    assert compiled[compiled.index("--calib") + 1] == str(tmp_path / "calib")
    assert compiled[compiled.index("--effort") + 1] == "fast"


@pytest.mark.parametrize(("words", "error"), [
    (["--only", "nobody"], "--only nobody is no peer; give some of fake"),
    (["--limit", "0"], "--limit 0.0: give more than 0"),
    (["--model", "none.onnx"], "none.onnx is no file"),
    (["--eval", "nowhere"], "there is no footage at")])
def test_mistakes(peers: ModuleType, arguments: list[str], words: list[str], error: str,
                  capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main([*arguments, *words]) == 2
    assert error in capsys.readouterr().err


def test_every_peer_has_its_script() -> None:
    """And no script has a name that hides a package from it."""
    sys.path.insert(0, str(TOOLS))
    try:
        module = importlib.import_module("peers")
    finally:
        sys.path.remove(str(TOOLS))
    scripts = {path.stem.removeprefix("with_") for path in module.SCRIPTS.glob("with_*.py")}
    assert {peer.script for peer in module.PEERS} == scripts
    assert all("==" in peer.packages[0] for peer in module.PEERS)
    assert os.access(TOOLS / "peers", os.X_OK)
