"""A matting network so small that its result is known by heart, for the tests of runtime and command line.

    state' = (mean(src) * ratio + state) * FADE,    pha = state',    fgr = src / 2
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import onnx.parser
from numpy.typing import NDArray

FADE = 0.4637
"""Of so many digits that no alpha comes to lie between two 8-bit values, where rounding would be a matter of luck."""


def model(size: tuple[object, object] = (16, 24), *, foreground: bool = True, ratio: bool = False) -> onnx.ModelProto:
    """The network at a size (H, W), numbers or names of free dimensions."""
    plane = f"{size[0]}, {size[1]}"
    return onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 21]> tiny (
            float[1, 3, {plane}] src, float[1, 1, {plane}] last{", float[1] ratio" if ratio else ""}
        ) => (
            {f"float[1, 3, {plane}] fgr," if foreground else ""} float[1, 1, {plane}] pha, float[1, 1, {plane}] next
        ) <float half = {{0.5}}, float fade = {{{FADE}}}, float none = {{0.0}}, int64[1] channels = {{1}}> {{
            mean = ReduceMean <keepdims = 1> (src, channels)
            light = {"Mul (mean, ratio)" if ratio else "Identity (mean)"}
            sum = Add (light, last)
            next = Mul (sum, fade)
            pha = Add (next, none)
            {"fgr = Mul (src, half)" if foreground else ""}
        }}""")


def save(path: Path, size: tuple[object, object] = (16, 24), **options: bool) -> str:
    """Write the network to a file; returns its path."""
    onnx.save(model(size, **options), path)
    return str(path)


def alphas(frames: Iterable[NDArray[np.uint8]], ratio: float = 1.0) -> list[NDArray[np.float64]]:
    """What the network gives for a clip of uint8 [3,H,W]."""
    state, found = np.zeros(1), []
    for frame in frames:
        state = (frame.mean(axis=0) / 255 * ratio + state) * FADE
        found.append(state)
    return found


def frames(count: int = 3, size: tuple[int, int] = (16, 24), seed: int = 0) -> list[NDArray[np.uint8]]:
    """Noise, uint8 [3,H,W] RGB."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, 3, *size), np.uint8))


def save_pictures(folder: Path, pictures: Iterable[NDArray[np.uint8]]) -> Path:
    """Write uint8 [3,H,W] RGB or [H,W] as numbered PNGs."""
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures):
        image = picture if picture.ndim == 2 else np.ascontiguousarray(picture[::-1].transpose(1, 2, 0))
        assert cv2.imwrite(str(folder / f"{number:04d}.png"), image)
    return folder


def load_pictures(folder: Path) -> list[NDArray[np.uint8]]:
    """Read numbered PNGs as uint8 [3,H,W] RGB; grey ones as [H,W]."""
    images = [cv2.imread(str(path), cv2.IMREAD_UNCHANGED) for path in sorted(folder.iterdir())]
    return [image if image.ndim == 2 else image[..., ::-1].transpose(2, 0, 1) for image in images]
