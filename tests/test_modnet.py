"""MODNet: the authors' names and shapes, export, and what the compiler makes of a network without a state."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from compiling import clips, optimized_ops
from tiny_matting import save_pictures

import vmq
from models import modnet
from vmq.graph import Graph
from vmq.runtime import Session

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def small() -> modnet.MODNet:
    """A narrow one with random weights, and statistics that BatchNormalization is not without."""
    model = modnet.build(hr=8, width=0.25, seed=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2.0)
    return model


def authors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the authors' checkpoints are: saved from DataParallel, the backbone in two places."""
    twice = {f"lr_branch.{name}": value for name, value in state.items() if name.startswith("backbone.")}
    return {f"module.{name}": value for name, value in (state | twice).items()}


def test_size_and_names_of_the_authors() -> None:
    model = modnet.build()
    assert sum(p.numel() for p in model.parameters()) == 6_487_075
    state = model.state_dict()
    for name, shape in {
        "backbone.model.features.0.0.weight": (32, 3, 3, 3),
        "backbone.model.features.1.conv.3.weight": (16, 32, 1, 1),
        "backbone.model.features.17.conv.6.weight": (320, 960, 1, 1),
        "backbone.model.features.18.1.running_var": (1280,),
        "lr_branch.se_block.fc.0.weight": (320, 1280),
        "lr_branch.conv_lr16x.layers.0.weight": (96, 1280, 5, 5),
        "lr_branch.conv_lr.layers.0.bias": (1,),
        "hr_branch.conv_enc2x.layers.1.bnorm.weight": (16,),
        "hr_branch.conv_hr4x.0.layers.0.weight": (64, 99, 3, 3),
        "hr_branch.conv_hr.1.layers.0.weight": (1, 32, 1, 1),
        "f_branch.conv_f.0.layers.0.weight": (16, 35, 3, 3),
    }.items():
        assert tuple(state[name].shape) == shape, name
    assert not any("inorm" in name for name in state)


def test_loads_what_the_authors_save(small: modnet.MODNet, tmp_path: Path) -> None:
    torch.save(authors(small.state_dict()), tmp_path / "modnet.ckpt")
    loaded = modnet.build(modnet.load_state(tmp_path / "modnet.ckpt"))
    frame = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(loaded(frame), small(frame), rtol=0, atol=0)


@pytest.mark.parametrize(("damage", "says"), [
    (lambda s: s.pop("module.f_branch.conv_lr4x.layers.0.bias"), "1 missing: f_branch.conv_lr4x.layers.0.bias"),
    (lambda s: s.pop("module.hr_branch.tohr_enc2x.layers.0.weight"), "hr_branch.tohr_enc2x.layers.0.weight is missing"),
    (lambda s: s.update(more=torch.zeros(1)), "1 unexpected: more"),
    (lambda s: s["module.f_branch.conv_lr4x.layers.0.bias"].fill_(torch.nan), "1 not finite"),
])
def test_weights_that_do_not_fit(small: modnet.MODNet, damage: object, says: str) -> None:
    state = {name: value.clone() for name, value in authors(small.state_dict()).items()}
    damage(state)  # type: ignore[operator]
    with pytest.raises(modnet.WeightsError, match=says):
        modnet.build(state)


@pytest.mark.parametrize("options", [{}, {"dynamic": True}, {"keep_bn": True}, {"opset": 12}])
def test_export(small: modnet.MODNet, tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "modnet.onnx"
    modnet.export(small, path, size=(64, 96), **options)  # type: ignore[arg-type]
    onnx.checker.check_model(str(path), full_check=True)
    session = Session(path, optimize=False, threads=1)
    assert session.state_pairs == ()
    frame = np.random.default_rng(0).random((1, 3, 64, 96), np.float32)
    with torch.no_grad():
        wanted = small(torch.from_numpy(frame)).numpy()
    np.testing.assert_allclose(session.feed(frame)["pha"], wanted, atol=2e-5)
    assert wanted.std() > 0.01
    norms = sum(n.op == "BatchNormalization" for n in Graph.load(path).nodes)
    assert norms == {True: 68, False: 16}["keep_bn" in options]      # the halves of IBNorm cannot be folded by torch


def test_compiles_into_integers(small: modnet.MODNet, tmp_path: Path) -> None:
    """BatchNormalization of half a convolution's channels is folded, and Relu6 is the saturation of its quantizer."""
    path = tmp_path / "modnet.onnx"
    modnet.export(small, path, size=(64, 96))
    save_pictures(tmp_path / "footage", clips(1, 2, (64, 96))[0].frames())
    for bits in ("8", "4"):
        result = vmq.compile(path, recipe="mse", effort="fast", bits=bits, calib=tmp_path / "footage")
        assert result.results["fold_batchnorm"].report["batchnorms"] == 16
        assert "recurrent states: none found" in "\n".join(result.lines())
        done = optimized_ops(result.graph, tmp_path / f"{bits}.onnx")
        assert done["QLinearConv"] == 70                     # two of them for the ends of rows (fold_resizes)
        assert done["QGemm"] == 1                            # the last layer, whose result stays float
        assert not done.keys() & {"Conv", "FusedConv", "Gemm"}
        assert [n.op for n in result.graph.nodes if n.op == "Clip" and n.outputs[0].dtype == np.float32] == []


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert modnet.main(["--size", "100x64", "-o", str(tmp_path / "modnet.onnx")]) == 2
    assert capsys.readouterr().err == "error: 100x64: MODNet takes multiples of 32\n"
    assert modnet.main(["--weights", str(tmp_path / "no.pth"), "-o", str(tmp_path / "modnet.onnx")]) == 2
    assert "no such weights file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("options", "says"), [
    (["--steps", "0"], "--steps 0: give 1 or more"),
    (["--size", "100x64"], "--size 100x64: MODNet takes multiples of 32"),
    (["--width", "0.35"], "--width 0.35: give one of 0.25, 0.5, 0.75, 1.0"),
    (["-o", "no/such/folder.pth"], "there is no folder"),
])
def test_training_tool_checks_its_options_first(options: list[str], says: str, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tool = runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools" / "train_modnet.py"))
    monkeypatch.setitem(tool["main"].__globals__, "synthetic_clips", None)          # would be called before training
    assert tool["main"](["-o", "out.pth", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [0.25, 0.5, 0.75, 1.0])
def test_weights_tell_their_width(width: float) -> None:
    state = modnet.build(hr=4, width=width).state_dict()
    loaded = modnet.build(state)
    assert sum(p.numel() for p in loaded.parameters()) == sum(v.numel() for v in modnet.MODNet(4, width).parameters())


def test_training_tool_makes_weights_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = runpy.run_path(str(Path(__file__).resolve().parents[1] / "tools" / "train_modnet.py"))["main"]
    made = []
    for name in ("one.pth", "two.pth"):
        assert train(["--steps", "2", "--batch", "1", "--size", "64x32", "--detail", "8", "--width", "0.25",
                      "-o", str(tmp_path / name)]) == 0
        made.append(modnet.load_state(tmp_path / name))
    assert "step 2 of 2: MAD x 1e3" in capsys.readouterr().out
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert not torch.equal(made[0]["f_branch.conv_f.1.layers.0.bias"], torch.zeros(1))
    modnet.build(made[0])
