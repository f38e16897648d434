"""The examples of docs/examples: the same clip gives the same bytes in Python, JavaScript and C++."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from compiling import clips, network
from node_packages import ROOT, node, package

import vmq
from vmq.runtime import Session

EXAMPLES = ROOT / "docs" / "examples"
FRAMES = 5


@pytest.fixture(scope="module", params=[
    {"state": "float32"}, {"state": "uint8", "mean": 0.5, "std": (0.25, 0.2, 0.3)}], ids=["plain", "uint8-normalized"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "model.onnx"
    vmq.compile(network(), bits=4, recipe="mse", effort="fast", output=path, **request.param)
    session = ort.InferenceSession(str(path))
    assert ("tensor(uint8)" in {i.type for i in session.get_inputs()}) == (request.param["state"] == "uint8")
    assert ("vmq.normalization" in session.get_modelmeta().custom_metadata_map) == ("mean" in request.param)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.rgb"
    path.write_bytes(b"".join(np.ascontiguousarray(f.transpose(1, 2, 0)).tobytes()
                              for f in clips(1, frames=FRAMES)[0].frames()))
    return path


@pytest.fixture(scope="module")
def expected(model: Path) -> bytes:
    session = Session(model)
    alphas = [session.alpha_of(session.step(f)).astype(np.float64) for f in clips(1, frames=FRAMES)[0].frames()]
    return np.floor(np.stack(alphas) * 255 + 0.5).astype(np.uint8).tobytes()


def run(command: list[str | Path], clip: Path) -> bytes:
    with clip.open("rb") as frames:
        done = subprocess.run(command, stdin=frames, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_python(model: Path, clip: Path, expected: bytes) -> None:
    assert run([sys.executable, EXAMPLES / "python" / "matte.py", model], clip) == expected
    assert len(set(expected)) > 10


def test_javascript(model: Path, clip: Path, expected: bytes, tmp_path: Path) -> None:
    packages = package("onnxruntime-node")
    here = shutil.copytree(EXAMPLES / "node", tmp_path / "node")
    (here / "node_modules").symlink_to(packages / "node_modules")
    assert run([node(), here / "matte.mjs", model], clip) == expected


def test_javascript_reads_metadata(model: Path) -> None:
    script = f"""import {{ readFileSync }} from "node:fs";
        import {{ readMetadata }} from "{EXAMPLES / 'node' / 'metadata.mjs'}";
        console.log(readMetadata(readFileSync("{model}"))["vmq.calibration"]);"""
    done = subprocess.run([node(), "--input-type=module", "-e", script], capture_output=True, text=True, check=True)
    metadata = ort.InferenceSession(str(model)).get_modelmeta().custom_metadata_map
    assert done.stdout.strip() == metadata["vmq.calibration"]


def test_cpp(model: Path, clip: Path, expected: bytes, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    library = next(Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if library is None:
        pytest.skip("the Python package has no libonnxruntime.so here")
    (tmp_path / "libonnxruntime.so.1").symlink_to(library)
    (tmp_path / "libonnxruntime.so").symlink_to(library)
    subprocess.run([compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", EXAMPLES / "cpp" / "matte.cc",
                    "-isystem", _headers(), "-L", tmp_path, "-lonnxruntime", f"-Wl,-rpath,{tmp_path}",
                    "-o", tmp_path / "matte"], check=True)
    assert run([tmp_path / "matte", model], clip) == expected
    refused = subprocess.run([tmp_path / "matte", tmp_path / "none.onnx"], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "none.onnx" in refused.stderr


def _headers() -> Path:
    """ONNX Runtime's C++ headers: ONNXRUNTIME_INCLUDE, the system's, or Debian's package unpacked under out/."""
    unpacked = ROOT / "out" / "debian"
    places = [Path(os.environ.get("ONNXRUNTIME_INCLUDE", "/none")), Path("/usr/include/onnxruntime"),
              unpacked / "usr" / "include" / "onnxruntime"]
    for place in places:
        if (place / "onnxruntime_cxx_api.h").exists():
            return place
    keys = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
    mirror = _debian_mirror()
    if mirror is None or not keys.exists():
        pytest.skip("ONNX Runtime's headers are not here: ONNXRUNTIME_INCLUDE=FOLDER names them")
    for folder in ("lists/partial", "cache/archives/partial", "parts"):
        (unpacked / folder).mkdir(parents=True, exist_ok=True)
    (unpacked / "status").touch()
    (unpacked / "parts" / "debian.sources").write_text(
        f"Types: deb\nURIs: {mirror}\nSuites: trixie\nComponents: main\nSigned-By: {keys}\n")
    own = [word for setting in (f"Dir::Etc::sourceparts={unpacked}/parts", "Dir::Etc::sourcelist=/dev/null",
                                f"Dir::State::lists={unpacked}/lists", f"Dir::State::status={unpacked}/status",
                                f"Dir::Cache={unpacked}/cache", "APT::Sandbox::User=root") for word in ("-o", setting)]
    for words in (["update"], ["download", "libonnxruntime-dev"]):
        done = subprocess.run(["apt-get", *own, *words], capture_output=True, text=True, check=False, cwd=unpacked)
        if done.returncode:
            pytest.skip(f"Debian's libonnxruntime-dev cannot be had: {done.stderr.strip()[-200:]}")
    subprocess.run(["dpkg", "-x", next(unpacked.glob("libonnxruntime-dev_*.deb")), unpacked], check=True)
    return places[-1]


def _debian_mirror() -> str | None:
    """The Debian mirror that this machine is set up for; its release may be older than the one with the headers."""
    if shutil.which("apt-get") is None:
        return None
    targets = subprocess.run(["apt-get", "indextargets", "--format", "$(REPO_URI)"], capture_output=True, text=True,
                             check=False).stdout.split()
    return next((uri for uri in targets if uri.rstrip("/").endswith("/debian")), None)
