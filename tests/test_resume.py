"""A compile that is killed and resumed writes the bytes of one that was left alone."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiling import clips, network
from tiny_matting import save_pictures

import vmq
from vmq.cli import main
from vmq.errors import OutputError
from vmq.lanes import Lanes
from vmq.spec import EFFORTS

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = dataclasses.replace(EFFORTS["fast"], name="tiny", calibration=8, bias_frames=4, sequences=3, frames=2,
                           block_iterations=8, steps=6, batch=2, unrolled=2, gates=3, loop_frames=8)

RECIPE = """range_steps = 20

[blocks]
learn = ["rounding", "weight_scale", "scale", "zero", "bias"]
drop = 0.5

[network]
learn = ["weight", "weight_scale", "scale", "zero", "bias"]
length = 5
l1 = 1.0
state = 0.5
flow = 0.05
weight_rate = 0.02
scale_rate = 5e-3
bias_rate = 0.02
"""

# The command line, with an effort that it does not know by itself, on another number of threads than here.
CHILD = f"""
import dataclasses, sys, types
import torch
import vmq.spec
torch.set_num_threads(2)
tiny = vmq.spec.Effort(**{dataclasses.asdict(TINY)!r})
vmq.spec.EFFORTS = types.MappingProxyType({{"tiny": tiny, **vmq.spec.EFFORTS}})
from vmq.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True, scope="module")
def effort() -> Iterator[None]:
    """An effort of seconds, also in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[vmq.Result.__module__], "EFFORTS", {**EFFORTS, "tiny": TINY})
        yield


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, footage, a recipe and what a compile that was left alone writes."""
    folder = tmp_path_factory.mktemp("work")
    network().save(folder / "model.onnx")
    (folder / "recipe.toml").write_text(RECIPE)
    for clip in clips(2, 6):
        save_pictures(folder / "footage" / clip.name, clip.frames())
    return folder


@pytest.fixture(scope="module")
def undisturbed(work: Path) -> bytes:
    assert main(command(work, work / "alone.onnx")) == 0
    assert sorted(p.name for p in work.iterdir()) == ["alone.onnx", "footage", "model.onnx", "recipe.toml"]
    return (work / "alone.onnx").read_bytes()


def command(work: Path, output: Path, *more: str) -> list[str]:
    return ["compile", str(work / "model.onnx"), "--bits", "4", "--recipe", str(work / "recipe.toml"),
            "--effort", "tiny", "--calib", str(work / "footage"), "-o", str(output), "--quiet", *more]


def kept(output: Path) -> list[str]:
    """What is kept for a resumed run, without the key and without files that are being written."""
    folder = Path(f"{output}.unfinished")
    return sorted(p.stem.partition("-")[2] for p in folder.glob("[!.]*.npz")) if folder.is_dir() else []


def kill_when(arguments: list[str], output: Path, enough: str | int) -> list[str]:
    """Run the command line and kill it when so many files, or a file of this name, are kept; returns what is kept."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], env=environment, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    try:
        ends = time.monotonic() + 120
        while child.poll() is None and time.monotonic() < ends:
            found = kept(output)
            if (enough in found) if isinstance(enough, str) else len(found) >= enough:
                break
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        said = child.stderr.read()
        child.stderr.close()
        code = child.wait()
    assert code == -signal.SIGKILL, said
    return kept(output)


def test_killed_three_times_and_resumed(work: Path, undisturbed: bytes, tmp_path: Path):
    out = tmp_path / "out.onnx"
    first = kill_when(command(work, out), out, 1)
    assert first
    assert set(first) < {f"blocks-0-{k}" for k in range(4)}
    second = kill_when(command(work, out, "--resume"), out, 3)
    assert set(first) < set(second)
    third = kill_when(command(work, out, "--resume"), out, "network")
    assert third == [*(f"blocks-0-{k}" for k in range(4)), "network"]
    assert not out.exists()
    shutil.copytree(f"{out}.unfinished", f"{tmp_path}/other.onnx.unfinished")
    assert main(command(work, out, "--resume")) == 0
    assert out.read_bytes() == undisturbed
    assert not Path(f"{out}.unfinished").exists()
    other = tmp_path / "other.onnx"                           # and without --resume, from the same ruins
    assert kept(other) == third
    assert main(command(work, other)) == 0
    assert other.read_bytes() == undisturbed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.onnx", "out.onnx"]


def stop(monkeypatch: pytest.MonkeyPatch, work: Path, out: Path, steps: int, **options: object) -> None:
    """Compile until so many gradients have been taken."""
    real, left = Lanes.gradients, [steps]

    def gradients(*arguments: object) -> float:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Lanes, "gradients", gradients)
        with pytest.raises(KeyboardInterrupt):
            compile_again(work, out, **options)


def compile_again(work: Path, out: Path, **options: object) -> vmq.Result:
    arguments = {"bits": 4, "recipe": str(work / "recipe.toml"), "effort": "tiny", "calib": work / "footage",
                 "output": out, **options}
    return vmq.compile(work / "model.onnx", **arguments)  # type: ignore[arg-type]


def test_an_interrupted_compile_leaves_its_work_and_nothing_else(work: Path, undisturbed: bytes, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.onnx"
    out.write_bytes(b"precious")
    stop(monkeypatch, work, out, 20)                          # in the third block
    assert kept(out) == ["blocks-0-0", "blocks-0-1"]
    assert out.read_bytes() == b"precious"
    stop(monkeypatch, work, out, 16 + 3, resume=True)         # two blocks more, and a gate
    assert kept(out) == [*(f"blocks-0-{k}" for k in range(4)), "network"]
    result = compile_again(work, out, resume=True)
    assert out.read_bytes() == result.graph.to_bytes() == undisturbed
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_work_of_another_kind_is_not_taken_up(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "out.onnx"
    stop(monkeypatch, work, out, 8)
    entry, = Path(f"{out}.unfinished").iterdir()
    changed = tmp_path / "recipe.toml"
    changed.write_text(RECIPE.replace("drop = 0.5", "drop = 0.25"))
    for number, options in enumerate(({"seed": 1}, {"recipe": str(changed)})):
        stop(monkeypatch, work, out, 8, resume=True, **options)
        assert entry.exists()                                 # left, but not read
        assert len(kept(out)) == 2 + number
    stop(monkeypatch, work, out, 0, resume=True)
    assert len(kept(out)) == 3
    stop(monkeypatch, work, out, 0)                           # afresh
    assert kept(out) == []


def test_the_folder_of_somebody_else_is_found_before_the_work(work: Path, tmp_path: Path):
    out = tmp_path / "out.onnx"
    mine = Path(f"{out}.unfinished") / "letter.txt"
    mine.parent.mkdir()
    mine.write_text("dear")
    with pytest.raises(OutputError, match=r"out\.onnx\.unfinished is in the way"):
        compile_again(work, out)
    assert mine.read_text() == "dear"
