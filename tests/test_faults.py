"""Full disks, no memory, footage that changes, a second process: a clear error, and never a wrong or broken output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from compiling import clips, network
from test_resume import RECIPE, TINY
from tiny_matting import save_pictures

import vmq
from passes import reconstruct_blocks
from vmq.errors import MediaError, OutputError
from vmq.lock import locked
from vmq.pipeline import Observer
from vmq.spec import EFFORTS

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[1]
MSE = 'range_steps = 20\ncorrect_biases = false\n'
BLOCKS = RECIPE.partition("[network]")[0]


@pytest.fixture(autouse=True)
def effort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[vmq.Result.__module__], "EFFORTS", {**EFFORTS, "tiny": TINY})


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a model, footage and recipes."""
    monkeypatch.chdir(tmp_path)
    network().save("model.onnx")
    Path("mse.toml").write_text(MSE)
    Path("blocks.toml").write_text(BLOCKS)
    for clip in clips(2, 4):
        save_pictures(Path("footage") / clip.name, clip.frames())
    return tmp_path


def compiled(recipe: str = "mse.toml", output: str | None = "out.onnx", **options: Any) -> bytes:
    """What a compile returns; it is also in the file."""
    made = vmq.compile("model.onnx", bits=4, recipe=recipe, effort="tiny", calib="footage", output=output,
                       **options).graph.to_bytes()
    assert output is None or Path(output).read_bytes() == made
    return made


GIVEN = {"model.onnx", "mse.toml", "blocks.toml", "footage"}


def left() -> set[str]:
    """What is in the folder beside what was given."""
    return {p.name for p in Path().iterdir()} - GIVEN


# --------------------------------------------------------------------------------------------------------- two at once


def holder(target: str) -> subprocess.Popen[str]:
    """A process that holds the lock of a target."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys, time; from pathlib import Path; from vmq.lock import locked\n"
                               f"with locked([Path({target!r})]):\n print('held', flush=True); time.sleep(600)"],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


@pytest.mark.parametrize("target", ["out.onnx", "dump"])
def test_two_compiles_into_one_place(target: str):
    options = {"dump": "dump"} if target == "dump" else {}
    child = holder(target)
    try:
        with pytest.raises(OutputError, match=rf"{target} is being written by another process \({child.pid}\); wait"):
            compiled(**options)
        assert left() == {f".{target}.lock"}
        compiled(output="other.onnx")                       # elsewhere is free
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()  # type: ignore[union-attr]
    compiled(**options)                                     # the lock of a dead process is none
    assert left() == {"out.onnx", "other.onnx", *options}


def test_file_and_dump_of_one_name():
    with pytest.raises(OutputError, match=r"-o out\.onnx and --dump \./out\.onnx are one name; .* give it another"):
        compiled(dump="./out.onnx")
    assert left() == set()


def test_a_lock_goes_with_its_file(tmp_path: Path):
    with locked([tmp_path / "a", tmp_path / "b"]):
        assert {".a.lock", ".b.lock"} <= left()
        with pytest.raises(OutputError, match=rf"a is being written by another process \({os.getpid()}\)"), \
                locked([tmp_path / "b" / ".." / "a"]):
            pass
    with locked([tmp_path / "a"]):
        pass
    assert left() == set()


# ----------------------------------------------------------------------------------------------------------- full disk


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
import vmq.spec
tiny = vmq.spec.Effort(**{tiny!r})
vmq.spec.EFFORTS = {{"tiny": tiny}}
from vmq.cli import main
sys.exit(main(["compile", "model.onnx", "--bits", "4", "--recipe", {recipe!r}, "--effort", "tiny", "--calib", "footage",
               "-o", "out.onnx", "-q", *{more!r}]))
"""


@pytest.mark.parametrize(("recipe", "limit", "more", "said", "kept"), [
    ("mse.toml", 4096, [], "cannot write out.onnx: File too large; make room", {"out.onnx"}),
    ("blocks.toml", 256, [], "cannot keep unfinished work in out.onnx.unfinished", {"out.onnx", "out.onnx.unfinished"}),
    ("mse.toml", 4096, ["--dump", "dump"], "cannot write dump/00_input.onnx: File too large", {"out.onnx", "dump"}),
])
def test_no_room(recipe: str, limit: int, more: list[str], said: str, kept: set[str]):
    """Files that end at so many bytes, as on a full disk: what was there stays, nothing half-written comes."""
    Path("out.onnx").write_bytes(b"precious")
    script = FULL.format(limit=limit, tiny=vars(TINY), recipe=recipe, more=more)
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"vmq: error: {said}")
    assert done.stderr.count("\n") == 1
    assert Path("out.onnx").read_bytes() == b"precious"
    assert left() == kept
    assert all(not list(Path(name).glob("*.onnx")) + list(Path(name).glob("*.npz")) for name in kept - {"out.onnx"})
    if recipe == "blocks.toml":
        assert compiled(recipe, resume=True) == compiled(recipe, output=None)     # with room again


def test_no_room_for_what_enters_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reconstruct_blocks, "MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match=r"cannot keep .* of what enters blocks .*No space left.*set TMPDIR"):
        compiled("blocks.toml")
    assert left() == set()


def test_no_memory_for_what_enters_blocks(monkeypatch: pytest.MonkeyPatch):
    """It goes to files instead, and the result is the same."""
    want, real, refused = compiled("blocks.toml"), torch.empty, []

    def empty(*shape: Any, **options: Any) -> torch.Tensor:
        if shape and isinstance(shape[0], tuple) and len(shape[0]) > 4:      # [sequence, frame, 1, C, H, W]
            refused.append(shape)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate many bytes")
        return real(*shape, **options)

    monkeypatch.setattr(torch, "empty", empty)
    assert compiled("blocks.toml", "again.onnx") == want
    assert len(refused) > 4


# ------------------------------------------------------------------------------------------- footage that does not stay


class Meddler(Observer):
    """Does something after the first pass."""

    def __init__(self, act: Any) -> None:
        self.act = act

    def after(self, index: int, *_: Any) -> None:
        if index == 1:
            self.act(sorted(Path("footage").rglob("*.png")))


def overwrite(files: list[Path]) -> None:
    cv2.imwrite(str(files[3]), np.full((32, 48, 3), 7, np.uint8))


def append(files: list[Path]) -> None:
    cv2.imwrite(str(files[0].with_name("9999.png")), np.full((32, 48, 3), 7, np.uint8))


@pytest.mark.parametrize("act", [overwrite, append])
def test_footage_that_changes_underneath(act: Any):
    Path("out.onnx").write_bytes(b"precious")
    with pytest.raises(MediaError, match=r"footage.*\.png changed while .* nothing was written"):
        compiled(observers=[Meddler(act)])
    assert Path("out.onnx").read_bytes() == b"precious"


def test_footage_behind_a_link_that_changes_underneath(work: Path):
    (work / "footage").rename(work / "real")
    (work / "footage").mkdir()
    for folder in (work / "real").iterdir():
        (work / "footage" / folder.name).symlink_to(folder)
    with pytest.raises(MediaError, match=r"footage.*\.png changed while .* nothing was written"):
        compiled(observers=[Meddler(lambda _: overwrite(sorted((work / "real").rglob("*.png"))))])
    assert left() == {"real"}


def test_footage_that_goes_away():
    with pytest.raises(MediaError, match=r"0003\.png cannot be read"):
        compiled(observers=[Meddler(lambda files: files[3].unlink())])
    assert left() == set()


def test_what_was_learned_on_other_footage_is_not_resumed():
    with pytest.raises(MediaError):
        compiled("blocks.toml", observers=[Meddler(overwrite)])
    kept = {p.name for p in Path("out.onnx.unfinished").iterdir()}
    assert kept
    made = compiled("blocks.toml", resume=True)
    assert made == compiled("blocks.toml", output=None)
    assert left() == {"out.onnx"}
