"""Does a compiled model run where it is meant to run, and give the same alpha as on this processor?

    qnn         Qualcomm's HTP in emulation: a session is made only if the NPU takes every node
    openvino    OpenVINO's CPU plugin, with its speed beside ONNX Runtime's own CPU kernels
    arm         aarch64 in emulation (qemu-user), compared bit by bit with this processor at the same release; where
                bits differ, so is every operator by itself, on the same integers

Each has an environment of its own in a cache folder, made at first use. Emulation says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vmq.clips import open_clips, to_float
from vmq.errors import ModelError, OptionError, VmqError
from vmq.runtime import Session
from vmq.synthetic import synthetic_clips

PACKAGES: Mapping[str, tuple[str, ...]] = {
    "qnn": ("onnxruntime==1.31.1", "onnxruntime-qnn==2.7.0", "numpy"),
    "openvino": ("onnxruntime-openvino==1.24.1", "numpy<2.3"),
    "arm": ("onnxruntime==1.26.0", "numpy==2.2.6"),       # later releases crash in the emulator at import
}
"""What each environment holds."""

DEBIAN = "bookworm"
DEBIAN_ARM = ("python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libc6", "libstdc++6", "libgcc-s1",
              "libgomp1", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5")
"""Debian packages that Python needs on aarch64."""
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
LOOP = Path(__file__).with_name("closed_loop.py")
GIVEN = "_given"
EXPLAINED = 4
"""Frames over which operators are compared one by one."""


@dataclass(frozen=True)
class Quantizer:
    """A QuantizeLinear: what makes the value that it reads, that value, and its scale."""

    kind: str
    value: str
    scale: NDArray[np.float32]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; see the module for the three targets."""
    parser = argparse.ArgumentParser(prog="tools/check_TARGET", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="target", required=True, metavar="qnn|openvino|arm")
    for name in PACKAGES:
        command = commands.add_parser(name, prog=f"tools/check_{name}")
        command.add_argument("model", type=Path, metavar="MODEL.onnx", help="a compiled model")
        command.add_argument("--frames", type=int, default={"qnn": 3, "openvino": 16, "arm": 16}[name], metavar="N")
        command.add_argument("--clip", type=Path, help="a video or a folder of frames (default: a built-in clip)")
        command.add_argument("--cache", type=Path, default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "vmq",
                             metavar="DIR", help="where environments are kept (default: ~/.cache/vmq)")
        if name == "arm":
            command.add_argument("--cpu", action="append", metavar="MODEL",
                                 help="emulated processor, as qemu calls it; repeatable (default: cortex-a76)")
        else:
            command.add_argument("--reference", type=Path, metavar="FP32.onnx",
                                 help="the float network at the same size: says how far both are from it")
            command.add_argument("--threads", type=int, default=1, metavar="N")
        if name == "qnn":
            command.add_argument("--soc-model", type=int, default=57, metavar="N",
                                 help="Qualcomm's number of the chip (default: 57, Snapdragon 8 Gen 3)")
    args = parser.parse_args(arguments)
    if args.frames < 1:
        parser.error(f"--frames {args.frames}: give 1 or more")
    args.cache = args.cache.expanduser()
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Check one model; returns the exit code: 0 accepted (arm: no bit differs), 1 not, 2 an error."""
    args = parse(arguments)
    try:
        work = args.cache / args.target
        work.mkdir(parents=True, exist_ok=True)
        frames = _frames(args.model, args.clip, args.frames, work / f"frames_{os.getpid()}.npy")
        try:
            return _arm(args, work, frames) if args.target == "arm" else _provider(args, work, frames)
        finally:
            frames.unlink()
    except VmqError as error:
        print(f"check_{args.target}: error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        print(f"check_{args.target}: error: `{' '.join(map(str, error.cmd))[:300]}` ended with {error.returncode}"
              + (f": {said[-1]}" if said else ""), file=sys.stderr)
        return 2


def _frames(model: Path, clip: Path | None, count: int, path: Path) -> Path:
    """Frames of the model's size as a file, float32 [count,3,H,W]; a clip that is shorter begins again."""
    height, width = Session(str(model)).size
    if not height or not width:
        raise ModelError(f"{model} takes any size; give a model that `vmq compile` wrote")
    source = open_clips([clip], (height, width))[0] if clip else synthetic_clips((height, width), count=1,
                                                                                frames=count)[0]
    frames = [to_float(f) for f in source.frames(0, count)]
    np.save(path, np.stack([frames[i % len(frames)] for i in range(count)]))
    return path


def _provider(args: argparse.Namespace, work: Path, frames: Path) -> int:
    print(f"{', '.join(PACKAGES[args.target])}" + (f"; soc_model {args.soc_model}, emulated" if args.target == "qnn"
                                                   else ""), flush=True)
    command: list[str | Path] = [environment(work, PACKAGES[args.target]), LOOP, args.model, frames, "--provider",
                                 args.target, "--threads", str(args.threads)]
    if args.reference:
        command += ["--reference", args.reference]
    if args.target == "qnn":
        command += ["--soc-model", str(args.soc_model)]
    return subprocess.run(command).returncode


def _arm(args: argparse.Namespace, work: Path, frames: Path) -> int:
    python = environment(work, PACKAGES["arm"])
    emulated = _aarch64(work, python)
    here, there = work / "x86_64.npz", work / "aarch64.npz"
    print(f"{', '.join(PACKAGES['arm'])}, on both sides", flush=True)
    _call(python, LOOP, args.model, frames, "--record", here)
    found = 0
    for cpu in args.cpu or ["cortex-a76"]:
        def emulate(*words: str | Path, cpu: str = cpu) -> None:
            root = work / "root"
            subprocess.run([emulated, "-cpu", cpu, root / "usr/bin/python3.11", LOOP, *words], check=True,
                           env=os.environ | {"QEMU_LD_PREFIX": str(root), "PYTHONHOME": str(root / "usr"),
                                             "PYTHONPATH": str(work / "site")})

        emulate(args.model, frames, "--record", there)
        lines, count = differences(here, there)
        print(f"{cpu}: {count:,} values differ", *lines, sep="\n  ", flush=True)
        if count:
            _explain(args.model, frames, lambda *words: _call(python, LOOP, *words), emulate, work)
        found += count
    return int(found > 0)


def _explain(model: Path, frames: Path, here: Callable[..., None], there: Callable[..., None], work: Path) -> None:
    """Print how each operator differs when both sides give it the same integers."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        place = Path(folder)
        few, given = place / "frames.npy", place / "given.npz"
        np.save(few, np.load(frames)[:EXPLAINED])
        quantizers = cut(model, place)
        here(place / "traced.onnx", few, "--record", place / "traced.npz")
        with np.load(place / "traced.npz") as traced:
            np.savez(given, **{f"{name}{GIVEN}": traced[name] for name in quantizers})
        for runs, name, parts in ((here, "here", "cut"), (there, "there", "cut"), (here, "floats", "floats")):
            runs(place / f"{parts}.onnx", few, "--record", place / f"{name}.npz", "--given", given)
        print("each operator on the same integers:", *apart(quantizers, place), sep="\n  ", flush=True)


def cut(model: Path, place: Path) -> dict[str, Quantizer]:
    """Write traced.onnx, which gives all its integers, and two models to which these are given where they are read.

    cut.onnx gives what each operator makes of them, floats.onnx the same before it is quantized.

    Returns:
        what is known of each QuantizeLinear, by the name of its result.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load(model))
    known = {v.name: v for v in proto.graph.value_info}
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    outputs = {v.name for v in proto.graph.output}
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    found = {n.output[0]: Quantizer(makers.get(n.input[0], "input"), n.input[0], constants[n.input[1]])
             for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.output[0] in known.keys() - outputs}
    proto.graph.output.extend(known[name] for name in found)
    onnx.save(proto, place / "traced.onnx")
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            if name in found:
                node.input[index] = f"{name}{GIVEN}"
    for name in found:
        value = proto.graph.input.add()
        value.CopyFrom(known[name])
        value.name = f"{name}{GIVEN}"
    onnx.save(proto, place / "cut.onnx")
    before = {q.value for q in found.values()} - outputs
    proto.graph.output.extend(known[name] for name in sorted(before & known.keys()))
    onnx.save(proto, place / "floats.onnx")
    return found


def apart(quantizers: Mapping[str, Quantizer], place: Path) -> list[str]:
    """A line for each kind of operator: how many values differ between here.npz and there.npz, and where they lay."""
    lines = []
    with np.load(place / "here.npz") as here, np.load(place / "there.npz") as there, \
            np.load(place / "floats.npz") as floats:
        for kind in sorted({q.kind for q in quantizers.values()}):
            values = odd = most = 0
            farthest = 0.0
            for name, quantizer in quantizers.items():
                if quantizer.kind != kind:
                    continue
                steps = np.abs(here[name].astype(np.int32) - there[name])
                values += steps.size
                if not steps.any():
                    continue
                odd, most = odd + int((steps > 0).sum()), max(most, int(steps.max()))
                exact = floats[quantizer.value][steps > 0].astype(np.float64) / quantizer.scale
                farthest = max(farthest, float(np.abs(np.abs(exact) % 1.0 - 0.5).max()))
            lines.append(f"{kind}: {odd:,} of {values:,} values differ"
                         + (f", by {most} at most; before rounding they lay within {farthest:.1e} steps of a half"
                            if odd else ""))
    return lines


def differences(one: Path, other: Path) -> tuple[list[str], int]:
    """What differs between two recorded runs, a line a frame, and how many values in all."""
    with np.load(one) as a, np.load(other) as b:
        lines, total = [], 0
        for index in range(len(a["alpha"])):
            alpha, twin = a["alpha"][index], b["alpha"][index]
            steps = np.abs(np.rint(alpha * 255) - np.rint(twin * 255)).max()
            names = [n for n in a.files if n != "alpha"]
            every = sum(int((a[n][index] != b[n][index]).sum()) for n in names)
            lines.append(f"frame {index + 1}: {int((alpha != twin).sum()):,} of {alpha.size:,} alpha values differ, by "
                         f"{int(steps)} 8-bit steps at most; {every:,} of {sum(a[n][index].size for n in names):,} "
                         "values of all outputs")
            total += every
    return lines, total


def environment(work: Path, packages: Sequence[str], limit: float | None = None) -> Path:
    """The Python of an environment in `work` that holds `packages`, made if it is not there yet.

    Raises:
        subprocess.SubprocessError: the packages cannot be installed (then what pip said of it is in `stderr`), or not
            within `limit` seconds.
    """
    folder, stamp = work / "venv", work / "venv" / "packages.txt"
    wanted = "\n".join(packages)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"setting up {folder}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        _call(sys.executable, "-m", "venv", folder)
        subprocess.run([folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                        *packages], check=True, stderr=subprocess.PIPE, text=True, timeout=limit)
        stamp.write_text(wanted)
    return folder / "bin/python"


def _aarch64(work: Path, python: Path) -> Path:
    """The emulator; beside it in `work`, Debian's Python for aarch64 in root/ and the wheels in site/."""
    packages = [*(f"{name}:arm64" for name in DEBIAN_ARM), "qemu-user-static:amd64"]
    stamp, wanted = work / "aarch64.txt", "\n".join([DEBIAN, *packages, *PACKAGES["arm"]])
    emulator = work / "host/usr/bin/qemu-aarch64-static"
    if stamp.is_file() and stamp.read_text() == wanted:
        return emulator
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            raise OptionError(f"{program} was not found; this check downloads Debian packages: run it on Debian or "
                              "Ubuntu on x86-64 (with debian-archive-keyring)")
    print(f"setting up aarch64 in {work}", file=sys.stderr)
    for name in ("root", "host", "site", "debs", "wheels", "apt"):
        shutil.rmtree(work / name, ignore_errors=True)
    for name in ("apt/state/lists/partial", "apt/cache/archives/partial", "debs", "site"):
        (work / name).mkdir(parents=True)
    (work / "apt/sources.list").write_text(
        f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {DEBIAN} main\n")
    (work / "apt/status").touch()
    settings = {"APT::Architecture": "amd64", "APT::Architectures": "amd64,arm64", "Dir::State": work / "apt/state",
                "Dir::State::status": work / "apt/status", "Dir::Cache": work / "apt/cache",
                "Dir::Etc::sourcelist": work / "apt/sources.list", "Dir::Etc::sourceparts": "/dev/null"}
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in settings.items())]
    if os.getuid() == 0:
        apt.append("-oAPT::Sandbox::User=root")
    _call(*apt, "update")
    subprocess.run([*apt, "download", *packages], check=True, cwd=work / "debs")
    for deb in (work / "debs").glob("*.deb"):
        _call("dpkg", "-x", deb, work / ("host" if deb.name.startswith("qemu") else "root"))
    _call(python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
          "--only-binary=:all:", "--python-version", "3.11", "-d", work / "wheels",
          *(word for p in PLATFORMS for word in ("--platform", p)), *PACKAGES["arm"])
    for wheel in (work / "wheels").glob("*.whl"):
        _call(python, "-m", "zipfile", "-e", wheel, work / "site")
    stamp.write_text(wanted)
    return emulator


def _call(*command: str | Path) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    sys.exit(main())
