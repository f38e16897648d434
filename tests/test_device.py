"""Learning on another device than the CPU: everything it touches is there, and the result is the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from compiling import clips, network
from test_resume import RECIPE, TINY
from tiny_matting import save_pictures

import vmq
from vmq.cli import main
from vmq.errors import OptionError

# A compile with every kind of learning, on the CPU and elsewhere; prints what differs.
CHILD = f"""
import sys, types
sys.path.insert(0, {str(Path(__file__).parent)!r})
import imaginary_device
import torch
import vmq.compiler, vmq.spec
torch.set_num_threads(1)
try:
    torch.ones(2, device="gpu") + torch.ones(2)
except RuntimeError as error:
    assert "two devices" in str(error)
vmq.spec.DEVICES = ("cpu", "gpu")
tiny = vmq.spec.Effort(**{vars(TINY)!r})
vmq.compiler.EFFORTS = {{"tiny": tiny}}
made = []
for device in ("cpu", "gpu"):
    result = vmq.compile("model.onnx", bits=4, recipe="recipe.toml", effort="tiny", calib="footage", device=device)
    result.graph.metadata.clear()             # which names the device
    made.append(result.graph.to_bytes())
assert len(result.results["reconstruct_blocks"].report["blocks"]) == 4
assert result.results["calibrate_network"].report["steps"] == {TINY.steps}
print("same bytes" if made[0] == made[1] else "other bytes")
"""


@pytest.mark.filterwarnings("default")
def test_learning_elsewhere_gives_the_same(tmp_path: Path):
    registration = pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip(f"torch {torch.__version__} cannot register a device from Python")
    network().save(tmp_path / "model.onnx")
    (tmp_path / "recipe.toml").write_text(RECIPE.replace('learn = ["weight",', 'learn = ["affine", "weight",'))
    for clip in clips(2, 6):
        save_pictures(tmp_path / "footage" / clip.name, clip.frames())
    done = subprocess.run([sys.executable, "-c", CHILD], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.split("\n")[-2:] == ["same bytes", ""], done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tmp_path / "model.onnx"
    network().save(model)
    assert main(["compile", str(model), "--device", "cuda"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("vmq: error: --device cuda: torch ")
    assert said.count("\n") == 1
    with pytest.raises(OptionError, match="--device tpu is not known; give one of cpu, cuda"):
        vmq.compile(model, device="tpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_learning_on_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.modules[vmq.Result.__module__], "EFFORTS", {"tiny": TINY})
    (tmp_path / "recipe.toml").write_text(RECIPE)
    losses = []
    for device in ("cpu", "cuda"):
        result = vmq.compile(network(), bits=4, recipe=str(tmp_path / "recipe.toml"), effort="tiny", device=device)
        losses.append([b["error_after"] for b in result.results["reconstruct_blocks"].report["blocks"]])
    assert losses[1] == pytest.approx(losses[0], rel=0.3)
