"""Resizing as ONNX's Resize defines it: along each axis every new value is a weighted sum of a few old ones.

    y[i] = sum over t of weight[t, i] * x[tap[t, i]]

with one tap for nearest, two for linear and four for cubic (Keys 1981). Where torch has the same in one function,
that is used.
"""

from __future__ import annotations

from math import floor
from typing import Any

import numpy as np
import torch
from torch import Tensor


def resize(x: Tensor, factors: list[float], sizes: list[int] | None, mode: str, where: str, nearest: str,
           steepness: float, inner: bool) -> Tensor:
    """Resize every axis of a tensor.

    Args:
        x: any shape.
        factors: new size / old size of each axis, as the coordinates are computed with.
        sizes: the new shape; None: old sizes times factors, rounded down.
        mode: nearest, linear or cubic.
        where: ONNX's coordinate_transformation_mode: half_pixel, pytorch_half_pixel, asymmetric or align_corners.
        nearest: its nearest_mode.
        steepness: its cubic_coeff_a.
        inner: its exclude_outside: taps outside the axis count nothing, instead of being moved to its ends.
    """
    sizes = sizes or [floor(np.float32(f) * np.float32(n)) for f, n in zip(factors, x.shape, strict=True)]
    if mode == "linear" and x.ndim == 4 and list(x.shape[:2]) == sizes[:2] and (
            where in ("half_pixel", "align_corners") or (where == "pytorch_half_pixel" and min(sizes[2:]) > 1)):
        return torch.ops.aten.upsample_bilinear2d(x, sizes[2:], where == "align_corners", *factors[2:])
    for axis, (factor, size) in enumerate(zip(factors, sizes, strict=True)):
        if size != x.shape[axis] or factor != 1.0:
            taps, weights = _taps(x.shape[axis], size, factor, mode, where, nearest, steepness, inner)
            x = _weigh(x, axis, taps, weights)
    return x


def _weigh(x: Tensor, axis: int, taps: Any, weights: Any) -> Tensor:
    """sum over t of weights[t] * x at taps[t], along one axis; both are [taps, size]."""
    along = [1] * x.ndim
    along[axis] = -1
    result: Tensor | None = None
    for places, weight in zip(taps, weights, strict=True):
        part = x.index_select(axis, torch.from_numpy(places).to(x.device))
        if len(taps) > 1:
            part = part * torch.from_numpy(weight).to(x).reshape(along)
        result = part if result is None else result + part
    assert result is not None
    return result


def _taps(length: int, size: int, factor: float, mode: str, where: str, nearest: str, steepness: float, inner: bool,
          ) -> tuple[Any, Any]:
    """Which values of an axis each of its new values is made of, and with which weights."""
    one, scale = np.float32(1), np.float32(factor)
    new = np.arange(size, dtype=np.float32)
    if where == "align_corners":
        old = new * np.float32(length - 1) / np.float32(size - 1) if size > 1 else new * 0
    elif where == "asymmetric":
        old = new / scale
    elif where == "pytorch_half_pixel" and size == 1:
        old = new * 0
    else:
        old = (new + one / 2) / scale - one / 2
    if mode == "nearest":
        rounded = {"floor": np.floor(old), "ceil": np.ceil(old), "round_prefer_floor": np.ceil(old - one / 2),
                   "round_prefer_ceil": np.floor(old + one / 2)}[nearest]
        return np.clip(rounded, 0, length - 1).astype(np.int64)[None], np.ones((1, size), np.float32)
    if mode == "linear":
        old = np.clip(old, 0, length - 1)
        base = np.floor(old)
        taps, part = np.stack([base, base + 1]), old - base
        weights = np.stack([one - part, part])
    else:
        base = np.floor(old)
        part, a = old - base, np.float32(steepness)
        taps = np.stack([base + i for i in (-1, 0, 1, 2)])
        near, far = np.stack([part, one - part]), np.stack([part + 1, 2 - part])
        near, far = ((a + 2) * near - (a + 3)) * near**2 + 1, ((a * far - 5 * a) * far + 8 * a) * far - 4 * a
        weights = np.stack([far[0], near[0], near[1], far[1]])
        if inner:
            weights = np.where((taps >= 0) & (taps < length), weights, 0)
            weights /= weights.sum(axis=0)
    return np.clip(taps, 0, length - 1).astype(np.int64), weights.astype(np.float32)
