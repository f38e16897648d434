"""The built-in clips: exact compositing, the same bytes always, smooth motion, soft edges, and a person RVM sees."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from models import rvm
from vmq import synthetic
from vmq.clips import Clip, to_float
from vmq.errors import OptionError
from vmq.metrics import score_clip
from vmq.synthetic import Scene, scene, synthetic_clips

SMALL = (96, 160)
Frame = NDArray[np.uint8]


def alpha_of(clip: Clip, start: int = 0, stop: int | None = None) -> list[Frame]:
    mattes = clip.alpha(start, stop)
    assert mattes is not None
    return list(mattes)


@pytest.fixture(scope="module")
def clips() -> list[tuple[Clip, list[Frame], list[Frame]]]:
    """All eight built-in clips at full size, the first 12 frames, with alpha."""
    return [(clip, list(clip.frames()), alpha_of(clip)) for clip in synthetic_clips(frames=12)]


def test_shapes_names_and_lengths(clips: list[tuple[Clip, list[Frame], list[Frame]]]) -> None:
    assert len({clip.name for clip, _, _ in clips}) == 8
    for clip, frames, mattes in clips:
        assert (len(clip), clip.size, clip.has_alpha) == (12, (288, 512), True)
        assert {(frame.shape, frame.dtype.name) for frame in frames} == {((3, 288, 512), "uint8")}
        assert {(matte.shape, matte.dtype.name) for matte in mattes} == {((288, 512), "uint8")}
        assert len(frames) == len(mattes) == 12


@pytest.mark.parametrize("index", range(8))
def test_frames_are_composited_with_the_very_alpha_that_is_given(index: int) -> None:
    clip = synthetic_clips(SMALL, frames=6)[index]
    for number, (frame, matte) in enumerate(zip(clip.frames(), alpha_of(clip), strict=True)):
        layers = scene(SMALL, 0, index).layers(number)
        assert np.array_equal(layers.alpha, matte)
        share = matte[..., None] / 255
        image = share * layers.foreground + (1 - share) * layers.background + layers.noise
        wanted = np.clip(np.rint(image), 0, 255).transpose(2, 0, 1)
        differs = np.abs(wanted - frame)
        assert differs.max() <= 1  # float64 here, float32 there: a tie may round the other way
        assert (differs > 0).mean() < 1e-3
        outside = np.broadcast_to(matte == 0, frame.shape)
        background = np.clip(np.rint(layers.background + layers.noise), 0, 255).transpose(2, 0, 1)
        assert np.array_equal(frame[outside], background[outside])
        assert np.std(layers.noise) < 3


def test_motion_blurs_colour_and_alpha_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure of one colour keeps exactly that colour at every alpha; the blur is there, and goes with the shutter."""
    colour = np.array([100, 150, 200], np.float32)
    soft = []
    for shutter in (0.0, 0.6):
        monkeypatch.setattr(synthetic, "SHUTTER", shutter)
        fast = Scene((288, 512), 0, 2)
        fast._figure[..., :3] = fast._figure[..., 3:] * colour
        drawn = fast._drawn(16)
        seen = drawn[..., 3] > 0.01
        assert np.allclose(drawn[seen][:, :3] / drawn[seen][:, 3:], colour, rtol=1e-3)
        soft.append(((drawn[..., 3] > 0.02) & (drawn[..., 3] < 0.98)).sum())
    assert soft[1] > 1.2 * soft[0]


def test_any_frame_alone_has_the_same_bytes() -> None:
    first = [list(clip.frames()) for clip in synthetic_clips(SMALL, count=3, frames=5, seed=4)]
    scene.cache_clear()
    longer = synthetic_clips(SMALL, count=9, frames=40, seed=4)
    for index in (2, 0, 1):
        for number in (3, 0, 4):
            (matte,) = alpha_of(longer[index], number, number + 1)
            (frame,) = longer[index].frames(number, number + 1)
            assert np.array_equal(frame, first[index][number])
            assert np.array_equal(matte, scene(SMALL, 4, index).layers(number).alpha)
    assert not np.array_equal(next(longer[8].frames()), first[0][0])  # the same backdrop's kind, another clip
    other = next(synthetic_clips(SMALL, count=1, frames=1, seed=5)[0].frames())
    assert not np.array_equal(other, first[0][0])


def test_another_process_draws_the_same_bytes() -> None:
    program = (
        "import hashlib; from vmq.synthetic import synthetic_clips; clip = synthetic_clips((64, 96), 2, 3)[1]; "
        "print(hashlib.sha256(b''.join(f.tobytes() for f in clip.frames())).hexdigest())"
    )
    runs = {subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(runs) == 1


def test_frames_are_drawn_only_when_read(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = Scene.frame
    monkeypatch.setattr(Scene, "frame", lambda self, number: drawn.append(number) or real(self, number))
    clip = synthetic_clips(SMALL, count=1, frames=1000)[0]
    reader: Iterator[Frame] = clip.frames(500)
    assert drawn == []
    next(reader)
    next(reader)
    assert drawn == [500, 501]


def test_motion_is_smooth_and_there_is_some(clips: list[tuple[Clip, list[Frame], list[Frame]]]) -> None:
    for clip, frames, mattes in clips:
        steps = [np.abs(b.astype(float) - a).mean() / 255 for a, b in pairwise(mattes)]
        assert np.mean(steps) > 0.0005, clip.name  # she moves
        assert max(steps) < 0.05, clip.name  # and does not jump
        centres = np.array([np.array(np.nonzero(matte > 127)).mean(axis=1) for matte in mattes])
        turns = np.abs(np.diff(centres, 2, axis=0)).max()
        assert turns < 1.5, clip.name  # pixels a frame a frame: no shaking
        outside = (mattes[0] == 0) & (mattes[-1] == 0)
        assert np.abs(frames[0].astype(float) - frames[-1])[:, outside].mean() > 3, (
            clip.name
        )  # the background moves too


def test_edges_are_soft_and_the_person_is_in_the_picture(clips: list[tuple[Clip, list[Frame], list[Frame]]]) -> None:
    for clip, _, mattes in clips:
        for matte in mattes:
            soft = ((matte > 0) & (matte < 255)).mean()
            assert 0.01 < soft < 0.12, clip.name
            assert 0.05 < (matte == 255).mean() < 0.6, clip.name
            assert (matte == 0).mean() > 0.3, clip.name
            assert (matte[-1] == 255).any(), clip.name  # she is cut off by the lower edge, she does not float


def test_hairs_are_thin_and_partly_transparent(clips: list[tuple[Clip, list[Frame], list[Frame]]]) -> None:
    for clip, _, mattes in clips:
        matte = mattes[0]
        body = cv2.morphologyEx(matte, cv2.MORPH_OPEN, np.ones((7, 7), np.uint8))
        strands = matte.astype(int) - cv2.dilate(body, np.ones((5, 5), np.uint8)) > 8
        assert strands.sum() > 30, clip.name
        assert np.median(matte[strands]) < 200, clip.name


def test_sizes_of_the_person_vary(clips: list[tuple[Clip, list[Frame], list[Frame]]]) -> None:
    widths = [np.count_nonzero((mattes[0] > 127).any(axis=0)) for _, _, mattes in clips]
    heads = [np.count_nonzero(mattes[0][mattes[0].any(axis=1)][20] > 127) for _, _, mattes in clips]
    assert max(widths) > 1.3 * min(widths)
    assert max(heads) > 1.3 * min(heads)


@pytest.mark.parametrize("size", [(33, 51), (270, 480)])
def test_other_sizes(size: tuple[int, int]) -> None:
    clip = synthetic_clips(size, count=1, frames=1)[0]
    (frame,), (matte,) = list(clip.frames()), alpha_of(clip)
    assert (frame.shape, matte.shape) == ((3, *size), size)
    assert (matte == 255).any()


@pytest.mark.parametrize("arguments", [{"size": (16, 512)}, {"count": 0}, {"frames": 0}])
def test_impossible_wishes_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="need at least"):
        synthetic_clips(**arguments)  # type: ignore[arg-type]


def test_the_figure_is_small_and_says_where_it_is_from() -> None:
    folder = Path(__file__).parents[1] / "vmq" / "figure"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 150_000
    assert "public domain" in (folder / "ORIGIN.txt").read_text()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch's threads wait for each other busily, which on a loaded machine takes many times longer than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_rvm_sees_the_person(shared: Path, clips: list[tuple[Clip, list[Frame], list[Frame]]]) -> None:
    """The real FP32 network, in closed loop from zero states, scores here what it scores on real footage."""
    model = rvm.build(state=rvm.load_state(shared / "rvm" / "rvm_mobilenetv3.safetensors"))
    for clip, frames, mattes in clips[::3]:
        states = [torch.zeros(1, 1, 1, 1)] * 4
        predicted = []
        with torch.inference_mode():
            for frame in frames[:4]:
                _, alpha, *states = model(torch.from_numpy(to_float(frame))[None], *states)
                predicted.append(np.rint(alpha[0, 0].numpy() * 255).astype(np.uint8))
        scores = score_clip(predicted, mattes[:4])
        assert scores.MAD < 12, clip.name
        assert scores.F > 0.97, clip.name
