"""Reading of every kind of clip, what is refused and with which words, and writing that leaves nothing half-done."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from vmq.clips import Clip, fingerprint, open_camera, open_clips, sample_clips, to_float
from vmq.errors import MediaError, OutputError
from vmq.writer import open_writer

Frame = NDArray[np.uint8]
SIZE = (24, 40)


def picture(number: int, size: tuple[int, int] = SIZE) -> Frame:
    """A frame whose left half is red and right half blue, brighter by number: RGB [3,H,W]."""
    frame = np.zeros((3, *size), np.uint8)
    frame[0, :, : size[1] // 2] = 40 + 20 * number
    frame[2, :, size[1] // 2 :] = 40 + 20 * number
    return frame


def put(path: Path, frame: Frame) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = frame if frame.ndim == 2 else np.ascontiguousarray(frame[::-1].transpose(1, 2, 0))
    path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
    return path


def put_video(path: Path, count: int = 8, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(exist_ok=True)
    with open_writer(path, 20, size) as writer:
        for number in range(count):
            writer.write(picture(number % 10, size))
    return path


def put_composites(folder: Path, count: int = 3) -> Path:
    for number in range(count):
        put(folder / "com" / f"{number:04d}.png", picture(number))
        put(folder / "pha" / f"{number:04d}.png", np.full(SIZE, 50 * number, np.uint8))
    return folder


def only(path: Path, size: tuple[int, int] | None = None) -> Clip:
    (clip,) = open_clips([path], size)
    return clip


def test_a_folder_of_pngs_is_read_exactly_and_from_any_frame_on(tmp_path: Path) -> None:
    with open_writer(tmp_path / "frames", 25, SIZE) as writer:
        for number in range(6):
            writer.write(picture(number))
    clip = only(tmp_path / "frames")
    assert (clip.name, len(clip), clip.size, clip.has_alpha, clip.alpha()) == ("frames", 6, SIZE, False, None)
    for start, stop in [(0, None), (0, None), (2, 4), (4, 99), (6, None), (5, 2), (9, 12)]:
        got = list(clip.frames(start, stop))
        wanted = [picture(number) for number in range(6)[start:stop]]
        assert len(got) == len(wanted)
        assert all(np.array_equal(a, b) and a.dtype == np.uint8 for a, b in zip(got, wanted, strict=True))
    with pytest.raises(ValueError, match="counted from 0"):
        clip.frames(-1)


def test_frames_are_in_natural_order_and_hidden_files_are_none(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        put(tmp_path / f"frame_{number}.png", picture(number % 10))
    (tmp_path / "._frame_3.png").write_bytes(b"not a picture")
    (tmp_path / "notes.txt").write_text("not a frame either")
    assert [int(frame[0, 0, 0]) for frame in only(tmp_path).frames()] == [60, 80, 40]


def test_a_video_is_read_as_rgb_and_from_any_frame_on(tmp_path: Path) -> None:
    clip = only(put_video(tmp_path / "person.mp4"))
    assert (clip.name, clip.fps, len(clip), clip.size) == ("person", 20, 8, SIZE)
    everything = list(clip.frames())
    assert len(everything) == 8
    for number, frame in enumerate(everything):
        assert np.abs(frame.astype(int) - picture(number)).mean() < 6  # lossy, but not exchanged channels
    for start, stop in [(3, 5), (7, None), (8, None)]:
        part = list(clip.frames(start, stop))
        assert len(part) == len(everything[start:stop])
        assert all(np.array_equal(a, b) for a, b in zip(part, everything[start:stop], strict=True))


def test_composites_come_with_their_alpha(tmp_path: Path) -> None:
    put_composites(tmp_path / "set" / "b")
    put_composites(tmp_path / "set" / "a", 2)
    clips = open_clips([tmp_path / "set", tmp_path / "set" / "a"])
    assert [(clip.name, len(clip), clip.has_alpha) for clip in clips] == [
        ("a", 2, True),
        ("b", 3, True),
        ("a (2)", 2, True),
    ]
    mattes = clips[1].alpha(1)
    assert mattes is not None
    assert [(matte.shape, int(matte[0, 0])) for matte in mattes] == [(SIZE, 50), (SIZE, 100)]


def test_a_folder_of_videos_and_a_single_picture(tmp_path: Path) -> None:
    put_video(tmp_path / "videos" / "x.mp4")
    put_video(tmp_path / "videos" / "y.mp4", 3)
    still = put(tmp_path / "still.png", picture(1))
    assert [(clip.name, len(clip)) for clip in open_clips([tmp_path / "videos", still])] == [
        ("x", 8),
        ("y", 3),
        ("still", 1),
    ]


@pytest.mark.parametrize("size", [(12, 20), (48, 80), (30, 30)])
def test_frames_and_alpha_are_resized(tmp_path: Path, size: tuple[int, int]) -> None:
    clip = only(put_composites(tmp_path / "clip"), size)
    mattes = clip.alpha()
    assert mattes is not None
    assert clip.size == size
    assert {frame.shape for frame in clip.frames()} == {(3, *size)}
    assert {matte.shape for matte in mattes} == {size}
    checks = np.zeros(SIZE, np.uint8)
    checks[::2] = 200
    put(tmp_path / "checks.png", checks)
    if size == (12, 20):  # area: each pixel is the mean of four
        (small,) = only(tmp_path / "checks.png", size).frames()
        assert np.array_equal(small, np.full((3, 12, 20), 100))


def test_to_float() -> None:
    values = to_float(np.array([0, 51, 255], np.uint8))
    assert values.dtype == np.float32
    assert values.tolist() == pytest.approx([0, 0.2, 1])


def test_memory_does_not_grow_with_the_length_of_a_clip(tmp_path: Path) -> None:
    size = (120, 160)
    clip = only(put_video(tmp_path / "long.mp4", 200, size))
    tracemalloc.start()
    count = sum(1 for _ in clip.frames())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == len(clip) == 200
    assert peak < 10 * 3 * size[0] * size[1]  # a few frames, not 200


def _damage(path: Path, keep: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


def test_bad_media_are_named_with_what_to_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "garbage.mp4").write_bytes(b"garbage" * 500)
    (tmp_path / "text.txt").write_text("hello")
    _damage(put_video(tmp_path / "cut.mp4"), 0.5)
    (tmp_path / "garbage.png").write_bytes(b"garbage")
    (tmp_path / "empty.jpg").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)
    _damage(put(tmp_path / "cut.jpg", noise), 0.6)
    _damage(put(tmp_path / "cut.png", noise), 0.6)
    put_video(tmp_path / "both" / "v.mp4")
    put(tmp_path / "both" / "0.png", picture(0))
    put_composites(tmp_path / "fewer")
    (tmp_path / "fewer" / "pha" / "0002.png").unlink()
    put_composites(tmp_path / "larger")
    for number in range(3):
        put(tmp_path / "larger" / "pha" / f"{number:04d}.png", np.zeros((30, 40), np.uint8))
    put(tmp_path / "lonely" / "pha" / "0.png", np.zeros(SIZE, np.uint8))
    (tmp_path / "hollow" / "com").mkdir(parents=True)
    for name, words in {
        "missing.mp4": "does not exist: give a video",
        "empty": "holds no frames",
        "empty.mp4": "is empty",
        "garbage.mp4": "cannot be decoded as a video",
        "cut.mp4": "cannot be decoded as a video",
        "text.txt": "neither a video nor a picture",
        "garbage.png": "cannot be decoded (7 bytes): replace",
        "empty.jpg": "is empty",
        "cut.jpg": "is truncated",
        "cut.png": "is truncated",
        "both": "both pictures (0.png) and videos (v.mp4)",
        "fewer": "com/ holds 3 pictures but pha/ holds 2",
        "larger": "is 40x30 but",
        "lonely": "has pha/ but no com/",
        "hollow": "holds no pictures",
    }.items():
        with pytest.raises(MediaError) as error:
            open_clips([tmp_path / name])
        message = str(error.value)
        assert words in message
        assert str(tmp_path / name) in message
        assert "\n" not in message
    with pytest.raises(MediaError, match="no clip was given"):
        open_clips([])
    assert capfd.readouterr().err == ""


def test_what_a_decoder_says_of_a_picture_stays_off_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """libjpeg writes to descriptor 2 by itself, whatever thread decodes; and 2 may be closed."""
    path = put(tmp_path / "a.jpg", picture(3))
    data = path.read_bytes()
    tables = data.index(b"\xff\xc4")
    path.write_bytes(data[:tables] + b"stray" + data[tables:])
    want = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert want is not None
    assert "extraneous bytes" in capfd.readouterr().err         # what it says when nobody keeps it from it

    def read(_number: int) -> bool:
        return np.array_equal(next(only(path).frames()), want[..., ::-1].transpose(2, 0, 1))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(100)))
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
    kept = os.dup(2)
    os.close(2)
    try:
        assert read(0)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(2)
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_a_video_that_lost_frames_is_refused(tmp_path: Path) -> None:
    """The index at the end of an AVI is gone and half its frames, but its header still promises all."""
    path = tmp_path / "lost.avi"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 64))
    rng = np.random.default_rng(0)
    for _ in range(40):
        writer.write(rng.integers(0, 256, (64, 64, 3), np.uint8))
    writer.release()
    assert len(only(path)) == 40
    _damage(path, 0.5)
    with pytest.raises(MediaError, match=r"lost\.avi is damaged, only \d+ of its 40 frames"):
        only(path)


def test_frames_of_varying_size_are_refused_when_they_come(tmp_path: Path) -> None:
    put(tmp_path / "0.png", picture(0))
    put(tmp_path / "1.png", picture(1, (24, 42)))
    for size in (None, (12, 20)):
        with pytest.raises(MediaError, match=r"1\.png is 42x24 but .*0\.png is 40x24"):
            list(only(tmp_path, size).frames())


def test_a_fingerprint_holds_what_the_clips_open(tmp_path: Path) -> None:
    """Behind linked folders, too, and a link that leads back up does not lead in circles."""
    put_composites(tmp_path / "elsewhere", 2)
    put(tmp_path / "else" / "a.png", picture(0))
    footage = tmp_path / "set"
    footage.mkdir()
    (footage / "composites").symlink_to(tmp_path / "elsewhere")
    (footage / "frames").symlink_to(tmp_path / "else")
    (footage / "up").symlink_to(footage)
    opened = {"composites/com/0000.png", "composites/com/0001.png", "composites/pha/0000.png",
              "composites/pha/0001.png", "frames/a.png"}
    before = fingerprint([footage])
    assert opened <= {name.removeprefix(f"{footage}/") for name in before}
    (tmp_path / "else" / "a.png").write_bytes(b"other")
    after = fingerprint([footage])
    assert {name.rpartition("/")[2] for name in after if after[name] != before[name]} == {"a.png"}
    assert list(fingerprint([footage / "frames" / "a.png"])) == [f"{footage}/frames/a.png"]


def test_a_camera_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MediaError, match="camera 97 gives no picture"):
        open_camera(97)
    assert capfd.readouterr().err == ""


def test_a_camera_has_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_video(tmp_path / "lens.mp4")
    real = cv2.VideoCapture
    monkeypatch.setattr(cv2, "VideoCapture", lambda index: real(str(tmp_path / "lens.mp4")) if index == 0 else None)
    camera = open_camera(0, (12, 20))
    assert (camera.name, camera.length, camera.size, bool(camera)) == ("camera 0", None, (12, 20), True)
    with pytest.raises(TypeError, match="no end"):
        len(camera)
    assert [frame.shape for frame in camera.frames(1, 4)] == [(3, 12, 20)] * 3
    with pytest.raises(MediaError, match="camera 0 stopped after 8 frames"):
        list(camera.frames())


def test_a_writer_replaces_only_when_it_succeeds(tmp_path: Path) -> None:
    target = put_video(tmp_path / "out.mp4", 3)
    before = target.read_bytes()
    with pytest.raises(RuntimeError, match="interrupted"), open_writer(target, 25, SIZE) as writer:  # noqa: PT012
        writer.write(picture(0))
        raise RuntimeError("interrupted")
    with pytest.raises(OutputError, match="no frame to write"), open_writer(target, 25, SIZE):
        pass
    assert target.read_bytes() == before
    with open_writer(target, 25, SIZE) as writer:
        for number in range(5):
            writer.write(np.full(SIZE, 40 * number, np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
    greys = list(only(target).frames())
    assert len(greys) == 5
    assert [int(grey.mean()) for grey in greys] == pytest.approx([0, 40, 80, 120, 160], abs=3)


def test_a_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="interrupted"), open_writer(tmp_path / "out", 25, SIZE) as writer:  # noqa: PT012
        writer.write(picture(0))
        raise RuntimeError("interrupted")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with open_writer(tmp_path / "out", 25, SIZE) as writer:
        writer.write(np.full(SIZE, 7, np.uint8))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["0000.png"]
    assert os.access(tmp_path / "out", os.R_OK | os.X_OK)


def test_odd_sizes_get_a_last_row_and_column_twice(tmp_path: Path) -> None:
    clip = only(put_video(tmp_path / "odd.mp4", 2, (23, 41)))
    assert clip.size == (24, 42)


def test_unwritable_targets_are_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir.mp4").mkdir()
    for name, words in {
        "none/out.mp4": "none is no folder: create it first",
        "out.avi": r"end it in \.mp4, or name a folder",
        "full": "holds files already",
        "file": "is not a folder",
        "dir.mp4": "is a folder",
    }.items():
        with pytest.raises(OutputError, match=words):
            open_writer(tmp_path / name, 25, SIZE)
    with open_writer(tmp_path / "out", 25, SIZE) as writer:
        with pytest.raises(ValueError, match="expected uint8"):
            writer.write(np.zeros((3, 24, 41), np.uint8))
        writer.write(picture(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dir.mp4", "file", "full", "out"]


def test_the_shared_sets_open(shared: Path) -> None:
    clips = open_clips([shared / "vm-mini" / "calib", shared / "clips"])
    assert len(clips) == 16
    assert sum(len(clip) for clip in clips if clip.has_alpha) == 256
    assert {clip.size for clip in clips} == {(288, 512)}


def counted(name: str, length: int) -> Clip:
    """A clip whose frames, and mattes, are their numbers."""
    def read(start: int, stop: int | None) -> Iterator[Frame]:
        return (np.full((3, 2, 2), n % 256, np.uint8) for n in range(length)[start:stop])

    return Clip(name, 25.0, (2, 2), length, read, lambda a, b: (f[0] for f in read(a, b)))


def test_a_part_reads_its_own_frames_and_no_others() -> None:
    part = counted("talk", 100).part(40, 50)
    assert (part.name, len(part)) == ("talk@40", 10)
    assert [int(f[0, 0, 0]) for f in part.frames()] == list(range(40, 50))
    assert [int(f[0, 0, 0]) for f in part.frames(7, 99)] == [47, 48, 49]
    alpha = part.alpha(2, 4)
    assert alpha is not None
    assert [int(a[0, 0]) for a in alpha] == [42, 43]
    assert list(part.frames(10)) == []


def test_few_frames_are_all_taken() -> None:
    clips = [counted("a", 30), counted("b", 2)]
    assert sample_clips(clips, 32) == clips


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=40), st.integers(1, 2000))
def test_long_footage_is_sampled_evenly(lengths: list[int], frames: int) -> None:
    clips = [counted(f"c{i}", n) for i, n in enumerate(lengths)]
    parts = sample_clips(clips, frames)
    used = sum(len(p) for p in parts)
    assert 1 <= used <= max(frames, 0)
    assert all(1 <= len(p) <= max(32, max(lengths) if sum(lengths) <= frames else 32) for p in parts)
    if len(lengths) == 1 and frames >= 64 and lengths[0] > 2 * frames:
        assert used > frames - 64                       # nearly all that is allowed
        assert parts[0].name.endswith("@0")             # from the start
        assert parts[-1].name.endswith(f"@{lengths[0] - 32}")    # to the end
