"""RVM in torch: against the authors' own outputs, and its ONNX exports in ONNX Runtime against torch."""

from __future__ import annotations

import collections
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from models import rvm

State = dict[str, torch.Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def state(shared: Path) -> State:
    return rvm.load_state(shared / "rvm" / "rvm_mobilenetv3.safetensors")


@pytest.fixture(scope="session")
def frames(shared: Path) -> torch.Tensor:
    """Three consecutive real frames, [3,3,288,512]."""
    with np.load(shared / "rvm" / "reference_288x512.npz") as reference:
        return torch.from_numpy(reference["src"])


@pytest.fixture(scope="module")
def small_random() -> rvm.RVM:
    return rvm.build("mobilenetv3", seed=3)


def torch_outputs(model: rvm.RVM, clip: torch.Tensor, ratio: float | torch.Tensor = 1.0) -> Iterator[list[np.ndarray]]:
    states = [torch.zeros(1, 1, 1, 1)] * 4
    for frame in clip:
        with torch.no_grad():
            fgr, pha, *states = model(frame[None], *states, ratio)
        yield [t.numpy() for t in (fgr, pha, *states)]


def onnx_outputs(path: Path, clip: torch.Tensor, ratio: float | None = None) -> Iterator[list[np.ndarray]]:
    """Closed loop: each frame is fed the states that the frame before gave."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()
    states = [np.zeros([n if isinstance(n, int) else 1 for n in i.shape], np.float32) for i in inputs[1:5]]
    for frame in clip:
        feed = {"src": frame[None].numpy(), **{f"r{k}i": value for k, value in enumerate(states, 1)}}
        if ratio is not None:
            feed["downsample_ratio"] = np.array([ratio], np.float32)
        outputs = session.run(list(rvm.OUTPUT_NAMES), feed)
        states = outputs[2:]
        yield outputs


def largest_difference(
    model: rvm.RVM, path: Path, clip: torch.Tensor, ratio: float = 1.0, *, dynamic: bool = False
) -> float:
    onnx.checker.check_model(onnx.load(path), full_check=True)
    ours = torch_outputs(model, clip, torch.tensor([ratio]) if dynamic else ratio)
    theirs = onnx_outputs(path, clip, ratio if dynamic else None)
    return max(
        float(np.abs(a - b).max())
        for mine, yours in zip(ours, theirs, strict=True)
        for a, b in zip(mine, yours, strict=True)
    )


def operators(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


def resized(clip: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return F.interpolate(clip, (height, width), mode="bilinear", align_corners=False)


# ------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("size", ["288x512", "270x480"])
def test_agrees_with_the_authors_outputs(shared: Path, state: State, size: str) -> None:
    model = rvm.build("mobilenetv3", state)
    with np.load(shared / "rvm" / f"reference_{size}.npz") as reference:
        clip, expected = torch.from_numpy(reference["src"]), {name: reference[name] for name in rvm.OUTPUT_NAMES}
    for t, outputs in enumerate(torch_outputs(model, clip)):
        fgr, pha, *states = (value - expected[name][t] for name, value in zip(rvm.OUTPUT_NAMES, outputs, strict=True))
        assert np.abs(pha).max() < 1.5e-3
        assert np.abs(pha).mean() < 1.2e-5
        assert np.abs(fgr).max() < 2e-3
        assert all(np.abs(difference).mean() < 2e-4 for difference in states)


def test_the_web_release_s_own_constants_explain_what_is_left(shared: Path, state: State) -> None:
    model = rvm.build("mobilenetv3", state)
    model.mean[0, 1] = 0.455878
    with np.load(shared / "rvm" / "reference_288x512.npz") as reference:
        for t, outputs in enumerate(torch_outputs(model, torch.from_numpy(reference["src"]))):
            assert np.abs(outputs[1] - reference["pha"][t]).max() < 4e-4


def test_official_names_of_resnet50() -> None:
    names = rvm.build("resnet50").state_dict()
    assert names["backbone.layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)
    assert names["aspp.aspp1.0.weight"].shape == (256, 2048, 1, 1)
    assert names["decoder.decode3.conv.0.weight"].shape == (128, 256 + 512 + 3, 3, 3)
    assert names["decoder.decode1.gru.hh.0.weight"].shape == (16, 32, 3, 3)
    assert names["project_mat.conv.bias"].shape == (4,)


def test_fast_filter_is_the_textbook_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    src, small = torch.rand(1, 3, 24, 30, generator=generator), torch.rand(1, 3, 12, 15, generator=generator)
    y = torch.rand(1, 4, 12, 15, generator=generator)
    got = rvm.FastGuidedFilter().double()(src.double(), small.double(), y.double(), y)

    def box(t: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(t, 3, 1, 1)

    fine, x = (torch.cat((t, t.mean(1, keepdim=True)), 1).double() for t in (src, small))
    y = y.double()
    a = (box(x * y) - box(x) * box(y)) / (box(x * x) - box(x) ** 2 + 1e-5)
    b = box(y) - a * box(x)
    a, b = (F.interpolate(t, (24, 30), mode="bilinear") for t in (a, b))
    torch.testing.assert_close(got, a * fine + b, rtol=0, atol=5e-7)  # of 1/9 in float32


def test_random_weights_come_from_the_seed_alone(small_random: rvm.RVM) -> None:
    before = torch.random.get_rng_state()
    again, other = rvm.build("mobilenetv3", seed=3), rvm.build("mobilenetv3", seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(again.project_mat.conv.weight, small_random.project_mat.conv.weight)
    assert not torch.equal(other.project_mat.conv.weight, small_random.project_mat.conv.weight)


# ------------------------------------------------------------------------------------------------- the weights


def test_pth_and_safetensors_give_the_same(small_random: rvm.RVM, tmp_path: Path) -> None:
    own = small_random.state_dict()
    extra = {"project_seg.conv.weight": torch.zeros(1, 16, 1, 1), "refiner.box_filter.weight": torch.zeros(4, 1, 3, 3)}
    torch.save(own | extra, tmp_path / "rvm.pth")
    save_file({name: value.contiguous() for name, value in own.items()}, tmp_path / "rvm.safetensors")
    for name in ("rvm.pth", "rvm.safetensors"):
        loaded = rvm.build("mobilenetv3", rvm.load_state(tmp_path / name)).state_dict()
        assert all(torch.equal(loaded[key], own[key]) for key in own)


def test_says_in_one_line_what_does_not_fit(small_random: rvm.RVM) -> None:
    given = dict(small_random.state_dict())
    given["decoder.decode0.conv.9.weight"] = given.pop("decoder.decode0.conv.0.weight")
    given["project_mat.conv.weight"] = torch.zeros(3, 16, 1, 1)
    given["project_mat.conv.bias"] = torch.tensor([0.0, 0, 0, float("nan")])
    with pytest.raises(rvm.WeightsError) as caught:
        rvm.build("mobilenetv3", given)
    message = str(caught.value)
    assert "\n" not in message
    assert "1 missing: decoder.decode0.conv.0.weight" in message
    assert "1 unexpected: decoder.decode0.conv.9.weight" in message
    assert "project_mat.conv.weight [3, 16, 1, 1] instead of [4, 16, 1, 1]" in message
    assert "1 not finite: project_mat.conv.bias" in message


def test_deep_refiner_needs_its_weights_and_the_fast_one_none(small_random: rvm.RVM) -> None:
    own = small_random.state_dict()
    with pytest.raises(
        rvm.WeightsError, match=r"missing: refiner\.box_filter\.weight.*the fast refiner needs no weights"
    ):
        rvm.build("mobilenetv3", own, refiner="deep")
    assert rvm.build("mobilenetv3", own, refiner="fast").refiner is not None


@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04 half a zip"])
@pytest.mark.parametrize("name", ["rvm.pth", "rvm.safetensors"])
def test_damaged_weights_are_one_line(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(rvm.WeightsError, match="rvm") as caught:
        rvm.load_state(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "module.pth")
    with pytest.raises(rvm.WeightsError, match="plain state dict"):
        rvm.load_state(tmp_path / "module.pth")


# ------------------------------------------------------------------------------------------------- the exports


def test_static_export(state: State, frames: torch.Tensor, tmp_path: Path) -> None:
    model, path = rvm.build("mobilenetv3", state), tmp_path / "rvm.onnx"
    rvm.export(model, path)
    assert largest_difference(model, path, frames) < 1e-4
    count = operators(path)
    assert (count["Conv"], count["HardSwish"], count["Tanh"], count["Resize"]) == (78, 20, 4, 4)
    assert not {"BatchNormalization", "Shape", "Slice", "Expand", "Identity"} & set(count)
    graph = onnx.load(path).graph
    assert [i.name for i in graph.input] == ["src", "r1i", "r2i", "r3i", "r4i"]
    assert [o.name for o in graph.output] == ["fgr", "pha", "r1o", "r2o", "r3o", "r4o"]
    shape = [d.dim_value for d in graph.input[1].type.tensor_type.shape.dim]
    assert shape == [1, 16, 144, 256]
    assert [p.name for p in tmp_path.iterdir()] == ["rvm.onnx"]


def test_export_leaves_the_model_as_it_was(small_random: rvm.RVM, tmp_path: Path) -> None:
    for keep_bn in (False, True):
        rvm.export(small_random, tmp_path / "rvm.onnx", size=(32, 48), keep_bn=keep_bn)
        assert not any(module.training for module in small_random.modules())


def test_same_weights_same_bytes(small_random: rvm.RVM, tmp_path: Path) -> None:
    for name in ("a.onnx", "b.onnx"):
        rvm.export(small_random, tmp_path / name, size=(32, 48))
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_odd_sizes(state: State, frames: torch.Tensor, tmp_path: Path) -> None:
    model, path = rvm.build("mobilenetv3", state), tmp_path / "rvm.onnx"
    rvm.export(model, path, size=(133, 211))
    assert largest_difference(model, path, resized(frames, 133, 211)) < 1e-4


def randomised(state: State) -> State:
    """The same function with random BatchNorm statistics, a fifth of the gammas negative; the convs make up for it."""
    generator = torch.Generator().manual_seed(1)
    changed = dict(state)
    for name in (name for name in state if name.endswith(".running_var")):
        bn, n = name.removesuffix(".running_var"), state[name].numel()
        eps = 1e-3 if bn.startswith("backbone") else 1e-5
        gamma, mean, var = (torch.rand(n, generator=generator) + 0.5 for _ in range(3))
        gamma[torch.rand(n, generator=generator) < 0.2] *= -1
        old = state[f"{bn}.weight"] / torch.sqrt(state[name] + eps)
        new = gamma / torch.sqrt(var + eps)
        prefix, _, index = bn.rpartition(".")
        conv = f"{prefix}.{int(index) - 1}.weight"
        changed |= {f"{bn}.weight": gamma, f"{bn}.running_mean": mean, f"{bn}.running_var": var}
        changed[f"{bn}.bias"] = state[f"{bn}.bias"] - state[f"{bn}.running_mean"] * old + mean * new
        changed[conv] = state[conv] * (old / new).view(-1, 1, 1, 1)
    return changed


def test_keep_bn_export_has_all_of_them(state: State, frames: torch.Tensor, tmp_path: Path) -> None:
    clip = resized(frames, 96, 128)
    model = rvm.build("mobilenetv3", randomised(state))
    rvm.export(model, tmp_path / "kept.onnx", size=(96, 128), keep_bn=True)
    rvm.export(model, tmp_path / "folded.onnx", size=(96, 128))
    count = operators(tmp_path / "kept.onnx")
    assert (count["BatchNormalization"], count["Conv"], count["Identity"]) == (52, 78, 0)
    assert operators(tmp_path / "folded.onnx")["BatchNormalization"] == 0
    for reference in (model, rvm.build("mobilenetv3", state)):
        assert largest_difference(reference, tmp_path / "kept.onnx", clip) < 1e-4
        assert largest_difference(reference, tmp_path / "folded.onnx", clip) < 1e-4


@pytest.fixture(scope="module")
def refined(shared: Path, state: State) -> dict[str, rvm.RVM]:
    fitted = rvm.load_state(shared / "rvm" / "refiner_fitted.safetensors")
    return {
        "deep": rvm.build("mobilenetv3", state | fitted, refiner="deep"),
        "fast": rvm.build("mobilenetv3", state, refiner="fast"),
    }


@pytest.mark.parametrize("refiner", ["deep", "fast"])
def test_refiner_export(refined: dict[str, rvm.RVM], frames: torch.Tensor, tmp_path: Path, refiner: str) -> None:
    path, clip = tmp_path / "rvm.onnx", resized(frames, 540, 960)
    rvm.export(refined[refiner], path, size=(540, 960), downsample_ratio=0.25)
    assert largest_difference(refined[refiner], path, clip, 0.25) < 1e-4
    alphas = [outputs[1] for outputs in torch_outputs(refined[refiner], clip, 0.25)]
    assert np.mean([(alpha > 0.5).mean() for alpha in alphas]) > 0.05  # it sees somebody


@pytest.mark.parametrize(("refiner", "opset"), [("deep", 12), ("fast", 17)])
def test_dynamic_export(
    refined: dict[str, rvm.RVM], frames: torch.Tensor, tmp_path: Path, refiner: str, opset: int
) -> None:
    path = tmp_path / "rvm.onnx"
    rvm.export(refined[refiner], path, dynamic=True, opset=None if opset == 12 else opset)
    model = onnx.load(path)
    assert model.opset_import[0].version == opset
    assert [i.name for i in model.graph.input] == ["src", "r1i", "r2i", "r3i", "r4i", "downsample_ratio"]
    # Even at every level, odd at every level, and with a size that the ratio does not divide.
    for height, width, ratio in ((128, 192, 1.0), (98, 98, 0.5), (203, 357, 0.7)):
        clip = resized(frames, height, width)
        assert largest_difference(refined[refiner], path, clip, ratio, dynamic=True) < 1e-4


def test_resnet50_export(frames: torch.Tensor, tmp_path: Path) -> None:
    model, path, clip = rvm.build("resnet50"), tmp_path / "rvm.onnx", resized(frames, 64, 96)
    rvm.export(model, path, size=(64, 96))
    assert operators(path)["BatchNormalization"] == 0
    assert largest_difference(model, path, clip) < 1e-4
    assert all(value.std() > 0.03 for value in list(torch_outputs(model, clip))[-1])  # so that it says something


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"downsample_ratio": 0.5}, "needs a refiner"),
        ({"dynamic": True}, "needs a refiner"),
        ({"downsample_ratio": 0.0}, "not above 0"),
        ({"downsample_ratio": float("nan")}, "not above 0"),
        ({"size": (8, 512)}, "below 16 pixels"),
        ({"opset": 9}, "12 to 20"),
        ({"opset": 99}, "12 to 20"),
    ],
)
def test_impossible_exports(small_random: rvm.RVM, tmp_path: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        rvm.export(small_random, tmp_path / "rvm.onnx", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(
    small_random: rvm.RVM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rvm.onnx"
    path.write_bytes(b"old")

    def half(_module: object, _inputs: object, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", half)
    with pytest.raises(KeyboardInterrupt):
        rvm.export(small_random, path, size=(32, 32))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["rvm.onnx"]


# -------------------------------------------------------------------------------------------- the command line


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rvm.onnx"
    assert rvm.main(["--size", "96x64", "--keep-bn", "--opset", "15", "-o", str(path)]) == 0
    assert "RVM mobilenetv3" in capsys.readouterr().out
    model = onnx.load(path)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 64, 96]
    assert model.opset_import[0].version == 15
    assert rvm.main(["--dynamic", "-o", str(path)]) == 0
    assert onnx.load(path).opset_import[0].version == 12


@pytest.mark.parametrize(
    "arguments",
    [
        ["--weights", "nowhere.pth", "-o", "rvm.onnx"],
        ["--downsample-ratio", "0.5", "-o", "rvm.onnx"],
        ["-o", "no/such/folder/rvm.onnx"],
        ["-o", "rvm.onnx", "--size", "512"],
        ["-o", "rvm.onnx", "--variant", "vit"],
    ],
)
def test_command_line_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):  # argparse leaves by it
        sys.exit(rvm.main(arguments))
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_models_need_nothing_of_vmq() -> None:
    code = "import sys, models.rvm; sys.exit(any(m.split('.')[0] in {'vmq', 'passes', 'onnx'} for m in sys.modules))"
    root = Path(__file__).resolve().parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
