"""Hostile models and media are refused in one line; what a pickle would do never happens."""

from __future__ import annotations

import os
import pickle
import re
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import tiny_matting

import vmq
from vmq.checkpoint import Checkpoint
from vmq.cli import main
from vmq.clips import open_clips
from vmq.errors import MediaError, ModelError
from vmq.graph import Graph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))

import fuzz
from fuzzing import cases, changes, child


class Bomb:
    """A pickle that, loaded, leaves a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, ("exploded", 0o755)


def external(folder: Path, **entries: str) -> Path:
    """The fuzzer's network with its first weight in another file."""
    model = changes.network()
    tensor = next(i for i in model.graph.initializer if i.name == "w0")
    (folder / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in ({"location": "w.bin"} | entries).items():
        tensor.external_data.add(key=key, value=value)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_stay_in_the_folder_and_are_bounded(tmp_path: Path):
    assert Graph.load(external(tmp_path)).value("w0").values.shape == (8, 3, 3, 3)
    with (tmp_path / "w.bin").open("r+b") as file:            # a sparse terabyte behind it is not read
        file.truncate(1 << 40)
    path = tmp_path / "m.onnx"
    assert Graph.load(path).value("w0").values.shape == (8, 3, 3, 3)
    for entries in ({"location": "/etc/passwd"}, {"location": "../w.bin"}, {"location": "none.bin"},
                    {"location": "/dev/zero"}, {"length": "-1"}, {"offset": str(2**62)}, {"offset": "x"}):
        with pytest.raises(ModelError, match=r"m\.onnx: its external data cannot be read"):
            Graph.load(external(tmp_path, **entries))
    assert Graph.load(external(tmp_path, length="864")).value("w0").values.shape == (8, 3, 3, 3)
    for length in ("300000000", "863", "0"):
        with pytest.raises(ModelError, match=rf"'w0' has 864 bytes by its type and shape, and {length} by its length"):
            Graph.load(external(tmp_path, length=length))
    model = onnx.load(external(tmp_path), load_external_data=False)
    next(i for i in model.graph.initializer if i.name == "w0").dims[0] = 10**9
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"its external data are 108\.0 GB, more than"):
        Graph.load(path)


def test_devices_and_pipes_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ModelError, match="is a device or a pipe"):
        Graph.load("/dev/zero")
    with pytest.raises(ModelError, match="is a device or a pipe"):
        Graph.load(tmp_path / "pipe.png")
    with pytest.raises(MediaError, match="is a device or a pipe"):
        open_clips([tmp_path / "pipe.png"])
    (tmp_path / "big.onnx").touch()
    os.truncate(tmp_path / "big.onnx", 1 << 40)
    with pytest.raises(ModelError, match=r"has 1099.5 GB, and an ONNX file at most 2"):
        Graph.load(tmp_path / "big.onnx")


def test_a_picture_that_claims_to_be_huge(tmp_path: Path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
                                     + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    with pytest.raises(MediaError, match=r"a\.png cannot be decoded"):
        open_clips([tmp_path / "a.png"])


def test_a_picture_of_too_many_bytes(tmp_path: Path):
    good = cv2.imencode(".png", np.zeros((32, 48, 3), np.uint8))[1].tobytes()
    for name in ("0.png", "1.png"):
        (tmp_path / name).write_bytes(good)
    clip, = open_clips([tmp_path])
    os.truncate(tmp_path / "1.png", 64_000_000_000)           # sparse
    with pytest.raises(MediaError, match=r"1\.png has 64\.0 GB, and a picture at most 0\.5: replace"):
        list(clip.frames())
    os.truncate(tmp_path / "0.png", 64_000_000_000)
    with pytest.raises(MediaError, match=r"0\.png has 64\.0 GB"):
        open_clips([tmp_path])


def test_a_huge_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Where frames end, and a terabyte of nothing begins, nobody searches for long; room between frames is no harm."""
    for name, codec in (("a.avi", "MJPG"), ("a.mp4", "mp4v")):
        writer = cv2.VideoWriter(str(tmp_path / name), cv2.CAP_FFMPEG,
                                      cv2.VideoWriter.fourcc(*codec), 25.0, (48, 32))
        for value in range(6):
            writer.write(np.full((32, 48, 3), 40 * value, np.uint8))
        writer.release()
    monkeypatch.setattr("vmq.videos.PATIENCE", 1.0)
    whole = (tmp_path / "a.avi").read_bytes()
    for content, said in ((whole, r"a\.avi: a search of 1 seconds found no further frame and no end of the video"),
                          (whole[:whole.rindex(b"\xff\xd8")], "found no further frame|only 5 of its 6 frames"),
                          (whole[:300], r"a\.avi cannot be decoded as a video")):
        (tmp_path / "a.avi").write_bytes(content)
        os.truncate(tmp_path / "a.avi", 1 << 40)
        started = time.monotonic()
        with pytest.raises(MediaError, match=said):
            open_clips([tmp_path / "a.avi"])
        assert time.monotonic() - started < 25.0              # OpenCV would take 30 seconds a search
    assert capfd.readouterr().err == ""
    data = (tmp_path / "a.mp4").read_bytes()
    index, room = data.rindex(b"moov") - 4, 100 * 10**9       # 100 GB between the frames and their index
    with (tmp_path / "a.mp4").open("wb") as file:
        file.write(data[:index] + struct.pack(">I4sQ", 1, b"free", room))
        file.seek(index + room)
        file.write(data[index:])
    clip, = open_clips([tmp_path / "a.mp4"])
    assert len(list(clip.frames())) == 6


def test_a_png_whose_checksums_are_wrong(tmp_path: Path):
    """OpenCV would give other pixels, or print what libpng thinks of them."""
    good = cv2.imencode(".png", np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))[1].tobytes()
    (tmp_path / "a.png").write_bytes(good)
    assert len(open_clips([tmp_path / "a.png"])) == 1
    (tmp_path / "a.png").write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(MediaError, match=r"a\.png is damaged \(\d+ bytes\): replace"):
        open_clips([tmp_path / "a.png"])


def test_a_model_for_huge_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    onnx.save(tiny_matting.model((30_000, 30_000)), tmp_path / "m.onnx")
    assert main(["compile", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "out.onnx"), "-q"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "is made for frames of 30000x30000, and that is more than vmq takes" in said


def test_pickles_are_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    bomb = pickle.dumps(Bomb())
    for name in ("model.onnx", "model.pth"):
        Path(name).write_bytes(bomb)
        with pytest.raises(ModelError, match="is not an ONNX model"):
            vmq.compile(name)
    Path("a.png").write_bytes(bomb)
    with pytest.raises(MediaError):
        open_clips(["a.png"])
    kept = Checkpoint(Path("out.unfinished"), "key", resume=True)
    kept.save("blocks", {"a": np.zeros(3)})
    entry, = Path("out.unfinished").iterdir()
    np.savez(entry, names=np.array(["a"]), a0=np.array([Bomb()], object))
    assert kept.load("blocks") is None
    assert not Path("exploded").exists()


def test_the_fuzzer_finds_nothing_in_its_first_cases():
    done = subprocess.run([sys.executable, fuzz.__file__, "--cases", "8", "--minutes", "3"], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(Path(vmq.__file__).parents[1])}, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"\d cases in ", done.stdout)


@pytest.mark.parametrize(("number", "kind", "command", "said"), [
    (0, "recipe", "compile", "recipe"), (11, "dump", "inspect", "probe.npz cannot be read"),
    (29, "huge", "eval", "a.png has 1000.0 GB"), (34, "huge", "compile", "recipe"),
    (56, "huge", "run", "a.png has 1000.0 GB")])
def test_cases_of_the_fuzzer(number: int, kind: str, command: str, said: str, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]):
    png = cv2.imencode(".png", np.zeros((32, 48, 3), np.uint8))[1].tobytes()
    media = {f"a.{end}": png for end in ("avi", "bmp", "jpg", "mp4", "png", "tiff", "webp")}
    dump = {"pipeline.json": b'{"finished": true, "passes": [], "options": {"pairs": {}}}', "probe.npz": b""}
    found, words = cases.make_case(number, cases.Seeds(changes.network().SerializeToString(), media, dump), tmp_path)
    assert (found, words[0]) == (kind, command)
    assert main(words) == 2
    line = capsys.readouterr().err
    assert said in line
    assert child.verdict(2 << 8, line) == "refused"


@pytest.mark.parametrize(("status", "said", "verdict"), [
    (0, "", "done"), (2 << 8, "vmq: error: no\n", "refused"), (1 << 8, "Traceback", "exit code 1"),
    (2 << 8, "a\nb\n", "not one line"), (2 << 8, "vmq: error: KeyError: 'x'\n", "unclear"), (11, "", "dies of SIGSEGV"),
    (2 << 8, "vmq: error: out of memory: use smaller frames\n", "unclear"), (None, "", "takes too long")])
def test_what_counts_as_a_find(status: int | None, said: str, verdict: str):
    assert child.verdict(status, said) == verdict
