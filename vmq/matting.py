"""What `vmq run` does: a clip goes in, and out comes the person over a new background, the alpha or the foreground.

    composite = alpha * foreground + (1 - alpha) * background

The result has the size of the clip. A model of another fixed size sees resized frames; its alpha is resized back,
and so is what its foreground changes of the frame (foreground - frame), which is then added to the frame at full
size: the frame's own detail stays. A model without a foreground output leaves the frame's colours as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.clips import Clip, open_camera, open_clips, to_float
from vmq.errors import MediaError, ModelError, OptionError
from vmq.pictures import Frame, Size
from vmq.progress import Report, silent
from vmq.runtime import Session, default_ratio
from vmq.writer import open_writer

Picture = NDArray[np.float32]
"""Floats 0..1, [H,W] or [3,H,W]."""

COLORS = {
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "red": (255, 0, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "white": (255, 255, 255),
}
"""Names of background colours, RGB."""

KINDS = ("composite", "alpha", "foreground")
"""What `matte` can write."""


def open_source(text: str) -> Clip:
    """The one clip that a path names, or the camera that a number names (unless a file is called so).

    Raises:
        MediaError: it cannot be read, or the path holds several clips.
    """
    if text.isdecimal() and not Path(text).exists():
        return open_camera(int(text))
    clips = open_clips([text])
    if len(clips) > 1:
        raise MediaError(f"{text} holds {len(clips)} clips ({clips[0].name}, {clips[1].name}, ...): give one of them")
    return clips[0]


def backgrounds(text: str, size: Size) -> Iterator[Frame]:
    """Frames without end, uint8 [3,H,W] RGB, of a colour, a picture or a video.

    Pictures and videos fill `size` (H, W), what stands over is cut off; a video starts again at its end.

    Args:
        text: one of COLORS, #rrggbb (with or without #), or a path.
        size: (H, W) of the frames.

    Raises:
        OptionError: it is none of these.
        MediaError: it is a file that cannot be read.
    """
    color = _color(text)
    if color is None and not Path(text).exists():
        raise OptionError(f"--background {text} is no file and no colour: give a picture, a video, #rrggbb, "
                          f"or one of {', '.join(COLORS)}")
    if color is not None:
        return _forever(np.broadcast_to(np.array(color, np.uint8)[:, None, None], (3, *size)))
    clip = open_source(text)
    if clip.length == 1:
        return _forever(_cover(next(clip.frames()), size))
    return _looped(clip, size)


def set_ratio(session: Session, size: Size, ratio: float | None) -> None:
    """Set the downsample ratio of a model that takes one.

    Args:
        session: left as it is if its model takes none.
        size: (H, W) of the frames to come.
        ratio: above 0 to 1; None for `default_ratio`.

    Raises:
        OptionError: the ratio is out of range.
    """
    if session.takes_ratio:
        session.downsample_ratio = default_ratio(size) if ratio is None else ratio


def matte(session: Session, clip: Clip, output: Path, *, kind: str = "composite", background: str = "green",
          downsample_ratio: float | None = None, first_alpha: Frame | None = None, report: Report = silent) -> int:
    """Run a model over a clip in closed loop and write the result; returns the number of frames.

    Ctrl-C ends a camera's recording, which is kept; any other clip is left, and nothing of it stays behind.

    Args:
        session: the model; its state is reset first.
        clip: frames of any size.
        output: an .mp4, or a new folder for numbered PNGs.
        kind: one of KINDS.
        background: as `backgrounds` takes it; of a meaning for a composite only.
        downsample_ratio: as `set_ratio` takes it.
        first_alpha: of the first frame, uint8 [H,W] of any size, for models that are told by it whom to follow.
            Default: the clip's, if it has one.
        report: told after each frame.

    Raises:
        ModelError: the model cannot run the clip, or has no foreground where one is asked for.
        MediaError, OptionError, OutputError: as clip, background and output say; no alpha where the model takes one.
    """
    behind = backgrounds(background, clip.size) if kind == "composite" else None
    set_ratio(session, clip.size, downsample_ratio)
    session.reset(_first_alpha(session, clip, first_alpha))
    with open_writer(output, clip.fps, clip.size) as writer:
        try:
            for frame in clip.frames():
                alpha, foreground = _run(session, frame)
                if kind == "alpha":
                    picture = alpha
                elif behind is None:
                    if foreground is None:
                        raise ModelError(f"{session.label} has no foreground output; use --alpha or --background")
                    picture = foreground
                else:
                    front = to_float(frame) if foreground is None else foreground
                    picture = alpha * front + (1 - alpha) * to_float(next(behind))
                writer.write(to_uint8(picture))
                report(clip.name, writer.count, clip.length)
        except KeyboardInterrupt:
            if clip.length is not None or writer.count == 0:
                raise
        return writer.count


def to_uint8(picture: NDArray[Any]) -> Frame:
    """Floats 0..1 to 0..255, rounded half to even, any shape.

    Raises:
        ModelError: there is a NaN among them.
    """
    if np.isnan(picture).any():
        raise ModelError("the model's output is not a number (NaN): its arithmetic overflows on this clip")
    return np.rint(np.clip(picture, 0, 1) * np.float32(255)).astype(np.uint8)


def _first_alpha(session: Session, clip: Clip, given: Frame | None) -> Frame | None:
    """The first frame's alpha at the size that the model takes; None where it takes none."""
    if session.first_alpha_input is None:
        return None
    alpha = clip.first_alpha() if given is None else given
    if alpha is None:
        raise OptionError(f"{session.label} is told whom to follow by the first frame's alpha; give it: --first-alpha "
                          "PICTURE")
    height, width = session.size
    return _resize(alpha, (height or clip.size[0], width or clip.size[1]))


def _run(session: Session, frame: Frame) -> tuple[Picture, Picture | None]:
    """Alpha [H,W] and foreground [3,H,W] at the frame's size; no foreground where the model has none."""
    size = (frame.shape[1], frame.shape[2])
    height, width = session.size
    works = (height or size[0], width or size[1])
    seen = _resize(frame, works)
    outputs = session.step(seen)
    alpha, foreground = session.alpha_of(outputs), session.foreground_of(outputs)
    if works != size:
        alpha = _resize(alpha, size)
        if foreground is not None:
            foreground = np.clip(to_float(frame) + _resize(foreground - to_float(seen), size), 0, 1)
    return alpha, foreground


def _color(text: str) -> tuple[int, ...] | None:
    if re.fullmatch(r"#?[0-9a-fA-F]{6}", text):
        return tuple(bytes.fromhex(text.removeprefix("#")))
    return COLORS.get(text.lower())


def _forever(frame: Frame) -> Iterator[Frame]:
    while True:
        yield frame


def _looped(clip: Clip, size: Size) -> Iterator[Frame]:
    while True:
        for frame in clip.frames():
            yield _cover(frame, size)


def _cover(frame: Frame, size: Size) -> Frame:
    """Scale a picture until it fills (H, W), its shape kept, and cut what stands over, the same on both sides."""
    _, height, width = frame.shape
    scale = max(size[0] / height, size[1] / width)
    larger = _resize(frame, (max(size[0], round(height * scale)), max(size[1], round(width * scale))))
    top, left = (larger.shape[1] - size[0]) // 2, (larger.shape[2] - size[1]) // 2
    return larger[:, top:top + size[0], left:left + size[1]]


def _resize(picture: NDArray[Any], size: Size) -> NDArray[Any]:
    """[H,W] or [3,H,W] to another (H, W): area to shrink, linear to grow."""
    if picture.shape[-2:] == size:
        return picture
    shrinks = size[0] <= picture.shape[-2] and size[1] <= picture.shape[-1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    planes = picture if picture.ndim == 2 else np.ascontiguousarray(picture.transpose(1, 2, 0))
    resized = np.asarray(cv2.resize(planes, (size[1], size[0]), interpolation=how))
    return resized if picture.ndim == 2 else resized.transpose(2, 0, 1)
