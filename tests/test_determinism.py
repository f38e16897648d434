"""Every recipe writes the same bytes twice, and the number of frames does not decide what memory it takes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from compiling import clips, network
from test_resume import TINY

import vmq
from tools import determinism
from vmq.graph import Graph
from vmq.spec import EFFORTS

pytestmark = pytest.mark.usefixtures("one_thread")
LEAST = dataclasses.replace(TINY, block_iterations=2, steps=2, gates=1, sequences=2)
RECIPES = sorted(p.stem for p in (Path(vmq.__file__).parent / "recipes").glob("*.toml"))


@pytest.mark.parametrize("recipe", [r if r in ("vmq", "ptq4vm") else pytest.param(r, marks=pytest.mark.slow)
                                    for r in RECIPES])
def test_the_same_bytes_twice(recipe: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys.modules[vmq.Result.__module__], "EFFORTS", {**EFFORTS, "tiny": LEAST})
    monkeypatch.setattr(sys.modules[vmq.Result.__module__], "synthetic_clips", lambda *_, **__: clips(2, 5))
    made = [vmq.compile(network(), bits=4, recipe=recipe, effort="tiny", output=tmp_path / "out.onnx").graph.to_bytes()
            for _ in range(2)]
    assert made[0] == made[1]
    assert made[0] == (tmp_path / "out.onnx").read_bytes()


def test_processors_that_are_not_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(determinism.os, "sched_getaffinity", lambda _: {0, 1, 5})
    for count in ("4", "1"):
        assert determinism.main(["--processors", count, "none.onnx"]) == 2
        assert f"error: --processors {count}: 3 can be used here" in capsys.readouterr().err
    def compile_on(processors: int, *_: object) -> Graph:
        asked.append(processors)
        return network()

    asked: list[int] = []
    monkeypatch.setattr(determinism, "compile_on", compile_on)
    assert determinism.main(["--processors", "3", "none.onnx"]) == 0
    assert asked == [1, 1, 3, 3]


MEMORY = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from compiling import SIZE, network
from passes import PIPELINE
from vmq.clips import Clip
from vmq.pipeline import Context, run_passes
from vmq.spec import Bits, Options

def noise(start, stop):
    return (np.random.default_rng(n).integers(0, 256, (3, *SIZE), np.uint8) for n in range(start, stop))

count = int(sys.argv[1])
names = [p.name for p in PIPELINE]
context = Context(Options(bits=Bits(8, 8)), [Clip("noise", 25.0, SIZE, count, noise)])
run_passes(network(), PIPELINE[:names.index("calibrate_ranges") + 1], context)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_memory_does_not_grow_with_the_number_of_frames():
    """Ranges on eight times as many frames: the same number of samples is kept, up to the least of each frame."""
    few, many = (int(subprocess.run([sys.executable, "-c", MEMORY, str(count)], capture_output=True, text=True,
                                    check=True, timeout=600).stdout) for count in (256, 2048))
    assert many < few + 48, f"{few} MB with 256 frames, {many} MB with 2048"
