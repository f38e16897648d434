"""The arithmetic of quantization, in numpy and float32, as ONNX defines it.

    q = saturate(round_half_even(x / scale) + zero_point)        QuantizeLinear
    x' = (q - zero_point) * scale                                DequantizeLinear

and the search for the range that loses least, minimising sum |x - x'|^p with p = 2.4, which is how BRECQ
and QDrop initialise (Li et al. 2021; Wei et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmq.spec import QuantSpec

Floats = NDArray[np.float32]

BINS = 2048
"""Resolution of the histogram that ranges are searched on: eight bins for each 8-bit step."""
SMALLEST_SCALE = float(np.finfo(np.float32).tiny) * 2**24
"""No scale is smaller: x / scale and scale * scale stay finite and normal."""


def _hard_sigmoid(x: NDArray[Any], alpha: float = 0.2, beta: float = 0.5) -> NDArray[Any]:
    return np.clip(alpha * x + beta, 0.0, 1.0)


FUNCTIONS: Mapping[str, Callable[..., NDArray[Any]]] = {
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda x: x * _hard_sigmoid(x, 1.0 / 6.0, 0.5),
    "Sigmoid": lambda x: 0.5 * np.tanh(0.5 * x) + 0.5,
    "Tanh": np.tanh,
}
"""Elementwise functions that ranges are searched through, as numpy on float32."""


def quantize(x: NDArray[Any], scale: NDArray[Any] | float, zero_point: NDArray[Any] | int, spec: QuantSpec,
             ) -> NDArray[np.int32]:
    """QuantizeLinear on the grid of `spec`; scale and zero point broadcast along `spec.axis`. Returns int32."""
    s, z = _along(scale, x.ndim, spec.axis), _along(zero_point, x.ndim, spec.axis)
    with np.errstate(over="ignore"):          # infinitely many steps saturate like many
        steps = np.rint(x.astype(np.float32) / s.astype(np.float32)) + z.astype(np.float32)
    return np.asarray(np.clip(steps, spec.qmin, spec.qmax), np.int32)


def dequantize(q: NDArray[Any], scale: NDArray[Any] | float, zero_point: NDArray[Any] | int,
               axis: int | None = None) -> Floats:
    """DequantizeLinear; scale and zero point broadcast along `axis`."""
    s, z = _along(scale, q.ndim, axis), _along(zero_point, q.ndim, axis)
    return ((q.astype(np.int32) - z.astype(np.int32)).astype(np.float32) * s.astype(np.float32)).astype(np.float32)


def scale_of_range(low: NDArray[Any] | float, high: NDArray[Any] | float, spec: QuantSpec,
                   ) -> tuple[Floats, NDArray[np.int32]]:
    """Scale and zero point of the asymmetric grid that spans [low, high], widened to hold 0 exactly."""
    low = np.minimum(np.asarray(low, np.float64), 0.0)
    high = np.maximum(np.asarray(high, np.float64), 0.0)
    scale = np.maximum((high - low) / (spec.qmax - spec.qmin), SMALLEST_SCALE).astype(np.float32)
    zero_point = np.clip(np.rint(spec.qmin - low / scale), spec.qmin, spec.qmax).astype(np.int32)
    return scale, zero_point


def search_range(samples: NDArray[Any], low: float, high: float, spec: QuantSpec, *, norm: float = 2.4,
                 steps: int = 100, through: Callable[[Floats], Floats] | None = None,
                 ) -> tuple[Floats, NDArray[np.int32]]:
    """Scale and zero point of an activation that minimise the p-norm error.

    Args:
        samples: values of the tensor, any shape.
        low, high: smallest and largest value it ever took (they may lie beyond the samples).
        spec: an unsigned grid.
        norm: p.
        steps: ranges tried, as equal shares of the full one: both ends together, then each end on its own.
        through: the function that reads the tensor, elementwise: the error is then that of its result. What a
            sigmoid saturates, or a hardswish makes 0, needs no levels.

    Returns:
        Two scalars (shape []): float32 scale, int32 zero point.
    """
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if high - low < SMALLEST_SCALE:
        return scale_of_range(0.0, 1.0, spec)
    values, counts = _histogram(samples, low, high)
    wanted = values if through is None else through(values)
    unit = max(np.abs(wanted).max(), np.float32(SMALLEST_SCALE))   # of errors: their powers neither vanish nor overflow

    def best(lows: NDArray[np.float64], highs: NDArray[np.float64]) -> tuple[float, float]:
        scales, zeros = scale_of_range(lows, highs, spec)
        q = np.clip(np.rint(values / scales[:, None]) + zeros[:, None], spec.qmin, spec.qmax)
        if through is None:
            error = np.abs((q - zeros[:, None]) * (scales[:, None] / unit) - values / unit)
        else:
            error = np.abs(through(((q - zeros[:, None]) * scales[:, None]).astype(np.float32)) - wanted) / unit
        index = int(np.argmin(np.power(error, np.float32(norm)).astype(np.float64) @ counts))
        return float(lows[index]), float(highs[index])

    shrink = np.arange(steps, 0, -1) / steps
    lo, hi = best(low * shrink, high * shrink)
    if low < 0.0 < high:
        for _ in range(2):
            ends = np.unique(np.append(low * shrink, lo))[::-1]
            lo, hi = best(ends, np.full(len(ends), hi))
            ends = np.unique(np.append(high * shrink, hi))[::-1]
            lo, hi = best(np.full(len(ends), lo), ends)
    return scale_of_range(lo, hi, spec)


def search_weight_scale(weight: NDArray[Any], spec: QuantSpec, *, norm: float = 2.4, steps: int = 100,
                        limits: tuple[int, int] | None = None) -> Floats:
    """Scales of a symmetric weight grid that minimise the p-norm error, one per channel of `spec.axis`.

    Args:
        weight: any shape.
        spec: a signed grid.
        norm: p.
        steps: scales tried, as equal shares of the full one.
        limits: smallest and largest integer that is used; default: all of the grid.

    Returns:
        float32 [channels], or [] when the axis is None. A channel of zeros gets scale 1.
    """
    rows = np.moveaxis(weight, spec.axis, 0).reshape(weight.shape[spec.axis], -1) if spec.axis is not None \
        else weight.reshape(1, -1)
    rows = rows.astype(np.float32)
    largest = np.abs(rows).max(axis=1)
    low, high = limits or (spec.qmin, spec.qmax)
    full = np.maximum(largest / high, SMALLEST_SCALE).astype(np.float32)
    scale, least = full.copy(), np.full(len(rows), np.inf)
    for shrink in np.arange(steps, 0, -1) / steps:
        tried = np.maximum(full * np.float32(shrink), np.float32(SMALLEST_SCALE))
        q = np.clip(np.rint(rows / tried[:, None]), low, high)
        off = np.abs(q - rows / tried[:, None]) * np.float32(shrink)       # the error in units of `full`
        error = np.power(off, np.float32(norm)).sum(axis=1, dtype=np.float64)
        better = error < least
        scale[better], least[better] = tried[better], error[better]
    scale[largest == 0.0] = 1.0
    chosen: Floats = scale if spec.axis is not None else scale.reshape(())
    return chosen


def _along(parameter: NDArray[Any] | float | int, rank: int, axis: int | None) -> NDArray[Any]:
    array = np.asarray(parameter)
    if array.ndim == 0 or axis is None:
        return array
    shape = [1] * rank
    shape[axis] = -1
    return array.reshape(shape)


def _histogram(samples: NDArray[Any], low: float, high: float) -> tuple[Floats, NDArray[np.float64]]:
    """Samples as (values, counts): themselves when few are distinct, else the means of `BINS` equal bins."""
    flat = np.asarray(samples, np.float32).ravel()
    values, counts = np.unique(flat, return_counts=True)
    if len(values) > BINS:
        places = (values.astype(np.float64) - low) * (BINS / (high - low))
        bins = np.clip(places.astype(np.int64), 0, BINS - 1)
        weights = np.bincount(bins, counts, BINS)
        sums = np.bincount(bins, counts * values.astype(np.float64), BINS)
        filled = weights > 0
        values, counts = (sums[filled] / weights[filled]).astype(np.float32), weights[filled]
    ends = np.array([low, high], np.float32)      # the extremes count once each, sampled or not
    return np.concatenate([values, ends]), np.concatenate([counts.astype(np.float64), np.ones(2)])
