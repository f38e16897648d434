"""The page that mattes in the browser: in headless Chromium, with files served from this machine."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import tiny_matting
from compiling import clips, network
from node_packages import ROOT, browse, node
from numpy.typing import NDArray

import vmq
from vmq.runtime import Session


def test_every_file_that_the_page_names_is_built(built: Path) -> None:
    files = json.loads((built / "files.json").read_text())
    assert sorted(files) == sorted(str(p.relative_to(built)) for p in built.rglob("*")
                                   if p.is_file() and p.name != "files.json")
    assert {"index.html", "page.mjs", "worker.mjs", "service.js", "metadata.mjs", "model.onnx",
            "ort/ort.wasm.min.mjs", "ort/ort-wasm-simd-threaded.mjs", "ort/ort-wasm-simd-threaded.wasm"} == set(files)


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """tools/web in a copy of the repository, with empty files for onnxruntime-web."""
    here = tmp_path / "repository"
    for name in ("docs/web", "docs/examples/node"):
        shutil.copytree(ROOT / name, here / name)
    (here / "tools").mkdir()
    (here / "out" / "npm").mkdir(parents=True)
    with tarfile.open(here / "out" / "npm" / "onnxruntime-web-1.30.0.tgz", "w:gz") as archive:
        for name in ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"):
            archive.addfile(tarfile.TarInfo(f"package/dist/{name}"))
    return Path(shutil.copy(ROOT / "tools" / "web", here / "tools" / "web"))


def contents(folder: Path) -> dict[str, str]:
    """Models and notes in a folder, by name."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*")
            if p.is_file() and (p.suffix == ".onnx" or p.name == "notes")}


def test_only_what_the_page_is_made_of_is_deleted(tool: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.onnx").write_text(name)
    page = tmp_path / "page"
    subprocess.run([tool, tmp_path / "one.onnx", page], check=True, capture_output=True)
    assert contents(page) == {"one.onnx": "one"}
    for name in ("mine.onnx", "ort/mine.onnx", "notes"):
        (page / name).write_text("mine")
    (page / "page.mjs").write_text("old")
    subprocess.run([tool, tmp_path / "two.onnx", page], check=True, capture_output=True)
    assert contents(page) == {"two.onnx": "two", "mine.onnx": "mine", "ort/mine.onnx": "mine", "notes": "mine"}
    assert (page / "page.mjs").read_bytes() == (ROOT / "docs" / "web" / "page.mjs").read_bytes()
    files = json.loads((page / "files.json").read_text())
    assert "two.onnx" in files
    assert not [f for f in files if "one" in f or "mine" in f or not (page / f).is_file()]


@pytest.mark.parametrize(("words", "said"), [
    (["models/a.onnx", "models"], "models holds other files than the page's"),
    (["a.onnx", "models"], "models holds other files than the page's"),
    (["a.onnx", "foreign"], "foreign holds other files than the page's"),
    (["page/a.onnx", "page"], "page/a.onnx is in page"),
    (["link.onnx", "page"], "link.onnx is in page"),
    (["b.onnx", "page"], "page/b.onnx is in the way"),
    (["a.onnx", "models/a"], "models/a is a file"),
    (["a.onnx", "page", "models"], "two folders"),
    (["a.onnx", "b.onnx", "page"], "two models"),
    (["--clean", "a.onnx"], "--clean is not known"),
    (["none.onnx", "page"], "none.onnx is not there")])
def test_nothing_is_lost_where_no_page_can_be_built(tool: Path, tmp_path: Path, words: list[str], said: str) -> None:
    here = tmp_path / "here"
    for name in ("models/a.onnx", "models/b.onnx", "models/a", "a.onnx", "b.onnx", "foreign/notes"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    (here / "foreign" / "files.json").write_text('["notes"]')
    subprocess.run([tool, here / "a.onnx", here / "page"], check=True, capture_output=True)
    (here / "page" / "b.onnx").write_text("mine")
    (here / "link.onnx").symlink_to(here / "page" / "a.onnx")
    before = contents(here)
    done = subprocess.run([tool, *words], cwd=here, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert contents(here) == before


def test_alpha_is_that_of_python(browser: Browser, compiled: Path) -> None:
    clip = list(clips(1, frames=5)[0].frames())
    found = browser.alpha(compiled, clip)
    assert found["ready"] == {"width": 48, "height": 32, "states": 1, "bits": "W4A4", "threads": 2}
    expected = python_alpha(compiled, clip)
    assert np.abs(found["alpha"] - expected).max() <= 1
    assert found["complaints"] == []
    frozen = np.concatenate([python_alpha(compiled, [frame]) for frame in clip])
    assert np.abs(frozen - expected).max() > 1, "this clip does not show whether states are looped"


def test_camera_by_keyboard_and_then_offline(browser: Browser, tmp_path: Path) -> None:
    found = browser("camera", tmp_path / "page.png")
    assert found["about"].endswith("MB, W4A4, 48x32, 1 states, 2 threads")
    assert found["isolated"]
    assert found["chosen"] == "blur"
    assert found["paused"] == "true"
    assert "frames per second" in found["speed"]
    assert found["complaints"] == []
    assert found["foreign"] == []
    picture = cv2.imread(str(tmp_path / "page.png"))
    assert picture.shape == (840, 720, 3)
    browser.server.shutdown()
    browser.server.server_close()
    later = browser("offline")
    assert later["about"] == found["about"]
    assert later["isolated"]
    assert later["complaints"] == []


def test_video_picture_and_alpha(browser: Browser, tmp_path: Path) -> None:
    writer = cv2.VideoWriter(str(tmp_path / "clip.webm"), cv2.VideoWriter.fourcc(*"VP80"), 10, (48, 32))
    for frame in clips(1, frames=6)[0].frames():
        writer.write(np.ascontiguousarray(frame[::-1].transpose(1, 2, 0)))
    writer.release()
    cv2.imwrite(str(tmp_path / "red.png"), np.full((20, 20, 3), (0, 0, 255), np.uint8))
    found = browser("files", tmp_path / "clip.webm", tmp_path / "red.png")
    assert found["complaints"] == []
    behind, alpha = (np.array(found[name]).reshape(32, 48, 4) for name in ("behind", "alpha"))
    assert (alpha[..., :1] == alpha[..., :3]).all()
    assert (alpha[..., 3] == 255).all()
    assert (behind[..., 3] == 255).all()
    little = alpha[..., 0] < 64                                   # the clip goes on between the two
    assert behind[little][:, 0].mean() > behind[little][:, 1:3].mean() + 50


def test_files_that_it_cannot_use(browser: Browser, tmp_path: Path, compiled: Path) -> None:
    (tmp_path / "text.onnx").write_text("this is no model")
    (tmp_path / "cut.onnx").write_bytes(compiled.read_bytes()[:5000])
    tiny_matting.save(tmp_path / "float.onnx")
    onnx.save(_with_states(tiny_matting.model(("h", "w")), {"last": "next"}), tmp_path / "free.onnx")
    files = [tmp_path / f"{name}.onnx" for name in ("text", "cut", "float", "free")]
    said = browser("refusals", *files)["said"]
    assert said[0] == "text.onnx cannot be used: this is not an ONNX file"
    assert said[1] == "cut.onnx cannot be used: this is not an ONNX file, or it is cut off"
    assert said[2] == "float.onnx cannot be used: the file does not say which states it has; compile it with vmq"
    assert said[3] == "free.onnx cannot be used: the model takes any size; compile it for one: --size 512x288"


@pytest.mark.slow
def test_alpha_of_rvm_is_that_of_python(browser: Browser, tmp_path: Path, shared: Path) -> None:
    subprocess.run([sys.executable, "-m", "models.rvm", "--weights", shared / "rvm" / "rvm_mobilenetv3.safetensors",
                    "--size", "160x96", "-o", tmp_path / "rvm.onnx"], check=True, cwd=ROOT)
    vmq.compile(tmp_path / "rvm.onnx", bits=4, recipe="mse", effort="fast", output=tmp_path / "model.onnx")
    clip = list(clips(1, frames=4, size=(96, 160))[0].frames())
    found = browser.alpha(tmp_path / "model.onnx", clip)
    assert np.abs(found["alpha"] - python_alpha(tmp_path / "model.onnx", clip)).max() <= 1


# ----------------------------------------------------------------------------------------------- machinery


class Browser:
    """Runs jobs of browser.mjs on a built page; one profile, so that it knows the page from earlier visits."""

    def __init__(self, folder: Path, server: http.server.ThreadingHTTPServer) -> None:
        self.folder, self.server = folder, server
        _write_y4m(folder / "camera.y4m", list(clips(1, frames=6)[0].frames()))

    def __call__(self, *words: object) -> dict[str, Any]:
        """What a job found."""
        return browse(f"http://127.0.0.1:{self.server.server_address[1]}/", self.folder, *words)

    def alpha(self, model: Path, frames: Sequence[NDArray[np.uint8]]) -> dict[str, Any]:
        """The page's alpha for every frame of a clip, [T,H,W], and what else it said."""
        rgba = [np.dstack([f.transpose(1, 2, 0), np.full(f.shape[1:], 255, np.uint8)]) for f in frames]
        file = self.folder / "frames.rgba"
        file.write_bytes(b"".join(f.tobytes() for f in rgba))
        found = self("alpha", model, file, rgba[0].size)
        found["alpha"] = np.stack([np.frombuffer(base64.b64decode(a), np.uint8).astype(int).reshape(frames[0].shape[1:])
                                   for a in found.pop("alphas")])
        return found


def python_alpha(model: Path, frames: Iterable[NDArray[np.uint8]]) -> NDArray[np.int_]:
    """8-bit alpha of a clip in Python, [T,H,W]."""
    session = Session(model)
    alphas = [session.alpha_of(session.step(frame)).astype(np.float64) for frame in frames]
    return np.floor(np.stack(alphas) * 255 + 0.5).astype(int)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "model.onnx"
    vmq.compile(network(), bits=4, recipe="mse", effort="fast", output=path)
    return path


@pytest.fixture(scope="module")
def built(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    node()
    folder = tmp_path_factory.mktemp("page")
    done = subprocess.run([str(ROOT / "tools" / "web"), str(compiled), str(folder)], capture_output=True, text=True,
                          check=False)
    if done.returncode and "npm" in done.stderr:
        pytest.skip(f"onnxruntime-web cannot be had: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def browser(built: Path, tmp_path: Path) -> Iterator[Browser]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Browser(tmp_path, server)
        server.shutdown()


def _with_states(model: onnx.ModelProto, pairs: dict[str, str]) -> onnx.ModelProto:
    model.metadata_props.add(key="vmq.states", value=json.dumps(pairs))
    return model


def _write_y4m(path: Path, frames: list[NDArray[np.uint8]]) -> None:
    """A clip as Chromium takes it for a camera; enlarged to the 640x480 of a small one."""
    parts = [b"YUV4MPEG2 W640 H480 F10:1 Ip A1:1 C420mpeg2\n"]
    for frame in frames:
        large = cv2.resize(np.ascontiguousarray(frame.transpose(1, 2, 0)), (640, 480))
        parts += [b"FRAME\n", cv2.cvtColor(large, cv2.COLOR_RGB2YUV_I420).tobytes()]
    path.write_bytes(b"".join(parts))
