"""Make vmq/figure/: cut the person out of scikit-image's portrait, with soft edges and clean colours.

The portrait is NASA's official photograph of Eileen Collins (public domain), `skimage.data.astronaut()`. Run once;
the result is part of the package, so scikit-image is not needed to use it:

    python tools/make_figure.py

How: a hand-set outline gives a narrow band of doubt, GrabCut decides in it, a guided filter makes the edge as soft
as the picture says; inside the band the foreground's colour is continued from the sure foreground, so that nothing
of the old background shines through. The helmet in her arm is replaced by the mirror image of her other arm.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

OUTLINE = [
    *[(230, 15), (215, 18), (205, 21), (195, 27), (190, 34), (183, 37), (172, 43), (162, 52), (155, 62)],
    *[(153, 72), (154, 85), (156, 97), (162, 108), (169, 117), (172, 123), (176, 130), (182, 132)],
    *[(184, 140), (184, 148), (175, 148), (160, 149), (145, 153), (133, 160), (124, 170), (120, 180)],
    *[(113, 187), (112, 196), (113, 206), (105, 211), (97, 222), (85, 233), (75, 239), (62, 253), (55, 265)],
    *[(47, 275), (42, 290), (37, 305), (33, 318), (29, 330), (26, 340), (25, 360), (24, 380), (19, 395)],
    *[(20, 415), (23, 430), (23, 445), (24, 460), (26, 475), (30, 490), (38, 511), (363, 511), (363, 335)],
    *[(360, 325), (357, 310), (354, 295), (350, 284), (345, 272), (338, 260), (328, 249), (316, 240)],
    *[(308, 237), (304, 236), (300, 225), (293, 212), (282, 195), (270, 183), (258, 175), (256, 172)],
    *[(257, 163), (261, 155), (264, 145), (265, 140), (266, 136), (274, 135), (277, 130), (276, 128)],
    *[(284, 120), (293, 108), (298, 97), (301, 85), (299, 72), (296, 60), (290, 47), (283, 37), (270, 29)],
    *[(255, 22), (243, 16)],
]
HELMET = [
    *[(258, 512), (268, 440), (280, 405), (297, 384), (324, 379), (334, 352), (342, 338), (352, 327)],
    *[(400, 318), (512, 318), (512, 512)],
]
MIRROR = 389  # x of a point of her right arm and x of the same point of her left arm add up to this
BOTTOM = 476  # below it a hand comes into the picture, which has no twin
DOUBT = 5  # pixels on either side of the outline


def main() -> None:
    from skimage import data

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path(__file__).parents[1] / "vmq" / "figure")
    out = parser.parse_args().out
    photo = np.ascontiguousarray(data.astronaut()[..., ::-1])
    colour, alpha = replace_helmet(*cut_out(photo))
    columns = np.flatnonzero(alpha[:BOTTOM].max(axis=0) > 0)
    rows = np.flatnonzero(alpha[:BOTTOM].max(axis=1) > 0)
    window = slice(rows[0] - 2, BOTTOM), slice(max(columns[0] - 2, 0), columns[-1] + 3)
    out.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(out / "colour.jpg"), rounded(colour[window]), [cv2.IMWRITE_JPEG_QUALITY, 92])
    cv2.imwrite(str(out / "alpha.png"), rounded(alpha[window] * 255), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    for file in sorted(out.iterdir()):
        print(f"{file}: {file.stat().st_size} bytes")


def rounded(values: Array) -> NDArray[np.uint8]:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def cut_out(photo: NDArray[np.uint8]) -> tuple[Array, Array]:
    """Separate the person: colours [H,W,3] BGR 0..255 continued past the edge, alpha [H,W] 0..1."""
    inside = np.zeros(photo.shape[:2], np.uint8)
    cv2.fillPoly(inside, [np.array(OUTLINE, np.int32)], 1)
    within = cv2.distanceTransform(np.pad(inside, 1, mode="edge"), cv2.DIST_L2, 5)[1:-1, 1:-1]
    outside = cv2.distanceTransform(1 - inside, cv2.DIST_L2, 5)
    mask = np.where(inside, np.uint8(cv2.GC_PR_FGD), np.uint8(cv2.GC_PR_BGD))
    mask[within > DOUBT] = cv2.GC_FGD
    mask[outside > DOUBT] = cv2.GC_BGD
    cv2.setRNGSeed(0)
    cv2.grabCut(photo, mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 6, cv2.GC_INIT_WITH_MASK)
    hard = np.where((mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD), np.float32(1), np.float32(0))
    hard = cv2.medianBlur(hard, 5)
    soft = guided(photo.astype(np.float32) / 255, cv2.GaussianBlur(hard, (0, 0), 0.8), radius=4, eps=2e-3)
    soft[within > DOUBT + 3] = 1
    soft[outside > DOUBT + 2] = 0
    alpha = np.clip((soft - 0.06) / 0.86, 0, 1).astype(np.float32)
    sure = cv2.erode((alpha > 0.97).astype(np.uint8), np.ones((3, 3), np.uint8))
    return continue_colours(photo.astype(np.float32), sure.astype(np.float32)), alpha


def guided(guide: Array, mask: Array, radius: int, eps: float) -> Array:
    """Filter a mask so that its edges follow the colour guide (He et al., ECCV 2010, equation 14)."""

    def mean(values: Array) -> Array:
        return cv2.blur(values, (2 * radius + 1, 2 * radius + 1))

    centre, level = mean(guide), mean(mask)
    outer = mean((guide[..., :, None] * guide[..., None, :]).reshape(*mask.shape, 9)).reshape(*mask.shape, 3, 3)
    variance = outer - centre[..., :, None] * centre[..., None, :] + eps * np.eye(3, dtype=np.float32)
    covariance = mean(guide * mask[..., None]) - centre * level[..., None]
    slope = np.linalg.solve(variance, covariance[..., None])[..., 0]
    offset = level - (slope * centre).sum(axis=-1)
    return (mean(slope) * guide).sum(axis=-1) + mean(offset)


def continue_colours(colours: Array, sure: Array) -> Array:
    """Continue the colours of the sure pixels over all others, each from the nearest scale that has any."""
    result, known = colours * sure[..., None], sure.copy()
    for sigma in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0):
        weight = cv2.GaussianBlur(sure, (0, 0), sigma)
        near = cv2.GaussianBlur(colours * sure[..., None], (0, 0), sigma) / np.maximum(weight, 1e-6)[..., None]
        take = (known == 0) & (weight > 0.02)
        result[take], known[take] = near[take], 1
    result[known == 0] = colours[sure > 0].mean(axis=0)
    return result


def replace_helmet(colour: Array, alpha: Array) -> tuple[Array, Array]:
    """Put the mirror image of the other arm where the helmet is, with a soft seam."""
    area = np.zeros(alpha.shape, np.uint8)
    cv2.fillPoly(area, [np.array(HELMET, np.int32)], 1)
    share = cv2.GaussianBlur(area.astype(np.float32), (0, 0), 2.5)
    flip = np.float32([[-1, 0, MIRROR], [0, 1, 0]])
    size = alpha.shape[::-1]
    twin_colour = cv2.warpAffine(colour, flip, size, borderMode=cv2.BORDER_REPLICATE)
    twin_alpha = cv2.warpAffine(alpha, flip, size)
    return (
        colour * (1 - share[..., None]) + twin_colour * share[..., None],
        alpha * (1 - share) + twin_alpha * share,
    )


if __name__ == "__main__":
    main()
