"""The fake quantizer: quantize and dequantize in one step, with gradients to learn by.

    v = x / scale,   low = qmin - zero,   high = qmax - zero,   k = clip(round_half_even(v), low, high),   y = k * scale

                 low <= v <= high   outside
    dy/dx               1              0       straight through the rounding
    dy/dscale         k - v            k       LSQ, Esser et al. 2020 (arXiv:1902.08153), eq. 3
    dy/dzero            0           -scale     LSQ+, Bhalgat et al. 2020 (arXiv:2004.09576), eq. 6, in steps

The zero point is learned as a float and rounded on its way in, straight through. The bounds are inside: a zero
behind a Relu has a step of its own and asks for no other zero point.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vmq.quant import SMALLEST_SCALE
from vmq.spec import QuantSpec


class FakeQuantize(nn.Module):
    """A quantizer as a layer; what it computes is exactly QuantizeLinear, Clip and DequantizeLinear.

    Attributes:
        scale: float parameter, [] or [1] for the whole tensor, [channels] along `spec.axis`.
        zero: float parameter of the same shape; counts rounded and within the grid.
        spec: the grid of the zero point's element type.
        limits: the smallest and largest step; within the grid of `spec`, and narrower where a Clip follows.
        normalize: gradients of scale and zero are multiplied by 1 / sqrt(values * largest step), as LSQ does.
    """

    def __init__(self, scale: nn.Parameter, zero: nn.Parameter, spec: QuantSpec,
                 limits: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.scale, self.zero, self.spec = scale, zero, spec
        self.limits = limits or (spec.qmin, spec.qmax)
        self.normalize = False

    def forward(self, x: Tensor) -> Tensor:
        """The values of x on the grid, in x's shape and type."""
        gain = (x.numel() * max(1, self.limits[1])) ** -0.5 if self.normalize else 1.0
        return fake_quantize(x, self.scale, self.zero, self.spec, self.limits, gain)

    def steps(self, x: Tensor) -> Tensor:
        """The integers that x is rounded to (QuantizeLinear), int8, uint8 or int32, without gradients."""
        with torch.no_grad():
            scale, zero = (along(t, x, self.spec.axis) for t in (grid_scale(self.scale), self.grid_zero()))
            steps = torch.div(x, scale).round_().add_(zero).clamp_(*self.limits)
            return steps.to(torch.int8 if self.spec.signed else torch.uint8 if self.spec.bits <= 8 else torch.int32)

    def grid_zero(self) -> Tensor:
        """The zero point as it is used: integers of the grid, as floats."""
        return grid_zero(self.zero, self.spec)

    def extra_repr(self) -> str:
        """What printing the layer shows."""
        return f"{self.spec.dtype.name}, steps {self.limits[0]} to {self.limits[1]}, axis {self.spec.axis}"


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, limits: tuple[int, int],
                  gain: float = 1.0) -> Tensor:
    """The formulas above as one differentiable function.

    Args:
        x: float32 or float64, any shape.
        scale, zero: one number, or one for each channel of `spec.axis`.
        spec: the grid that the zero point lies on.
        limits: qmin and qmax.
        gain: multiplies the gradients of scale and zero.
    """
    y: Tensor = _FakeQuantize.apply(x, scale, zero, spec, limits, gain)  # type: ignore[no-untyped-call]
    return y


def dequantize(steps: Tensor, scale: Tensor, zero: Tensor | None, axis: int | None) -> Tensor:
    """DequantizeLinear of integers, (steps - zero) * scale; differentiable in scale and zero."""
    values = steps.to(scale.dtype)
    if zero is not None:
        values = values - along(zero, values, axis)
    return values * along(scale, values, axis)


def along(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    """A parameter in a shape that broadcasts with x along an axis; [] when it is a single number."""
    if parameter.numel() == 1 and (axis is None or parameter.ndim == 0):
        return parameter.reshape(())
    shape = [1] * x.ndim
    shape[axis or 0] = -1
    return parameter.reshape(shape)


def grid_scale(scale: Tensor) -> Tensor:
    """A learned scale as it is used: not below the smallest."""
    return scale.detach().clamp(min=SMALLEST_SCALE)


def grid_zero(zero: Tensor, spec: QuantSpec) -> Tensor:
    """A learned zero point as it is used: an integer of the grid, as a float."""
    return zero.detach().round().clamp_(spec.qmin, spec.qmax)


class _FakeQuantize(torch.autograd.Function):
    """Keeps x and y alone for the gradients: the layers around it keep most of them anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, limits: tuple[int, int],
                gain: float) -> Tensor:
        s, z = along(grid_scale(scale), x, spec.axis), along(grid_zero(zero, spec), x, spec.axis)
        y = torch.div(x, s).round_()
        if s.ndim:
            low, high = limits[0] - z, limits[1] - z
            y.clamp_(low, high)
            ctx.inside = _InsideEach(low * s, high * s)
        else:
            first, last = (limit - z.item() for limit in limits)
            y.clamp_(first, last)
            ctx.inside = _Inside(first * s.item(), last * s.item(), x.dtype)
        y.mul_(s)
        ctx.save_for_backward(x, y, s)
        ctx.shape, ctx.gain = scale.shape, gain
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gy,), (x, y, s), inside = gradients, ctx.saved_tensors, ctx.inside
        _, wants_scale, wants_zero = ctx.needs_input_grad[:3]
        gx, *rest = inside(x, gy, x) if wants_scale else inside(x, gy)
        gscale = gzero = None
        for moved in rest:
            torch.sub(y, moved, out=moved)                  # k - v inside, k outside; times scale
            gscale = (inside.dot(gy, moved, s) / s).mul_(ctx.gain).reshape(ctx.shape)
        if wants_zero:
            gzero = (inside.sum(gx, s) - inside.sum(gy, s)).mul_(s).mul_(ctx.gain).reshape(ctx.shape)
        return gx, gscale, gzero, None, None, None


class _Inside:
    """The values of tensors where low <= x <= high, and 0 elsewhere, in one pass; one range for all."""

    def __init__(self, low: float, high: float, dtype: torch.dtype) -> None:
        kind = np.float64 if dtype == torch.float64 else np.float32
        self.low = float(np.nextafter(kind(low), kind(-np.inf)))        # the open interval that holds both
        self.high = float(np.nextafter(kind(high), kind(np.inf)))

    def __call__(self, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        return [torch.ops.aten.hardtanh_backward(t, x, self.low, self.high) for t in tensors]

    def dot(self, a: Tensor, b: Tensor, _: Tensor) -> Tensor:
        return torch.dot(a.flatten(), b.flatten())

    def sum(self, a: Tensor, _: Tensor) -> Tensor:
        return a.sum()


class _InsideEach:
    """The same for one range a channel; sums are those of each channel."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        self.low, self.high = low, high

    def __call__(self, x: Tensor, *tensors: Tensor) -> list[Tensor]:
        mask = (x >= self.low).logical_and_(x <= self.high)
        return [t * mask for t in tensors]

    def dot(self, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
        return (a * b).sum_to_size(like.shape)

    def sum(self, a: Tensor, like: Tensor) -> Tensor:
        return a.sum_to_size(like.shape)
