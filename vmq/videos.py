"""Videos and cameras through OpenCV: quiet about what is wrong with a file, and not for ever in search of frames."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# FFmpeg reads this when the first video is opened; what is wrong with a file is told by exceptions
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2

from vmq.errors import MediaError
from vmq.pictures import quiet

DEFAULT_FPS = 25.0
PATIENCE = 10.0
"""Seconds that FFmpeg may search a video for its streams, or for its next frame: sparse or damaged, it may be huge."""


def count_frames(path: Path, announced: int) -> int:
    """Count the frames: the header's word if the last frame is where it says, else by decoding them."""
    if announced > 0:
        with capturing(path) as capture:
            capture.set(cv2.CAP_PROP_POS_FRAMES, announced - 1)
            there = int(capture.get(cv2.CAP_PROP_POS_FRAMES)) == announced - 1
            if there and grab(capture, path) and not grab(capture, path):
                return announced
    with capturing(path) as capture:
        count = 0
        while grab(capture, path):
            count += 1
    return count


def read(capture: cv2.VideoCapture, path: Path) -> tuple[bool, Any]:
    """The next frame as OpenCV gives it; (False, None) at the end."""
    return capture.retrieve() if grab(capture, path) else (False, None)


def grab(capture: cv2.VideoCapture, path: Path) -> bool:
    """Go on to the next frame; False at the end."""
    started = time.monotonic()
    with quiet():
        found = capture.grab()
    if not found and time.monotonic() - started >= PATIENCE:
        raise MediaError(f"{path}: a search of {PATIENCE:g} seconds found no further frame and no end of the video: "
                         "re-encode it, or put it on a faster disk")
    return found


@contextlib.contextmanager
def capturing(source: Path | int) -> Iterator[cv2.VideoCapture]:
    """A video, or the camera of that number, opened by OpenCV and released at the end."""
    limits = [n for p in (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, cv2.CAP_PROP_READ_TIMEOUT_MSEC)
              for n in (p, round(1000 * PATIENCE))]
    with quiet():
        capture = cv2.VideoCapture(source) if isinstance(source, int) else cv2.VideoCapture(
            str(source), cv2.CAP_FFMPEG, limits)
    try:
        yield capture
    finally:
        capture.release()


def sane_fps(fps: float) -> float:
    """Frames a second as a file or a camera says, or `DEFAULT_FPS` where that cannot be."""
    return float(fps) if math.isfinite(fps) and 0 < fps <= 1000 else DEFAULT_FPS
