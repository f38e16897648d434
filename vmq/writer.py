"""Write frames as a video or as a folder of pictures: whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import cv2
import numpy as np

from vmq.errors import OutputError
from vmq.pictures import Frame, Size, in_words, quiet
from vmq.videos import count_frames, sane_fps


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
            with quiet():
                self._video = cv2.VideoWriter(
                    str(self._scratch / "video.mp4"),
                    cv2.CAP_FFMPEG,
                    cv2.VideoWriter.fourcc(*"mp4v"),
                    sane_fps(fps),
                    (size[1] + size[1] % 2, size[0] + size[0] % 2),
                )
            if not self._video.isOpened():
                self._abandon()
                raise OutputError(f"{path} cannot be an mp4 of {in_words(size)}, or the disk is full: make room, or "
                                  "name a folder to get PNGs")

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
            if not finished.is_file() or count_frames(finished, self.count) != self.count:
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
