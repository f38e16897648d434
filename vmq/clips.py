"""Clips: videos, folders of frames and composites with alpha, all read the same way, frame by frame.

A clip knows its name, size, frame rate and length, and hands out fresh iterators over its frames (RGB, uint8,
[3,H,W]) and, where the alpha is known, over its mattes (uint8, [H,W]). Nothing is kept: memory does not grow
with the length of a clip, and a clip can be read as often as wanted and from any frame on.

What a path may be:

    person.mp4               a video
    person/0000.jpg ...      a folder of frames, in natural order of their names (2 before 10)
    person/com, person/pha   composites and their alpha, in the layout of RVM's evaluation sets
    set/...                  a folder of such folders, or of videos
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.errors import MediaError
from vmq.pictures import Frame, Size, content_of, fit, in_words, read_picture, size_of, to_rgb
from vmq.videos import DEFAULT_FPS, capturing, count_frames, grab, read, sane_fps

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv",
                            ".ts", ".webm"})
_WANTED = "a video, a folder of frames, or a folder with com/ and pha/"


@dataclass(frozen=True)
class Clip:
    """A sequence of frames that can be read again and again.

    Attributes:
        name: for people and tables.
        fps: frames a second.
        size: (H, W) of every frame.
        length: number of frames; None for a camera, which has no end.
        read_frames: `(start, stop)` to an iterator over uint8 [3,H,W] RGB.
        read_alpha: `(start, stop)` to an iterator over uint8 [H,W], or None where the alpha is not known.
    """

    name: str
    fps: float
    size: Size
    length: int | None
    read_frames: Callable[[int, int | None], Iterator[Frame]]
    read_alpha: Callable[[int, int | None], Iterator[Frame]] | None = None

    def __len__(self) -> int:
        """Count the frames; TypeError for a camera."""
        if self.length is None:
            raise TypeError(f"{self.name} has no end, so it has no length")
        return self.length

    def __bool__(self) -> bool:
        return True

    @property
    def has_alpha(self) -> bool:
        """Whether the true alpha of the frames is known."""
        return self.read_alpha is not None

    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]:
        """Frames start to stop - 1 as uint8 [3,H,W] RGB; like a slice, but without negative numbers."""
        return self.read_frames(*self._range(start, stop))

    def alpha(self, start: int = 0, stop: int | None = None) -> Iterator[Frame] | None:
        """Mattes start to stop - 1 as uint8 [H,W]; None if the clip has no alpha."""
        return None if self.read_alpha is None else self.read_alpha(*self._range(start, stop))

    def first_alpha(self) -> Frame | None:
        """The first frame's matte, uint8 [H,W]; None if it is not known."""
        return next(self.alpha(0, 1) or iter(()), None)

    def part(self, start: int, stop: int) -> Clip:
        """Frames start to stop - 1 as a clip of their own, named NAME@START."""
        first, last = self._range(start, stop)
        assert last is not None
        end = last

        def shifted(read: Callable[[int, int | None], Iterator[Frame]]) -> Callable[[int, int | None], Iterator[Frame]]:
            return lambda a, b: read(min(first + a, end), end if b is None else min(first + b, end))

        return replace(self, name=f"{self.name}@{first}", length=end - first, read_frames=shifted(self.read_frames),
                       read_alpha=self.read_alpha and shifted(self.read_alpha))

    def _range(self, start: int, stop: int | None) -> tuple[int, int | None]:
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError(f"frames are counted from 0: {start} to {stop}")
        if self.length is None:
            return start, stop
        stop = self.length if stop is None else min(stop, self.length)
        return min(start, stop), stop


def to_float(frame: Frame) -> NDArray[np.float32]:
    """uint8 0..255 to float32 0..1, any shape."""
    return frame.astype(np.float32) / np.float32(255)


def open_clips(paths: Iterable[str | Path], size: Size | None = None) -> list[Clip]:
    """Open all clips that the paths hold, in their order; see the top of this file for what a path may be.

    Args:
        paths: files and folders.
        size: (H, W) that every frame is resized to (area to shrink, linear to grow); None keeps it.

    Raises:
        MediaError: a path is missing, unreadable, empty, or holds nothing that is a clip.
    """
    clips = [clip for path in paths for clip in _open(Path(path), size)]
    if not clips:
        raise MediaError(f"no clip was given: give {_WANTED}")
    return _with_unique_names(clips)


def fingerprint(paths: Iterable[str | os.PathLike[str]]) -> dict[str, tuple[int, int]]:
    """Size and time of last change (ns) of every picture and video that the paths hold, by its absolute path.

    As deep as `open_clips` looks, and like it through linked folders; so no link leads it in circles.
    """
    found = {}
    for path in (Path(p).absolute() for p in paths):
        levels = ("*", "*/*", "*/*/*")                   # set/clip/com/0000.png
        for file in [f for level in levels for f in path.glob(level)] if path.is_dir() else [path]:
            if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                with contextlib.suppress(OSError):       # gone: that is a change as well
                    stat = file.stat()
                    found[str(file)] = stat.st_size, stat.st_mtime_ns
    return found


def sample_clips(clips: Sequence[Clip], frames: int, stretch: int = 32) -> list[Clip]:
    """At most `frames` frames of the clips: all, or stretches of up to `stretch` spread evenly over them."""
    total = sum(len(clip) for clip in clips)
    if total <= frames:
        return list(clips)
    stretch = min(stretch, frames)
    parts = []
    for clip in clips:
        count = min(max(1, round(frames * len(clip) / total / stretch)), max(1, len(clip) // stretch))
        starts = np.linspace(0, max(0, len(clip) - stretch), count).astype(int)
        parts += [clip.part(start, min(start + stretch, len(clip))) for start in starts.tolist()]
    chosen = np.linspace(0, len(parts) - 1, min(len(parts), frames // stretch)).astype(int)
    return [parts[index] for index in chosen.tolist()]


def open_camera(index: int = 0, size: Size | None = None) -> Clip:
    """Open the camera with this number as a clip without end, `length` None.

    Raises:
        MediaError: there is no such camera, or it gives no picture.
    """
    with capturing(index) as capture:
        ok, first = capture.read()
        fps = capture.get(cv2.CAP_PROP_FPS)
    if not ok:
        raise MediaError(f"camera {index} gives no picture: connect it, or give a video")

    def frames(start: int, stop: int | None) -> Iterator[Frame]:
        with capturing(index) as source:
            number = 0
            while stop is None or number < stop:
                got, image = source.read()
                if not got:
                    raise MediaError(f"camera {index} stopped after {number} frames: check its connection")
                if number >= start:
                    yield to_rgb(fit(image, size))
                number += 1

    return Clip(f"camera {index}", sane_fps(fps), size or size_of(first), None, frames)


def _open(path: Path, size: Size | None) -> list[Clip]:
    if path.is_dir():
        found = _open_folder(path, size)
        if not found:
            raise MediaError(f"{path} holds no frames, no videos and no folders of them: give {_WANTED}")
        return found
    if not path.exists():
        raise MediaError(f"{path} does not exist: give {_WANTED}")
    if not path.is_file():
        raise MediaError(f"{path} is a device or a pipe: give {_WANTED}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return [_images(path.stem, [path], None, size)]
    if path.suffix.lower() in VIDEO_SUFFIXES:
        return [_video(path, size)]
    raise MediaError(
        f"{path} is neither a video nor a picture by its name ({path.suffix or 'no suffix'}): "
        f"give one of {' '.join(sorted(VIDEO_SUFFIXES))}, or a folder of frames"
    )


def _open_folder(folder: Path, size: Size | None, deeper: bool = True) -> list[Clip]:
    composites, mattes = folder / "com", folder / "pha"
    if composites.is_dir():
        pictures = _pictures(composites)
        if not pictures:
            raise MediaError(f"{composites} holds no pictures: put the composite frames there as JPEG or PNG")
        truth = _pictures(mattes) if mattes.is_dir() else None
        if truth is not None and len(truth) != len(pictures):
            raise MediaError(
                f"{folder}: com/ holds {len(pictures)} pictures but pha/ holds {len(truth)}: "
                "each composite needs its alpha, in the same order"
            )
        return [_images(folder.name, pictures, truth, size)]
    if mattes.is_dir():
        raise MediaError(f"{folder} has pha/ but no com/: put the composite frames into com/")
    entries = _listing(folder)
    pictures = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES]
    videos = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in VIDEO_SUFFIXES]
    if pictures and videos:
        raise MediaError(
            f"{folder} holds both pictures ({pictures[0].name}) and videos ({videos[0].name}): keep one kind"
        )
    if pictures:
        return [_images(folder.resolve().name, pictures, None, size)]
    if videos:
        return [_video(video, size) for video in videos]
    if not deeper:
        return []
    return [clip for entry in entries if entry.is_dir() for clip in _open_folder(entry, size, deeper=False)]


def _listing(folder: Path) -> list[Path]:
    """List what a folder holds in natural order, hidden files left out."""
    try:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    except OSError as error:
        raise MediaError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    return sorted(entries, key=lambda entry: (natural(entry.name), entry.name))


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names as people do, 2 before 10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name) if part]


def _pictures(folder: Path) -> list[Path]:
    return [entry for entry in _listing(folder) if entry.is_file() and entry.suffix.lower() in IMAGE_SUFFIXES]


def _with_unique_names(clips: Sequence[Clip]) -> list[Clip]:
    seen: dict[str, int] = {}
    unique = []
    for clip in clips:
        seen[clip.name] = count = seen.get(clip.name, 0) + 1
        unique.append(clip if count == 1 else replace(clip, name=f"{clip.name} ({count})"))
    return unique


def _images(name: str, pictures: list[Path], truth: list[Path] | None, size: Size | None) -> Clip:
    own = size_of(read_picture(pictures[0], cv2.IMREAD_COLOR))

    def reader(files: list[Path], mode: int) -> Callable[[int, int | None], Iterator[Frame]]:
        def read(start: int, stop: int | None) -> Iterator[Frame]:
            for file in files[start:stop]:
                image = read_picture(file, mode)
                if size_of(image) != own:
                    raise MediaError(
                        f"{file} is {in_words(size_of(image))} but {pictures[0]} is {in_words(own)}: "
                        "all frames of a clip need one size"
                    )
                picture = fit(image, size)
                yield to_rgb(picture) if picture.ndim == 3 else picture

        return read

    alpha = None if truth is None else reader(truth, cv2.IMREAD_GRAYSCALE)
    clip = Clip(name, DEFAULT_FPS, size or own, len(pictures), reader(pictures, cv2.IMREAD_COLOR), alpha)
    if clip.read_alpha is not None:
        next(clip.read_alpha(0, 1))  # tells of another size now, not in the middle
    return clip


def _video(path: Path, size: Size | None) -> Clip:
    with capturing(path) as capture:
        opened = capture.isOpened()
        ok, first = read(capture, path) if opened else (False, None)
        fps = capture.get(cv2.CAP_PROP_FPS)
        announced = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if not opened:
        if not content_of(path, 1):
            raise MediaError(f"{path} is empty (0 bytes): replace or remove the file")
        raise MediaError(f"{path} cannot be decoded as a video: re-encode it, say as H.264 .mp4")
    if not ok:
        raise MediaError(f"{path} is a video without a single frame that can be decoded: check the file")
    length = count_frames(path, int(announced) if math.isfinite(announced) else 0)
    if length < 0.9 * announced:
        raise MediaError(f"{path} is damaged, only {length} of its {int(announced)} frames can be decoded: replace it")

    def frames(start: int, stop: int | None) -> Iterator[Frame]:
        with capturing(path) as source:
            for number in range(length if stop is None else stop):
                if number < start:  # seeking by number is not exact in every container; grabbing is
                    grab(source, path)
                    continue
                got, image = read(source, path)
                if not got:
                    raise MediaError(f"{path} ends after {number} of {length} frames: open it again")
                yield to_rgb(fit(image, size))

    return Clip(path.stem, sane_fps(fps), size or size_of(first), length, frames)
