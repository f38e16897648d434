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
import shutil
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

# FFmpeg reads this when the first video is opened; what is wrong with a file is told by exceptions
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
# and this with the first picture: a header may claim any size, and memory is taken before the pixels are looked at
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.errors import MediaError, OutputError

Frame = NDArray[np.uint8]
Size = tuple[int, int]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})
VIDEO_SUFFIXES = frozenset({
    ".3gp",
    ".avi",
    ".flv",
    ".gif",
    ".m4v",
    ".mkv",
    ".mov",
    ".mp4",
    ".mpeg",
    ".mpg",
    ".ogv",
    ".ts",
    ".webm",
})
_logging: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 4, OpenCV 5
DEFAULT_FPS = 25.0
LARGEST = 8 << 26
"""Bytes of a picture's file, at most: as many pixels as are read above, uncompressed, of four 16-bit channels."""
PATIENCE = 10.0
"""Seconds that FFmpeg may search a video for its streams, or for its next frame: sparse or damaged, it may be huge."""
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
    with _capture(index) as capture:
        ok, first = capture.read()
        fps = capture.get(cv2.CAP_PROP_FPS)
    if not ok:
        raise MediaError(f"camera {index} gives no picture: connect it, or give a video")

    def frames(start: int, stop: int | None) -> Iterator[Frame]:
        with _capture(index) as source:
            number = 0
            while stop is None or number < stop:
                got, image = source.read()
                if not got:
                    raise MediaError(f"camera {index} stopped after {number} frames: check its connection")
                if number >= start:
                    yield _to_rgb(_fit(image, size))
                number += 1

    return Clip(f"camera {index}", _sane_fps(fps), size or _size_of(first), None, frames)


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
    own = _size_of(_read_image(pictures[0], cv2.IMREAD_COLOR))

    def reader(files: list[Path], mode: int) -> Callable[[int, int | None], Iterator[Frame]]:
        def read(start: int, stop: int | None) -> Iterator[Frame]:
            for file in files[start:stop]:
                image = _read_image(file, mode)
                if _size_of(image) != own:
                    raise MediaError(
                        f"{file} is {_words(_size_of(image))} but {pictures[0]} is {_words(own)}: "
                        "all frames of a clip need one size"
                    )
                fitted = _fit(image, size)
                yield _to_rgb(fitted) if fitted.ndim == 3 else fitted

        return read

    alpha = None if truth is None else reader(truth, cv2.IMREAD_GRAYSCALE)
    clip = Clip(name, DEFAULT_FPS, size or own, len(pictures), reader(pictures, cv2.IMREAD_COLOR), alpha)
    if clip.read_alpha is not None:
        next(clip.read_alpha(0, 1))  # tells of another size now, not in the middle
    return clip


def _read_image(path: Path, mode: int) -> Frame:
    """Decode a picture; a truncated or damaged one, of which OpenCV would make up the rest, is an error."""
    data = _content(path)
    truncated = (data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")) or (
        data.startswith(b"\x89PNG") and b"IEND" not in data
    )
    damaged = data.startswith(b"\x89PNG") and not truncated and not _sums_are_right(data)
    image = None
    if data and not truncated and not damaged:
        with _quiet(), contextlib.suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    if image is None:
        what = ("is empty" if not data else "is truncated" if truncated else "is damaged" if damaged
                else "cannot be decoded")
        raise MediaError(f"{path} {what} ({len(data)} bytes): replace or remove the file")
    return cast(Frame, image)


def _sums_are_right(png: bytes) -> bool:
    """Whether the checksums of a PNG's chunks are those of their content."""
    place = 8
    while place + 12 <= len(png):
        end = place + 8 + int.from_bytes(png[place:place + 4])
        if zlib.crc32(png[place + 4:end]) != int.from_bytes(png[end:end + 4]):
            return False
        if png[place + 4:place + 8] == b"IEND":
            return True
        place = end + 4
    return False


def _content(path: Path, most: int = -1) -> bytes:
    """All of a picture's file, or the first bytes of any."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if most < 0 and size > LARGEST:
                raise MediaError(f"{path} has {size / 1e9:.1f} GB, and a picture at most {LARGEST / 1e9:.1f}: replace "
                                 "or remove the file")
            return file.read(most)
    except OSError as error:
        raise MediaError(f"{path} cannot be read ({error.strerror}): check the file") from error


def _video(path: Path, size: Size | None) -> Clip:
    with _capture(path) as capture:
        opened = capture.isOpened()
        ok, first = _read(capture, path) if opened else (False, None)
        fps = capture.get(cv2.CAP_PROP_FPS)
        announced = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    if not opened:
        if not _content(path, 1):
            raise MediaError(f"{path} is empty (0 bytes): replace or remove the file")
        raise MediaError(f"{path} cannot be decoded as a video: re-encode it, say as H.264 .mp4")
    if not ok:
        raise MediaError(f"{path} is a video without a single frame that can be decoded: check the file")
    length = _count_frames(path, int(announced) if math.isfinite(announced) else 0)
    if length < 0.9 * announced:
        raise MediaError(f"{path} is damaged, only {length} of its {int(announced)} frames can be decoded: replace it")

    def frames(start: int, stop: int | None) -> Iterator[Frame]:
        with _capture(path) as source:
            for number in range(length if stop is None else stop):
                if number < start:  # seeking by number is not exact in every container; grabbing is
                    _grab(source, path)
                    continue
                got, image = _read(source, path)
                if not got:
                    raise MediaError(f"{path} ends after {number} of {length} frames: open it again")
                yield _to_rgb(_fit(image, size))

    return Clip(path.stem, _sane_fps(fps), size or _size_of(first), length, frames)


def _count_frames(path: Path, announced: int) -> int:
    """Count the frames: the header's word if the last frame is where it says, else by decoding them."""
    if announced > 0:
        with _capture(path) as capture:
            capture.set(cv2.CAP_PROP_POS_FRAMES, announced - 1)
            there = int(capture.get(cv2.CAP_PROP_POS_FRAMES)) == announced - 1
            if there and _grab(capture, path) and not _grab(capture, path):
                return announced
    with _capture(path) as capture:
        count = 0
        while _grab(capture, path):
            count += 1
    return count


def _read(capture: cv2.VideoCapture, path: Path) -> tuple[bool, Any]:
    """The next frame as OpenCV gives it; (False, None) at the end."""
    return capture.retrieve() if _grab(capture, path) else (False, None)


def _grab(capture: cv2.VideoCapture, path: Path) -> bool:
    """Go on to the next frame; False at the end."""
    started = time.monotonic()
    with _quiet():
        found = capture.grab()
    if not found and time.monotonic() - started >= PATIENCE:
        raise MediaError(f"{path}: a search of {PATIENCE:g} seconds found no further frame and no end of the video: "
                         "re-encode it, or put it on a faster disk")
    return found


@contextlib.contextmanager
def _capture(source: Path | int) -> Iterator[cv2.VideoCapture]:
    limits = [n for p in (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
              for n in (p, round(1000 * PATIENCE))]
    with _quiet():
        capture = cv2.VideoCapture(source) if isinstance(source, int) else cv2.VideoCapture(
            str(source), cv2.CAP_FFMPEG, limits)
    try:
        yield capture
    finally:
        capture.release()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep OpenCV's own complaints off stderr: what is wrong is told by an exception."""
    level = _logging.getLogLevel()
    _logging.setLogLevel(0)
    try:
        yield
    finally:
        _logging.setLogLevel(level)


def _size_of(image: object) -> Size:
    height, width = cast(Frame, image).shape[:2]
    return int(height), int(width)


def _words(size: Size) -> str:
    return f"{size[1]}x{size[0]}"


def _sane_fps(fps: float) -> float:
    return float(fps) if math.isfinite(fps) and 0 < fps <= 1000 else DEFAULT_FPS


def _fit(image: object, size: Size | None) -> Frame:
    picture = cast(Frame, image)
    if size is None or _size_of(picture) == size:
        return picture
    shrinks = size[0] <= picture.shape[0] and size[1] <= picture.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cast(Frame, cv2.resize(picture, (size[1], size[0]), interpolation=how))


def _to_rgb(bgr: Frame) -> Frame:
    return np.ascontiguousarray(bgr[..., ::-1].transpose(2, 0, 1))


class Writer:
    """Writes frames beside the target and moves the finished work into place; made by `open_writer`."""

    def __init__(self, path: Path, fps: float, size: Size) -> None:
        self.path, self.size, self.count = path, size, 0
        self._folder = path.suffix.lower() != ".mp4"
        if self._folder and path.suffix:
            raise OutputError(f"{path} is no name for a result: end it in .mp4, or name a folder")
        if not path.absolute().parent.is_dir():
            raise OutputError(f"{path} cannot be written, {path.parent} is no folder: create it first")
        if path.is_dir() and (not self._folder or any(path.iterdir())):
            raise OutputError(f"{path} is a folder that holds files already: name a new one")
        if self._folder and path.exists() and not path.is_dir():
            raise OutputError(f"{path} exists and is not a folder: end it in .mp4, or name a new folder")
        try:
            self._scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror}): name another folder") from error
        self._clean = weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        self._video: cv2.VideoWriter | None = None
        if not self._folder:
            with _quiet():
                self._video = cv2.VideoWriter(
                    str(self._scratch / "video.mp4"),
                    cv2.CAP_FFMPEG,
                    cv2.VideoWriter.fourcc(*"mp4v"),
                    _sane_fps(fps),
                    (size[1] + size[1] % 2, size[0] + size[0] % 2),
                )
            if not self._video.isOpened():
                self._abandon()
                raise OutputError(f"{path} cannot be an mp4 of {_words(size)}, or the disk is full: make room, or name "
                                  "a folder to get PNGs")

    def write(self, frame: Frame) -> None:
        """Append a frame, uint8: [3,H,W] RGB, or [H,W] grey."""
        if frame.dtype != np.uint8 or frame.shape not in {self.size, (3, *self.size)}:
            wanted = f"uint8 {self.size} or {(3, *self.size)}"
            raise ValueError(f"expected {wanted}, got {frame.dtype} {frame.shape}")
        image = frame if frame.ndim == 2 else np.ascontiguousarray(frame[::-1].transpose(1, 2, 0))
        if self._video is not None:
            if frame.ndim == 2:
                image = cast(Frame, cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))
            bottom, right = self.size[0] % 2, self.size[1] % 2  # the codec wants even sides
            if bottom or right:
                image = cast(Frame, cv2.copyMakeBorder(image, 0, bottom, 0, right, cv2.BORDER_REPLICATE))
            self._video.write(image)
        else:
            data = cv2.imencode(".png", image)[1]
            try:
                (self._scratch / f"{self.count:04d}.png").write_bytes(data.tobytes())
            except OSError as error:
                raise OutputError(f"{self.path} cannot be written ({error.strerror}): make room") from error
        self.count += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
        else:
            self._finish()

    def _finish(self) -> None:
        try:
            if self.count == 0:
                raise OutputError(f"{self.path} was not written: there was no frame to write")
            if self._video is None:
                if self.path.is_dir():
                    self.path.rmdir()
                self._scratch.chmod(0o777 & ~_umask())
                self._scratch.replace(self.path)
                return
            self._video.release()
            finished = self._scratch / "video.mp4"
            if not finished.is_file() or _count_frames(finished, self.count) != self.count:
                raise OutputError(f"{self.path} was not written whole: check that the disk is not full")
            finished.replace(self.path)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror}): name another") from error
        finally:
            self._abandon()

    def _abandon(self) -> None:
        if self._video is not None:
            self._video.release()
        self._clean()


def open_writer(path: str | Path, fps: float, size: Size) -> Writer:
    """Open a video (.mp4) or a folder of numbered PNGs for writing; use it in a `with`.

    Frames go into a hidden scratch folder beside the target; on success the result is moved into place in one
    step, on any error it is removed, and what stood at `path` stays.

    Args:
        path: ends in .mp4, or names a folder that is new or empty.
        fps: frames a second, of no meaning for a folder.
        size: (H, W). An mp4 of odd height or width gets its last row or column twice.

    Raises:
        OutputError: it cannot be written, or no frame was.
    """
    return Writer(Path(path), fps, size)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
