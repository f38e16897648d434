"""One picture: read from a file, resized, and turned into the RGB that frames are."""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

# OpenCV reads this with the first picture: a header may claim any size, and memory is taken before the pixels are seen
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 26))

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.errors import MediaError

Frame = NDArray[np.uint8]
Size = tuple[int, int]

LARGEST = 8 << 26
"""Bytes of a picture's file, at most: as many pixels as are read above, uncompressed, of four 16-bit channels."""
_logging: Any = cv2 if hasattr(cv2, "setLogLevel") else cv2.utils.logging  # OpenCV 4, OpenCV 5
_lock, _decoding = threading.Lock(), 0
_before: tuple[int, int | None] = (0, None)


def read_picture(path: Path, mode: int) -> Frame:
    """Decode a picture; a truncated or damaged one, of which OpenCV would make up the rest, is an error."""
    data = content_of(path)
    truncated = (data.startswith(b"\xff\xd8") and data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")) or (
        data.startswith(b"\x89PNG") and b"IEND" not in data
    )
    damaged = data.startswith(b"\x89PNG") and not truncated and not _sums_are_right(data)
    image = None
    if data and not truncated and not damaged:
        with quiet(), contextlib.suppress(cv2.error):
            image = cv2.imdecode(np.frombuffer(data, np.uint8), mode)
    if image is None:
        what = ("is empty" if not data else "is truncated" if truncated else "is damaged" if damaged
                else "cannot be decoded")
        raise MediaError(f"{path} {what} ({len(data)} bytes): replace or remove the file")
    return cast(Frame, image)


def content_of(path: Path, most: int = -1) -> bytes:
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


def fit(image: object, size: Size | None) -> Frame:
    """A picture resized to (H, W), area to shrink and linear to grow; as it is for None."""
    picture = cast(Frame, image)
    if size is None or size_of(picture) == size:
        return picture
    shrinks = size[0] <= picture.shape[0] and size[1] <= picture.shape[1]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cast(Frame, cv2.resize(picture, (size[1], size[0]), interpolation=how))


def to_rgb(bgr: Frame) -> Frame:
    """OpenCV's [H,W,3] BGR as [3,H,W] RGB."""
    return np.ascontiguousarray(bgr[..., ::-1].transpose(2, 0, 1))


def size_of(image: object) -> Size:
    """(H, W) of a picture [H,W,...]."""
    height, width = cast(Frame, image).shape[:2]
    return int(height), int(width)


def in_words(size: Size) -> str:
    """(H, W) as people write it, WxH."""
    return f"{size[1]}x{size[0]}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what OpenCV and its decoders say of a file off stderr: what is wrong is told by an exception.

    libjpeg writes to descriptor 2 whatever OpenCV's level of logging is. Threads that decode at the same time share one
    redirection, which ends with the last of them.
    """
    global _decoding, _before
    with _lock:
        _decoding += 1
        if _decoding == 1:
            _before = _logging.getLogLevel(), _redirected()
            _logging.setLogLevel(0)
    try:
        yield
    finally:
        with _lock:
            _decoding -= 1
            if _decoding == 0:
                level, stderr = _before
                _logging.setLogLevel(level)
                if stderr is not None:
                    os.dup2(stderr, 2)
                    os.close(stderr)


def _redirected() -> int | None:
    """Send descriptor 2 nowhere; returns a copy of where it went, None if it is closed."""
    try:
        kept = os.dup(2)
    except OSError:
        return None
    with Path(os.devnull).open("wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    return kept


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
