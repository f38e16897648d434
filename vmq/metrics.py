"""How far a matte is from the true one: the measures of RVM's evaluation, per frame, then the mean over a clip.

With p the predicted and t the true alpha of a frame, both in 0..1:

    SAD    sum |p - t| / 1000
    MAD    mean |p - t| x 1e3
    MSE    mean (p - t)^2 x 1e3
    Grad   sum (|grad t| - |grad p|)^2 / 1000, gradients of the min-max-normalised mattes by the first derivative
           of a Gaussian, sigma 1.4, 9x9, L2-normalised, border replicated
    Conn   sum |phi_t - phi_p| / 1000, phi(x) = 1 - d [d >= 0.15], d = x - l, where l is the last of the thresholds
           0, 0.1 ... 1 at which the pixel still belongs to the largest 4-connected part of {t >= l and p >= l}
    dtSSD  sqrt(mean ((p - p') - (t - t'))^2) x 1e2, with the frame before as p', t'
    F      F-score of {p > 0.5} against {t > 0.5}; 1 if both are empty

The authors count dtSSD of a clip's first frame, which has no frame before it, as 0 and include it in the mean, and
so does `Scores.dtSSD`; `Scores.dtSSD_later` is the mean without it. They score mattes as 8-bit files: to follow
them to the digit, round a prediction to uint8 first. Floats are taken as they are.

Sources: Lin et al., Robust High-Resolution Video Matting with Temporal Guidance, WACV 2022; Rhemann et al., CVPR
2009 (Grad, Conn); Erofeev et al., BMVC 2015 (dtSSD).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from vmq.errors import MediaError

Matte = NDArray[Any]
"""An alpha matte [H,W]: uint8 0..255 or floats 0..1."""


@dataclass(frozen=True)
class Scores:
    """The measures of a clip, each the mean over its frames; lower is better, but for F.

    Attributes:
        dtSSD: the authors' way, the first frame counted as 0.
        dtSSD_later: without the first frame; 0 for a clip of one frame.
    """

    SAD: float
    MAD: float
    MSE: float
    Grad: float
    Conn: float
    dtSSD: float  # noqa: N815  (the name in the literature)
    F: float
    dtSSD_later: float = 0.0  # noqa: N815

    def as_dict(self) -> dict[str, float]:
        """Give the seven measures that tables and JSON show, in their usual order."""
        return {name: value for name, value in asdict(self).items() if name != "dtSSD_later"}


def score_clip(pred: Iterable[Matte], true: Iterable[Matte]) -> Scores:
    """Score the mattes of a clip, frame by frame; only the frame before is kept.

    Args:
        pred: predicted mattes [H,W], uint8 0..255 or floats 0..1.
        true: as many true mattes of the same size.

    Raises:
        MediaError: no frames, or not as many or not of the same size as the true ones.
    """
    rows: list[tuple[float, ...]] = []
    before: tuple[Matte, Matte] | None = None
    for number, (p8, t8) in enumerate(zip_longest(pred, true)):
        if p8 is None or t8 is None:
            short, other = ("predicted", "true") if p8 is None else ("true", "predicted")
            raise MediaError(f"there are only {number} {short} mattes but more {other} ones: give as many of both")
        if p8.shape != t8.shape:
            raise MediaError(f"matte {number} is {p8.shape} but its true alpha {t8.shape}: resize one of them")
        p, t = _unit(p8), _unit(t8)
        delta = 0.0 if before is None else dtssd(p, t, *before)
        rows.append((sad(p, t), mad(p, t), mse(p, t), grad(p, t), conn(p, t), delta, fscore(p, t)))
        before = p, t
    if not rows:
        raise MediaError("there are no mattes to score: give at least one frame")
    mean = np.mean(rows, axis=0)
    later = mean[5] * len(rows) / max(len(rows) - 1, 1)
    return Scores(*(float(value) for value in (*mean, later)))


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Average clips, each with the same weight whatever its length; ValueError if there are none."""
    if not scores:
        raise ValueError("there are no scores to average")
    return Scores(*(float(np.mean([getattr(score, field.name) for score in scores])) for field in fields(Scores)))


def sad(pred: Matte, true: Matte) -> float:
    """Sum of absolute differences, in thousands."""
    return float(np.abs(_unit(pred) - _unit(true)).sum(dtype=np.float64) / 1e3)


def mad(pred: Matte, true: Matte) -> float:
    """Mean absolute difference x 1e3."""
    return float(np.abs(_unit(pred) - _unit(true)).mean(dtype=np.float64) * 1e3)


def mse(pred: Matte, true: Matte) -> float:
    """Mean squared difference x 1e3."""
    return float(np.square(_unit(pred) - _unit(true)).mean(dtype=np.float64) * 1e3)


def dtssd(pred: Matte, true: Matte, pred_before: Matte, true_before: Matte) -> float:
    """Root mean square of how differently the two mattes changed since the frame before, x 1e2."""
    change = (_unit(pred) - _unit(pred_before)) - (_unit(true) - _unit(true_before))
    return float(np.sqrt(np.square(change).mean(dtype=np.float64)) * 1e2)


def fscore(pred: Matte, true: Matte) -> float:
    """F-score, 0..1, of what the two mattes hold for more foreground than background."""
    p, t = _unit(pred) > 0.5, _unit(true) > 0.5
    both = int(p.sum()) + int(t.sum())
    return 2 * int((p & t).sum()) / both if both else 1.0


def grad(pred: Matte, true: Matte) -> float:
    """Sum of squared differences of the gradients' magnitudes, in thousands."""
    return float(np.square(_gradient(_unit(true)) - _gradient(_unit(pred))).sum(dtype=np.float64) / 1e3)


def conn(pred: Matte, true: Matte) -> float:
    """Sum of differences in connectedness to the largest part that both mattes agree on, in thousands."""
    p, t = _unit(pred), _unit(true)
    lower = np.minimum(p, t)
    level = np.ones_like(t)
    belongs = np.ones(t.shape, bool)
    for step in range(1, 11):
        stays = belongs & _largest_part(lower >= np.float32(step / 10))
        level[belongs & ~stays] = (step - 1) / 10
        belongs = stays
    phi_p, phi_t = _phi(p - level), _phi(t - level)
    return float(np.abs(phi_t - phi_p).sum(dtype=np.float64) / 1e3)


def _unit(matte: Matte) -> NDArray[np.float32]:
    """uint8 0..255 to 0..1; floats stay."""
    if matte.dtype == np.uint8:
        return matte.astype(np.float32) / np.float32(255)
    return matte.astype(np.float32, copy=False)


def _phi(distance: NDArray[np.float32]) -> NDArray[np.float32]:
    return 1 - distance * (distance >= 0.15)


def _largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=4)
    areas = stats[1:, cv2.CC_STAT_AREA]  # row 0 is what is outside the mask
    found: NDArray[np.bool_] = labels == 1 + int(np.argmax(areas)) if len(areas) else np.zeros_like(mask)
    return found


def _gradient(matte: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = float(matte.min()), float(matte.max())
    if not high > low:
        return np.zeros_like(matte)
    normed = (matte - low) / (high - low)
    across = cv2.sepFilter2D(normed, cv2.CV_32F, _SLOPE, _BELL, borderType=cv2.BORDER_REPLICATE)
    down = cv2.sepFilter2D(normed, cv2.CV_32F, _BELL, _SLOPE, borderType=cv2.BORDER_REPLICATE)
    return np.hypot(across, down)


_SIGMA = 1.4
_AT = np.arange(-4, 5, dtype=np.float64)
_BELL = np.exp(-(_AT**2) / (2 * _SIGMA**2))
_SLOPE = -_AT * _BELL
_BELL /= np.linalg.norm(_BELL)  # the L2 norm of an outer product is the product of the norms
_SLOPE /= np.linalg.norm(_SLOPE)
