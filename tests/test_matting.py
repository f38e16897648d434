"""`vmq run` writes what alpha, foreground and background make of a clip, at the clip's size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import tiny_matting as tiny
from numpy.typing import NDArray

from vmq import matting
from vmq.clips import Clip, open_clips
from vmq.errors import MediaError, ModelError, OptionError, OutputError
from vmq.runtime import Session

SIZE = (16, 24)


def session(size: tuple[object, object] = SIZE, **options: bool) -> Session:
    return Session(tiny.model(size, **options).SerializeToString(), threads=1)


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    return open_clips([tiny.save_pictures(tmp_path / "clip", tiny.frames(4))])[0]


def matted(runner: Session, clip: Clip, folder: Path, **options: object) -> NDArray[np.float64]:
    count = matting.matte(runner, clip, folder / "out", **options)  # type: ignore[arg-type]
    pictures = tiny.load_pictures(folder / "out")
    assert len(pictures) == count == len(clip)
    return np.stack(pictures).astype(np.float64)


def test_alpha(clip: Clip, tmp_path: Path) -> None:
    found = matted(session(), clip, tmp_path, kind="alpha")
    np.testing.assert_allclose(found, np.stack(tiny.alphas(clip.frames())) * 255, atol=0.501)


def test_foreground(clip: Clip, tmp_path: Path) -> None:
    found = matted(session(), clip, tmp_path, kind="foreground")
    np.testing.assert_allclose(found, np.stack(list(clip.frames())) / 2, atol=0.501)


@pytest.mark.parametrize(("text", "color"), [
    ("green", (0, 255, 0)), ("White", (255, 255, 255)), ("#102030", (16, 32, 48)), ("FFaa00", (255, 170, 0)),
])
def test_composite_over_a_colour(clip: Clip, tmp_path: Path, text: str, color: tuple[int, ...]) -> None:
    found = matted(session(), clip, tmp_path, background=text)
    frames, alpha = np.stack(list(clip.frames())), np.stack(tiny.alphas(clip.frames()))[:, None]
    expected = alpha * frames / 2 + (1 - alpha) * np.array(color)[:, None, None]
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_green_is_the_default(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    np.testing.assert_array_equal(matted(session(), clip, tmp_path),
                                  matted(session(), clip, tmp_path / "named", background="green"))


def test_composite_without_a_foreground_output_keeps_the_frames_colours(clip: Clip, tmp_path: Path) -> None:
    found = matted(session(foreground=False), clip, tmp_path, background="black")
    expected = np.stack(tiny.alphas(clip.frames()))[:, None] * np.stack(list(clip.frames()))
    np.testing.assert_allclose(found, expected, atol=0.51)


def test_foreground_of_a_model_without_one(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no foreground output; use --alpha or --background"):
        matting.matte(session(foreground=False), clip, tmp_path / "out", kind="foreground")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip"]


def test_result_has_the_clips_size_whatever_the_models(tmp_path: Path) -> None:
    """On a picture that is smooth, working at half the size changes little; the frame's detail is kept."""
    rows, columns = np.mgrid[0:64, 0:96]
    smooth = np.stack([rows * 3, columns * 2, rows + columns]).astype(np.uint8)
    clip = open_clips([tiny.save_pictures(tmp_path / "clip", [smooth, smooth])])[0]
    for kind in matting.KINDS:
        (tmp_path / kind).mkdir()
        (tmp_path / f"{kind}_half").mkdir()
        whole = matted(session((64, 96)), clip, tmp_path / kind, kind=kind)
        half = matted(session((32, 48)), clip, tmp_path / f"{kind}_half", kind=kind)
        assert whole.shape == half.shape
        assert np.abs(whole - half).max() <= 3
        assert not np.array_equal(whole, half)


def test_detail_of_the_frame_survives_a_smaller_model(tmp_path: Path) -> None:
    """Noise that the small model cannot see stays; what its foreground changes (here -src / 2) is added to it."""
    frame = tiny.frames(1, (32, 48))[0]
    clip = open_clips([tiny.save_pictures(tmp_path / "clip", [frame])])[0]
    found = matted(session((16, 24)), clip, tmp_path, kind="foreground")[0]
    planes = frame.transpose(1, 2, 0)
    seen = cv2.resize(planes, (24, 16), interpolation=cv2.INTER_AREA).astype(np.float32)
    change = cv2.resize(-seen / 2, (48, 32), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(found, np.clip(planes + change, 0, 255).transpose(2, 0, 1), atol=0.51)


def test_ratio(clip: Clip, tmp_path: Path) -> None:
    runner = session(ratio=True)
    found = matted(runner, clip, tmp_path, kind="alpha", downsample_ratio=0.5)
    np.testing.assert_allclose(found, np.stack(tiny.alphas(clip.frames(), 0.5)) * 255, atol=0.501)
    with pytest.raises(OptionError, match=r"--downsample-ratio 2\.0 is out of range"):
        matting.matte(runner, clip, tmp_path / "more", downsample_ratio=2.0)


@pytest.mark.parametrize(("size", "ratio"), [((288, 512), 1.0), ((1080, 1920), 512 / 1920), ((1024, 576), 0.5)])
def test_ratio_by_default_brings_the_longer_side_to_512(size: tuple[int, int], ratio: float) -> None:
    runner = session(("h", "w"), ratio=True)
    matting.set_ratio(runner, size, None)
    assert runner.downsample_ratio == ratio


# ---------------------------------------------------------------------------------------------- backgrounds


def test_a_picture_fills_the_frame_and_keeps_its_shape(tmp_path: Path) -> None:
    """A square picture over 16x24: scaled to 24x24, four rows cut above and below."""
    square = np.zeros((3, 48, 48), np.uint8)
    square[0, :8] = square[1, -8:] = 255  # cut off
    square[2, 8:24] = 200
    tiny.save_pictures(tmp_path / "pictures", [square])
    behind = matting.backgrounds(str(tmp_path / "pictures" / "0000.png"), SIZE)
    first, second = next(behind), next(behind)
    assert first.shape == (3, *SIZE)
    np.testing.assert_array_equal(first, second)
    assert first[:2].max() == 0
    np.testing.assert_array_equal(first[2], np.repeat([[200]] * 8 + [[0]] * 8, 24, axis=1))


@pytest.mark.parametrize("shape", [(5, 100), (100, 5), (16, 24), (17, 25), (31, 49)])
def test_pictures_of_any_shape_fill_the_frame(tmp_path: Path, shape: tuple[int, int]) -> None:
    folder = tiny.save_pictures(tmp_path / "pictures", [np.full((3, *shape), 77, np.uint8)])
    frame = next(matting.backgrounds(str(folder), SIZE))
    assert frame.shape == (3, *SIZE)
    assert (frame == 77).all()


def test_a_video_starts_again(tmp_path: Path) -> None:
    folder = tiny.save_pictures(tmp_path / "video", tiny.frames(3, seed=5))
    shown = list(islice(matting.backgrounds(str(folder), SIZE), 7))
    for number, frame in enumerate(shown):
        np.testing.assert_array_equal(frame, tiny.frames(3, seed=5)[number % 3])


def test_composite_over_a_video(clip: Clip, tmp_path: Path) -> None:
    behind = tiny.frames(2, seed=5)
    folder = tiny.save_pictures(tmp_path / "video", behind)
    found = matted(session(), clip, tmp_path, background=str(folder))
    alpha, frames = np.stack(tiny.alphas(clip.frames()))[:, None], np.stack(list(clip.frames()))
    expected = alpha * frames / 2 + (1 - alpha) * np.stack([*behind, *behind])
    np.testing.assert_allclose(found, expected, atol=0.51)


@pytest.mark.parametrize("text", ["greeen", "#12345", "#1234567", "no/such.png"])
def test_no_background(text: str) -> None:
    with pytest.raises(OptionError, match=r"is no file and no colour.*green"):
        matting.backgrounds(text, SIZE)


# -------------------------------------------------------------------------------------------------- sources


def test_one_clip_is_wanted(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        tiny.save_pictures(tmp_path / "set" / name, tiny.frames(1))
    with pytest.raises(MediaError, match=r"holds 3 clips \(a, b, \.\.\.\): give one of them"):
        matting.open_source(str(tmp_path / "set"))
    assert matting.open_source(str(tmp_path / "set" / "b")).name == "b"


def test_a_number_is_a_camera_unless_a_file_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matting, "open_camera", lambda index: f"camera {index}")
    assert matting.open_source("3") == "camera 3"
    tiny.save_pictures(tmp_path / "3", tiny.frames(2))
    assert len(matting.open_source("3")) == 2


# ---------------------------------------------------------------------------------------------- interruption


def interrupted(clip: Clip, after: int) -> Clip:
    def frames(start: int, stop: int | None) -> Iterator[NDArray[np.uint8]]:
        yield from clip.read_frames(start, after if stop is None else min(stop, after))
        raise KeyboardInterrupt

    return replace(clip, read_frames=frames)


def test_interrupting_a_clip_leaves_nothing(clip: Clip, tmp_path: Path) -> None:
    for name in ("out", "out.mp4"):
        with pytest.raises(KeyboardInterrupt):
            matting.matte(session(), interrupted(clip, 2), tmp_path / name)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["clip"]


def test_interrupting_a_camera_keeps_the_recording(clip: Clip, tmp_path: Path) -> None:
    camera = replace(interrupted(clip, 2), length=None)
    assert matting.matte(session(), camera, tmp_path / "out") == 2
    assert len(list((tmp_path / "out").iterdir())) == 2
    with pytest.raises(KeyboardInterrupt):
        matting.matte(session(), replace(interrupted(clip, 0), length=None), tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "out"]


def test_a_failing_clip_leaves_what_was_there(clip: Clip, tmp_path: Path) -> None:
    (tmp_path / "out.mp4").write_bytes(b"old")

    def frames(start: int, stop: int | None) -> Iterator[NDArray[np.uint8]]:
        yield from clip.read_frames(start, stop)
        raise MediaError("broken")

    with pytest.raises(MediaError, match="broken"):
        matting.matte(session(), replace(clip, read_frames=frames), tmp_path / "out.mp4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "out.mp4"]
    assert (tmp_path / "out.mp4").read_bytes() == b"old"


def test_progress_and_video(clip: Clip, tmp_path: Path) -> None:
    told: list[tuple[str, float, float | None]] = []
    matting.matte(session(), clip, tmp_path / "out.mp4", kind="alpha", report=lambda *args: told.append(args))
    assert told == [("clip", 1, 4), ("clip", 2, 4), ("clip", 3, 4), ("clip", 4, 4)]
    written = open_clips([tmp_path / "out.mp4"])[0]
    assert (len(written), written.size, written.fps) == (4, SIZE, clip.fps)


def test_an_output_that_cannot_be_written(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no name for a result"):
        matting.matte(session(), clip, tmp_path / "out.txt")


# -------------------------------------------------------------------------------------------------- rounding


def test_to_uint8_rounds_and_saturates() -> None:
    values = np.array([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 127.4 / 255, 1.0, 7.0], np.float32)
    assert matting.to_uint8(values).tolist() == [0, 0, 0, 1, 127, 255, 255]
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(matting.to_uint8(every / np.float32(255)), every)


def test_to_uint8_refuses_nan() -> None:
    with pytest.raises(ModelError, match="NaN"):
        matting.to_uint8(np.array([0.0, np.nan]))


def test_rvm_cuts_a_person_out(shared: Path, tmp_path: Path) -> None:
    """RVM at half the size on real footage: near the true alpha, and dark where the background was."""
    from models import rvm

    clip = open_clips([next(iter(sorted((shared / "vm-mini" / "eval").iterdir())))])[0]
    clip = replace(clip, length=4)
    rvm.export(rvm.build("mobilenetv3", rvm.load_state(shared / "rvm" / "rvm_mobilenetv3.safetensors")),
               tmp_path / "rvm.onnx", size=(144, 256))
    runner = Session(tmp_path / "rvm.onnx", threads=2)
    for kind in ("alpha", "composite"):
        matting.matte(runner, clip, tmp_path / kind, kind=kind, background="black")
    true = np.stack(list(clip.alpha() or [])).astype(np.float64)
    alpha = np.stack(tiny.load_pictures(tmp_path / "alpha"))
    assert alpha.shape == true.shape == (4, 288, 512)
    assert np.abs(alpha - true).mean() / 255 < 0.01
    composite = np.stack(tiny.load_pictures(tmp_path / "composite")).max(axis=1)
    assert composite[(true == 0) & (alpha == 0)].max() == 0
    assert composite[true == 255].mean() > 20
