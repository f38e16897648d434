"""Flow of moving pictures is found, warps line up, occlusion is seen; files, the cache and what is refused."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.error import URLError

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from vmq import flow as module
from vmq.errors import FetchError, MediaError, OptionError, OutputError
from vmq.flow import (
    CachedFlow,
    DisFlow,
    FlowFolder,
    consistent,
    flows,
    open_flow,
    read_flow,
    scale_flow,
    temporal_loss,
    warp,
    write_flow,
)

pytestmark = pytest.mark.usefixtures("one_thread")

Frame = NDArray[np.uint8]
Floats = NDArray[np.float32]
H, W = 96, 128


def texture(seed: int, height: int = H, width: int = W) -> Frame:
    """Smooth noise in three channels, [3,H,W]."""
    noise = np.random.default_rng(seed).normal(size=(height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2.0)
    return np.clip(128 + 40 * smooth / smooth.std(), 0, 255).astype(np.uint8).transpose(2, 0, 1)


def moved(dx: float, dy: float, seed: int = 0) -> Frame:
    """The texture, moved right and down."""
    matrix = np.array([[1.0, 0.0, dx - 16], [0.0, 1.0, dy - 16]])
    big = np.ascontiguousarray(texture(seed, H + 32, W + 32).transpose(1, 2, 0))
    return np.ascontiguousarray(cv2.warpAffine(big, matrix, (W, H), flags=cv2.INTER_CUBIC).transpose(2, 0, 1))


def even(dx: float, dy: float, height: int = H, width: int = W) -> torch.Tensor:
    """The same flow everywhere, [1,2,H,W]."""
    return torch.tensor([dx, dy], dtype=torch.float32).reshape(1, 2, 1, 1).repeat(1, 1, height, width)


class Counting:
    """A flow that says how often it was asked: the mean of each frame."""

    name = "counting 1"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, previous: Frame, current: Frame, /) -> Floats:
        self.calls += 1
        answer = np.empty((2, *current.shape[1:]), np.float32)
        answer[0], answer[1] = previous.mean(), current.mean()
        return answer


def frames_of(*values: int) -> Frame:
    return np.stack([np.full((3, 4, 6), value, np.uint8) for value in values])


# -------------------------------------------------------------------------------------------------------- computed flow


@pytest.mark.parametrize(("dx", "dy"), [(3.0, -2.0), (-5.5, 4.25), (0.0, 0.0)])
def test_dis_recovers_a_translation_as_backward_flow(dx: float, dy: float) -> None:
    previous, current = moved(0, 0), moved(dx, dy)
    flow = DisFlow()(previous, current)
    assert flow.shape == (2, H, W)
    assert flow.dtype == np.float32
    assert abs(np.median(flow[0]) + dx) < 0.3
    assert abs(np.median(flow[1]) + dy) < 0.3
    error = np.abs(flow - np.array([-dx, -dy], np.float32)[:, None, None])[:, 12:-12, 12:-12]
    assert np.quantile(error, 0.95) < 0.3

    before, after = (torch.from_numpy(f.astype(np.float32))[None] for f in (previous, current))
    aligned = (warp(before, torch.from_numpy(flow)[None]) - after).abs()[..., 12:-12, 12:-12].mean()
    assert aligned < 2.0        # of 255; the interpolation of a texture
    if (dx, dy) != (0.0, 0.0):
        assert aligned < 0.1 * (before - after).abs()[..., 12:-12, 12:-12].mean()


def test_dis_gives_the_same_bytes_again_and_with_any_number_of_threads() -> None:
    frames = np.stack([moved(0, 0), moved(2.5, 1)])
    threads = cv2.getNumThreads()
    try:
        found = []
        for number in (1, 2, 1):
            cv2.setNumThreads(number)
            found.append(flows(DisFlow(), frames).tobytes())
    finally:
        cv2.setNumThreads(threads)
    assert len(set(found)) == 1


def test_dis_takes_frames_of_any_size() -> None:
    # in a process of its own, since OpenCV does not survive a picture too small for its pyramid
    code = """if True:
        import numpy as np
        from vmq.flow import DisFlow
        for height, width in [(1, 1), (12, 40), (20, 100), (24, 512), (100, 9), (33, 47)]:
            frame = np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)
            flow = DisFlow()(frame, frame)
            assert flow.shape == (2, height, width) and np.abs(flow).max() < 0.5, flow
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_flows_goes_pair_by_pair_and_backwards_on_reversed_frames() -> None:
    frames = np.stack([moved(0, 0), moved(2, 0), moved(2, 3)])
    back, forward = flows(DisFlow(), frames), flows(DisFlow(), frames[::-1])
    assert back.shape == (2, 2, H, W)
    np.testing.assert_allclose(np.median(back, axis=(2, 3)), [[-2, 0], [0, -3]], atol=0.1)
    np.testing.assert_allclose(np.median(forward, axis=(2, 3)), [[0, 3], [2, 0]], atol=0.1)
    assert flows(DisFlow(), frames[:1]).shape == (0, 2, H, W)


@pytest.mark.parametrize("frames", [np.zeros((2, 3, 4, 4), np.float32), np.zeros((0, 3, 4, 4), np.uint8),
                                    np.zeros((3, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.uint8)])
def test_flows_refuses_what_are_no_frames(frames: Any) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        flows(Counting(), frames)


def test_an_unknown_flow_says_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "file.flo").touch()
    for name in ("farneback", tmp_path / "nowhere", tmp_path / "file.flo"):
        with pytest.raises(OptionError, match="give dis, raft, or a folder"):
            open_flow(name)


# ---------------------------------------------------------------------------------------------------------------- raft


def put_torchvision(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Stand in for torchvision's interface, as far as it is used."""
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(name="C_T_V2", url="https://example.org/raft.pth"))
    package, models = ModuleType("torchvision"), ModuleType("torchvision.models.optical_flow")
    vars(package).update(__version__="9.9")
    vars(models).update(Raft_Small_Weights=weights, raft_small=model)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", ModuleType("torchvision.models"))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", models)


def test_raft_without_torchvision_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(OptionError, match=r"install vmq\[raft\]") as caught:
        open_flow("raft")
    assert "\n" not in str(caught.value)


def test_raft_with_a_torchvision_for_another_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError(f"operator {name}::nms does not exist\nand more")

    monkeypatch.setattr(module.importlib, "import_module", fail)
    with pytest.raises(OptionError, match=r"nms does not exist\): install the one for torch"):
        open_flow("raft")


def test_raft_without_its_weights_says_where_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(**_: Any) -> Any:
        raise URLError("no route")

    put_torchvision(monkeypatch, unreachable)
    with pytest.raises(FetchError, match=r"put https://example.org/raft.pth into .*checkpoints"):
        open_flow("raft")


def test_raft_is_asked_from_current_to_previous_in_sizes_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Raft(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> list[torch.Tensor]:
            assert first.shape == second.shape == (1, 3, 128, 136)
            assert -1.0 <= float(first.min()) <= float(first.max()) <= 1.0
            return [torch.zeros(1, 2, 128, 136), torch.cat([first[:, :1], second[:, :1]], dim=1)]

    put_torchvision(monkeypatch, lambda **_: Raft())
    raft = open_flow("raft")
    assert isinstance(raft, CachedFlow)
    assert raft.name == "raft-small C_T_V2, torchvision 9.9"
    found = flows(raft, np.stack([np.full((3, 100, 131), 0, np.uint8), np.full((3, 100, 131), 255, np.uint8)]))
    assert found.shape == (1, 2, 100, 131)
    assert (found[0, 0] == 1.0).all()       # the current frame came first
    assert (found[0, 1] == -1.0).all()


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("suffix", [".flo", ".npz"])
def test_flow_files_come_back_exactly(tmp_path: Path, suffix: str) -> None:
    flow = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    write_flow(tmp_path / f"0000{suffix}", flow)
    read = read_flow(tmp_path / f"0000{suffix}")
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, flow)
    assert [entry.name for entry in tmp_path.iterdir()] == [f"0000{suffix}"]


def test_a_flo_file_is_laid_out_as_middlebury_says(tmp_path: Path) -> None:
    flow = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    write_flow(tmp_path / "a.flo", flow)
    vectors = [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    assert (tmp_path / "a.flo").read_bytes() == b"PIEH" + struct.pack("<ii12f", 3, 2, *vectors)


def test_flow_is_written_as_flo_or_npz_only(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"end in \.flo or \.npz"):
        write_flow(tmp_path / "a.png", np.zeros((2, 2, 2), np.float32))
    with pytest.raises(OutputError, match="there is no folder"):
        write_flow(tmp_path / "b" / "a.flo", np.zeros((2, 2, 2), np.float32))


def flo(width: int, height: int, count: int, magic: float = 202021.25, value: float = 1.0) -> bytes:
    return struct.pack("<fii", magic, width, height) + struct.pack("<f", value) * count


@pytest.mark.parametrize(("content", "message"), [
    (b"", "does not begin with PIEH"),
    (b"PIEH1234", "does not begin with PIEH"),
    (flo(3, 2, 12, magic=1.0), "does not begin with PIEH"),
    (flo(3, 2, 11), "56 bytes are no .flo of 3x2"),
    (flo(3, 2, 13), "64 bytes are no .flo of 3x2"),
    (flo(-3, -2, 12), "no .flo of -3x-2"),
    (flo(0, 2, 0), "no .flo of 0x2"),
    (flo(3, 2, 12, value=float("nan")), "NaN or infinity"),
    (flo(3, 2, 12, value=float("inf")), "NaN or infinity"),
])
def test_a_bad_flo_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.flo"
    path.write_bytes(content)
    with pytest.raises(MediaError, match=message) as caught:
        read_flow(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("arrays", "message"), [
    ({"other": np.zeros((2, 3, 4), np.float32)}, "no array named 'flow', but other"),
    ({}, "no array named 'flow', but nothing"),
    ({"flow": np.zeros((3, 4, 2), np.float32)}, r"holds float32 \[3, 4, 2\]"),
    ({"flow": np.zeros((2, 0, 4), np.float32)}, r"holds float32 \[2, 0, 4\]"),
    ({"flow": np.zeros((2, 3, 4), np.int32)}, "holds int32"),
    ({"flow": np.full((2, 3, 4), 1e300)}, "NaN or infinity"),
    ({"flow": np.array([{}])}, "Object arrays cannot be loaded"),
])
def test_a_bad_npz_is_named(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays)
    with pytest.raises(MediaError, match=message) as caught:
        read_flow(path)
    assert str(caught.value).startswith(str(path))


def test_a_damaged_or_missing_npz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    with pytest.raises(MediaError, match=r"bad\.npz cannot be read"):
        read_flow(path)
    np.savez(path, flow=np.zeros((2, 30, 40), np.float32))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"junk", whole[: len(whole) // 2], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(MediaError, match=r"bad\.npz is no \.npz, or damaged") as caught:
            read_flow(path)
        assert "\n" not in str(caught.value)


def put_flows(folder: Path, *values: float, suffix: str = ".flo", size: tuple[int, int] = (4, 6)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        write_flow(folder / f"{number}{suffix}", np.full((2, *size), value, np.float32))


@pytest.mark.parametrize("suffix", [".flo", ".npz"])
def test_a_folder_of_flow_is_read_in_natural_order_clip_by_clip(tmp_path: Path, suffix: str) -> None:
    put_flows(tmp_path / "walk", *range(12), suffix=suffix)
    put_flows(tmp_path / "run@night", 50, 51, suffix=suffix)
    (tmp_path / "walk" / "notes.txt").touch()
    source = open_flow(tmp_path)
    assert isinstance(source, FlowFolder)

    def read(clip: str, start: int, frames: int) -> list[float]:
        return flows(source, frames_of(*range(frames)), clip=clip, start=start)[:, 0, 0, 0].tolist()

    assert read("walk", 0, 13) == list(range(12))
    assert read("walk", 9, 3) == [9, 10]
    assert read("walk@3", 2, 3) == [5, 6]               # as Clip.part names it
    assert read("walk@3@4", 0, 2) == [7]
    assert read("run@night", 1, 2) == [51]
    assert read("run@night@1", 0, 2) == [51]


def test_a_folder_of_one_clip_needs_no_name(tmp_path: Path) -> None:
    put_flows(tmp_path, 1, 2)
    assert flows(open_flow(tmp_path), frames_of(0, 1, 2))[:, 0, 0, 0].tolist() == [1, 2]


def test_flow_of_another_size_is_scaled_to_the_frames(tmp_path: Path) -> None:
    put_flows(tmp_path, 6.0, size=(8, 18))
    found = flows(open_flow(tmp_path), frames_of(0, 1))
    assert found.shape == (1, 2, 4, 6)
    np.testing.assert_allclose(found[0, 0], 2.0, rtol=1e-6)
    np.testing.assert_allclose(found[0, 1], 3.0, rtol=1e-6)


def test_a_folder_that_lacks_flow_is_named(tmp_path: Path) -> None:
    put_flows(tmp_path / "walk", 1, 2)
    source = open_flow(tmp_path)
    with pytest.raises(MediaError, match=r"walk holds 2 \.flo or \.npz files, but the clip needs number 3"):
        flows(source, frames_of(0, 1, 2, 3), clip="walk")
    for clip in ("run", "run@3", "walk@x"):
        with pytest.raises(MediaError, match=f"{clip} is no folder"):
            flows(source, frames_of(0, 1), clip=clip)
    put_flows(tmp_path / "both", 1)
    put_flows(tmp_path / "both", 1, suffix=".npz")
    with pytest.raises(MediaError, match="both holds both"):
        flows(source, frames_of(0, 1), clip="both")
    (tmp_path / "walk" / "1.flo").write_bytes(b"junk")
    with pytest.raises(MediaError, match=r"walk/1\.flo is no Middlebury"):
        flows(source, frames_of(0, 1, 2), clip="walk")


# --------------------------------------------------------------------------------------------------------------- cache


def test_a_pair_is_computed_once_whatever_clip_it_is_in() -> None:
    counting = Counting()
    cached = CachedFlow(counting)
    first = flows(cached, frames_of(1, 2, 3))
    assert counting.calls == 2
    np.testing.assert_array_equal(flows(cached, frames_of(1, 2, 3)), first)
    np.testing.assert_array_equal(flows(cached, frames_of(9, 2, 3))[1], first[1])
    assert counting.calls == 3
    flows(cached, frames_of(3, 2))      # the other way is another flow
    assert counting.calls == 4
    assert first[:, :, 0, 0].tolist() == [[1, 2], [2, 3]]


def test_the_memory_is_bounded_and_drops_what_was_used_longest_ago() -> None:
    counting = Counting()
    cached = CachedFlow(counting, limit=2 * (2 * 4 * 6 * 4))
    flows(cached, frames_of(1, 2, 3))
    flows(cached, frames_of(1, 2))
    flows(cached, frames_of(3, 4))      # drops (2, 3)
    assert counting.calls == 3
    flows(cached, frames_of(1, 2))
    assert counting.calls == 3
    flows(cached, frames_of(2, 3))
    assert counting.calls == 4


def test_what_the_cache_hands_out_cannot_be_changed() -> None:
    a, b = frames_of(1, 2)
    with pytest.raises(ValueError, match="read-only"):
        CachedFlow(Counting())(a, b)[0] = 5


def test_a_folder_keeps_flow_for_the_next_run(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    first = flows(CachedFlow(Counting(), folder), frames_of(1, 2, 3))
    assert len(list(folder.iterdir())) == 2
    later = Counting()
    np.testing.assert_array_equal(flows(CachedFlow(later, folder), frames_of(1, 2, 3)), first)
    assert later.calls == 0
    later.name = "counting 2"
    flows(CachedFlow(later, folder), frames_of(1, 2, 3))
    assert later.calls == 2
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["empty", "short", "flipped", "other size"])
def test_a_damaged_cache_file_is_computed_and_written_again(tmp_path: Path, damage: str) -> None:
    first = flows(CachedFlow(Counting(), tmp_path), frames_of(1, 2))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "other size":
        write_flow(path, np.zeros((2, 6, 4), np.float32))
    else:
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 64
        path.write_bytes({"empty": b"", "short": whole[:100], "flipped": bytes(flipped)}[damage])
    counting = Counting()
    np.testing.assert_array_equal(flows(CachedFlow(counting, tmp_path), frames_of(1, 2)), first)
    assert counting.calls == 1
    np.testing.assert_array_equal(read_flow(path), first[0])


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another place"):
        open_flow("dis", tmp_path / "file")


def test_cached_dis_is_dis(tmp_path: Path) -> None:
    frames = np.stack([moved(0, 0), moved(1.5, -2)])
    fresh = flows(DisFlow(), frames)
    for _ in range(2):
        np.testing.assert_array_equal(flows(open_flow("dis", tmp_path), frames), fresh)


# ------------------------------------------------------------------------------------------------------- warp and loss


@pytest.mark.parametrize("size", [(1, 1), (7, 13), (288, 512), (270, 479)])
def test_no_flow_changes_nothing(size: tuple[int, int]) -> None:
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(warp(x, torch.zeros(2, 2, *size)), x, rtol=0, atol=1e-7)
    assert warp(x, torch.zeros(2, 2, *size)).dtype == torch.float32


def test_warp_looks_up_at_the_flow_and_repeats_the_border() -> None:
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    torch.testing.assert_close(warp(x, even(1, 0, 3, 4))[0, 0, 0], torch.tensor([1.0, 2.0, 3.0, 3.0]))
    torch.testing.assert_close(warp(x, even(0, 1, 3, 4))[0, 0, :, 0], torch.tensor([4.0, 8.0, 8.0]))
    torch.testing.assert_close(warp(x, even(-0.25, 0, 3, 4))[0, 0, 0], torch.tensor([0.0, 0.75, 1.75, 2.75]))
    torch.testing.assert_close(warp(x, even(-9, -1e10, 3, 4)), torch.zeros(1, 1, 3, 4))


def test_warp_refuses_shapes_that_do_not_fit() -> None:
    for shape in [(1, 2, 3, 5), (2, 2, 3, 4), (1, 1, 3, 4)]:
        with pytest.raises(ValueError, match="of one size"):
            warp(torch.zeros(1, 1, 3, 4), torch.zeros(*shape))


def test_the_loss_has_gradients_through_both_frames() -> None:
    generator = torch.Generator().manual_seed(0)
    previous, current = (torch.rand(2, 1, 5, 6, dtype=torch.float64, generator=generator).requires_grad_()
                         for _ in range(2))
    flow = torch.randn(2, 2, 5, 6, dtype=torch.float64, generator=generator)
    mask = torch.rand(2, 1, 5, 6, generator=generator) > 0.3
    for chosen in (None, mask):
        assert torch.autograd.gradcheck(lambda a, b, m=chosen: temporal_loss(a, b, flow, m), (previous, current))
    temporal_loss(previous, current, flow).backward()
    for alpha in (previous, current):
        assert alpha.grad is not None
        assert alpha.grad.abs().sum() > 0.5


def test_the_loss_is_the_mean_of_what_the_flow_does_not_explain() -> None:
    previous = torch.rand(1, 1, 8, 10, generator=torch.Generator().manual_seed(0))
    current = torch.roll(previous, 2, dims=3)       # moved right by 2: it came from the left
    left = torch.ones(1, 1, 8, 10)
    left[..., :2] = 0
    assert temporal_loss(previous, current, even(-2, 0, 8, 10), left) < 1e-7
    assert temporal_loss(previous, current, even(2, 0, 8, 10), left) > 0.1
    everywhere = temporal_loss(previous, current, even(0, 0, 8, 10))
    torch.testing.assert_close(everywhere, (previous - current).abs().mean())
    torch.testing.assert_close(temporal_loss(previous, current, even(0, 0, 8, 10), left),
                               (previous - current).abs()[..., 2:].mean())


def test_the_loss_weighs_channels_alike_and_survives_an_empty_mask() -> None:
    previous = torch.zeros(1, 3, 4, 4, requires_grad=True)
    current = torch.full((1, 3, 4, 4), 0.5)
    half = torch.full((1, 1, 4, 4), 0.5)
    torch.testing.assert_close(temporal_loss(previous, current, even(0, 0, 4, 4), half), torch.tensor(0.5))
    nothing = temporal_loss(previous, current, even(0, 0, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0.0
    assert previous.grad is not None
    assert not previous.grad.any()


# ----------------------------------------------------------------------------------------------------------- occlusion


def test_flow_that_returns_is_consistent_and_flow_out_of_the_frame_is_not() -> None:
    mask = consistent(even(-3, 0, 6, 10), even(3, 0, 6, 10))
    assert mask.shape == (1, 1, 6, 10)
    assert mask.dtype == torch.bool
    assert not mask[..., :3].any()
    assert mask[..., 3:].all()
    mask = consistent(even(0, 2, 6, 10), even(0, -2, 6, 10))
    assert mask[..., :4, :].all()
    assert not mask[..., 4:, :].any()
    assert not consistent(even(2e9, 0, 6, 10), even(-2e9, 0, 6, 10)).any()      # unknown in a .flo
    assert not consistent(even(-3, 0, 6, 10), even(0, 0, 6, 10)).any()


def test_the_threshold_is_that_of_sundaram() -> None:
    # off by 0.8: 0.64 < 0.01 (16 + 10.24) + 0.5 = 0.762; off by 0.9: 0.81 > 0.01 (16 + 9.61) + 0.5 = 0.756
    assert consistent(even(-4, 0, 8, 16), even(3.2, 0, 8, 16))[..., 4:].all()
    assert not consistent(even(-4, 0, 8, 16), even(3.1, 0, 8, 16)).any()


def test_exact_flow_of_a_moving_square_is_inconsistent_where_ground_is_uncovered() -> None:
    back, forward = even(0, 0, 20, 30), even(0, 0, 20, 30)
    back[..., 5:15, 12:22], forward[..., 5:15, 8:18] = even(-4, 0, 10, 10), even(4, 0, 10, 10)
    mask = consistent(back, forward)
    assert not mask[..., 5:15, 8:12].any()      # was behind the square
    mask[..., 5:15, 8:12] = True
    assert mask.all()


def test_dis_sees_the_ground_that_a_moving_square_uncovers() -> None:
    ground, square = texture(1), texture(2)

    def scene(left: int) -> Frame:
        frame = ground.copy()
        frame[:, 24:72, left : left + 48] = square[:, 24:72, :48]
        return frame

    frames = np.stack([scene(32), scene(40)])
    back, forward = (torch.from_numpy(flows(DisFlow(), f)) for f in (frames, frames[::-1]))
    mask = consistent(back, forward)[0, 0].float()
    assert mask[26:70, 32:40].mean() < 0.35     # uncovered
    assert mask[30:66, 46:82].mean() > 0.99     # the square itself
    assert mask[4:18, 8:-8].mean() > 0.99       # ground at rest
    assert mask[78:92, 8:-8].mean() > 0.99


# ---------------------------------------------------------------------------------------------------------- other sizes


def test_scaled_flow_is_the_flow_of_scaled_frames() -> None:
    flow = even(3, -2, 12, 20)
    scaled = scale_flow(flow, (6, 40))
    assert scaled.shape == (1, 2, 6, 40)
    torch.testing.assert_close(scaled, even(6, -1, 6, 40))
    assert scale_flow(flow, (12, 20)) is flow


def test_scaling_keeps_where_flow_is() -> None:
    flow = torch.zeros(1, 2, 8, 8)
    flow[..., 4:] = 2.0
    scaled = scale_flow(flow, (16, 16))
    assert not scaled[..., :7].any()
    torch.testing.assert_close(scaled[..., 9:], torch.full((1, 2, 16, 7), 4.0))
