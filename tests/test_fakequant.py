"""The fake quantizer: values bit for bit, gradients against the closed forms and against finite differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vmq.fakequant import FakeQuantize, dequantize, fake_quantize
from vmq.quant import dequantize as dequantize_array
from vmq.quant import quantize
from vmq.spec import QuantSpec

pytestmark = pytest.mark.usefixtures("one_thread")


Setting = tuple[Tensor, Tensor, Tensor, QuantSpec, tuple[int, int]]


@st.composite
def settings_of(draw: Any) -> Setting:
    """x, scale, zero, grid and limits, in float64: ties, bounds and values far outside among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = draw(st.sampled_from([None, draw(st.integers(-len(shape), len(shape) - 1))]))
    spec = QuantSpec(draw(st.sampled_from([4, 8])), draw(st.booleans()), axis)
    limits = (0, 15) if spec.bits == 8 and not spec.signed and draw(st.booleans()) else (spec.qmin, spec.qmax)
    size = () if axis is None else (shape[axis],)
    scale = np.exp(rng.normal(size=size) - 2)
    zero = rng.uniform(limits[0] - 0.4, limits[1] + 0.4, size)
    along = [1] * len(shape)
    if axis is not None:
        along[axis] = -1
    steps = rng.uniform(limits[0] - 3, limits[1] + 3, shape) - np.rint(zero).reshape(along)
    steps = np.where(rng.random(shape) < 0.3, np.rint(2 * steps) / 2, steps)
    x = steps * scale.reshape(along)
    return *(torch.from_numpy(np.asarray(t)) for t in (x, scale, zero)), spec, limits


def zeros_of(zero: Tensor, spec: QuantSpec) -> Tensor:
    return zero.round().clamp(spec.qmin, spec.qmax)


def broadcast(parameter: Tensor, x: Tensor, axis: int | None) -> Tensor:
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    return parameter.reshape(shape)


def channel_sums(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return values.sum().reshape(like.shape)
    return values.movedim(axis, 0).reshape(values.shape[axis], -1).sum(1).reshape(like.shape)


def gradients(setting: Setting, upstream: Tensor, gain: float = 1.0) -> tuple[Tensor, ...]:
    *tensors, spec, limits = setting
    leaves = [t.clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(fake_quantize(*leaves, spec, limits, gain), leaves, upstream)


@settings(max_examples=80, derandomize=True)
@given(settings_of())
def test_values_are_those_of_the_integer_arithmetic(setting: Setting):
    x, scale, zero, spec, limits = setting
    x, scale = x.float(), scale.float()
    z = zeros_of(zero, spec).numpy()
    integers = np.clip(quantize(x.numpy(), scale.numpy(), z, spec), *limits)
    expected = dequantize_array(integers, scale.numpy(), z, spec.axis)
    assert np.array_equal(fake_quantize(x, scale, zero.float(), spec, limits).numpy(), expected)
    module = FakeQuantize(nn.Parameter(scale), nn.Parameter(zero.float()), spec, limits)
    assert np.array_equal(module(x).detach().numpy(), expected)
    assert np.array_equal(module.steps(x).numpy(), integers)
    again = dequantize(module.steps(x), scale, module.grid_zero(), spec.axis)
    assert np.array_equal(again.detach().numpy(), expected)


@settings(max_examples=80, derandomize=True)
@given(settings_of())
def test_gradients_are_the_closed_forms_of_lsq_and_lsq_plus(setting: Setting):
    x, scale, zero, spec, limits = setting
    upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    gx, gscale, gzero = gradients(setting, upstream, gain=0.25)
    s, z = broadcast(scale, x, spec.axis), broadcast(zeros_of(zero, spec), x, spec.axis)
    v, low, high = x / s, limits[0] - z, limits[1] - z
    # bounds are inside; a few of them are drawn, where x / s may round to either side
    inside = (x >= low * s) & (x <= high * s)
    by_scale = torch.where(inside, v.round() - v, torch.where(v < low, low, high))
    by_zero = torch.where(inside, torch.zeros(()).double(), -s)
    torch.testing.assert_close(gx, torch.where(inside, upstream, 0.0), rtol=0, atol=0)
    torch.testing.assert_close(gscale, 0.25 * channel_sums(upstream * by_scale, scale, spec.axis), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gzero, 0.25 * channel_sums(upstream * by_zero, scale, spec.axis), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, derandomize=True)
@given(settings_of())
def test_gradients_are_finite_differences_with_the_rounding_frozen(setting: Setting):
    """Straight through means: the residue of the rounding stays what it is. Then the function is smooth."""
    x, scale, zero, spec, limits = setting
    s, z = broadcast(scale, x, spec.axis), broadcast(zero, x, spec.axis)
    rounded = broadcast(zeros_of(zero, spec), x, spec.axis)
    v = x / s
    near = ((v + rounded - limits[0]).abs() < 1e-3) | ((v + rounded - limits[1]).abs() < 1e-3)   # the kinks
    upstream = torch.where(near, 0.0, torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)))
    inside = (v + rounded > limits[0]) & (v + rounded < limits[1])
    residue = torch.where(inside, v.round() - v, 0.0)

    def smooth(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        s, moved = broadcast(scale, x, spec.axis), broadcast(zero, x, spec.axis) + (rounded - z)
        return (upstream * (torch.clamp(x / s + moved, *limits) - moved + residue) * s).sum()

    expected = torch.autograd.functional.jacobian(smooth, (x, scale, zero))
    torch.testing.assert_close(gradients(setting, upstream), expected, rtol=1e-9, atol=1e-9)
    step = 1e-7
    for index, tensor in enumerate((x, scale, zero)):
        place = (0,) * tensor.ndim
        ends = []
        for sign in (1, -1):
            moved = [t.clone() for t in (x, scale, zero)]
            moved[index][place] += sign * step
            ends.append(smooth(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(expected[index][place], slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_of_saturated_values_and_of_dequantization_are_true_ones(axis: int | None):
    spec = QuantSpec(4, signed=False, axis=axis)
    size = () if axis is None else (2,)
    x = torch.tensor([[-9.0, 8.0, 11.0], [7.0, -6.0, 12.0]], dtype=torch.float64, requires_grad=True)
    scale = torch.full(size, 0.31, dtype=torch.float64, requires_grad=True)
    zero = torch.full(size, 6.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, s: fake_quantize(x, s, zero.detach(), spec, (0, 15)), (x, scale))
    one_more = fake_quantize(x, scale, zero + 1, spec, (0, 15)) - fake_quantize(x, scale, zero, spec, (0, 15))
    gzero = torch.autograd.grad(fake_quantize(x, scale, zero, spec, (0, 15)).sum(), zero)[0]
    torch.testing.assert_close(gzero, channel_sums(one_more, zero, axis))
    steps = torch.tensor([[-8, 7, 3], [0, 1, 2]], dtype=torch.int8)
    assert torch.autograd.gradcheck(lambda s, z: dequantize(steps, s, z, axis), (scale, zero))


def test_zeros_behind_a_relu_ask_for_no_other_zero_point():
    x, scale, zero = torch.zeros(5), torch.tensor(0.1), torch.tensor(0.0)
    gx, gscale, gzero = gradients((x, scale, zero, QuantSpec(8, signed=False), (0, 255)), torch.ones(5))
    assert (gx == 1).all()
    assert gscale == 0
    assert gzero == 0


def test_a_scale_or_zero_point_that_went_astray_is_held_on_the_grid():
    x = torch.linspace(-2, 2, 9)
    spec = QuantSpec(4, signed=False)
    assert torch.isfinite(fake_quantize(x, torch.tensor(-1.0), torch.tensor(7.0), spec, (0, 15))).all()
    assert torch.equal(fake_quantize(x, torch.tensor(0.1), torch.tensor(19.0), spec, (0, 15)),
                       fake_quantize(x, torch.tensor(0.1), torch.tensor(15.0), spec, (0, 15)))


def test_normalized_gradients():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(2))
    module = FakeQuantize(nn.Parameter(torch.tensor(0.2)), nn.Parameter(torch.tensor(7.0)), QuantSpec(4, signed=False))
    plain = torch.autograd.grad(module(x).sum(), [module.scale, module.zero])
    module.normalize = True
    scaled = torch.autograd.grad(module(x).sum(), [module.scale, module.zero])
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b, a / (200 * 15) ** 0.5)


def test_keeps_nothing_but_its_input_and_its_output():
    x = torch.randn(1, 8, 32, 32, requires_grad=True)
    scale, zero = torch.tensor(0.2, requires_grad=True), torch.tensor(7.0, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = fake_quantize(x, scale, zero, QuantSpec(4, signed=False), (0, 15))
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {x.data_ptr(), y.data_ptr()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_same_on_cuda():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(3))
    tensors = (x, torch.tensor(0.2), torch.tensor(7.0))
    grid = (QuantSpec(4, signed=False), (0, 15))
    there = gradients((*(t.cuda() for t in tensors), *grid), torch.ones(x.shape, device="cuda"))
    for a, b in zip(there, gradients((*tensors, *grid), torch.ones(x.shape)), strict=True):
        torch.testing.assert_close(a.cpu(), b)
