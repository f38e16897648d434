"""Columns are what a layer multiplies, and rounding them in turn loses far less than rounding to nearest."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vmq import gptq
from vmq.gptq import Moments, layer_of, round_columns


def node(op: str, **attrs: Any) -> Any:
    return SimpleNamespace(op=op, attrs=attrs, inputs=[])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(inputs: int, count: int, seed: int = 0) -> Tensor:
    """[1,inputs,count] with strong correlation between inputs."""
    strengths = 0.7 ** torch.arange(inputs, dtype=torch.float64)
    return (random(inputs, inputs, seed=seed) * strengths @ random(inputs, count, seed=seed + 1) + 0.7)[None]


# -- columns ---------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_columns_times_weights_are_the_convolution(data: st.DataObject):
    groups = data.draw(st.sampled_from([1, 2, 4]))
    kernel, stride, dilation = ([data.draw(st.integers(1, n)) for _ in range(2)] for n in (3, 2, 2))
    pads = [data.draw(st.integers(0, 2)) for _ in range(4)]
    weight = random(groups * 3, 2, *kernel)
    x = random(2, groups * 2, 9, 11, seed=1)
    layer = layer_of(node("Conv", group=groups, strides=stride, dilations=dilation, pads=pads), weight.shape)
    assert layer is not None
    columns = layer.columns(x, (0.0, 0.0))
    padded = F.pad(x, (pads[1], pads[3], pads[0], pads[2]))
    want = F.conv2d(padded, weight, None, stride, 0, dilation, groups)
    y = (layer.split(weight) @ columns).reshape(groups * 3, 2, *want.shape[2:]).movedim(1, 0)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(layer.join(layer.split(weight)), weight)


@pytest.mark.parametrize(("op", "attrs"), [("MatMul", {}), ("Gemm", {}), ("Gemm", {"transB": 1})])
def test_columns_of_a_product(op: str, attrs: dict[str, int]):
    weight, x = random(5, 7), random(2, 3, 5, seed=1)
    given_ = weight.T.contiguous() if attrs else weight
    layer = layer_of(node(op, **attrs), given_.shape)
    assert layer is not None
    torch.testing.assert_close((layer.split(given_) @ layer.columns(x, (0.0, 0.0)))[0].T, (x @ weight).reshape(6, 7))
    torch.testing.assert_close(layer.join(layer.split(given_)), given_)


def test_positions_are_a_sample_of_the_convolution(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gptq, "POSITIONS", 12)
    weight, x = random(3, 2, 3, 3), random(1, 2, 20, 24, seed=1)
    layer = layer_of(node("Conv", pads=[1, 1, 1, 1], strides=[2, 2]), weight.shape)
    assert layer is not None
    everything = F.conv2d(x, weight, None, 2, 1)[0].reshape(3, -1).T
    for offset in ((0.0, 0.0), (0.4, 0.9), (0.99, 0.99)):
        found = (layer.split(weight) @ layer.columns(x, offset))[0].T
        assert 6 <= len(found) <= 24
        distances = (found[:, None] - everything).abs().amax(2)
        assert float(distances.amin(1).max()) < 1e-9


@pytest.mark.parametrize("unknown", [node("ConvTranspose"), node("Conv", auto_pad="SAME_UPPER"),
                                     node("Gemm", transA=1), node("Gemm", alpha=0.5)])
def test_what_it_does_not_know(unknown: Any):
    shape = (4, 2, 3, 3) if "Conv" in unknown.op else (4, 2)
    assert layer_of(unknown, shape) is None
    assert layer_of(node("Conv"), (4, 2, 3)) is None


@pytest.mark.parametrize(("multiplies", "fits", "too_large"), [
    (node("Conv"), (4, 512, 3, 3), (4, 513, 3, 3)),
    (node("Conv", group=8), (9000, 4, 3, 3), (8, 4609, 1, 1)),
    (node("MatMul"), (4608, 5000), (4609, 2)),
    (node("Gemm", transB=1), (5000, 4608), (2, 4609)),
])
def test_layers_of_too_many_inputs_are_left(multiplies: Any, fits: tuple[int, ...], too_large: tuple[int, ...]):
    assert layer_of(multiplies, fits) is not None
    assert layer_of(multiplies, too_large) is None


# -- rounding --------------------------------------------------------------------------------------------

SCALE = torch.full((1, 6, 1), 0.2, dtype=torch.float64)


def error(weight: Tensor, steps: Tensor, scale: Tensor, x: Tensor, ours: Tensor, gain: Tensor) -> float:
    return float((weight @ x - (steps * scale) @ ours - gain[:, :, None]).square().mean())


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(-8, 7)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("biased", [True, False])
def test_loses_less_than_rounding_to_nearest(seed: int, biased: bool):
    x, weight = correlated(24, 4000, seed), 0.4 * random(1, 6, 24, seed=seed)
    _, steps, gain, _ = round_columns(weight, SCALE, (-8, 7), Moments.of(x, x), biased=biased)
    plain = nearest(weight, SCALE)
    off = (weight @ x - (plain * SCALE) @ x).mean(2) if biased else torch.zeros(1, 6)
    assert error(weight, steps, SCALE, x, x, gain) < 0.4 * error(weight, plain, SCALE, x, x, off)
    assert bool((steps == steps.round()).all())
    assert float(steps.min()) >= -8
    assert float(steps.max()) <= 7


def test_near_the_best_of_all_roundings():
    x, weight = correlated(6, 500, 3), 0.3 * random(1, 1, 6, seed=5)
    scale = SCALE[:, :1]
    _, steps, gain, _ = round_columns(weight, scale, (-8, 7), Moments.of(x, x), biased=False)
    floor = (weight / scale).floor()
    losses = sorted(error(weight, floor + torch.tensor(up), scale, x, x, gain)
                    for up in itertools.product((-1.0, 0.0, 1.0, 2.0), repeat=6))
    assert error(weight, steps, scale, x, x, gain) <= losses[20]        # of 4096


def test_inputs_that_do_not_correlate_are_rounded_to_nearest():
    x, weight = random(1, 16, 200_000), 0.4 * random(1, 6, 16, seed=2)
    x = torch.linalg.solve(torch.linalg.cholesky(x[0] @ x[0].T / x.shape[2]), x[0])[None]      # exactly none
    wanted, steps, *_ = round_columns(weight, SCALE, (-8, 7), Moments.of(x, x), biased=False)
    assert torch.equal(steps, nearest(weight, SCALE))
    torch.testing.assert_close(wanted, weight)


def test_makes_up_for_what_goes_in_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gptq, "SHARE", 1.0)
    monkeypatch.setattr(gptq, "DAMPING", 1e-9)
    monkeypatch.setattr(gptq, "FEW", 0.0)
    x, weight = correlated(8, 5000, 1), random(1, 6, 8, seed=4)
    ours = (torch.eye(8, dtype=torch.float64) + 0.2 * random(8, 8, seed=9)) @ x + 0.3
    wanted, steps, gain, _ = round_columns(weight, SCALE * 1e-5, (-10**9, 10**9), Moments.of(ours, x), biased=True)
    torch.testing.assert_close(wanted @ (ours - ours.mean(2, keepdim=True)), weight @ (x - x.mean(2, keepdim=True)),
                               rtol=1e-4, atol=1e-4)
    assert error(weight, steps, SCALE * 1e-5, x, ours, gain) < 1e-8


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("biased", [True, False])
def test_scales_that_may_change_lose_less(seed: int, biased: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gptq, "DAMPING", 1e-6)
    monkeypatch.setattr(gptq, "FEW", 0.0)
    x, weight = correlated(24, 4000, seed), 0.4 * random(1, 6, 24, seed=seed)
    scale = SCALE * torch.linspace(0.6, 1.6, 6, dtype=torch.float64)[None, :, None]
    moments = Moments.of(x, x)
    _, steps, gain, same = round_columns(weight, scale, (-8, 7), moments, biased=biased)
    assert torch.equal(same, scale)
    _, fitted, other, found = round_columns(weight, scale, (-8, 7), moments, biased=biased, fitted=True)
    for k in range(6):                      # no channel is worse off
        row, part = slice(k, k + 1), (slice(None), slice(k, k + 1))
        assert error(weight[part], fitted[part], found[part], x, x, other[:, row]) \
            <= (1 + 1e-4) * error(weight[part], steps[part], scale[part], x, x, gain[:, row])
    assert error(weight, fitted, found, x, x, other) < 0.85 * error(weight, steps, scale, x, x, gain)
    assert bool((fitted == fitted.round()).all())
    assert float(fitted.min()) >= -8
    assert float(fitted.max()) <= 7
    assert bool(((found > 0.5 * scale) & (found < 2.0 * scale)).all())


def test_no_integer_and_no_scale_is_better_beside_the_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gptq, "TURNS", 40)
    x, weight = correlated(10, 500, 3), 0.3 * random(1, 6, 10, seed=5)
    _, steps, _, scale = round_columns(weight, SCALE, (-8, 7), Moments.of(x, x), biased=False, fitted=True)
    hessian = x[0] @ x[0].T / 500
    hessian += torch.eye(10) * (gptq.DAMPING + gptq.FEW * 10 / 500) * hessian.diagonal().mean()

    def lost(steps: Tensor, scale: Tensor) -> Tensor:
        off = (steps * scale - weight)[0]
        return ((off @ hessian) * off).sum(1)

    least = lost(steps, scale)
    for k in range(10):
        for side in (-1.0, 1.0):
            other = steps.clone()
            other[:, :, k] += side
            allowed = (other[0, :, k] >= -8) & (other[0, :, k] <= 7)
            assert bool((lost(other, scale) >= (1 - 1e-6) * least)[allowed].all())
    for factor in (0.999, 1.001):
        assert bool((lost(steps, scale * factor) > least).all())


def test_channels_of_zeros_keep_their_scales():
    x, weight = correlated(8, 500), 0.3 * random(1, 6, 8)
    weight[:, 2] = 0.0
    _, steps, _, scale = round_columns(weight, SCALE, (-8, 7), Moments.of(x, x), biased=True, fitted=True)
    assert not bool(steps[:, 2].any())
    assert torch.equal(scale[:, 2], SCALE[:, 2])


def test_the_mean_stays():
    x, weight = correlated(12, 3000, 2), 0.3 * random(1, 6, 12, seed=3)
    ours = x + 0.1 * random(1, 12, 3000, seed=8) + 0.05
    _, steps, gain, _ = round_columns(weight, SCALE, (-8, 7), Moments.of(ours, x), biased=True)
    torch.testing.assert_close(((steps * SCALE) @ ours).mean(2) + gain, (weight @ x).mean(2))


def test_groups_are_on_their_own():
    x, weight = torch.cat([correlated(9, 2000, k) for k in range(3)]), 0.3 * random(3, 2, 9)
    scale = torch.full((3, 2, 1), 0.2, dtype=torch.float64)
    _, together, *_ = round_columns(weight, scale, (-8, 7), Moments.of(x, x), biased=True)
    for k in range(3):
        part = slice(k, k + 1)
        _, alone, *_ = round_columns(weight[part], scale[part], (-8, 7), Moments.of(x[part], x[part]), biased=True)
        assert torch.equal(together[part], alone)


def test_moments_add_up():
    x, y = correlated(5, 100), correlated(5, 100, 4)
    whole = Moments.of(x, y)
    parts = Moments.of(x[:, :, :30], y[:, :, :30]).add(Moments.of(x[:, :, 30:], y[:, :, 30:]))
    assert whole.count == parts.count == 100
    for name in ("ours", "off", "square", "cross"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_inputs_that_are_always_the_same():
    x, weight = correlated(8, 500), 0.3 * random(1, 6, 8)
    x[:, 3] = 0.0
    _, steps, gain, _ = round_columns(weight, SCALE, (-8, 7), Moments.of(x, x), biased=True)
    assert bool(torch.isfinite(steps).all())
    assert bool(torch.isfinite(gain).all())
    constant = torch.full_like(x, 700.0)
    constant[:, 0] += 1e-3 * x[:, 0]
    for biased in (True, False):
        moments = Moments.of(constant.float(), x.float())
        _, steps, gain, _ = round_columns(weight, SCALE, (-8, 7), moments, biased=biased)
        assert bool(torch.isfinite(steps).all())
        assert bool(torch.isfinite(gain).all())
    nothing = torch.zeros_like(x)
    _, steps, *_ = round_columns(weight, SCALE, (-8, 7), Moments.of(nothing, nothing), biased=True)
    assert torch.equal(steps, nearest(weight, SCALE))
