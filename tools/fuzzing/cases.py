"""Cases, each made from its number: the files, and the command line that is given them."""

from __future__ import annotations

import os
import random
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx

from fuzzing.changes import EXTREMES, change_bytes, change_structure, network
from fuzzing.child import be_the_child
from vmq.writer import open_writer

KINDS = ("bytes", "structure", "structure", "structure", "media", "media", "recipe", "dump", "huge")
RECIPE = b"""range_norm = 2.4
range_steps = 20
samples = 2048
correct_biases = false

[blocks]
learn = ["rounding", "weight_scale", "scale", "zero", "bias"]
drop = 0.5
iterations = 100

[network]
learn = ["scale"]
length = 5
l1 = 1.0
"""
HUGE = (10**8, 10**9, 3 * 10**9, 64 * 10**9, 10**12)
"""Bytes that a file is made to have."""


@dataclass(frozen=True)
class Seeds:
    """What cases are made from.

    Attributes:
        model: the network, as a file's content.
        media: good pictures and videos, by file name.
        dump: the files of a good dump, by name.
    """

    model: bytes
    media: dict[str, bytes]
    dump: dict[str, bytes]

    @classmethod
    def make(cls, folder: Path) -> Seeds:
        """Make them, by way of a folder.

        Raises:
            RuntimeError: the dump cannot be made; holds what was said.
        """
        rng = np.random.default_rng(0)
        picture = rng.integers(0, 256, (32, 48, 3), np.uint8)
        media = {f"a{end}": bytes(cv2.imencode(end, picture)[1]) for end in (".png", ".jpg", ".bmp", ".tiff", ".webp")}
        with open_writer(folder / "a.mp4", 25.0, (32, 48)) as writer:
            for _ in range(6):
                writer.write(rng.integers(0, 256, (3, 32, 48), np.uint8))
        media["a.mp4"] = (folder / "a.mp4").read_bytes()
        writer = cv2.VideoWriter(str(folder / "a.avi"), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 25.0, (48, 32))
        for _ in range(6):
            writer.write(picture)
        writer.release()
        media["a.avi"] = (folder / "a.avi").read_bytes()
        model = network().SerializeToString()
        (folder / "model.onnx").write_bytes(model)
        (folder / "footage").mkdir()
        (folder / "footage" / "a.png").write_bytes(media["a.png"])
        command = ["compile", str(folder / "model.onnx"), "--recipe", "mse", "--effort", "fast", "--calib",
                   str(folder / "footage"), "--dump", str(folder / "dump"), "-o", str(folder / "out.onnx"), "-q"]
        child = os.fork()              # so that this process starts no threads, which a fork would lose
        if child == 0:
            be_the_child(command, folder / "said", 1 << 33, 300.0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise RuntimeError((folder / "said").read_text(errors="replace"))
        return cls(model, media, {p.name: p.read_bytes() for p in (folder / "dump").iterdir()})


def make_case(number: int, seeds: Seeds, folder: Path) -> tuple[str, list[str]]:
    """Write what a case needs into a folder; returns its kind, and the command line."""
    rng = random.Random(number)
    kind = rng.choice(KINDS)
    model, footage = folder / "model.onnx", folder / "footage"
    footage.mkdir()
    if kind == "dump":
        return kind, _dump_case(seeds, folder, rng)
    if kind == "recipe":
        return kind, _recipe_case(seeds, folder, rng)
    if kind == "huge":
        return kind, _huge_case(seeds, folder, rng)
    content, name = seeds.model, "a.png"
    if kind == "bytes":
        content = change_bytes(content, rng)
    elif kind == "structure":
        proto = onnx.load_from_string(content)
        change_structure(proto, rng)
        content = proto.SerializeToString()
        (folder / "w.bin").write_bytes(b"\0" * 100)
        (folder / "link").symlink_to("/dev/zero")
    model.write_bytes(content)
    if kind == "media":
        name = rng.choice(sorted(seeds.media))
    data = seeds.media[name]
    if kind == "media":
        data = change_bytes(data, rng)
        if rng.random() < 0.2:                       # another suffix than content
            name = rng.choice(sorted(seeds.media))
        if name.endswith(".png") and rng.random() < 0.3:
            size = rng.choice((0, 1, 65_535, 30_000, 2**31 - 1)).to_bytes(4, "big")
            header = data[12:16] + size + size + data[24:29]
            data = data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    (footage / name).write_bytes(data)
    often = 1 if kind == "media" else 3
    return kind, _command(rng.choice(("run", "eval", *["compile"] * often)), seeds, folder, name, rng)


def _command(what: str, seeds: Seeds, folder: Path, name: str, rng: random.Random) -> list[str]:
    """A command on model.onnx and footage/NAME of a folder."""
    model, footage, same = str(folder / "model.onnx"), folder / "footage", ["-q"]
    if what == "run":
        return ["run", model, str(footage / name), "-o", str(folder / "out"), *same]
    if what == "eval":
        (folder / "good.onnx").write_bytes(seeds.model)
        return ["eval", model, str(footage), "--reference", str(folder / "good.onnx"), *same]
    return ["compile", model, "--recipe", "mse", "--effort", "fast", "--bits", rng.choice(("8", "4")), "--calib",
            str(footage), "-o", str(folder / "out.onnx"), *same]


def _recipe_case(seeds: Seeds, folder: Path, rng: random.Random) -> list[str]:
    """A recipe with changed bytes, values or depth; the picture is missing, so that a good one ends soon."""
    (folder / "model.onnx").write_bytes(seeds.model)
    content, kind = RECIPE, rng.randrange(4)
    if kind == 0:
        content = change_bytes(content, rng)
    elif kind == 1:
        lines = content.splitlines()
        place = rng.choice([k for k, line in enumerate(lines) if b"=" in line])
        value = rng.choice((*map(str, EXTREMES), "1" + "0" * 400, "nan", "inf", "1e999", "true", "''", "[]", "{}",
                            "1979-05-27", "[[1]]"))
        lines[place] = lines[place].partition(b"=")[0] + b"= " + value.encode()
        content = b"\n".join(lines)
    elif kind == 2:
        deep = rng.choice((b"[", b"{a=", b"a.", b"'")) * rng.choice((100, 10_000, 300_000))
        content += b"\nnew = " + deep if deep[:2] != b"a." else b"\n" + deep + b"a = 1"
    else:
        content = b"\xff" * rng.choice((1, 1000)) + content
    (folder / "recipe.toml").write_bytes(content)
    return ["compile", str(folder / "model.onnx"), "--recipe", str(folder / "recipe.toml"), "--effort", "fast",
            "--calib", str(folder / "none"), "-o", str(folder / "out.onnx"), "-q"]


def _dump_case(seeds: Seeds, folder: Path, rng: random.Random) -> list[str]:
    """A dump one of whose files is broken, cut off, missing, huge, or another's."""
    dump = folder / "dump"
    dump.mkdir()
    for name, content in seeds.dump.items():
        (dump / name).write_bytes(content)
    file, kind = dump / rng.choice(sorted(n for n in seeds.dump if not n.endswith((".txt", ".diff")))), rng.randrange(5)
    if kind == 0:
        file.write_bytes(change_bytes(file.read_bytes(), rng))
    elif kind == 1:
        file.write_bytes(rng.choice((b"", b"[" * 100_000, b"{}", b"[1]", b"null", b"\xff")))
    elif kind == 2:
        file.unlink()
    elif kind == 3:
        os.truncate(file, rng.choice(HUGE))
    else:
        file.write_bytes(seeds.dump[rng.choice(sorted(seeds.dump))])
    return ["inspect", str(dump), "-q"]


def _huge_case(seeds: Seeds, folder: Path, rng: random.Random) -> list[str]:
    """A file that is far larger than it should be."""
    model, name = folder / "model.onnx", rng.choice(("a.png", "a.jpg", "a.bmp", "a.tiff", "a.webp", "a.mp4", "a.avi"))
    model.write_bytes(seeds.model)
    (folder / "footage" / name).write_bytes(seeds.media[name])
    what, size = rng.choice(("model", "weights", "media", "media", "recipe")), rng.choice(HUGE)
    command = _command(rng.choice(("compile", "run", "eval")), seeds, folder, name, rng)
    if what == "model":
        os.truncate(model, size)
    elif what == "weights":
        proto = onnx.load_from_string(seeds.model)
        tensor = rng.choice(proto.graph.initializer)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": "w.bin", **({"length": str(size)} if rng.random() < 0.5 else {})}.items():
            tensor.external_data.add(key=key, value=value)
        model.write_bytes(proto.SerializeToString())
        (folder / "w.bin").touch()
        os.truncate(folder / "w.bin", size)
    elif what == "media":
        os.truncate(folder / "footage" / name, size)
    else:
        (folder / "recipe.toml").write_bytes(RECIPE)
        os.truncate(folder / "recipe.toml", size)
        command = ["compile", str(model), "--recipe", str(folder / "recipe.toml"), "-o", str(folder / "out.onnx"), "-q"]
    return command
