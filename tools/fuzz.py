"""Hostile models, media, recipes, dumps: the answer is a result or one clear line, soon and in bounded memory.

Each case is made from its number: a small network with changed bytes or a changed structure, a picture or video or
recipe that is broken, a dump with a broken file, or any of these far larger than it should be (sparse, so that it takes
no room). A child process, forked from this one after the imports, gives it to `vmq compile`, `run`, `eval` or `inspect`
under a limit of memory and time. A find is a case that ends in another way than exit code 0 or 2 with one line, or
takes longer, or whose one line only repeats what Python said, or that it is out of memory. `--case N` runs a single
case again and shows what is said.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnx.parser

from vmq.cli import main as vmq_main
from vmq.clips import open_writer

UNCLEAR = re.compile(r"\b(Type|Key|Index|Attribute|Value|Runtime|Assertion|ZeroDivision|Overflow|Recursion|Unicode\w*)"
                     r"Error\b|Traceback|object has no attribute|NoneType|out of memory")
"""What a person should not have to read."""
EXTREMES = (0, 1, -1, 2, 7, 255, 65_536, 2**31 - 1, 2**31, -2**31, 2**40, 2**62, 2**63 - 1, -2**63)
NAMES = ("", "x", "src", "pha", "..", "../../etc/passwd", "a" * 100_000, "\0", "ä\u202e", "/dev/zero", "{}", "%s")
OPS = ("Conv", "Add", "Mul", "Concat", "Split", "Slice", "Resize", "Reshape", "Relu", "Sigmoid", "GlobalAveragePool",
       "Pad", "If", "Loop", "QuantizeLinear", "Gather", "MatMul", "Gemm", "Transpose", "Expand", "Tile", "Range",
       "ConstantOfShape", "Cast", "TopK", "NonZero", "LSTM", "SequenceEmpty", "StringNormalizer", "Nonsense",
       "BatchNormalization")

NETWORK = """<ir_version: 10, opset_import: ["": 17]> tiny (float[1,3,32,48] src, float[1,4,32,48] r)
        => (float[1,3,32,48] fgr, float[1,1,32,48] pha, float[1,4,32,48] s)
        <float[8,3,3,3] w0, float[8] b0, float[8,1,3,3] w1, float[4,12,3,3] w2, float[4,4,1,1] w3,
         int64[2] parts = {3, 1}> {
    first = Conv <pads = [1,1,1,1]> (src, w0, b0)
    a = HardSwish (first)
    deep = Conv <pads = [1,1,1,1], group = 8> (a, w1)
    b = Relu (deep)
    both = Concat <axis = 1> (b, r)
    mixed = Conv <pads = [1,1,1,1]> (both, w2)
    s = Tanh (mixed)
    head = Conv (s, w3)
    colour, alpha = Split <axis = 1> (head, parts)
    fgr = Add (src, colour)
    pha = Sigmoid (alpha)
}"""


def network() -> onnx.ModelProto:
    """The network that is changed: convolutions, a gate, a state."""
    text, rng = NETWORK, np.random.default_rng(0)
    weights = re.findall(r"float\[([\d,]+)\] (\w\d)", text)
    for _, name in weights:
        text = re.sub(rf",?\s*float\[[\d,]+\] {name}\b", "", text)
    model = onnx.parser.parse_model(text.replace("<,", "<"))
    for shape, name in weights:
        values = 0.3 * rng.normal(size=[int(n) for n in shape.split(",")])
        model.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return model


# ------------------------------------------------------------------------------------------------------------- changes


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut out, repeat, overwrite or cut off."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        if not content:
            break
        place, length = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(6)
        if kind == 0:
            content[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[place:place + length]
        elif kind == 2:
            content[place:place] = content[place:place + length]
        elif kind == 3:
            content[place:place + length] = rng.randbytes(min(length, len(content) - place))
        elif kind == 4:
            content[place:place + 8] = (rng.choice(EXTREMES) % 2**64).to_bytes(8, "little")
        else:
            del content[place:]
    return bytes(content)


def change_structure(model: onnx.ModelProto, rng: random.Random) -> None:
    """One or a few changes of the graph."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        with contextlib.suppress(ValueError, TypeError, IndexError):       # what protobuf itself refuses
            rng.choice(CHANGES)(model, rng)


def _change_values(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    names = [n for m in model.graph.node for n in (*m.input, *m.output)] + list(NAMES)
    where = rng.choice((node.input, node.output))
    where[rng.randrange(len(where))] = rng.choice(names)


def _change_nodes(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = model.graph.node
    node, kind = rng.choice(nodes), rng.randrange(6)
    if kind == 0:
        nodes.remove(node)
    elif kind == 1:
        nodes.append(node)
    elif kind == 2:
        node.op_type = rng.choice(OPS)
    elif kind == 3:
        node.domain = rng.choice(("com.microsoft", "ai.onnx.ml", "evil", "ai.onnx"))
    elif kind == 4:
        del rng.choice((node.input, node.output))[rng.randrange(2):]
    else:
        node.input.extend([rng.choice(NAMES)] * rng.choice((1, 3, 1000)))


def _change_attributes(model: onnx.ModelProto, rng: random.Random) -> None:
    node, kind = rng.choice(model.graph.node), rng.randrange(4)
    attributes = node.attribute
    if kind == 0 or not attributes:
        name = rng.choice(("group", "axis", "pads", "strides", "dilations", "kernel_shape", "auto_pad", "to", "perm"))
        number = rng.choice(EXTREMES)
        value = rng.choice((number, [number] * rng.randrange(1, 6), "text", 1e30, float("nan")))
        attributes.append(onnx.helper.make_attribute(name, value))
        return
    attribute = rng.choice(attributes)
    if kind == 1:
        attributes.remove(attribute)
    elif kind == 2:
        attribute.type = rng.randrange(12)
    elif attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(EXTREMES)
    else:
        attribute.i = rng.choice(EXTREMES)


def _change_shapes(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice([*model.graph.input, *model.graph.output])
    kind, dims = value.type.tensor_type, value.type.tensor_type.shape.dim
    what = rng.randrange(5)
    if what == 0:
        dims[rng.randrange(len(dims))].dim_value = rng.choice((*EXTREMES, 100_000, 30_000))
    elif what == 1:
        dims[rng.randrange(len(dims))].dim_param = rng.choice(NAMES)
    elif what == 2:
        kind.elem_type = rng.randrange(25)
    elif what == 3:
        dims.add().dim_value = rng.choice(EXTREMES)
    else:
        del dims[rng.randrange(len(dims)):]


def _change_weights(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor, kind = rng.choice(model.graph.initializer), rng.randrange(8)
    if kind == 0:
        model.graph.initializer.remove(tensor)
    elif kind == 1:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(EXTREMES)
    elif kind == 2:
        tensor.raw_data = tensor.raw_data[:rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == 3:
        tensor.data_type = rng.randrange(25)
    elif kind == 4:
        values = onnx.numpy_helper.to_array(tensor).copy()
        values.flat[rng.randrange(values.size)] = rng.choice((np.nan, np.inf, 3e38, 1e-45, -1e30))
        tensor.raw_data = values.tobytes()
    elif kind == 5:
        tensor.raw_data = bytes(len(tensor.raw_data))
    elif kind == 6:
        tensor.name = rng.choice(NAMES)
    else:
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, content in (("location", rng.choice((*NAMES, "/etc/passwd", "w.bin", "sub/../../w.bin", "link", "."))),
                             ("offset", str(rng.choice(EXTREMES))), ("length", str(rng.choice(EXTREMES)))):
            if rng.random() < 0.7:
                entry = tensor.external_data.add()
                entry.key, entry.value = key, content
        if rng.random() < 0.5:
            tensor.raw_data = b""


def _change_header(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        model.opset_import[0].version = rng.choice((*EXTREMES, 9, 11, 12, 13, 24))
    elif kind == 1:
        model.ir_version = rng.choice(EXTREMES)
    elif kind == 2:
        model.opset_import.add().domain = rng.choice(NAMES)
    elif kind == 3:
        states = rng.choice(('{"r": "s"}', "{", "[]", '{"a": 1}', "null", "1"))
        onnx.helper.set_model_props(model, {"vmq.states": states})
    else:
        del model.graph.output[rng.randrange(3):]


def _insert_growth(model: onnx.ModelProto, rng: random.Random) -> None:
    """A node that makes something huge of little."""
    place = rng.randrange(len(model.graph.node))
    node = model.graph.node[place]
    values = np.array([rng.choice((2, 1000, 100_000, 2**31, 2**40, -1, 0)) for _ in range(4)], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(values, "grown_by"))
    op = rng.choice(("Expand", "Tile", "Reshape", "ConstantOfShape", "Resize", "Pad"))
    inputs = {"ConstantOfShape": ["grown_by"], "Resize": [node.input[0], "", "", "grown_by"]}.get(
        op, [node.input[0], "grown_by"])
    model.graph.node.insert(place, onnx.helper.make_node(op, inputs, ["grown"]))
    model.graph.node[place + 1].input[0] = "grown"


CHANGES: Sequence[Callable[[onnx.ModelProto, random.Random], None]] = (
    _change_values, _change_nodes, _change_attributes, _change_shapes, _change_weights, _change_header, _insert_growth)


# --------------------------------------------------------------------------------------------------------------- cases


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
            _be_the_child(command, folder / "said", 1 << 33, 300.0)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise RuntimeError((folder / "said").read_text(errors="replace"))
        return cls(model, media, {p.name: p.read_bytes() for p in (folder / "dump").iterdir()})


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


@dataclass(frozen=True)
class Outcome:
    """How a case ended: "done", "refused", or what is wrong with it; and what was said."""

    kind: str
    verdict: str
    said: str
    seconds: float

    @property
    def is_find(self) -> bool:
        """Whether something is wrong."""
        return self.verdict not in ("done", "refused")


def run_case(number: int, seeds: Seeds, *, memory: int, seconds: float) -> Outcome:
    """Run a case in a child process with so many bytes of memory more than it starts with, and so much time."""
    folder = Path(tempfile.mkdtemp(prefix="vmq-fuzz-"))
    try:
        kind, command = make_case(number, seeds, folder)
        started, said = time.monotonic(), folder / "said"
        child = os.fork()
        if child == 0:
            _be_the_child(command, said, memory, seconds)
        status = _wait(child, started + 4 * seconds)
        elapsed = time.monotonic() - started
        words = said.read_text(errors="replace") if said.exists() else ""
        return Outcome(kind, _verdict(status, words), words, elapsed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _be_the_child(command: list[str], said: Path, memory: int, seconds: float) -> None:
    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(said.parent)
        code = vmq_main(command)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, until: float) -> int | None:
    """Exit status of a child; None for one that had to be killed."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _verdict(status: int | None, said: str) -> str:
    if status is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)):
        return "takes too long"
    if os.WIFSIGNALED(status):
        return f"dies of {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    if code == 0:
        return "done"
    if code != 2:
        return f"exit code {code}"
    lines = said.strip().splitlines()
    if len(lines) != 1 or not lines[0].startswith("vmq: error: ") or len(lines[0]) > 1500:
        return "not one line"
    return "unclear" if UNCLEAR.search(lines[0]) else "refused"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/fuzz", description=(__doc__ or "").partition("\n")[0],
                                     epilog="Exit code: 0 nothing found, 1 something was.")
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, metavar="N", help="how long (default: 10)")
    add("--cases", type=int, metavar="N", help="stop after so many cases")
    add("--first", type=int, default=0, metavar="N", help="number of the first case (default: 0)")
    add("--case", type=int, metavar="N", help="run this case alone, and show what is said")
    add("--memory", type=float, default=4.0, metavar="GIB", help="what a case may use (default: 4)")
    add("--seconds", type=float, default=60.0, metavar="N", help="processor time that a case may take (default: 60)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="vmq-fuzz-") as folder:
        seeds = Seeds.make(Path(folder))
    limits = {"memory": int(args.memory * 2**30), "seconds": args.seconds}
    if args.case is not None:
        outcome = run_case(args.case, seeds, **limits)
        print(f"case {args.case} ({outcome.kind}): {outcome.verdict}, {outcome.seconds:.1f} s\n{outcome.said}")
        return int(outcome.is_find)
    started, number = time.monotonic(), args.first
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    while time.monotonic() < started + 60.0 * args.minutes and number - args.first != args.cases:
        outcome = run_case(number, seeds, **limits)
        counts[outcome.kind, outcome.verdict] += 1
        if outcome.is_find:
            last = outcome.said.strip().splitlines()[-1:] or [""]
            print(f"case {number} ({outcome.kind}): {outcome.verdict}, {outcome.seconds:.1f} s: {last[0][:400]}",
                  flush=True)
        number += 1
    print(f"{number - args.first} cases in {(time.monotonic() - started) / 60.0:.1f} minutes: " + ", ".join(
        f"{count} {kind} {verdict}" for (kind, verdict), count in sorted(counts.items())))
    return int(any(verdict not in ("done", "refused") for _, verdict in counts))


if __name__ == "__main__":
    sys.exit(main())
