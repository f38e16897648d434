"""Footage that is calibrated and scored on: as it was given, or made of what was given and kept in a folder.

What is made follows from what it is made of and how, and its folder is named after both, so it is made once. Nothing
is lost on the way: pictures are PNG. Stills get motion in the manner of the D646 set of RVM's evaluation (Lin et al.
2022, section 5.1): foreground and alpha go from one random affine to another in equal steps,

    frame = colour * alpha + (1 - alpha) * background,    both moved by  c + t + R(angle) K(shear) s (x - c)

here over the moving backgrounds of the built-in clips, with their noise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.clips import Clip, open_clips, sample_clips, to_float
from vmq.errors import MediaError
from vmq.pictures import Frame, Size
from vmq.synthetic import FPS, scene
from vmq.writer import open_writer

Array = NDArray[np.float32]

VERSION = 1
"""Raise it when what is made changes."""
STILL_FRAMES = 24
"""Frames from one affine to the other."""
LARGE_FRAMES = 12
"""So many of them are used where frames have more than a megapixel."""
SEED = 2
"""Of motions and backgrounds; `vmq compile` calibrates on the built-in clips of seed 0."""


class Footage(Protocol):
    """Something to calibrate or to score on."""

    @property
    def key(self) -> str:
        """A hash over everything that decides its frames."""

    def ready(self) -> Sequence[Path]:
        """The paths to give to `vmq`, made if need be."""


class Given:
    """Footage as the user has it; none is what `vmq compile` takes without --calib."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [p.resolve() for p in paths]

    @cached_property
    def key(self) -> str:
        """A hash over the names and sizes of all files; MediaError where there are none."""
        lines = []
        for path in self.paths:
            files = sorted(f for f in (path.rglob("*") if path.is_dir() else [path]) if f.is_file())
            if not files:
                raise MediaError(f"there is no footage at {path}; name some, --help says with what")
            lines += [f"{f.relative_to(path.parent)} {f.stat().st_size}" for f in files]
        return digest("\n".join(lines).encode())

    def ready(self) -> Sequence[Path]:
        return self.paths


class Made:
    """Clips made of other footage, written when they are first asked for.

    Args:
        folder: where; in a folder of its own there.
        source: what they are made of.
        how: with which settings, in plain JSON types.
        clips: makes them.
    """

    def __init__(self, folder: Path, source: Given, how: Mapping[str, Any], clips: Callable[[], list[Clip]]) -> None:
        self.folder, self.source, self.how, self.clips = folder, source, how, clips

    @cached_property
    def key(self) -> str:
        return digest(json.dumps([VERSION, self.how, self.source.key], sort_keys=True).encode())

    def ready(self) -> Sequence[Path]:
        path = self.folder / f"{self.how['name']}.{self.key[:16]}"
        if not path.exists():
            unfinished = path.with_name(f".{path.name}")
            shutil.rmtree(unfinished, ignore_errors=True)
            for clip in self.clips():
                _write(clip, unfinished / clip.name)
            unfinished.replace(path)
        return [path]


def first_frames(source: Given, frames: int, folder: Path) -> Made:
    """So many frames of calibration footage, chosen and cut into stretches as `vmq compile` does it."""
    def clips() -> list[Clip]:
        given = open_clips(source.paths)
        return sample_clips(given, frames, stretch=min(32, max(8, frames // len(given))))

    return Made(folder, source, {"name": f"calib-{frames}", "frames": frames}, clips)


def resized(source: Given, size: Size, folder: Path) -> Made:
    """All clips at another size (H, W)."""
    return Made(folder, source, {"name": f"{size[1]}x{size[0]}", "size": size}, lambda: open_clips(source.paths, size))


def moving_stills(source: Given, size: Size, folder: Path) -> Made:
    """Stills with motion, frames of (H, W), of pictures with alpha or of the first frames of clips with alpha."""
    frames = STILL_FRAMES if size[0] * size[1] <= 1 << 20 else LARGE_FRAMES

    def clips() -> list[Clip]:
        found = [still for path in source.paths for still in _stills(path)]
        if not found:
            raise MediaError(f"{source.paths[0]} holds neither pictures nor clips with alpha; name some with --stills")
        return [_clip(name, picture, size, index).part(0, frames) for index, (name, picture) in enumerate(found)]

    return Made(folder, source, {"name": f"stills-{size[1]}x{size[0]}", "size": size, "frames": frames}, clips)


def digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def _write(clip: Clip, folder: Path) -> None:
    """A clip as CLIP/com and CLIP/pha, or as a folder of frames where it has no alpha."""
    alpha = clip.alpha()
    for name, frames in {"": clip.frames()}.items() if alpha is None else {"com": clip.frames(), "pha": alpha}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open_writer(folder / name, clip.fps, clip.size) as writer:
            for frame in frames:
                writer.write(frame)


# ------------------------------------------------------------------------------------------------------- stills


def _stills(path: Path) -> Iterator[tuple[str, Array]]:
    """Pictures with alpha, by name: float32 [H,W,4], RGB 0..255 straight, alpha 0..1."""
    files = sorted(path.glob("*.png")) if path.is_dir() else [path] if path.suffix == ".png" else []
    for file in files:
        picture = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        if picture is None or picture.ndim != 3 or picture.shape[2] != 4 or picture.dtype != np.uint8:
            raise MediaError(f"{file} is no 8-bit picture with alpha, as --stills wants it")
        yield file.stem, np.dstack([picture[..., 2::-1], to_float(picture[..., 3])]).astype(np.float32)
    for clip in open_clips([path]) if not files else []:
        alpha = clip.alpha(0, 1)
        if alpha is not None:
            colour = next(clip.frames()).transpose(1, 2, 0)
            yield clip.name, np.dstack([colour, to_float(next(alpha))]).astype(np.float32)


def _clip(name: str, still: Array, size: Size, index: int) -> Clip:
    placed, affine = _placed(still, size), motion(size, np.random.default_rng((SEED, index)))

    def draw(number: int) -> tuple[Frame, Frame]:
        matrix = affine(number / (STILL_FRAMES - 1))
        moved = cv2.warpAffine(placed, matrix, size[::-1], flags=cv2.INTER_LINEAR)
        alpha = np.clip(np.rint(moved[..., 3] * 255), 0, 255).astype(np.uint8)
        behind = scene(size, SEED, index).layers(number)
        image = moved[..., :3] + behind.background * (1 - to_float(alpha)[..., None]) + behind.noise
        return np.clip(np.rint(image), 0, 255).astype(np.uint8).transpose(2, 0, 1), alpha

    def read(which: int) -> Callable[[int, int | None], Iterator[Frame]]:
        return lambda start, stop: (draw(n)[which] for n in range(start, STILL_FRAMES if stop is None else stop))

    return Clip(name, FPS, size, STILL_FRAMES, read(0), read(1))


def _placed(still: Array, size: Size) -> Array:
    """The picture as large as the frame allows, at the middle of its lower edge, premultiplied [H,W,4]."""
    scale = min(size[0] / still.shape[0], size[1] / still.shape[1])
    tall, wide = round(still.shape[0] * scale), round(still.shape[1] * scale)
    whole = np.dstack([still[..., :3] * still[..., 3:], still[..., 3]])
    whole = cv2.resize(whole, (wide, tall), interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    left = (size[1] - wide) // 2
    return np.pad(whole, ((size[0] - tall, 0), (left, size[1] - wide - left), (0, 0)))


def motion(size: Size, rng: np.random.Generator) -> Callable[[float], NDArray[np.float64]]:
    """A 2x3 affine for each time 0..1, on the straight way from one random affine to another."""
    height, width = size
    ends = np.array([[rng.uniform(-10, 10), rng.uniform(-0.1, 0.1) * width, rng.uniform(-0.1, 0.1) * height,
                      rng.uniform(0.9, 1.1), rng.uniform(-5, 5)] for _ in range(2)])

    def at(time: float) -> NDArray[np.float64]:
        angle, right, down, scale, shear = ends[0] + (ends[1] - ends[0]) * time
        cosine, sine = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
        turn = scale * np.array([[cosine, -sine], [sine, cosine]]) @ np.array([[1, np.tan(np.deg2rad(shear))], [0, 1]])
        centre = np.array([width, height]) / 2
        return np.column_stack([turn, centre - turn @ centre + np.array([right, down])])

    return at
